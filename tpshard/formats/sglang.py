"""SGLang's `sharded_state`: as vLLM's, without scales, which would be unknown keys."""

from __future__ import annotations

from tpshard.formats.sharded_state import ShardedState

FORMAT = ShardedState("SGLang", "sglang.toml")
