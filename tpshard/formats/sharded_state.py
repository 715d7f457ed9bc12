"""`sharded_state`: each rank's parameters under an engine's own names, fused, padded and transposed as it has them.

What the engine has is data (`vllm.toml`, `sglang.toml`); this module turns a model and that table into stored tensors.
The files say nothing of the width, and the engines load those of another one without an error: `tpshard check --tp`
stands before them.
"""

import json
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.base import Format
from tpshard.formats.engine_layout import ParameterParts, joined, shares_of
from tpshard.formats.engine_quantised import (
    completed,
    constants,
    counted_last,
    engine_name,
    fused,
    in_shapes,
    method_of,
    refusal,
    require_whole_blocks,
    unplaced,
)
from tpshard.formats.engine_tables import EngineFamily, load_table
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.deal import Deal
from tpshard.planning.join import OutputFile, output_file, parts_by_size
from tpshard.planning.layout import LayoutRows, LogicalTensor, RankShare, Row, RowKind, StoredTensor, whole
from tpshard.planning.model import Model
from tpshard.storage.local import Content, content_of
from tpshard.storage.names import NOT_LOADED
from tpshard.storage.safetensors import DTYPE_BITS
from tpshard.storage.tensor_names import numbered

VOCAB_MULTIPLE = 64
"""Both engines pad vocabularies to a multiple of this before they cut them (their DEFAULT_VOCAB_PADDING_SIZE)."""
_SCALES = ("_k_scale", "_prob_scale", "_q_scale", "_v_scale")
_ONE = struct.pack("<f", 1.0)
_NAME = re.compile(rf"(?:model|{NOT_LOADED})-rank-(0|[1-9]\d*)-part-(0|[1-9]\d*)\.safetensors")


