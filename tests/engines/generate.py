"""Start vLLM on a model and print greedy tokens with their logprobs as JSON: generate.py MODEL TP LOAD_FORMAT [SAVED].

Runs in the engines' environment, on CPU cores 0 to TP - 1. SAVED: where vLLM then saves the model as `sharded_state`.
"""

from __future__ import annotations

import json
import os
import sys

PROMPTS = ([1, 5, 9, 17, 33], [1, 700, 2, 300, 8, 250, 90, 11], [42])
TOKENS = 12


def main(model: str, tp: int, load_format: str, saved: str | None = None) -> None:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp))),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        tensor_parallel_size=tp,
        load_format=load_format,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        seed=0,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=5, ignore_eos=True, detokenize=False)
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [token % vocabulary for token in prompt]} for prompt in PROMPTS]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    results = []
    for output in outputs:
        completion = output.outputs[0]
        logprobs = [sorted((token, each.logprob) for token, each in step.items()) for step in completion.logprobs]
        results.append({"tokens": list(completion.token_ids), "logprobs": logprobs})
    if saved is not None:
        engine.llm_engine.engine_core.save_sharded_state(path=saved, pattern=None, max_size=None)
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
