"""The rules of comparison themselves: what they let through, and what they do not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from blocks import assert_as_good
from helpers import PerhapsChanceError, assert_close_to_truth, assert_within, of_more_draws
from swap_models import InFloat64

pytest_plugins = ["pytester"]
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


@pytest.mark.parametrize(
    ("error", "raised"), [(1.01, PerhapsChanceError), (2.01, AssertionError), (math.nan, AssertionError)]
)
def test_an_error_far_beyond_its_bound_is_no_chance(error, raised):
    assert_within(1.0, 1.0, "equal")
    with pytest.raises(AssertionError, match="too much") as caught:
        assert_within(error, 1.0, "too much")
    assert caught.type is raised


def test_the_rules_measure_what_they_say():
    truth = torch.randn(300, dtype=torch.float64)
    plain, noise = truth.float(), torch.randn(300).sign()
    off = plain + noise * 1e-3
    assert_close_to_truth(off + noise * 0.9e-3, off, truth)
    assert_as_good({"w": off + noise * 0.9e-3}, {"w": off}, {"w": truth}, torch.float32)
    for factor, raised in ((1.4, PerhapsChanceError), (3.4, AssertionError)):
        for rule in (
            lambda got: assert_close_to_truth(got, off, truth),
            lambda got: assert_as_good({"w": got}, {"w": off}, {"w": truth}, torch.float32),
        ):
            with pytest.raises(AssertionError) as caught:
                rule(off + noise * factor * 1e-3)
            assert caught.type is raised


@pytest.mark.parametrize("topk", [torch.topk, torch.Tensor.topk])
def test_a_tie_between_experts_is_chance(topk):
    scores = torch.tensor([[0.1, 3.0, -math.inf, 1.0, 1.0 + 1e-4], [2.0, 1.0, 0.0, -math.inf, -math.inf]]).double()
    with InFloat64():
        assert topk(scores, 2).indices.tolist() == [[1, 4], [0, 1]]
        assert topk(scores.T, 3, dim=0).indices.shape == (3, 2)
        assert topk(scores, 5).indices.shape == (2, 5)
        scores[0, 3] += 1e-4 - 1e-6
        assert topk(scores, k=1).indices.tolist() == [[1], [0]]
        with pytest.raises(PerhapsChanceError, match="experts"):
            topk(scores, k=2)


def test_every_further_draw_must_pass():
    seen: list[int] = []
    with pytest.warns(UserWarning, match="one draw of several: by a little"):
        of_more_draws(seen.append, PerhapsChanceError("by a little"), [5, 6, 7])
    assert seen == [5, 6, 7]

    def fails(seed: int) -> None:
        seen.append(seed)
        assert seed < 9, "again"

    with pytest.raises(AssertionError, match="again"):
        of_more_draws(fails, PerhapsChanceError("by a little"), [8, 9, 10])
    assert seen == [5, 6, 7, 8, 9]


TESTS = """
import os
import pytest
from helpers import assert_within

draws = []

def draw(name, seed, tmp_path, errors):
    count = sum(n == name for n, *_ in draws)
    draws.append((name, seed, tmp_path))
    assert_within(errors[min(count, len(errors) - 1)], 1.0, name)

class TestOfAClass:
    def test_once_beyond(self, seed, tmp_path):
        draw("once", seed, tmp_path, [1.2, 0.9])

def test_always_beyond(seed, tmp_path):
    draw("always", seed, tmp_path, [1.2])

def test_far_beyond(seed, tmp_path):
    draw("far", seed, tmp_path, [3.0, 0.9])

def test_twice_beyond(seed, tmp_path):
    draw("twice", seed, tmp_path, [1.2, 0.9, 0.9, 0.9, 1.2])

def test_the_draws():
    counts = {n: sum(d[0] == n for d in draws) for n in ("once", "always", "far", "twice")}
    wanted = [5, 2, 1, 5] if os.environ.get("PYCKPT_TEST_SEED") is None else [1, 1, 1, 1]
    assert list(counts.values()) == wanted
    seeds = [d[1] for d in draws if d[0] == "once"]
    assert len(set(seeds)) == len(seeds)
"""


@pytest.mark.parametrize("given", [False, True])
def test_a_test_is_drawn_again(pytester, monkeypatch, pytestconfig, given):
    """And not where the seed was given, to see that draw fail."""
    if given:
        monkeypatch.setenv("PYCKPT_TEST_SEED", "1")
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "tests")
    pytester.makeconftest((pytestconfig.rootpath / "tests" / "conftest.py").read_text())
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(
        passed=1 if given else 2, failed=4 if given else 3, warnings=0 if given else 1
    )


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_run_in_one_process(request):
    """So that what they build is built once; pytest-xdist does so by a test's id, and with some pytest does not."""
    if not request.config.getoption("loadgroup", False):
        pytest.skip("not run with --dist loadgroup")
    if f"pytest=={pytest.__version__}\n" not in CONSTRAINTS.read_text():
        pytest.skip("of the versions that are tested together")
    assert request.node.nodeid.endswith("@together")
