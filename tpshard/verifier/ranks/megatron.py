"""Megatron-core's checkpoints, read by themselves: what each rank has of each parameter of the whole model.

`torch_dist` has whole tensors and knows no ranks, so that it is read as one that has everything. The legacy form has a
file for each rank, in which layers are counted within its stage and experts within its share.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UsageError
from tpshard.storage.local import load_json, read_bytes
from tpshard.storage.names import CONFIG, MANIFEST, MEGATRON_COMMON, MEGATRON_LEGACY, is_legacy, is_megatron
from tpshard.storage.pickles import MEGATRON, Archive, Built
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.torch_pickle import DTYPES
from tpshard.verifier.ranks.dcp import Chunk, of_metadata, tiled
from tpshard.verifier.ranks.names import iteration_of, legacy_rank
from tpshard.verifier.ranks.open import FileWeights, RankSet, open_shards, said_of_cast
from tpshard.verifier.ranks.pieces import Joined, PieceWeights, RankPiece, Stored, stored

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_IGNORED = re.compile(r"optimizer\.|chained_\d+\.|(.*\.)?rng_state|.*\._extra_state")
_LAYERS = "decoder.layers."
_INNER = re.compile(r"(mtp\.layers\.\d+\.)mtp_model_layer\.")
_SEVERAL = re.compile(r"(.*\.experts)\.experts\.(linear_fc[12]\.weight)")
_ONE_EXPERT = re.compile(
    r"(.*\.experts)\.(?:local_experts\.(\d+)\.(linear_fc[12]\.weight)|(linear_fc[12]\.weight)(\d+))"
)
Pieces = dict[str, RankPiece]
Copies = list[tuple[TensorInfo, TensorInfo]]


def open_set(directory: Path) -> RankSet:
    """A set of any format, opened by reading headers alone; see `open_shards`."""
    if not is_megatron(directory):
        return open_shards(directory)
    iteration = iteration_of(directory)
    place = next((each for each in (iteration, directory) if (each / CONFIG).is_file()), None)
    if place is None:
        what, hint = "no config.json says what the model is", f"copy the source's {CONFIG} there"
        raise UsageError(what, path=directory, expected=CONFIG, hint=hint)
    config = load_json(read_bytes(place / CONFIG), place / CONFIG)
    path = directory / MANIFEST
    manifest = load_json(read_bytes(path), path) if path.is_file() else {}
    opened = _legacy(iteration) if is_legacy(iteration) else _distributed(iteration)
    ranks = tuple(PieceWeights(pieces) for pieces in opened.ranks)
    cast, cast_name = said_of_cast(manifest, directory)
    return RankSet(
        directory=directory,
        config=config,
        ranks=ranks,
        cast=cast,
        cast_name=cast_name,
        format="megatron",
        stages=opened.stages,
        on_stages=opened.on_stages,
        copies=tuple(opened.copies),
        arguments=opened.args,
    )


@dataclass
class _Opened:
    """What the files hold; see `RankSet`."""

    ranks: list[Pieces]
    args: Mapping[str, Any]
    stages: tuple[tuple[int, int], ...] = ()
    on_stages: tuple[Mapping[str, tuple[int, ...]], ...] = ()
    copies: Copies = field(default_factory=list)


# --- torch_dist ---


def _distributed(iteration: Path) -> _Opened:
    found: dict[str, list[Chunk]] = {}
    for chunks in of_metadata(iteration, lambda name: not _IGNORED.match(name)).values():
        for chunk in chunks:
            found.setdefault(chunk.info.name, []).append(chunk)
    pieces: Pieces = {}
    for name, chunks in found.items():
        stacked = name.startswith(_LAYERS) and not name.removeprefix(_LAYERS).partition(".")[0].isdecimal()
        experts = _SEVERAL.fullmatch(name)
        for lead, inner in _apart(chunks, stacked + bool(experts)).items():
            single = f"{_LAYERS}{lead[0]}.{name.removeprefix(_LAYERS)}" if stacked else name
            single = _INNER.sub(r"\1transformer_layer.", single)
            if several := _SEVERAL.fullmatch(single):
                single = f"{several[1]}.{lead[-1]}.{several[2]}"
            pieces[single] = _whole(single, inner)
    common = iteration / MEGATRON_COMMON
    args = _load(common, "model").args if common.is_file() else {}
    return _Opened([pieces], args)


def _apart(chunks: Sequence[Chunk], dims: int) -> dict[tuple[int, ...], list[Chunk]]:
    """Rectangles of each tensor that is stacked with others along the first dims, by its place there."""
    found: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in chunks:
        info, lead = chunk.info, chunk.info.shape[:dims]
        inner = info.shape[dims:]
        size = math.prod(inner) * DTYPES[info.dtype].itemsize
        for number in range(math.prod(lead)):
            place, rest = list[int](), number
            for at, count in zip(reversed(chunk.at[:dims]), reversed(lead), strict=True):
                rest, index = divmod(rest, count)
                place.insert(0, at + index)
            begin = info.begin + number * size
            own = replace(info, shape=inner, begin=begin, end=begin + size)
            found.setdefault(tuple(place), []).append(Chunk(chunk.at[dims:], own))
    return found


def _whole(name: str, chunks: Sequence[Chunk]) -> RankPiece:
    """A tensor that rectangles make up, if they do."""
    dim = tiled(name, chunks)
    parts = []
    for number, chunk in enumerate(sorted(chunks, key=lambda each: each.at)):
        info = replace(chunk.info, name=f"{name}#{number}" if len(chunks) > 1 else name)
        parts.append(Stored(FileWeights([info]), info.name))
    return parts[0] if len(parts) == 1 else Joined(parts, dim)


# --- the legacy form ---


@dataclass(frozen=True)
class _Loaded:
    """A rank's file: its arguments, and its tensors, chunk by chunk of virtual stages."""

    args: Mapping[str, Any]
    chunks: tuple[Mapping[str, TensorInfo], ...]


