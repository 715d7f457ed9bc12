"""Megatron's legacy form: `release/mp_rank_00/model_optim_rng.pt`, a state dict for each rank, and the tracker.

It loads at the tensor, pipeline and expert parallel size that it was written for, and no other. A rank numbers layers
from 0 on within its stage, and whole experts within its share of them. Names are those of Transformer Engine's layers,
and of experts one by one. Source: megatron/training/checkpointing.py, and the state dicts of `GPTModel`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tpshard.errors import UnsupportedError, UsageError
from tpshard.formats.base import Format
from tpshard.formats.megatron_args import arguments, pickled
from tpshard.formats.megatron_layout import (
    NO_QUANTISED,
    ONE_EXPERT,
    QKV,
    MegatronLayout,
    MegatronParameter,
    megatron_layout,
    padded_vocab,
    require_no_shares,
)
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.formats.torch_archive import archive_file, pickle_text, require_storage
from tpshard.planning.box import slab
from tpshard.planning.deal import Deal, Range, deal, require_even
from tpshard.planning.join import OutputFile
from tpshard.planning.layout import StoredTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import Placement, placement
from tpshard.planning.window import behind, window
from tpshard.storage.names import MEGATRON_LEGACY, MEGATRON_TRACKER

_FOLDER = "release"
_FILE = re.compile(rf"{_FOLDER}/mp_rank_(\d{{2,}})(?:_(\d{{3,}}))?(?:_(\d{{3,}}))?/{re.escape(MEGATRON_LEGACY)}")
_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_PREDICTOR = "mtp.layers."
_INNER = re.compile(r"(mtp\.layers\.\d+\.)transformer_layer\.")
_EXPERT = re.compile(rf"(.*{re.escape(ONE_EXPERT)})(\d+)(\..*)")
_INNER_NAMES = {"0.16": "transformer_layer", "0.20": "mtp_model_layer"}
"""By version of megatron-core, the module of a layer that predicts a further token which is a layer like the others."""


class MegatronLegacy(Format):
    """`mp_rank_00`: the tensor parallel rank, the stage where there are several, and then that among whole experts."""

    side_names = frozenset({MEGATRON_TRACKER})
    container = True
    has_stages = True
    has_experts = True
    folder = _FOLDER
    no_quantised = NO_QUANTISED

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Stored tensors have the names that they have in the whole model; files number layers and experts anew."""
        require_no_shares(options)
        placed = placement(model, options.mesh, options.pp_layers)
        _require_stages(placed)
        _require_experts(placed)
        layout = megatron_layout(model, padded_vocab(model, options.tp, options.pad_vocab_to), stacked=False)
        _require_version(layout, options)
        within = _of_experts(layout, placed)
        axes = {name: axis for name, axis in layout.axes.items() if name not in within}
        mesh = Mesh(options.tp)
        require_even(axes, mesh, "Megatron divides evenly: use one of those")
        dealt = deal(axes, mesh)
        ranks: list[list[StoredTensor]] = [[] for _ in range(options.mesh.size)]
        shares: dict[tuple[str, int], StoredTensor] = {}
        for name, parameter, stages in _on_stages(layout, model, placed):
            require_storage(name, parameter.stored.dtype)
            expert = _EXPERT.fullmatch(name)
            for rank, row in enumerate(ranks):
                pp, tp = options.mesh.coordinate(rank)
                if pp not in stages:
                    continue
                if expert and placed.experts:
                    if int(expert[2]) in range(*placed.experts[1][options.mesh.place(rank, "ep")]):
                        row.append(parameter.stored._replace(name=name))
                    continue
                key = parameter.name, tp
                if key not in shares:
                    shares[key] = _share(parameter, dealt, tp, options.tp)
                row.append(shares[key]._replace(name=name))
        mesh = options.mesh
        held = placed if mesh.pp > 1 or mesh.ep > 1 else None
        return RankLayouts(tuple(map(tuple, ranks)), replace(dealt, mesh=mesh), layout.dropped, held)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """As Megatron names them; what there is one of is left out."""
        pp, tp = mesh.coordinate(rank)
        stage = f"_{pp:03}" if mesh.pp > 1 else ""
        expert = f"_{mesh.place(rank, 'ep'):03}" if mesh.ep > 1 else ""
        return f"{_FOLDER}/mp_rank_{tp:02}{stage}{expert}/{MEGATRON_LEGACY}"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """The rank; whether a second number is the stage or that among experts, the name does not say."""
        found = _FILE.fullmatch(name)
        return {"rank": int(found[1])} if found else None

    def place(self, name: str, mesh: Mesh) -> Mapping[str, int] | None:
        """Rank and stage. A name that is none of this mesh's is of a rank that it does not have."""
        if (found := _FILE.fullmatch(name)) is None:
            return None
        names = {self.file_name(rank, mesh, 0, 1): rank for rank in range(mesh.size)}
        stage, rank = mesh.coordinate(names.get(name, mesh.size + int(found[1])))
        return {"rank": rank, "stage": stage}

    def notes(self, split: Split, out: Path | None = None) -> tuple[str, ...]:
        """What Megatron must be told to make the ranks that the files are of, where nobody would guess it."""
        mesh, stages, said = split.options.mesh, split.layouts.stages, list[str]()
        if stages and (uneven := _uneven([last - first for first, last in stages.ranges])):
            said += [f"--{key.replace('_', '-')} {value}" for key, value in uneven.items()]
        if mesh.ep > 1:
            said.append(f"--expert-model-parallel-size {mesh.ep} --expert-tensor-parallel-size 1")
        return (f"Megatron has to be started with {' '.join(said)}",) if said else ()

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """One archive a rank, whatever its size."""
        mesh, row = split.options.mesh, split.layout[rank]
        names = {stored.name for held in split.layout for stored in held}
        if _is_tied_copy(split):
            names.discard(_HEAD)
        vocab = next(stored for stored in split.layout[0] if stored.name == _EMBEDDING).shape[0] * mesh.tp
        args = arguments(split.model, names, vocab, mesh, **_mesh_arguments(split))
        around = b"}(" + pickled(args) + pickle_text("model"), b"u"
        name = self.file_name(rank, mesh, 0, 1)
        return (archive_file(name, row, [_local(stored.name, split, rank) for stored in row], around),)

    def derived(self, split: Split) -> dict[str, bytes]:
        """The tracker."""
        return {MEGATRON_TRACKER: f"{_FOLDER}\n".encode()}


