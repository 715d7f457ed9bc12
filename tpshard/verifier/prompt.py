"""The prompt, and what is chosen before a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpshard.errors import UsageError
from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.ranks.open import RankSet

BATCH, PROMPT = 2, 16


def prompt_ids(vocab: int, seed: int, batch: int, length: int) -> Tensor:
    """Token ids [batch, length] from a seed, one from each of as many equal stretches of the vocabulary."""
    count = batch * length
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(count, generator=generator, dtype=torch.float64)
    order = torch.randperm(count, generator=generator)
    ids = ((order + within) * vocab / count).long().clamp(max=vocab - 1)
    return ids.view(batch, length)


def chosen_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    """The layers asked for, of `count`, in order and without the negative numbers; UsageError when there is none."""
    if layers is None:
        return None
    if (bad := next((i for i in layers if not -count <= i < count), None)) is not None:
        raise UsageError(f"there is no layer {bad}", expected=f"{-count} to {count - 1}")
    return tuple(sorted({i % count for i in layers}))


def require_one_each(opened: RankSet, team: Threads | Processes) -> None:
    """UsageError unless as many processes run as there are ranks, or one for all of them."""
    expected, found = len(opened.ranks), team.size
    if found != expected:
        message = "one process per rank is needed"
        hint = "start as many processes as there are ranks, or one for all of them"
        raise UsageError(message, path=opened.directory, expected=expected, found=found, hint=hint)


def another_model(opened: RankSet, model_type: object) -> UsageError:
    """The error for shards that are not of the source, which is of this type."""
    expected = f"the {model_type} that the source holds"
    found = f"a {opened.config.get('model_type')} of other sizes or settings"
    message, hint = "the shards are of another model than the source", "give the model that was split with --source"
    return UsageError(message, path=opened.directory, expected=expected, found=found, hint=hint)


def prompt_of(prompt: Tensor | None, vocab: int, seed: int) -> Tensor:
    """The prompt that was given, or ids from the seed; UsageError when its ids are not of the vocabulary."""
    ids = prompt_ids(vocab, seed, BATCH, PROMPT) if prompt is None else prompt
    if not ids.numel() or int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise UsageError("the prompt's tokens are not of this model", expected=f"ids below {vocab}")
    return ids
