"""The prompt, and what is chosen and looked at before a run."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from tpshard.errors import CorruptError, UsageError
from tpshard.verifier.backend import OpenedSet
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.ranks.open import FileWeights, not_finite

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


def require_finite(opened: OpenedSet, names: Callable[[FileWeights], Iterable[str]]) -> None:
    """CorruptError where a tensor is NaN or infinite; rank 0 looks at the source, each process at the ranks it runs."""
    here = opened.team.here
    for weights in (*([opened.source] if 0 in here else []), *(opened.shards.ranks[rank] for rank in here)):
        bad = not_finite(weights, names(weights))
        if bad is not None:
            raise CorruptError("a weight is NaN or infinite", tensor=bad[0], path=bad[1])


def decide(
    opened: OpenedSet, options: VerifyOptions, *, same: bool, vocab: int, layers: int, positions: int | None
) -> tuple[Tensor, tuple[int, ...] | None, int]:
    """The prompt [batch, length], the layers that are asked for, and how many tokens follow the prompt.

    `same` says whether shards and source are of one model. `positions` None: as many as are wanted; 0: the prompt's
    alone. UsageError for another model, too few processes, and what the model does not have.
    """
    shards, team = opened.shards, opened.team
    if not same:
        what, hint = "the shards are of another model than the source", "give the model that was split with --source"
        wanted = f"the {opened.config.get('model_type')} that the source holds"
        other = f"a {shards.config.get('model_type')} of other sizes or settings"
        raise UsageError(what, path=shards.directory, expected=wanted, found=other, hint=hint)
    if team.size != len(shards.ranks):
        what, ranks = "one process per rank is needed", len(shards.ranks)
        hint = "start as many processes as there are ranks, or one for all of them"
        raise UsageError(what, path=shards.directory, expected=ranks, found=team.size, hint=hint)
    ids = prompt_ids(vocab, options.seed, BATCH, PROMPT) if opened.prompt is None else opened.prompt
    if not ids.numel() or int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise UsageError("the prompt's tokens are not of this model", expected=f"ids below {vocab}")
    chosen, length = chosen_layers(options.layers, layers), ids.shape[1]
    most = length + options.tokens if positions is None else positions or length
    if length > most:
        raise UsageError("the prompt is longer than the model's positions", expected=most, found=length)
    return ids.to(opened.device), chosen, min(options.tokens, most - length)
