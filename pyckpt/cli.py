"""The command `pyckpt`. Each command reads its flags and calls a function of another module, nothing more.

typer and rich are imported late, so that their absence gives a clear line instead of a traceback.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import typer

_HELP = "Train transformers at any sequence length on a fixed amount of memory."
_TRAIN_HELP = (
    "Train a causal language model on text, or on Python's own library if none is given; then plot its loss, "
    "write a sample and save it in Hugging Face's format. Ctrl-C saves a checkpoint; --resume goes on from "
    "there."
)
_COMPARE_HELP = (
    "Train the same blocks plainly, with torch.utils.checkpoint, with each save set and streamed, over several "
    "lengths: a table and a picture of memory and time."
)
_DOCTOR_HELP = "Show versions, devices, and which backend serves each op and why."


def main() -> None:
    """The entry point: run the command line and end the process with its exit code."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"pyckpt: error: the command line needs {error.name}: pip install 'pyckpt[train]'")
    debug = sys.argv[1:2] == ["--debug"]
    _print_anything()
    try:
        app()
    except (ValueError, RuntimeError, ImportError, OSError, MemoryError) as error:
        if debug:
            raise
        sys.exit(f"pyckpt: error: {str(error) or 'out of memory'}")  # Python's own MemoryError says nothing
    except KeyboardInterrupt:
        sys.exit(130)


def _print_anything() -> None:
    """Have stdout write a question mark for what its encoding lacks: a run must not end over a character."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def build_app() -> typer.Typer:
    """The typer application. Raises ModuleNotFoundError when typer or rich is not installed."""
    import rich  # noqa: F401 (every command needs it: better missing here than later)
    import typer

    app = typer.Typer(
        name="pyckpt",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def common(
        debug: bool = typer.Option(False, "--debug", help="On an error, show the whole traceback."),
        version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Show the version."),
    ) -> None:
        pass

    app.command("train", help=_TRAIN_HELP)(_train_command())
    app.command("compare", help=_COMPARE_HELP)(_compare_command())
    app.command("doctor", help=_DOCTOR_HELP)(doctor)
    return app


def _version(asked: bool) -> None:
    if asked:
        from pyckpt._version import __version__

        print(f"pyckpt {__version__}")
        raise SystemExit


def doctor() -> None:
    """`pyckpt doctor`."""
    from pyckpt.doctor import main_text

    sys.stdout.write(main_text())


def train(**given: Any) -> None:
    """`pyckpt train`; given: the fields of TrainConfig that were set by a flag, the others None."""
    from rich.console import Console

    from pyckpt import train as training

    chosen = {name: value for name, value in given.items() if value is not None}
    if "segments" in chosen:
        chosen["segments"] = _segments(chosen["segments"])
    config = training.TrainConfig(**chosen)
    if config.resume and not config.overwrite:  # a run goes on with the settings that it was started with
        begun = training.read_config(Path(config.out))
        config = dataclasses.replace(begun, overwrite=False, **(_given_up(chosen) | chosen))
    code = training.exit_code(training.run(config, Console()))
    if code:
        raise SystemExit(code)


def _given_up(chosen: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run had, and what is chosen now takes the place of: keep_within, or what it chooses itself."""
    if "keep_within" in chosen:
        return {"save": "attention", **dict.fromkeys(("segments", "place", "place_path"))}
    return {"keep_within": None} if {"save", "segments", "place"} & chosen.keys() else {}


def compare(lengths: str, out: str, dtype: str, device: str, variants: str | None, **sizes: Any) -> None:
    """`pyckpt compare`; lengths, variants: separated by commas; sizes: more arguments of compare.run."""
    from rich.console import Console

    from pyckpt import compare as comparing
    from pyckpt.extras import require
    from pyckpt.train.config import resolve_device

    require("the picture of compare", "matplotlib")
    console = Console()
    arguments: dict[str, Any] = {
        "lengths": _numbers("lengths", lengths),
        "dtype": _dtype(dtype),
        "device": resolve_device(device),
        "variants": None if variants is None else [v.strip() for v in variants.split(",")],
        **sizes,
    }
    folder = _folder(out)
    with console.status("starting") as status:
        results = comparing.run(**arguments, progress=lambda text: status.update(text))
    figures = results.save_json(folder / "compare.json")  # before a word: who reads the table may be gone (`| head`)
    try:
        picture = comparing.plot(results, folder / "compare.png")
    finally:
        comparing.show(results, console)
    console.print()
    for what, path in (("Picture", picture), ("Figures", figures)):
        console.print(f"{what}  {path}", markup=False, highlight=False, soft_wrap=True)  # a path in one piece


