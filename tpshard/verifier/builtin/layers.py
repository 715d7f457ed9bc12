"""The mathematics of a decoder's layers, of which none needs another rank."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from tpshard.verifier.builtin.store import Store
from tpshard.verifier.families.family import Rope


def normalise(store: Store, module: str, x: Tensor) -> Tensor:
    """RMSNorm, Gemma's RMSNorm with weight 1 + w, or LayerNorm, by the family, along the last dim.

    RMSNorm works in float32, as transformers does, unless x is float64: then in float64 throughout.
    """
    family = store.family
    weight = store.vector(module)
    if family.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, store.vector(module, "bias"), family.eps)
    wide = x.to(wide_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + family.eps)
    if weight is not None and family.norm == "rms_plus_one":
        return (wide * (1.0 + weight.to(wide.dtype))).to(x.dtype)
    return wide.to(x.dtype) if weight is None else weight * wide.to(x.dtype)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for the steps that are sensitive: float32, or float64 where all is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rope_frequencies(rope: Rope, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """Frequencies [dims / 2] in radians per position, and the factor on cos and sin, for a sequence of `length`."""
    theta, dims = rope.theta, rope.dims
    steps = torch.arange(0, dims, 2, dtype=dtype, device=device) / dims
    if rope.kind == "dynamic":
        seen = max(length, rope.max_positions)
        theta = theta * (rope.factor * seen / rope.max_positions - (rope.factor - 1)) ** (dims / (dims - 2))
    frequencies = 1.0 / theta**steps
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, frequencies), _yarn_attention_factor(rope)
    if rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    return frequencies / rope.factor if rope.kind == "linear" else frequencies, 1.0


def _llama3_frequencies(rope: Rope, frequencies: Tensor) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a linear blend between (Llama 3.1)."""
    turns = rope.original_positions * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn_frequencies(rope: Rope, frequencies: Tensor) -> Tensor:
    """Blend of interpolated and kept frequencies between the dims that turn beta_fast and beta_slow times (YaRN)."""

    def dim_of(turns: float) -> float:
        return rope.dims * math.log(rope.original_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = torch.arange(rope.dims // 2, dtype=frequencies.dtype, device=frequencies.device)
    ramp = ((ramp - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def grown(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return grown(rope.mscale) / grown(rope.mscale_all_dim)
    return grown(1.0)


def rope_tables(rope: Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, dims] for positions [S], laid out for this kind of rotation, in the working dtype."""
    length = int(positions.max()) + 1 if positions.numel() else 0
    frequencies, factor = rope_frequencies(rope, length, wide_dtype(dtype), positions.device)
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    angles = angles.repeat_interleave(2, -1) if rope.interleaved else torch.cat((angles, angles), -1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(rope: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to heads [B, H, S, D]; dims beyond `rope.dims` pass through."""
    turned, rest = x[..., : rope.dims], x[..., rope.dims :]
    if rope.interleaved:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        other = torch.cat((-second, first), -1)
    return torch.cat((turned * cos + other * sin, rest), -1)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of each of all heads, in float32: powers of one base, then odd powers of a finer one for the rest."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 / power * (i + 1)) for i in range(power)]
    slopes += [2.0 ** (-4.0 / power * (2 * i + 1)) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


def alibi_bias(kind: str, slopes: Tensor, keys: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Bias [1, H, 1, keys] on the attention scores: slope times key position.

    "falcon" rounds it to bfloat16 and scales it like the scores, both part of that model's definition.
    """
    at, falcon = torch.arange(keys, device=slopes.device), kind == "falcon"
    bias = ((slopes.bfloat16() if falcon else slopes)[:, None] * at).to(dtype)
    return (bias / math.sqrt(head_dim) if falcon else bias)[None, :, None, :]


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Whether query positions [S] may see key positions [T]: not the future, nor beyond the window; [S, T]."""
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor | None, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """Attention of q [B, H, S, D] on k and v [B, H, T, D]; `mask` [S, T] is True where seen, None for plain causal.

    `bias` is added to the scores; `softcap` bounds them by a tanh before the mask, which torch's kernels cannot do.
    """
    if softcap is None:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        if bias is not None:
            mask = torch.where(mask, bias, torch.finfo(q.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    assert mask is not None and bias is None
    scores = torch.tanh(q @ k.transpose(-1, -2) * scale / softcap) * softcap
    scores = scores.to(wide_dtype(q.dtype)).masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(q.dtype) @ v


@dataclass
class Cache:
    """The keys and values of a rank's own KV heads, per layer [B, n_kv, T, D]: each rank caches its share only."""

    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones last."""
        if layer in self.layers:
            k, v = (torch.cat(pair, 2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = (k, v)
        return k, v
