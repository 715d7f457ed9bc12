"""The options and arguments of the commands: names, help, and what their texts mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Argument, Option

from tpshard.errors import UsageError
from tpshard.units import MAX_TP

if TYPE_CHECKING:
    from tpshard import Settings
    from tpshard.api.options import TargetOptions
    from tpshard.cli.console import Console
    from tpshard.report.capacity import Workload

Checksum = Literal["sha256", "none"]
KvDtype = Literal["float32", "float16", "bfloat16", "float8"]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]


def number(
    name: str, help: str, most: float = inf, *, least: int = 1, expected: str = "", metavar: str = "N"
) -> Any:  # typer's options are Any
    """An option that takes whole numbers from `least` to `most`. Typer's own errors differ between its versions."""
    expected = expected or "a whole number from 1" + ("" if most == inf else f" to {most}")

    def parse(text: str | int) -> int:  # a default comes as an int
        if not str(text).strip().isdecimal() or not least <= int(text) <= most:
            raise UsageError(f"{name} does not take this number", expected=expected, found=repr(text))
        return int(text)

    return Option(name, help=help, parser=parse, metavar=metavar)


def _giga(name: str, help: str, metavar: str) -> Any:
    """An option that takes gigabytes, of 10^9 bytes, as devices and links are sold; in bytes."""

    def parse(text: str) -> float:
        try:
            value = float(re.sub(r"(?i)\s*GB?(/s)?$", "", text.strip())) * 1e9
        except ValueError:
            value = 0.0
        if not 0 < value < 1e18:
            expected = "gigabytes, as in 80 or 80GB"
            raise UsageError(f"{name} does not take this number", expected=expected, found=repr(text))
        return value

    return Option(name, help=help, parser=parse, metavar=metavar)


def _file_size(default: str) -> Any:
    return Option(
        "--max-file-size", help=f"Largest file, as in 5GB [default: {default}].", parser=_size, metavar="BYTES"
    )


def _out(help: str, metavar: str) -> Any:
    return Option("-o", "--out", help=help, metavar=metavar)


def _allow_pickle(files: str) -> Any:
    return Option("--allow-pickle", help=f"Read {files}, with torch's weights_only loader.")


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


def target_options(
    tp: int,
    pp: int,
    pp_layers: str | None,
    ep: int,
    uneven: bool,
    shares: str | None,
    pad_vocab_to: int | None,
    max_file_size: int | None,
    format: str,
    engine_version: str | None,
) -> TargetOptions:
    """The layout that a command was asked for."""
    from tpshard.api.options import TargetOptions

    layers, weights, named = layer_list(pp_layers), share_list(shares), (format, engine_version)
    return TargetOptions(tp, uneven, weights, pad_vocab_to, max_file_size, *named, pp=pp, pp_layers=layers, ep=ep)


def share_list(text: str | None) -> list[str] | None:
    """`0.5,0.3` as a list of numbers' texts."""
    return None if text is None else [part.strip() for part in text.split(",")]


def layer_list(text: str | None) -> list[int] | None:
    """`20,21,20,19` as a list of numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        expected = "a whole number for each stage, as in 20,21,20,19"
        raise UsageError("--pp-layers does not take these", expected=expected, found=repr(text))
    return list(map(int, parts))


def rank_list(text: str | None, size: int) -> list[int] | None:
    """`0,3` or `0-3` as a list of ranks, which must be below `size`."""
    if text is None:
        return None
    ranks: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last if dash else first) + 1)
            if not span or span[-1] >= size:
                raise ValueError
            ranks.extend(span)
    except ValueError:
        expected = f"numbers from 0 to {size - 1}, as in 0,3 or 0-3"
        raise UsageError("--ranks does not take these", expected=expected, found=repr(text)) from None
    return ranks


def workload(
    batch: int | None, seq: int | None, kv_dtype: KvDtype | None, memory: float | None, bandwidth: float | None
) -> Workload:
    """What memory and communication are computed for."""
    from tpshard.report.capacity import Workload

    usual = Workload()
    room = None if memory is None else int(memory)
    return Workload(batch or usual.batch, seq or usual.seq, kv_dtype, room, bandwidth)


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
        count = workers or Settings().workers
        yield Settings(count, checksum == "sha256", not no_fsync, overwrite, meter.add, meter.start)


def check_report(path: Path) -> None:
    """Refuse a report for which there is no directory, before anything is read."""
    if not path.absolute().parent.is_dir():
        raise UsageError("no such directory for a report", path=path, hint="make it, or give another path to --report")


def again(
    revision: str | None,
    rules: str | None = None,
    dtype: Dtype | None = None,
    *,
    allow_pickle: bool = False,
    follow_symlinks: bool = False,
) -> list[str]:
    """The options of a model as they were given, for the next command."""
    given = {"--revision": revision, "--rules": rules, "--dtype": dtype}
    options = [text for name, value in given.items() if value for text in (name, str(value))]
    flags = {"--allow-pickle": allow_pickle, "--follow-symlinks": follow_symlinks}
    return options + [name for name, value in flags.items() if value]


def _formats(incomplete: str) -> list[str]:
    """The formats that begin with what was typed, for the shell's completion."""
    from tpshard.api.options import FORMATS

    return [name for name in FORMATS if name.startswith(incomplete)]


