"""From tensor names to cuts: architectures as data."""
