"""`archs`: the built-in architectures, and rules to start from for others."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpshard.errors import TargetError, UnsupportedError, UsageError
from tpshard.formats import FORMATS, format_of
from tpshard.formats.engine_versions import Compared
from tpshard.formats.megatron_layout import families
from tpshard.formats.sharded_state import ShardedState
from tpshard.formats.vllm_speculator import DraftState
from tpshard.inputs.checkpoint import open_headers
from tpshard.rules.architecture import all_builtin, builtin
from tpshard.rules.draft.render import Draft, decoder_tensors, make
from tpshard.rules.multimodal import text_config
from tpshard.rules.quantisation.recognise import recognise
from tpshard.verifier.model_types import ProvedBy, proved_by

rules_of = builtin
"""A built-in architecture by its name or a model_type; UnsupportedError when there is none."""


def model_types() -> dict[str, tuple[str, ...]]:
    """The built-in architectures by name, with the model_types that each is for."""
    return {architecture.name: architecture.model_types for architecture in all_builtin()}


@dataclass(frozen=True)
class Version:
    """A version whose names an engine's format knows, and how they were compared: its classes were run, or read."""

    engine: str
    version: str
    compared: Compared


@dataclass(frozen=True)
class Supported:
    """What is done for a model_type that has rules.

    verify: whose code runs it, "tpshard" or "transformers"; "bytes" where nobody's does and files are compared.
    engines: the formats for engines that know its names. quantised: those of them of which quantised modules were
    compared with what the engine holds. In `native` every architecture may be quantised. versions: those of engines.
    """

    model_type: str
    verify: ProvedBy
    engines: tuple[str, ...]
    quantised: tuple[str, ...]
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Nesting:
    """A model_type of which an engine's format knows the towers.

    texts: model_types of the text models in it. quantised: by which methods these may be.
    """

    model_type: str
    texts: tuple[str, ...]
    engines: tuple[str, ...]
    quantised: tuple[str, ...]
    versions: tuple[Version, ...]


def supported() -> dict[str, list[Supported]]:
    """What is done for each model_type, by the name of its architecture."""
    known = _engines()
    named = {name: each.versions for name, each in known.items()} | {"megatron": dict.fromkeys(families(), {})}
    compared = {name: each.quantised_types for name, each in known.items()}

    def of(model_type: str) -> Supported:
        engines = tuple(name for name, types in named.items() if model_type in types)
        quantised = tuple(name for name, types in compared.items() if model_type in types)
        versions = (each for name in engines for each in _versions(name, named[name][model_type]))
        return Supported(model_type, proved_by(model_type), engines, quantised, tuple(versions))

    return {name: list(map(of, types)) for name, types in model_types().items()}


def nesting() -> list[Nesting]:
    """The models with a tower that engines' formats hold; `native` splits whatever nests a text model with rules."""
    return [
        Nesting(
            model_type, tuple(family.texts), (name,), family.quantised, tuple(_versions(name, versions[model_type]))
        )
        for name, each in _engines().items()
        if not isinstance(each, DraftState)
        for versions in (each.versions,)
        for model_type, family in sorted(each.nested.items())
    ]


def _versions(engine: str, compared: Mapping[str, Compared]) -> Iterator[Version]:
    for version, how in compared.items():
        yield Version(engine, version, how)


def _engines() -> dict[str, ShardedState]:
    formats = {name: format_of(name) for name in FORMATS}
    return {name: each for name, each in formats.items() if isinstance(each, ShardedState)}


def versions_text(versions: Iterable[Version]) -> str:
    """Engines' versions for people: the first engine's, and others' where they differ; none is ""."""
    texts: dict[str, str] = {}
    for each in versions:
        read = " read" if each.compared == "read" else ""
        texts[each.engine] = f"{texts.get(each.engine, '')} {each.version}{read}"
    first = next(iter(texts.values()), "")
    return ", ".join([first.strip(), *(f"{name}{text}" for name, text in texts.items() if text != first)])


def rows() -> Iterator[tuple[str, str, tuple[str, ...], str, tuple[str, ...], list[str]]]:
    """Name of the architecture, verify, engines, versions, quantised, and those of its model_types that are alike."""
    for name, types in supported().items():
        alike: dict[tuple[str, tuple[str, ...], str, tuple[str, ...]], list[str]] = {}
        for each in types:
            key = str(each.verify), each.engines, versions_text(each.versions), each.quantised
            alike.setdefault(key, []).append(each.model_type)
        for same, those in alike.items():
            yield name, *same, those


def draft(
    model: str | Path, revision: str | None = None, *, allow_pickle: bool = False, follow_symlinks: bool = False
) -> Draft:
    """Draft rules for a model whose model_type has none. Of a Hub repo only config and headers are read."""
    checkpoint = open_headers(model, revision, allow_pickle=allow_pickle, follow_symlinks=follow_symlinks)
    if recognise(checkpoint.quantisation, checkpoint.tensors, checkpoint.config_path).companions:
        what, hint = "rules are drafted from plain weights", "give the checkpoint that this one was made from"
        raise UnsupportedError(what, path=checkpoint.config_path, found="quantised modules", hint=hint)
    architectures = all_builtin()
    outer = checkpoint.config.get("model_type")
    text = text_config(checkpoint.config)
    nested = text is not None and text.key is not None
    for model_type in (outer, text.model_type if text and nested else None):
        if name := next((a.name for a in architectures if model_type in a.model_types), None):
            message = f"there are rules for model_type {model_type!r} already"
            hint = f"`tpshard archs show {name}` prints them"
            raise UsageError(message, path=checkpoint.config_path, hint=hint)
    if not isinstance(outer, str) and not nested:
        raise UnsupportedError("config.json names no model_type", path=checkpoint.config_path, hint="give it one")
    if text is None or not nested:
        return make(checkpoint.config, checkpoint.tensors, architectures)
    config = {**text.config, "model_type": text.model_type}
    return make(config, decoder_tensors(text.config, checkpoint.tensors), architectures)


def save(made: Draft, path: Path) -> None:
    """Write a draft to a new file; what is there already, edited perhaps, is never replaced."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(made.text)
    except FileExistsError:
        raise TargetError("the file exists", path=path, hint="give another one with -o, or remove it first") from None
