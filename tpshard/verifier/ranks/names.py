"""Which files of a directory are ranks, told by their names; torch is not needed.

No weights are opened here: of a set its manifest's word for the format is read, of Megatron's the tracker.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.storage.local import read_bytes
from tpshard.storage.names import MANIFEST, MEGATRON_TRACKER, is_legacy, is_megatron

_NAMES = {
    "native": re.compile(
        r"rank-(?P<rank>\d{5})-of-(?P<tp>\d{5})(?:-stage-(?P<stage>\d{5})-of-(?P<pp>\d{5}))?"
        r"(?:-part-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.safetensors"
    ),
    "vllm": re.compile(
        r"model-(?:pp-(?P<stage>\d{1,5})-tp|rank)-(?P<rank>\d{1,5})-part-(?P<part>\d{1,5})\.safetensors"
    ),
    "meta": re.compile(r"consolidated\.(?P<rank>\d\d)\.pth"),
    "deepseek": re.compile(r"model(?P<rank>\d{1,5})-mp(?P<tp>\d{1,5})\.safetensors"),
    "dcp": re.compile(r"__(?P<rank>\d{1,5})_(?P<part>\d{1,5})\.distcp"),
    "dcp-hf": re.compile(r"shard-(?P<rank>\d{5})-model-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors"),
}


@dataclass(frozen=True)
class RankFiles:
    """The files of a set: what names them, how many ranks a stage has, and each rank's files in order, by stage."""

    format: str
    tp: int
    ranks: Mapping[int, tuple[tuple[str, ...], ...]]


def _numbered(directory: Path) -> Iterator[tuple[str, dict[str, int], str]]:
    """The ranks' files in order: each one's format, the numbers in its name (ranks and parts from 0 on), its name."""
    for path in sorted(directory.iterdir()):
        for kind, pattern in _NAMES.items():
            if match := pattern.fullmatch(path.name):
                said = {key: int(value) for key, value in match.groupdict().items() if value is not None}
                first = {"rank": 1, "part": 1} if kind == "dcp-hf" else {}
                yield kind, {key: n - first.get(key, 0) for key, n in said.items()}, path.name


def _is_draft(directory: Path) -> bool:
    """Whether a set says of itself that it is a draft model's. What it says wrongly is never a pass."""
    try:
        return bool(json.loads((directory / MANIFEST).read_bytes())["options"]["format"] == "vllm-speculator")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def rank_files(directory: Path) -> RankFiles:
    """The ranks' files; CorruptError where some are missing, or are of several widths or formats.

    UnsupportedError of a draft model, which nothing here runs.
    """
    if _is_draft(directory):
        what, hint = "verify runs no draft model", "`tpshard check --source` compares every byte with the model"
        raise UnsupportedError(what, path=directory, expected="a set of the model", hint=hint)
    files = list(_numbered(directory))
    kinds = sorted({kind for kind, *_ in files})
    if not files:
        expected, hint = "rank-00000-of-….safetensors, or an engine's", "make them with `tpshard split`"
        raise CorruptError("no rank files here", path=directory, expected=expected, hint=hint)
    if len(kinds) > 1:
        raise CorruptError("rank files of several formats", path=directory, found=", ".join(kinds))
    widths, ranks, counts = set(), dict[tuple[int, int], dict[int, str]](), dict[tuple[int, int], set[int]]()
    for _, said, name in files:
        widths.add((said.get("tp"), said.get("pp", 0 if "stage" in said else 1)))
        place = said["rank"], said.get("stage", 0)
        ranks.setdefault(place, {})[said.get("part", 0)] = name
        counts.setdefault(place, set()).add(said.get("parts", 0))
    if len(widths) > 1:
        raise CorruptError(
            "rank files of several widths", path=directory, found=sorted((w or 0) * pp for w, pp in widths)
        )
    # Engines' names do not say the width: then it is as many ranks and stages as there are.
    wide, deep = widths.pop()
    tp, pp = wide or max(rank for rank, _ in ranks) + 1, deep or max(stage for _, stage in ranks) + 1
    places = [(rank, stage) for stage in range(pp) for rank in range(tp)]
    missing = [place for place in places if place not in ranks]
    for place, parts in ranks.items():
        if counts[place] != {len(parts)} and (counts[place] != {0} or len(parts) != max(parts) + 1):
            missing.append(place)
    if missing:
        gone = sorted(stage * tp + rank for rank, stage in missing)
        expected, found = f"ranks 0 to {tp * pp - 1}", f"all but {', '.join(map(str, gone))}"
        raise CorruptError("ranks are missing or incomplete", path=directory, expected=expected, found=found)
    held = {place: tuple(name for _, name in sorted(parts.items())) for place, parts in ranks.items()}
    return RankFiles(kinds[0], tp, {rank: tuple(held[rank, stage] for stage in range(pp)) for rank in range(tp)})


def width(directory: Path) -> int:
    """The ranks of a stage, as the names of the files say it; 1 where there are none, which others will complain of."""
    if directory.is_dir() and is_megatron(directory):
        iteration = iteration_of(directory)
        ranks = (legacy_rank(each.name) for each in iteration.iterdir()) if is_legacy(iteration) else ()
        return max([1, *(1 + numbers[0] for numbers in ranks if numbers)])
    files = _numbered(directory) if directory.is_dir() else ()
    return max([1, *(said.get("tp", said["rank"] + 1) for _, said, _ in files)])


def iteration_of(directory: Path) -> Path:
    """The directory of the iteration that a tracker of Megatron's names; the one itself where there is none."""
    path = directory / MEGATRON_TRACKER
    if not path.is_file():
        return directory
    text = read_bytes(path).decode("utf-8", "replace").strip()
    name = f"iter_{int(text):07}" if re.fullmatch(r"\d{1,12}", text) else text
    if name != "release" and not name.startswith("iter_") or not (directory / name).is_dir():
        raise CorruptError("the iteration that the tracker names is not there", path=path, found=text)
    return directory / name


def legacy_rank(name: str) -> tuple[int, ...] | None:
    """The numbers in the name of a folder of a rank, in Megatron's legacy form."""
    found = re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?", name)
    return tuple(int(number) for number in found.groups() if number is not None) if found else None
