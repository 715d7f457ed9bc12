"""vLLM's `sharded_state`."""

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState("vLLM", "vllm.toml", "how vLLM fuses their scales is not known here yet")
