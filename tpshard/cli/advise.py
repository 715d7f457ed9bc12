"""The commands `advise` and `env`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tpshard.cli import options as opt
from tpshard.cli.console import Console, opened
from tpshard.cli.options import again, workload
from tpshard.errors import UsageError
from tpshard.units import human_bytes

if TYPE_CHECKING:
    from tpshard.report.advice import Advice, MeshChoice

_SHOWN = 12
"""Meshes that are shown; `--all` and `--json` have every one."""


def advise(
    model: opt.MODEL,
    gpu_memory: opt.MEMORY_NEEDED,
    gpus: opt.GPUS = None,
    nodes: opt.NODES = 1,
    gpus_per_node: opt.PER_NODE = None,
    format: opt.ADVISED = "native",
    batch: opt.BATCH = None,
    seq: opt.SEQ = None,
    kv_dtype: opt.KV_DTYPE = None,
    dtype: opt.DTYPE = None,
    revision: opt.REVISION = None,
    rules: opt.RULES = None,
    follow_symlinks: opt.FOLLOW = False,
    every: Annotated[bool, typer.Option("--all", help="Every mesh, not the best ones alone.")] = False,
    json: opt.JSON = False,
    quiet: opt.QUIET = False,
) -> None:
    """Say which mesh to take on given devices; exit 1 when none fits.

    Every mesh tp x pp x ep that the devices have room for is judged: whether it cuts a unit (an attention head, a KV
    head, an ffn column, an expert, a layer) or the format cannot hold it, whether the weights and a KV cache for
    --batch sequences of --seq tokens fill at most 0.9 of a device of --gpu-memory GB, and what the ranks send. The rest
    of the memory is for activations and the runtime. The best mesh comes first: all-reduces stay in a node, no device
    is idle, few devices hold a copy, few stages. Only config and headers are read, also of a Hub repo.

    \b
      tpshard advise ./Llama-3.1-8B --gpus 8 --gpu-memory 80
      tpshard advise org/name --nodes 2 --gpus-per-node 8 --gpu-memory 80 --format vllm
      tpshard advise org/name --gpus 8 --gpu-memory 80 --batch 32 --seq 8192 --kv-dtype float8
    """
    with opened(json, quiet) as console:
        from tpshard.api.advise import advise_with
        from tpshard.api.options import AdviseOptions, ModelOptions

        source = ModelOptions(model, revision, rules, dtype, follow_symlinks=follow_symlinks)
        work = workload(batch, seq, kv_dtype, gpu_memory, None)
        found = advise_with(AdviseOptions(source, _devices(gpus, nodes, gpus_per_node), work, nodes, format))
        console.warn(*found.warnings)
        if console.as_json:
            console.data(found.to_json())
        else:
            _print_advice(console, found, every)
        if found.mesh is None:
            raise typer.Exit(1)
        following = ["tpshard", "plan", model, *_options(found.mesh, format)]
        console.say(
            f"next: {shlex.join([*following, *again(revision, rules, dtype, follow_symlinks=follow_symlinks)])}"
        )


def _devices(gpus: int | None, nodes: int, per_node: int | None) -> int:
    """How many devices there are in all."""
    if gpus is None and per_node is None:
        what, hint = "advice needs devices", "give --gpus, or --nodes and --gpus-per-node"
        raise UsageError(what, expected="how many there are", hint=hint)
    if gpus is not None and per_node is not None and gpus != nodes * per_node:
        what, found = f"{nodes} nodes of {per_node} devices are not {gpus}", f"--gpus {gpus}"
        raise UsageError(what, expected=f"--gpus {nodes * per_node}", found=found, hint="leave --gpus out")
    return gpus if gpus is not None else nodes * (per_node or 0)


def _options(choice: MeshChoice, format: str) -> list[str]:
    """A mesh and a format as other commands take them."""
    mesh = choice.mesh
    sizes = {"--tp": mesh.tp, "--pp": mesh.pp, "--ep": mesh.ep}
    given = [text for name, size in sizes.items() if size > 1 or name == "--tp" for text in (name, str(size))]
    return given if format == "native" else [*given, "--format", format]


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


def _print_advice(console: Console, found: Advice, every: bool) -> None:
    """A line for each of the best meshes, one for those that would cut a unit, then the mesh to take."""
    from tpshard.report.capacity import USABLE
    from tpshard.report.plan_rows import by_reason

    memory = found.workload.gpu_memory
    assert memory is not None
    console.show(
        f"{found.name} ({found.model_type}) on {found.devices} of {human_bytes(memory)}, of which weights and "
        f"cache may fill {human_bytes(USABLE * memory)}; batch {found.workload.batch} x {found.workload.seq} tokens"
    )
    shown = found.meshes if every else found.meshes[:_SHOWN]
    width = max(len(choice.text) for choice in shown)
    for choice in shown:
        state, full = "too large" if choice.short else "fits", choice.fullest
        needs = f"{human_bytes(full['weights'])} weights + {human_bytes(full['kv_cache'])} KV cache"
        console.show(f"{choice.text:<{width}}  {state}: {needs}; {choice.sent()}; {choice.reason}")
    if rest := len(found.meshes) - len(shown):
        fitting = sum(not choice.short for choice in found.meshes[len(shown) :])
        console.show(f"{rest} more, of which {fitting} fit (--all shows them)")
    if reasons := by_reason((choice.tp, choice.cut) for choice in found.choices if choice.cut):
        console.show(f"not possible: {'; '.join(reasons)}")
    cut = {choice.tp for choice in found.choices if choice.cut}
    for reason in dict.fromkeys(why for tp, _, ep, why in found.not_held if ep > 1 or tp not in cut):
        console.show(f"not held: {reason}")
    if found.possible_above:
        console.show(f"possible on more devices: tp {', '.join(map(str, found.possible_above))}")
    console.show(f"take {found.mesh.text}: {found.reason}" if found.mesh else found.reason)
