"""`make bench-others`: tpshard beside other tools at their own jobs, in one run: time, memory, and equal bytes.

The other tools' code is not part of this repository: give where yours lies, and jobs without it are left out. Both
sides read the same files, take turns, and the tensors that they write are compared bit by bit in every round. Linux.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from tests.bench.bench import TPSHARD, machine, touch
from tests.bench.process_tree import Run, measure
from tests.bench.synthetic import LLAMA_1B, deepseek_tensors, llama_tensors, write

HERE = Path(__file__).parent
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu",
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "attention_bias": False,
         "mlp_bias": False, "tie_word_embeddings": False}  # fmt: skip
SMALL = {"num_hidden_layers": 2, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
DEEPSEEK = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 12, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 129280,
            "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
            "first_k_dense_replace": 1, "moe_intermediate_size": 512, "n_routed_experts": 32, "n_shared_experts": 1,
            "num_nextn_predict_layers": 0, "tie_word_embeddings": False}  # fmt: skip
ENGINE = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
          "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}  # fmt: skip
REMARKS = """\
vLLM's figures are those of an engine, which starts, runs a first batch, and reserves a KV cache of 1 GiB for each rank.
dcp.save writes one file of whole tensors; tpshard the shares of four ranks; torch's reader makes the same of both.
Of transformers' script its `write_model` was called, so without a tokenizer, on files without tpshard's manifest.
The commands, and the sha256 of the other side's script, are in the JSON file beside this page."""
SIDES = THEIRS, OURS, BARE = "theirs", "tpshard", "bare"
Tensors = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Job:
    """The same work done by another tool and by tpshard: a shell command for each of `SIDES`, which writes that name.

    `read` gives the tensors of what was written, by name.
    """

    name: str
    source: str
    script: Path
    commands: dict[str, str]
    read: Callable[[Path], Iterator[tuple[str, torch.Tensor]]]


