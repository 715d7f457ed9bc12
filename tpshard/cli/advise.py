"""The commands `advise` and `env`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import Console, opened
from tpshard.cli.options import again, workload
from tpshard.units import human_bytes

if TYPE_CHECKING:
    from tpshard.report.advice import Advice


def advise(
    model: opt.MODEL,
    gpus: opt.GPUS,
    gpu_memory: opt.MEMORY_NEEDED,
    batch: opt.BATCH = None,
    seq: opt.SEQ = None,
    kv_dtype: opt.KV_DTYPE = None,
    dtype: opt.DTYPE = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    follow_symlinks: opt.FOLLOW = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
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
        from tpshard.api.advise import advise_with
        from tpshard.api.options import AdviseOptions, ModelOptions

        source = ModelOptions(model, revision, rules, dtype, follow_symlinks=follow_symlinks)
        found = advise_with(AdviseOptions(source, gpus, workload(batch, seq, kv_dtype, gpu_memory, None)))
        console.warn(*found.warnings)
        if console.as_json:
            console.data(found.to_json())
        else:
            _print_advice(console, found)
        if found.take is None:
            raise typer.Exit(1)
        following = ["tpshard", "plan", model, "--tp", str(found.take)]
        console.say(
            f"next: {shlex.join([*following, *again(revision, rules, dtype, follow_symlinks=follow_symlinks)])}"
        )


def env(json: opt.JSON = False, quiet: opt.QUIET = False) -> None:
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
            console.show(*lines(found))


def _print_advice(console: Console, found: Advice) -> None:
    """A line for every tp that is possible, one for those that would cut a unit, then the tp to take."""
    from tpshard.report.capacity import USABLE
    from tpshard.report.plan_rows import by_reason

    memory = found.workload.gpu_memory
    assert memory is not None
    console.show(
        f"{found.name} ({found.model_type}) on {found.gpus} devices of {human_bytes(memory)}, of which weights and "
        f"cache may fill {human_bytes(USABLE * memory)}; batch {found.workload.batch} x {found.workload.seq} tokens"
    )
    for choice in found.choices:
        if choice.possible:
            state = "fits" if choice.fits else "too large"
            needs = f"{human_bytes(choice.weights or 0)} weights + {human_bytes(choice.kv_cache or 0)} KV cache"
            reason = "" if choice.reason == "fits" else f"; {choice.reason}"
            console.show(f"tp {choice.tp:<3} {state}: {needs}{reason}")
    if reasons := by_reason((choice.tp, choice.cut) for choice in found.choices if not choice.possible):
        console.show(f"not possible: {'; '.join(reasons)}")
    if found.possible_above:
        console.show(f"possible on more devices: tp {', '.join(map(str, found.possible_above))}")
    console.show(f"take tp {found.take}: {found.reason}" if found.take else found.reason)
