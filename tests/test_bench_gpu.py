"""What `make gpu` leans on, without a GPU: tests that crash, hang or lose the device; a trace's arithmetic."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyckpt.triton_kernels import tuning

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import gpu_tests, hopper, journal, own_model, stream_gpu  # noqa: E402

# --- tests that take their process with them --------------------------------------------------------------------

FAKE = """
import os, time
import pytest

def test_before(): pass
def test_crash(): os.abort()
def test_between(): assert 1 == 2, "one is not two"
def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_skipped(): pytest.skip("no such device")
def test_hang(): time.sleep(600)
def test_after(): pass
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Runs a file of tests as if it were the GPU tests, in a folder that imports nothing heavy."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu_tests.common, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests.extension, "is_there", lambda: False)
    monkeypatch.setattr(gpu_tests, "TESTS", ("fake_gpu_tests.py",))
    monkeypatch.setattr(gpu_tests, "_LONGEST", 8.0)

    def run(source, seconds=300.0, workers=1):
        (tmp_path / "fake_gpu_tests.py").write_text(source)
        monkeypatch.setattr(gpu_tests, "_WORKERS", workers)
        found = gpu_tests.run(seconds)
        return found, {name.split("::")[1]: text for name, text in found["failures"].items()}

    return run


@pytest.mark.slow
def test_a_crash_a_hang_and_a_lost_device_cost_one_test_each(fake, capsys):
    found, failures = fake(FAKE)
    assert (found["collected"], found["passed"], found["failed"], found["skipped"], found["not_run"]) == (7, 2, 4, 1, 0)
    assert set(failures) == {"test_crash", "test_between", "test_lost", "test_hang"}
    assert "exit status -6" in failures["test_crash"]
    assert "one is not two" in failures["test_between"]
    assert "illegal memory access" in failures["test_lost"]
    assert "not ended within 8 s" in failures["test_hang"]
    assert gpu_tests.show(found)
    assert "tests: 2 passed, 4 failed, 1 skipped of 7" in capsys.readouterr().out


@pytest.mark.slow
def test_after_a_lost_device_the_rest_has_another_process(fake):
    source = """
import os
ours = []
def test_lost():
    ours.append(1)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_rest(): assert not ours
"""
    found, failures = fake(source)
    assert set(failures) == {"test_lost"}
    assert found["passed"] == 1


@pytest.mark.slow
def test_a_file_that_stops_importing_fails_all_its_tests(fake):
    source = """
import os
if os.environ.get("PYCKPT_TEST_JOURNAL"):  # collected, but then it does not run
    raise ImportError("no such thing")
def test_a(): pass
def test_b(): pass
"""
    found, failures = fake(source)
    assert (found["passed"], found["not_run"]) == (0, 0)
    assert set(failures) == {"test_a", "test_b"}


def test_tests_that_found_no_time_are_counted_and_fail_the_run(fake):
    found, failures = fake("def test_a(): pass\ndef test_b(): pass\n", seconds=0.0)
    assert (found["passed"], found["not_run"], failures) == (0, 2, {})
    assert gpu_tests.show(found)


def test_all_well(fake):
    found, failures = fake("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n", workers=2)
    assert (found["passed"], found["failed"], found["not_run"], failures) == (3, 0, 0, {})
    assert not gpu_tests.show(found)


def test_a_journal_cut_off_in_a_line_is_read_up_to_it(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"test": "a", "outcome": "begun"}\n{"test": "a", "outc')
    assert [line["test"] for line in journal.read(path)] == ["a"]


# --- a trace's arithmetic ---------------------------------------------------------------------------------------


def test_union_joins_what_touches():
    assert stream_gpu.union([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (3.0, 4.0)]) == [(0.0, 4.0), (5.0, 6.0)]
    assert stream_gpu.union([]) == []


def test_overlap_against_a_count_of_instants():
    draw = torch.Generator().manual_seed(torch.seed() % 2**31)
    for _ in range(50):
        a, b = (torch.randint(0, 60, (9, 2), generator=draw).sort(dim=1).values.tolist() for _ in range(2))
        disjoint = stream_gpu.union([(float(s), float(e)) for s, e in b if e > s])
        wanted = sum(any(s <= i < e for s, e in disjoint) for span in a for i in range(*span))
        assert stream_gpu.overlap([(float(s), float(e)) for s, e in a], disjoint) == wanted


def test_spread_is_of_streamed_runs_by_tile():
    rows = [
        {"variant": "streamed", "tile": 8, "peak_bytes": 100},
        {"variant": "streamed", "tile": 8, "peak_bytes": 103},
        {"variant": "streamed", "tile": 4, "peak_bytes": 60},
        {"variant": "streamed", "tile": 4, "failed": "out of memory"},
        {"variant": "resident", "tile": None, "peak_bytes": 900},
    ]
    assert stream_gpu.spread(rows) == {"8": pytest.approx(0.03), "4": 0.0}


def _event(name, start, end, on_device=True):
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=end))


