"""`python -m tpshard`."""

from tpshard.cli import run

run()
