"""Layers that a search has made unlike each other: of many widths, without a part, or with one matrix for it."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tpshard.verifier.hf.own_configs import LAYERS, MATRIX


class OneMatrix(nn.Module):
    """Stands for attention or for a feed-forward. name: of its matrix."""

    def __init__(self, name: str, hidden: int, *, attends: bool) -> None:
        super().__init__()
        setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.name, self.attends = name, attends

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        out = getattr(self, self.name)(hidden_states)
        return (out, None) if self.attends else out


class Nothing(nn.Module):
    """Adds nothing to the stream."""

    def __init__(self, *, attends: bool) -> None:
        super().__init__()
        self.attends = attends

    def forward(self, hidden_states: Tensor, **_: Any) -> Any:
        out = torch.zeros_like(hidden_states)
        return (out, None) if self.attends else out


def put_in(model: Any) -> None:
    """Give a model that was made of its config the layers that this says, where it says any.

    Those that attend are counted, since positions are taken from what the first has kept.
    """
    attending = 0
    for number, said in enumerate(getattr(model.config, LAYERS, None) or ()):
        layer, kv, ffn = model.model.layers[number], said["kv"], said["ffn"]
        mine = copy.deepcopy(model.config)
        mine.hidden_act = said.get("hidden_act") or mine.hidden_act
        for key, size in (("num_key_value_heads", kv), ("intermediate_size", ffn)):
            if size and size != MATRIX:
                setattr(mine, key, size)
        layer.self_attn = _part(layer.self_attn, kv, mine, "linear_attn", attending)
        layer.mlp = _part(layer.mlp, ffn, mine, "linear_mlp")
        attending += bool(kv and kv != MATRIX)
        for norm, size in (("input_layernorm", kv), ("post_attention_layernorm", ffn)):
            if not size:
                setattr(layer, norm, nn.Identity())


def _part(part: nn.Module, size: Any, config: Any, matrix: str, *number: int) -> nn.Module:
    """A layer's part of a size of its own."""
    if size == MATRIX:
        return OneMatrix(matrix, config.hidden_size, attends=bool(number))
    made: nn.Module = type(part)(config, *number) if size else Nothing(attends=bool(number))
    return made
