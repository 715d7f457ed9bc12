"""The options and arguments of the commands: names, help, and what their texts mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tpshard.errors import UsageError
from tpshard.units import MAX_TP

if TYPE_CHECKING:
    from tpshard import Settings
    from tpshard.cli.console import Console
    from tpshard.report.capacity import Workload

"""The names of rank files have five digits."""


Checksum = Literal["sha256", "none"]
KvDtype = Literal["float32", "float16", "bfloat16", "float8"]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]


def _number(option: str, most: int | None = None) -> Callable[[str], int]:
    """A parser for whole numbers from 1 to `most`. Typer's own errors differ between its versions."""
    expected = "a whole number from 1" + ("" if most is None else f" to {most}")

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < 1 or (most is not None and int(text) > most):
            raise UsageError(f"{option} does not take this number", expected=expected, found=repr(text))
        return int(text)

    return parse


def _giga(option: str) -> Callable[[str], float]:
    """A parser for gigabytes, of 10^9 bytes, as devices and links are sold; in bytes."""

    def parse(text: str) -> float:
        try:
            value = float(re.sub(r"(?i)\s*GB?(/s)?$", "", text.strip())) * 1e9
        except ValueError:
            value = 0.0
        if not 0 < value < 1e18:
            raise UsageError(
                f"{option} does not take this number", expected="gigabytes, as in 80 or 80GB", found=repr(text)
            )
        return value

    return parse


def _size(text: str) -> int:
    """`5GB` in bytes; decimal units, and binary ones as KiB, MiB, GiB."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    number = text.strip().rstrip("BbGgIiKkMmTt")
    unit = text.strip()[len(number) :].upper()
    try:
        return int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        expected = "a number of bytes, as in 5GB"
        raise UsageError("--max-file-size does not take this", expected=expected, found=repr(text)) from None


def share_list(text: str | None) -> list[str] | None:
    """`0.5,0.3` as a list of numbers' texts."""
    return None if text is None else [part.strip() for part in text.split(",")]


def rank_list(text: str | None, tp: int) -> list[int] | None:
    """`0,3` or `0-3` as a list of ranks, which must be below `tp`."""
    if text is None:
        return None
    ranks: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span or span[-1] >= tp:
                raise ValueError
            ranks.extend(span)
    except ValueError:
        expected = f"numbers from 0 to {tp - 1}, as in 0,3 or 0-3"
        raise UsageError("--ranks does not take these", expected=expected, found=repr(text)) from None
    return ranks


def workload(
    batch: int | None, seq: int | None, kv_dtype: KvDtype | None, memory: float | None, bandwidth: float | None
) -> Workload:
    """What memory and communication are computed for."""
    from tpshard.report.capacity import Workload

    usual = Workload()
    return Workload(
        batch=batch or usual.batch,
        seq=seq or usual.seq,
        kv_dtype=kv_dtype,
        gpu_memory=None if memory is None else int(memory),
        bandwidth=bandwidth,
    )


@contextmanager
def settings(
    console: Console,
    verb: str,
    workers: int | None,
    checksum: Checksum,
    overwrite: bool = False,
    no_fsync: bool = False,
) -> Iterator[Settings]:
    """How a verb runs, while its progress is shown."""
    from tpshard import Settings

    with console.progress(verb) as meter:
        yield Settings(
            workers=workers or Settings().workers,
            checksum=checksum == "sha256",
            fsync=not no_fsync,
            overwrite=overwrite,
            start=meter.start,
            progress=meter.add,
        )


def again(
    revision: str | None, rules: Path | None = None, dtype: Dtype | None = None, allow_pickle: bool = False
) -> list[str]:
    """The options of a model as they were given, for the next command."""
    given = {"--revision": revision, "--rules": rules, "--dtype": dtype}
    options = [text for name, value in given.items() if value for text in (name, str(value))]
    return options + (["--allow-pickle"] if allow_pickle else [])


_SIZE_HELP = "Largest file, as in 5GB"

