"""`--learning-rate auto`: chooses a rate by short trials, all at once, on the first part of the run's data.

Seven rates, half a power of ten apart, each train a new adapter over one base (`many.jobs`). A trial takes a
twentieth of the run's steps, on the run's first rows, with the run's schedule compressed. All trials are evaluated on
the same held-out rows. A short run tolerates higher rates than a long one, and above the best rate the loss rises
steeply. So the choice is the lowest rate with nearly the best gain, not the lowest loss:

    gain(rate) = log(loss of the base / loss after the trial)
    chosen     = the lowest rate with gain >= 0.95 of the largest

The gain is a logarithm, so that a fall from 1 to 0.5 counts as much as a fall from 10 to 5. The best rate
of LoRA hardly depends on the rank (Schulman et al. 2025, "LoRA Without Regret"), so a coarse grid suffices. A sweep
can search a finer one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from loratune.base.forward import prepare
from loratune.config import LoraConfig, TrainConfig
from loratune.data.pack import Row
from loratune.errors import AdapterError, ConfigError, ModelError, TrainingError
from loratune.many.bank import Bank
from loratune.many.capacity import row_tokens, slots_that_fit
from loratune.many.jobs import Job, Jobs
from loratune.many.step import check_training
from loratune.training.course import Course, Evaluated, Rows
from loratune.training.objectives import objective_named
from loratune.training.step import evaluate_loss

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
_SHARE_OF_STEPS, _FEWEST_STEPS, _MOST_STEPS = 1 / 20, 10, 50
_MEASURED_ROWS = 16
_NEARLY = 0.95


@dataclass(frozen=True, slots=True)
class RateTrial:
    """The trials are about to start."""

    rates: tuple[float, ...]
    steps: int
    at_once: int


@dataclass(frozen=True, slots=True)
class RateChoice:
    """The chosen rate and the results of all trials."""

    rate: float
    steps: int
    """Steps of each trial."""
    base_loss: float
    """Held-out loss before training."""
    losses: dict[float, float]
    """Rate -> held-out loss after its trial; NaN if the trial diverged."""
    held_out: bool
    """False if there are no held-out rows and training rows were evaluated."""

    @property
    def why(self) -> str:
        """One line for the user."""
        best = min(self.losses.values(), key=lambda loss: loss if math.isfinite(loss) else math.inf)
        reason = "the lowest loss" if self.losses[self.rate] == best else "the lowest rate with 95% of the best gain"
        return f"{reason} of {len(self.losses)} rates tried for {self.steps} steps"


def choose_rate(
    model: PreTrainedModel, lora: LoraConfig, training: TrainConfig, rows: Rows, tokens_per_row: int
) -> Iterator[RateTrial | RateChoice]:
    """Tries the rates on the base `model`, which is unchanged afterwards; the last event is the choice.

    Raises:
        ConfigError: several such adapters cannot train at once.
        TrainingError: no rate lowers the loss.
    """
    run = Course(rows, replace(training, learning_rate=RATES[0]))
    steps = min(max(_FEWEST_STEPS, math.ceil(run.total_steps * _SHARE_OF_STEPS)), _MOST_STEPS)
    measured = measured_rows(rows, steps * training.rows_per_step)
    short = replace(
        training, max_steps=steps, eval_every_steps=steps, early_stopping_patience=None, optim="adamw", log_to=[]
    )
    try:
        check_training(short)
    except ConfigError as error:
        raise _not_at_once(error) from error
    objective = objective_named(training.objective)
    tokens = row_tokens(model.device, [tokens_per_row] * len(RATES))
    try:
        at_once = slots_that_fit(model, [Bank.size_of(model, lora)] * len(RATES), tokens)
        bank = Bank.attach(model, [lora], at_once)
    except AdapterError as error:
        raise _not_at_once(error) from error
    yield RateTrial(RATES, steps, at_once)
    try:
        forward = prepare(model, tokens_per_row)
        with forward.installed():  # no row is set, so the base computes alone
            base_loss = evaluate_loss(forward, measured, objective).loss
        jobs = Jobs(forward, bank, tokens, objective=objective)
        for rate in RATES:
            jobs.add(Job(f"{rate:g}", lora, replace(short, learning_rate=rate), Rows(rows.of_epoch, measured)))
        losses = dict.fromkeys(RATES, math.nan)
        for name, event in jobs.run():
            if isinstance(event, Evaluated):
                losses[float(name)] = event.eval_loss
    except ModelError as error:
        raise _not_at_once(error) from error
    finally:
        bank.detach()
    yield RateChoice(pick(base_loss, losses), steps, base_loss, losses, bool(rows.held_out))


def _not_at_once(error: Exception) -> ConfigError:
    return ConfigError(f'learning_rate "auto" trains several adapters at once, but {error}. Name a rate instead')


def pick(base_loss: float, losses: dict[float, float]) -> float:
    """The lowest rate with nearly the largest gain. Raises TrainingError: no rate lowers the loss."""
    gains = {rate: math.log(base_loss / loss) for rate, loss in losses.items() if math.isfinite(loss)}
    best = max(gains.values(), default=0.0)
    if best <= 0:
        raise TrainingError(
            'learning_rate "auto": no rate from '
            f"{min(losses):g} to {max(losses):g} lowers the loss of the base; look at the data with loratune preview"
        )
    return min(rate for rate, gain in gains.items() if gain >= _NEARLY * best)


def measured_rows(rows: Rows, used: int) -> Sequence[Row]:
    """Rows to evaluate, at most 16: held-out rows, else training rows that no trial uses, else any training rows."""
    if rows.held_out:
        return rows.held_out[:_MEASURED_ROWS]
    first = rows.of_epoch(0)
    return first[used : used + _MEASURED_ROWS] or first[:_MEASURED_ROWS]
