"""transformers' own model classes, run tensor-parallel from outside."""
