"""Stored names as parameters of transformers' classes, which stack the experts that most files hold one by one."""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tpshard.storage.tensor_names import numbered
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import layer_of

RENAMED = (
    (".block_sparse_moe.", ".mlp."),
    (".block_sparse_moe.gate.", ".mlp.router."),
    (".input_linear.weight", ".experts.gate_up_proj"),
    (".output_linear.weight", ".experts.down_proj"),
    (".router.layer.", ".router."),
    (".mlp.moe_statics.", ".mlp.gate.moe_statics."),
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
    (".mlp.router.gate.", ".mlp.gate."),
    (".attention_sink_bias", ".sinks"),
    (".mlp.expert_bias", ".mlp.e_score_correction_bias"),
    (".mlp.shared_mlp.", ".mlp.shared_experts."),
    ("backbone.", "model."),
    ("embed_out.", "lm_head."),
)
"""Parts of stored names, and what the classes call them: Mixtral, Phi-3.5-MoE, Granite, Ernie 4.5, K-EXAONE, MiMo, Hy3,
Nemotron-H, GPT-NeoX."""
EXPERT = re.compile(
    r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<matrix>gate_proj|up_proj|down_proj|w[123])\.weight"
)
MATRICES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


@dataclass(frozen=True)
class StoredParts:
    """The stored tensors of a parameter: one, or for stacked experts each expert's, joined along their rows.

    `first` is the number of the first expert: a rank may hold some, whole, and no others. `turned`: stored with the
    last two dims exchanged.
    """

    experts: tuple[tuple[str, ...], ...]
    stacked: bool
    first: int = 0
    turned: bool = False

    @property
    def joined(self) -> bool:
        """Whether it is the rows of several tensors."""
        return not self.stacked and len(self.experts[0]) > 1

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for expert in self.experts for name in expert)

    def shape(self, weights: Weights) -> tuple[int, ...]:
        """The parameter's shape, known without reading anything."""
        if not self.stacked and not self.joined:
            shape = weights.shape(self.experts[0][0])
            return (*shape[:-2], shape[-1], shape[-2]) if self.turned else shape
        shapes = [weights.shape(name) for name in self.experts[0]]
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (len(self.experts), *joined) if self.stacked else joined

    def tensor(self, weights: Weights) -> Tensor:
        """The parameter, in its stored dtype."""
        if not self.stacked:
            tensor = torch.cat([weights.get(name) for name in self.experts[0]]) if self.joined else None
            tensor = weights.get(self.experts[0][0]) if tensor is None else tensor
            return tensor.transpose(-1, -2) if self.turned else tensor
        return self.rows(weights, 0, len(self.experts))

    def rows(self, weights: Weights, start: int, stop: int) -> Tensor:
        """Some of its rows, or of its experts, without reading the others; in its stored dtype."""
        if not self.stacked:
            tensor = torch.cat(list(self._joined(weights, start, stop))) if len(self.stored) > 1 else None
            tensor = weights.rows(self.stored[0], start, stop) if tensor is None else tensor
            return tensor.transpose(-1, -2) if self.turned else tensor
        some = [torch.cat([weights.get(name) for name in expert]) for expert in self.experts[start:stop]]
        if len(some) == 1:  # without another copy
            return some[0].unsqueeze(0)
        return (
            torch.stack(some) if some else weights.rows(self.stored[0], 0, 0).new_empty((0, *self.shape(weights)[1:]))
        )

    def _joined(self, weights: Weights, start: int, stop: int) -> Iterator[Tensor]:
        """Rows of tensors that lie one behind another."""
        at = 0
        for name in self.stored:
            size = weights.shape(name)[0]
            first, last = min(max(start - at, 0), size), min(max(stop - at, 0), size)
            yield weights.rows(name, first, last)
            at += size


def recipes(names: Collection[str], keys: Collection[str], prefix: str) -> dict[str, StoredParts]:
    """Which stored tensors make which of the parameters `keys`; stored tensors of no parameter are left out.

    `prefix` is the base model's, which stored names may lack. An expert of which a matrix is missing is left out too.
    The text model inside of a larger one is run as if it were alone.
    """
    found: dict[str, StoredParts] = {}
    experts: dict[str, dict[int, dict[int, str]]] = {}
    place = place_of(names, keys, prefix)
    for stored in names:
        name = stored.removeprefix(place)
        key = _key(name, keys, prefix) if stored.startswith(place) else _beside(stored, place, keys, prefix)
        if key is not None:
            found[key] = StoredParts(((stored,),), stacked=False)
        elif match := EXPERT.fullmatch(name) if stored.startswith(place) else None:
            owner = _key(f"{match['experts']}.down_proj", keys, prefix)
            if owner is not None:
                number = experts.setdefault(owner.removesuffix(".down_proj"), {}).setdefault(int(match["number"]), {})
                number[MATRICES[match["matrix"]]] = stored
    for owner, numbers in experts.items():
        for matrix, wanted in (("gate_up_proj", (0, 1)), ("up_proj", (1,)), ("down_proj", (2,))):
            whole = [numbers.get(i, {}) for i in range(min(numbers), max(numbers) + 1)]
            if f"{owner}.{matrix}" in keys and all(i in held for held in whole for i in wanted):
                found[f"{owner}.{matrix}"] = StoredParts(
                    tuple(tuple(held[i] for i in wanted) for held in whole), True, min(numbers)
                )
    return found


def place_of(names: Collection[str], keys: Collection[str], prefix: str) -> str:
    """What precedes the text model's names: below it are the most parameters."""
    alike = {numbered(name)[0]: name for name in names}.values()  # layers are
    below = Counter(
        start for name in alike for start in _starts(name) if _key(name.removeprefix(start), keys, prefix) is not None
    )
    return max(below, key=lambda start: (below[start], -len(start)), default="")


def _starts(name: str) -> Iterator[str]:
    """The beginnings of a name, up to its first number."""
    parts = name.split(".")
    for end in range(len(parts)):
        yield "".join(f"{part}." for part in parts[:end])
        if parts[end].isdecimal():
            return


def _beside(name: str, place: str, keys: Collection[str], prefix: str) -> str | None:
    """The parameter outside of layers that a tensor is which lies less deep than the text model: a head."""
    for start in _starts(place):
        key = _key(name.removeprefix(start), keys, prefix) if name.startswith(start) else None
        if key is not None and layer_of(key) is None:
            return key
    return None


def _key(name: str, keys: Collection[str], prefix: str) -> str | None:
    for old, new in (("", ""), *RENAMED):
        if old in name:
            key = name.replace(old, new) if old else name
            for candidate in (key, f"{prefix}.{key}"):
                if candidate in keys:
                    return candidate
    return None


def ties_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The parameters that a class has under several names, each with its others."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    several = [each for each in names.values() if len(each) > 1]
    return {name: tuple(other for other in each if other != name) for each in several for name in each}
