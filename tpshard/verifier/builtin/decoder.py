"""One decoder for all families, computing one rank's share of the model and meeting the other ranks in a group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tpshard.errors import DifferentError
from tpshard.verifier.builtin.layers import (
    Cache,
    alibi_bias,
    alibi_slopes,
    attend,
    normalise,
    rope_tables,
    rotate,
    visible,
)
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.elements import needed_kv
from tpshard.verifier.families.family import ACTIVATIONS, Family
from tpshard.verifier.group import Group, slice_of
from tpshard.verifier.ranks.weights import Weights

# Computes the summand of input features i to i + n of a decoder's own row layer or embedding.
Summand = Callable[[int, int], Tensor]


class Probe:
    """What the decoder passes by: modules with their input, shares of wide activations, summands of row layers.

    This one only looks on; others record a reference run, or replay it module by module.
    """

    def module(self, name: str, work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Run one module on its input."""
        return work(x)

    def share(self, name: str, x: Tensor, first: int) -> None:
        """A rank's features (last dim) of an activation or bias, from feature `first` of the whole on."""

    def summand(self, name: str, partial: Tensor, compute: Summand, first: int, count: int) -> None:
        """A rank's summand of a sum over ranks: that of `count` input features from `first` on."""


@dataclass(frozen=True)
class HeadShare:
    """Which heads, KV heads and MLP features of a layer a rank holds, as counts and global offsets."""

    q: int
    kv: int
    ffn: int
    first_q: int
    first_kv: int
    first_ffn: int

    def q_of_kv(self, group: int) -> list[int]:
        """How many of its q heads attend to each of its KV heads, `group` q heads to one in the whole model."""
        ends = [
            min(max(i * group - self.first_q, 0), self.q) for i in range(self.first_kv, self.first_kv + self.kv + 1)
        ]
        return [stop - start for start, stop in pairwise(ends)]


