"""`python -m tpshard`."""

from tpshard.cli import main

main()
