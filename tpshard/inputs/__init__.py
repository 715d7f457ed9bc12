"""What is at a path or repo: checkpoints and shard sets."""
