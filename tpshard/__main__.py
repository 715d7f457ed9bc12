"""`python -m tpshard`."""

from tpshard.cli.main import run

run()
