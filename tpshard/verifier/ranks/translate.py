"""Shards in engines' formats, read as the source names and orders them. Fused modules are mathematics, not layouts."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from tpshard.errors import DifferentError, UnsupportedError
from tpshard.verifier.elements import ACTIVATION_SCALES, EXPERT
from tpshard.verifier.families.configs import FAMILIES, describe
from tpshard.verifier.families.family import Family
from tpshard.verifier.hf.config import text_of
from tpshard.verifier.ranks import meta_deepseek as published
from tpshard.verifier.ranks import replicas
from tpshard.verifier.ranks.dcp import dealt
from tpshard.verifier.ranks.megatron_names import in_source
from tpshard.verifier.ranks.nested import Beside, beside_of, names_in, shares_beside, texts_in
from tpshard.verifier.ranks.open import FileWeights, RankSet
from tpshard.verifier.ranks.pieces import Joined, PieceWeights, RankPiece, Stored, stored
from tpshard.verifier.ranks.vllm import TEXT, Rank
from tpshard.verifier.ranks.vllm_names import VLLM, known_as
from tpshard.verifier.ranks.weights import named
from tpshard.verifier.report.verdict import layer_of

_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_KNOWN: Mapping[str, Collection[str]] = {"vllm": VLLM, "meta": ("llama",), "deepseek": ("deepseek_v2", "deepseek_v3")}

_OTHERWISE = (
    "`tpshard verify --tier bytes` compares them; where a class runs the model, `tpshard reshard --format native` makes"
    " what it runs"
)


def translated(opened: RankSet, source: FileWeights) -> RankSet:
    """The set with every rank's tensors under the names that the source has, in its order of rows and features.

    UnsupportedError for a family whose names in this format are not known. DifferentError where a parameter cannot hold
    what its name says.
    """
    if opened.format == "native":
        return opened
    if opened.format == "megatron":
        made = in_source(opened, source)
    else:
        made = _dealt(opened) if opened.chunks else _renamed(opened, source)
    ranks = [PieceWeights({_as_source(name, source): piece for name, piece in pieces.items()}) for pieces in made]
    beside, aside = _beside(opened), dict[str, int]()
    if beside is not None:
        aside = shares_beside(opened.config, beside, source, ranks)
    return replace(opened, ranks=tuple(ranks), stored=opened.ranks, aside=aside)


def _beside(opened: RankSet) -> Beside | None:
    """How vLLM has what is beside the text, in a set for it."""
    return beside_of(opened.config) if opened.format == "vllm" else None


def source_of(opened: RankSet, source: FileWeights) -> tuple[RankSet, FileWeights]:
    """The source without what the format has no place for and a class would add to the rest; the set says so."""
    beside = _beside(opened)
    left = [name for name in source.names() if beside and beside.adapters and re.search(beside.adapters, name)]
    if not left:
        return opened, source
    what = f"{len(left)} tensors of adapters are not in a set for {opened.format}: the model is run without them"
    kept = (info for name, info in source.infos.items() if name not in left)
    return replace(opened, warnings=(*opened.warnings, what)), FileWeights(kept, source.cast)


def _text(opened: RankSet) -> Mapping[str, Any]:
    """The config of the text model, if another nests it."""
    return opened.config if _beside(opened) is None else text_of(opened.config)


def _as_source(name: str, source: FileWeights) -> str:
    """The name as the source has it; DeepSeek's convert.py says `scale`."""
    found = named(name, source.names())
    if found is None and name.endswith(".scale"):
        found = named(f"{name.removesuffix('scale')}weight_scale_inv", source.names())
    return name if found is None else found


def _renamed(opened: RankSet, source: FileWeights) -> list[dict[str, RankPiece]]:
    beside, known = _beside(opened), _KNOWN[opened.format]
    config = _text(opened)
    model_type = known_as(config)
    if model_type not in known:
        model_type = str(opened.config.get("model_type"))
        message = f"verify does not know the names that the format {opened.format} has for model_type {model_type!r}"
        raise UnsupportedError(message, path=opened.directory, hint=_OTHERWISE)
    family, every = _described(config), range(len(opened.ranks))
    if opened.format == "meta":
        return [dict(published.meta(opened.ranks, family, rank)) for rank in every]
    if opened.format == "vllm":
        names = (VLLM[model_type],) if beside is None else names_in(source, VLLM[model_type], beside)
        text = tuple(f"{each}." for each in texts_in(beside)) if beside else ()
        other = names[-1] if beside else None
        made = [_complete(Rank(opened.ranks, names[0], family, rank, source, config, other, text)) for rank in every]
        embedding = f"{beside.text}model.{family.embed}" if beside else f"{family.prefixes[0]}{family.embed}"
        of_source = names[0].beside(source.names()).of
        ends = of_source(f"{embedding}.weight"), of_source(f"{beside.text if beside else ''}lm_head.weight")
        return [_tied(pieces, config, family, *ends) for pieces in made]
    made = [dict(published.deepseek(weights)) for weights in opened.ranks]
    return [_tied(pieces, config, family, f"{family.prefixes[0]}{family.embed}.weight") for pieces in made]