def test_a_trace_counts_copies_under_kernels(monkeypatch):
    events = [
        _event("a_kernel", 0, 1_000_000),
        _event("another", 500_000, 2_000_000),
        _event("Memcpy HtoD (Pinned -> Device)", 1_500_000, 2_500_000),  # half of it under a kernel
        _event("Memcpy DtoH (Device -> Pageable)", 0, 2_000_000),  # the loss: not one of the store's copies
        _event("aten::mm", 0, 9_000_000, on_device=False),
    ]

    class Profile:
        def __init__(self, **options): ...
        def __enter__(self):
            return self

        def __exit__(self, *error): ...
        def events(self):
            return events

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = stream_gpu.trace(lambda: None)
    assert found["copy_seconds"] == pytest.approx(1.0)
    assert found["hidden"] == pytest.approx(0.5)
    assert found["kernel_seconds"] == pytest.approx(2.0)
    assert found["traced_seconds"] == pytest.approx(2.0)
    assert found["kernels"] == {"another": 1.5, "a_kernel": 1.0}


# --- a model of one's own ---------------------------------------------------------------------------------------


def test_own_model_measures_every_variant(monkeypatch, capsys):
    monkeypatch.setattr(own_model, "WIDTH", 64)
    found = own_model.measure(64, 2, 1)
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == list(own_model.VARIANTS)
    assert all(row["seconds"] > 0 for row in rows.values())
    peaks = {name: row["peak_bytes"] for name, row in rows.items()}
    assert peaks["torch.utils.checkpoint"] < peaks["everything stored"]
    assert peaks['swap, save="input"'] <= peaks["swap"] < peaks["everything stored"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_the_variants_of_own_model_give_the_same_gradients(monkeypatch):
    monkeypatch.setattr(own_model, "WIDTH", 64)
    model, ids = own_model.GPT(2), torch.randint(own_model.WORDS, (1, 48))
    gradients = {}
    for name, way in own_model.VARIANTS.items():
        model.zero_grad()
        with way(model):
            model(ids).backward()
        gradients[name] = [p.grad.clone() for p in model.parameters()]
    stored = gradients.pop("everything stored")
    for found in gradients.values():
        assert all(torch.equal(a, b) for a, b in zip(found, stored, strict=True))


# --- the kernels for Hopper against those that the table has ----------------------------------------------------------


def test_a_wrong_or_broken_kernel_gets_no_time(monkeypatch, capsys):
    truth = torch.ones(8)
    configs = [tuning.Config(64, 64), tuning.Config(64, 32), tuning.Config(32, 64)]

    def run(op, config):
        if config is configs[1]:
            raise RuntimeError("too much shared memory\nand more")
        return [truth + (0.001 if config is configs[0] else 0.5 if config is configs[2] else 0.0)]

    case = hopper.Case.of(1024, 128, True)
    problem = SimpleNamespace(case=case, run=run, candidates=lambda op, quick: configs)
    monkeypatch.setattr(
        hopper, "interleaved", lambda runs, *a, **b: {name: SimpleNamespace(median=2e-3) for name, run in runs.items()}
    )
    rows = hopper.measure(problem, "dkdv", False, time.monotonic() + 60)
    assert [r["variant"] == hopper.TRITON for r in rows] == [True, False, False, False]
    assert [("ms" in r, r.get("failed", "")) for r in rows] == [
        (True, ""),
        (True, ""),
        (False, "RuntimeError: too much shared memory"),
        (False, "wrong: it differs by 0.5"),
    ]
    assert rows[1]["tflops"] == pytest.approx(2 * case.flops / 2e-3 / 1e12)
    hopper.show(rows)
    out = capsys.readouterr().out
    assert "best" in out and "wrong: it differs by 0.5" in out


@pytest.mark.parametrize("op", hopper.OPS)
@pytest.mark.parametrize("dim", [64, 128])
def test_candidates_for_hopper_fit_its_shared_memory(op, dim):
    problem = SimpleNamespace(case=hopper.Case.of(1024, dim, True))
    found = hopper.Problem.candidates(problem, op, quick=False)
    assert found[0] == hopper.Problem.candidates(problem, op, quick=True)[0]
    assert len(found) == len(set(found)) > 4
    for config in found:
        owned, streamed = (config.block_n, config.block_m) if op == "dkdv" else (config.block_m, config.block_n)
        tensors = 1 if op == "fwd" else 2  # q; k and v; q and do
        assert (tensors * owned + 2 * config.num_stages * streamed) * dim * 2 <= 227 << 10
        assert config.specialize and config.tma and owned % 64 == 0
