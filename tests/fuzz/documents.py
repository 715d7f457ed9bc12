"""Random damage to the documents that commands read: manifest, record, checksums, config.json, index, rules, .metadata.

A case changes a few places of one document and runs one command in this process. Whatever a document says, the command
ends with a documented exit code and never as our bug (70), within seconds, and without taking memory.
`python -m tests.fuzz.documents N` runs N cases; `tests/fuzz/test_documents.py` runs some in the suite.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.command import llama, llama_tensors, tpshard
from tests.helpers.toys import Tensor
from tpshard.formats.manifest import digest_of

SECONDS = 10.0  # of the processor: others may be using it
BYTES = 500 << 20
FORMATS = ("native", "vllm", "dcp", "meta")
SETS: dict[str, tuple[object, ...]] = {name: ("--format", name) for name in FORMATS} | {"stages": ("--pp", 2)}
"""The sets that are damaged, and the options that make them."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 1e8, 100_000_000, 2**63, 10**40, 0.5, "", "x", "*", "*" * 5000, "../x", "/etc",
    "float3", "bfloat16", "BF16", "llama", "gpt2", "\x1b[31m", [], {}, [None], [[]], {"": None}, [0, 1], ["x"] * 50,
)  # fmt: skip
"""What a place of a document may hold instead."""
RULE_TEXTS = ("*" * 5000, "{" * 200, "**.weight", "model.*" * 300, "count = 0", "unit = -1", '"x" ** 9', "9" * 400)
"""What a line of a rules file may hold instead."""
KINDS = (
    "manifest", "manifest", "record", "sums", "metadata", "config of the model", "config of the set", "index", "rules",
)  # fmt: skip

Json = Any


