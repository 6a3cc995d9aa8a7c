"""What holds for every test: fresh random numbers, and memory that shows when nobody wrote to it."""

from __future__ import annotations

import importlib
import os
import random
import sys
import warnings
from collections.abc import Generator, Iterator

import pytest
import torch
from helpers import PerhapsChanceError, of_more_draws
from interpreter import quicken

_SEED = "PYCKPT_TEST_SEED"

# Without a GPU the Triton kernels run in Triton's interpreter. It is chosen when they are first imported; ops go to
# them on a CPU only where a test forces it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quicken()
    # An extension that was built here has the names that its emulated one takes, and a name can be taken once.
    sys.modules.setdefault("pyckpt._cuda", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new seed for every test, so that no test leans on lucky numbers; a failing test's report shows it."""
    value = int(os.environ.get(_SEED) or _new_seed())
    print(f"seed {value}: repeat with {_SEED}={value}")
    return _seed_all(value)


def _new_seed() -> int:
    return random.SystemRandom().randrange(2**31)


def _seed_all(value: int) -> int:
    # torch.manual_seed queues a seed for each kind of device, with a traceback, where there is none: 3 ms a test.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(value)
    random.seed(value)
    return value


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A 2x rule missed by a little is decided by four more draws, all of which must keep it; see `of_more_draws`."""
    try:
        return (yield)
    except PerhapsChanceError as first:
        if os.environ.get(_SEED):
            raise
        given = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}

        def test(value: int) -> None:
            _seed_all(value)
            pyfuncitem.obj(**given | ({"seed": value} if "seed" in given else {}))

        of_more_draws(test, first, [_new_seed() for _ in range(4)])
        return True


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """New memory is filled with NaN, by a mode of PyTorch, in its kernels too: a forgotten write shows."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was[0], warn_only=was[1])


@pytest.fixture(autouse=True)
def no_modes_left() -> Iterator[None]:
    """A mode that a test leaves on (by `torch.set_default_device`) would be in every op of those after it."""
    before = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    yield
    assert (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()) == before


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """torch.compile gives up on a function after some number of versions: no test counts those of another."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def unpoisoned(poison: None) -> None:
    """As users run it: PyTorch chooses any algorithm, and new memory holds what was there before."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_fallback() -> Iterator[None]:
    """A swapped model's fall-back to the original forward fails the test, unless it expects one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pyckpt.swap")
        yield


@pytest.fixture
def untabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no tables of decoder layers and losses: all are tried out."""
    monkeypatch.setattr(importlib.import_module("pyckpt.swap.families"), "FAMILIES", {})
    monkeypatch.setattr(importlib.import_module("pyckpt.swap.loss"), "HEADS", {})


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder layers are cut at their attention, those that are standard blocks too."""
    monkeypatch.setattr(importlib.import_module("pyckpt.swap.families"), "FAMILIES", {})
    choose = importlib.import_module("pyckpt.swap.choose")
    monkeypatch.setattr(choose.Chooser, "_standing", lambda *_: None)


@pytest.fixture(params=["torch", "cpp"])
def cpu_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on PyTorch's own kernels and on the compiled ones, where there are any."""
    from pyckpt.ops.cpu_library import library

    if request.param == "cpp" and library.problem:
        pytest.skip(f"CPU kernels: {library.problem}")
    monkeypatch.setenv("PYCKPT_BACKEND", request.param)
    return request.param


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs on PyTorch's own kernels and on ours."""
    monkeypatch.setenv("PYCKPT_BACKEND", request.param)
    return request.param
