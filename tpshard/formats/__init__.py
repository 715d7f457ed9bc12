"""On-disk formats, one module each: `native` (a file per rank, with a manifest) and `hf` (an ordinary checkpoint)."""
