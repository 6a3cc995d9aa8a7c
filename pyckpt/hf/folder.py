"""The folder of a checkpoint: replacing one by another so that, whenever it stops, a whole one can be loaded.

A save writes every file into a folder of its own inside the checkpoint's, renames that folder when it is
complete, and then moves its files up, config.json last. The old config.json is removed before the first of
them moves. So at any moment either config.json is there, with the weights it belongs to, or the new checkpoint
is whole: in its folder, as far as its files have not moved up yet. transformers, which knows nothing of this,
finds no config.json in between and refuses; it never reads a mix.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyckpt import files

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
UNFINISHED = "pyckpt-unfinished-save"
FINISHED = "pyckpt-finished-save"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def shard_name(i: int, n: int) -> str:
    return f"model-{i + 1:05d}-of-{n:05d}.safetensors"


@contextlib.contextmanager
def saving(root: Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint to. It replaces the one in `root` when the block ends.

    Raises ValueError if root is a file, RuntimeError if something can't be written or moved, or if another process
    saves to root now.
    """
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file; give the name of a folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(_failure(root, False, error)) from error
    with _locked(root), _replacing(root) as staging:
        yield staging


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep other processes from saving to a folder meanwhile; RuntimeError where one does.

    The lock is on the folder itself: a file for it would stay among the checkpoint's.
    """
    try:
        handle = os.open(root, os.O_RDONLY)
    except OSError:  # Windows can't open folders
        yield
        return
    try:
        files.lock(handle, f"another process is saving to {root} now: wait for it, or give the name of another folder")
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _replacing(root: Path) -> Iterator[Path]:
    """`saving` in a folder that nobody else writes to."""
    staging, ready = root / UNFINISHED, root / FINISHED
    counts = False
    try:
        recover(root)
        staging.mkdir()
        yield staging
        for path in (*staging.rglob("*"), staging):
            files.sync(path)
        os.replace(staging, ready)
        (root / CONFIG).unlink(missing_ok=True)
        counts = True
        files.sync(root)
        _install(root)
    except OSError as error:
        raise RuntimeError(_failure(root, counts, error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not _pending(root):
            shutil.rmtree(ready, ignore_errors=True)


def recover(root: Path) -> None:
    """Complete a save that was stopped while its files moved up; remove what others left behind."""
    if _pending(root):
        _install(root)
    for name in (UNFINISHED, FINISHED):
        if (root / name).exists():
            shutil.rmtree(root / name)


def locate(root: Path, name: str) -> Path | None:
    """The checkpoint's file of this name; None if there is none."""
    for folder in [root / FINISHED, root] if _pending(root) else [root]:
        if (folder / name).is_file():
            return folder / name
    return None


def locate_weights(root: Path) -> Path | None:
    """The single file, or else the index of shards, in transformers' order; None if there are none."""
    for folder in [root / FINISHED, root] if _pending(root) else [root]:
        for name in (SINGLE, INDEX):
            if (folder / name).is_file():
                return folder / name
    return None


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file. Raises RuntimeError if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RuntimeError(f"{path} can't be read as JSON: {error}. Fetch or save the checkpoint again") from error
    if not isinstance(value, dict):
        raise RuntimeError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from an index of shards. Raises RuntimeError if it is not one."""
    given = read_json(index).get("weight_map")
    if not (isinstance(given, dict) and given and all(isinstance(value, str) for value in given.values())):
        raise RuntimeError(f"{index} has no weight_map from tensor names to file names; fetch or save it again")
    for name in set(given.values()):
        # An index from elsewhere must not make us read, or remove, files outside its folder.
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise RuntimeError(f"{index} names the shard {name!r}, expected a .safetensors file in the same folder")
    return dict(given)


def _pending(root: Path) -> bool:
    """Whether a finished save counts as the checkpoint of this folder."""
    return not (root / CONFIG).exists() and (root / FINISHED / CONFIG).is_file()


def _install(root: Path) -> None:
    """Move a finished save's files up. Can be stopped anywhere and run again."""
    new = root / FINISHED
    if (new / INDEX).exists():
        shards = set(read_weight_map(new / INDEX).values())
        _move_up(new, root, [name for name in shards if (new / name).exists()])
        _remove_weights(root, keep={*shards, INDEX})  # a single file would be preferred to the index
        _move_up(new, root, [INDEX])
    elif (new / SINGLE).exists():
        _move_up(new, root, [SINGLE])
    if (root / SINGLE).exists():
        _remove_weights(root, keep={SINGLE})
    others = [str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()]
    _move_up(new, root, [name for name in others if name != CONFIG])
    _move_up(new, root, [CONFIG])
    shutil.rmtree(new, ignore_errors=True)
    files.sync(root)


def _move_up(new: Path, root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, root / name)


def _remove_weights(root: Path, keep: set[str]) -> None:
    """Remove the weights of an earlier save, under the names that transformers and we give them."""
    for path in list(root.iterdir()):
        if path.name not in keep and (path.name in (SINGLE, INDEX) or _SHARD.fullmatch(path.name)):
            path.unlink()


def _failure(root: Path, counts: bool, error: OSError) -> str:
    if counts:
        return (
            f"the checkpoint is complete in {root / FINISHED}, but could not be moved up into {root}: {error}. pyckpt "
            "loads it as it is; saving to the same folder again completes the move"
        )
    return (
        f"the checkpoint could not be written to {root}: {error}. What was there before is untouched: make room or "
        "choose another folder"
    )
