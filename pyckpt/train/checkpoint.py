"""Checkpoints of a run: a folder each, which takes its name only when it is complete and on the disk.

In the folder of a run::

    checkpoints/step-00000100/checkpoint.json     step, settings, data, sizes and hashes of the other two
                              model.safetensors   the weights the optimiser works on (fp32)
                              state.pt            optimiser, random numbers, losses so far

Model and optimiser can never be of different steps, and an older checkpoint goes only when a newer one is in
place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyckpt.files import sync
from pyckpt.train.config import TrainConfig

FORMAT = "pyckpt-train-checkpoint-1"
_FILES = ("model.safetensors", "state.pt")


@dataclass
class Checkpoint:
    """One moment of a run.

    settings: the fields of TrainConfig that decide the loss curve. data: the corpus' fingerprint.
    weights: name -> fp32 tensor. state: what torch.load(weights_only=True) can read.
    """

    step: int
    settings: dict[str, Any]
    data: str
    weights: dict[str, Tensor]
    state: dict[str, Any]
    torch_version: str = torch.__version__
    threads: int = 0


def write(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint as a new folder inside `folder`, then remove all but the newest `keep`.

    Raises RuntimeError when it can't be written; what was there before is untouched then.
    """
    from safetensors.torch import save_file

    target = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".{target.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary.mkdir()
        weights = {name: tensor.detach().contiguous() for name, tensor in checkpoint.weights.items()}
        save_file(weights, temporary / _FILES[0])
        torch.save(checkpoint.state, temporary / _FILES[1])
        # safetensors makes its files readable by their owner only. Not every file system lets modes be changed.
        with contextlib.suppress(OSError):
            (temporary / _FILES[0]).chmod((temporary / _FILES[1]).stat().st_mode & 0o777)
        head = {
            "format": FORMAT,
            "step": checkpoint.step,
            "settings": checkpoint.settings,
            "data": checkpoint.data,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "files": {name: _seal(temporary / name) for name in _FILES},
        }
        (temporary / "checkpoint.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
        for name in (*_FILES, "checkpoint.json"):
            sync(temporary / name)
        sync(temporary)
        if target.exists():  # an unreadable one, or one of a run that went back to an older step
            target.rename(folder / f".{target.name}.old")
        temporary.rename(target)
        sync(folder)
    except Exception as error:  # OSError, and what safetensors and torch.save make of a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint of step {checkpoint.step} could not be written to {folder}: {error}. "
            "Earlier checkpoints are intact: make room or choose another folder, then resume."
        ) from error
    for old in steps(folder)[:-keep]:
        old.rename(folder / f".{old.name}.old")
    _sweep(folder)
    return target


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit())


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that `write` wrote; tensors on the CPU.

    Raises RuntimeError when a file is missing, cut short or changed.
    """
    from safetensors.torch import load_file

    head = _head(path)
    for name in _FILES:
        _check_seal(path / name, head["files"][name])
    try:
        weights = load_file(path / _FILES[0])
        state = torch.load(path / _FILES[1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise _damaged(path, f"it can't be read ({error})") from error
    return Checkpoint(head["step"], head["settings"], head["data"], weights, state, head["torch"], head["threads"])


def check(checkpoint: Checkpoint, path: Path, settings: dict[str, Any], data: str, shapes: dict[str, Any]) -> None:
    """Raise ValueError unless a checkpoint is of these settings, data and weights (name -> shape)."""
    # What a checkpoint of an earlier version does not name it did as the defaults have it now.
    defaults = TrainConfig().fixed()
    theirs = {n: defaults.get(n) for n in settings} | checkpoint.settings
    differing = [k for k in theirs if theirs[k] != settings.get(k)]
    if differing:
        listed = "; ".join(f"{k}: {theirs[k]!r} there, {settings.get(k)!r} given" for k in differing)
        raise ValueError(
            f"checkpoint {path} is of a run with other settings ({listed}). Resume it with its own settings, "
            f"or start a new run in another folder."
        )
    if checkpoint.data != data:
        raise ValueError(
            f"checkpoint {path} is of a run on other text: the files or the tokenizer have changed since. "
            f"Bring them back, or start a new run in another folder."
        )
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    if found != shapes:
        odd = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
        raise ValueError(
            f"checkpoint {path} does not fit the model: {odd} is {found.get(odd)} there and "
            f"{shapes.get(odd)} in the model. It was written by another version of pyckpt: resume with that "
            f"one, or start a new run."
        )


def _head(path: Path) -> dict[str, Any]:
    try:
        head = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"checkpoint.json can't be read ({error})") from error
    given = head.get("format") if isinstance(head, dict) else None
    if given != FORMAT:
        raise _damaged(path, f"checkpoint.json says format {given!r}, expected {FORMAT!r}")
    known = {"step", "settings", "data", "torch", "threads", "files"}
    if not known <= head.keys() or set(head["files"]) != set(_FILES):
        raise _damaged(path, "checkpoint.json lacks some of its fields")
    return head


def _seal(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _check_seal(path: Path, expected: dict[str, Any]) -> None:
    if not path.is_file():
        raise _damaged(path.parent, f"{path.name} is missing")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _damaged(path.parent, f"{path.name} has {size} bytes, expected {expected['bytes']}")
    if _seal(path) != expected:
        raise _damaged(path.parent, f"the contents of {path.name} have changed since it was written")


def _damaged(path: Path, what: str) -> RuntimeError:
    older = [p for p in steps(path.parent) if p.name < path.name]
    todo = f"Remove {path} and resume from {older[-1].name}" if older else "Start the run again with overwrite"
    return RuntimeError(f"checkpoint {path} is damaged: {what}. {todo}.")


def _sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for pattern in (".step-*.tmp", ".step-*.old"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)