MODEL = Annotated[
    str, typer.Argument(help="A directory, a .safetensors file, or a Hub repo (org/name).", metavar="MODEL")
]
SHARDS = Annotated[Path, typer.Argument(help="The directory that `tpshard split` wrote.", metavar="SHARDS")]
PATH = Annotated[Path, typer.Argument(help="A checkpoint, a shard set, or one safetensors file.", metavar="PATH")]
TP = Annotated[
    int, typer.Option("--tp", help="Number of tensor-parallel ranks.", parser=_number("--tp", MAX_TP), metavar="N")
]
SET_TP = Annotated[
    int | None,
    typer.Option("--tp", help="The number of ranks that the set must have.", parser=_number("--tp"), metavar="N"),
]
SOURCE = Annotated[str | None, typer.Option(help="The unsharded model: compare every byte with it.", metavar="MODEL")]
OUT = Annotated[
    Path | None,
    typer.Option(
        "-o", "--out", help="Directory to write [default: ./MODEL-tpN, or ./MODEL-tpN-FORMAT].", metavar="DIR"
    ),
]
MERGE_OUT = Annotated[
    Path | None, typer.Option("-o", "--out", help="Directory to write [default: ./MODEL-merged].", metavar="DIR")
]
DRAFT_OUT = Annotated[Path | None, typer.Option("-o", "--out", help="File to write [default: stdout].", metavar="FILE")]
REVISION = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub repo [default: main].", metavar="NAME")
]
RULES = Annotated[
    Path | None,
    typer.Option(
        help="Architecture file of your own, in the form of `tpshard archs show llama` [default: by model_type].",
        metavar="FILE",
    ),
]
DTYPE = Annotated[Dtype | None, typer.Option(help="Cast floating-point weights [default: as stored].")]
UNEVEN = Annotated[bool, typer.Option("--uneven", help="Deal heads and ffn columns unevenly where they do not divide.")]
SHARES = Annotated[
    str | None,
    typer.Option("--shares", help="Deal unevenly, by one weight for each rank, as in 0.5,0.3,0.2.", metavar="WEIGHTS"),
]
PAD = Annotated[
    int | None,
    typer.Option(
        "--pad-vocab-to",
        help="Vocab size after padding [default: the next multiple of tp].",
        parser=_number("--pad-vocab-to"),
        metavar="SIZE",
    ),
]
SIZE = Annotated[
    int | None,
    typer.Option("--max-file-size", help=f"{_SIZE_HELP} [default: 50GB].", parser=_size, metavar="BYTES"),
]
MERGE_SIZE = Annotated[
    int | None,
    typer.Option("--max-file-size", help=f"{_SIZE_HELP} [default: as in the source].", parser=_size, metavar="BYTES"),
]
FORMAT = Annotated[
    str,
    typer.Option(
        "--format",
        help="How the ranks' files are written: native, vllm, sglang, meta, deepseek, dcp, dcp-hf, hf.",
        metavar="FORMAT",
    ),
]
ENGINE_VERSION = Annotated[
    str | None,
    typer.Option(
        "--engine-version",
        help="Whose names the files have, as in 0.32 [default: the newest known].",
        metavar="VERSION",
    ),
]
PICKLE = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pytorch_model*.bin, with torch's weights_only loader.")
]
META_PICKLE = Annotated[
    bool, typer.Option("--allow-pickle", help="Read Meta's consolidated.*.pth, with torch's weights_only loader.")
]
RANKS = Annotated[
    str | None,
    typer.Option(
        "--ranks",
        help="Write only these ranks, as in 0,3 or 0-3; other hosts write the others [default: all].",
        metavar="RANKS",
    ),
]
WORKERS = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Threads [default: one per core, at most 8].",
        parser=_number("--workers", 1024),
        metavar="N",
    ),
]
CHECKSUM = Annotated[Checksum, typer.Option("--checksum", help="What is recorded of each file.")]
OVERWRITE = Annotated[
    bool, typer.Option("--overwrite", help="Replace an existing output once the new one is complete.")
]
NO_FSYNC = Annotated[
    bool, typer.Option("--no-fsync", help="Do not wait for the disk: for scratch disks, not safe against power loss.")
]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")]
BATCH = Annotated[
    int | None,
    typer.Option("--batch", help="Sequences at a time [default: 1].", parser=_number("--batch"), metavar="N"),
]
SEQ = Annotated[
    int | None,
    typer.Option("--seq", help="Tokens of each sequence [default: 4096].", parser=_number("--seq"), metavar="N"),
]
KV_DTYPE = Annotated[KvDtype | None, typer.Option(help="What the KV cache is kept in [default: as the weights].")]
GPU_MEMORY = Annotated[
    float | None,
    typer.Option("--gpu-memory", help="Memory of a device in GB.", parser=_giga("--gpu-memory"), metavar="GB"),
]
MEMORY_NEEDED = Annotated[
    float, typer.Option("--gpu-memory", help="Memory of a device in GB.", parser=_giga("--gpu-memory"), metavar="GB")
]
GPUS = Annotated[int, typer.Option("--gpus", help="Number of devices.", parser=_number("--gpus", 4096), metavar="N")]
BANDWIDTH = Annotated[
    float | None,
    typer.Option(
        "--bandwidth",
        help="What a device can send, in GB/s, as in 450 for NVLink 4: adds the time of the all-reduces.",
        parser=_giga("--bandwidth"),
        metavar="GB/s",
    ),
]
DRAWING = Annotated[Path | None, typer.Option("--report", help="Draw the plan as one HTML page.", metavar="FILE.html")]
JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
QUIET = Annotated[bool, typer.Option("-q", "--quiet", help="No messages but errors.")]
