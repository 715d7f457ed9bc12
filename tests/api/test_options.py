"""The options of the verbs: what the commands and the Python functions make of what they are given."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer

import tpshard as package
from tests.helpers.command import tpshard
from tpshard import Settings, Workload
from tpshard.api.options import (
    AdviseOptions,
    CheckOptions,
    MergeOptions,
    ModelOptions,
    PlanOptions,
    ReshardOptions,
    SplitOptions,
    TargetOptions,
)
from tpshard.cli.main import app
from tpshard.errors import UnsupportedError, UsageError
from tpshard.formats.split import Options
from tpshard.verifier.options import VerifyOptions

WORK = Workload(batch=3, seq=77, kv_dtype="float8", gpu_memory=80 * 10**9, bandwidth=450e9)
MODEL = ModelOptions("x", "branch", "r.toml", "float16", True)
TARGET = TargetOptions(2, True, ["0.6", "0.4"], 640, 5_000_000, "vllm", "0.32", 3, [5, 6, 7], 2)
HOW = Settings(workers=3, checksum=False, fsync=False, overwrite=True)
"""Nothing in these has its default, and no two options that could be exchanged are alike."""
MODEL_TEXT = "--revision branch --rules r.toml"
TARGET_TEXT = (
    "--tp 2 --uneven --shares 0.6,0.4 --pad-vocab-to 640 --max-file-size 5MB --format vllm --engine-version 0.32 "
    "--pp 3 --pp-layers 5,6,7 --ep 2"
)
WORK_TEXT = "--batch 3 --seq 77 --kv-dtype float8 --gpu-memory 80"
HOW_TEXT = "--workers 3 --overwrite --no-fsync"
MODEL_WORDS = {"revision": "branch", "rules": "r.toml"}
TARGET_WORDS: dict[str, Any] = {
    **{"uneven": True, "shares": ["0.6", "0.4"], "pad_vocab_to": 640, "max_file_size": 5_000_000},
    **{"format": "vllm", "engine_version": "0.32", "pp": 3, "pp_layers": [5, 6, 7], "ep": 2},
}


@dataclass(frozen=True)
class Case:
    """A verb: the arguments of its command and of its function that set everything, and what they come to."""

    command: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    expected: Any


RANKS = {"out": "o", "ranks": [1]}
FOLLOW: dict[str, Any] = {"follow_symlinks": True}
CASES = {
    "plan": Case(
        f"x {MODEL_TEXT} --dtype float16 --cast-all --allow-pickle --follow-symlinks {TARGET_TEXT} {WORK_TEXT} "
        "--bandwidth 450",
        ("x", 2),
        {
            **MODEL_WORDS,
            **TARGET_WORDS,
            "dtype": "float16",
            "cast_all": True,
            "allow_pickle": True,
            "workload": WORK,
            **FOLLOW,
        },
        PlanOptions(replace(MODEL, cast_all=True, **FOLLOW), TARGET, WORK),
    ),
    "split": Case(
        f"x {MODEL_TEXT} --dtype float16 --cast-all --allow-overflow --allow-pickle --follow-symlinks {TARGET_TEXT} "
        f"-o o --ranks 1 {HOW_TEXT} --checksum none",
        ("x", 2),
        {
            **{
                **MODEL_WORDS,
                **FOLLOW,
                **TARGET_WORDS,
                **RANKS,
                "dtype": "float16",
                "allow_pickle": True,
                "settings": HOW,
            },
            **{"cast_all": True, "allow_overflow": True},
        },
        SplitOptions(
            model=replace(MODEL, cast_all=True, allow_overflow=True, **FOLLOW),
            target=TARGET,
            out=Path("o"),
            ranks=[1],
            settings=HOW,
        ),
    ),
    "reshard": Case(
        f"s {TARGET_TEXT} --allow-pickle -o o --ranks 1 {HOW_TEXT} --checksum none",
        (Path("s"), 2),
        {**TARGET_WORDS, **RANKS, "allow_pickle": True, "settings": HOW},
        ReshardOptions(shards=Path("s"), target=TARGET, out=Path("o"), ranks=[1], allow_pickle=True, settings=HOW),
    ),
    "merge": Case(
        f"s -o o --max-file-size 5MB --allow-pickle --vocab-size 640 {HOW_TEXT}",
        (Path("s"),),
        {"out": "o", "max_file_size": 5_000_000, "allow_pickle": True, "vocab_size": 640, "settings": HOW},
        MergeOptions(Path("s"), Path("o"), 5_000_000, True, 640, HOW),
    ),
    "check": Case(
        f"s --source x --tp 5 {MODEL_TEXT} --allow-pickle --follow-symlinks --workers 3",
        (Path("s"), "x"),
        {**MODEL_WORDS, **FOLLOW, "tp": 5, "allow_pickle": True, "settings": Settings(3, False)},
        CheckOptions(Path("s"), "x", 5, "branch", "r.toml", True, settings=Settings(3, False), **FOLLOW),
    ),
    "advise": Case(
        f"x --gpus 6 --nodes 2 --gpus-per-node 3 --format vllm {MODEL_TEXT} --dtype float16 --follow-symlinks "
        f"{WORK_TEXT}",
        ("x", 6, replace(WORK, bandwidth=None)),
        {**MODEL_WORDS, **FOLLOW, "dtype": "float16", "nodes": 2, "format": "vllm"},
        AdviseOptions(replace(MODEL, allow_pickle=False, **FOLLOW), 6, replace(WORK, bandwidth=None), 2, "vllm"),
    ),
    "verify": Case(
        f"s --source x {MODEL_TEXT} --allow-pickle --follow-symlinks --tier exact,bytes --device cpu --tokens 7 "
        "--prompt text --seed 9 --layers 0,-1 --float32 --stream --sequence-parallel --reference transformers "
        "--engine tpshard --nproc-per-node 4 --allow-not-run mtp --allow-not-run model.mtp",
        (Path("s"), "x"),
        {
            **{
                **MODEL_WORDS,
                **FOLLOW,
                "allow_pickle": True,
                "tiers": ["exact", "bytes"],
                "device": "cpu",
                "tokens": 7,
            },
            **{"prompt": "text", "seed": 9, "layers": [0, -1], "float32": True, "stream": True, "nproc": 4},
            **{"sequence_parallel": True, "reference": "transformers", "engine": "tpshard"},
            "allow_not_run": ["mtp", "model.mtp"],
        },
        VerifyOptions(
            **{"shards": Path("s"), "source": "x", "tiers": ("exact", "bytes"), "device": "cpu", "tokens": 7},
            **{"seed": 9, "float32": True, "layers": (0, -1), "stream": True, "sequence_parallel": True},
            **{"reference": "transformers", "engine": "tpshard", "prompt": "text", "revision": "branch"},
            **{"rules": "r.toml", "allow_pickle": True, "nproc": 4, "allow_not_run": ("mtp", "model.mtp")},
            **FOLLOW,
        ),
    ),
}
PRINTED = {"json", "quiet", "every", "report", "dry_run", "grouped"}
"""Parameters of commands that say how a result is shown, or which verb is meant."""


def comparable(options: Any) -> Any:
    """Options without what differs between a command and a function by design: progress, and `Path` or text."""
    changes: dict[str, Any] = {}
    if getattr(options, "out", None) is not None:
        changes["out"] = Path(options.out)
    if hasattr(options, "settings"):
        silent = Settings()
        how = replace(options.settings, start=silent.start, progress=silent.progress, files=silent.files)
        changes["settings"] = {field.name: getattr(how, field.name) for field in dataclasses.fields(how)[:4]}
    return replace(options, **changes)


def given(verb: str, call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The options that reach the function which runs a verb."""
    seen: list[Any] = []

    def called(options: object, *others: object) -> None:
        seen.append(options)
        raise UsageError("called")

    monkeypatch.setattr(f"tpshard.{package._MODULES[verb]}.{verb}_with", called)
    call()
    (options,) = seen
    return options


