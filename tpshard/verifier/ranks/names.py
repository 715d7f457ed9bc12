"""Which files of a directory are ranks, told by their names alone; no file is opened here, and torch not needed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.storage.names import is_megatron

_NAMES = {
    "native": re.compile(
        r"rank-(?P<rank>\d{5})-of-(?P<tp>\d{5})(?:-part-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.safetensors"
    ),
    "vllm": re.compile(r"model-rank-(?P<rank>\d{1,5})-part-(?P<part>\d{1,5})\.safetensors"),
    "meta": re.compile(r"consolidated\.(?P<rank>\d\d)\.pth"),
    "deepseek": re.compile(r"model(?P<rank>\d{1,5})-mp(?P<tp>\d{1,5})\.safetensors"),
    "dcp": re.compile(r"__(?P<rank>\d{1,5})_(?P<part>\d{1,5})\.distcp"),
    "dcp-hf": re.compile(r"shard-(?P<rank>\d{5})-model-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors"),
}


@dataclass(frozen=True)
class RankFiles:
    """The files of a set: what names them, how many ranks there are, and each rank's files in order."""

    format: str
    tp: int
    ranks: Mapping[int, tuple[str, ...]]


def _numbered(directory: Path) -> Iterator[tuple[str, dict[str, int], str]]:
    """The ranks' files in order: each one's format, the numbers in its name (ranks and parts from 0 on), its name."""
    for path in sorted(directory.iterdir()):
        for kind, pattern in _NAMES.items():
            if match := pattern.fullmatch(path.name):
                said = {key: int(value) for key, value in match.groupdict().items() if value is not None}
                first = {"rank": 1, "part": 1} if kind == "dcp-hf" else {}
                yield kind, {key: n - first.get(key, 0) for key, n in said.items()}, path.name


def rank_files(directory: Path) -> RankFiles:
    """The ranks' files; CorruptError where some are missing, or are of several widths or formats."""
    files = list(_numbered(directory))
    kinds = sorted({kind for kind, *_ in files})
    if not files and is_megatron(directory):
        what, hint = (
            "verify does not read files of Megatron",
            "`tpshard check --source` compares every byte with the model",
        )
        raise UnsupportedError(what, path=directory, expected="files of ranks", found="torch_dist", hint=hint)
    if not files:
        expected, hint = "rank-00000-of-….safetensors, or an engine's", "make them with `tpshard split`"
        raise CorruptError("no rank files here", path=directory, expected=expected, hint=hint)
    if len(kinds) > 1:
        raise CorruptError("rank files of several formats", path=directory, found=", ".join(kinds))
    widths, ranks, counts = set(), dict[int, dict[int, str]](), dict[int, set[int]]()
    for _, said, name in files:
        widths.add(said.get("tp"))
        ranks.setdefault(said["rank"], {})[said.get("part", 0)] = name
        counts.setdefault(said["rank"], set()).add(said.get("parts", 0))
    if len(widths) > 1:
        raise CorruptError("rank files of several widths", path=directory, found=sorted(w or 0 for w in widths))
    # Engines' names do not say the width: then it is as many ranks as there are.
    tp = widths.pop() or max(ranks) + 1
    missing = [rank for rank in range(tp) if rank not in ranks]
    for rank, parts in ranks.items():
        if counts[rank] != {len(parts)} and (counts[rank] != {0} or len(parts) != max(parts) + 1):
            missing.append(rank)
    if missing:
        expected, found = f"ranks 0 to {tp - 1}", f"all but {', '.join(map(str, sorted(missing)))}"
        raise CorruptError("ranks are missing or incomplete", path=directory, expected=expected, found=found)
    return RankFiles(kinds[0], tp, {rank: tuple(name for _, name in sorted(ranks[rank].items())) for rank in range(tp)})


def width(directory: Path) -> int:
    """The number of ranks, as the names of the files say it; 1 where there are none, which others will complain of."""
    files = _numbered(directory) if directory.is_dir() else ()
    return max([1, *(said.get("tp", said["rank"] + 1) for _, said, _ in files)])
