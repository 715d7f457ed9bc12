"""A tensor-parallel forward pass that proves that shards compute the same function as the model."""
