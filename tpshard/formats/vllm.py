"""vLLM's `sharded_state`."""

from __future__ import annotations

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState("vLLM", "vllm.toml")
