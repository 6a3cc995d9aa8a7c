"""What the command lines of the examples have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def parser_of(doc: str | None, steps: int) -> argparse.ArgumentParser:
    """A parser with --text and --steps, whose default is `steps`; `doc` is the text of --help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=a_file, default=argparse.__file__, help="a file, read as bytes")
    parser.add_argument("--steps", type=at_least(1), default=steps)
    return parser


def a_file(given: str) -> Path:
    if not Path(given).is_file():
        raise argparse.ArgumentTypeError(f"{given} is no file")
    return Path(given)


def a_new_folder(given: str) -> Path:
    if Path(given).exists():
        raise argparse.ArgumentTypeError(f"{given} exists already; give another folder")
    return Path(given)


def a_checkpoint(given: str) -> Path:
    if not (Path(given) / ".metadata").is_file():
        raise argparse.ArgumentTypeError(f"{given} is no folder of a checkpoint")
    return Path(given)


def at_least(least: int) -> Callable[[str], int]:
    def number(given: str) -> int:
        value = int(given)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {given}")
        return value

    return number


def text_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bytes:
    """The bytes of --text, of which there are --seq-len at least."""
    text: bytes = args.text.read_bytes()
    if len(text) < args.seq_len:
        parser.error(f"{args.text} has {len(text)} bytes, fewer than --seq-len {args.seq_len}; give a longer text")
    return text
