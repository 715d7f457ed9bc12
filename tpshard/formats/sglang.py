"""SGLang's `sharded_state`: as vLLM's, without scales, which would be unknown keys."""

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState(
    "SGLang",
    "sglang.toml",
    "SGLang loads such a file into parameters that it has repacked for the kernel of the GPU at hand",
)
