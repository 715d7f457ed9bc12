"""The commands `advise` and `env`, and what `plan` reckons and draws: parses, calls, prints."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tpshard.cli.console import opened
from tpshard.cli.options import (
    BATCH,
    DTYPE,
    GPUS,
    JSON,
    KV_DTYPE,
    MEMORY_NEEDED,
    MODEL,
    QUIET,
    REVISION,
    RULES,
    SEQ,
    KvDtype,
)
from tpshard.errors import UsageError
from tpshard.units import human_bytes

if TYPE_CHECKING:
    from tpshard.report.advice import Advice
    from tpshard.report.capacity import Workload
    from tpshard.report.results import PlanReport


def workload(
    batch: int | None, seq: int | None, kv_dtype: KvDtype | None, memory: float | None, bandwidth: float | None
) -> Workload:
    """What the options ask for; what they leave out has the defaults of `Workload`."""
    from tpshard.report.capacity import Workload

    given = {"batch": batch, "seq": seq}
    return Workload(
        kv_dtype=None if kv_dtype is None else kv_dtype.value,
        gpu_memory=None if memory is None else int(memory),
        bandwidth=bandwidth,
        **{name: value for name, value in given.items() if value is not None},
    )


def check_drawing(path: Path) -> None:
    """Refuse a drawing that could not be written, before anything is read."""
    if path.suffix != ".html":
        raise UsageError("a plan is drawn as HTML", path=path, hint="give --report a name that ends in .html")
    if not path.absolute().parent.is_dir():
        raise UsageError("no such directory for a report", path=path, hint="make it, or give another path to --report")


def write_drawing(path: Path, report: PlanReport) -> None:
    """Draw a plan into a file."""
    from tpshard.errors import local_error
    from tpshard.report.plan_page import draw

    try:
        path.write_text(draw(report), encoding="utf-8")
    except OSError as error:
        raise local_error(error, "cannot write the report", path) from None


def add(app: typer.Typer) -> None:
    """Add the commands."""

    @app.command()
    def advise(
        model: MODEL,
        gpus: GPUS,
        gpu_memory: MEMORY_NEEDED,
        batch: BATCH = None,
        seq: SEQ = None,
        kv_dtype: KV_DTYPE = None,
        dtype: DTYPE = None,
        revision: REVISION = None,
        rules: RULES = None,
        json: JSON = False,
        quiet: QUIET = False,
    ) -> None:
        """Say which tp to take on given devices; exit 1 when none fits.

        Every tp up to --gpus is judged: whether it cuts a unit (an attention head, a KV head, an ffn column), and
        whether weights and a KV cache for --batch sequences of --seq tokens fill at most 0.9 of a device of
        --gpu-memory GB. The rest is for activations and the runtime. Only config and headers are read, also of a Hub
        repo.

        \b
          tpshard advise ./Llama-3.1-8B --gpus 8 --gpu-memory 80
          tpshard advise org/name --gpus 8 --gpu-memory 80 --batch 32 --seq 8192 --kv-dtype float8
        """
        with opened(json, quiet) as console:
            from tpshard.api.advise import advise as advise_tp

            work = workload(batch, seq, kv_dtype, gpu_memory, None)
            cast = None if dtype is None else dtype.value
            found = advise_tp(model, gpus, work, revision=revision, rules=rules, dtype=cast)
            for warning in found.warnings:
                console.warn(warning)
            if console.as_json:
                console.data(found.to_json())
            else:
                _print_advice(found)
            if found.take is None:
                raise typer.Exit(1)
            following = ["tpshard", "plan", model, "--tp", str(found.take)]
            following += ["--revision", revision] if revision else []
            following += ["--rules", str(rules)] if rules else []
            following += ["--dtype", cast] if cast else []
            console.say(f"next: {shlex.join(following)}")

    @app.command()
    def env(json: JSON = False, quiet: QUIET = False) -> None:
        """Say what this machine can do: devices, memory, versions.

        Devices, torch, NCCL, memory, disk, and which extras are installed: what a report of a bug should have.

        \b
          tpshard env
        """
        with opened(json, quiet) as console:
            from tpshard.cli.environment import environment, lines

            found = environment(Path.cwd())
            if console.as_json:
                console.data(found)
            else:
                print(*lines(found), sep="\n")


def _print_advice(found: Advice) -> None:
    """A line for every tp, then the one to take. Of many devices the tp that would cut a unit are left out."""
    from tpshard.report.capacity import USABLE

    memory = found.workload.gpu_memory
    assert memory is not None
    print(
        f"{found.name} ({found.model_type}) on {found.gpus} devices of {human_bytes(memory)}, of which weights and "
        f"cache may fill {human_bytes(USABLE * memory)}; batch {found.workload.batch} x {found.workload.seq} tokens"
    )
    for choice in found.choices:
        if choice.possible:
            state = "fits" if choice.fits else "too large"
            needs = f"{human_bytes(choice.weights or 0)} weights + {human_bytes(choice.cache or 0)} KV cache"
            reason = "" if choice.reason == "fits" else f"; {choice.reason}"
            print(f"tp {choice.tp:<3} {state}: {needs}{reason}")
        elif found.gpus <= 16:
            print(f"tp {choice.tp:<3} not possible: {choice.reason}")
    if found.possible_above:
        print(f"possible on more devices: tp {', '.join(map(str, found.possible_above))}")
    print(f"take tp {found.take}: {found.reason}" if found.take else found.reason)
