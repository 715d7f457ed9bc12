"""On-disk formats, one module each: `native` (per-rank safetensors with a manifest) and `hf` (an ordinary checkpoint)."""
