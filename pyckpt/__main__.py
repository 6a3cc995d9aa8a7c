"""`python -m pyckpt` is the command `pyckpt`."""

from pyckpt.cli import main

main()
