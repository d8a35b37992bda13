"""Random sequences of operations on adapters, compared with dense weights after every operation.

    python -m tests.campaigns.adapter_sequences [SEQUENCES]     2,000 by default

Hypothesis chooses attach, activate, weighted sums, merge, unmerge, save, load, detach, training and copies of a small
float64 model with a layer of each kind. The oracle holds, for each adapter, dense updates of the weights, and knows
which operations are errors. After each operation the model's output equals that of a bare model with the oracle's
weights, and an operation that is an error has changed nothing.
"""

from __future__ import annotations

import copy
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import loratune as lt
from loratune.config import LoraConfig
from loratune.errors import AdapterError
from loratune.lora.inject import trainable_parameters

CONFIGS = [
    LoraConfig(r=2, lora_alpha=3, target_modules=["lin", "up"], rank_pattern={"lin": 3}, init_lora_weights=False),
    LoraConfig(
        r=4, target_modules=["conv", "att"], use_rslora=True, alpha_pattern={"conv": 5}, init_lora_weights=False
    ),
    LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"], init_lora_weights=False),
    LoraConfig(r=3, target_modules=["emb", "lin"], init_lora_weights=False),
    LoraConfig(r=2, target_modules=["up"], bias="lora_only", init_lora_weights=False),
    LoraConfig(r=2, init_lora_weights=False),
]
NAMES = ["a", "b", "c"]
_IDS = torch.tensor([[1, 4, 4, 9, 0], [7, 2, 10, 3, 3]])
_TIED = {"emb.weight", "head.weight"}


class Net(nn.Module):
    """One layer of each kind; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.up = Conv1D(12, 8)
        self.lin = nn.Linear(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        x = x + self.lin(torch.tanh(self.up(x)))
        x = x + self.conv(x.mT).mT
        x = x + self.att(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.norm(x))
        return out


def make_net() -> Net:
    """The same net at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().double().requires_grad_(False).eval()
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return net


_TOTAL = sum(parameter.numel() for parameter in make_net().parameters())


@dataclass
class Oracle:
    """One adapter as dense changes."""

    updates: dict[str, Tensor] = field(default_factory=dict)
    """Name of a weight -> what is added to it."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Name of a weight or bias -> its new value."""


def dense(tensors: dict[str, Tensor], config: LoraConfig) -> Oracle:
    """An adapter's tensors, by their keys in PEFT's files, as dense changes of `Net`."""
    oracle = Oracle()
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        path = name.split(".lora_")[0].replace("base_layer.", "")
        if "lora_B" in name or "lora_embedding_B" in name:
            continue
        if "lora_" not in name:
            oracle.replaced[name.replace("base_layer.", "")] = tensor
            continue
        r = len(tensor)
        layer = path.removesuffix(".out_proj")
        alpha = config.alpha_pattern.get(layer, config.lora_alpha)
        scaling = alpha / (math.sqrt(r) if config.use_rslora else r) * (2 if path == "att.out_proj" else 1)
        B = tensors[key.replace("_A", "_B")]
        update = scaling * B.flatten(1) @ tensor.flatten(1)
        if path == "conv":
            update = update.view(8, 8, 3)
        oracle.updates["att.in_proj_weight" if path == "att" else f"{path}.weight"] = (
            update.T if path in ("emb", "up") else update
        )
    return oracle


