"""Megatron-core's `torch_dist` checkpoints as input, seen as a set of one rank that holds everything.

Nothing is inverted but names: the tensors that Megatron's are made of are listed with their shapes, classified by the
same rules as a checkpoint's, laid out as if they were to be written, and the files must be just that. Optimizers and
random states are not looked at. Nothing of Megatron is imported, and nothing that a pickle names is run.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.formats import format_of
from tpshard.formats.megatron_layout import MegatronLayout, MegatronParameter, family_of, megatron_layout
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.inputs.checkpoint import Checkpoint, read_config
from tpshard.inputs.megatron_config import MAKE_CONFIG, config_of, require_gpt
from tpshard.inputs.megatron_names import Sources, behind_own, is_stacked, layer_of, names_of, of_layer
from tpshard.inputs.model import from_checkpoint
from tpshard.inputs.shard_set import ShardSet
from tpshard.planning.box import Box, Shape
from tpshard.planning.join import parts_by_size
from tpshard.planning.layout import StoredTensor
from tpshard.planning.model import Model
from tpshard.planning.window import stack, window
from tpshard.storage.distcp import DcpChunk, DcpListing, DcpTensor, read_listing
from tpshard.storage.local import load_json, read_bytes, safe_path
from tpshard.storage.names import CONFIG, MEGATRON_COMMON, MEGATRON_METADATA, MEGATRON_TRACKER, is_legacy, side_files
from tpshard.storage.pickles import MEGATRON, Archive, Built
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.source import RankFile

_IGNORED = re.compile(r"optimizer\.|chained_\d+\.|(.*\.)?rng_state|.*\._extra_state(/|$)|rerun_state|common_state")
"""Beginnings of what is no tensor of the model."""
_MAX_FILE_SIZE = 5_000_000_000


@dataclass(frozen=True)
class _Iteration:
    """One iteration: its directory, what its files hold, and the arguments that it was trained with."""

    directory: Path
    found: Mapping[str, DcpTensor]
    args: Mapping[str, Any]


def open_megatron(directory: Path, vocab_size: int | None = None) -> ShardSet:
    """Open a directory of iterations, of which the tracker's counts, or the directory of one.

    vocab_size: the true size of the vocabulary, where no config.json beside says it.
    """
    iteration = _iteration(directory)
    opened = _open(iteration)
    require_gpt(opened.args, iteration)
    config, made = _config(directory, opened, vocab_size)
    model = _model(directory, config, opened)
    layout = megatron_layout(model, opened.found["embedding.word_embeddings.weight"].shape[0])
    stored = tuple(_placed(layout, model, opened))
    infos = {chunk.info.name: chunk.info for each in opened.found.values() for chunk in each.chunks}
    by_file: dict[str, list[TensorInfo]] = {}
    for each in stored:
        by_file.setdefault(infos[each.name].file, []).append(infos[each.name])
    files = tuple(RankFile(Path(file), Path(file).stat().st_size, tuple(held)) for file, held in by_file.items())
    split = Split(model, Options(1, format="megatron"), format_of("megatron"), RankLayouts((stored,), None))
    sizes = [{"file": str(file.path.relative_to(directory)), "size": file.size, "sha256": None} for file in files]
    beside = {
        name: safe_path(place, name)
        for place in dict.fromkeys((iteration, directory))
        for name in side_files(entry.name for entry in place.iterdir() if entry.is_file())
    }
    if made:
        beside.pop(CONFIG, None)
    manifest = {"set": split.set_id}
    return ShardSet(directory, manifest, split, {0: files}, {0: {"parts": sizes}}, beside, (), made)


def _iteration(directory: Path) -> Path:
    """The directory of the iteration that the tracker names, or the directory itself where there is no tracker."""
    tracker = directory / MEGATRON_TRACKER
    if not tracker.is_file():
        return directory
    text = read_bytes(tracker).decode("utf-8", "replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise CorruptError("not the number of an iteration", path=tracker, expected="a number, or release", found=text)
    name = "release" if text == "release" else f"iter_{int(text):07}"
    if not (directory / name).is_dir():
        there = sorted(e.name for e in directory.iterdir() if re.fullmatch(r"iter_\d{7,}|release", e.name))
        what = "the iteration that the tracker names is not there"
        hint = "copy it again from where it comes from" if not there else f"or give {directory / there[-1]} itself"
        hint = hint if not there else f"copy it again from where it comes from, {hint}"
        raise CorruptError(what, path=tracker, expected=name, found=", ".join(there) or "no iteration", hint=hint)
    return directory / name


def _open(iteration: Path) -> _Iteration:
    """Read an iteration's metadata and arguments, and where its tensors lie."""
    found: Mapping[str, DcpTensor]
    if is_legacy(iteration):
        from tpshard.inputs.megatron_legacy import open_legacy

        found, args = open_legacy(iteration, MEGATRON)
    else:
        found, args = _open_distributed(iteration)
    if "embedding.word_embeddings.weight" not in found:
        hint = "a GPTModel of Megatron is read here"
        what = "the checkpoint has no embedding of a language model"
        raise UnsupportedError(
            what, path=iteration, expected="embedding.word_embeddings.weight", found=_first(found), hint=hint
        )
    for name, each in found.items():
        if is_stacked(name) and not each.shape:
            raise CorruptError(f"{name} has no dim of layers", path=iteration, tensor=name, found=each.shape)
    return _Iteration(iteration, found, args)


