"""In place of timm, of which DeepSeek-VL2's tower is made: its modules by their names, small, and never run.

The engines' environment has no timm. What vLLM's class does with the modules is its own; how these are called, inside,
is what the checkpoint has too.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

WIDTH, LAYERS, FEATURES = 128, 2, 192


class Mlp(nn.Module):
    """A feed-forward, which vLLM's class cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, FEATURES), nn.Linear(FEATURES, WIDTH)


class Attention(nn.Module):
    """Attention, of which q, k and v are one matrix; what pools has q apart, and a token that asks."""

    def __init__(self, *, pools: bool = False) -> None:
        super().__init__()
        if pools:
            self.latent = nn.Parameter(torch.zeros(1, 1, WIDTH))
            self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
            self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp()
        else:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)


class Block(nn.Module):
    """A layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()


class VisionTransformer(nn.Module):
    """SigLIP's tower, as timm has it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 14, 14)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.attn_pool = nn.LayerNorm(WIDTH), Attention(pools=True)


def create_model(name: str, **_: object) -> nn.Module:
    """The tower of that name."""
    assert "siglip" in name
    return VisionTransformer()


layers = SimpleNamespace(Mlp=Mlp)
