"""Small models split by tpshard, and loaded for transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tpshard
from tests.helpers import checkpoints
from tests.helpers.newer_checkpoints import NEWER
from tpshard.execute.publish import Settings
from tpshard.verifier.criteria import relative
from tpshard.verifier.group import Single, Threads
from tpshard.verifier.hf.backend import TransformersBackend
from tpshard.verifier.hf.config import model_config
from tpshard.verifier.hf.overrides import Pinned
from tpshard.verifier.hf.skeleton import frame_of
from tpshard.verifier.model_types import TRIED
from tpshard.verifier.prompt import prompt_ids
from tpshard.verifier.ranks.open import open_shards, open_source, resident
from tpshard.verifier.ranks.translate import translated

torch.set_num_threads(1)
CPU = torch.device("cpu")
WIDTHS = (2, 4)
# All variants of the families that the engine takes, but those that differ in dtype alone or are in test_newer_engine.
VARIANTS = tuple(
    name
    for name, variant in checkpoints.VARIANTS.items()
    if variant.model_type in TRIED and variant.dtype == "float32" and name not in NEWER
)
ONE_OF_EACH = tuple({checkpoints.VARIANTS[name].model_type: name for name in reversed(VARIANTS)}.values())


def opened(model: Path, tp: int, out: Path, **how: Any) -> TransformersBackend:
    """A checkpoint split and loaded; two prompts of twelve tokens."""
    tpshard.split(model, tp, out, settings=Settings(workers=1, fsync=False), **how)
    config, source = open_source(model)
    shards = translated(open_shards(out), source)
    frame = frame_of(model_config(config))
    ids = prompt_ids(frame.config.vocab_size, 0, 2, 12)
    names = list(source.names())
    ranks = [resident(rank, None, CPU, list(rank.names())) for rank in shards.ranks]
    return TransformersBackend(resident(source, None, CPU, names), ranks, Threads(tp), ids, CPU, frame)


def reference(sides: TransformersBackend, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Pinned]:
    """The unsharded model's logits, and the experts that it chose."""
    pins = Pinned()
    return sides.reference(dtype).run(Single(), [sides.prompt], pins), pins


def error(sides: TransformersBackend, wanted: Tensor, pins: Pinned) -> float:
    """The largest end-to-end error of a rank in float64."""
    return max(sides.run_ranks(torch.float64, sides.steps, pins, lambda logits: relative(logits, wanted)))


def exchange(one: Path, other: Path) -> None:
    """Give two files each other's name."""
    aside = one.with_name("aside")
    for source, to in ((one, aside), (other, one), (aside, other)):
        source.rename(to)