def _folder(out: str) -> Path:
    """The folder of this name, to be written to; made where there is none."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ValueError(f"out={out} is a file: give the name of a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"out={out} can't be made a folder: {error.strerror}. Give the name of another one."
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"out={out} can't be written to: give the name of another folder.")
    return path


def _segments(value: str) -> str | int:
    return value if value == "sqrt" else _number("segments", value, "sqrt or a whole number")


def _numbers(name: str, text: str) -> list[int]:
    return [_number(name, part, "whole numbers separated by commas") for part in text.split(",")]


def _number(name: str, text: str, expected: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: {text!r} was given, expected {expected}.") from None


def _dtype(name: str) -> torch.dtype:
    import torch

    names = ("float32", "float64", "bfloat16", "float16")
    if name not in names:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(names)}.")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _compare_command() -> Any:
    import typer

    from pyckpt.compare import DEFAULT_LENGTHS, VARIANTS

    def option(default: Any, text: str) -> Any:
        return typer.Option(default, help=text)

    def command(
        lengths: str = option(",".join(map(str, DEFAULT_LENGTHS)), "Tokens in a sequence: a list."),
        d_model: int = option(256, "Width of the residual stream."),
        heads: int = option(4, "Query heads."),
        kv_heads: int = typer.Option(None, help="Key/value heads.", show_default="as many as query heads"),
        d_ff: int = typer.Option(None, help="Width of the MLP.", show_default="from d_model"),
        layers: int = option(3, "Blocks in the stack."),
        batch_size: int = option(1, "Sequences in a batch."),
        vocab_size: int = typer.Option(None, help="Compare whole causal LMs with this vocabulary, not blocks alone."),
        dtype: str = option("float32", "float32, float64, bfloat16 or float16."),
        device: str = option("auto", "cpu, cuda, cuda:1, ... (auto: a GPU if there is one)."),
        tile: int = typer.Option(None, help="Tokens worked on at once.", show_default="picked from the shapes"),
        variants: str = typer.Option(None, help=f"A list out of {', '.join(VARIANTS)}.", show_default="all"),
        repeats: int = option(3, "Timed runs of each variant."),
        budget: float = typer.Option(None, help="Seconds to end in, with fewer runs or lengths if need be."),
        seed: int = option(0, "Seed of the weights and the inputs."),
        out: str = option("runs/compare", "Folder for compare.png and compare.json; replaces those in it."),
    ) -> None:
        compare(
            lengths,
            out,
            dtype,
            device,
            variants,
            d_model=d_model,
            n_heads=heads,
            n_kv_heads=kv_heads,
            d_ff=d_ff,
            n_layers=layers,
            batch=batch_size,
            vocab_size=vocab_size,
            tile=tile,
            repeats=repeats,
            budget_seconds=budget,
            seed=seed,
        )

    return command


def _train_command() -> Any:
    """`train` with a flag for every field of TrainConfig, as a signature that typer can read."""
    from pyckpt.train.config import TrainConfig

    def command(**given: Any) -> None:
        train(**given)

    hints = typing.get_type_hints(TrainConfig)
    parameters = [_parameter(field, hints[field.name]) for field in dataclasses.fields(TrainConfig)]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameter(field: Any, hint: Any) -> inspect.Parameter:
    """A flag for one field; None stands for "not given", so that a resumed run keeps its own value."""
    import typer

    text = field.metadata["help"]
    if field.default is not None and not isinstance(field.default, bool):
        text += f" (default: {field.default})"
    shown: dict[str, Any] = {"help": text, "show_default": False}
    if field.name == "data":
        default = typer.Argument(None, metavar="PATH", **shown)
    else:
        flag = "--" + field.name.replace("_", "-")
        default = typer.Option(None, flag, rich_help_panel=field.metadata["panel"], **shown)
    annotation = (field.metadata["cli"] or hint) | None
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