class ShardedState(Format):
    """`model-rank-0-part-0.safetensors`, for one engine's table of names."""

    def __init__(self, engine: str, table: str, no_quantised: str = "") -> None:
        self.engine = engine
        self.no_quantised = no_quantised
        self.path = Path(__file__).parent / "tables" / table

    @property
    def model_types(self) -> frozenset[str]:
        """The text models whose names the table knows."""
        table = load_table(self.path)
        return frozenset(table.families.keys() - table.refused_models.keys())

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every rank's parameters as the engine holds them; UnsupportedError for what it does not load."""
        family, quantised = self._family(model, options), load_table(self.path).quantised
        method = method_of(quantised, model, self.engine)
        dealt = self._deal(family, model, options)
        last = counted_last(quantised, family, model)
        dropped, beside = _dropped(family, model, self.engine), unplaced(quantised, family, model, last)
        unloaded, beside = {*dropped, *beside}, beside - dropped.keys()
        tensors = [tensor for tensor in model.tensors if tensor.name not in unloaded]
        reasons: dict[tuple[object, ...], str | None] = {}  # layers are alike
        for tensor in tensors:
            name = model.full_name(tensor.name)
            key = numbered(name)[0], tensor.dtype, tensor.shape, tensor.cut
            if key not in reasons:
                own = refusal(quantised, family, tensor, name) if model.quantisation else None
                reasons[key] = family.refusal(name) or own
            if reason := reasons[key]:
                raise self._unsupported(f"{self.engine} cannot hold {tensor.name}: {reason}", tensor.name)
        named = self._names(family, model, tensors)
        shares = shares_of(family, model, tensors, dealt)
        if model.quantisation:
            named = {name: engine_name(quantised, family, full_name) for name, full_name in named.items()}
            shares = in_shapes(quantised, family, named, shares, last)
        recipes = {into: fused(quantised, named, shares, each) for into, each in _recipes(family, named, last).items()}
        require_whole_blocks(model, recipes, shares)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        rows = joined(recipes, shares, shapes, options.tp)
        rows += constants(method, family, model, rows, named.values(), options.tp)
        rows += _scales(family, named.values(), options.tp)
        rows.sort(key=lambda row: -(DTYPE_BITS[row.kind.dtype] // 8))
        beside |= {tensor.name for tensor in tensors if family.kind(model.full_name(tensor.name)).function}
        rows += [_not_loaded(tensor, options.tp) for tensor in model.tensors if tensor.name in beside]
        return RankLayouts(LayoutRows(rows, options.tp), dealt, dropped)

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """The engine's files of one rank, and behind them those with what it has no place for."""
        row, limit = split.layout[rank], split.options.max_file_size
        loaded = sum(not stored.name.startswith(f"{NOT_LOADED}.") for stored in row)
        parts = parts_by_size(row[:loaded], limit)
        names = [self.file_name(rank, split.options.tp, part, 0) for part in range(len(parts))]
        if loaded < len(row):
            beside = parts_by_size(row[loaded:], limit)
            names += [f"{NOT_LOADED}-rank-{rank}-part-{len(parts) + part}.safetensors" for part in range(len(beside))]
            parts += beside
        return tuple(
            output_file(name, tensors, split.metadata(rank, part, len(parts)))
            for part, (name, tensors) in enumerate(zip(names, parts, strict=True))
        )

    def file_name(self, rank: int, tp: int, part: int, parts: int) -> str:
        """The engine's default pattern; it reads all parts that there are."""
        return f"model-rank-{rank}-part-{part}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and part; the width is only in the file's metadata."""
        found = _NAME.fullmatch(name)
        return {"rank": int(found[1]), "part": int(found[2])} if found else None

    def side_files(self, split: Split, small: Mapping[str, Content]) -> dict[str, Content]:
        """config.json says whether the head is tied as the files have it, and which modules are quantised."""
        files = dict(small)
        if "config.json" not in files:
            return files
        config = given = json.loads(content_of(files["config.json"]))
        if split.model.tied:
            head, embedding = next(iter(split.model.tied.items()))
            stored = {split.kept.full_name(tensor.name) for tensor in split.kept.tensors}
            config = {**config, "tie_word_embeddings": not {f"{head}.weight", f"{embedding}.weight"} <= stored}
        config = completed(method_of(load_table(self.path).quantised, split.model, self.engine), split.model, config)
        if config != given or split.model.tied:
            files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
        return files

    def _family(self, model: Model, options: Options) -> EngineFamily:
        table = load_table(self.path)
        model_type = str(model.architecture.get("model_type"))
        if options.engine_version is not None and options.engine_version not in table.versions:
            what = f"the names of {self.engine} {options.engine_version} are not known"
            hint = f"names change between versions: split for {self.engine} {table.versions[0]} and load with that"
            raise UnsupportedError(what, expected=", ".join(table.versions), found=options.engine_version, hint=hint)
        if reason := table.refused_models.get(model_type):
            what = f"{self.engine} {table.versions[0]} does not load {model_type} from sharded_state"
            raise self._unsupported(f"{what}: {reason}")
        if model.architecture.get("text"):
            raise self._unsupported(
                f"the names that {self.engine} has in {model_type}, not a text model alone, are not known"
            )
        if model_type not in table.families:
            raise UnsupportedError(
                f"the names that {self.engine} has for model_type {model_type!r} are not known",
                expected=", ".join(sorted(table.families)),
                found=model_type,
                hint="use --format native",
            )
        family = table.families[model_type]
        for key, reason in family.needs.items():
            if not model.config.get(key, True):
                raise self._unsupported(f"{self.engine} does not load {model_type} with {key} false: {reason}")
        for key, reason in family.says.items():
            if key not in model.config:
                what = f"{self.engine} does not load {model_type} with a config that does not say {key}: {reason}"
                raise UnsupportedError(what, expected=key, hint="take the published config.json")
        return replace(family)  # one that remembers the names of this model alone

    def _unsupported(self, message: str, tensor: str | None = None) -> UnsupportedError:
        return UnsupportedError(message, tensor=tensor, hint="use --format native, or another engine's format")

    def _deal(self, family: EngineFamily, model: Model, options: Options) -> Deal:
        """The engine's ranges of the axes, the vocabulary padded as it pads it."""
        single = {
            segment
            for tensor in (model.tensors if family.unrepeated else ())
            if family.kind(model.full_name(tensor.name)).unrepeated
            for segment in tensor.cut.segments
        }
        axes = {}
        for name, axis in model.axes.items():
            padded = -(-axis.count // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if axis.pad else axis.count
            repeated = axis.replicate and name not in single
            repeated = repeated and (axis.count == 1 or name not in family.alone_repeated)
            rest_last = axis.step > 1 and name in family.rest_last
            axes[name] = replace(axis, count=padded, pad=False, replicate=repeated, group=None, rest_last=rest_last)
        return options.even_deal(self.engine, axes)

    def _names(self, family: EngineFamily, model: Model, tensors: Sequence[LogicalTensor]) -> dict[str, str]:
        """Each tensor's full name, with a tied pair under the name that the engine keeps."""
        names = {tensor.name: model.full_name(tensor.name) for tensor in tensors}
        kinds = {numbered(name)[0] for name in names.values()}  # the head and the embedding have no number
        stored = {family.rename(kind) for kind in kinds}
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
            what = "the checkpoint has no head, and its config does not say that it is tied to the embedding"
            raise CorruptError(what, tensor=head, hint="use --format native, or complete the checkpoint")
        return names


def _dropped(family: EngineFamily, model: Model, engine: str) -> dict[str, str]:
    """Tensors that the engine has no place for and needs none for, with the reason."""
    dropped = {}
    layers = model.config.get(family.extra_layers) if family.extra_layers else None
    heads = () if family.head else tuple(f"{head}.weight" for head in model.tied)
    for tensor in model.tensors:
        name = model.full_name(tensor.name)
        if tensor.cut.kind == "buffer":
            dropped[tensor.name] = f"a buffer that {engine} computes itself"
        elif family.kind(name).draft or (
            isinstance(layers, int) and (layer := family.layer_of(name)) is not None and layer >= layers
        ):
            dropped[tensor.name] = "of a layer that predicts further tokens, a draft model of its own"
        elif name in heads:
            dropped[tensor.name] = f"tied: {engine} takes the embedding"
    return dropped


def _not_loaded(tensor: LogicalTensor, tp: int) -> Row:
    """A tensor that the engine has no place for, whole in another file of rank 0."""
    stored = whole(tensor)
    kind = RowKind((RankShare(stored, (0,)), *[None] * (tp - 1)))
    return Row(f"{NOT_LOADED}.{tensor.name}", (tensor.name,), kind)


def _recipes(family: EngineFamily, named: Mapping[str, str], alone: Collection[str]) -> dict[str, ParameterParts]:
    """The engine's parameters by name, in the order of the first tensor of each. named: tensor → full name.

    alone: tensors that count for all that are fused with theirs.
    """
    found: dict[tuple[str, str], dict[int | None, dict[int, str]]] = {}
    for name, full_name in named.items():
        _, numbers = numbered(full_name)
        for target, place, into, stacked in family.kind(full_name).fused:
            group = None if stacked is None else numbers[stacked]
            found.setdefault((into.format(*numbers), target), {}).setdefault(group, {})[place] = name
    recipes: dict[str, ParameterParts] = {}
    members: dict[str, str] = {}
    for (into, target), groups in found.items():
        whole = len(family.fused[target])
        lacking = [
            group for group in groups.values() if len(group) < whole and not any(n in alone for n in group.values())
        ]
        if lacking and target.endswith("?"):
            continue
        if lacking:
            raise CorruptError(
                f"not all tensors that make {into} are there",
                tensor=into,
                expected=", ".join(family.fused[target]),
                found=", ".join(lacking[0].values()),
            )
        ordered = sorted(groups.items(), key=lambda item: item[0] or 0)
        recipes[into] = ParameterParts(tuple(tuple(g[i] for i in sorted(g)) for _, g in ordered), None not in groups)
        members |= {name: into for group in groups.values() for name in group.values()}
    result: dict[str, ParameterParts] = {}
    for name, full_name in named.items():
        if name in members:
            result[members[name]] = recipes[members[name]]
        else:
            renamed = family.rename(full_name)
            assert renamed not in result, f"{name} and {result[renamed]} are one parameter"
            result[renamed] = ParameterParts(((name,),))
    return result


def _scales(family: EngineFamily, names: Iterable[str], tp: int) -> Iterator[Row]:
    """The scales of an unquantised KV cache: 1.0, one scalar each, in every layer."""
    one = RowKind((RankShare(StoredTensor("", "F32", (), (), ((),), None, _ONE), ()),) * tp)
    for layer in family.attending(names) if family.scales else ():
        for pattern in family.scales:
            for scale in _SCALES:
                yield Row(f"{pattern.replace('*', str(layer))}.{scale}", (), one)
