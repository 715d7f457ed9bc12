"""Where heads, biases and experts lie in the stored tensors of any architecture, by names and by how shapes are cut."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from tpshard.verifier.elements import RankShares
from tpshard.verifier.hf.heads import total_heads
from tpshard.verifier.places import Stretch
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import layer_of

CHOICE_BIAS = r"(correction_bias|expert_bias)$"
# By role: the names, and whether the ranks have parts of these tensors, all of them, or either.
IN_LAYER: dict[str, tuple[str, bool | None]] = {
    "out": (r"(att(ention|n)\w*|mamba|mixer)\.(o_proj|out_proj|c_proj|dense)\.", True),
    "down": (r"(?<!attn\.)\b(down_proj|w2|fc2|fc_out|c_proj|output_linear|dense_4h_to_h)(_bias)?\b", True),
    "up": (r"\b(up_proj|w3|fc1|fc_in|c_fc|gate_up_proj|input_linear|dense_h_to_4h)(_bias)?\b", True),
    "q": (r"\.q_proj\.", None),
    "k": (r"\.k_proj\.", None),
    "v": (r"\.v_proj\.", None),
    "fused": (r"\.(qkv_proj|c_attn|Wqkv)\.", True),
    "gate_up": (r"\b(gate_up_proj|input_linear)(_bias)?\b", True),
    "first_expert": (r"\.experts\.0\.(down_proj|w2)\.", True),
    "router": (r"\.(gate|router)(\.layer)?\.weight$", False),
    "choice_bias": (CHOICE_BIAS, False),
    "sinks": (r"\.sinks$", None),
    "convolution": (r"\.conv1d\.", True),
    "decay": (r"\.A_log$", True),
    "qk_norm": (r"\.[qk]_norm\.", True),
    "k_norm": (r"\.k_norm\.", True),
    "norm": (r"norm|\.ln_", False),
    "latent": (r"\.kv_a_proj", False),
}
PAIRS = {"gate_proj": "up_proj", "w1": "w3"}
OUTSIDE = {
    "embed": ("embed_tokens", "wte", "embed_in", "embeddings"),
    "head": ("lm_head", "embed_out", "output_projection"),
    "positions": ("wpe", "embed_positions"),
    "final_norm": ("norm", "final_layernorm", "final_layer_norm", "norm_f", "ln_f"),
}
INTERLEAVED = {"gpt_oss"}
"""Families that store gate and up alternately."""


def is_bias(name: str) -> bool:
    return name.endswith("bias") and not re.search(CHOICE_BIAS, name)


class StoredPlaces:
    """The places of one layer in the stored tensors `names`; see `Places`."""

    def __init__(
        self, config: Any, source: Weights, ranks: Sequence[Weights], layer: int, names: Sequence[str]
    ) -> None:
        self.config = config
        self.source = source
        self.ranks = ranks
        self.layer = layer
        self.names: Collection[str] = [name for name in names if all(name in rank.names() for rank in ranks)]
        near = [name for name in self.names if layer_of(name) in (None, layer)]
        self.cuts = {name: cut for name in near if (cut := self._cut(name)) is not None}
        self.kv_heads, self.vocab = total_heads(config)[1], int(config.vocab_size)
        self.rope_order: Tensor | None = None

    def _cut(self, name: str) -> RankShares | None:
        """How a stored tensor is spread over the ranks; None if each has all of it."""
        full, shapes = self.source.shape(name), [rank.shape(name) for rank in self.ranks]
        dims = [dim for dim in range(len(full)) if any(shape[dim] != full[dim] for shape in shapes)]
        return RankShares(dims[0], tuple(shape[dims[0]] for shape in shapes), full[dims[0]]) if dims else None

    def tensors(self, role: str, *, bias: bool = False) -> list[str]:
        if role in OUTSIDE:
            mine = [name for name in self.names if layer_of(name) is None and name.split(".")[-2] in OUTSIDE[role]]
            return [name for name in mine if is_bias(name) == bias]
        if role not in IN_LAYER:
            return []
        pattern, cut = IN_LAYER[role]
        mine = [name for name in self.names if layer_of(name) == self.layer and re.search(pattern, name)]
        # A bias behind a sum is whole on every rank.
        return [name for name in mine if is_bias(name) == bias and (bias or cut in (None, name in self.cuts))]

    def axis(self, role: str, name: str) -> int:
        return self.cuts[name].dim

    def _out(self) -> tuple[str, RankShares] | None:
        """The layer's projection behind the heads, and its cut."""
        return next(((name, self.cuts[name]) for name in self.tensors("out")), None)

    def heads(self, rank: int) -> list[list[Stretch]]:
        """The inputs of the projection behind the heads: every kind of attention has one."""
        if (out := self._out()) is None:
            return []
        name, cut = out
        head = cut.total // total_heads(self.config)[0]
        starts = range(0, cut.sizes[rank] - head + 1, head)
        return [[Stretch(name, cut.dim, slice(start, start + head))] for start in starts]

    def part(self, rank: int, kind: str, *, bias: bool = False) -> list[Stretch]:
        found = [Stretch(name) for name in self.tensors(kind, bias=bias)]
        out = self._out()
        for name in self.tensors("fused") if out is not None and not bias else ():
            assert out is not None
            cut, q = self.cuts[name], out[1].sizes[rank]
            kv = (cut.sizes[rank] - q) // 2
            start, stop = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[kind]
            found.append(Stretch(name, cut.dim, slice(start, stop)))
        return found

    def gates(self, rank: int) -> list[tuple[Stretch, Stretch]]:
        # An attention's gate has no other (AFMoE).
        found = [
            (Stretch(name), Stretch(other))
            for gate, up in PAIRS.items()
            for name in self.cuts
            if (other := name.replace(f".{gate}.", f".{up}.")) != name and other in self.names
            if layer_of(name) == self.layer and not is_bias(name)
        ]
        for name in [*self.tensors("gate_up"), *self.tensors("gate_up", bias=True)]:
            if (cut := self.cuts.get(name)) is not None:
                half = cut.sizes[rank] // 2
                two = (slice(0, half), slice(half, None))
                if self.config.model_type in INTERLEAVED:
                    two = (slice(0, None, 2), slice(1, None, 2))
                found.append((Stretch(name, cut.dim, two[0]), Stretch(name, cut.dim, two[1])))
        return found

    def experts(self) -> list[tuple[Stretch, Stretch]]:
        stacked = [name for name in self.tensors("down") if len(self.source.shape(name)) == 3]
        found = [(Stretch(name, 0, slice(0, 1)), Stretch(name, 0, slice(1, 2))) for name in stacked]
        apart = self.tensors("first_expert")
        return found + [(Stretch(name), Stretch(name.replace(".experts.0.", ".experts.1."))) for name in apart]

    def twin(self, name: str) -> str | None:
        """The layer's before this one."""
        if layer_of(name) != self.layer:
            return None
        other = re.sub(rf"(?<=\.){self.layer}(?=\.)", str(max(self.layer - 1, 0)), name, count=1)
        return other if other in self.names and other != name else None
