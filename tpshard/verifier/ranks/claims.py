"""What a set says of itself beside its tensors, held against the source: its config, and the places in its headers.

An engine believes both. Nothing here knows how `split` writes them: what split may change in a config is said again,
and the places of a tensor's shares follow from their shapes.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from tpshard.storage.json_differences import KeyDifference, key_differences
from tpshard.verifier.hf.config import TEXT_KEYS
from tpshard.verifier.ranks.dcp import Chunk, Chunks
from tpshard.verifier.ranks.megatron_claims import misargued
from tpshard.verifier.ranks.open import FileWeights, RankSet, main_dtype, parameters
from tpshard.verifier.ranks.stages import EMBEDDINGS, HEADS, misplaced, stale
from tpshard.verifier.ranks.vllm import TEXT
from tpshard.verifier.ranks.weights import Weights, named
from tpshard.verifier.stacks import firsts, starts

_TIED = "tie_word_embeddings"
_LISTS = {"modules_to_not_convert": False, "modules_in_block_to_quantize": True}
"""Lists in a quantization_config, and whether they are of modules that are quantised."""


def false_claims(opened: RankSet, config: Mapping[str, Any], source: FileWeights) -> list[str]:
    """What of a set's config and headers is not so, where its tensors are judged against this source."""
    changed = (each for each in key_differences(config, opened.config) if not _is_of_split(each, opened, source))
    claims = [*(f"config.json: {each}" for each in changed), *_misplaced(opened.said, source)]
    claims += misargued(opened.arguments, config)
    if opened.stages:
        claims += [*misplaced(opened.on_stages, opened.stages, config), *stale(opened.copies)]
    return claims


def _is_of_split(each: KeyDifference, opened: RankSet, source: FileWeights) -> bool:
    """Whether split makes a key this other one: a cast's dtype, and whether an engine's files have a head apart."""
    if each.key.rpartition(".")[2] in ("dtype", "torch_dtype"):
        said = opened.cast_name
        if opened.format == "vllm" and each.expected is None and said is None:
            said = str(main_dtype(source, parameters(source))).removeprefix("torch.")  # which params.json need not say
        return said is not None and each.found == f'"{said}"'
    if opened.format != "vllm":
        return False
    owner, _, key = each.key.rpartition(".")
    if owner == "quantization_config" and key in _LISTS:
        quantised = {name.rpartition(".")[0] for rank in opened.ranks for name in rank.dequantised}
        plain = {name.rpartition(".")[0] for name in source.names()} - quantised
        return _lists(each, quantised if _LISTS[key] else plain)
    if key != _TIED or owner not in ("", *TEXT_KEYS):
        return False
    names = opened.ranks[0].names()
    heads = (f"{place}{head}" for head in HEADS for place in ("", f"{TEXT}."))
    both = any(name in names for name in heads) and any(name.endswith(EMBEDDINGS) for name in names)
    return each.found == ("false" if both else "true")


def _lists(each: KeyDifference, modules: Collection[str]) -> bool:
    """Whether a list goes on with some of these modules: vLLM would look for them in files, whose names are fused."""
    before, after = (json.loads(text or "null") or [] for text in (each.expected, each.found))
    if not isinstance(before, list) or not isinstance(after, list) or after[: len(before)] != before:
        return False
    return all(named(str(module), modules) is not None for module in after[len(before) :])


def _misplaced(said: Sequence[Chunks], source: Weights) -> Iterator[str]:
    """Tensors of which a rank does not begin where the ranks before it end.

    torch puts rectangles of safetensors files together by that alone. Ranks that hold the same share say the same
    place; where shares are equal, each place is said by as many ranks as any other.
    """
    for name in dict.fromkeys(name for rank in said for name in rank):
        chunks = [rank[name][0] for rank in said if name in rank]
        if not _in_order(chunks, _size(name, source)):
            found = ", ".join(f"{list(chunk.at)} to {list(chunk.end)}" for chunk in chunks)
            yield f"the headers put the ranks' parts of {name} where they do not belong: {found}"


def _size(name: str, source: Weights) -> tuple[int, ...] | None:
    """The shape of a tensor in the source, which may leave out the name's base prefix."""
    known = named(name, source.names())
    return None if known is None else source.shape(known)


def _in_order(chunks: Sequence[Chunk], size: tuple[int, ...] | None) -> bool:
    """Whether parts lie one behind the other in a tensor of this size, from its beginning to its end."""
    whole = (0,) * len(chunks[0].at)
    if size is None or all(chunk.info.shape == size for chunk in chunks):
        return all(chunk.at == whole for chunk in chunks)
    dims = [dim for dim, total in enumerate(size) if any(chunk.info.shape[dim] != total for chunk in chunks)]
    if len(dims) == 2 and dims[0] == 0:
        return _is_stack(chunks, size, dims[1])
    if len(dims) != 1 or any(chunk.at[: dims[0]] + chunk.at[dims[0] + 1 :] != whole[1:] for chunk in chunks):
        return False
    (dim,) = dims
    places = [(chunk.at[dim], chunk.end[dim]) for chunk in chunks]
    different = sorted({place for place in places if place[0] < place[1]})
    ends = [0, *(end for _, end in different)]
    tiled = [begin for begin, _ in different] == ends[:-1] and ends[-1] == size[dim]
    alike = len({end - begin for begin, end in places}) > 1 or len({places.count(place) for place in different}) == 1
    return tiled and alike and places == sorted(places)


def _is_stack(chunks: Sequence[Chunk], size: tuple[int, ...], dim: int) -> bool:
    """Whether parts lie in a stack of experts as ranks have it that share experts, and cut them along a dim."""
    shapes = [chunk.info.shape for chunk in chunks]
    first = firsts(shapes, size)
    begin = first and starts(shapes, size, first)
    if not first or not begin:
        return False
    places = [
        tuple({0: one, dim: two}.get(each, 0) for each in range(len(size)))
        for one, two in zip(first, begin, strict=True)
    ]
    return [chunk.at for chunk in chunks] == places
