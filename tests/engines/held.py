"""What vLLM's own classes hold after loading, written by plain gloo processes without starting an engine.

Runs in the engines' environment. Reads jobs as JSON lines on stdin, answers each with a JSON line on stdout:
{"model": DIR, "tp": N, "load_format": "auto" | "sharded_state", "out": DIR} → {"ok": true} or {"error": TEXT}.
Each rank writes OUT/rank-N.safetensors: the tensors that `ShardedStateLoader` of a fresh model would look for.
vLLM keeps state between models of one process, so every job runs in forked processes of its own.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import traceback
from pathlib import Path

os.environ |= {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

UNSET = 7.0
"""Parameters hold this before loading, so that one that the loader leaves out is seen."""


class InternLM2Config(LlamaConfig):
    """Its published config is code of its own, which nobody has to run for a few numbers."""

    model_type = "internlm2"


class Complaints(logging.Handler):
    """Collects what the loader warns of: another shape or dtype than the parameter's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(job: dict[str, object], rank: int, port: int) -> None:
    """One rank's model, loaded and written; raises for whatever vLLM refuses, and for a parameter left unset."""
    tp, load_format = int(str(job["tp"])), str(job["load_format"])
    arguments = EngineArgs(
        model=str(job["model"]),
        skip_tokenizer_init=True,
        tensor_parallel_size=tp,
        load_format=load_format,
        enforce_eager=True,
        max_model_len=64,
    )
    config = arguments.create_engine_config()
    complaints = Complaints()
    logging.getLogger(ShardedStateLoader.__module__).addHandler(complaints)
    with set_current_vllm_config(config):
        init_distributed_environment(tp, rank, f"tcp://127.0.0.1:{port}", rank, backend="gloo")
        initialize_model_parallel(tp)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            model = initialize_model(vllm_config=config)
        fresh = set(ShardedStateLoader._filter_subtensors(model.state_dict()))
        for parameter in model.parameters():
            parameter.data.fill_(UNSET)
        loader = ShardedStateLoader if load_format == "sharded_state" else DefaultModelLoader
        loader(config.load_config).load_weights(model, config.model_config)
        held = ShardedStateLoader._filter_subtensors(model.state_dict())
    if fresh != set(held):
        raise RuntimeError(f"loading adds or removes {sorted(fresh ^ set(held))}")
    unset = [name for name, tensor in held.items() if tensor.numel() > 1 and (tensor == UNSET).all()]
    if unset:
        raise RuntimeError(f"not loaded: {unset}")
    if load_format == "sharded_state" and complaints.lines:
        raise RuntimeError("; ".join(complaints.lines))
    save_file({name: tensor.detach().clone() for name, tensor in held.items()}, f"{job['out']}/rank-{rank}.safetensors")


def answer(job: dict[str, object]) -> dict[str, object]:
    """Run a job in one forked process a rank, and say how it went."""
    out = Path(str(job["out"]))
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(int(str(job["tp"]))):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(2, 1)  # stdout is for answers
                load(job, rank, port)
                status = 0
            except BaseException:
                (out / f"error-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        children.append(child)
    failed = [os.waitpid(child, 0)[1] != 0 for child in children]
    if not any(failed):
        return {"ok": True}
    texts = [(out / f"error-{rank}.txt") for rank, bad in enumerate(failed) if bad]
    return {"error": texts[0].read_text() if texts[0].exists() else "the process was killed"}


def main() -> None:
    """Answer jobs until stdin ends."""
    torch.set_num_threads(1)
    AutoConfig.register("internlm2", InternLM2Config)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