def _require_stages(placed: Placement) -> None:
    """UnsupportedError for stages that Megatron does not make: all alike, but the first and the last as one likes."""
    if placed.stages is None:
        return
    sizes = [last - first for first, last in placed.stages.ranges]
    if len(set(sizes[1:-1])) > 1:
        hint = "use --format megatron, which loads at any stages"
        what = "Megatron has as many layers on all stages between the first and the last one"
        raise UnsupportedError(what, found=f"stages of {', '.join(map(str, sizes))} layers", hint=hint)


def _uneven(sizes: Sequence[int]) -> dict[str, int]:
    """Megatron's arguments for the first and the last stage, where they do not have as many layers as the others."""
    if len(set(sizes)) == 1:
        return {}
    return {"decoder_first_pipeline_num_layers": sizes[0], "decoder_last_pipeline_num_layers": sizes[-1]}


def _require_experts(placed: Placement) -> None:
    """UnsupportedError where ranks would have unlike numbers of experts."""
    if placed.experts and len({last - first for first, last in placed.experts[1]}) > 1:
        count = placed.experts[0].count
        what = f"{count} experts on {placed.mesh.ep} ranks: Megatron gives all of them as many"
        raise UnsupportedError(what, expected=f"an ep that divides {count}", found=f"ep {placed.mesh.ep}")


def _require_version(layout: MegatronLayout, options: Options) -> None:
    """UsageError where the version decides a name and nobody says it, UnsupportedError for one that is not known."""
    if options.engine_version is None:
        if any(each.name.startswith(_PREDICTOR) for each in layout.parameters):
            what = "a module of layers that predict further tokens has another name in newer versions of megatron-core"
            raise UsageError(
                what,
                expected=" or ".join(_INNER_NAMES),
                hint="say which with --engine-version; 0.16 stands for older ones",
            )
    elif options.engine_version not in _INNER_NAMES:
        what = f"the names of megatron-core {options.engine_version} are not known"
        hint = "0.16 stands for it and older ones, 0.20 for those after it"
        raise UnsupportedError(what, expected=", ".join(_INNER_NAMES), found=options.engine_version, hint=hint)


