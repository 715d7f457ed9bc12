"""Megatron's legacy checkpoints, a state dict for each rank, as rectangles of the tensors that torch_dist has whole.

Layers are numbered within a rank's stage, or within a chunk of virtual stages; experts within a rank's share of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.inputs.megatron_names import LAYERS, canonical
from tpshard.planning.box import Shape
from tpshard.storage.distcp import DcpChunk, DcpTensor
from tpshard.storage.names import MEGATRON_LEGACY
from tpshard.storage.pickles import Archive, Built, Classes
from tpshard.storage.safetensors import DTYPE_BITS, TensorInfo

_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_COLUMN = re.compile(
    r".*\b(linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|eh_proj)\.(weight|bias)"
)
_ROW = re.compile(r".*\b(linear_proj|linear_fc2)\.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_DOWN = re.compile(r".*\.linear_(q|kv)_down_proj\.weight")
"""Down to the latents: whole on each rank with Transformer Engine's layers, and cut by others."""
_GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class _Rank:
    """A file: its place in Megatron's mesh, and its model chunk by chunk of virtual stages."""

    tp: int
    pp: int
    ep: int
    etp: int
    archive: Archive
    chunks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Grid:
    """Megatron's ranks: how many there are along each kind of parallelism; etp: among how many experts are cut."""

    tp: int
    pp: int
    ep: int
    etp: int

    def __str__(self) -> str:
        own = f", etp {self.etp}" if self.etp != self.tp else ""
        return f"tp {self.tp}, pp {self.pp}, ep {self.ep}{own}"

    def places(self, path: Path) -> list[tuple[int, int, int, int]]:
        """Every file's (tp, pp, ep, etp). A rank has the same number in both orders, tp and ep varying slowest last.

        UnsupportedError where Megatron gave the files of several ranks one name, so that the last one is left.
        """
        found: dict[tuple[int, int], int] = {}
        for rank in range(lcm(self.tp, self.etp * self.ep)):
            place, etp = (rank % self.tp, rank // self.etp % self.ep), rank % self.etp
            if found.setdefault(place, etp) != etp:
                what = "experts are cut for more ranks than the rest, and Megatron gives those ranks' files one name"
                hint = "save it anew with --ckpt-format torch_dist"
                raise UnsupportedError(what, path=path, expected="etp that divides tp", found=self, hint=hint)
        return [(tp, pp, ep, etp) for pp in range(self.pp) for (tp, ep), etp in sorted(found.items())]

    def name(self, tp: int, pp: int, ep: int) -> str:
        """The folder of a file."""
        return f"mp_rank_{tp:02}" + (f"_{pp:03}" if self.pp > 1 else "") + (f"_{ep:03}" if self.ep > 1 else "")


def _grid(fields: Mapping[str, Any]) -> _Grid:
    """The ranks that arguments speak of."""
    tp, pp, ep = (int(fields.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline", "expert"))
    etp = fields.get("expert_tensor_parallel_size") if fields.get("num_experts") else None
    return _Grid(tp, pp, ep, int(etp or tp))


def open_legacy(iteration: Path, classes: Classes) -> tuple[dict[str, DcpTensor], Mapping[str, Any]]:
    """The tensors of all ranks' files, and the arguments. CorruptError where a rank's file is missing."""
    try:
        return _open(iteration, classes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("not a checkpoint as Megatron writes it", path=iteration, found=reason) from None


def _open(iteration: Path, classes: Classes) -> tuple[dict[str, DcpTensor], Mapping[str, Any]]:
    folders = {path.name: match for path in iteration.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    first = _load(iteration / min(folders) / MEGATRON_LEGACY, classes)[1]
    args = first.get("args")
    if not isinstance(args, Built):
        what = "the file says nothing of how the model was cut: it has no arguments"
        path = iteration / min(folders) / MEGATRON_LEGACY
        raise UnsupportedError(what, path=path, expected="args, as Megatron-LM saves them", found="none")
    fields, grid = args.fields, _grid(args.fields)
    places = grid.places(iteration)
    expected = {grid.name(*place[:3]) for place in places}
    if others := sorted(folders.keys() - expected):
        what, says = f"{others[0]} is of another mesh", f"{grid}, as the arguments say"
        hint = "keep the ranks of one run in a directory"
        raise CorruptError(what, path=iteration, expected=says, found=f"{len(folders)} ranks", hint=hint)
    ranks = [_rank(iteration, folders, place, grid, classes) for place in places]
    offsets = _offsets(ranks, fields, iteration)
    found: dict[str, list[DcpChunk]] = {}
    for rank in ranks:
        experts = int(fields.get("num_experts") or 0) // grid.ep
        for virtual, state in enumerate(rank.chunks):
            for local, tensor in state.items():
                if local.endswith("_extra_state") or not isinstance(tensor, Built):
                    continue
                name, expert = _global(local, offsets[rank.pp, virtual], rank.ep * experts, fields)
                for chunk in _rectangles(name, expert, rank, tensor, grid, fields):
                    found.setdefault(name, []).append(chunk)
    return {name: _whole(chunks) for name, chunks in found.items()}, fields


def _load(path: Path, classes: Classes) -> tuple[Archive, dict[str, Any]]:
    if not path.is_file():
        raise CorruptError(
            f"{path.parent.name}/{MEGATRON_LEGACY} is not there", path=path, expected="a file for each rank"
        )
    archive = Archive(path)
    state = archive.load(classes)
    if not isinstance(state, dict):
        raise CorruptError("not a checkpoint of Megatron", path=path, expected="a dict", found=type(state).__name__)
    return archive, state


def _rank(
    iteration: Path, folders: Mapping[str, object], place: tuple[int, int, int, int], grid: _Grid, classes: Classes
) -> _Rank:
    name = grid.name(*place[:3])
    if name not in folders:
        what, expected = f"{name} is missing", f"{grid}, as the arguments say"
        raise CorruptError(what, path=iteration, expected=expected, found=", ".join(sorted(folders)[:4]))
    archive, state = _load(iteration / name / MEGATRON_LEGACY, classes)
    args = state.get("args")
    if (own := _grid(args.fields) if isinstance(args, Built) else grid) != grid:
        hint = "keep the ranks of one run in a directory"
        raise CorruptError(f"{name} is of another mesh", path=archive.path, expected=grid, found=own, hint=hint)
    keys = ["model"] if "model" in state else _chunk_keys(state)
    chunks = tuple(state[key] for key in keys)
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise CorruptError(
            "the file has no model", path=archive.path, expected="model", found=", ".join(map(str, state))
        )
    return _Rank(*place, archive, chunks)


def _chunk_keys(state: Mapping[Any, Any]) -> list[str]:
    """The keys of a rank's virtual stages, in their order."""
    return sorted((key for key in state if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:]))


def _offsets(ranks: list[_Rank], args: Mapping[str, Any], path: Path) -> dict[tuple[int, int], int]:
    """By stage and virtual chunk, how many layers come before: all stages' first chunks, then their second ones."""
    counts: dict[tuple[int, int], int] = {}
    for rank in ranks:
        for virtual, state in enumerate(rank.chunks):
            layers = [int(name.split(".")[2]) for name in state if str(name).startswith(LAYERS)]
            counts[virtual, rank.pp] = 1 + max(layers, default=-1)
    before, offsets = 0, {}
    for virtual, pp in sorted(counts):
        offsets[pp, virtual] = before
        before += counts[virtual, pp]
    if before != (expected := args.get("num_layers", before)):
        what = "the stages do not have the layers of the model"
        raise CorruptError(what, path=path, expected=f"{expected} layers", found=f"{before}")
    return offsets


def _global(local: str, offset: int, first_expert: int, args: Mapping[str, Any]) -> tuple[str, int | None]:
    """The name of a parameter in the whole model, that of all experts for one of them, and which it is."""
    name = canonical(local)
    if local == "output_layer.weight" and not args.get("untie_embeddings_and_output_weights"):
        return "embedding.word_embeddings.weight", None  # the last stage's copy of a tied embedding
    if local.startswith(LAYERS):
        number, _, rest = local.removeprefix(LAYERS).partition(".")
        name = f"{LAYERS}{offset + int(number)}.{rest}"
    if found := _LOCAL_EXPERT.fullmatch(name):
        return f"{found[1]}.experts.{found[3]}.weight", first_expert + int(found[2])
    if found := _GROUPED_EXPERT.fullmatch(name):
        return f"{found[1]}.experts.{found[2]}.weight", first_expert + int(found[3])
    return name, None


def _rectangles(
    name: str, expert: int | None, rank: _Rank, tensor: Any, grid: _Grid, args: Mapping[str, Any]
) -> Iterator[DcpChunk]:
    """What a rank's tensor is of the whole one: one rectangle, or of gate and up one each."""
    dtype, shape, begin = rank.archive.place(name, tensor)
    ranks, number = (grid.tp, rank.tp) if expert is None else (grid.etp, rank.etp)
    cut = _cut(name, shape, grid, args)
    pieces = 2 if args.get("swiglu") and ".linear_fc1." in name and cut == 0 else 1
    if cut is not None and len(shape) <= cut or pieces == 2 and shape[0] % 2:
        raise CorruptError(
            f"{name} has another shape than it has in Megatron", path=rank.archive.path, found=list(shape)
        )
    size: Shape = (shape[0] // pieces, *shape[1:]) if shape else ()
    nbytes = prod(size) * DTYPE_BITS[dtype] // 8
    lead, at_lead = ((1,), (expert,)) if expert is not None else ((), ())
    for piece in range(pieces):
        at = [0] * len(size)
        if cut is not None:
            at[cut] = (piece * ranks + number) * size[cut]
        first = begin + piece * nbytes
        unique = f"{name}#{','.join(map(str, (*at_lead, *at)))} of {rank.archive.path.parent.name}"
        info = TensorInfo(unique, dtype, (*lead, *size), str(rank.archive.path), first, first + nbytes)
        yield DcpChunk((*at_lead, *at), info)


def _cut(name: str, shape: Shape, grid: _Grid, args: Mapping[str, Any]) -> int | None:
    """The dim along which ranks have parts of a tensor; None where all have all of it."""
    if found := _DOWN.fullmatch(name):
        rows = args.get("q_lora_rank") if found[1] == "q" else _kv_rows(args)
        return 0 if grid.tp > 1 and isinstance(rows, int) and shape[:1] == (rows // grid.tp,) else None
    return 0 if _COLUMN.fullmatch(name) or name in _VOCABULARY else 1 if _ROW.fullmatch(name) else None


def _kv_rows(args: Mapping[str, Any]) -> int | None:
    latent, rotary = args.get("kv_lora_rank"), args.get("qk_pos_emb_head_dim")
    return latent + rotary if isinstance(latent, int) and isinstance(rotary, int) else None


def _whole(chunks: list[DcpChunk]) -> DcpTensor:
    ends = ([a + size for a, size in zip(each.at, each.info.shape, strict=True)] for each in chunks)
    dtypes = sorted({each.info.dtype for each in chunks})
    if len(dtypes) > 1:
        name = chunks[0].info.name.partition("#")[0]
        raise CorruptError(f"{name} has several dtypes", path=chunks[0].info.file, tensor=name, found=", ".join(dtypes))
    return DcpTensor(dtypes[0], tuple(map(max, zip(*ends, strict=True))), tuple(chunks))
