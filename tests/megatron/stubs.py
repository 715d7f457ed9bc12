"""What of Transformer Engine latent attention asks for, as far as it is needed to build and run it without.

`Duplicated` stands for TELinear with parallel_mode "duplicated", a linear layer that every rank has whole. `Attention`
has no parameters: Megatron's own, for layers without Transformer Engine, takes no heads of v that are of another size
than those of k. Which names and shapes a checkpoint has is Megatron's own code's doing.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class Duplicated(torch.nn.Module):
    """A linear layer without bias; `forward` gives the output and None, as Megatron's do."""

    def __init__(self, input_size: int, output_size: int, *, parallel_mode: str, config: Any, **_: Any) -> None:
        super().__init__()
        assert parallel_mode == "duplicated"
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.nn.functional.linear(x, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """One tensor, the same on each rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class Attention(MegatronModule):
    """Softmax of scaled scores times v: q, k [s, b, heads, d_k], v [s, b, heads, d_v] to [s, b, heads · d_v]."""

    def __init__(self, config: Any, *_: Any, softmax_scale: float, **__: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * self.scale
        weights = scores.masked_fill(mask, float("-inf")).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def latent(spec: Any) -> Any:
    """A layer's or block's spec with these in place of what needs Transformer Engine."""
    multi_latent_attention.TELinear = Duplicated
    for layer in getattr(spec, "layer_specs", None) or [spec]:
        parts = layer.submodules.self_attention.submodules
        parts.core_attention = Attention
        parts.linear_q_down_proj = parts.linear_kv_down_proj = Duplicated
    return spec
