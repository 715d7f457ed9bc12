"""`sharded_state`: each rank's parameters under an engine's own names, fused, padded and transposed as it has them.

What the engine has is data (`vllm.toml`, `sglang.toml`); this module turns a model and that table into stored tensors.
The files say nothing of the width, and the engines load those of another one without an error: `tpshard check --tp`
stands before them.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.formats.base import Format
from tpshard.formats.engine_config import (
    HINT,
    classes_of,
    head_of,
    kinds_of,
    named_as,
    require_config,
    told_apart,
    with_dtype,
    with_head,
)
from tpshard.formats.engine_layout import ParameterParts, Share, first_experts, joined, recipes_of, shares_of
from tpshard.formats.engine_nested import AsEngineHas, as_engine_has, is_text, load_nested, text_type, with_flag
from tpshard.formats.engine_notes import DRAFT, notes_of
from tpshard.formats.engine_places import require_all, scales_of
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
    scaled,
    unplaced,
)
from tpshard.formats.engine_rows import VOCAB_MULTIPLE
from tpshard.formats.engine_stages import on_stages
from tpshard.formats.engine_tables import EngineFamily, Table, load_table
from tpshard.formats.engine_versions import Compared, table_of, versions
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.axes import Axis
from tpshard.planning.deal import Deal, Range
from tpshard.planning.join import OutputFile, output_file, parts_by_size
from tpshard.planning.layout import SCALED, LayoutRows, LogicalTensor, RankShare, Row, RowKind, whole
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import CASTABLE, Model
from tpshard.planning.placement import Placement, placement
from tpshard.storage.local import Content, content_of
from tpshard.storage.names import CONFIG, META_PARAMS, NOT_LOADED
from tpshard.storage.safetensors import DTYPE_BITS
from tpshard.storage.tensor_names import numbered

_NUMBER = r"(0|[1-9]\d*)"
_NAME = re.compile(rf"(?:(?:model|{NOT_LOADED})-rank|model-pp-{_NUMBER}-tp)-{_NUMBER}-part-{_NUMBER}\.safetensors")


class ShardedState(Format):
    """`model-rank-0-part-0.safetensors`, for one engine's table of names.

    not_held: why tensors of the model are not among those that `_as_engine_has` gives.
    """

    not_held = ""

    def __init__(
        self, engine: str, table: str, no_quantised: str = "", *, has_stages: bool = False, nested: str = ""
    ) -> None:
        self.engine = engine
        self.has_stages = self.has_experts = has_stages
        self.no_quantised = no_quantised
        self.path = Path(__file__).parent / "tables" / table
        self.nested = load_nested(self.path.with_name(nested)) if nested else {}

    @property
    def versions(self) -> dict[str, dict[str, Compared]]:
        """Of each model whose names the table knows: the engine's versions, and how these were compared with them.

        A model may nest a text model, or be one that others nest.
        """
        return versions(self.path, self._known)

    def _known(self, table: Table) -> set[str]:
        within = (text for family in self.nested.values() for text in family.texts)
        return {*table.families, *self.nested, *within}

    @property
    def quantised_types(self) -> frozenset[str]:
        """Those of which quantised modules were compared with what the engine holds."""
        return load_table(self.path).quantised_types

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Every rank's parameters as the engine holds them; UnsupportedError for what it does not load."""
        given = model
        family, model, unheld = self._as_engine_has(given, options.engine_version, options.tp)
        self._require_compared(model, options)
        quantised = load_table(self.path, options.engine_version).quantised
        method = method_of(quantised, model, self.engine)
        placed = placement(model, options.mesh, options.pp_layers)
        dealt = self._deal(family, placed.axes, model, options)
        last, multiplied = counted_last(quantised, family, model), scaled(family, model)
        dropped, beside = self._dropped(family, model), unplaced(quantised, family, model, last) | unheld
        beside |= {f"{name}{SCALED[1:]}" for name in multiplied}
        held = {tensor.name for tensor in model.tensors}
        dropped |= {tensor.name: self.not_held for tensor in given.tensors if tensor.name not in held}
        unloaded, beside = {*dropped, *beside}, beside - dropped.keys()
        tensors = [tensor for tensor in model.tensors if tensor.name not in unloaded]
        reasons: dict[tuple[object, ...], str | None] = {}  # layers are alike
        for tensor in tensors:
            name = model.full_name(tensor.name)
            taken = not model.quantisation or tensor.name in multiplied
            key = numbered(name)[0], tensor.dtype, tensor.shape, tensor.cut, taken
            if key not in reasons:
                own = None if taken else refusal(quantised, family, tensor, name)
                reasons[key] = family.refusal(name) or own
            if reason := reasons[key]:
                raise self._unsupported(f"{self.engine} cannot hold {tensor.name}: {reason}", tensor.name)
        named = self._names(family, model, tensors)
        require_all(family, model.config, named.values())
        shares = self._shares(family, model, tensors, dealt, placed, multiplied)
        if model.quantisation:
            named = {name: engine_name(quantised, family, full_name) for name, full_name in named.items()}
            shares = in_shapes(quantised, family, named, shares, last)
        recipes = {
            into: fused(quantised, named, shares, each)
            for into, each in recipes_of(family, named, last, first_experts(family, model)).items()
        }
        require_whole_blocks(family, model, recipes, shares)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        rows = joined(recipes, shares, shapes, options.tp, _experts_of(model, placed, recipes))
        rows += constants(method, family, model, rows, named.values(), options.tp)
        rows += scales_of(family, named.values(), options.tp)
        rows = [row._replace(name=family.place(row.name)) for row in rows] if family.moved else rows
        rows.sort(key=lambda row: -(DTYPE_BITS[row.kind.dtype] // 8))
        computed = (each.tensors for each in recipes.values() if any(shares[name][0].function for name in each.tensors))
        beside |= set(chain.from_iterable(computed))
        rows += [_not_loaded(tensor, options.tp) for tensor in model.tensors if tensor.name in beside]
        if options.pp == 1:
            return RankLayouts(LayoutRows(rows, options.tp), dealt, dropped, placed if placed.experts else None)
        assert placed.stages is not None
        mesh = options.mesh
        rows = on_stages(rows, family, model, placed.stages, mesh)
        return RankLayouts(LayoutRows(rows, mesh.size), replace(dealt, mesh=mesh), dropped, placed)

    def _require_compared(self, model: Model, options: Options) -> None:
        """UnsupportedError for a mesh of which nobody has compared what the engine then holds of such models."""
        table, model_type = load_table(self.path, options.engine_version), str(model.architecture.get("model_type"))
        what = f"what {self.engine} holds of {model_type}"
        if model.quantisation and table.no_quantised:
            raise self._unsupported(f"{self.engine} {table.version} for quantised models: {table.no_quantised}")
        if options.pp > 1 and model_type not in table.pipelines:
            raise self._unsupported(f"{what} on each stage of a pipeline is not known")
        if options.pp > 1 and (head := head_of(table, model)):
            raise self._unsupported(f"what {self.engine} holds of {head[0]} on each stage of a pipeline is not known")
        if 1 < options.ep < options.tp:
            what = f"{self.engine} has experts whole on each rank of a stage, or all of them cut: its ep is its tp"
            hint = f"use --ep {options.tp} or 1, or --format native"
            raise UnsupportedError(what, expected=f"ep 1 or {options.tp}", found=f"ep {options.ep}", hint=hint)
        if options.ep > 1 and model_type not in table.whole_experts:
            raise self._unsupported(f"{what} where experts are whole is not known")
        if options.ep > 1 and model.quantisation:
            method = str(model.quantisation["method"])
            compared = table.quantised.whole_experts.get(method, ())
            if kinds := ", ".join(kind for kind in model.quantisation["modules"] if kind not in compared):
                what = f"whole experts of a model in {kinds} ({method})"
                raise self._unsupported(f"{what} were not compared with what {self.engine} holds")

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """The engine's files of one rank, and behind them those with what it has no place for."""
        row, limit = split.layout[rank], split.options.max_file_size
        loaded = sum(not stored.name.startswith(f"{NOT_LOADED}.") for stored in row)
        parts = parts_by_size(row[:loaded], limit)
        names = [self.file_name(rank, split.options.mesh, part, 0) for part in range(len(parts))]
        if loaded < len(row):
            beside = parts_by_size(row[loaded:], limit)
            names += [f"{NOT_LOADED}-rank-{rank}-part-{len(parts) + part}.safetensors" for part in range(len(beside))]
            parts += beside
        return tuple(
            output_file(name, tensors, split.metadata(rank, part, len(parts)))
            for part, (name, tensors) in enumerate(zip(names, parts, strict=True))
        )

    def notes(self, split: Split, out: Path | None = None) -> tuple[str, ...]:
        """How the engine is told of stages that it would make otherwise, and of what is left out."""
        table = load_table(self.path, split.options.engine_version)
        return notes_of(self.engine, table, split, text_type(self.nested, split.model))

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """The engine's default patterns; it reads all parts that there are."""
        pp, tp = mesh.coordinate(rank)
        return f"model-{f'pp-{pp}-tp' if mesh.pp > 1 else 'rank'}-{tp}-part-{part}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and part; the width is only in the file's metadata."""
        found = _NAME.fullmatch(name)
        return {"rank": int(found[2]), "part": int(found[3]), "stage": int(found[1] or 0)} if found else None

    def side_files(self, split: Split, small: Mapping[str, Content]) -> dict[str, Content]:
        """config.json says whether the head is tied as the files have it, and which modules are quantised.

        Mistral's params.json in its place says the dtype too, which engines else take from the files of that form.
        """
        files = dict(small)
        file = next((each for each in (CONFIG, META_PARAMS) if each in files), None)
        if file is None:
            return files
        config = given = json.loads(content_of(files[file]))
        version = split.options.engine_version
        _, model, _ = self._as_engine_has(split.model, version)
        if model.tied:
            head, embedding = next(iter(model.tied.items()))
            stored = {model.full_name(tensor.name) for tensor in split.kept.tensors}
            tied = not {f"{head}.weight", f"{embedding}.weight"} <= stored
            text, key = model.architecture.get("text"), "tie_word_embeddings" if file == CONFIG else "tied_embeddings"
            config = with_flag(config, text["config"] if text else None, key, tied)
        config = with_dtype(config, model) if file == META_PARAMS else config
        config = completed(method_of(load_table(self.path, version).quantised, model, self.engine), split.model, config)
        if config != given or split.model.tied:
            files[file] = (json.dumps(config, indent=2) + "\n").encode()
        return files

    def _as_engine_has(self, model: Model, version: str | None, tp: int = 1) -> AsEngineHas:
        """The engine's names of a model. UnsupportedError where they are not known, or where it does not load it."""
        table = table_of(self.path, self.engine, version)
        model_type = str(model.architecture.get("model_type"))
        named = named_as(self.engine, table, model_type, model.config)
        self._require_loaded(table, model_type, named)
        if model.architecture.get("text") or named in self.nested:
            found = self._nested(model, named, table, tp)
        elif named in table.families:
            # A family remembers the names of one model alone.
            found = with_head(self.engine, table, AsEngineHas(replace(table.families[named]), model))
        else:
            what = f"the names that {self.engine} has for model_type {model_type!r} are not known"
            hint = "use --format native; `tpshard archs` lists the types that each engine's format takes"
            raise UnsupportedError(what, hint=_or_version(hint, self.versions.get(model_type, ())))
        require_config(self.engine, model_type, found)
        return found

    def _nested(self, model: Model, named: str, table: Table, tp: int) -> AsEngineHas:
        model_type, text = str(model.architecture["model_type"]), model.architecture.get("text")
        if not text:  # its rules are for all of it, and what its config says beside the towers is of its text
            inside = (*kinds_of(table, model_type, model.config), model_type)[1]
            self._require_loaded(table, inside)
            text = {"model_type": inside, "config": None, "replicated": []}
            model = replace(model, architecture={**model.architecture, "text": text})
        text_type = str(text["model_type"])
        family = self.nested.get(named)
        like = family.texts.get(text_type) if family else None
        if family is None or like is None:
            what = f"the names that {self.engine} has in {model_type} with {text_type} in it, not a text model alone,"
            why = table.refused_models.get(text_type)
            raise self._unsupported(f"{what} are not known" + (f": {why}" if why else ""))
        if model.quantisation:
            self._require_quantised(family.quantised, model)
        found = as_engine_has(family, table.families[like], model, tp)
        for key, reason in family.required.items():
            if not found.model.config.get(key):
                raise self._unsupported(f"{self.engine} does not load {model_type} without {key}: {reason}")
        return found

    def _require_loaded(self, table: Table, *names: str) -> None:
        """UnsupportedError for what the table says that the engine does not load at all."""
        for name in names:
            if reason := table.refused_models.get(name):
                what = f"{self.engine} {table.version} does not load {name} from sharded_state: {reason}"
                raise self._unsupported(what, others=self.versions.get(name, ()))

    def _require_quantised(self, compared: Collection[str], model: Model) -> None:
        """UnsupportedError for a model that nests a text model and is quantised as none was that was compared."""
        model_type, method = model.architecture["model_type"], model.quantisation["method"]
        if method not in compared:
            raise self._unsupported(f"how {self.engine} holds a {model_type} quantised by {method} was not compared")
        for tensor in model.tensors:
            if tensor.dtype not in CASTABLE and not is_text(model, tensor.name):
                what = (
                    f"how {self.engine} holds {tensor.name}, which is quantised and beside the text, was not compared"
                )
                raise self._unsupported(what, tensor.name)

    def _unsupported(self, message: str, tensor: str | None = None, others: Iterable[str] = ()) -> UnsupportedError:
        hint = _or_version(HINT, others)
        return UnsupportedError(message, tensor=tensor, hint=hint)

    def _shares(
        self,
        family: EngineFamily,
        model: Model,
        tensors: Sequence[LogicalTensor],
        dealt: Deal,
        placed: Placement,
        multiplied: Collection[str],
    ) -> dict[str, tuple[Share, ...]]:
        """The ranks' shares; of whole experts all of each, of which `joined` takes the rank's."""
        if placed.experts is None:
            return shares_of(family, model, tensors, dealt, multiplied)
        whole = [tensor for tensor in tensors if placed.of_experts(tensor)]
        alone = self._deal(family, model.axes, model, Options(1))
        found = {name: held * placed.mesh.tp for name, held in shares_of(family, model, whole, alone).items()}
        rest = [each for each in tensors if each.name not in found]
        return found | shares_of(family, model, rest, dealt, multiplied)

    def _deal(self, family: EngineFamily, model_axes: Mapping[str, Axis], model: Model, options: Options) -> Deal:
        """The engine's ranges of the axes, the vocabulary padded as it pads it."""
        single = {
            segment
            for tensor in (model.tensors if family.unrepeated else ())
            if family.kind(model.full_name(tensor.name)).unrepeated
            for segment in tensor.cut.segments
        }
        axes = {}
        for name, axis in model_axes.items():
            padded = -(-axis.count // VOCAB_MULTIPLE) * VOCAB_MULTIPLE if axis.pad else axis.count
            repeated = axis.replicate and name not in single
            repeated = repeated and (axis.count == 1 or name not in family.alone_repeated)
            rest_last = axis.step > 1 and name in family.rest_last
            axes[name] = replace(axis, count=padded, pad=False, replicate=repeated, group=None, rest_last=rest_last)
        return options.even_deal(self.engine, axes)

    def _dropped(self, family: EngineFamily, model: Model) -> dict[str, str]:
        """Tensors that the engine has no place for and needs none for, with the reason."""
        dropped = {}
        heads = () if family.head else tuple(f"{head}.weight" for head in model.tied)
        for tensor in model.tensors:
            if tensor.cut.kind == "buffer" and not family.kind(model.full_name(tensor.name)).kept:
                dropped[tensor.name] = f"a buffer that {self.engine} computes itself"
            elif is_draft(family, model, tensor.name):
                dropped[tensor.name] = DRAFT
            elif model.full_name(tensor.name) in heads:
                dropped[tensor.name] = f"tied: {self.engine} takes the embedding"
        return dropped

    def _names(self, family: EngineFamily, model: Model, tensors: Sequence[LogicalTensor]) -> dict[str, str]:
        """Each tensor's full name, with a tied pair under the name that the engine keeps."""
        names = told_apart(family, {tensor.name: model.full_name(tensor.name) for tensor in tensors})
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
        if family.head and not any(each.startswith(f"{family.head}.") for each in stored):
            if base := [each for each in classes_of(model.config) if each.endswith("Model")]:
                what = "it has no head, and what the engine's classes hold of such models was not compared"
                raise self._unsupported(f"{what}: {base[0]}")
            what = "the checkpoint has no head, and its config does not say that it is tied to the embedding"
            raise CorruptError(what, tensor=head, hint="use --format native, or complete the checkpoint")
        return names


def _or_version(hint: str, others: Iterable[str]) -> str:
    """A hint, and the versions of the engine that would do."""
    return ", or ".join([hint, *(f"--engine-version {each}" for each in others)])


def _experts_of(
    model: Model, placed: Placement, recipes: Mapping[str, ParameterParts]
) -> Mapping[str, Sequence[Range]]:
    """Of the parameters that stack experts, which of them each rank has, where they are whole."""
    if placed.experts is None:
        return {}
    tensors = {tensor.name: tensor for tensor in model.tensors}
    whole = (name for name, recipe in recipes.items() if placed.of_experts(tensors[recipe.tensors[0]]))
    return dict.fromkeys(whole, placed.experts[1])


def is_draft(family: EngineFamily, model: Model, name: str) -> bool:
    """Whether a tensor is of the layers that predict further tokens."""
    name, layers = model.full_name(name), model.config.get(family.extra_layers) if family.extra_layers else None
    if family.kind(name).draft:
        return True
    return isinstance(layers, int) and (layer := family.layer_of(name)) is not None and layer >= layers


def _not_loaded(tensor: LogicalTensor, tp: int) -> Row:
    """A tensor that the engine has no place for, whole in another file of rank 0."""
    stored = whole(tensor)
    kind = RowKind((RankShare(stored, (0,)), *[None] * (tp - 1)))
    return Row(f"{NOT_LOADED}.{tensor.name}", (tensor.name,), kind)