def _open_distributed(iteration: Path) -> tuple[Mapping[str, DcpTensor], Mapping[str, Any]]:
    """Tensors and arguments of a torch_dist checkpoint."""
    path = iteration / MEGATRON_METADATA
    said = load_json(read_bytes(safe_path(iteration, MEGATRON_METADATA)), path) if path.is_file() else {}
    backend = said.get("sharded_backend") if isinstance(said, dict) else None
    if backend != "torch_dist":
        hint = "save it with --ckpt-format torch_dist"
        what = "this is a checkpoint of Megatron in another form"
        raise UnsupportedError(what, path=path, expected="torch_dist", found=backend or "no sharded_backend", hint=hint)
    listing = read_listing(iteration)
    found = listing.described(lambda name: not _IGNORED.match(name))
    return found, _arguments(iteration, listing)


def _first(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:3]) or "no tensor"


def _arguments(iteration: Path, listing: DcpListing) -> Mapping[str, Any]:
    """Megatron's arguments, from common.pt, or from among the objects where newer versions have it; maybe none."""
    path = iteration / MEGATRON_COMMON
    if path.is_file():
        archive = Archive(safe_path(iteration, MEGATRON_COMMON))
    elif "common_state/shard_0_1" in listing.objects:
        archive = listing.archive(listing.objects["common_state/shard_0_1"])
    else:
        return {}
    common = archive.load(MEGATRON)
    args = common.get("args") if isinstance(common, (dict, Built)) else None
    return args.fields if isinstance(args, Built) else args if isinstance(args, dict) else {}


