"""Which tiles and how many warps a kernel gets: looked up in a table of data, never searched for by default.

`attention_tuned.json` is a list of rows; a row matches when its architecture, op, head dim, value dim, dtype,
mask kind, kind of score and way of loading match, where what it does not name matches anything, and the first match
counts. Rows come from measurements, or, as their `source` says, from the compiler's report of registers and shared
memory.

PYCKPT_AUTOTUNE=1 tries `candidates` on the first call of each kind instead, and keeps the best in a file in
PYCKPT_CACHE_DIR (default ~/.cache/pyckpt).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).resolve().parent / "attention_tuned.json"
INTERPRETED = "interpreter"
_TRIES = 5
_SPECIALIZED = ("sm_100", "sm_103")
HOPPER = "sm_90"
_TMA = ("sm_90", "sm_100", "sm_103", "sm_120")
# Less shared memory than the data-centre chip before them: they take the rows for any architecture, which are small.
_SMALL = ("sm_75", "sm_86", "sm_87", "sm_89", "sm_120", "sm_121")


@dataclasses.dataclass(frozen=True)
class Config:
    """Queries (BLOCK_M) and keys (BLOCK_N) of a tile, warps of a program, stages of its load pipeline.

    `exact` is how exact float32 products are made: of six bfloat16 ones ("bf16x6"), which keep all 24 bits, of three
    TF32 ones ("tf32x3"), which keep 22, or by the float32 units ("ieee").
    `tma` lets Hopper's copy engine bring the tiles that the loop goes through, where their layout allows it.
    `persistent` is how many programs a multiprocessor runs for the whole of a forward launch; 0: one program a tile.
    `specialize` gives a kernel that uses `tma` warps for loads of their own: Triton's way on Blackwell, on Hopper the
    kernels of `hopper`, whose warpgroups take 64 queries each. `overlap` leaves their products in flight for longer.
    `split` makes dK and dV in two launches.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    exact: str = "tf32x3"
    tma: bool = False
    persistent: int = 0
    specialize: bool = False
    split: bool = False
    overlap: bool = False


@dataclasses.dataclass(frozen=True)
class Key:
    """What a configuration depends on.

    Dims are padded to powers of two; dtype is half or float32; mask is full, causal or window; score is plain, or
    extra where softcap, ALiBi, dropout or padding need more registers, or into where all that is more is a running
    result to begin with (forward) or to add to (dQ). Rows for extra serve into, where it has none of its own. loads is
    tma where the copy engine may bring what the loop goes through, else pointers.
    """

    arch: str
    op: str
    head_dim: int
    value_dim: int
    dtype: str
    mask: str
    score: str = "plain"
    loads: str = "pointers"

    def __str__(self) -> str:
        return "/".join(str(v) for v in dataclasses.astuple(self))


def wants_hopper() -> bool:
    """Whether the user asks for the kernels of `hopper` where they serve, which the table does not choose yet."""
    return os.environ.get("PYCKPT_ATTENTION") == "hopper"


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> str:
    """sm_90 and the like, a gfx name on AMD, or "interpreter"."""
    return INTERPRETED if interpreted() else _architecture(device.index or 0)


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def l2_bytes(device: torch.device) -> int:
    return 32 << 20 if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """The table's rows, as they stand in the file."""
    return tuple(json.loads(TABLE.read_text())["rows"])


@functools.cache
def lookup(key: Key) -> Config:
    """The table's configuration. An architecture that it lacks takes the rows of the nearest older one."""
    known = {row["arch"] for row in rows() if "arch" in row}
    return next(_matching(dataclasses.replace(key, arch=nearest(key.arch, known))))


def _matching(key: Key) -> Iterator[Config]:
    fields = ("arch", "op", "head_dim", "value_dim", "dtype", "mask", "loads")
    scores = ("*", key.score, *(("extra",) if key.score == "into" else ()))
    for row in rows():
        if all(row.get(f, "*") in ("*", getattr(key, f)) for f in fields) and row.get("score", "*") in scores:
            yield Config(*row["config"])


def nearest(arch: str, known: set[str]) -> str:
    """The architecture whose rows of a table serve `arch`: its own, or the nearest older one's."""
    if arch in known or not arch.startswith("sm_") or arch in _SMALL:
        return arch
    older = [a for a in known if a.startswith("sm_") and int(a[3:]) <= int(arch[3:])]
    return max(older, key=lambda a: int(a[3:]), default=arch)


def delta_rows(value_dim: int) -> int:
    """Queries a program of the delta kernel takes, for a padded value dim: both tiles stay in registers."""
    return 64 if value_dim <= 128 else 32


