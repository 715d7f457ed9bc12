"""The prompt, and what is chosen and looked at before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tpshard.errors import CorruptError, UsageError
from tpshard.verifier.backend import OpenedSet
from tpshard.verifier.group import Processes, Threads
from tpshard.verifier.ranks.open import FileWeights, RankSet, not_finite

PROMPT = 16


BATCH = 2


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
    for i in layers:
        if not -count <= i < count:
            raise UsageError(f"there is no layer {i}", expected=f"{-count} to {count - 1}")
    return tuple(sorted({i % count for i in layers}))


def require_one_each(opened: RankSet, team: Threads | Processes) -> None:
    """UsageError unless as many processes run as there are ranks, or one for all of them."""
    if team.size != len(opened.ranks):
        raise UsageError(
            "one process per rank is needed",
            path=opened.directory,
            expected=len(opened.ranks),
            found=team.size,
            hint="start as many processes as there are ranks, or one for all of them",
        )


def require_finite(opened: OpenedSet, names: Callable[[FileWeights], Iterable[str]]) -> None:
    """CorruptError where a tensor is NaN or infinite; rank 0 looks at the source, each process at the ranks it runs."""
    here = opened.team.here
    for weights in (*([opened.source] if 0 in here else []), *(opened.shards.ranks[rank] for rank in here)):
        bad = not_finite(weights, names(weights))
        if bad is not None:
            raise CorruptError("a weight is NaN or infinite", tensor=bad[0], path=bad[1])


def another_model(opened: RankSet, model_type: object) -> UsageError:
    """The error for shards that are not of the source, which is of this type."""
    return UsageError(
        "the shards are of another model than the source",
        path=opened.directory,
        expected=f"the {model_type} that the source holds",
        found=f"a {opened.config.get('model_type')} of other sizes or settings",
        hint="give the model that was split with --source",
    )


def prompt_of(prompt: Tensor | None, vocab: int, seed: int) -> Tensor:
    """The prompt that was given, or ids from the seed; UsageError when its ids are not of the vocabulary."""
    ids = prompt_ids(vocab, seed, BATCH, PROMPT) if prompt is None else prompt
    if not ids.numel() or int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise UsageError("the prompt's tokens are not of this model", expected=f"ids below {vocab}")
    return ids


def room(positions: int, length: int, tokens: int) -> int:
    """How many of `tokens` fit after a prompt of `length`; UsageError where the prompt itself does not."""
    if length > positions:
        raise UsageError("the prompt is longer than the model's positions", expected=positions, found=length)
    return min(tokens, positions - length)
