"""The benchmark scripts run, on a CPU, and write what their readers expect. Their figures are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import loss, mlp, steps  # noqa: E402
from bench.steps import Variant, Work  # noqa: E402

CPU = torch.device("cpu")


def script(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYCKPT_BACKEND")}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **env}, capture_output=True, text=True)


def test_attention_measures_and_plots(tmp_path):
    result = tmp_path / "attention_test.json"
    done = script("bench/attention.py", "--out", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert {"commit", "date", "device", "versions", "product_tflops", "rows"} <= set(figures)
    assert {r["variant"] for r in figures["rows"]} == {"pyckpt", "sdpa"}
    for row in figures["rows"]:
        assert "failed" not in row
        assert row["error"] < 1e-5  # float32, against a truth in float32
        assert min(row["forward_ms"], row["backward_ms"], row["both_tflops"]) > 0
    assert all(len(line) <= 118 for line in done.stdout.splitlines() if "%" in line)
    drawn = script(
        "-c",
        f"import json, pathlib; from bench.attention import plot; "
        f"plot(json.loads(pathlib.Path({str(result)!r}).read_text()), pathlib.Path({str(tmp_path / 'a.png')!r}))",
        PYTHONPATH=str(ROOT),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_gets_no_time():
    code = """
import torch
from bench import attention
case = attention.Case(64, 16, True, 2, 2, 1)
attention.variants = lambda *a: {"pyckpt": lambda q, k, v: v * q.mean() * k.mean()}
(row,) = attention.measure(case, False, "cpu", 3)
assert "wrong" in row["failed"] and "forward_ms" not in row, row
"""
    done = script("-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_norm_measures_every_op_forward_and_backward(tmp_path):
    result = tmp_path / "norm_test.json"
    done = script("bench/norm.py", "--out", str(result), "--repeats", "2", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert figures["copy_gbs"] > 0
    for row in figures["rows"]:
        assert "failed" not in row, row
        assert row["error"] < 1e-5, row
        assert row["forward_gbs"] > 0 and row["backward_gbs"] > 0


# --- steps: what a benchmark of forward and backward is made of ------------------------------------------------


def _rows(variants, gate=None, **options):
    x = torch.randn(5, 3, requires_grad=True)
    work = Work([x], torch.randn(5, 3))
    if gate is None:
        truth = work.exactly(torch.sin, torch.float64)
        gate = steps.Gate.of(truth, work.run(torch.sin))
    rows = steps.run(variants, work, gate, CPU, 3, seconds=0.0, **options)
    return {row["variant"]: row for row in rows}


def _out_of_memory(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")


def _missing():
    raise steps.UnavailableError("a library is not installed")


def _does_not_compile():
    raise TypeError("no kernel\nand a long story")


class _FailsInTheBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, dy):
        raise ValueError("misaligned")


class TestSteps:
    def test_a_variant_that_fails_is_a_row_and_the_others_go_on(self):
        rows = _rows(
            {
                "memory": Variant(lambda: _out_of_memory),
                "missing": Variant(_missing),
                "compiler": Variant(_does_not_compile),
                "backward": Variant(lambda: _FailsInTheBackward.apply),
                "good": Variant(lambda: torch.sin),
            }
        )
        reasons = {name: row.get("failed") for name, row in rows.items()}
        assert reasons == {
            "memory": "out of memory",
            "missing": "a library is not installed",
            "compiler": "TypeError: no kernel",
            "backward": "ValueError: misaligned",
            "good": None,
        }
        assert [name for name, row in rows.items() if "seconds" in row] == ["good"]
        assert rows["good"]["runs"] == 3

    def test_a_variant_that_fails_while_it_is_timed_has_no_time(self):
        calls = []

        def third_time_unlucky(x):
            calls.append(1)
            return x.sin() if len(calls) < 3 else _out_of_memory(x)

        rows = _rows({"unlucky": Variant(lambda: third_time_unlucky), "good": Variant(lambda: torch.sin)})
        assert rows["unlucky"]["failed"] == "out of memory"
        assert "seconds" not in rows["unlucky"] and "seconds" in rows["good"]
        assert len(calls) == 3

    def test_a_wrong_gradient_has_no_time(self):
        wrong = Variant(lambda: lambda x: x.sin() + 0.01 * (x - x.detach()))
        rows = _rows({"wrong": wrong, "good": Variant(lambda: torch.sin)})
        assert rows["wrong"]["failed"].startswith("wrong: relative error")
        assert "seconds" not in rows["wrong"] and "peak_bytes" not in rows["wrong"]
        assert rows["good"]["error"] < 1e-6

    def test_a_result_that_is_not_a_number_is_wrong(self):
        rows = _rows({"nan": Variant(lambda: lambda x: x.sin() * float("nan"))})
        assert "wrong" in rows["nan"]["failed"]

    def test_bytes_are_above_the_inputs_and_without_the_results(self):
        (row,) = _rows({"sin": Variant(lambda: torch.sin)}).values()
        one = 5 * 3 * 4
        assert row["saved_bytes"] == one  # x
        assert row["peak_bytes"] == 3 * one  # y, cos(x) and dx
        assert row["beyond_bytes"] == one

    def test_the_context_is_on_forward_and_backward(self):
        seen = []

        class Watched(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                seen.append(os.environ.get("PYCKPT_BENCH_TEST"))
                return x.clone()

            @staticmethod
            def backward(ctx, dy):
                seen.append(os.environ.get("PYCKPT_BENCH_TEST"))
                return dy

        within = lambda: mlp.environment(PYCKPT_BENCH_TEST="1")  # noqa: E731
        x = torch.randn(5, requires_grad=True)
        steps.run({"a": Variant(lambda: Watched.apply, within)}, Work([x], torch.ones(5)), None, CPU, 1)
        assert set(seen) == {"1"} and len(seen) >= 6
        assert "PYCKPT_BENCH_TEST" not in os.environ

    def test_a_sweep_outlives_a_case_and_names_what_it_left_out(self, capsys):
        found = [mlp.Case(n, 8, 8, "gelu") for n in (1, 2, 3)]
        saved = []

        def one(case):
            if case.tokens == 1:
                raise RuntimeError("an illegal memory access")
            return [{"variant": "pyckpt"}]

        def show(case, row):
            return row.get("failed", "fine")

        figures = steps.sweep(found, one, show, lambda f: saved.append(len(f["rows"])), 1e9, CPU)
        assert [r.get("failed") for r in figures["rows"]] == ["RuntimeError: an illegal memory access", None, None]
        assert saved == [1, 2, 3]
        assert steps.count_wrong(figures, ("pyckpt",)) == 1
        figures = steps.sweep(found, one, show, lambda f: None, -1.0, CPU)
        assert len(figures["rows"]) == 1 and len(figures["left_out"]) == 2
        assert "left out, for want of time" in capsys.readouterr().out


def test_loss_measures_every_variant(tmp_path, capsys):
    result = tmp_path / "loss_test.json"
    assert loss.main(["--quick", "--no-compile", "--repeats", "1", "--out", str(result)]) == 0
    figures = json.loads(result.read_text())
    assert {"commit", "date", "device", "versions", "product_tflops", "aims", "rows"} <= set(figures)
    rows = figures["rows"]
    assert {r["variant"] for r in rows if "failed" not in r} >= {"pyckpt", "pyckpt_recompute", "eager", "eager_fp32"}
    for row in rows:
        if "failed" in row:
            assert row["variant"] in ("liger", "torch_linear_ce") and row["unavailable"], row
            continue
        assert row["error"] < 1e-5  # float32, against a truth in float64
        assert row["seconds"] > 0 and row["seconds_over_eager"] > 0 and row["beyond_bytes_over_eager"] > 0
    assert all(len(line) <= 118 for line in capsys.readouterr().out.splitlines()[:-1])


def test_the_truth_of_the_loss_notices_a_missing_softmax():
    case = loss.Case(70, 32, 500)
    work, target = loss.inputs(case, torch.float32, CPU)

    def without(x, w):
        z = F.linear(x, w)
        return (z.logsumexp(-1).detach() - z.gather(1, target.unsqueeze(1)).squeeze(1)).mean()

    gate = loss.gate(work, target)
    with pytest.raises(steps.WrongResultError):
        gate.check({}, work.run(without), steps.PEER)
    gate.check({}, work.run(lambda x, w: F.cross_entropy(F.linear(x, w), target)), steps.OWN)
    # In half precision the same, with room to spare: the limit is then far from what a missing term makes.
    work, target = loss.inputs(loss.Case(70, 32, 500), torch.bfloat16, CPU)
    with pytest.raises(steps.WrongResultError):
        loss.gate(work, target).check({}, work.run(without), steps.PEER)


def test_mlp_counts_its_products_and_keeps_only_x(tmp_path, capsys):
    result = tmp_path / "mlp_test.json"
    assert mlp.main(["--quick", "--no-compile", "--repeats", "1", "--out", str(result)]) == 0
    figures = json.loads(result.read_text())
    made = {(r["kind"], r["variant"]): r for r in figures["rows"] if "failed" not in r}
    # PyTorch's checkpoint stops early, before the down projection.
    expected = {"pyckpt": (11, 7), "pyckpt_all": (9, 6), "eager": (9, 6), "checkpoint": (11, 7)}
    for name, counts in expected.items():
        rows = made["swiglu", name], made["gelu", name]
        assert tuple(r["products"] for r in rows) == counts, name
        assert all(r["error"] < 1e-5 and r["tflops"] > 0 for r in rows)
    for kind in ("swiglu", "gelu"):
        row = made[kind, "pyckpt"]
        assert row["saved_bytes"] == 4 * row["tokens"] * row["d_model"]
    assert {r["variant"] for r in figures["rows"] if "failed" in r} <= {"liger"}
    assert all(len(line) <= 118 for line in capsys.readouterr().out.splitlines()[:-1])


def test_gpu_script_needs_only_pytest_and_says_when_there_is_no_gpu(tmp_path):
    done = script("bench/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "make gpu needs a CUDA device" in done.stdout


@pytest.mark.slow
def test_gpu_script_runs_tests_and_benchmark(tmp_path):
    done = script("bench/gpu.py", "--dry-run", OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert figures["tests"]["passed"] == figures["tests"]["collected"] > 0
    assert figures["attention"]["rows"]
    assert {r["op"] for r in figures["norm"]["rows"]} == {"rms_norm", "layer_norm", "swiglu", "rope"}
    assert "passed" in (tmp_path / "tests.txt").read_text()
    assert "more than 1 is faster" in done.stdout
