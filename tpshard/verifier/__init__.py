"""A tensor-parallel forward pass that proves shards equal to the model; it shares no code with what made them."""
