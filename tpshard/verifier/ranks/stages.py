"""Pipeline stages: whether each stage has the layers that it must have, and copies on two of them are equal.

The decoder reads a rank's tensors from whichever stage has them and hands activations from layer to layer, as stages
do; so where a tensor lies is judged here, by the order of layers and what the manifest says of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tpshard.storage.local import read_range
from tpshard.storage.safetensors import TensorInfo
from tpshard.verifier.report.verdict import LAYER, layer_of

EMBEDDINGS = tuple(
    f"{each}.weight" for each in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
)
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_BLOCK = 1 << 24

OnStages = Mapping[str, tuple[int, ...]]
"""A rank's tensors by name, and the stages that have them."""


def misplaced(ranks: Sequence[OnStages], ranges: Sequence[Sequence[int]], config: Mapping[str, Any]) -> Iterator[str]:
    """What lies on another stage than it must. ranges: the layers of each stage, as the manifest says it."""
    held, last = dict[str, tuple[int, ...]](), len(ranges) - 1
    for rank, mine in enumerate(ranks):  # an expert may be on one rank alone
        if (apart := next((name for name, where in mine.items() if held.get(name, where) != where), None)) is not None:
            yield f"{apart} is on {_listed(mine[apart])} of rank {rank}, and on {_listed(held[apart])} of another"
            return
        held |= mine
    if [begin for begin, _ in ranges] != [0, *(end for _, end in ranges[:-1])]:
        yield f"the stages have layers {_listed_ranges(ranges)}, which are not one behind the other"
        return
    stacks: dict[str, dict[int, set[tuple[int, ...]]]] = {}
    for name, where in held.items():
        if found := LAYER.search(name):
            stacks.setdefault(name[: found.start()], {}).setdefault(int(found[1]), set()).add(where)
    # Of several stacks (a tower, a decoder) the decoder's layers are on all stages.
    before, decoder = max(stacks.items(), key=lambda item: len({where for each in item[1].values() for where in each}))
    for layer, places in sorted(decoder.items()):
        stage = next((at for at, (begin, end) in enumerate(ranges) if begin <= layer < end), last)
        if places != {(stage,)}:
            found_on = _listed(tuple(sorted({each for place in places for each in place})))
            yield f"layer {layer} is on {found_on}, and its place is stage {stage}"
    tied = config.get("tie_word_embeddings") is True and not any(name.endswith(HEADS) for name in held)
    for name, where in held.items():
        outside = name.startswith(before) and layer_of(name) is None
        needed = {last} if name.endswith(HEADS) else set()
        if outside and name.endswith(EMBEDDINGS):
            needed = {0, last} if tied else {0}
        if not needed <= {*where}:  # on more of them it is a copy, which is compared
            yield f"{name} is on {_listed(where)}, and its place is {_listed(tuple(sorted(needed)))}"


def _listed(stages: tuple[int, ...] | None) -> str:
    return f"stage {' and '.join(map(str, stages))}" if stages else "no stage"


def _listed_ranges(ranges: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{begin} to {end - 1}" for begin, end in ranges)


Read = Callable[[str, int, int], bytearray]
"""Gives the bytes of a file from one place to another."""


def stale(copies: Sequence[tuple[TensorInfo, TensorInfo]], read_copy: Read = read_range) -> Iterator[str]:
    """The tensors on two stages that are not the same on both, byte for byte. read_copy: reads the second of two."""
    for one, other in copies:
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        ends = [*range(0, one.nbytes, _BLOCK), one.nbytes]
        if not same or any(
            read_range(one.file, one.begin + begin, one.begin + end)
            != read_copy(other.file, other.begin + begin, other.begin + end)
            for begin, end in pairwise(ends)
        ):
            yield f"{one.name} is not the same on the stages that have it"


def injected(
    ranks: Sequence[OnStages],
    ranges: Sequence[Sequence[int]],
    config: Mapping[str, Any],
    copies: Sequence[tuple[TensorInfo, TensorInfo]],
) -> dict[str, bool]:
    """Faults put into this set on purpose, and whether `misplaced`, or `stale`, sees them."""
    last = len(ranges) - 1
    faults: dict[str, Callable[[str, tuple[int, ...]], tuple[int, ...]]] = {
        "stages-exchanged": lambda _, where: tuple(sorted(last - stage for stage in where)),
        "layer-on-another-stage": lambda name, where: (last,) if layer_of(name) == 0 else where,
    }
    seen = {"tied-copy-stale": any(stale(copies[:1], _bit_flipped))} if copies else {}
    return seen | {
        fault: any(misplaced([{name: at(name, held[name]) for name in held} for held in ranks], ranges, config))
        for fault, at in faults.items()
    }


def _bit_flipped(file: str, begin: int, end: int) -> bytearray:
    """What is stored there, with a bit of its last byte turned over."""
    data = read_range(file, begin, end)
    data[-1] ^= 1
    return data
