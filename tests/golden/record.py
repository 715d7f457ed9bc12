"""Records what the commands write, so that two versions of the code can be compared file by file.

    python tests/golden/record.py make DIR                        the checkpoints, once, with either version
    python tests/golden/record.py record DIR OUT.json             with each version: `--jobs 2`, `--only 'llama*'`
    python tests/golden/record.py compare OLD.json NEW.json       prints every difference; exit 1 when there is any

Which version is recorded is told by PYTHONPATH, and printed. Only the command line is used, in this process where that
is possible. A case is a checkpoint, what was asked of it and a command; what is kept of it is the exit code, what it
printed, and a digest of every file that it wrote. `--keep DIR` also keeps what was printed, under its digest. The
version of tpshard and the directories are masked.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import typer.main

Entry = dict[str, Any]
Entries = dict[str, Entry]

FORMATS = ("native", "vllm", "sglang", "meta", "deepseek", "dcp", "dcp-hf", "hf")
EVEN = ((1,), (2,), (4,))
DIGITS = 16
"""Hex digits that are kept of a SHA-256: enough against accidents."""
SHORT = 400
"""What is printed is kept as it is up to this length, and as its digest beyond."""

SURROUNDINGS = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""What the commands would take from the terminal and the machine."""

# Asked of every format, and more of their merges, reshards and mistakes.
RICH = (
    "llama-gqa", "llama-tied", "llama+even_vocab", "llama-gqa+files", "llama-gqa+pickled", "qwen3_moe+files", "gpt2",
    "gpt2+strip_prefix", "gpt_oss", "deepseek_v3+even_vocab", "mixtral", "mixtral-stacked", "nemotron_h", "qwen3_next",
    "falcon-new", "falcon_h1", "bloom", "multimodal-gemma3", "small-internlm2",
)  # fmt: skip
# Checkpoint, format, tp, and further options of verify.
VERIFIED: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
    ("llama-gqa", "native", 2, ()),
    ("llama-gqa", "native", 4, ()),
    ("llama-gqa", "vllm", 2, ()),
    ("llama-gqa", "dcp", 2, ()),
    ("llama-gqa", "sglang", 4, ("--tier", "exact")),
    ("llama-gqa", "dcp-hf", 2, ("--tier", "exact,bytes")),
    ("llama-gqa", "native", 2, ("--float32",)),
    ("llama-gqa", "native", 2, ("--stream", "--layers", "0,-1")),
    ("llama-gqa", "native", 2, ("--sequence-parallel",)),
    ("llama-gqa", "native", 2, ("--reference", "transformers")),
    ("llama-gqa", "native", 2, ("--engine", "transformers")),
    ("llama+even_vocab", "meta", 2, ()),
    ("llama+even_vocab", "hf", 1, ()),
    ("llama-bf16", "native", 2, ()),
    ("llama-tied", "native", 4, ()),
    ("llama-gqa+pickled", "native", 2, ("--allow-pickle",)),
    ("qwen2-bias", "native", 2, ()),
    ("qwen3", "dcp", 4, ()),
    ("gemma2", "native", 2, ()),
    ("gpt2", "native", 4, ()),
    ("gpt2", "vllm", 2, ()),
    ("gpt2+strip_prefix", "native", 2, ()),
    ("gpt_neox", "native", 2, ()),
    ("gptj", "native", 2, ()),
    ("gpt_bigcode-mqa", "native", 2, ()),
    ("bloom", "native", 2, ()),
    ("falcon-new", "native", 2, ()),
    ("opt", "native", 2, ()),
    ("mixtral", "native", 2, ()),
    ("deepseek_v3+even_vocab", "deepseek", 2, ()),
    ("qwen3_next", "native", 2, ()),
    ("nemotron_h", "native", 2, ()),
    ("gpt_oss", "native", 4, ()),
    ("phi3", "native", 2, ()),
    ("multimodal-gemma3", "native", 2, ()),
    ("small-internlm2", "native", 2, ()),
)
COMMANDS = ("plan", "split", "merge", "reshard", "check", "inspect", "verify", "advise", "env", "schema", "archs")