def _complete(rank: Rank) -> dict[str, RankPiece]:
    """A vLLM rank's pieces. DifferentError where it has companions of a weight that the source has not, or lacks some.

    What makes a quantised weight, the weight itself will miss.
    """
    found, source = dict[str, RankPiece | None](), rank.source
    for name, piece in rank.pieces():
        if piece is not None and name in found:
            what = f"rank {rank.rank} has {name} twice, also as {stored(piece).name}"
            raise DifferentError(what, tensor=stored(piece).name)
        found[name] = piece
        if piece is not None and name not in source.names() and not name.endswith((".weight", ".bias")):
            what = f"{stored(piece).name} of rank {rank.rank} is nothing that the source has"
            raise DifferentError(what, tensor=stored(piece).name)
    modules = {name.rpartition(".")[0] for name in found}
    for name in source.names():
        if EXPERT.search(name) and name.rpartition(".")[0] not in modules:
            continue  # of another rank's expert
        if name.endswith(ACTIVATION_SCALES) and (layer_of(name) or 0) < rank.family.layers and name not in found:
            raise DifferentError(f"rank {rank.rank} has no tensor {name}", tensor=name)
    return {name: piece for name, piece in found.items() if piece is not None}


def _dealt(opened: RankSet) -> list[dict[str, RankPiece]]:
    """What each rank holds of a set that stores every rectangle once."""
    made: list[dict[str, RankPiece]] = [{} for _ in opened.ranks]
    owner = {chunk.info: weights for weights, held in zip(opened.ranks, opened.chunks, strict=True)
             for chunks in held.values() for chunk in chunks}  # fmt: skip
    for name, dim, shares in dealt(opened.chunks):
        for pieces, chunks in zip(made, shares, strict=True):
            parts = [Stored(owner[chunk.info], chunk.info.name) for chunk in chunks]
            pieces[name] = parts[0] if len(parts) == 1 else Joined(parts, dim)
    return made


def _described(config: Mapping[str, Any]) -> Family:
    """The family, or a LLaMA of its sizes: what `VLLM` has and the decoder does not is named as LLaMA is."""
    model_type = str(config.get("model_type"))
    as_class = config if "hidden_size" in config else text_of(config)  # of a form with names of its own
    sizes = {key: as_class[key] for key in _SIZES if as_class.get(key)}
    if isinstance(listed := config.get("layers_block_type"), list):
        sizes.setdefault("num_hidden_layers", len(listed))  # a newer config says what every layer is, not how many
    elif config.get("num_layers") is not None:
        sizes.setdefault("num_hidden_layers", config["num_layers"])
    sizes.setdefault("num_attention_heads", 1)  # of Mamba alone nothing attends
    return describe(config if model_type in FAMILIES else {**sizes, "model_type": "llama"})


def _tied(
    pieces: dict[str, RankPiece], config: Mapping[str, Any], family: Family, embedding: str, head: str = ""
) -> dict[str, RankPiece]:
    """A tied pair is one parameter in the file, and may be under the head's name.

    embedding, head: their names in the source.
    """
    heads = (f"{place}{name}.weight" for name in family.heads_names for place in ("", f"{TEXT}."))
    found = next((name for name in (*heads, head) if name in pieces), None)
    if config.get("tie_word_embeddings") is not True or embedding in pieces or found is None:
        return pieces
    return {embedding if name == found else name: piece for name, piece in pieces.items()}


def stored_in(opened: RankSet, what: str, rank: int) -> str | None:
    """The parameter that holds what a report names (a module, its bias, q of it), where that has another name."""
    weights, name = opened.ranks[rank].as_stored, what.rpartition(" of ")[2]
    pieces, names = weights.pieces if isinstance(weights, PieceWeights) else {}, (f"{name}.weight", name)
    found = next((stored(pieces[each]).name for each in names if each in pieces), None)
    return None if found in names else found


def require_replicas(opened: RankSet) -> None:
    """DifferentError where what an engine takes from each rank, and the decoder from one, is not the same on all."""
    if opened.format == "vllm":
        replicas.require_replicas(opened.stored, VLLM[known_as(_text(opened))])
