"""The ops of the namespace `pyckpt`: their schemas, and which backend serves each on which device.

Every kernel is reached through `torch.ops.pyckpt.<name>`. An op has one schema, one fake implementation, and
one real implementation per backend:

- ``torch``: PyTorch's own kernels; runs on every device.
- ``cpp``: the compiled kernels of csrc/cpu, on the CPU.
- ``triton``: the kernels of `pyckpt.triton_kernels`, on CUDA, or on the CPU under ``TRITON_INTERPRET=1``.
- ``cuda``: the compiled extension.

On CUDA an op goes to Triton where it can, unless `measured.json` names it: the ops for which the compiled extension
was measured faster, and the file with the figures. ``PYCKPT_BACKEND=torch|cpp|triton|cuda`` forces one for every op
that has it; see `choose`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyckpt import errors

BACKENDS = ("torch", "cpp", "triton", "cuda")
DEVICE_TYPES = ("cpu", "cuda")
_PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
_CUDA_FIRST = ("cuda", "triton", "torch")

# Where the extension's kernels run; tests build it for the CPU (csrc/emulator.h).
extension_device_type = "cuda"

LIBRARY = torch.library.Library("pyckpt", "DEF")
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def forced_backend() -> str | None:
    """The value of PYCKPT_BACKEND, or None. Raises ValueError when it names no backend."""
    value = os.environ.get("PYCKPT_BACKEND", "").strip().lower()
    if not value:
        return None
    if value not in BACKENDS:
        raise ValueError(f"PYCKPT_BACKEND={value!r} names no backend; expected one of {', '.join(BACKENDS)}, or unset")
    return value


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_matrix_units() -> bool:
    """Whether Triton can use those of some GPU here: on NVIDIA's before compute capability 8.0 (V100, T4) it can't.

    Its products run on the other units there, and attention's kernels spill hundreds of bytes a thread, or ask for more
    shared memory than there is.
    """
    if torch.version.hip or not torch.cuda.is_available():
        return True
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    return not found or max(found) >= (8, 0)


def _runs_on(backend: str, device_type: str) -> bool:
    if backend == "triton" and not (_has_triton() and (device_type == "cpu" or _has_matrix_units())):
        return False
    if backend == "cpp":
        return device_type == "cpu"
    if backend == "cuda":
        return device_type == extension_device_type
    if device_type == "cpu":
        return backend == "torch" or (backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    return True


@functools.cache
def measured() -> dict[str, Any]:
    """Which ops the extension serves sooner than Triton ("cuda_first"), and where that was measured ("results")."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("measured.json").read_text(encoding="utf-8"))
    return table


def choose(op: str, device_type: str) -> tuple[str, str]:
    """Which backend serves an op on a device type, and the reason in words.

    A forced backend that an op lacks, or that cannot run on the device, leaves the op to the default choice:
    the reason says so.
    """
    have = IMPLEMENTATIONS[op]
    forced = forced_backend()
    note = ""
    if forced is not None:
        if forced in have and _runs_on(forced, device_type):
            return forced, f"PYCKPT_BACKEND={forced}"
        why = f"has no {forced} implementation" if forced not in have else f"{forced} cannot run on {device_type}"
        note = f"; PYCKPT_BACKEND={forced} ignored: {why}"
    cuda_first = device_type == "cuda" and op in measured()["cuda_first"]
    for backend in _CUDA_FIRST if cuda_first else _PREFERENCE.get(device_type, ("torch",)):
        if backend in have and _runs_on(backend, device_type):
            if cuda_first and backend == "cuda":
                return backend, f"measured faster: {measured()['results']}{note}"
            only = " (the only one)" if len(have) == 1 else ""
            return backend, f"default on {device_type}{only}{note}"
    raise RuntimeError(f"op {op} has no implementation for {device_type}")


def beside_cuda(op: str, device_type: str) -> Callable[..., Any]:
    """What serves an op's arguments that the extension does not take."""
    have = IMPLEMENTATIONS[op]
    return next(have[b] for b in ("triton", "torch") if b in have and _runs_on(b, device_type))


def define(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``torch`` implementation of a new op: declares the schema, the fake and the dispatch."""
    name = schema.split("(", 1)[0].strip()

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        IMPLEMENTATIONS[name] = {"torch": fn}
        for device_type in DEVICE_TYPES:
            LIBRARY.impl(name, functools.partial(call, name, device_type), device_type.upper())
        torch.library.register_fake(f"pyckpt::{name}", fake, lib=LIBRARY)
        return fn

    return decorate


def implement(name: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a further backend's implementation of an op that `define` declared."""

    def decorate(fn: Callable[..., Any]) -> Callable[..., Any]:
        IMPLEMENTATIONS[name][backend] = fn
        return fn

    return decorate


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Attach a backward formula to an op. It has no derivative of its own: asked for one, it raises."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        errors.check_unbatched(f"the op pyckpt::{name}", grads)
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"double backward through the op pyckpt::{name} is not supported: backward() or grad() was "
                "called with create_graph=True, and its backward is made of kernels that have no derivative "
                "of their own. Use it without create_graph, or plain PyTorch for that part of the model."
            )
        return backward(ctx, *grads)

    torch.library.register_autograd(f"pyckpt::{name}", once, setup_context=setup_context, lib=LIBRARY)


def call(name: str, device_type: str, *args: Any, **kwargs: Any) -> Any:
    backend, _ = choose(name, device_type)
    fn = IMPLEMENTATIONS[name][backend]
    if torch.is_autocast_enabled(device_type):
        # An implementation chooses its precisions itself; autocast would round its float32 products.
        with torch.autocast(device_type, enabled=False):
            return fn(*args, **kwargs)
    return fn(*args, **kwargs)


def run_visible(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the implementation of a pyckpt op directly, below no dispatch key.

    A TorchDispatchMode does not see the ATen calls inside an op. One that wants to (a memory tracker) calls
    this from its handler with itself enabled again.
    """
    name = func._schema.name.split("::", 1)[1]
    tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    device_type = tensors[0].device.type if tensors else "cpu"
    with torch.no_grad():
        return call(name, device_type, *args, **kwargs)


def is_pyckpt(func: Any) -> bool:
    return getattr(func, "namespace", None) == "pyckpt"
