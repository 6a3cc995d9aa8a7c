"""The benchmark scripts run, on a CPU, and write what their readers expect. Their figures are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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


def test_gpu_script_needs_only_pytest_and_says_when_there_is_no_gpu(tmp_path):
    done = script("bench/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "make gpu needs a CUDA device" in done.stdout


@pytest.mark.slow
def test_streaming_measures_memory():
    done = script("bench/stream.py", "--length", "3000")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["length"] == 3000
    assert figures["rss_bytes"] > figures["live_bytes"] > 0


def test_the_streamed_schedule_waits_for_slow_copies_and_not_for_fast_ones():
    code = """
from bench.stream_schedule import Rates, simulate
small = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
fast, slow = (simulate(1024, 128, Rates(copy=rate, copy_start=0.0), **small) for rate in (1e18, 1e6))
assert fast["copies_hidden"] > 0.99 and abs(fast["seconds"] / fast["busy"]["compute"] - 1) < 1e-6, fast
assert slow["copies_hidden"] < 0.6 and slow["seconds"] >= slow["busy"]["in"], slow
assert fast["store_bytes_per_token"] == 2 * (64 + 64) + 4 * 4
"""
    done = script("-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_gpu_script_runs_tests_and_benchmark(tmp_path):
    done = script("bench/gpu.py", "--dry-run", OUT=str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "gpu_cpu.json").read_text())
    assert figures["tests"]["passed"] == figures["tests"]["collected"] > 0
    assert figures["attention"]["rows"]
    assert {r["op"] for r in figures["norm"]["rows"]} == {"rms_norm", "layer_norm", "swiglu", "rope"}
    assert "passed" in (tmp_path / "tests.txt").read_text()
    assert "more than 1 is faster" in done.stdout
