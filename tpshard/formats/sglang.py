"""SGLang's `sharded_state`: as vLLM's, without scales, which would be unknown keys."""

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState("SGLang", "sglang.toml")
