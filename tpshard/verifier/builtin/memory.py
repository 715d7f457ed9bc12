"""What this machine has, and what a verification needs of it."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from tpshard.verifier.families.family import Family
from tpshard.verifier.memory import require_memory, usable
from tpshard.verifier.ranks.open import FileWeights, elements, needed
from tpshard.verifier.report.verdict import layer_of

BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class Need:
    """Estimated peak bytes when all weights are kept, and when they are streamed through in blocks."""

    resident: int
    streamed: int

    def choose(self, stream: bool | None, device: torch.device, sharing: int = 1) -> bool:
        """Whether to stream: as asked, or because memory asks for it. LocalIOError when even that is too much.

        `sharing` processes use this device's memory at once.
        """
        free = usable(device, sharing)
        stream = self.resident > free if stream is None else stream
        hint = "free memory, or use another machine" if stream else "--stream needs less"
        require_memory(self.streamed if stream else self.resident, free, device, hint)
        return stream


@dataclass(frozen=True)
class Load:
    """What a process has to go through: stored bytes and elements of the source, and of the ranks that it runs.

    `layer` is a layer of the source in bytes, `largest` its largest matrix in elements.
    """

    source_bytes: int
    source_elements: int
    rank_bytes: int
    rank_elements: int
    layer: int
    largest: int


def load(source: FileWeights, ranks: Sequence[FileWeights], layers: Collection[int]) -> Load:
    """The load of these ranks, of these layers."""
    names = needed(source, layers)
    nbytes, total = _nbytes(source, names), elements(source, names)
    body = elements(source, [name for name in names if layer_of(name) is not None])
    return Load(
        source_bytes=nbytes,
        source_elements=total,
        rank_bytes=sum(_nbytes(rank, needed(rank, layers)) for rank in ranks),
        rank_elements=sum(elements(rank, needed(rank, layers)) for rank in ranks),
        layer=nbytes * body // max(1, total) // max(1, len(layers)),
        largest=max(elements(source, [name]) for name in names),
    )


def _nbytes(weights: FileWeights, names: Iterable[str]) -> int:
    return sum(weights.infos[name].nbytes for name in names)


def estimate(
    family: Family, load: Load, *, here: int, native: bool, positions: int, widened: bool, apart: bool
) -> Need:
    """What a run needs beyond the interpreter: `here` ranks in this process, `positions` of all prompts together.

    `widened`: weights that are kept are kept in float64, else as stored and widened at each use. `apart`: the ranks are
    processes of their own, which keep their shards at most, never the source.
    """
    # The native criteria take eight temporaries of the size of all logits, whatever the number of ranks.
    logits = 8 * positions * family.vocab * (here + 8)
    # Streaming keeps a layer of one side in the checkpoint's dtype for decoding, and records its activations.
    streamed = 8 * BLOCK_BYTES + (load.layer if native else 0) + logits
    if apart:
        return Need(2 * load.rank_bytes + 16 * load.largest + streamed, streamed)
    stored = load.source_bytes + load.rank_bytes
    if not widened:
        return Need(stored + load.rank_bytes + 16 * load.largest + logits, streamed)
    kept = 8 * (load.source_elements + load.rank_elements)
    # Native keeps the ranks twice: what they hold, and the source cut for them.
    return Need((max(kept, 8 * load.source_elements + stored + load.rank_bytes) if native else kept) + logits, streamed)
