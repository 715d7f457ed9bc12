"""A model family as mathematics: what one config.json describes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `kind` names the scaling of the frequencies, `dims` how much of a head is rotated.

    `interleaved` rotates neighbouring pairs (GPT-J), otherwise the two halves. The other fields belong to one kind.
    """

    dims: int
    theta: float
    max_positions: int
    interleaved: bool = False
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True)
class Family:
    """One model, as its config describes it. Module names are relative to a base prefix, layers' to their layer.

    Names that a family does not give are LLaMA's.
    `fused`: None for q, k and v apart; "segments" for [q; k; v]; "heads" for q, k, v per head; "groups" for the q heads
    of a KV group, its k, its v. `windows` and `scales` have an entry per layer; a window of None sees everything.
    `block`: "sequential" normalises before attention and MLP, "post" after each residual sum, "parallel" adds both to
    one input. A norm named None is not there; `mlp_norm` None in a parallel block shares the attention's.
    `biases` are the modules that have one, all others have none; `bare_norms` have neither weight nor bias. `tied`: the
    head is the embedding, and need not be stored.
    """

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    windows: tuple[int | None, ...]
    scales: tuple[float, ...]
    norm: str = "layer"
    eps: float = 1e-5
    activation: str = "silu"
    prefixes: tuple[str, ...] = ("model.", "")
    embed: str = "embed_tokens"
    layer: str = "layers.{}."
    fused: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention: str = "self_attn"
    out: str = "self_attn.o_proj"
    mlp: str = "mlp"
    gate: str | None = None
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    attn_norm: str = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    final_norm: str | None = "norm"
    heads_names: tuple[str, ...] = ("lm_head", "embed_out")
    positions: str | None = None
    position_offset: int = 0
    embed_norm: str | None = None
    embed_scale: float | None = None
    project_in: str | None = None
    project_out: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    attn_out_norm: str | None = None
    mlp_out_norm: str | None = None
    block: str = "sequential"
    residual_after_norm: bool = False
    conv1d: bool = False
    softcap: float | None = None
    final_softcap: float | None = None
    rope: Rope | None = None
    alibi: str | None = None
    biases: tuple[str, ...] = ()
    bare_norms: bool = False
    tied: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms of a layer, and those outside of layers."""
        inside = (self.attn_norm, self.q_norm, self.k_norm, self.attn_out_norm, self.mlp_norm, self.mlp_out_norm)
        return tuple(name for name in (*inside, self.embed_norm, self.final_norm) if name is not None)

    def with_biases(
        self, *, attention: bool = False, mlp: bool = False, norms: bool = False, more: tuple[str, ...] = ()
    ) -> Self:
        """The family with a bias in each of these modules, and in no other."""
        names: list[str | None] = list(more)
        names += (*self.qkv, self.out) if attention else ()
        names += (self.gate, self.up, self.down) if mlp else ()
        names += self.norms if norms else ()
        return replace(self, biases=tuple(name for name in names if name is not None))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
}
"""Activation functions by the names that configs use."""
