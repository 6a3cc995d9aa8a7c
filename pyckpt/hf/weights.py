"""Tensors in safetensors files: a single one, or shards with an index."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyckpt.hf.folder import INDEX, SINGLE, locate, read_weight_map, shard_name, write_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LISTED = 4


def require_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError(
            "saving and loading models needs safetensors, which is not installed: pip install 'pyckpt[hf]'"
        ) from error
    return safetensors


# --- writing ---


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    """Write tensors in their order, in shards of at most so many bytes (more for a single larger tensor).

    Holds one shard's tensors in CPU memory at a time, where they are not there already. Raises OSError.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = [shard_name(i, len(shards)) for i in range(len(shards))] if len(shards) > 1 else [SINGLE]
    for file, shard in zip(names, shards, strict=True):
        _write_file(folder / file, {name: tensors[name] for name in shard})
    if len(shards) > 1:
        total = {
            "total_parameters": sum(t.numel() for t in tensors.values()),
            "total_size": sum(t.nbytes for t in tensors.values()),
        }
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def _shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += t.nbytes
    return shards


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    library = require_safetensors()
    path.touch()
    mode = path.stat().st_mode
    try:
        # The metadata is what transformers 4 tells PyTorch's files by.
        library.torch.save_file({name: _plain(t) for name, t in tensors.items()}, path, metadata={"format": "pt"})
    except library.SafetensorError as error:  # a full disk, too
        raise OSError(str(error)) from error
    with contextlib.suppress(OSError):  # not every file system lets modes be changed
        path.chmod(mode)  # safetensors makes its files readable by their owner only


def _plain(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    # Parameters may be views of one flat buffer, which safetensors does not write.
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


# --- reading ---


class WeightFiles:
    """The tensors of open safetensors files: `shapes` and `dtypes` by name, from the headers, and `read`.

    `places`: the name of each and its file's.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.places: set[tuple[str, str]] = set()
        self._files: dict[str, Any] = {}

    def add(self, path: Path, file: Any) -> None:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            self.places.add((name, path.name))
            header = file.get_slice(name)
            self.shapes[name], self.dtypes[name] = tuple(header.get_shape()), header.get_dtype()
            self._files[name] = file

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


@contextlib.contextmanager
def open_weights(root: Path, path: Path) -> Iterator[WeightFiles]:
    """Open the single file or the shards of the index at `path`; `root` is the checkpoint's folder.

    Raises RuntimeError for files that are missing, cut short or not what the index says.
    """
    library = require_safetensors()
    weights = WeightFiles()
    with contextlib.ExitStack() as stack:
        if path.name != INDEX:
            weights.add(path, stack.enter_context(_open(library, path)))
        else:
            weight_map = read_weight_map(path)
            for file in _shard_paths(root, path, weight_map):
                weights.add(file, stack.enter_context(_open(library, file)))
            odd = sorted({name for name, _ in weight_map.items() ^ weights.places})
            if odd:
                raise RuntimeError(
                    f"{path} and its shards do not hold the same tensors: {listed(odd)} in one of them only, or in "
                    "another shard. The files are of different models or the download is incomplete; fetch or save "
                    "the checkpoint again"
                )
        yield weights


def _shard_paths(root: Path, index: Path, weight_map: dict[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values()))
    paths = {name: locate(root, name) for name in names}
    missing = [name for name in names if paths[name] is None]
    if missing:
        raise RuntimeError(
            f"{index} names {len(names)} shards, and {listed(missing)} of them is not there; fetch the missing files "
            "or save the checkpoint again"
        )
    return [path for path in paths.values() if path is not None]


def _open(library: ModuleType, path: Path) -> Any:
    try:
        return library.safe_open(path, framework="pt", device="cpu")
    except (library.SafetensorError, OSError) as error:
        raise RuntimeError(
            f"{path} ({path.stat().st_size} bytes) is not a whole safetensors file: {error}. It was cut short, "
            "changed, or is a Git LFS pointer; fetch or save the checkpoint again"
        ) from error


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