def _of_experts(layout: MegatronLayout, placed: Placement) -> set[str]:
    """The axes that whole experts alone have."""
    if placed.experts is None:
        return set()
    within = {each.axis for p in layout.parameters if ONE_EXPERT in p.name for each in p.divided}
    return within - {each.axis for p in layout.parameters if ONE_EXPERT not in p.name for each in p.divided}


def _on_stages(
    layout: MegatronLayout, model: Model, placed: Placement
) -> Iterator[tuple[str, MegatronParameter, tuple[int, ...]]]:
    """Every parameter with the stages that hold it; those that the last one has a copy of under the copy's name too."""
    last = placed.mesh.pp - 1
    tied = not any(each.name == _HEAD for each in layout.parameters)
    predicts = any(each.name.startswith(_PREDICTOR) for each in layout.parameters)
    for parameter in layout.parameters:
        name = parameter.name
        if placed.stages is None:
            yield name, parameter, (0,)
        elif (layer := parameter.layer) is not None:
            yield name, parameter, placed.stages.of_layer(layer)
        elif name == _EMBEDDING:
            yield name, parameter, (0, last) if predicts else (0,)
            if tied:
                yield _HEAD, parameter, (last,)
        else:
            yield name, parameter, (0,) if name.startswith("embedding.") else (last,)


def _share(parameter: MegatronParameter, dealt: Deal, rank: int, tp: int) -> StoredTensor:
    """What a rank of a stage has of a parameter: of each stretch its part, one behind the other."""
    stored = parameter.stored
    if not parameter.divided:
        return stored
    parts = []
    for each in parameter.divided:
        first, last = dealt.of(each.axis, rank)
        begin, end = each.begin + first * each.unit, each.begin + last * each.unit
        if QKV in parameter.name and dealt.axes[each.axis].count < tp:
            begin, end = _even_rows(parameter, rank, tp)
        box = slab(stored.shape, each.dim, begin, end)
        parts.append(window(stored, box))
    return behind(parts, parameter.divided[0].dim)


def _even_rows(parameter: MegatronParameter, rank: int, tp: int) -> Range:
    """A rank's rows where there are fewer KV groups than ranks: the rows are cut evenly, wherever heads end."""
    rows = parameter.stored.shape[0]
    if rows % tp:
        what = f"{parameter.name}: {rows} rows cannot be divided evenly"
        raise UnsupportedError(what, tensor=parameter.name, expected=f"a tp that divides {rows}", found=f"tp {tp}")
    return rows // tp * rank, rows // tp * (rank + 1)


def _is_tied_copy(split: Split) -> bool:
    """Whether the head that a stage has is the embedding once more."""
    named: dict[str, str] = {}
    for held in split.layout:
        named |= {each.name: each.parts[0].tensor for each in held if each.name in (_EMBEDDING, _HEAD) and each.parts}
    return named.get(_EMBEDDING) == named.get(_HEAD)


def _mesh_arguments(split: Split) -> dict[str, int | str | bool]:
    """What the arguments say of the form and of the ranks."""
    mesh, stages = split.options.mesh, split.layouts.stages
    said: dict[str, int | str | bool] = {"ckpt_format": "torch", "expert_model_parallel_size": mesh.ep}
    if split.model.experts is not None:
        said |= {"expert_tensor_parallel_size": mesh.tp // mesh.ep, "moe_grouped_gemm": False}
    return said | (_uneven([last - first for first, last in stages.ranges]) if stages else {})


def _local(name: str, split: Split, rank: int) -> str:
    """A parameter's name in a rank's state dict."""
    mesh, stages = split.options.mesh, split.layouts.stages
    pp, _ = mesh.coordinate(rank)
    if stages and (found := _LAYER.match(name)):
        name = f"decoder.layers.{int(found[1]) - stages.ranges[pp][0]}.{name[found.end() :]}"
    placed = split.layouts.placement
    if placed and placed.experts and (found := _EXPERT.fullmatch(name)):
        name = f"{found[1]}{int(found[2]) - placed.experts[1][mesh.place(rank, 'ep')][0]}{found[3]}"
    if split.options.engine_version is not None:
        name = _INNER.sub(rf"\1{_INNER_NAMES[split.options.engine_version]}.", name)
    return name


FORMAT = MegatronLegacy()
"""The form of `--ckpt-format torch`."""
