"""What this machine has, and what a verification needs of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from tpshard.errors import LocalIOError
from tpshard.verifier.families.family import Family
from tpshard.verifier.memory import FILL, available
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
        free = int(available(device) * FILL) // sharing
        stream = self.resident > free if stream is None else stream
        if (self.streamed if stream else self.resident) > free:
            raise LocalIOError(
                "there is not enough memory for this",
                expected=f"{self.streamed if stream else self.resident:,} bytes",
                found=f"{free:,} bytes to use on {device}",
                hint="free memory, or use another machine" if stream else "--stream needs less",
            )
        return stream


@dataclass(frozen=True)
class StoredSize:
    """The source, or the ranks that a process runs: stored bytes, elements, and how many of these are in layers."""

    nbytes: int
    elements: int
    body: int


@dataclass(frozen=True)
class Load:
    """What a process has to go through, of so many layers. `largest`: elements of the largest matrix."""

    source: StoredSize
    shards: StoredSize
    layers: int
    largest: int


def load(source: FileWeights, ranks: Sequence[FileWeights], layers: Collection[int], here: range) -> Load:
    """The load of the ranks `here`, of these layers."""
    return Load(
        source=_size([source], layers),
        shards=_size([ranks[i] for i in here], layers),
        layers=max(1, len(layers)),
        largest=max(elements(source, [name]) for name in needed(source, layers)),
    )


def _size(files: Sequence[FileWeights], layers: Collection[int]) -> StoredSize:
    named = [(weights, name) for weights in files for name in needed(weights, layers)]
    return StoredSize(
        nbytes=sum(weights.infos[name].nbytes for weights, name in named),
        elements=sum(elements(weights, [name]) for weights, name in named),
        body=sum(elements(weights, [name]) for weights, name in named if layer_of(name) is not None),
    )


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
    source = load.source
    layer = source.nbytes * source.body // max(1, source.elements) // load.layers if native else 0
    streamed = 8 * BLOCK_BYTES + layer + logits
    if apart:
        return Need(load.shards.nbytes + 16 * load.largest + streamed, streamed)
    if not widened:
        return Need(load.source.nbytes + load.shards.nbytes + 16 * load.largest + logits, streamed)
    kept = 8 * (load.source.elements + load.shards.elements)
    if native:
        kept = max(kept, 8 * load.source.elements + load.source.nbytes + load.shards.nbytes)
    return Need(kept + logits, streamed)