def by_file(out: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a directory's safetensors files, by name, and by rank where the files have ranks' names."""
    for path in sorted(out.glob("*.safetensors")):
        rank = path.name.partition("-part-")[0] if "-part-" in path.name else ""
        rank = path.name if path.name.endswith("-mp4.safetensors") else rank
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield f"{rank}:{name}", file.get_tensor(name)


def by_dcp(out: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a DCP checkpoint, as torch's reader puts them together."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(out)
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        state: dict[str, Any] = {name: torch.empty(entry.size, dtype=entry.properties.dtype)}  # type: ignore[union-attr]
        dcp.load(state, storage_reader=reader, no_dist=True)
        yield name, state[name]


def digests(tensors: Tensors) -> dict[str, str]:
    """What stands for each tensor's dtype, shape and bits."""
    found: dict[str, str] = {}
    for name, tensor in tensors:
        assert name not in found, f"{name} is there twice"
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        found[name] = f"{tensor.dtype} {list(tensor.shape)} {hashlib.blake2b(data).hexdigest()}"
    return found


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """The first tensor that differs between two sides, None when they are equal."""
    names = sorted(ours.keys() | theirs.keys())
    return next((name for name in names if ours.get(name) != theirs.get(name)), None)


def all_files(out: Path) -> str:
    """One digest of every file of a directory, names and contents."""
    found = hashlib.blake2b()
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found.update(f"{path.relative_to(out)} {hashlib.file_digest(file, 'blake2b').hexdigest()}\n".encode())
    return found.hexdigest()


def jobs(options: argparse.Namespace) -> list[Job]:
    """The jobs whose other side is here."""
    python, found = sys.executable, []

    def add(name: str, source: str, script: Path, theirs: str, ours: str, read: Any, unchecked: str = "") -> None:
        same, flags = f"{TPSHARD} {ours} -o", "--workers 2 -q"
        commands = {
            THEIRS: theirs,
            OURS: f"{same} {OURS} {flags}",
            BARE: f"{same} {BARE} --no-fsync {unchecked} {flags}",
        }
        found.append(Job(name, source, script, commands, read))

    none = "--checksum none"
    if options.deepseek:
        script = options.deepseek.resolve() / "inference" / "convert.py"
        theirs = f"{python} {script} --hf-ckpt-path deepseek --save-path {THEIRS} --n-experts 32 --model-parallel 4"
        ours = "split deepseek --tp 4 --format deepseek"
        add("DeepSeek's convert.py, tp 4", "deepseek", script, theirs, ours, by_file, none)
    if options.vllm_python and options.vllm_script:
        script = options.vllm_script.resolve()
        theirs = (
            f"{options.vllm_python.absolute()} {script} --model llama --tensor-parallel-size 2 --output {THEIRS} "
            "--enforce-eager --max-model-len 64 --max-num-seqs 4 --skip-tokenizer-init"
        )
        add(
            "vLLM's save_sharded_state, tp 2",
            "llama",
            script,
            theirs,
            "split llama --tp 2 --format vllm",
            by_file,
            none,
        )
    script = HERE / "whole_to_dcp.py"
    theirs = f"{python} {script} llama {THEIRS}"
    add("whole into memory, torch's dcp.save", "llama", script, theirs, "split llama --tp 4 --format dcp", by_dcp, none)
    if options.transformers_script:
        script = options.transformers_script.resolve()
        call = f"write_model('{THEIRS}', 'meta', num_shards=4, llama_version='2', vocab_size=32000)"
        theirs = f'PYTHONPATH={script.parent} {python} -c "from {script.stem} import write_model; {call}"'
        add("transformers' convert_llama_weights_to_hf", "meta", script, theirs, "merge meta --allow-pickle", by_file)
    return found


def make_sources(place: Path, small: bool) -> dict[str, int]:
    """The checkpoints that the jobs read, and the bytes of their tensors."""
    llama = LLAMA | LLAMA_1B | (SMALL if small else {})
    deepseek = DEEPSEEK | ({"num_hidden_layers": 2, "vocab_size": 1024} if small else {})
    last = f"model.layers.{deepseek['num_hidden_layers']}."  # what predicts a further token: not in convert.py's map
    tensors = [tensor for tensor in deepseek_tensors(deepseek) if not tensor[0].startswith(last)]
    sizes = {
        "llama": write(place / "llama", llama, llama_tensors(llama), data=True),
        "deepseek": write(place / "deepseek", deepseek, tensors, data=True),
    }
    # As Meta publishes: no manifest, no records.
    made = [TPSHARD, "split", "llama", "--tp", "4", "--format", "meta", "-o", "made", "-q"]
    subprocess.run(made, cwd=place, check=True, stdout=subprocess.DEVNULL)
    (place / "meta").mkdir()
    for path in [*(place / "made").glob("*.pth"), place / "made" / "params.json"]:
        path.rename(place / "meta" / path.name)
    shutil.rmtree(place / "made")
    return sizes | {"meta": sizes["llama"]}


def once(job: Job, place: Path, memory: int) -> dict[str, Any]:
    """One run of each side, and what they wrote compared; RuntimeError for a difference."""
    runs: dict[str, Run] = {}
    found: dict[str, dict[str, str]] = {}
    files: dict[str, str] = {}
    for side, command in job.commands.items():
        os.sync()
        touch(memory)
        runs[side] = measure(command, place, {**os.environ, **ENGINE}, place / "log")
        found[side] = digests(job.read(place / side))
        files[side] = all_files(place / side)
        shutil.rmtree(place / side)
    for side in (OURS, BARE):
        if name := difference(found[side], found[THEIRS]):
            raise RuntimeError(f"{job.name}: {name} differs: {found[side].get(name)}, {found[THEIRS].get(name)}")
    return {"runs": {side: asdict(run) for side, run in runs.items()}, "files": files, "tensors": len(found[OURS])}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each side, how many times as much the others took, and whether all rounds wrote the same files."""
    medians = {
        side: {key: statistics.median(one["runs"][side][key] for one in rounds) for key in rounds[0]["runs"][side]}
        for side in SIDES
    }
    same = {side: len({one["files"][side] for one in rounds}) == 1 for side in SIDES}
    ratios = {key: medians[THEIRS][key] / medians[OURS][key] for key in medians[OURS]}
    about = {"rounds": rounds, "tensors": rounds[0]["tensors"], "same_files": same}
    return about | {"medians": medians, "ratios": ratios}


def markdown(result: dict[str, Any]) -> str:
    """The page of a result: a table of seconds and one of memory."""
    host, done = result["machine"], result["jobs"]
    repeat = max(len(one["rounds"]) for one in done.values())
    lines = [
        f"# Beside other tools, {result['date']}",
        "",
        f"{host['cpu']}, {host['cores']} cores, {host['memory_bytes'] / 2**30:.0f} GiB, {host['system']}, Python",
        f"{host['python']}; load average when it began {host['load']:.1f}. {result['note']}".rstrip(),
        f"{', '.join(result['versions'])}.",
        "",
        f"Medians of {repeat} interleaved runs, page cache warm, start-up of every command included. A ratio above",
        "1 means that the other tool takes more. In every round what both sides wrote was compared, tensor by tensor,",
        "bit by bit: equal. Of the others only dcp.save waits for the disk; none writes checksums.",
        "",
        "| the other tool's job | source | tensors | seconds | tpshard | ratio | without checksum and fsync | ratio "
        "| same files each time | tpshard |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    said = {True: "yes", False: "no"} if repeat > 1 else {True: "–"}
    for name, one in done.items():
        theirs, ours, bare = (one["medians"][side]["seconds"] for side in SIDES)
        size = one["bytes"] / 1e9
        lines.append(
            f"| {name} | {size:.2f} GB | {one['tensors']} "
            f"| {theirs:.1f} | {ours:.1f} | **{theirs / ours:.1f}** | {bare:.1f} | **{theirs / bare:.1f}** "
            + "".join(f"| {said[one['same_files'][side]]} " for side in (THEIRS, OURS))
            + "|"
        )
    lines += [
        "",
        "Peak memory in MB, summed over all processes of a command. Resident counts pages of mapped files; allocated",
        "does not.",
        "",
        "| the other tool's job | resident | tpshard | ratio | allocated | tpshard |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in done.items():
        resident, allocated = (
            [one["medians"][side][kind] / 1e6 for side in (THEIRS, OURS)] for kind in ("resident", "anonymous")
        )
        ratio = one["ratios"]["resident"]
        lines.append(f"| {name} | {resident[0]:,.0f} | {resident[1]:,.0f} | **{ratio:.1f}** |")
        lines[-1] += f" {allocated[0]:,.0f} | {allocated[1]:,.0f} |"
    lines += ["", REMARKS]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--deepseek", type=Path, help="a checkout of deepseek-ai/DeepSeek-V3")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter of an environment with vLLM for CPUs")
    parser.add_argument("--vllm-script", type=Path, help="vLLM's examples/…/save_sharded_state_offline.py")
    parser.add_argument("--transformers-script", type=Path, help="transformers' convert_llama_weights_to_hf.py")
    parser.add_argument("--dir", type=Path, help="where to work; 15 GB [default: a temporary one]")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="small checkpoints, to see whether all of it runs")
    parser.add_argument("--note", default="", help="a sentence for the page, as on what else the machine did")
    parser.add_argument("--output", type=Path, help="write PREFIX.json and PREFIX.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as temporary:
        place = Path(temporary)
        result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "machine": machine(), "jobs": {}}
        result["note"] = options.note
        result["versions"] = [f"{name} {version(name)}" for name in ("tpshard", "torch", "safetensors", "transformers")]
        if options.vllm_python:
            ask = [options.vllm_python, "-c", "import vllm; print(f'vLLM {vllm.__version__}')"]
            result["versions"].append(
                subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split("\n")[-2]
            )
        sizes = make_sources(place, options.small)
        todo = jobs(options)
        rounds: dict[str, list[dict[str, Any]]] = {job.name: [] for job in todo}
        for number in range(options.repeat):
            for job in todo:
                print(f"round {number + 1}: {job.name}", file=sys.stderr)
                rounds[job.name].append(once(job, place, 2 * sizes[job.source]))
        for job in todo:
            commands = {side: re.sub(r"/\S*/", "", command) for side, command in job.commands.items()}  # no paths
            about = {"bytes": sizes[job.source], "commands": commands, "script": job.script.name}
            about["script_sha256"] = hashlib.sha256(job.script.read_bytes()).hexdigest()
            result["jobs"][job.name] = about | summary(rounds[job.name])
    text = markdown(result)
    print(text)
    if options.output:
        options.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
