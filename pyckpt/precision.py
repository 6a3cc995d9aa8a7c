"""How PyTorch makes products of float32 numbers, whichever of its two settings was used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products in float32 proper, whatever the caller has chosen."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch does not answer once `fp32_precision` was set, by transformers' `tf32` for one
        with _exact_by_backend():
            yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _exact_by_backend() -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