def share_of(family: Family, layer: int, ranks: Sequence[tuple[int, int, int]], rank: int) -> HeadShare:
    """A rank's share of a layer, by what every rank holds of it; DifferentError where that does not add up."""
    firsts = [[0, *accumulate(column)] for column in zip(*ranks, strict=True)]
    heads, kv_heads, _ = (column[-1] for column in firsts)
    if heads != family.heads:
        raise DifferentError(f"layer {layer}: the ranks' heads do not add up", expected=family.heads, found=heads)
    q, kv, ffn = ranks[rank]
    first_kv = firsts[1][rank]
    if kv_heads != family.kv_heads:
        # Fewer KV heads than ranks: each rank holds those of its q heads, by the config and not by what is stored.
        needed = needed_kv([heads for heads, _, _ in ranks], family.heads // family.kv_heads)
        if len(ranks) <= family.kv_heads or [count for _, count in needed] != [count for _, count, _ in ranks]:
            what = f"layer {layer}: the ranks' KV heads do not add up"
            raise DifferentError(what, expected=family.kv_heads, found=kv_heads)
        first_kv = needed[rank][0]
    share = HeadShare(q, kv, ffn, firsts[0][rank], first_kv, firsts[2][rank])
    if sum(share.q_of_kv(family.heads // family.kv_heads)) != q:
        what, held = f"rank {rank} holds q heads without their k and v", f"{kv} KV heads from {first_kv} on"
        asked = f"KV heads of q heads {share.first_q} to {share.first_q + q - 1}"
        raise DifferentError(what, expected=asked, found=held)
    return share


class Decoder:
    """A rank's decoder. Its share follows from stored shapes, other ranks' counts and the config, from nothing else.

    With `sequence_parallel` the stream between modules is cut along the sequence, and gathered before each.
    """

    def __init__(
        self,
        family: Family,
        weights: Weights,
        group: Group,
        dtype: torch.dtype,
        device: torch.device,
        sequence_parallel: bool = False,
        probe: Probe | None = None,
        block_bytes: int | None = None,
        hold: bool = False,
    ) -> None:
        self.family = family
        self.group = group
        held: dict[str, Tensor] | None = {} if hold and block_bytes is not None else None
        self.store = Store(weights, family, dtype, device, group.rank, block_bytes, held)
        self.scatter = sequence_parallel
        self.probe = probe or Probe()
        self.vocab_rows = self.store.matrix_shape(family.embed)[0]
        self.head_rows = self.store.matrix_shape(self.store.head())[0]
        counts = [self.store.held(i) for i in range(family.layers)]
        ranks = group.exchange_object((self.vocab_rows, self.head_rows, counts))
        self.first_vocab = sum(rank[0] for rank in ranks[: group.rank])
        self.first_head = sum(rank[1] for rank in ranks[: group.rank])
        for what, total in (("embedding", sum(r[0] for r in ranks)), ("head", sum(r[1] for r in ranks))):
            if total < family.vocab:
                raise DifferentError(f"the ranks' {what} rows are too few", expected=family.vocab, found=total)
        self.shares = [share_of(family, i, [rank[2][i] for rank in ranks], group.rank) for i in range(family.layers)]

    def forward(self, ids: Tensor, cache: Cache | None = None, layers: Sequence[int] | None = None) -> Tensor:
        """Logits [B, S, vocab] of token ids [B, S], which follow those in the cache; through all layers, or these."""
        cache = cache if cache is not None else Cache()
        positions = torch.arange(cache.length, cache.length + ids.shape[1], device=ids.device)
        x = self.embed(ids, positions)
        for i in range(self.family.layers) if layers is None else layers:
            x = self.layer(i, x, positions, cache)
        cache.length += ids.shape[1]
        return self.head(x)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The stream that enters the first layer [B, S, hidden] (this rank's slice of S under sequence parallelism)."""
        family, store = self.family, self.store
        name = store.full(family.embed)
        local: Tensor = ids - self.first_vocab

        def rows(first: int, count: int) -> Tensor:
            """The summand of some of this rank's rows of the vocabulary; zeros for the ids of others."""
            mine = (local >= first) & (local < min(first + count, self.vocab_rows))
            return store.look_up(family.embed, torch.where(mine, local, 0)) * mine.unsqueeze(-1)

        def look_up(_: Tensor) -> Tensor:
            partial = rows(0, self.vocab_rows)
            self.probe.summand(name, partial, rows, self.first_vocab, self.vocab_rows)
            return self._sum(partial)

        x = self.probe.module(name, look_up, ids)
        if family.embed_scale is not None:
            x = x * torch.tensor(family.embed_scale, dtype=x.dtype, device=x.device)
        if family.project_in is not None:
            x = self._whole_linear(family.project_in, x)
        if family.positions is not None:
            start, stop = slice_of(len(positions), self.group.size, self.group.rank)
            at = (positions[start:stop] if self.scatter else positions) + family.position_offset
            table = store.matrix(family.positions)
            x = self.probe.module(store.full(family.positions), lambda y: y + table[at], x)
        if family.embed_norm is not None:
            x = self._norm(family.embed_norm, x)
        return x

    def _gather(self, x: Tensor) -> Tensor:
        return self.group.all_gather(x, 1) if self.scatter else x

    def _sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks: under sequence parallelism, this rank's slice of it."""
        return self.group.reduce_scatter(partial, 1) if self.scatter else self.group.all_reduce(partial)

    def _whole_linear(self, module: str, x: Tensor) -> Tensor:
        linear, store = self.store.linear, self.store
        return self.probe.module(store.full(module), lambda y: store.biased(module, linear(module, y)), x)

    def _norm(self, norm: str | None, x: Tensor, at: str = "") -> Tensor:
        """A norm of the layer `at`, or outside of layers; x where there is none."""
        if norm is None:
            return x
        return self.probe.module(self.store.full(at + norm), lambda y: normalise(self.store, at + norm, y), x)

    def layer(self, i: int, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """One transformer block on the stream."""
        family = self.family
        at = family.layer.format(i)

        def attention(y: Tensor) -> Tensor:
            name = self.store.full(at + family.attention)
            return self.probe.module(name, lambda z: self.attention(i, z, positions, cache), self._gather(y))

        def mlp(y: Tensor) -> Tensor:
            return self.probe.module(self.store.full(at + family.mlp), lambda z: self.mlp(i, z), self._gather(y))

        if family.block == "post":
            x = self._norm(family.attn_norm, x + attention(x), at)
            return self._norm(family.mlp_norm, x + mlp(x), at)
        normed = self._norm(family.attn_norm, x, at)
        if family.block == "parallel":
            attended = attention(normed)
            return x + attended + mlp(normed if family.mlp_norm is None else self._norm(family.mlp_norm, x, at))
        x = (normed if family.residual_after_norm else x) + self._norm(family.attn_out_norm, attention(normed), at)
        normed = self._norm(family.mlp_norm, x, at)
        return (normed if family.residual_after_norm else x) + self._norm(family.mlp_out_norm, mlp(normed), at)

    def attention(self, i: int, x: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Self-attention of layer i on the whole input; its sum over ranks."""
        family, share = self.family, self.shares[i]
        q, k, v = self.project(i, x)
        if family.q_norm is not None and family.k_norm is not None:
            at = family.layer.format(i)
            q = self._norm_of_heads(at + family.q_norm, q, share.first_q)
            k = self._norm_of_heads(at + family.k_norm, k, share.first_kv)
        if family.rope is not None:
            cos, sin = rope_tables(family.rope, positions, x.dtype)
            q, k = rotate(family.rope, q, cos, sin), rotate(family.rope, k, cos, sin)
        k, v = cache.extend(i, k, v)
        k, v = self._for_each_q(share, k), self._for_each_q(share, v)
        keys = torch.arange(k.shape[2], device=x.device)
        window = family.windows[i]
        bias = None
        if family.alibi is not None:
            slopes = alibi_slopes(family.heads)[share.first_q : share.first_q + share.q].to(x.device)
            bias = alibi_bias(family.alibi, slopes, len(keys), family.head_dim, x.dtype)
        plain = len(keys) == len(positions) and (window is None or window >= len(keys))
        mask = None if plain and bias is None and family.softcap is None else visible(positions, keys, window)
        heads = attend(q, k, v, scale=family.scales[i], mask=mask, bias=bias, softcap=family.softcap)
        wide = heads.transpose(1, 2).flatten(2)
        return self._row(family.layer.format(i) + family.out, wide, share.first_q * family.head_dim)

    def _norm_of_heads(self, module: str, x: Tensor, first: int) -> Tensor:
        """A norm within each head of [B, n, S, D], the first of them head `first` of the whole."""
        y = normalise(self.store, module, x)
        self.probe.share(self.store.full(module), y.transpose(1, 2).flatten(2), first * self.family.head_dim)
        return y

    def _row(self, module: str, wide: Tensor, first: int) -> Tensor:
        name = self.store.full(module)
        self.probe.share(f"input of {name}", wide, first)
        partial = self.store.linear(module, wide)

        def summand(i: int, n: int) -> Tensor:
            only = torch.zeros_like(wide)
            only[..., i : i + n] = wide[..., i : i + n]
            return self.store.linear(module, only)

        self.probe.summand(name, partial, summand, first, wide.shape[-1])
        # Every rank adds its own copy of the bias to the sum: look at the copy, since the sum is of all ranks.
        bias = self.store.vector(module, "bias")
        self.probe.share(f"{name}.bias", partial.new_zeros(partial.shape[-1]) if bias is None else bias, 0)
        whole = self._sum(partial)
        return whole if bias is None else whole + bias

    def project(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's q [B, n_q, S, D], k and v [B, n_kv, S, D] of layer i."""
        family, share, d = self.family, self.shares[i], self.family.head_dim
        names = [family.layer.format(i) + name for name in family.qkv]
        products = [self.store.linear(name, x) for name in names]
        told = [self.store.full(name) for name in names]
        if family.fused is not None:
            told = [f"{letter} of {told[0]}" for letter in "qkv"]
        firsts = [share.first_q * d, share.first_kv * d, share.first_kv * d]
        for name, part, first in zip(told, self._parted(share, products), firsts, strict=True):
            self.probe.share(name, part.flatten(-2), first)
        biased = list(map(self.store.biased, names, products))
        q, k, v = self._parted(share, biased)
        for name, part, first in zip(told, (q, k, v), firsts, strict=True):
            self.probe.share(f"{name}.bias", part.flatten(-2), first)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _parted(self, share: HeadShare, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, n_q, D], k and v [B, S, n_kv, D] from what the projections give, one of them or three."""
        family, d = self.family, self.family.head_dim
        if family.fused is None:
            q, k, v = (part.view(*part.shape[:-1], -1, d) for part in parts)
        elif family.fused == "segments":
            fused = parts[0].view(*parts[0].shape[:-1], -1, d)
            q, k, v = torch.split(fused, [share.q, share.kv, share.kv], -2)
        else:
            # "heads" is the case of "groups" where a group has one q head.
            grouped = parts[0].view(*parts[0].shape[:-1], -1, d)
            counts = share.q_of_kv(family.heads // family.kv_heads)
            groups = torch.split(grouped, [each for count in counts for each in (count, 1, 1)], -2)
            q, k, v = (torch.cat(groups[i::3], -2) for i in range(3))
        return q, k, v

    def _for_each_q(self, share: HeadShare, x: Tensor) -> Tensor:
        """The KV head of every local q head: global q head h attends to KV head h // (heads / kv_heads)."""
        group = self.family.heads // self.family.kv_heads
        wanted = [(share.first_q + q) // group - share.first_kv for q in range(share.q)]
        return x if wanted == list(range(share.kv)) else x[:, wanted]

    def mlp(self, i: int, x: Tensor) -> Tensor:
        """The MLP of layer i on the whole input; its sum over ranks."""
        family = self.family
        at = family.layer.format(i)
        first = self.shares[i].first_ffn
        activate = ACTIVATIONS[family.activation]
        wide = self._column(at + family.up, x, first)
        wide = activate(wide) if family.gate is None else activate(self._column(at + family.gate, x, first)) * wide
        return self._row(at + family.down, wide, first)

    def _column(self, module: str, x: Tensor, first: int) -> Tensor:
        name, product = self.store.full(module), self.store.linear(module, x)
        self.probe.share(name, product, first)
        y = self.store.biased(module, product)
        self.probe.share(f"{name}.bias", y, first)
        return y

    def head(self, x: Tensor) -> Tensor:
        """Logits [B, S, vocab] from the stream that leaves the last layer, gathered on every rank."""
        family = self.family
        x = self._gather(self._norm(family.final_norm, x))
        if family.project_out is not None:
            x = self._whole_linear(family.project_out, x)
        name = self.store.head()
        # One name for both: a tied head may be stored in the source and not in the shards, or the other way.
        label = family.heads_names[0]

        def logits(y: Tensor) -> Tensor:
            share = self.store.linear(name, y)
            self.probe.share(label, share, self.first_head)
            bias = self.store.head_bias()
            share = share if bias is None else share + bias
            self.probe.share(f"{label}.bias", share, self.first_head)
            whole = self.group.all_gather(share, -1)[..., : family.vocab]
            cap = family.final_softcap
            return whole if cap is None else torch.tanh(whole / cap) * cap

        return self.probe.module(label, logits, x)