def architectures(incomplete: str) -> list[str]:
    """The architectures and model_types that begin with what was typed, for the shell's completion."""
    from tpshard.api.archs import model_types

    names = {name for architecture, types in model_types().items() for name in (architecture, *types)}
    return sorted(name for name in names if name.startswith(incomplete))


def _rules(incomplete: str) -> list[str]:
    """What --rules takes and begins with what was typed: architectures, rules files, and directories on the way."""
    from glob import escape, glob

    paths = [path + "/" if Path(path).is_dir() else path for path in glob(escape(incomplete) + "*")]
    return architectures(incomplete) + sorted(path for path in paths if path.endswith((".toml", "/")))


MODEL = Annotated[str, Argument(help="A directory, a .safetensors file, or a Hub repo (org/name).", metavar="MODEL")]
SHARDS = Annotated[Path, Argument(help="The directory that `tpshard split` wrote.", metavar="SHARDS")]
PATH = Annotated[Path, Argument(help="A checkpoint, a shard set, or one safetensors file.", metavar="PATH")]
TP = Annotated[int, number("--tp", "Number of tensor-parallel ranks.", MAX_TP)]
PP = Annotated[int, number("--pp", "Number of pipeline stages, each of --tp ranks.", MAX_TP)]
_PP_LAYERS_HELP = "Layers of each stage, as in 20,21,20,19 [default: as many each, as vLLM deals them]."
PP_LAYERS = Annotated[str | None, Option("--pp-layers", help=_PP_LAYERS_HELP, metavar="LAYERS")]
_EP_HELP = "Deal whole experts to as many groups of the --tp ranks [default: 1, all cut each expert]."
EP = Annotated[int, number("--ep", _EP_HELP, MAX_TP)]
SET_TP = Annotated[int | None, number("--tp", "The width, in ranks of a stage, that the set must have.")]
SOURCE = Annotated[str | None, Option(help="The unsharded model: compare every byte with it.", metavar="MODEL")]
OUT = Annotated[Path | None, _out("Directory to write [default: ./MODEL-tpN, or ./MODEL-tpN-FORMAT].", "DIR")]
MERGE_OUT = Annotated[Path | None, _out("Directory to write [default: ./MODEL-merged].", "DIR")]
DRAFT_OUT = Annotated[Path | None, _out("File to write [default: stdout].", "FILE")]
REVISION = Annotated[str | None, Option(help="Branch, tag or commit of a Hub repo [default: main].", metavar="NAME")]
_RULES_HELP = "A built-in architecture by name (`tpshard archs`), or a file of your own [default: by model_type]."
RULES = Annotated[str | None, Option(help=_RULES_HELP, metavar="NAME|FILE", autocompletion=_rules)]
DTYPE = Annotated[Dtype | None, Option(help="Cast floating-point weights [default: as stored].")]
CAST_ALL = Annotated[bool, Option("--cast-all", help="Cast what is float32 on purpose as well.")]
_OVERFLOW_HELP = "Write infinity for values that the dtype has no number for."
OVERFLOW = Annotated[bool, Option("--allow-overflow", help=_OVERFLOW_HELP)]
UNEVEN = Annotated[
    bool,
    Option(
        "--uneven",
        help="Deal heads and ffn columns unevenly where they do not divide: any tp up to the number of heads.",
    ),
]
_SHARES_HELP = "Deal unevenly, by one weight for each rank, as in 0.5,0.3,0.2."
SHARES = Annotated[str | None, Option("--shares", help=_SHARES_HELP, metavar="WEIGHTS")]
_PAD_HELP = "Vocab size after padding [default: the next multiple of tp]."
PAD = Annotated[int | None, number("--pad-vocab-to", _PAD_HELP, metavar="SIZE")]
_VOCAB_HELP = "True size of a vocabulary that Megatron has padded [default: of a config.json beside]."
VOCAB_SIZE = Annotated[int | None, number("--vocab-size", _VOCAB_HELP, metavar="SIZE")]
SIZE = Annotated[int | None, _file_size("50GB")]
MERGE_SIZE = Annotated[int | None, _file_size("as in the source")]
_FORMAT_HELP = (
    "How the ranks' files are written: native, vllm, vllm-speculator, sglang, meta, deepseek, dcp, dcp-hf, "
    "megatron, megatron-legacy, hf."
)
FORMAT = Annotated[str, Option("--format", help=_FORMAT_HELP, metavar="FORMAT", autocompletion=_formats)]
_ADVISED_HELP = "Whose ranks are judged: native, vllm, sglang, meta, deepseek."
_VERSION_HELP = "Whose names the files have, as in 0.33 [default of vLLM: 0.32]."
ENGINE_VERSION = Annotated[str | None, Option("--engine-version", help=_VERSION_HELP, metavar="VERSION")]
PICKLE = Annotated[bool, _allow_pickle("pytorch_model*.bin")]
_FOLLOW_HELP = "Read files that are symlinks out of the model's directory."
FOLLOW = Annotated[bool, Option("--follow-symlinks", help=_FOLLOW_HELP)]
META_PICKLE = Annotated[bool, _allow_pickle("Meta's consolidated.*.pth")]
_RANKS_HELP = "Write only these ranks, as in 0,3 or 0-3; other hosts write the others [default: all]."
RANKS = Annotated[str | None, Option("--ranks", help=_RANKS_HELP, metavar="RANKS")]
WORKERS = Annotated[int | None, number("--workers", "Threads [default: one per core, at most 8].", 1024)]
CHECKSUM = Annotated[Checksum, Option("--checksum", help="What is recorded of each file.")]
OVERWRITE = Annotated[bool, Option("--overwrite", help="Replace an existing output once the new one is complete.")]
_NO_FSYNC_HELP = "Do not wait for the disk: for scratch disks, not safe against power loss."
NO_FSYNC = Annotated[bool, Option("--no-fsync", help=_NO_FSYNC_HELP)]
DRY_RUN = Annotated[bool, Option("--dry-run", help="Only show the plan.")]
BATCH = Annotated[int | None, number("--batch", "Sequences at a time [default: 1].")]
SEQ = Annotated[int | None, number("--seq", "Tokens of each sequence [default: 4096].")]
KV_DTYPE = Annotated[KvDtype | None, Option(help="What the KV cache is kept in [default: as the weights].")]
GPU_MEMORY = Annotated[float | None, _giga("--gpu-memory", "Memory of a device in GB.", "GB")]
MEMORY_NEEDED = Annotated[float, _giga("--gpu-memory", "Memory of a device in GB.", "GB")]
GPUS = Annotated[int | None, number("--gpus", "Number of devices [default: --nodes x --gpus-per-node].", 4096)]
NODES = Annotated[int, number("--nodes", "Nodes that they are in, as many in each.", 4096)]
PER_NODE = Annotated[int | None, number("--gpus-per-node", "Devices of a node [default: --gpus / --nodes].", 4096)]
ADVISED = Annotated[str, Option("--format", help=_ADVISED_HELP, metavar="FORMAT", autocompletion=_formats)]
_BANDWIDTH_HELP = "What a device can send, in GB/s, as in 450 for NVLink 4: adds the time of the all-reduces."
BANDWIDTH = Annotated[float | None, _giga("--bandwidth", _BANDWIDTH_HELP, "GB/s")]
DRAWING = Annotated[Path | None, Option("--report", help="Draw the plan as one HTML page.", metavar="FILE.html")]
JSON = Annotated[bool, Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
QUIET = Annotated[bool, Option("-q", "--quiet", help="No messages but errors.")]
