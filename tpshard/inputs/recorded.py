"""The planned split that a manifest records: model, options, and what each rank stores."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError, UsageError
from tpshard.formats import FORMATS, format_of
from tpshard.formats.manifest import cut_from_json, stored_from_json
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.planning.axes import Axis
from tpshard.planning.experts import Experts
from tpshard.planning.layout import LogicalTensor, StoredTensor, whole
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.planning.placement import Placement, placement
from tpshard.planning.sound import why_unsound
from tpshard.planning.stages import Layers
from tpshard.storage.local import load_json, read_bytes
from tpshard.storage.names import MANIFEST
from tpshard.units import MAX_TP

SAME = "copy it from where the rank files come from: it is the same on every host"


def parse(manifest: Mapping[str, Any], raw: bytes, directory: Path) -> Split:
    """The split. KeyError, TypeError, ValueError, IndexError or AttributeError for what no manifest of ours says."""
    mesh, chosen = _mesh(manifest["mesh"]), manifest["options"]
    if (format := chosen["format"]) not in FORMATS:
        what, hint = "the set is of a format that is not known", f"upgrade tpshard, or {SAME}"
        raise CorruptError(what, path=directory / MANIFEST, expected=", ".join(FORMATS), found=format, hint=hint)
    options = Options(
        tp=mesh.tp,
        uneven=chosen["uneven"],
        shares=None if chosen["shares"] is None else tuple(chosen["shares"]),
        pad_vocab_to=chosen["pad_vocab_to"],
        max_file_size=chosen["max_file_size"],
        format=format,
        engine_version=chosen["engine_version"],
        pp=mesh.pp,
        pp_layers=tuple(chosen["pp_layers"]) if "pp_layers" in chosen else None,
        ep=mesh.ep,
    )
    entries = manifest["tensors"]
    tensors = tuple(LogicalTensor(e["name"], e["dtype"], tuple(e["shape"]), cut_from_json(e)) for e in entries)
    dropped = {entry["name"]: entry["dropped"] for entry in entries if "dropped" in entry}
    model = Model(
        tensors=tensors,
        axes={name: Axis(**axis) for name, axis in manifest["axes"].items()},
        tied=manifest["tied"],
        file_of={entry["name"]: entry["file"] for entry in entries},
        source=manifest["source"],
        architecture=manifest["architecture"],
        dtype=chosen["dtype"],
        cast_all=chosen.get("cast_all", True),  # before there was a choice, everything was cast
        full_names={entry["name"]: entry["full"] for entry in entries if "full" in entry},
        config=_config(directory),
        quantisation=manifest.get("quantisation", {}),
        layers=_layers(manifest.get("layers")),
        experts=_experts(manifest.get("experts")),
        notes=tuple(_not_in_it(tensors, dropped)),
    )
    placed = _placement(manifest, model, options)
    layout = tuple(tuple(_stored(manifest, tensors, mesh, rank)) for rank in range(mesh.size))
    if reason := why_unsound(tensors, layout):
        raise ValueError(reason)
    layouts = RankLayouts(layout, None, dropped, placed)
    return Split(model, options, format_of(options.format), layouts, (manifest["set"], raw))


def _not_in_it(tensors: Sequence[LogicalTensor], dropped: Mapping[str, str]) -> Iterator[str]:
    """What weights of the model that was split are not in the set, by reason."""
    by_reason: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.name in dropped and tensor.cut.kind != "buffer":
            by_reason.setdefault(dropped[tensor.name], []).append(tensor.name)
    for reason, names in by_reason.items():
        yield f"{len(names)} tensors of the model are not in this set, nor in what is made of it: {names[0]} ({reason})"


def _mesh(said: Mapping[str, Any]) -> Mesh:
    if not all(type(size) is int for size in said.values()) or said["tp"] * said["pp"] > MAX_TP:
        raise ValueError(f"mesh {said}")
    found = Mesh(said["tp"], said["pp"], said["ep"])
    if asdict(found) != said:
        raise ValueError(f"mesh {said}")
    return found


def _texts(said: Any) -> tuple[str, ...]:
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        raise ValueError(f"texts {said!r:.100}")
    return tuple(said)


def _layers(said: Any) -> Layers | None:
    """Where the tensors stand in a pipeline; None of a set that was made before there were any."""
    if said is None:
        return None
    if type(said["count"]) is not int or not isinstance(said["within"], str):
        raise ValueError("layers")
    return Layers(said["within"], said["count"], _texts(said["before"]))


def _experts(said: Any) -> Experts | None:
    """The routed experts of the model; None of a model without, or of a set that was made before they were said."""
    if said is None:
        return None
    if type(said["count"]) is not int or said["count"] < 1:
        raise ValueError("experts")
    return Experts(said["count"], _texts(said["within"]), _texts(said["stacked"]))


def _placement(manifest: Mapping[str, Any], model: Model, options: Options) -> Placement | None:
    """Which ranks have what, as the options say it; ValueError where the manifest says otherwise."""
    if options.mesh.pp == options.mesh.ep == 1:
        return None
    try:
        found = placement(model, options.mesh, options.pp_layers)
    except (UnsupportedError, UsageError) as error:  # nobody could have written it
        raise ValueError(str(error)) from None
    if (said := {key: manifest[key] for key in ("stages", "expert_ranges") if key in manifest}) != found.ranges:
        raise ValueError(f"{said}")
    if found.stages is not None:
        for entry in manifest["tensors"]:
            if entry["stages"] != list(found.stages.of(entry["name"], model.full_name(entry["name"]))):
                raise ValueError(f"{entry['name']} on stages {entry['stages']}")
    return found


def _stored(
    manifest: Mapping[str, Any], tensors: Sequence[LogicalTensor], mesh: Mesh, rank: int
) -> Iterator[StoredTensor]:
    """What a rank stores: shares of the model's own tensors, or the tensors that the manifest lists beside those."""
    stage, place = mesh.coordinate(rank)
    if "stored" not in manifest:
        for tensor, entry in zip(tensors, manifest["tensors"], strict=True):
            if mesh.pp > 1 and stage not in entry["stages"]:
                continue
            if (held := entry.get("ranks")) is None:
                yield whole(tensor)
            elif held[place] is not None:
                yield stored_from_json(tensor.name, tensor.dtype, held[place], tensor.name)
    for entry in manifest.get("stored", ()):
        if (held := entry["every"] if "every" in entry else entry["ranks"][rank]) is not None:
            yield stored_from_json(entry["name"], entry["dtype"], held)


def _config(directory: Path) -> Mapping[str, Any]:
    """The config beside the ranks' files; only formats that need more than the manifest look at it."""
    path = directory / "config.json"
    config = load_json(read_bytes(path), path) if path.is_file() else {}
    return config if isinstance(config, dict) else {}
