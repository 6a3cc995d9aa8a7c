"""The folder of a run: what is where in it, and that nothing a user has in it is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyckpt import files
from pyckpt.files import write_json
from pyckpt.train.config import TrainConfig

FORMAT = "pyckpt-train-run-1"


@dataclass(frozen=True)
class RunFolder:
    """Names inside the folder of a run."""

    path: Path

    @property
    def run(self) -> Path:
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def sample(self) -> Path:
        return self.path / "sample.txt"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def all(self) -> tuple[Path, ...]:
        """Everything that a run writes, run.json first."""
        return (self.run, self.checkpoints, self.metrics, self.plot, self.sample, self.model)

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError unless a run with this configuration may start, or resume, in this folder."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out={self.path} is a file: give the name of a folder.")
        if config.resume:
            self._check_resume(config)
            return
        if self.run.exists():
            if not config.overwrite:
                raise ValueError(
                    f"{self.path} holds a run already. Go on with it: --resume. Replace it: --overwrite. "
                    f"Keep it: give another folder with --out."
                )
            _read_run(self.run)
            self._check_needed(config)
            return
        taken = [p.name for p in self.all if p.exists()]
        if taken:
            raise ValueError(
                f"{self.path} holds {', '.join(taken)}, but no run that pyckpt wrote: give another folder with --out."
            )

    def _check_resume(self, config: TrainConfig) -> None:
        if not self.run.exists():
            raise ValueError(
                f"{self.path} holds no run to resume: leave --resume out, or give the run's folder as --out."
            )
        theirs, ours = read_config(self.path).fixed(), config.fixed()
        differing = [name for name in ours if ours[name] != theirs[name]]
        if differing:
            listed = "; ".join(f"{n} is {theirs[n]!r} there, {ours[n]!r} was given" for n in differing)
            raise ValueError(
                f"the run in {self.path} has other settings ({listed}). Leave them as they were, or start a "
                f"new run in another folder."
            )

    def _check_needed(self, config: TrainConfig) -> None:
        """Raise ValueError where the run that would be replaced holds what the new one reads, and a resumed one too."""
        gone = [self.path.resolve() / path.name for path in self.all]  # of a link the link alone: see `begin`
        for name in ("data", "tokenizer"):
            given = getattr(config, name)
            if given is not None and any(Path(given).resolve().is_relative_to(path) for path in gone):
                raise ValueError(
                    f"{name}={given} belongs to the run that --overwrite removes: copy it to another place first, or "
                    f"give another folder with --out."
                )

    def begin(self, config: TrainConfig) -> None:
        """Remove the run that is replaced, and note the configuration."""
        for path in reversed(self.all):  # run.json last: until then this is a run, which may be replaced
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:  # of a link the link alone: what it leads to is not ours
                path.unlink(missing_ok=True)
        write_json(self.run, {"format": FORMAT, "config": dataclasses.asdict(config)})

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes from training in it; RuntimeError where one does."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(f"out={self.path} can't be written: {error.strerror}. Give another folder.") from error
        with lock:
            files.lock(lock, f"another process is training in {self.path} now: wait for it, or give another folder.")
            yield


def is_run(path: Path) -> bool:
    """Whether a folder is one that a run was written to."""
    try:
        _read_run(RunFolder(path).run)
    except RuntimeError:
        return False
    return True


def read_config(path: Path) -> TrainConfig:
    """The configuration of the run in a folder; its `out` is that folder, whatever its name was when the run began.

    Raises ValueError when there is none, RuntimeError when it can't be read.
    """
    file = RunFolder(path).run
    if not file.exists():
        raise ValueError(f"{path} holds no run: give the folder of one.")
    try:
        return TrainConfig(**{**_read_run(file)["config"], "out": str(path)})
    except (TypeError, KeyError) as error:
        raise RuntimeError(f"{file} was written by another version of pyckpt ({error}): start a new run.") from error


def _read_run(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("format") == FORMAT:
            return content
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{file} can't be read: {error}. Give another folder with --out.") from error
    raise RuntimeError(f"{file} is not a run of this version of pyckpt: give another folder with --out.")
