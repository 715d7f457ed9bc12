"""vLLM's `sharded_state`."""

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState("vLLM", "vllm.toml", has_stages=True, nested="vllm_nested.toml")