@dataclass(frozen=True)
class Result:
    """What a command left."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Split:
    """One way to split: the options, and the words for it in the name of the case."""

    format: str
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return " ".join((self.format, *self.options))

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--format", self.format, *self.options)


@dataclass
class Recorder:
    """Runs commands in a directory of its own and keeps what they left, by the name of the case."""

    checkpoints: Path
    work: Path
    keep: Path | None = None
    entries: Entries = field(default_factory=dict)

    def run(self, case: str, *arguments: object, writes: Path | None = None) -> bool:
        """Run a command and keep what it left; whether it succeeded."""
        result = command_line()([str(argument) for argument in arguments])
        entry: Entry = {"code": result.code, "out": self.said(result.out), "err": self.said(result.err)}
        if writes is not None:
            entry["files"] = digests(writes)
        self.add(case, entry)
        return result.code == 0

    def add(self, case: str, entry: Entry) -> None:
        """Keep an entry; a name that was used already is a mistake of this script."""
        if case in self.entries:
            raise ValueError(f"{case} twice")
        self.entries[case] = entry

    def said(self, text: str) -> str:
        """What was printed, masked; its digest alone when it is long."""
        text = self.masked(text)
        if len(text) <= SHORT:
            return text
        name = digest(text.encode())
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / name).write_text(text)
        return name

    def masked(self, text: str) -> str:
        """Without what a run or a version decides."""
        for path, name in ((self.work, "WORK"), (self.checkpoints, "CHECKPOINTS")):
            text = text.replace(str(path), name)
        return without_version(text.encode()).decode()


def without_version(data: bytes) -> bytes:
    """With the version of tpshard masked."""
    return re.sub(rb"\btpshard \d+\.\d[\w.+-]*", b"tpshard VERSION", data)


def digest(data: bytes) -> str:
    """The beginning of the SHA-256 of these bytes."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def digests(directory: Path) -> dict[str, str]:
    """A digest of every file below a directory, by its path in it."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): digest(contents(path)) for path in files}


def contents(path: Path) -> bytes:
    """The bytes of a file: as they are, but for the version in JSON and sums over files with a version."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return without_version(data)
    if path.name == "SHA256SUMS":
        return "".join(sum_line(path.parent, line) for line in data.decode().splitlines(keepends=True)).encode()
    return data


def sum_line(directory: Path, line: str) -> str:
    """A line of SHA256SUMS: where its sum is right, without the part of it that a version may change."""
    found, _, name = line.rstrip("\n").partition("  ")
    file = directory / name
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != found:
        return line
    return line.replace(found, digest(contents(file)))


@cache
def command_line() -> Callable[[list[str]], Result]:
    """What runs the command line: `main` of the package in this process, or `python -m tpshard` where it is not found.

    The only place that knows where the code keeps its `main`.
    """
    for name in ("tpshard.cli.main", "tpshard.cli"):
        try:
            module = import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            continue
        if callable(main := getattr(module, "main", None)):
            return partial(in_process, main)
    return in_another_process


built_once = cache(typer.main.get_command)