def _config(directory: Path, opened: _Iteration, vocab_size: int | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The model's config, with the true size of the vocabulary, and config.json where it is not the one beside."""
    padded = opened.found["embedding.word_embeddings.weight"].shape[0]
    place = next((p for p in (opened.directory, directory) if (p / CONFIG).is_file()), None)
    if place is not None:
        config = read_config(read_bytes(safe_path(place, CONFIG)), place / CONFIG)
        given = dict(config)
    else:
        dtype = opened.found["embedding.word_embeddings.weight"].dtype
        tied = "output_layer.weight" not in opened.found
        try:
            config, given = config_of(opened.args, dtype, tied, opened.directory), {}
        except (TypeError, ValueError) as error:
            what = "the arguments in the checkpoint are not those of a model"
            raise CorruptError(what, path=opened.directory, found=str(error)[:200], hint=MAKE_CONFIG) from None
    if vocab_size is not None:
        config["vocab_size"] = vocab_size
    if (vocab := config.get("vocab_size")) is None:
        what = f"the vocabulary is padded to {padded} rows, and nothing states its true size"
        hint = f"give it to `tpshard merge` with --vocab-size, or {MAKE_CONFIG}"
        raise UsageError(what, path=opened.directory, expected="--vocab-size, or config.json", hint=hint)
    if type(vocab) is not int or not 0 < vocab <= padded:
        what = "the vocabulary is larger than the embedding"
        raise CorruptError(what, path=opened.directory, expected=f"1 to {padded}", found=vocab)
    return config, {} if config == given else {CONFIG: (json.dumps(config, indent=2) + "\n").encode()}


def _model(directory: Path, config: Mapping[str, Any], opened: _Iteration) -> Model:
    """The model whose tensors Megatron's are made of, classified by the rules of its family."""
    family = family_of(config.get("model_type"))
    sources = Sources(family, config, opened.directory)
    infos = [info for single in _single(opened.found, config) for info in sources.of(*single)]
    groups = parts_by_size([StoredTensor(i.name, i.dtype, i.shape, ()) for i in infos], _MAX_FILE_SIZE)
    file_of = {each.name: f"model-{part:05}" for part, group in enumerate(groups) for each in group}
    named = Path(directory).resolve()
    checkpoint = Checkpoint(
        name=named.parent.name if named.name == "release" else named.name,
        repo_id=None,
        revision=None,
        directory=None,
        config=config,
        config_path=str(directory / CONFIG),
        files=(),
        tensors=tuple(sorted(infos, key=lambda info: (file_of[info.name], info.name))),  # as safetensors sorts them
        file_of=file_of,
        side_files={},
    )
    return from_checkpoint(checkpoint)


def _single(found: Mapping[str, DcpTensor], config: Mapping[str, Any]) -> Iterator[tuple[str, str, Shape]]:
    """Every parameter of every layer: the name that it has with its layer's number, dtype and shape."""
    singles = []
    for name, each in found.items():
        if is_stacked(name):
            singles += [(of_layer(name, layer), each.dtype, each.shape[1:]) for layer in range(each.shape[0])]
        else:
            singles.append((name, each.dtype, each.shape))
    layers = config.get("num_hidden_layers")
    yield from sorted(singles, key=lambda single: _position(behind_own(single[0], layers)))


def _position(name: str) -> tuple[int, int]:
    """Where a parameter stands in an ordinary checkpoint: embedding, layers, the rest."""
    layer = layer_of(name)
    return (0 if name.startswith("embedding.") else 2, 0) if layer is None else (1, layer)


def _placed(layout: MegatronLayout, model: Model, opened: _Iteration) -> Iterator[StoredTensor]:
    """What each rectangle in the files is. CorruptError where a tensor is not of the shape that it must have."""
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    parameters = {name: parameter for parameter in layout.parameters for name in names_of(parameter.name)}
    parameters |= {parameter.name: parameter for parameter in layout.parameters}
    for name, each in opened.found.items():
        if is_stacked(name):
            of_layers = [parameters[of_layer(name, layer)] for layer in range(each.shape[0])]
            for parameter in of_layers:
                _require_shape(name, each.shape[1:], parameter, opened)
            for chunk in each.chunks:
                (first, end), *box = _box(chunk)
                held = [window(parameter.stored, tuple(box)) for parameter in of_layers[first:end]]
                yield stack(chunk.info.name, held, shapes)
        else:
            _require_shape(name, each.shape, parameters[name], opened)
            for chunk in each.chunks:
                yield window(parameters[name].stored, _box(chunk))._replace(name=chunk.info.name)


def _box(chunk: DcpChunk) -> Box:
    return tuple((at, at + size) for at, size in zip(chunk.at, chunk.info.shape, strict=True))


def _require_shape(name: str, shape: Shape, parameter: MegatronParameter, opened: _Iteration) -> None:
    if shape != parameter.stored.shape:
        what = f"{name} does not have the shape that it has in the model that the config describes"
        expected, found = list(parameter.stored.shape), list(shape)
        raise CorruptError(what, path=opened.directory, tensor=name, expected=expected, found=found)