# --- autotuning, when asked for -----------------------------------------------------------------------------


def configured(key: Key, run: Callable[[Config], None], repeatable: bool) -> Config:
    """The configuration for a launch. `run` launches with one; it may be called often if `repeatable`."""
    if os.environ.get("PYCKPT_AUTOTUNE") != "1" or key.arch == INTERPRETED or not repeatable:
        return lookup(key)
    found, name = _tuned(), f"{key}/{_compiler()}"
    kept = _entry(found.get(name))
    if kept is None:
        if _capturing():  # a graph can't be made of what waits for the device
            return lookup(key)
        kept = _fastest(key, run)
        found[name] = dataclasses.asdict(kept)
        _write(found)
    return kept


@functools.cache
def _compiler() -> str:
    """What makes one configuration faster than another, beside the chip."""
    import triton

    return f"triton {triton.__version__}"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _entry(value: Any) -> Config | None:
    """A configuration from the file; None for none, and for that of another version, which had other fields."""
    fields = {f.name for f in dataclasses.fields(Config)}
    return Config(**value) if isinstance(value, dict) and set(value) == fields else None


def candidates(key: Key) -> list[Config]:
    """The table's choice and its neighbours."""
    first = lookup(key)
    if key.op.startswith("hopper"):
        return [first, *(c for c in _hopper_candidates(first, key) if c != first)]
    tiles = {(first.block_m, first.block_n)}
    tiles |= {(m, n) for m in (64, 128) for n in (32, 64, 128) if (m + n) * max(key.head_dim, key.value_dim) <= 32768}
    found = [
        dataclasses.replace(first, block_m=m, block_n=n, num_warps=warps, num_stages=stages, **way)
        for m, n in sorted(tiles)
        for warps in (4, 8)
        for stages in (2, 3)
        for way in _ways(key)
    ]
    return [first, *(c for c in found if c != first)]


def _hopper_candidates(first: Config, key: Key) -> list[Config]:
    """Tiles, rings as long as shared memory allows, both orders of the forward's products; by turns or all at once."""
    bytes_of_row = 2 * key.head_dim
    room = (220 << 10) // bytes_of_row
    tiles = {"hopper_fwd": ((128, 192), (64, 128)), "hopper_dkdv": ((32, 64), (128,)), "hopper_dq": ((128,), (64, 128))}
    orders = (False, True) if key.op == "hopper_fwd" else (False,)
    found = []
    for m, n, stages, overlap in itertools.product(*tiles[key.op], (2, 3, 4), orders):
        # A warpgroup of three has 160 registers a thread, of which o and the scores take so many.
        fits = m <= 128 or (key.head_dim + n) // 2 <= 96
        owned, streamed = (n, m) if key.op == "hopper_dkdv" else (m, n)
        kept = owned if key.op == "hopper_fwd" else 2 * owned
        if fits and kept + 2 * stages * streamed <= room:
            found += [
                dataclasses.replace(first, block_m=m, block_n=n, num_stages=stages, overlap=overlap, persistent=p)
                for p in (0, 1)
            ]
    return found


def _ways(key: Key) -> list[dict[str, Any]]:
    """How a kernel may load and be scheduled."""
    ways: list[dict[str, Any]] = [{"tma": False, "persistent": 0, "specialize": False}]
    if key.arch in _TMA and key.loads == "tma":
        programs = (0, 1, 2) if key.op == "fwd" and key.mask == "causal" else (0,)
        special = (False, True) if key.op == "fwd" and key.arch in _SPECIALIZED else (False,)
        ways += [{"tma": True, "persistent": p, "specialize": s} for p in programs for s in special]
    return ways


def _fastest(key: Key, run: Callable[[Config], None]) -> Config:
    times = {c: t for c in candidates(key) if (t := time_config(c, run)) is not None}
    return min(times, key=lambda c: times[c]) if times else lookup(key)


def time_config(config: Config, run: Callable[[Config], None]) -> float | None:
    """Milliseconds, the median; None where the configuration does not fit the device."""
    from triton.runtime.errors import OutOfResources

    try:
        run(config)
    except OutOfResources:
        return None
    times = []
    for _ in range(_TRIES):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(config)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _cache_file() -> Path:
    folder = os.environ.get("PYCKPT_CACHE_DIR") or Path.home() / ".cache" / "pyckpt"
    return Path(folder) / "attention.json"


@functools.cache
def _tuned() -> dict[str, Any]:
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(found: dict[str, Any]) -> None:
    """Keep what was found; a cache that cannot be written is only slower."""
    path = _cache_file()
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
