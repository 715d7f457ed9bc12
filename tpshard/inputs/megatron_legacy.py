"""Megatron's legacy checkpoints, a state dict for each rank, as rectangles of the tensors that torch_dist has whole.

Layers are numbered within a rank's stage, or within a chunk of virtual stages; experts within a rank's share of them.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.inputs.megatron_names import LAYERS
from tpshard.planning.box import Shape
from tpshard.storage.distcp import DcpChunk, DcpTensor
from tpshard.storage.pickles import Archive, Built, Classes
from tpshard.storage.safetensors import DTYPE_BITS, TensorInfo

_FILE = "model_optim_rng.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_COLUMN = re.compile(r".*\b(linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj)\.(weight|bias)")
_ROW = re.compile(r".*\b(linear_proj|linear_fc2)\.weight")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class _Rank:
    """A file: its place in Megatron's mesh, and its model chunk by chunk of virtual stages."""

    tp: int
    pp: int
    ep: int
    archive: Archive
    chunks: tuple[Mapping[str, Any], ...]


def open_legacy(iteration: Path, classes: Classes) -> tuple[dict[str, DcpTensor], Mapping[str, Any]]:
    """The tensors of all ranks' files, and the arguments. CorruptError where a rank's file is missing."""
    try:
        return _open(iteration, classes)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CorruptError("not a checkpoint as Megatron writes it", path=iteration, found=reason) from None


def _open(iteration: Path, classes: Classes) -> tuple[dict[str, DcpTensor], Mapping[str, Any]]:
    folders = {path.name: match for path in iteration.iterdir() if (match := _FOLDER.fullmatch(path.name))}
    first = _load(iteration / min(folders) / _FILE, classes)[1]
    args = first.get("args")
    if not isinstance(args, Built):
        what = "the file says nothing of how the model was cut: it has no arguments"
        path = iteration / min(folders) / _FILE
        raise UnsupportedError(what, path=path, expected="args, as Megatron-LM saves them", found="none")
    fields = args.fields
    sizes = [int(fields.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline", "expert")]
    if (etp := fields.get("expert_tensor_parallel_size")) not in (None, sizes[0]) and fields.get("num_experts"):
        what = "the experts are cut for another number of ranks than the rest, which is not read in this form"
        raise UnsupportedError(what, path=iteration, expected=f"{sizes[0]}", found=f"expert_tensor_parallel_size {etp}")
    ranks = [_rank(iteration, folders, coordinate, sizes, classes) for coordinate in _coordinates(sizes)]
    offsets = _offsets(ranks)
    found: dict[str, list[DcpChunk]] = {}
    for rank in ranks:
        experts = int(fields.get("num_experts") or 0) // sizes[2]
        for virtual, state in enumerate(rank.chunks):
            for local, tensor in state.items():
                if local.endswith("_extra_state") or not isinstance(tensor, Built):
                    continue
                name, expert = _global(local, offsets[rank.pp, virtual], rank.ep * experts, fields)
                for chunk in _rectangles(name, expert, rank, tensor, sizes[0], bool(fields.get("swiglu"))):
                    found.setdefault(name, []).append(chunk)
    return {name: _whole(chunks) for name, chunks in found.items()}, fields


def _load(path: Path, classes: Classes) -> tuple[Archive, dict[str, Any]]:
    if not path.is_file():
        raise CorruptError(f"{path.parent.name}/{_FILE} is not there", path=path, expected="a file for each rank")
    archive = Archive(path)
    state = archive.load(classes)
    if not isinstance(state, dict):
        raise CorruptError("not a checkpoint of Megatron", path=path, expected="a dict", found=type(state).__name__)
    return archive, state


def _coordinates(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    tp, pp, ep = sizes
    yield from ((t, p, e) for p in range(pp) for e in range(ep) for t in range(tp))


def _rank(
    iteration: Path, folders: Mapping[str, object], at: tuple[int, int, int], sizes: list[int], classes: Classes
) -> _Rank:
    tp, pp, ep = at
    name = f"mp_rank_{tp:02}" + (f"_{pp:03}" if sizes[1] > 1 else "") + (f"_{ep:03}" if sizes[2] > 1 else "")
    if name not in folders:
        what, expected = f"{name} is missing", f"tp {sizes[0]}, pp {sizes[1]}, ep {sizes[2]}, as its arguments say"
        raise CorruptError(what, path=iteration, expected=expected, found=", ".join(sorted(folders)[:4]))
    archive, state = _load(iteration / name / _FILE, classes)
    keys = ["model"] if "model" in state else sorted(key for key in state if re.fullmatch(r"model\d+", str(key)))
    chunks = tuple(state[key] for key in keys)
    if not chunks or not all(isinstance(chunk, dict) for chunk in chunks):
        raise CorruptError(
            "the file has no model", path=archive.path, expected="model", found=", ".join(map(str, state))
        )
    return _Rank(tp, pp, ep, archive, chunks)


def _offsets(ranks: list[_Rank]) -> dict[tuple[int, int], int]:
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
    return offsets


def _global(local: str, offset: int, first_expert: int, args: Mapping[str, Any]) -> tuple[str, int | None]:
    """The name of a parameter in the whole model, that of all experts for one of them, and which it is."""
    name = local
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


def _rectangles(name: str, expert: int | None, rank: _Rank, tensor: Any, tp: int, gated: bool) -> Iterator[DcpChunk]:
    """What a rank's tensor is of the whole one: one rectangle, or of gate and up one each."""
    dtype, shape, begin = rank.archive.place(name, tensor)
    cut = 0 if _COLUMN.fullmatch(name) or name in _VOCABULARY else 1 if _ROW.fullmatch(name) else None
    pieces = 2 if gated and ".linear_fc1." in name and cut == 0 else 1
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
            at[cut] = (piece * tp + rank.tp) * size[cut]
        first = begin + piece * nbytes
        unique = f"{name}#{','.join(map(str, (*at_lead, *at)))} of {rank.archive.path.parent.name}"
        info = TensorInfo(unique, dtype, (*lead, *size), str(rank.archive.path), first, first + nbytes)
        yield DcpChunk((*at_lead, *at), info)


def _whole(chunks: list[DcpChunk]) -> DcpTensor:
    ends = ([a + size for a, size in zip(each.at, each.info.shape, strict=True)] for each in chunks)
    dtypes = sorted({each.info.dtype for each in chunks})
    if len(dtypes) > 1:
        name = chunks[0].info.name.partition("#")[0]
        raise CorruptError(f"{name} has several dtypes", path=chunks[0].info.file, tensor=name, found=", ".join(dtypes))
    return DcpTensor(dtypes[0], tuple(map(max, zip(*ends, strict=True))), tuple(chunks))
