"""How near is near enough: the rules by which the tests compare floating-point results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

LOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float64 sums of some hundred terms, in another order.
EXACT = 1e-12

Function = Callable[..., Any]
Inputs = dict[str, Tensor]


class PerhapsChanceError(AssertionError):
    """An error beyond its bound by less than a factor of two: of these inputs, perhaps, and not of the code."""


def assert_within(error: float | Tensor, allowed: float | Tensor, message: str) -> None:
    """An error, of random numbers, is at most what is allowed.

    A ratio of two roundings has a tail: of some ten thousand of them in a run of all tests, one is beyond 2 every other
    time, with nothing wrong. So it raises `PerhapsChanceError` where it is not far beyond, and the test is decided by
    `of_more_draws`.
    """
    if not error <= allowed:
        raise (PerhapsChanceError if error <= 2 * allowed else AssertionError)(message)


def of_more_draws(test: Callable[[int], object], first: PerhapsChanceError, seeds: Iterable[int]) -> None:
    """A test whose first draw was perhaps chance passes if each of the further ones does.

    With four of them a test that fails by chance once in 100 times fails once in 2,500; one whose usual error is
    beyond the bound, so that at least every other draw fails, is let through at most once in 32 times.
    """
    for seed in seeds:
        print(f"perhaps chance ({first}); drawing again with seed {seed}")
        test(seed)
    warnings.warn(f"beyond its bound in one draw of several: {first}", stacklevel=2)


def assert_close_to_truth(
    ours: Tensor, plain: Tensor, truth: Tensor, factor: float = 2.0, what: str = "result", terms: float = 0.0
) -> None:
    """`ours` is about as near the float64 `truth` as `plain` is, PyTorch's own result from the same inputs.

    By the norm of the error: at most `factor` times plain's, plus the rounding of the truth to the dtype of
    `ours`. By the largest error too, with four such roundings: a single value's error is a matter of luck.
    `terms` is the size of the terms that sum to the result: where they cancel, it is them that are rounded.
    Where the truth is not finite, ours must equal it.
    """
    got, ref, want = _finite(what, ours, truth, ours, plain, truth)
    eps = torch.finfo(ours.dtype).eps
    for name, size, floor, roundings in (
        ("norm of the error", torch.linalg.vector_norm, terms * want.numel() ** 0.5, 1),
        ("largest error", _largest, terms, 4),
    ):
        error, reference = size(got - want), size(ref - want)
        allowed = factor * reference + roundings * eps * size(want).clamp_min(floor)
        assert_within(
            error,
            allowed,
            f"{what} in {ours.dtype}: {name} {error:.3e}, more than the {allowed:.3e} allowed; "
            f"plain PyTorch's is {reference:.3e}, the truth's size {size(want):.3e}",
        )


def assert_exact(ours: Tensor, truth: Tensor, what: str = "result", terms: float = 1.0) -> None:
    """In float64: equal but for the order of sums."""
    assert ours.dtype == truth.dtype == torch.float64, f"{what}: dtypes {ours.dtype} and {truth.dtype}"
    got, want = _finite(what, ours, truth, ours, truth)
    error, size = float(_largest(got - want)), float(_largest(want))
    assert error <= EXACT * max(terms, size), f"{what}: off by {error:.3e}, largest value {size:.3e}"


def a_few(values: Iterable[Any], always: Collection[int], names: int = 1) -> list[Any]:
    """Values for `parametrize`: those at `always` run every time, the others are slow without a GPU.

    For tests that take seconds each, in Triton's interpreter above all, where a few show nearly all that can break.
    `names`: how many arguments a value is for, a tuple of as many if it is more than one.
    """
    slow = () if torch.cuda.is_available() else (pytest.mark.slow,)
    given = ((v,) if names == 1 else v for v in values)
    return [pytest.param(*v, marks=() if i in always else slow) for i, v in enumerate(given)]


def check_truth(
    ours: Function,
    plain: Function,
    truth: Function,
    inputs: Inputs,
    factor: float = 2.0,
    terms: float = 0.0,
    terms_of: dict[str, float] | None = None,
) -> None:
    """`assert_close_to_truth` for the outputs and every input's gradient, from random upstream gradients.

    `terms_of` gives the size of the terms of some results, by name.
    """
    exact = {name: t.double() for name, t in inputs.items()}
    wanted, douts = step(truth, exact)
    got, reference = step(ours, inputs, douts)[0], step(plain, inputs, douts)[0]
    assert got.keys() == reference.keys() == wanted.keys()
    for name, t in got.items():
        assert_close_to_truth(t, reference[name], wanted[name], factor, name, (terms_of or {}).get(name, terms))


def check_exact(ours: Function, truth: Function, inputs: Inputs, terms: float = 1.0) -> None:
    """`assert_exact` for the outputs and every input's gradient, from random upstream gradients."""
    wanted, douts = step(truth, inputs)
    got = step(ours, inputs, douts)[0]
    assert got.keys() == wanted.keys()
    for name, t in got.items():
        assert_exact(t, wanted[name], name, terms)


def step(fn: Function, inputs: Inputs, douts: list[Tensor] | None = None) -> tuple[Inputs, list[Tensor]]:
    """Outputs ("out 0", ...) and gradients ("d" + the input's name) of a function of the inputs, in order.

    Returns them with the upstream gradients: `douts` in the outputs' dtypes, or random ones.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    found = fn(*leaves.values())
    outs = list(found) if isinstance(found, tuple) else [found]
    if douts is None:
        douts = [torch.randn_like(t) for t in outs]
    upstream = [d.to(t.dtype) for d, t in zip(douts, outs, strict=True)]
    grads = torch.autograd.grad(outs, list(leaves.values()), upstream)
    named = {f"out {i}": t.detach() for i, t in enumerate(outs)}
    return named | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}, douts


def _finite(what: str, ours: Tensor, truth: Tensor, *tensors: Tensor) -> Iterator[Tensor]:
    """The tensors as float64 lists of the values where the truth is finite; elsewhere ours must equal it."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert truth.dtype == torch.float64
    finite = truth.isfinite()
    assert torch.equal(ours[~finite].double(), truth[~finite]), f"{what}: differs where the truth is infinite"
    return (t.detach()[finite].double() for t in tensors)


def _largest(t: Tensor) -> Tensor:
    return t.abs().max() if t.numel() else t.new_zeros(())
