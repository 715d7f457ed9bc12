"""`make gpu-check`: split, verify and load real shapes on this machine's GPUs, timed; one table, as JSON and Markdown.

    python tests/gpu/check.py --output DIR [--dir SCRATCH] [--seconds 460] [--small]

Needs torch, with transformers for its own row, and this repository; no network and no installation. It makes random
checkpoints (40 GB of scratch; 5 MB with --small), and after every step writes what is known so far. A step that the
time left does not allow is listed as not run. Without a GPU it says so and gives no figure of one.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import tpshard  # noqa: E402
from tests.gpu import figures, random_models  # noqa: E402
from tpshard.execute.publish import Settings  # noqa: E402
from tpshard.verifier.group import Processes  # noqa: E402
from tpshard.verifier.options import VerifyOptions  # noqa: E402
from tpshard.verifier.prompt import prompt_ids  # noqa: E402
from tpshard.verifier.run import verify  # noqa: E402

MODELS = ("gpt2", "opt", "llama-1b", "llama-7b")
SMALL_MODELS = ("gpt2", "opt", "llama")
LARGE = "llama-7b"


@dataclass
class Check:
    """A run in progress: where it works, how long it may, and the rows so far."""

    place: Path
    output: Path
    device: torch.device
    small: bool
    seconds: float
    result: dict[str, Any]
    models: Sequence[str] = ()
    begun: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)

    @property
    def gpus(self) -> int:
        return torch.cuda.device_count() if self.device.type == "cuda" else 0

    def step(self, name: str, estimate: float, work: Callable[[], dict[str, Any]], **facts: Any) -> None:
        """Run one step, if it fits, and keep its row: what it returns, or why there is nothing."""
        row: dict[str, Any] = {"step": name, **facts}
        begun = time.monotonic()
        if self.left < estimate:
            row |= {"status": "not run", "reason": f"{estimate:.0f} s wanted, {self.left:.0f} s left"}
        else:
            try:
                row |= work()
            except Exception as error:
                traceback.print_exc()
                row |= {"status": "error", "reason": f"{type(error).__name__}: {error}"}
        row["seconds"] = round(time.monotonic() - begun, 2)
        self.result["rows"].append(row)
        print(f"{name}: {row.get('status', 'done')}, {row['seconds']} s", file=sys.stderr, flush=True)
        self.write()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def write(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.begun, 1)
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "gpu.json").write_text(json.dumps(self.result, indent=1, sort_keys=True) + "\n")
        (self.output / "gpu.md").write_text(figures.markdown(self.result))


def summary(verdict: dict[str, Any]) -> dict[str, Any]:
    """The row of a verdict: outcome, figures of the tiers, canaries, times."""
    tiers = {tier["name"]: tier for tier in verdict["tiers"]}
    caught = [canary["status"] for canary in verdict["canaries"]]
    return {
        "status": verdict["verdict"],
        "reason": verdict["reason"],
        "exact": tiers["exact"]["metrics"].get("relative_error") if "exact" in tiers else None,
        "native": tiers["native"]["metrics"] if "native" in tiers else None,
        "canaries": f"{caught.count('caught')}/{len(caught)}",
        "streamed": verdict["settings"]["streamed"],
        "tier_seconds": verdict["volatile"]["tier_seconds"],
        "verify_seconds": verdict["volatile"]["seconds"],
    }


def judge(
    place: str, name: str, tp: int, device: str, team: Processes | None = None, sharing: int = 1, **options: Any
) -> dict[str, Any]:
    """One verdict as a row, with the peak of the GPU's memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    shards = Path(place) / f"{name}-tp{tp}"
    verdict = verify(VerifyOptions(shards, device=device, **options), Path(place) / name, team=team, sharing=sharing)
    row = summary(verdict.to_json())
    if device == "cuda":
        row["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return row


def in_threads(check: Check, name: str, tp: int, **options: Any) -> dict[str, Any]:
    """All ranks in this process, on one device."""
    return judge(str(check.place), name, tp, check.device.type, **options)


def one_process(rank: int, tp: int, backend: str | None, device: str, place: str, name: str, answer: str) -> None:
    """What a spawned process does: all ranks in threads, or one of a group; rank 0 leaves the row in a file."""
    row: dict[str, Any]
    if backend is None:
        row = judge(place, name, tp, device)
    else:
        torch.set_num_threads(1)
        gpus = torch.cuda.device_count() if device == "cuda" else 1
        if device == "cuda":
            torch.cuda.set_device(rank % gpus)
        dist.init_process_group(backend, init_method=f"file://{answer}.rendezvous", rank=rank, world_size=tp)
        row = judge(place, name, tp, device, team=Processes(), sharing=-(-tp // gpus))
        rows: list[Any] = [None] * tp
        dist.all_gather_object(rows, row)
        row |= {"peaks": [r.get("peak_gpu_bytes") for r in rows], "verdicts": [r["status"] for r in rows]}
        dist.destroy_process_group()
    if rank == 0:
        Path(answer).write_text(json.dumps(row))


def in_processes(check: Check, name: str, tp: int, backend: str | None) -> dict[str, Any]:
    """A process per rank, or one for all of them (no backend); ended when the time is."""
    context = multiprocessing.get_context("spawn")
    answer = check.place / f"{name}-{backend}.json"
    common = (tp, backend, check.device.type, str(check.place), name, str(answer))
    ranks = range(1 if backend is None else tp)
    workers = [context.Process(target=one_process, args=(rank, *common), daemon=True) for rank in ranks]
    for worker in workers:
        worker.start()
    try:
        # One that fails leaves the others waiting for it, so look at all of them.
        while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
            if check.left < 0:
                return {"status": "not run", "reason": "ended, because the time was"}
            time.sleep(0.1)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    if not answer.exists():
        raise RuntimeError(f"no verdict; exit codes {[worker.exitcode for worker in workers]}")
    row: dict[str, Any] = json.loads(answer.read_text())
    if len(set(row.get("verdicts", []))) > 1:
        raise RuntimeError(f"the ranks disagree: {row['verdicts']}")
    return row


def make_and_split(check: Check, name: str, widths: list[int]) -> dict[str, Any]:
    """Make a checkpoint and its shard sets, then judge their bytes (the bytes tier)."""
    begun = time.monotonic()
    size = random_models.write(check.place / name, name, small=check.small, device=check.device)
    made = time.monotonic()
    settings = Settings(fsync=False)
    equal = True
    for tp in widths:
        shards = check.place / f"{name}-tp{tp}"
        tpshard.split(check.place / name, tp, shards, settings=settings)
        equal = equal and tpshard.check(shards, check.place / name, settings=settings).equal
    return {
        "status": "pass" if equal else "fail",
        "bytes": size,
        "tp": widths,
        "make_seconds": round(made - begun, 2),
        "split_and_check_seconds": round(time.monotonic() - made, 2),
    }


def control(check: Check, name: str, tp: int) -> dict[str, Any]:
    """Two rank files exchanged: the row passes when verify fails and names them."""
    damaged = check.place / f"{name}-exchanged"
    damaged.mkdir()
    files = sorted((check.place / f"{name}-tp{tp}").iterdir())
    ranks = [file.name for file in files if file.name.startswith("rank-") and file.suffix == ".safetensors"]
    renamed = {ranks[0]: ranks[1], ranks[1]: ranks[0]}
    for file in files:
        (damaged / renamed.get(file.name, file.name)).hardlink_to(file)
    verdict = verify(VerifyOptions(damaged, tiers=("weights", "exact"), device=check.device.type), check.place / name)
    seen = all(tier.status == "fail" for tier in verdict.tiers)
    right = seen and verdict.reason == "the files of ranks 0 and 1 are exchanged"
    return {"status": "pass" if right else "fail", "reason": verdict.reason}


def plain_forward(check: Check, name: str) -> dict[str, Any]:
    """transformers' own model: to load it, a first forward pass, and a second one, on the prompt that verify uses."""
    from transformers import AutoModelForCausalLM  # before the clock starts

    def now() -> float:
        if check.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    begun = now()
    model = AutoModelForCausalLM.from_pretrained(check.place / name, dtype=torch.bfloat16, local_files_only=True)
    model.to(check.device)
    loaded = now()
    ids = prompt_ids(model.config.vocab_size, 0, 2, 16).to(check.device)
    with torch.no_grad():
        finite = bool(model(ids).logits.isfinite().all())
        first = now()
        model(ids)
        second = now()
    verified = [r for r in check.result["rows"] if r.get("model") == name and r.get("group") == "threads"]
    seconds = verified[0].get("verify_seconds") if verified else None
    plain = first - begun
    return {
        "status": "pass" if finite else "fail",
        "load_seconds": round(loaded - begun, 3),
        "first_forward_seconds": round(first - loaded, 3),
        "second_forward_seconds": round(second - first, 4),
        "verify_seconds": seconds,
        "verify_to_load_and_forward": None if seconds is None else round(seconds / plain, 1),
    }


def run(check: Check) -> None:
    """All steps, small models first: what is cut off by the time is the largest."""
    for name in check.models:
        run_model(check, name, large=name == LARGE, llama=name.startswith("llama"))
    if check.gpus < 2:
        check.result["notes"].append(f"NCCL was not run: it needs two GPUs, and there {figures.are(check.gpus)}.")


def run_model(check: Check, name: str, *, large: bool, llama: bool) -> None:
    """Every step of one model."""
    over = 4 if check.gpus >= 4 else 2
    widths = [4] if large and check.gpus not in (2, 3) else [2, 4]

    def step(what: str, estimate: float, work: Callable[[], dict[str, Any]], **facts: Any) -> None:
        check.step(f"{name}: {what}", estimate, work, model=name, **facts)

    step("made, split, bytes tier", 60 if large else 5, lambda: make_and_split(check, name, widths))
    if large or (check.small and llama):
        step("loaders", 10, lambda: figures.loader(check.place / f"{name}-tp4", check.device))
    where = "one GPU" if check.gpus else "the CPU"
    # The large one gets a process of its own, which can be ended with the time.
    threads = (lambda: in_processes(check, name, 4, None)) if large else (lambda: in_threads(check, name, 4))
    step(f"{where}, tp 4 in threads", 60 if large else 10, threads, group="threads", tp=4)
    if not llama and not check.small:
        for seed in (1, 2):
            step(f"native tier, seed {seed}", 10, lambda s=seed: in_threads(check, name, 4, tiers=("native",), seed=s))
    if not large:
        step("control, two rank files exchanged", 10, lambda: control(check, name, 4))
    if not large and (llama or not check.small):
        step(f"{where}, 2 gloo processes", 20, lambda: in_processes(check, name, 2, "gloo"), group="gloo", tp=2)
    if check.gpus >= 2:
        step(f"{over} GPUs, NCCL", 60 if large else 20, lambda: in_processes(check, name, over, "nccl"), tp=over)
    step("transformers, plain forward", 15, lambda: plain_forward(check, name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for gpu.json and gpu.md")
    parser.add_argument("--dir", type=Path, help="where to make the models [default: a temporary directory]")
    parser.add_argument("--seconds", type=float, default=460, help="begin nothing that would end later than this")
    parser.add_argument("--small", action="store_true", help="models of a few kilobytes, to try the script itself")
    parser.add_argument(
        "--models", nargs="+", choices=sorted({*MODELS, *SMALL_MODELS}), help="these of the models alone"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    found = torch.cuda.is_available()
    if options.device == "cuda" and not found:
        sys.exit("there is no GPU that torch can use here")
    device = torch.device("cuda" if found and options.device != "cpu" else "cpu")
    if device.type == "cpu":
        print("no GPU is used: this run measures nothing of one", file=sys.stderr)
        if not options.small:
            sys.exit("models of real size need a GPU; --small runs the script on a CPU")
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        result = {"environment": figures.environment(device), "small": options.small, "rows": [], "notes": []}
        models = options.models or (SMALL_MODELS if options.small else MODELS)
        check = Check(Path(folder), options.output, device, options.small, options.seconds, result, models)
        run(check)
        check.write()
    print((options.output / "gpu.md").read_text())
    sys.exit(any(row.get("status") in ("fail", "error", "inconclusive") for row in result["rows"]))


if __name__ == "__main__":
    main()