def by_function(verb: str, *arguments: object, **keywords: object) -> Callable[[], None]:
    def call() -> None:
        with pytest.raises(UsageError, match="called"):
            getattr(package, verb)(*arguments, **keywords)

    return call


@pytest.mark.parametrize("verb", CASES)
def test_everything_reaches_its_option(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[verb]
    for call in (lambda: tpshard(verb, *case.command.split()), by_function(verb, *case.arguments, **case.keywords)):
        assert comparable(given(verb, call, monkeypatch)) == comparable(case.expected)


@pytest.mark.parametrize("verb", CASES)
def test_the_cases_leave_nothing_out(verb: str) -> None:
    case = CASES[verb]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    words = case.command.split()
    for parameter in command.params:
        if parameter.param_type_name == "option" and parameter.name not in PRINTED:
            assert set(parameter.opts) & set(words), parameter.name
    for index, (name, parameter) in enumerate(inspect.signature(getattr(package, verb)).parameters.items()):
        assert parameter.kind is not parameter.VAR_KEYWORD
        if name in case.keywords:
            assert case.keywords[name] != parameter.default, name
        else:
            assert index < len(case.arguments) or name in ("progress", "say"), name


@pytest.mark.parametrize("verb", CASES)
def test_without_options_both_have_the_same_defaults(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed: dict[str, tuple[str, tuple[Any, ...]]] = {
        "plan": ("x --tp 2", ("x", 2)),
        "split": ("x --tp 2", ("x", 2)),
        "reshard": ("s --tp 2", (Path("s"), 2)),
        "advise": ("x --gpus 2 --gpu-memory 80", ("x", 2, Workload(gpu_memory=80 * 10**9))),
    }
    command, arguments = needed.get(verb, ("s", (Path("s"),)))
    one = given(verb, lambda: tpshard(verb, *command.split()), monkeypatch)
    other = given(verb, by_function(verb, *arguments), monkeypatch)
    if verb == "plan":
        assert (one.workload, other.workload) == (Workload(), None)  # which is the same
        one, other = replace(one, workload=None), other
    if verb in ("merge", "check"):  # they write no checksums, and check writes nothing
        one, other = (replace(each, settings=Settings()) for each in (one, other))
    assert comparable(one) == comparable(other)


def test_a_dry_run_of_a_split_is_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    words, cast = CASES["split"].command.split(), replace(MODEL, cast_all=True, allow_overflow=True, **FOLLOW)
    assert given("plan", lambda: tpshard("split", *words, "--dry-run"), monkeypatch) == PlanOptions(cast, TARGET)


def test_the_layout_as_formats_take_it() -> None:
    assert TARGET.layout == Options(2, True, ("3/5", "2/5"), 640, 5_000_000, "vllm", "0.32", 3, (5, 6, 7), 2)
    assert TargetOptions(2).layout == Options(2) and TargetOptions(2, shares=[0.50, 1]).layout.shares == ("1/2", "1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TargetOptions(0), "tp, pp and ep must be at least 1"),
        (lambda: TargetOptions(4, ep=3), "ep 3 does not divide tp 4"),
        (lambda: TargetOptions(4, pp=2, pp_layers=[3]), "one number for each stage"),
        (lambda: TargetOptions(2, max_file_size=0), "--max-file-size must be positive"),
        (lambda: TargetOptions(2, shares=["1"]), "one positive number for each rank"),
        (lambda: TargetOptions(2, shares=["1", "0"]), "one positive number for each rank"),
        (lambda: TargetOptions(2, shares=["1", "a"]), "--shares takes numbers"),
        (lambda: TargetOptions(2, shares=["1", "1/0"]), "--shares takes numbers"),
        (lambda: SplitOptions(model=MODEL, target=TARGET, ranks=[6]), "expected 0 to 5; found 6"),
        (lambda: SplitOptions(model=MODEL, target=TARGET, ranks=[-1, 0]), "expected 0 to 5; found -1, 0"),
        (lambda: ReshardOptions(shards="s", target=TARGET, ranks=[]), "--ranks takes ranks of the set"),
        (lambda: ReshardOptions(shards="s", target=TargetOptions(1, format="hf"), ranks=[0]), "a format with ranks"),
        (lambda: AdviseOptions(MODEL, 0, WORK), "advice needs devices"),
        (lambda: AdviseOptions(MODEL, 1, Workload()), "advice needs devices"),
    ],
)
def test_options_that_cannot_be_are_refused_when_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_dtype_that_nothing_is_cast_to() -> None:
    with pytest.raises(UnsupportedError, match="cannot cast to int4"):
        ModelOptions("x", dtype="int4")


def test_ranks_are_written_once_and_in_order() -> None:
    assert SplitOptions(model=MODEL, target=TARGET, ranks=iter([1, 0, 1])).chosen == [0, 1]
    assert SplitOptions(model=MODEL, target=TARGET).chosen is None