@dataclass(frozen=True)
class _Mesh:
    """Megatron's ranks, as the arguments have them."""

    tp: int
    pp: int
    ep: int
    vpp: int
    layers: int
    experts: int
    first: int | None
    last: int | None

    def starts(self, path: Path) -> list[list[int]]:
        """The first layer of each stage's chunks, and behind the last one's the number of layers there are.

        Chunks go round the stages. The first and the last stage may have other numbers than those between.
        """
        sizes, rest = [self.first, self.last], self.layers - (self.first or 0) - (self.last or 0)
        between = self.pp * self.vpp - (self.first is not None) - (self.last is not None)
        if between and rest % between or (not between and rest):
            what = "the layers do not divide among the stages that the arguments speak of"
            raise CorruptError(what, path=path, expected=f"a multiple of {between}", found=f"{rest} layers")
        every = [rest // max(1, between)] * (self.pp * self.vpp)
        if sizes[0] is not None:
            every[0] = sizes[0]
        if sizes[1] is not None:
            every[-1] = sizes[1]
        begins = list(accumulate(every, initial=0))
        return [[begins[chunk * self.pp + stage] for chunk in range(self.vpp)] for stage in range(self.pp)]


def _mesh(args: Mapping[str, Any], vpp: int, path: Path) -> _Mesh:
    try:
        tp, pp, ep = (int(args.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline", "expert"))
        ends = [args.get(f"decoder_{which}_pipeline_num_layers") for which in ("first", "last")]
        first, last = (None if end is None else int(end) for end in ends)
        return _Mesh(tp, pp, ep, vpp, int(args["num_layers"]), int(args.get("num_experts") or 0), first, last)
    except (KeyError, TypeError, ValueError) as error:
        what = "the arguments do not say how the model was cut"
        raise CorruptError(what, path=path, expected="those of Megatron-LM", found=repr(error)) from None


def _legacy(iteration: Path) -> _Opened:
    places = sorted(each.name for each in iteration.iterdir() if legacy_rank(each.name) is not None)
    loaded = {name: _load(iteration / name / MEGATRON_LEGACY, "model") for name in places}
    first = loaded[places[0]]
    if any(not file.chunks for file in loaded.values()):
        raise CorruptError("a rank's file has no model", path=iteration, expected="model, or model0, model1, …")
    mesh = _mesh(first.args, len(first.chunks), iteration)
    starts, tied = mesh.starts(iteration), not first.args.get("untie_embeddings_and_output_weights")
    opened = _Opened([{} for _ in range(mesh.tp)], first.args)
    on: list[dict[str, set[int]]] = [{} for _ in range(mesh.tp)]
    for name, file in loaded.items():
        tp, pp, ep = _place(name, mesh, iteration)
        for chunk, tensors in enumerate(file.chunks):
            for local, info in tensors.items():
                whole = _global(local, starts[pp][chunk], ep * (mesh.experts // mesh.ep))
                whole = _EMBEDDING if whole == _HEAD and tied else whole
                on[tp].setdefault(_shown(whole, mesh.layers), set()).add(pp)
                piece, held = Stored(FileWeights([info]), info.name), opened.ranks[tp]
                if whole in held:
                    opened.copies.append((stored(held[whole]), info))
                else:
                    held[whole] = piece
    if missing := {_name(mesh, *each) for each in _every(mesh, first.args)} - set(places):
        what, says = "ranks are missing or incomplete", f"tp {mesh.tp}, pp {mesh.pp}, ep {mesh.ep}"
        raise CorruptError(what, path=iteration, expected=says, found=f"all but {', '.join(sorted(missing))}")
    if mesh.pp > 1 and mesh.vpp == 1:
        begins = [begin for (begin,) in starts]
        opened.stages = tuple(pairwise([*begins, mesh.layers]))
        opened.on_stages = tuple({name: tuple(sorted(where)) for name, where in each.items()} for each in on)
    return opened


def _every(mesh: _Mesh, args: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """The (tp, pp, ep) of all files. Ranks count in both orders: tp fastest, and (cut of an expert, ep) too."""
    etp = int(args.get("expert_tensor_parallel_size") or mesh.tp) if mesh.experts else mesh.tp
    for pp in range(mesh.pp):
        for rank in range(math.lcm(mesh.tp, etp * mesh.ep)):
            yield rank % mesh.tp, pp, rank // etp % mesh.ep


def _name(mesh: _Mesh, tp: int, pp: int, ep: int) -> str:
    return f"mp_rank_{tp:02}" + (f"_{pp:03}" if mesh.pp > 1 else "") + (f"_{ep:03}" if mesh.ep > 1 else "")


def _place(name: str, mesh: _Mesh, path: Path) -> tuple[int, int, int]:
    """The (tp, pp, ep) that a folder's name says."""
    numbers = legacy_rank(name) or ()
    wanted = 1 + (mesh.pp > 1) + (mesh.ep > 1)
    tp, pp, ep = (*numbers[:1], *((0,) if mesh.pp == 1 else ()), *numbers[1:], 0)[:3]
    if len(numbers) != wanted or tp >= mesh.tp or pp >= mesh.pp or ep >= mesh.ep:
        says = f"tp {mesh.tp}, pp {mesh.pp}, ep {mesh.ep}"
        raise CorruptError("a rank of another mesh", path=path / name, expected=says, found=name)
    return tp, pp, ep


def _global(local: str, first_layer: int, first_expert: int) -> str:
    """A parameter's name in the whole model."""
    name = _INNER.sub(r"\1transformer_layer.", local)
    if local.startswith(_LAYERS):
        number, _, rest = local.removeprefix(_LAYERS).partition(".")
        name = f"{_LAYERS}{first_layer + int(number)}.{rest}"
    if found := _ONE_EXPERT.fullmatch(name):
        return f"{found[1]}.{first_expert + int(found[2] or found[5])}.{found[3] or found[4]}"
    return name


def _shown(name: str, layers: int) -> str:
    """A parameter's name for what judges stages, which knows Hugging Face's."""
    ends = {_EMBEDDING: "model.embed_tokens.weight", _HEAD: "lm_head.weight"}
    if found := re.match(r"mtp\.layers\.(\d+)\.", name):
        return f"model.layers.{layers + int(found[1])}.{name[found.end() :]}"
    return ends.get(name, name.replace("decoder.", "model.", 1))


def _load(path: Path, key: str) -> _Loaded:
    """The arguments in a file, and its tensors below `key`, or `key` and a number."""
    archive = Archive(path)
    state = archive.load(MEGATRON)
    try:
        keys = [each for each in state if re.fullmatch(rf"{key}\d*", str(each))]
        args = state.get("args")
        chunks = [
            {
                name: _tensor(archive, name, tensor)
                for name, tensor in state[each].items()
                if isinstance(tensor, Built) and not _IGNORED.match(name)
            }
            for each in sorted(keys, key=lambda each: (len(each), each))
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("not a file as Megatron writes it", path=path, found=reason) from None
    return _Loaded(args.fields if isinstance(args, Built) else {}, tuple(chunks))


def _tensor(archive: Archive, name: str, tensor: Built) -> TensorInfo:
    dtype, shape, begin = archive.place(name, tensor)
    length = math.prod(shape) * DTYPES[dtype].itemsize
    return TensorInfo(f"{name} of {archive.path.parent.name}", dtype, shape, str(archive.path), begin, begin + length)
