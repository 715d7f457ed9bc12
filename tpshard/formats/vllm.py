"""vLLM's `sharded_state`: each rank's parameters under the engine's own names, fused, padded and transposed.

What vLLM wants is data (`vllm.toml`); this module turns a model and that table into stored tensors. The files say
nothing of the width, and vLLM loads those of another one without an error: `tpshard check --tp` stands before it.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tpshard.box import Box, Shape, full
from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.formats.base import Format, Laid, Options, Split
from tpshard.formats.engines import Family, fits_any, load_table, match
from tpshard.header import DTYPE_BITS
from tpshard.layout import Deal, LogicalTensor, Part, StoredTensor, deal, listing, possible_tp, shard, why_not
from tpshard.model import CASTABLE, Model
from tpshard.rules import Axis, Cut

VOCAB_MULTIPLE = 64
"""vLLM pads vocabularies to a multiple of this before it cuts them (its DEFAULT_VOCAB_PADDING_SIZE)."""
_SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
_ONE = struct.pack("<f", 1.0)
_NAME = re.compile(r"model-rank-(0|[1-9]\d*)-part-(0|[1-9]\d*)\.safetensors")

_Share = StoredTensor
"""A rank's share of one logical tensor, before it is named, fused or stacked."""


class Vllm(Format):
    """`model-rank-0-part-0.safetensors`, for one engine's table of names."""

    def __init__(self, engine: str, table: str, *, scales: bool) -> None:
        self.engine = engine
        self.path = Path(__file__).with_name(table)
        self.scales = scales

    def lay(self, model: Model, options: Options) -> Laid:
        """Every rank's parameters as the engine holds them; UnsupportedError for what it does not load."""
        family = self._family(model, options)
        axes, ranges = self._deal(family, model, options)
        dropped = _dropped(family, model, self.engine)
        tensors = [tensor for tensor in model.tensors if tensor.name not in dropped]
        for tensor in tensors:
            if reason := family.refusal(model.full_name(tensor.name)):
                raise self._unsupported(f"{self.engine} cannot hold {tensor.name}: {reason}", tensor.name)
        named = self._names(family, model, tensors)
        shares = _shares(family, model, tensors, axes, ranges, options.tp)
        rows: list[list[StoredTensor]] = [[] for _ in range(options.tp)]
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        for name, recipe in _recipes(family, named).items():
            for rank, row in enumerate(rows):
                row.append(_join(name, recipe, rank, shares, shapes))
        if self.scales:
            constants = list(_scales(family, named.values()))
            for row in rows:
                row.extend(constants)
        order = sorted(range(len(rows[0])), key=lambda index: -(DTYPE_BITS[rows[0][index].dtype] // 8))
        return Laid(tuple(tuple(row[index] for index in order) for row in rows), dropped)

    def file_name(self, rank: int, tp: int, part: int, parts: int) -> str:
        """The engine's default pattern; it reads all parts that there are."""
        return f"model-rank-{rank}-part-{part}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and part; the width is only in the file's metadata."""
        found = _NAME.fullmatch(name)
        return {"rank": int(found[1]), "part": int(found[2])} if found else None

    def side_files(self, split: Split, small: Mapping[str, bytes]) -> dict[str, bytes]:
        """config.json says whether the head is tied as the files have it, whatever the class's default is."""
        files = dict(small)
        if split.model.tied and "config.json" in files:
            head, embedding = next(iter(split.model.tied.items()))
            stored = {split.kept.full_name(tensor.name) for tensor in split.kept.tensors}
            config = json.loads(files["config.json"])
            config["tie_word_embeddings"] = not {f"{head}.weight", f"{embedding}.weight"} <= stored
            files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return files

    def _family(self, model: Model, options: Options) -> Family:
        table = load_table(self.path)
        model_type = str(model.architecture.get("model_type"))
        if options.engine_version is not None and options.engine_version not in table.versions:
            raise UnsupportedError(
                f"the names of {self.engine} {options.engine_version} are not known",
                expected=", ".join(table.versions),
                found=options.engine_version,
                hint=f"names change between versions: split for {self.engine} {table.versions[0]} and load with that",
            )
        if reason := table.refused_models.get(model_type):
            raise self._unsupported(f"{self.engine} {table.versions[0]} does not load {model_type}: {reason}")
        if model_type not in table.families:
            raise UnsupportedError(
                f"the names that {self.engine} has for model_type {model_type!r} are not known",
                expected=", ".join(sorted(table.families)),
                found=model_type,
                hint="use --format native",
            )
        return table.families[model_type]

    def _unsupported(self, message: str, tensor: str | None = None) -> UnsupportedError:
        return UnsupportedError(message, tensor=tensor, hint="use --format native, or another engine's format")

    def _deal(self, family: Family, model: Model, options: Options) -> tuple[Mapping[str, Axis], Deal]:
        """The axes, and even ranges of them, the vocabulary padded as the engine pads it."""
        tp = options.tp
        if options.uneven or options.shares is not None or options.pad_vocab_to is not None:
            raise UsageError(
                f"{self.engine} takes even shares and its own padding only",
                found="--uneven, --shares or --pad-vocab-to",
                hint="leave them out, or use --format native",
            )
        for axis in model.axes.values():
            padded = -(-axis.count // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if axis.pad else axis.count
            even = replace(axis, count=padded, pad=False, replicate=axis.replicate and family.repeat_kv)
            if reason := why_not(even, tp):
                fits = [each for each in possible_tp(model.axes) if why_not(even, each) is None]
                raise UnsupportedError(
                    reason,
                    expected="tp " + listing(fits),
                    found=f"tp {tp}",
                    hint=f"{self.engine} takes even shares only: use one of those",
                )
        ranges = {
            name: deal({name: axis}, tp, None, -(-axis.count // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)[name]
            for name, axis in ((name, replace(axis, group=None)) for name, axis in model.axes.items())
        }
        return model.axes, ranges

    def _names(self, family: Family, model: Model, tensors: Sequence[LogicalTensor]) -> dict[str, str]:
        """Each tensor's full name, with a tied pair under the name that the engine keeps."""
        names = {tensor.name: model.full_name(tensor.name) for tensor in tensors}
        stored = {family.rename(name) for name in names.values()}
        head = f"{family.head}.weight"
        if model.tied:
            _, embedding = next(iter(model.tied.items()))
            if family.head and head in stored:
                return names
            if not family.tied:
                raise self._unsupported(
                    f"{self.engine}'s class for {model.architecture.get('model_type')} does not tie the head to the "
                    "embedding, and the checkpoint has no head of its own"
                )
            return {
                name: f"{family.tied}.weight" if full_name == f"{embedding}.weight" else full_name
                for name, full_name in names.items()
            }
        if not family.head and "lm_head.weight" in stored:
            raise self._unsupported(f"{self.engine}'s class has no head of its own, and this one is not tied")
        if family.head and head not in stored:
            raise CorruptError(
                "the checkpoint has no head, and its config does not say that it is tied to the embedding",
                tensor=head,
                hint="use --format native, or complete the checkpoint",
            )
        return names


def _dropped(family: Family, model: Model, engine: str) -> dict[str, str]:
    """Tensors that the engine has no place for and needs none for, with the reason."""
    dropped = {}
    layers = model.config.get(family.extra_layers) if family.extra_layers else None
    for tensor in model.tensors:
        name = model.full_name(tensor.name)
        fit = match(family.layer, name)
        if tensor.cut.kind == "buffer":
            dropped[tensor.name] = f"a buffer that {engine} computes itself"
        elif isinstance(layers, int) and fit and int(fit.components[0]) >= layers:
            dropped[tensor.name] = "of a layer that predicts further tokens, a draft model of its own"
        elif not family.head and name in {f"{head}.weight" for head in model.tied}:
            dropped[tensor.name] = f"tied: {engine} takes the embedding"
    return dropped


def _shares(
    family: Family,
    model: Model,
    tensors: Sequence[LogicalTensor],
    axes: Mapping[str, Axis],
    ranges: Deal,
    tp: int,
) -> dict[str, tuple[_Share, ...]]:
    """Each tensor's share of every rank, cut and turned as the engine has it."""
    shares = {}
    for tensor in tensors:
        name = model.full_name(tensor.name)
        dtype = "F32" if fits_any(family.float32, name) and tensor.dtype in CASTABLE else tensor.dtype
        how = family.cut(name)
        cut = replace(tensor, dtype=dtype)
        if how == "grouped":
            held = tuple(_grouped(cut, axes, ranges, rank) for rank in range(tp))
        else:
            held = _cut_as(cut, how, axes, ranges, tp)
        if fits_any(family.transposed, name):
            held = tuple(map(_transposed, held))
        shares[tensor.name] = held
    return shares


def _cut_as(
    tensor: LogicalTensor, how: str | None, axes: Mapping[str, Axis], ranges: Deal, tp: int
) -> tuple[_Share, ...]:
    if how == "even":
        assert tensor.cut.dim is not None
        axis = Axis(tensor.name, tensor.shape[tensor.cut.dim], unit=1)
        if reason := why_not(axis, tp):
            raise UnsupportedError(reason, tensor=tensor.name, found=f"tp {tp}")
        axes, ranges = {axis.name: axis}, deal({axis.name: axis}, tp, None, None)
        tensor = replace(tensor, cut=Cut(tensor.cut.kind, tensor.cut.dim, (axis.name,)))
    elif how in ("replicate", "first"):
        tensor = replace(tensor, cut=Cut("replicate"))
    elif how is not None:
        tensor = replace(tensor, cut=replace(tensor.cut, segments=tuple(how.split()[1:]), interleave=None))
    held = tuple(rank[0] for rank in shard([tensor], axes, tp, ranges))
    if how == "first":
        zeros = held[0]._replace(parts=(), fills=(full(tensor.shape),))
        held = (held[0], *(zeros for _ in held[1:]))
    return held


def _grouped(tensor: LogicalTensor, axes: Mapping[str, Axis], ranges: Deal, rank: int) -> _Share:
    """The share of a tensor that is stored interleaved, as its segments one after another."""
    cut = tensor.cut
    assert cut.dim is not None and cut.interleave is not None
    repeats = axes[cut.interleave].count
    sizes = [axes[name].count // repeats * axes[name].unit for name in cut.segments]
    parts: list[Part] = []
    stored = 0
    for index, name in enumerate(cut.segments):
        first, last = ranges[name][rank]
        per_group = axes[name].count // repeats
        for group in range(repeats):
            low, high = max(first, group * per_group), min(last, (group + 1) * per_group)
            if low >= high:
                continue
            start = group * sum(sizes) + sum(sizes[:index]) + (low - group * per_group) * axes[name].unit
            length = (high - low) * axes[name].unit
            box = _along(tensor.shape, cut.dim, start, start + length)
            parts.append(Part(tensor.name, box, tuple(stored if dim == cut.dim else 0 for dim in range(len(box)))))
            stored += length
    shape = (*tensor.shape[: cut.dim], stored, *tensor.shape[cut.dim + 1 :])
    return StoredTensor(tensor.name, tensor.dtype, shape, tuple(parts))


def _along(shape: Shape, dim: int, start: int, stop: int) -> Box:
    return (*full(shape[:dim]), (start, stop), *full(shape[dim + 1 :]))


def _transposed(share: _Share) -> _Share:
    """The share with its last two dims exchanged."""
    last = len(share.shape) - 1
    order = (*range(last - 1), last, last - 1)

    def turned(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    parts = tuple(part._replace(at=turned(part.at), order=order) for part in share.parts)
    fills = tuple(tuple(box[dim] for dim in order) for box in share.fills)
    return share._replace(shape=turned(share.shape), parts=parts, fills=fills)


@dataclass(frozen=True)
class _Recipe:
    """What one of the engine's parameters is made of: lists of tensors to fuse, one list for every stacked expert."""

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False


def _recipes(family: Family, named: Mapping[str, str]) -> dict[str, _Recipe]:
    """The engine's parameters by name, in the order of the first tensor of each. named: tensor → full name."""
    found: dict[str, dict[int | None, dict[int, str]]] = {}
    for name, full_name in named.items():
        for target, patterns in family.fused.items():
            for place, pattern in enumerate(patterns):
                if fit := match(pattern, full_name):
                    found.setdefault(fit.into(target), {}).setdefault(fit.stacked, {})[place] = name
    recipes: dict[str, _Recipe] = {}
    members: dict[str, str] = {}
    for into, groups in found.items():
        places = {place for group in groups.values() for place in group}
        if len(places) > 1 or None not in groups:
            ordered = sorted(groups.items(), key=lambda item: item[0] or 0)
            for _, group in ordered:
                if set(group) != places:
                    raise CorruptError(
                        f"the tensors that make {into} are not all there", tensor=into, found=", ".join(group.values())
                    )
            recipes[into] = _Recipe(tuple(tuple(g[i] for i in sorted(g)) for _, g in ordered), None not in groups)
            members |= {name: into for group in groups.values() for name in group.values()}
    result: dict[str, _Recipe] = {}
    for name, full_name in named.items():
        if name in members:
            result[members[name]] = recipes[members[name]]
        else:
            renamed = family.rename(full_name)
            assert renamed not in result, f"{name} and {result[renamed]} are one parameter"
            result[renamed] = _Recipe(((name,),))
    return result


def _join(
    name: str, recipe: _Recipe, rank: int, shares: Mapping[str, tuple[_Share, ...]], shapes: Mapping[str, Shape]
) -> StoredTensor:
    """One parameter of one rank: shares fused along their first dim, experts stacked before it."""
    if recipe == _Recipe(recipe.groups[:1]) and len(recipe.groups[0]) == 1:
        return shares[recipe.groups[0][0]][rank]._replace(name=name)
    parts: list[Part] = []
    fills: list[Box] = []
    for expert, group in enumerate(recipe.groups):
        begin = 0
        for share in (shares[each][rank] for each in group):
            for part in share.parts:
                moved = part._replace(at=(part.at[0] + begin, *part.at[1:]))
                parts.append(_stacked(moved, expert, shapes[part.tensor]) if recipe.stacked else moved)
            for (start, stop), *rest in share.fills:
                box = ((start + begin, stop + begin), *rest)
                fills.append(((expert, expert + 1), *box) if recipe.stacked else box)
            begin += share.shape[0]
    first = shares[recipe.groups[0][0]][rank]
    if len({shares[each][rank].dtype for group in recipe.groups for each in group}) > 1:
        raise UnsupportedError(f"the tensors that make {name} have different dtypes", tensor=name, hint="cast: --dtype")
    shape = (begin, *first.shape[1:])
    return StoredTensor(
        name,
        first.dtype,
        (len(recipe.groups), *shape) if recipe.stacked else shape,
        tuple(parts),
        tuple(fills),
    )


def _stacked(part: Part, expert: int, shape: Shape) -> Part:
    """A part of one expert's tensor of `shape`, in a tensor that has all experts."""
    assert part.view is None and part.order is None
    return Part(part.tensor, ((0, 1), *part.box), (expert, *part.at), (1, *shape))


def _scales(family: Family, names: Iterable[str]) -> Iterator[StoredTensor]:
    """The scales of an unquantised KV cache: 1.0, one scalar each, in every layer."""
    layers = sorted({int(fit.components[0]) for name in names if (fit := match(family.layer, name))})
    for layer in layers:
        for pattern in family.scales:
            for scale in _SCALES:
                name = f"{pattern.replace('*', str(layer))}.{scale}"
                yield StoredTensor(name, "F32", (), (), ((),), None, _ONE)


FORMAT = Vllm("vLLM", "vllm.toml", scales=True)
