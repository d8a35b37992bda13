"""Runs a check on many seeds in a process of its own, so that a crash or a hang costs one seed and is counted."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

from loratune.errors import LoratuneError

SECONDS = 10.0
"""Longest time for one input."""
_GRACE = 5.0  # beyond SECONDS, before the process is killed
_MEMORY = 24 << 30  # bytes of address space

Check = Callable[[int], str]
"""Does the work of one seed. Returns one word about the outcome; raises `Wrong`, or the error for the user."""


class Wrong(AssertionError):
    """A wrong result that was accepted without an error."""


class Found(NamedTuple):
    """One seed's fault."""

    seed: int
    kind: str
    """traceback, wrong, slow, hang or crash."""
    detail: str


@dataclass
class Campaign:
    """Outcome of all seeds."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[Found] = field(default_factory=list)
    slowest: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.outcomes.items()))
        lines = [f"{sum(self.outcomes.values()):,} inputs: {kinds}; slowest {self.slowest:.2f} s"]
        lines += [f"  seed {found.seed}: {found.kind}: {found.detail}" for found in self.faults]
        return "\n".join(lines)


def run(check: Check, seeds: Iterable[int], *, tell: Callable[[str], None] = lambda line: None) -> Campaign:
    """Runs `check` on every seed, in order, in a forked process that is replaced when it crashes or hangs.

    Args:
        tell: receives each fault as it is found.
    """
    campaign, waiting = Campaign(), list(seeds)[::-1]
    while waiting:
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(check, waiting[::-1], theirs))
        worker.start()
        theirs.close()
        while waiting:
            seed = waiting.pop()
            try:
                arrived = ours.poll(SECONDS + _GRACE)
                outcome, seconds, detail = ours.recv() if arrived else ("hang", SECONDS + _GRACE, "killed")
            except EOFError:
                worker.join()
                outcome, seconds, detail = "crash", 0.0, f"the process ended with status {worker.exitcode}"
            campaign.outcomes[outcome] += 1
            campaign.slowest = max(campaign.slowest, seconds)
            if outcome in ("traceback", "wrong", "slow", "hang", "crash"):
                campaign.faults.append(Found(seed, outcome, detail))
                tell(f"seed {seed}: {outcome}: {detail}")
            if outcome in ("hang", "crash"):
                break
        worker.kill()
        worker.join()
        ours.close()
    return campaign


def judged(check: Check, seed: int) -> tuple[str, float, str]:
    """Outcome of one seed, its seconds, and the detail of a fault."""
    started, detail = time.perf_counter(), ""
    try:
        outcome = check(seed)
    except LoratuneError as error:
        outcome, detail = ("refused", "") if str(error).strip() else ("traceback", "an error without a message")
    except Wrong as error:
        outcome, detail = "wrong", str(error)
    except _TooLong:
        outcome, detail = "slow", "".join(traceback.format_exc().splitlines(keepends=True)[-4:])
    except BaseException as error:  # noqa: BLE001 (any other exception is the fault that is looked for)
        frames = traceback.extract_tb(error.__traceback__)
        where = next((f for f in reversed(frames) if "/loratune/" in f.filename), frames[-1])
        outcome = "traceback"
        detail = f"{type(error).__name__}: {str(error)[:200]} at {where.filename.rpartition('/')[2]}:{where.lineno}"
    return outcome, time.perf_counter() - started, detail


class _TooLong(BaseException):
    """Raised by the alarm after SECONDS."""


def _work(check: Check, seeds: list[int], connection: Connection) -> None:
    def ring(*_: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    for seed in seeds:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        result = judged(check, seed)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(result)