def places(document: Json, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value below the top of a document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in pairs:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def changed(document: Json, rng: random.Random) -> Json:
    """A copy with one to three places removed, replaced, or repeated under another name."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        candidates = list(places(document))
        if not candidates:
            return rng.choice(VALUES)
        *path, key = rng.choice(candidates)
        inner = document
        for step in path:
            inner = inner[step]
        what = rng.random()
        if what < 0.2:
            inner.pop(key)
        elif what < 0.3 and isinstance(inner, dict):
            inner[rng.choice(("", "x", "quantization_config", "text_config", "rope_scaling"))] = rng.choice(VALUES)
        else:
            inner[key] = copy.deepcopy(rng.choice(VALUES))
    return document


def as_json(document: Json, rng: random.Random) -> bytes:
    """A document's text, rarely cut short or with a byte that is no text."""
    raw = json.dumps(document).encode()
    what = rng.random()
    if what < 0.02:
        return raw[: rng.randrange(len(raw) + 1)]
    return raw.replace(b"e", b"\xff", 1) if what < 0.03 else raw


@dataclass(frozen=True)
class Stage:
    """A model, its sets by format, and a rules file, all written by the real commands: nothing here is made by hand."""

    model: Path
    sets: dict[str, Path]
    rules: Path

    @classmethod
    def make(cls, root: Path) -> Stage:
        """A LLaMA of a few hundred numbers, split at tp 2 in each format, and in stages."""
        rng = np.random.default_rng(0)
        finite = {
            name: Tensor(each.dtype, each.shape, rng.normal(0, 0.08, each.shape).astype("<f4").tobytes())
            for name, each in llama_tensors().items()
        }
        model = llama(root / "model", parts=2, tensors=finite)
        sets = {name: root / f"set-{name}" for name in SETS}
        for name, out in sets.items():
            done = tpshard("split", model, "--tp", 2, *SETS[name], "-o", out)
            assert done.code == 0, done.err
        rules = root / "llama.toml"
        rules.write_text(tpshard("archs", "show", "llama").out)
        return cls(model, sets, rules)


@dataclass(frozen=True)
class Case:
    """A damaged file and the command that meets it."""

    file: Path
    content: bytes
    command: tuple[object, ...]


def case(stage: Stage, work: Path, rng: random.Random) -> Case:
    """A random case, in a copy of the stage's files at `work`."""
    out = work / "out"
    kind = rng.choice(KINDS)
    model, form = work / "model", "dcp" if kind == "metadata" else rng.choice(tuple(SETS))
    held = work / f"set-{form}"
    on_set: Callable[[], tuple[object, ...]] = lambda: rng.choice(  # noqa: E731
        (
            ("check", held),
            ("check", held, "--source", model),
            ("merge", held, "-o", out, "--allow-pickle"),
            ("reshard", held, "--tp", 4, "-o", out, "--allow-pickle"),
            ("inspect", held),
            ("verify", held, "--source", model, "--tier", "bytes"),
            ("verify", held, "--source", model, "--tier", "exact", "--device", "cpu"),
            ("split", model, "--tp", 2, "--ranks", 0, "-o", held),
        )
    )
    if kind == "manifest":
        path = held / "tpshard.json"
        document = changed(json.loads(path.read_bytes()), rng)
        if isinstance(document, dict) and rng.random() < 0.7:  # its author knows how the digest is made
            document["set"] = _digest(document)
        return Case(path, as_json(document, rng), on_set())
    if kind == "record":
        path = next(held.glob("rank-00001-of-*.json"))
        return Case(path, as_json(changed(json.loads(path.read_bytes()), rng), rng), on_set())
    if kind in ("sums", "metadata"):
        path = held / ("SHA256SUMS" if kind == "sums" else ".metadata")
        return Case(path, _bytes(path.read_bytes(), rng), on_set())
    if kind == "config of the set":
        path = held / "config.json"
        return Case(path, as_json(changed(json.loads(path.read_bytes()), rng), rng), on_set())
    options: tuple[object, ...] = (
        "--tp",
        rng.choice((1, 2, 4)),
        "--format",
        rng.choice((*FORMATS, "deepseek", "hf", "megatron")),
    )
    options += rng.choice(((), (), ("--pp", 2)))
    plan: tuple[object, ...] = rng.choice(
        (
            ("plan", model, *options),
            ("split", model, *options, "-o", out),
            ("inspect", model),
            ("archs", "draft", model),
            ("verify", held, "--source", model, "--tier", "exact", "--device", "cpu"),
        )
    )
    if kind == "rules":
        path = work / "llama.toml"
        return Case(path, _rules(path.read_text(), rng), ("plan", model, "--tp", 2, "--rules", path))
    name = "config.json" if kind == "config of the model" else "model.safetensors.index.json"
    path = model / name
    return Case(path, as_json(changed(json.loads(path.read_bytes()), rng), rng), plan)


def _digest(document: dict[str, Any]) -> object:
    try:
        return digest_of(document)
    except (TypeError, ValueError, AttributeError, KeyError):
        return document.get("set")


def _bytes(raw: bytes, rng: random.Random) -> bytes:
    """Content with one to three stretches changed, lost, or written twice."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 1, 1, 4, 64)))
        middle = rng.choice((b"", raw[at:end] * 2, rng.randbytes(end - at), bytes(end - at)))
        raw = raw[:at] + middle + raw[end:]
    return raw


def _rules(text: str, rng: random.Random) -> bytes:
    """A rules file with a line removed, repeated, or partly replaced."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        what = rng.random()
        if what < 0.25:
            lines.pop(at)
        elif what < 0.4:
            lines.insert(at, lines[at])
        else:
            words = lines[at].split(" ")
            words[rng.randrange(len(words))] = rng.choice(RULE_TEXTS)
            lines[at] = " ".join(words)
    return "\n".join(lines).encode()


def complaint(each: Case) -> str | None:
    """What is wrong with how a command met a damaged file; None when nothing is."""
    before = each.file.read_bytes()
    each.file.write_bytes(each.content)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    try:
        result = tpshard(*each.command)
    finally:
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) * 1024
        each.file.write_bytes(before)
    if result.code not in (0, 1, 2, 3, 4, 5, 8, 9):
        return f"exit {result.code}: {result.err}"
    if result.code and "hint: " not in result.err and result.code not in (1, 8):
        return f"no way out: {result.err}"
    if seconds > SECONDS:
        return f"{seconds:.0f} s"
    return f"{grown >> 20} MB more" if grown > BYTES else None


def run(count: int, seed: int, root: Path) -> Iterator[str]:
    """Run cases from a seed; what went wrong, a text for each."""
    stage = Stage.make(root / "stage")
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        work = root / "work"
        shutil.copytree(root / "stage", work)
        each = case(stage, work, rng)
        if said := complaint(each):
            command = " ".join(map(str, each.command))
            shown = each.content[:2000].decode(errors="replace")
            yield f"seed {seed}, case {number}: {command}\n{said}\n{each.file.name}: {shown}\n"
        shutil.rmtree(work)


def main() -> None:
    """Run as many cases as the first argument says, from the seed in the second; exit 1 on a complaint."""
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for said in run(count, seed, Path(folder)):
            failed += 1
            print(said)
    print(f"{count} damaged documents from seed {seed}: {failed} complaints")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