def in_process(main: Callable[[list[str]], None], arguments: list[str]) -> Result:
    """Run the command line by a call. typer builds its commands once, which takes longer than most of them."""
    out, err = io.StringIO(), io.StringIO()
    code: object = None
    program, sys.argv[0] = sys.argv[0], "tpshard"
    try:
        with patch("typer.main.get_command", built_once), redirect_stdout(out), redirect_stderr(err):
            main(arguments)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv[0] = program
    return Result(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def in_another_process(arguments: list[str]) -> Result:
    """Run the command line by itself."""
    run = subprocess.run([sys.executable, "-m", "tpshard", *arguments], capture_output=True, text=True)
    return Result(run.returncode, run.stdout, run.stderr.replace("python -m tpshard", "tpshard"))


def splits(rich: bool) -> Iterator[Split]:
    """The ways in which a checkpoint is split."""
    for format in FORMATS:
        for tp in (1, 2, 4):
            yield Split(format, ("--tp", str(tp)))
    others: tuple[tuple[str, ...], ...] = (
        ("--tp", "3", "--uneven"),
        ("--tp", "3", "--shares", "0.5,0.3,0.2"),
        ("--tp", "2", "--shares", "0.7,0.3"),
        ("--tp", "2", "--pad-vocab-to", "256"),
    )
    if rich:
        others += (("--tp", "2", "--max-file-size", "60KB"), ("--tp", "2", "--dtype", "bfloat16"))
        others += (("--tp", "4", "--ranks", "1,3"), ("--tp", "2", "--checksum", "none"), ("--tp", "4", "--uneven"))
    for format in FORMATS if rich else ("native", "vllm", "dcp"):
        for options in others:
            yield Split(format, options)
    if rich:
        for generation in ("2", "3"):
            yield Split("meta", ("--tp", "2", "--engine-version", generation))


def record_checkpoint(name: str, checkpoints: Path, keep: Path | None = None) -> Entries:
    """Everything that is recorded of one checkpoint."""
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        recorder = Recorder(checkpoints.resolve(), Path(temporary).resolve(), keep)
        source, pickle = recorder.checkpoints / name, pickle_options(name)
        rich = name in RICH
        recorder.run(f"{name} / inspect", "inspect", source, "--json", *(("--all",) if rich else ()))
        for split in splits(rich):
            record_split(recorder, name, source, split, pickle)
        if rich:
            record_reshards(recorder, name, source, pickle)
            record_mistakes(recorder, name, source, pickle)
            record_readings(recorder, name, source, pickle)
        for _, format, tp, options in (row for row in VERIFIED if row[0] == name):
            record_verify(recorder, name, source, format, tp, options, pickle)
        record_meta(recorder, name, source)
        return recorder.entries


def pickle_options(name: str) -> tuple[str, ...]:
    """What a checkpoint of pickles needs."""
    return ("--allow-pickle",) if name.endswith("+pickled") else ()


def quick(*options: str) -> tuple[str, ...]:
    """Options of commands that write."""
    return ("--workers", "1", "--no-fsync", *options)


def record_split(recorder: Recorder, name: str, source: Path, split: Split, pickle: Sequence[str]) -> None:
    """Plan, split, look at it, and put it together again."""
    case, out = f"{name} / {split.name}", recorder.work / "split"
    if "--checksum" not in split.options and "--ranks" not in split.options:
        recorder.run(f"{case} / plan", "plan", source, *split.arguments, *pickle, "--json")
    done = recorder.run(
        f"{case} / split", "split", source, *split.arguments, *pickle, "-o", out, *quick("--json"), writes=out
    )
    if done:
        recorder.run(f"{case} / check", "check", out, "--source", source, *pickle, "--workers", "1", "--json")
        if name in RICH or "1" not in split.options:
            recorder.run(f"{case} / inspect", "inspect", out, "--json")
            merged = recorder.work / "merged"
            recorder.run(f"{case} / merge", "merge", out, "-o", merged, *quick("--json"), writes=merged)
    clear(recorder.work)


def record_reshards(recorder: Recorder, name: str, source: Path, pickle: Sequence[str]) -> None:
    """From each format at tp 2 to native at tp 4, and from native at tp 2 to each format at another tp."""
    ways = [(Split(format, ("--tp", "2")), Split("native", ("--tp", "4"))) for format in FORMATS]
    ways += [(Split("native", ("--tp", "2")), Split(format, ("--tp", "4"))) for format in FORMATS[1:]]
    ways += [(Split("native", ("--tp", "4")), Split(format, ("--tp", "1"))) for format in ("native", "hf", "dcp-hf")]
    ways += [(Split("dcp", ("--tp", "4")), Split("vllm", ("--tp", "2", "--pad-vocab-to", "256")))]
    ways += [(Split("native", ("--tp", "3", "--uneven")), Split("dcp", ("--tp", "2", "--max-file-size", "60KB")))]
    before, after = recorder.work / "before", recorder.work / "after"
    for first, second in ways:
        made = command_line()(
            [str(a) for a in ("split", source, *first.arguments, *pickle, "-o", before, *quick("--json"))]
        )
        if made.code == 0:
            case = f"{name} / {first.name} / reshard {second.name}"
            recorder.run(case, "reshard", before, *second.arguments, "-o", after, *quick("--json"), writes=after)
        clear(recorder.work)


def record_mistakes(recorder: Recorder, name: str, source: Path, pickle: Sequence[str]) -> None:
    """What the commands say of a set that is not whole, and of what they must not do."""
    good = recorder.work / "good"
    command_line()([str(a) for a in ("split", source, "--tp", "2", *pickle, "-o", good, *quick("--json"))])
    for mistake, spoil in MISTAKES.items():
        bad = recorder.work / "bad"
        shutil.copytree(good, bad)
        spoil(bad)
        case = f"{name} / {mistake}"
        recorder.run(f"{case} / check", "check", bad, "--workers", "1", "--json")
        recorder.run(f"{case} / check --source", "check", bad, "--source", source, *pickle, "--workers", "1", "--json")
        recorder.run(f"{case} / check as text", "check", bad, "--source", source, *pickle, "--workers", "1")
        recorder.run(f"{case} / inspect", "inspect", bad, "--json")
        merged = recorder.work / "merged"
        recorder.run(f"{case} / merge", "merge", bad, "-o", merged, *quick("--json"), writes=merged)
        for left in recorder.work.iterdir():
            if left != good:
                shutil.rmtree(left)
    case = f"{name} / not allowed"
    recorder.run(f"{case} / again", "split", source, "--tp", "4", *pickle, "-o", good, *quick(), writes=good)
    recorder.run(f"{case} / the same", "split", source, "--tp", "2", *pickle, "-o", good, *quick(), writes=good)
    recorder.run(f"{case} / tp 0", "split", source, "--tp", "0", *pickle, "-o", good, *quick())
    recorder.run(f"{case} / tp 64", "split", source, "--tp", "64", *pickle, "-o", recorder.work / "x", *quick())
    recorder.run(f"{case} / check --tp 3", "check", good, "--tp", "3", "--json")
    recorder.run(f"{case} / inspect nothing", "inspect", recorder.work / "nothing", "--json")
    recorder.run(
        f"{case} / overwrite", "split", source, "--tp", "4", *pickle, "-o", good, *quick("--overwrite"), writes=good
    )
    clear(recorder.work)


def first_weights(directory: Path) -> list[Path]:
    """The ranks' files of a native set."""
    return sorted(directory.glob("rank-*.safetensors"))


def flip_byte(directory: Path) -> None:
    """Another last byte in the file of rank 1."""
    file = first_weights(directory)[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def cut_off(directory: Path) -> None:
    """The file of rank 1 without its end."""
    file = first_weights(directory)[1]
    file.write_bytes(file.read_bytes()[:-16])


def exchange(directory: Path) -> None:
    """The files of two ranks under each other's names."""
    one, two = first_weights(directory)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def other_config(directory: Path) -> None:
    """Another config than was recorded."""
    file = directory / "config.json"
    file.write_text(file.read_text() + "\n")


MISTAKES: dict[str, Callable[[Path], None]] = {
    "byte flipped": flip_byte,
    "cut off": cut_off,
    "ranks exchanged": exchange,
    "rank missing": lambda directory: first_weights(directory)[1].unlink(),
    "manifest missing": lambda directory: (directory / "tpshard.json").unlink(),
    "config changed": other_config,
}


def record_readings(recorder: Recorder, name: str, source: Path, pickle: Sequence[str]) -> None:
    """What is said of a checkpoint for people, and what is worked out from its headers."""
    case = f"{name} / read"
    recorder.run(f"{case} / inspect as text", "inspect", source)
    recorder.run(f"{case} / plan as text", "plan", source, "--tp", "2", *pickle)
    recorder.run(f"{case} / plan --all", "plan", source, "--tp", "4", "--all", *pickle)
    work = ("--batch", "4", "--seq", "512", "--gpu-memory", "1", "--bandwidth", "100", "--kv-dtype", "float16")
    recorder.run(f"{case} / plan with work", "plan", source, "--tp", "2", *work, *pickle, "--json")
    page = recorder.work / "page" / "plan.html"
    page.parent.mkdir()
    recorder.run(f"{case} / drawing", "plan", source, "--tp", "2", "--report", page, *pickle, "-q", writes=page.parent)
    recorder.run(f"{case} / advise", "advise", source, "--gpus", "8", "--gpu-memory", "80", "--json")
    recorder.run(f"{case} / advise as text", "advise", source, "--gpus", "4", "--gpu-memory", "0.0005")
    drafted = recorder.work / "drafted" / "rules.toml"
    drafted.parent.mkdir()
    recorder.run(f"{case} / draft", "archs", "draft", source, "-o", drafted, writes=drafted.parent)
    if pickle:
        recorder.run(f"{case} / pickle not allowed", "split", source, "--tp", "2", "-o", recorder.work / "x", "--json")
    clear(recorder.work)


def record_meta(recorder: Recorder, name: str, source: Path) -> None:
    """A directory as Meta publishes them, as input."""
    if name != "llama+even_vocab":
        return
    for tp, generation in ((1, "2"), (2, "2"), (2, "3"), (4, "3")):
        published, out = recorder.work / "published", recorder.work / "out"
        options = ("--tp", str(tp), "--format", "meta", "--engine-version", generation, "-o", str(published))
        command_line()(["split", str(source), *options, *quick("--json")])
        for path in published.iterdir():
            if path.name != "params.json" and path.suffix != ".pth":
                path.unlink()
        case = f"{name} / of Meta, tp {tp}, Llama {generation}"
        recorder.run(f"{case} / not allowed", "merge", published, "-o", out, *quick("--json"), writes=out)
        recorder.run(f"{case} / merge", "merge", published, "-o", out, "--allow-pickle", *quick("--json"), writes=out)
        shutil.rmtree(out, ignore_errors=True)
        recorder.run(f"{case} / inspect", "inspect", published, "--json")
        recorder.run(
            f"{case} / check", "check", published, "--source", source, "--allow-pickle", "--workers", "1", "--json"
        )
        for format in ("native", "vllm", "dcp"):
            recorder.run(
                f"{case} / reshard {format}",
                *("reshard", published, "--tp", "2", "--format", format, "-o", out, "--allow-pickle"),
                *quick("--json"),
                writes=out,
            )
            shutil.rmtree(out, ignore_errors=True)
        clear(recorder.work)


def record_verify(
    recorder: Recorder, name: str, source: Path, format: str, tp: int, options: Sequence[str], pickle: Sequence[str]
) -> None:
    """The verdict on a set and, for a native one, on the same set with two ranks exchanged."""
    shards = recorder.work / "shards"
    command_line()(
        [str(a) for a in ("split", source, "--tp", tp, "--format", format, *pickle, "-o", shards, *quick("--json"))]
    )
    case = f"{name} / {format} --tp {tp} / {' '.join(('verify', *options))}"
    arguments = ["verify", str(shards), "--source", str(source), "--device", "cpu", "--tokens", "4", *options, "--json"]
    recorder.add(case, verdict_of(recorder, command_line()(arguments)))
    if (format, tp) == ("native", 2) and not options:
        exchange(shards)
        recorder.add(f"{case} of exchanged ranks", verdict_of(recorder, command_line()(arguments)))
    clear(recorder.work)


def verdict_of(recorder: Recorder, result: Result) -> Entry:
    """What must not change in a verdict, in an order of its own; `figures` holds the numbers, which may."""
    lines = [line for line in result.err.splitlines() if line.startswith(("error:", "hint:", "next:", "warning:"))]
    entry: Entry = {"code": result.code, "err": recorder.masked("\n".join(lines))}
    found = json.loads(recorder.masked(result.out))
    if "tiers" not in found:
        return entry | {"out": found}
    return entry | {
        **{key: found[key] for key in ("verdict", "model_type", "tp", "settings")},
        "reason": without_figures(recorder, found["reason"]),
        "warnings": sorted(without_figures(recorder, warning) or "" for warning in found["warnings"]),
        "ranks": {str(row["rank"]): row["bytes"] for row in found["ranks"]},
        "canaries": sorted(f"{row['tier']} {row['name']}: {row['status']}" for row in found["canaries"]),
        "tiers": {tier["name"]: tier_of(recorder, tier) for tier in found["tiers"]},
        "figures": {
            "metrics": {tier["name"]: tier["metrics"] for tier in found["tiers"]},
            "modules": {tier["name"]: sorted(map(module_line, tier["modules"])) for tier in found["tiers"]},
            "canaries": sorted(f"{row['tier']} {row['name']} {row['error']!r}" for row in found["canaries"]),
        },
    }


def module_line(row: dict[str, Any]) -> str:
    """A module's figure as a line."""
    return f"{row['module']} rank {row['rank']} {row['error']!r}"


def tier_of(recorder: Recorder, tier: dict[str, Any]) -> Entry:
    """A tier without its figures; `modules` says how many ranks were judged in each."""
    first = tier["first"]
    return {
        "status": tier["status"],
        "reason": without_figures(recorder, tier["reason"]),
        "thresholds": tier["thresholds"],
        "metrics": sorted(tier["metrics"]),
        "first": first and f"{first['module']} rank {first['rank']}",
        "modules": dict(sorted(Counter(row["module"] for row in tier["modules"]).items())),
    }


def without_figures(recorder: Recorder, text: str | None) -> str | None:
    """A sentence with numbers that are not whole masked."""
    return text and re.sub(r"\d+\.\d+(e[+-]?\d+)?|\d+e[+-]?\d+", "#", recorder.masked(text))


def record_general(checkpoints: Path, keep: Path | None = None) -> Entries:
    """What the command line says without a checkpoint."""
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        recorder = Recorder(checkpoints.resolve(), Path(temporary).resolve(), keep)
        recorder.run("general / --version", "--version")
        recorder.run("general / --help", "--help")
        for command in COMMANDS:
            recorder.run(f"general / {command} --help", command, "--help")
        recorder.run("general / no such command", "cut", "--json")
        recorder.run("general / no such option", "split", "x", "--tp", "2", "--cut", "--json")
        recorder.run("general / schema", "schema")
        for name in command_line()(["schema"]).out.split():
            recorder.run(f"general / schema {name}", "schema", name)
        recorder.run("general / archs", "archs", "list", "--json")
        for name in sorted(set(re.findall(r'"name": "([\w.-]+)"', command_line()(["archs", "list", "--json"]).out))):
            recorder.run(f"general / archs show {name}", "archs", "show", name)
        return recorder.entries


def record_small(name: str, checkpoint: Path) -> Entries:
    """The little that is recorded of a checkpoint of the small set, which the test runs each time."""
    with tempfile.TemporaryDirectory() as temporary, chdir(temporary):
        recorder = Recorder(checkpoint.parent.resolve(), Path(temporary).resolve())
        source = recorder.checkpoints / checkpoint.name
        for split in small_splits():
            case, out, merged = f"{name} / {split.name}", recorder.work / "split", recorder.work / "merged"
            options = (*split.arguments, "-o", out, *quick("--json"))
            if recorder.run(f"{case} / split", "split", source, *options, writes=out) and "2" in split.options:
                if split.format == "native":
                    recorder.run(f"{case} / plan", "plan", source, *split.arguments, "--json")
                recorder.run(f"{case} / check", "check", out, "--source", source, "--workers", "1", "--json")
                recorder.run(f"{case} / merge", "merge", out, "-o", merged, *quick("--json"), writes=merged)
            clear(recorder.work)
        return {case: shortened(entry) for case, entry in recorder.entries.items()}


def small_splits() -> Iterator[Split]:
    """The ways in which a checkpoint of the small set is split."""
    for format in FORMATS:
        for tp in ("1", "2", "4"):
            yield Split(format, ("--tp", tp))
    for format in ("native", "dcp", "dcp-hf"):
        yield Split(format, ("--tp", "3", "--uneven"))
        yield Split(format, ("--tp", "2", "--shares", "0.7,0.3"))
    yield Split("native", ("--tp", "2", "--pad-vocab-to", "72"))
    yield Split("vllm", ("--tp", "2", "--pad-vocab-to", "72"))
    yield Split("native", ("--tp", "3", "--shares", "0.5,0.3,0.2"))
    yield Split("native", ("--tp", "2", "--max-file-size", "4KB"))


def shortened(entry: Entry) -> Entry:
    """What was printed as a digest, unless it is an error; without what is empty."""
    kept = {**entry, "out": "" if entry["code"] else digest(entry["out"].encode()), "files": entry.get("files")}
    return {key: value for key, value in kept.items() if value not in ("", None, {})}


def clear(directory: Path) -> None:
    """Remove what is in a directory."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def record(checkpoints: Path, only: Sequence[str], jobs: int, keep: Path | None) -> Entries:
    """Everything that is recorded of the checkpoints whose names fit a pattern of `only`."""
    names = [path.name for path in sorted(checkpoints.iterdir()) if (path / "config.json").is_file()]
    chosen = [name for name in ["general", *names] if is_chosen(name, only)]
    work = partial(record_named, checkpoints=checkpoints, keep=keep)
    entries: Entries = {}
    if jobs == 1:
        for name in chosen:
            entries |= work(name)
        return entries
    with ProcessPoolExecutor(jobs) as pool:
        for found in pool.map(work, chosen):
            entries |= found
    return entries


def record_named(name: str, checkpoints: Path, keep: Path | None) -> Entries:
    """What is recorded under a name."""
    print(name, file=sys.stderr)
    return record_general(checkpoints, keep) if name == "general" else record_checkpoint(name, checkpoints, keep)


def differences(old: Entries, new: Entries, figures: bool = False) -> list[str]:
    """A line for each difference, with the case that it is in; figures of verify only when they are asked for."""
    lines = []
    for case in sorted(old.keys() | new.keys()):
        if case not in old or case not in new:
            lines.append(f"{case}: only in the {'new' if case in new else 'old'} record")
            continue
        one, two = (flat(side[case]) for side in (old, new))
        for key in sorted(one.keys() | two.keys()):
            if one.get(key) != two.get(key) and (figures or not key.startswith("figures")):
                lines.append(f"{case}: {key}: {one.get(key, 'nothing')} -> {two.get(key, 'nothing')}")
    return lines


def flat(value: Any, key: str = "") -> dict[str, str]:
    """Nested objects as one, with joined keys."""
    if not isinstance(value, dict):
        return {key: json.dumps(value, sort_keys=True)}
    return {path: text for name, inner in value.items() for path, text in flat(inner, f"{key} {name}".strip()).items()}


def write_record(path: Path, entries: Entries) -> None:
    """Write a record, a line for each case, in order."""
    lines = (f"{json.dumps(case)}: {json.dumps(entries[case], sort_keys=True)}" for case in sorted(entries))
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def read_record(path: Path) -> Entries:
    """Read what `write_record` wrote."""
    entries: Entries = json.loads(path.read_text())
    return entries


def arguments_of() -> argparse.Namespace:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("make", help="make the checkpoints")
    make.add_argument("directory", type=Path)
    recording = verbs.add_parser("record", help="run the commands and record what they leave")
    recording.add_argument("directory", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument("--only", action="append", default=[], metavar="NAME", help="checkpoints, as in 'llama*'")
    recording.add_argument("--jobs", type=int, default=1, help="processes")
    recording.add_argument("--keep", type=Path, metavar="DIR", help="keep what was printed, under its digest")
    small = verbs.add_parser("small", help="record the small set, for the test")
    small.add_argument("out", type=Path)
    comparing = verbs.add_parser("compare", help="compare two records")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--only", action="append", default=[], metavar="NAME", help="checkpoints, as in 'llama*'")
    comparing.add_argument("--figures", action="store_true", help="figures of verify too")
    return parser.parse_args()


def compare(old: Path, new: Path, only: Sequence[str], figures: bool) -> int:
    """Print the differences of two records; the exit code."""
    one, two = (fitting(read_record(path), only) for path in (old, new))
    lines = differences(one, two, figures)
    print("\n".join(lines or [f"no difference in {len(one)} cases"]))
    return 1 if lines else 0


def fitting(entries: Entries, only: Sequence[str]) -> Entries:
    """The cases of the checkpoints that were asked for."""
    return {case: entry for case, entry in entries.items() if is_chosen(case.split(" / ")[0], only)}


def is_chosen(name: str, only: Sequence[str]) -> bool:
    """Whether a checkpoint fits one of the patterns, if there are any."""
    return not only or any(fnmatch(name, pattern) for pattern in only)


def record_all_small() -> Entries:
    """The record of the small set."""
    import making

    entries: Entries = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in making.small_names():
            entries |= record_small(name, making.write_small(name, Path(directory) / name))
    return entries


def main() -> int:
    """Do what was asked; the exit code."""
    given = arguments_of()
    if given.verb == "compare":
        return compare(given.old, given.new, given.only, given.figures)
    os.environ |= SURROUNDINGS
    if given.verb == "make":
        import making

        print(f"{len(making.make_all(given.directory))} checkpoints in {given.directory}")
        return 0
    print(f"records {import_module('tpshard').__file__}", file=sys.stderr)
    if given.verb == "small":
        entries = record_all_small()
    else:
        entries = record(given.directory.resolve(), given.only, given.jobs, given.keep and given.keep.resolve())
    write_record(given.out, entries)
    print(f"{len(entries)} cases in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
