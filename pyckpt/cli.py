"""The command `pyckpt`. Each command reads its flags and calls a function of another module, nothing more."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import typer

_EXTRA = "pip install 'pyckpt[train]'"


def main() -> None:
    """The entry point: run the command line and end the process with its exit code."""
    try:
        app = build_app()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(f"pyckpt: the commands need {error.name}, which is not installed: {_EXTRA}")
    debug = sys.argv[1:2] == ["--debug"]
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if debug:
            raise
        sys.exit(f"pyckpt: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def build_app() -> typer.Typer:
    """The typer application. Raises ModuleNotFoundError when typer is not installed."""
    import typer

    app = typer.Typer(
        name="pyckpt",
        help="Train transformers at any sequence length on a fixed amount of memory.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def common(
        debug: bool = typer.Option(False, "--debug", help="On an error, show the whole traceback."),
    ) -> None:
        pass

    app.command("train", help=_TRAIN_HELP)(_train_command())
    app.command("doctor", help="Show versions, devices, and which backend serves each op and why.")(doctor)
    return app


_TRAIN_HELP = (
    "Train a causal language model on text, on Python's own library if none is given; then plot its loss, "
    "write a sample and save it in Hugging Face's format. Ctrl-C saves a checkpoint; --resume goes on from "
    "there."
)


def doctor() -> None:
    """`pyckpt doctor`."""
    from pyckpt.doctor import main_text

    sys.stdout.write(main_text())


def train(**given: Any) -> None:
    """`pyckpt train`; given: the fields of TrainConfig that were set by a flag, the others None."""
    from rich.console import Console

    from pyckpt import train as training

    chosen = {name: _parsed(name, value) for name, value in given.items() if value is not None}
    config = training.TrainConfig(**chosen)
    if config.resume:  # a run goes on with the settings that it was started with
        config = dataclasses.replace(training.read_config(Path(config.out)), overwrite=False, **chosen)
    code = training.exit_code(training.run(config, Console()))
    if code:
        raise SystemExit(code)


def _parsed(name: str, value: Any) -> Any:
    if name != "segments" or value == "sqrt":
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"segments={value!r}: expected sqrt or a whole number.") from None


def _train_command() -> Any:
    """`train` with a signature that has a flag for every field of TrainConfig, so that typer can read it."""
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

    options: dict[str, Any] = {"rich_help_panel": field.metadata["panel"], "show_default": False}
    text = field.metadata["help"]
    if field.default is not None and not isinstance(field.default, bool):
        text += f" (default: {field.default})"
    if field.name == "data":
        option = typer.Argument(None, help=text, show_default=False)
    else:
        option = typer.Option(None, "--" + field.name.replace("_", "-"), help=text, **options)
    kind = field.metadata["cli"] or hint
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind | None
    )
