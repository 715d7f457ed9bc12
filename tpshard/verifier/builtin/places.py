"""Where heads and biases lie in shards that the built-in decoder runs, by the family's names and stored shapes."""

from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from tpshard.verifier.builtin.decoder import share_of
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.families.family import Family
from tpshard.verifier.places import Stretch
from tpshard.verifier.ranks.weights import Weights


class DecoderPlaces:
    """The places of one layer; see `Places`. There are no experts, and no layers without attention."""

    def __init__(self, family: Family, ranks: Sequence[Weights], layer: int) -> None:
        self.family = family
        self.ranks = ranks
        self.layer = layer
        cpu = torch.device("cpu")
        self.stores = [Store(weights, family, torch.float32, cpu, rank) for rank, weights in enumerate(ranks)]
        self.held = [store.held(layer) for store in self.stores]
        self.names: Collection[str] = ranks[0].names()
        self.kv_heads, self.vocab = family.kv_heads, family.vocab
        self.rope_order: Tensor | None = None
        if family.rope is not None:
            order = torch.arange(family.rope.dims).view(2, -1).T.flatten()
            self.rope_order = order.argsort() if family.rope.interleaved else order

    def tensors(self, role: str, *, bias: bool = False) -> list[str]:
        family, store = self.family, self.stores[0]
        inside = {"out": family.out, "down": family.down, "up": family.up, "norm": family.attn_norm}
        inside |= {"gate": family.gate or "", "q_norm": family.q_norm or "", "k_norm": family.k_norm or ""}
        modules: dict[str, tuple[str | None, ...]] = {
            **{each: (family.layer.format(self.layer) + module,) for each, module in inside.items() if module},
            "embed": (family.embed,),
            "positions": (family.positions,),
            "final_norm": (family.final_norm,),
            "head": family.heads_names if bias else (store.head(),),
        }
        found = [store.name(module, "bias" if bias else "weight") for module in modules.get(role, ()) if module]
        return [name for name in found if name in self.names]

    def axis(self, role: str, name: str) -> int:
        turned = any(self.stores[0].name(module) == name for module in self.stores[0].transposed)
        return int((role in ("out", "down")) is not turned)

    def heads(self, rank: int) -> list[list[Stretch]]:
        """The rows of each q head, and its biases."""
        parts = filter(None, (self.part(rank, "q", bias=bias) for bias in (False, True)))
        return [list(part) for part in zip(*parts, strict=True)]

    def part(self, rank: int, kind: str, *, bias: bool = False) -> list[Stretch]:
        """The rows of each head."""
        family, d = self.family, self.family.head_dim
        q, kv, _ = self.held[rank]
        grouped = family.fused not in (None, "segments")
        ends = self._ends_of_groups(rank) if grouped else []
        found = []
        for head in range(q if kind == "q" else kv):
            module, first = family.qkv["qkv".index(kind) if family.fused is None else 0], head
            if family.fused == "segments":
                first += {"q": 0, "k": q, "v": q + kv}[kind]
            elif grouped and kind == "q":
                first += 2 * sum(end <= head for end in ends)
            elif grouped:
                first += ends[head] + head + "kv".index(kind)
            module = family.layer.format(self.layer) + module
            name = self.stores[0].name(module, "bias" if bias else "weight")
            dim = int(not bias and module in self.stores[0].transposed)
            if name in self.names:
                found.append(Stretch(name, dim, slice(first * d, (first + 1) * d)))
        return found

    def _ends_of_groups(self, rank: int) -> list[int]:
        """Before which of a rank's q heads each of its groups ends: its q heads, then its k and v."""
        share = share_of(self.family, self.layer, self.held, rank)
        return list(accumulate(share.q_of_kv(self.family.heads // self.family.kv_heads)))

    def gates(self, rank: int) -> list[tuple[Stretch, Stretch]]:
        return [(Stretch(g), Stretch(up)) for g, up in zip(self.tensors("gate"), self.tensors("up"), strict=False)]

    def experts(self) -> list[tuple[Stretch, Stretch]]:
        return []

    def dealt_experts(self) -> list[tuple[int, list[Stretch]]]:
        return []

    def twin(self, name: str) -> str | None:
        """The next layer's, or the first layer's in place of one after the last."""
        store, layer = self.stores[0], self.family.layer
        mine, other = (store.full(layer.format(i)) for i in (self.layer, (self.layer + 1) % self.family.layers))
        return other + name.removeprefix(mine) if name.startswith(mine) and mine != other else None