class Machine(RuleBasedStateMachine):
    """The model and the oracle, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = make_net()
        self.base = {name: p.clone() for name, p in self.net.named_parameters(remove_duplicate=False)}
        self.adapters: dict[str, Oracle] = {}
        self.configs: dict[str, LoraConfig] = {}
        self.active: dict[str, float] = {}
        self.merged: str | None = None
        self.folders = tempfile.TemporaryDirectory()
        self.saved: dict[Path, tuple[Oracle, LoraConfig]] = {}
        self.seed = 0

    def teardown(self) -> None:
        """Removes the folders."""
        self.folders.cleanup()

    def weights(self) -> dict[str, Tensor]:
        """The dense weights that the model must compute with now."""
        used = {self.merged: 1.0} if self.merged is not None else self.active
        weights = dict(self.base)
        for name, weight in used.items():
            for key, update in self.adapters[name].updates.items():
                weights[key] = weights[key] + weight * update
            weights |= self.adapters[name].replaced
        return weights

    @invariant()
    def computes_with_the_dense_weights(self) -> None:
        """Output and public state."""
        expected = torch.func.functional_call(make_net(), self.weights(), (_IDS,), tie_weights=False)
        with torch.no_grad():
            torch.testing.assert_close(self.net(_IDS), expected, rtol=1e-8, atol=1e-8)
        assert lt.adapter_names(self.net) == tuple(self.adapters)
        assert lt.merged(self.net) == self.merged
        if self.merged is None:
            assert set(lt.active(self.net)) == set(self.active)
        status = lt.status(self.net)
        assert status.total == _TOTAL
        assert len(status.adapters) == len(self.adapters)

    def attempt(self, refused: bool, act: object, *arguments: object, **named: object) -> bool:
        """Calls `act`. Returns True if it succeeded; fails if it should not have."""
        assert callable(act)
        try:
            act(self.net, *arguments, **named)
        except AdapterError:
            assert refused
            return False
        assert not refused
        return True

    def read(self, name: str) -> None:
        """Notes an adapter's tensors."""
        config = self.configs[name] = lt.config_of(self.net, name)
        self.adapters[name] = dense(lt.adapter_tensors(self.net, name), config)

    @rule(name=st.sampled_from(NAMES), config=st.sampled_from(CONFIGS), use=st.booleans())
    def attach(self, name: str, config: LoraConfig, use: bool) -> None:
        self.seed += 1
        refused = self.merged is not None or name in self.adapters
        if self.attempt(refused, lt.attach, config, name, self.seed, active=use):
            self.read(name)
            self.active = {name: 1.0} if use else self.active

    @rule(name=st.sampled_from([*NAMES, None]))
    def activate(self, name: str | None) -> None:
        refused = not self.adapters or self.merged is not None or (name is not None and name not in self.adapters)
        if self.attempt(refused, lt.activate, name):
            self.active = {} if name is None else {name: 1.0}

    @rule(weights=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, -2.0]), min_size=1))
    def add(self, weights: dict[str, float]) -> None:
        refused = not self.adapters or self.merged is not None or not self.adapters.keys() >= weights.keys()
        refused = refused or (weights != dict.fromkeys(list(weights)[:1], 1.0) and self.clash(weights))
        if self.attempt(refused, lt.activate, weights):
            self.active = weights

    def clash(self, weights: dict[str, float]) -> bool:
        """True if a replaced module or bias is weighted, or changed by two."""
        for name, weight in weights.items():
            modules = {key.rpartition(".")[0] for key in self.adapters[name].replaced if "norm" in key}
            keys = set(self.adapters[name].replaced)
            for other in weights.keys() - {name}:
                theirs = self.adapters[other].replaced.keys() | self.adapters[other].updates.keys()
                if keys & theirs or any(key.rpartition(".")[0] in modules for key in theirs):
                    return True
            if keys and weight != 1.0:
                return True
        return False

    @rule(name=st.sampled_from(NAMES), reversible=st.sampled_from([True, True, True, False]))
    def merge(self, name: str, reversible: bool) -> None:
        refused = self.merged is not None or name not in self.adapters
        refused = (
            refused or (not reversible and len(self.adapters) > 1) or bool(_TIED & set(self.adapters[name].updates))
        )
        if not self.attempt(refused, lt.merge, name, reversible=reversible):
            return
        self.merged = name
        if not reversible:
            self.base = self.weights()
            self.adapters, self.active, self.merged = {}, {}, None

    @rule()
    def unmerge(self) -> None:
        if self.attempt(self.merged is None, lt.unmerge):
            self.merged = None

    @rule(name=st.sampled_from([*NAMES, None]))
    def detach(self, name: str | None) -> None:
        refused = not self.adapters or self.merged is not None or (name is not None and name not in self.adapters)
        if self.attempt(refused, lt.detach, name):
            gone = list(self.adapters) if name is None else [name]
            if any(one in self.active for one in gone):
                self.active = {}
            for one in gone:
                del self.adapters[one]

    @rule(name=st.sampled_from(NAMES), portable=st.booleans())
    def save(self, name: str, portable: bool) -> None:
        folder = Path(self.folders.name) / str(len(self.saved))
        if self.attempt(name not in self.adapters, lt.save, folder, name, portable=portable):
            self.saved[folder] = self.adapters[name], self.configs[name]

    @precondition(lambda self: self.saved)
    @rule(name=st.sampled_from(NAMES), which=st.integers(0, 9), use=st.booleans())
    def load(self, name: str, which: int, use: bool) -> None:
        folder = list(self.saved)[which % len(self.saved)]
        refused = self.merged is not None or name in self.adapters
        if self.attempt(refused, lt.load_adapter, folder, name, active=use):
            self.adapters[name] = self.saved[folder][0]  # the dense changes from before it was saved
            self.configs[name] = lt.config_of(self.net, name)
            self.active = {name: 1.0} if use else self.active

    @rule()
    def train(self) -> None:
        refused = self.merged is not None or list(self.active.values()) != [1.0]
        if self.attempt(refused, trainable_parameters):
            with torch.no_grad():
                for parameter in trainable_parameters(self.net).values():
                    parameter.mul_(0.8).add_(0.1)
            self.read(next(iter(self.active)))

    @rule()
    def copy_model(self) -> None:
        self.net = copy.deepcopy(self.net)

    @rule()
    def cast(self) -> None:
        self.net.to(torch.float64)
        with torch.no_grad():
            self.net.load_state_dict(self.net.state_dict())


def run(sequences: int, *, derandomize: bool = True) -> None:
    """Runs the machine; raises with the shortest failing sequence."""
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=20,
            deadline=None,
            database=None,
            derandomize=derandomize,
            suppress_health_check=list(HealthCheck),
        ),
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    run(count, derandomize=False)
    print(f"{count} sequences: no wrong number, no undocumented error")
