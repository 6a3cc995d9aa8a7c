"""The benchmark scripts run, on a CPU, and write what their readers expect. Their figures are not judged here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pyckpt
from pyckpt.ops import reference, registry
from pyckpt.ops.cpu_library import library

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    attention,
    attention_cpu,
    block,
    block_gpu,
    common,
    context,
    extension,
    gpu,
    loss,
    mlp,
    norm,
    report,
    steps,
    stream_schedule,
    tensor_parallel,
)
from bench.steps import Variant, Work  # noqa: E402
from pyckpt.save import bytes_per_token  # noqa: E402

CPU = torch.device("cpu")
LIGER = importlib.util.find_spec("liger_kernel") is not None


@pytest.fixture(autouse=True)
def collecting(monkeypatch):
    """Garbage is not collected after each variant: that takes longer than the small variants of these tests."""
    monkeypatch.setattr(steps, "free", lambda device: None)


def script(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYCKPT_BACKEND")}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=ROOT, env={**inherited, **env}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(bool(library.problem), reason=f"CPU kernels: {library.problem}")
def test_attention_on_a_cpu(tmp_path):
    """Every variant of the short cases is right, and timed."""
    with pytest.raises(SystemExit, match="2"):
        attention_cpu.main(["--quick"])
    result = tmp_path / "attention_cpu.json"
    done = script("bench/attention_cpu.py", "--quick", "--out", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert {"commit", "date", "device", "versions", "product_gflops", "rows"} <= set(figures)
    variants = {*library.instruction_sets, "PyTorch"}
    assert all({r["variant"] for r in figures["rows"] if r["name"] == n} == variants for n in ("causal", "dropout"))
    assert all(min(r["forward_gflops"], r["backward_gflops"]) > 0 for r in figures["rows"])


def test_pairs_that_a_query_sees():
    for window, causal in ((None, True), (None, False), (3, True), (99, True)):
        case = attention_cpu.Case("", 10, causal=causal, window=window)
        right = 0 if causal else -1
        left = -1 if window is None else window
        assert case.pairs == int(reference.visible_keys(10, 10, (left, right)).sum())


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `make gpu`'s trial without a GPU leaves and prints: for the tests of it, and of the benchmarks that it runs.

    Each is a process that imports PyTorch; on two cores it all takes a minute.
    """
    folder = tmp_path_factory.mktemp("gpu")
    done = script("bench/gpu.py", "--dry-run", OUT=str(folder), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def on_trial(test):
    for mark in (pytest.mark.slow, pytest.mark.xdist_group("make_gpu"), pytest.mark.timeout(600)):
        test = mark(test)
    return test


@on_trial
def test_attention_measures_and_plots(tried, tmp_path):
    folder, said = tried
    figures = json.loads((folder / "attention_cpu.json").read_text())
    assert {"commit", "date", "device", "versions", "product_tflops", "rows"} <= set(figures)
    assert {r["variant"] for r in figures["rows"]} == {"pyckpt", "sdpa"} and not figures["left_out"]
    for row in figures["rows"]:
        assert "failed" not in row
        assert row["error"] < 1e-5  # float32, against a truth in float32
        assert min(row["forward_ms"], row["backward_ms"], row["both_tflops"]) > 0
        assert min(row["forward_call_ms"], row["backward_call_ms"]) > 0
    assert all(len(line) <= 118 for line in said.splitlines() if "%" in line)
    attention.plot(figures, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_gets_no_time(monkeypatch):
    monkeypatch.setattr(attention, "variants", lambda *a: {"pyckpt": lambda q, k, v: v * q.mean() * k.mean()})
    (row,) = attention.measure(attention.Case(64, 16, True, 2, 2, 1), False, "cpu", 3)
    assert "wrong" in row["failed"] and "forward_ms" not in row, row


def test_what_a_step_launches(tmp_path):
    """Of Triton's kernels; products are the library's. A norm, RoPE and the MLP's inside run again in the backward."""
    pytest.importorskip("triton")
    result = tmp_path / "host_test.json"
    done = script("bench/host.py", "--calls", "1", "--tries", "1", "--out", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["name"]: row for row in json.loads(result.read_text())["rows"]}
    assert all(row["microseconds"] > 0 for row in rows.values())
    forward = {"norm_fwd_kernel_rows": 2, "rope_kernel": 1, "attention_fwd_kernel_tile": 1, "glu_fwd_kernel": 1}
    assert rows["block, forward without grad"]["launches"] == forward
    backward = ("attention_bwd_kernel_delta", "attention_bwd_kernel_dkdv", "attention_bwd_kernel_dq", "glu_bwd_kernel")
    assert rows["block, forward and backward"]["launches"] == {
        **forward,
        **dict.fromkeys(backward, 1),
        "norm_fwd_kernel_rows": 5,
        "rope_kernel": 3,
        "norm_bwd_kernel_rows": 2,
    }


@on_trial
def test_norm_measures_every_op_forward_and_backward(tried):
    figures = json.loads((tried[0] / "norm_cpu.json").read_text())
    assert figures["copy_gbs"] > 0 and not figures["left_out"]
    assert [r["backend"] for r in figures["launches"]] == ["torch"]
    assert figures["launches"][0]["eager_seconds"] > 0
    assert figures["extension"] and figures["cuda_first"] == []
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

    def test_one_gradient_that_is_not_a_number_is_wrong(self):
        """The output is right."""
        wrong = Variant(lambda: lambda x: x.sin() + 0 * (x - x.detach()).sqrt())
        assert "wrong: relative error nan" in _rows({"nan": wrong})["nan"]["failed"]

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

    def test_a_graph_is_kept_where_it_is_asked_for(self):
        import torch._functorch.config as settings

        for keep in (True, False):
            steps.compiled(torch.sin, keep_graph=keep)
            assert settings.donated_buffer == (not keep)

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


@pytest.mark.slow
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


@pytest.mark.slow
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


# --- the block as on a GPU, small ---------------------------------------------------------------------------


def test_block_measures_every_save_set_against_the_plain_ones(tmp_path, capsys):
    result = tmp_path / "block_test.json"
    options = ["--no-compile", "--repeats", "1", "--out", str(result)]
    assert block.main(["65", "--dry-run", "--layers", "2", *options]) == 0
    figures = json.loads(result.read_text())
    rows = {r["variant"]: r for r in figures["rows"]}
    assert set(rows) == {"plain", "checkpoint", *pyckpt.SAVE_SETS}
    for row in rows.values():
        assert "failed" not in row, row
        assert row["error"] < 1e-4 and row["seconds_over_all"] > 0 and row["beyond_bytes_over_plain"] > 0
    kept = [rows[save]["saved_bytes"] for save in pyckpt.SAVE_SETS]
    assert kept == sorted(kept, reverse=True)
    # Blocks after the first have their input besides; the last one's output is y.
    spec = block_gpu.Setup.of(CPU, small=True).spec
    assert rows["attention"]["saved_bytes"] == 2 * 65 * bytes_per_token(spec, "attention", torch.float32)
    assert "unchecked" not in figures and figures["aims"] == block_gpu.AIMS
    assert all(len(line) <= 118 for line in capsys.readouterr().out.splitlines()[:-1])


@pytest.mark.slow
def test_a_wrong_save_set_is_not_timed(monkeypatch):
    right = block_gpu.Models._ours

    def ours(self, save):
        fn = right(self, save)
        return fn if save != "input" else lambda x, *rest: fn(x, *rest) * 1.001

    monkeypatch.setattr(block_gpu.Models, "_ours", ours)
    setup = block_gpu.Setup.of(CPU, small=True)
    figures = block_gpu.run(setup, [20], repeats=1, compile_too=False)
    failed = {r["variant"]: r["failed"] for r in figures["rows"] if "failed" in r}
    assert list(failed) == ["input"] and failed["input"].startswith("wrong: relative error")
    assert steps.count_wrong(figures, pyckpt.SAVE_SETS) == 1


@pytest.mark.slow
def test_a_block_without_memory_for_plain_goes_on(monkeypatch):
    right = block_gpu.Models._plain

    def plain(self, checkpointed):
        fn = right(self, checkpointed)
        return lambda x, *rest: _out_of_memory(x) if x.shape[1] == 50 and not checkpointed else fn(x, *rest)

    monkeypatch.setattr(block_gpu.Models, "_plain", plain)
    figures = block_gpu.run(block_gpu.Setup.of(CPU, small=True), [50], repeats=1, compile_too=False)
    failed = {r["variant"]: r["failed"] for r in figures["rows"] if "failed" in r}
    assert failed == {"plain": "out of memory"}
    assert steps.count_wrong(figures, pyckpt.SAVE_SETS) == 0


def test_the_fastest_backend_of_sdpa_is_one_that_runs():
    found = block_gpu.best_sdpa(block_gpu.Setup.of(CPU, small=True), 40)
    assert found["best"] in found["seconds"] and "cudnn" not in found["seconds"]
    with block_gpu.sdpa_context(found)():
        assert torch.backends.cuda.flash_sdp_enabled() == (found["best"] == "flash")


def test_on_a_cpu_the_block_is_timed_as_before(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(block, "CONFIG", {"d_model": 32, "n_heads": 2, "d_ff": 48})
    monkeypatch.setattr(block, "AIMS", {20: (1, 1.0, 1.2), 40: (1, 0.8, 1.1)})
    assert block.main(["--out", str(tmp_path / "a.json")]) == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert [(r["length"], r["variant"]) for r in figures["rows"]] == [
        (length, variant) for length in (20, 40) for variant in ("plain", "checkpoint", "attention")
    ]
    assert figures["aims"] == {"20": [1.0, 1.2], "40": [0.8, 1.1]}
    assert "≤ 0.80" in capsys.readouterr().out


def test_results_of_a_stack_have_a_name_of_their_own():
    given = argparse.Namespace(out=None)
    assert steps.out(given, "block", CPU, "_x4") == common.RESULTS / "block_cpu_x4.json"
    assert steps.out(argparse.Namespace(out=Path("a.json")), "block", CPU, "_x4") == Path("a.json")


def test_a_dry_run_of_the_block_writes_no_result():
    with pytest.raises(SystemExit):
        block.main(["--dry-run"])


# --- the tables of what they write --------------------------------------------------------------------------


@pytest.mark.slow
def test_tables_come_from_the_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ceiling", lambda device: 1.0)
    tables = {"loss": "bench/loss.py", "mlp": "bench/mlp.py", "block-gpu": "bench/block.py"}
    for name, script in tables.items():
        assert report.TABLES[name]().startswith("Not run") and script in report.TABLES[name]()
    monkeypatch.setattr(loss, "cases", lambda device, quick: [loss.Case(7, 8, 16)])
    loss.main(["--no-compile", "--repeats", "1", "--out", str(tmp_path / "loss_cpu.json")])
    monkeypatch.setattr(mlp, "cases", lambda device, quick: [mlp.Case(7, 8, 16, "swiglu")])
    mlp.main(["--no-compile", "--repeats", "1", "--out", str(tmp_path / "mlp_cpu.json")])
    block.main(["20", "--dry-run", "--no-compile", "--repeats", "1", "--out", str(tmp_path / "block_small.json")])
    for name, script in tables.items():
        table = report.TABLES[name]()
        assert f"`python {script}` on " in table
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) > 5 and len({row.count("|") for row in rows}) == 1
    assert "| 7 × 8 × 16 | liger | Liger-Kernel is not installed |" in report.TABLES["loss"]() or LIGER


def test_the_aims_stand_beside_the_row_they_are_about():
    case = loss.Case(32768, 4096, 128256)
    row = {"variant": "pyckpt", "seconds": 0.1, "seconds_over_eager": 0.9, "beyond_bytes": 1e9}
    line = loss.line(case, {**row, "beyond_bytes_over_eager": 0.04})
    assert line.endswith("0.900 < 1.00   954 MiB    0.040 ≤ 0.05")
    assert "<" not in loss.line(loss.Case(1024, 4096, 128256), row)
    assert "<" not in loss.line(case, {**row, "variant": "eager"})


# --- the CUDA extension ---------------------------------------------------------------------------------------


def test_an_op_is_named_for_cuda_only_where_it_is_faster_in_every_case():
    def row(variant: str, width: int, forward: float, backward: float) -> dict[str, Any]:
        return {"op": "rms_norm", "tokens": 9, "width": width, "variant": variant} | {
            "forward_seconds": forward,
            "backward_seconds": backward,
        }

    rows = [row("pyckpt", 1024, 1.0, 1.0), row("pyckpt", 4096, 4.0, 4.0)]
    assert norm.faster_in_cuda(rows) == []
    rows += [row("pyckpt-cuda", 1024, 0.9, 0.9), row("pyckpt-cuda", 4096, 3.0, 3.99)]
    assert norm.faster_in_cuda(rows) == ["add_rms_norm_fwd", "rms_norm_fwd"]
    rows.append({"op": "rms_norm", "tokens": 9, "width": 8192, "variant": "pyckpt-cuda", "failed": "wrong"})
    assert norm.faster_in_cuda(rows) == []
    for name in (n for sides in norm._STANDS_FOR.values() for names in sides for n in names):
        assert name in registry.IMPLEMENTATIONS


def test_a_backend_is_forced_for_as_long_as_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("PYCKPT_BACKEND", "torch")
    with norm.within(norm.OURS_CUDA):
        assert os.environ["PYCKPT_BACKEND"] == "cuda"
    with norm.within(norm.OURS):
        assert "PYCKPT_BACKEND" not in os.environ
    assert os.environ["PYCKPT_BACKEND"] == "torch"


@pytest.mark.parametrize(("status", "expected"), [(0, "clean"), (9, "exit status 9: Invalid __global__ write")])
def test_compute_sanitizer_is_asked_with_every_tool(tmp_path, monkeypatch, status, expected):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\nprintf "Invalid __global__ write"\nexit {status}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert extension.sanitize(60.0) == dict.fromkeys(extension.TOOLS, expected)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [line.split()[1] for line in asked] == list(extension.TOOLS)
    assert all("tests/test_cuda_kernels.py" in line for line in asked)


def test_without_compute_sanitizer_or_nvcc_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert extension.sanitize(60.0) == {}
    assert extension.build(60.0) == {"built": False, "reason": extension.NO_NVCC}


# --- make gpu -----------------------------------------------------------------------------------------------


class TestGpuScript:
    """A benchmark is a process of its own, and whatever becomes of it is noted."""

    def _run(self, tmp_path, monkeypatch, body, left=60.0):
        (tmp_path / "bench").mkdir()
        (tmp_path / "bench" / "fake.py").write_text(f"import json, os, sys, time\npath = sys.argv[-1]\n{body}\n")
        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        return gpu.run_script("fake", ("--quick",), 1.0, left, tmp_path / "fake.json")

    def test_what_it_wrote_is_read(self, tmp_path, monkeypatch):
        body = 'json.dump({"rows": [{"options": sys.argv[1:-1]}]}, open(path, "w"))'
        found = self._run(tmp_path, monkeypatch, body)
        assert found == {"rows": [{"options": ["--quick", "--budget", "1", "--out"]}]}

    def test_a_crash_keeps_what_was_written_before(self, tmp_path, monkeypatch):
        body = 'json.dump({"rows": [1]}, open(path, "w")); os.abort()'
        assert self._run(tmp_path, monkeypatch, body) == {"rows": [1], "broke": "exit status -6"}

    def test_a_crash_before_anything_is_written(self, tmp_path, monkeypatch):
        assert self._run(tmp_path, monkeypatch, "sys.exit(3)") == {"rows": [], "broke": "exit status 3"}

    @pytest.mark.slow
    def test_one_that_hangs_is_ended(self, tmp_path, monkeypatch):
        body = 'json.dump({"rows": [1]}, open(path, "w")); time.sleep(600)'
        found = self._run(tmp_path, monkeypatch, body, left=5.0)
        assert found["unfinished"].startswith("ended after") and "broke" not in found
        assert found["rows"] == json.loads((tmp_path / "fake.json").read_text())["rows"] == [1]

    def test_an_old_result_is_not_taken_for_a_new_one(self, tmp_path, monkeypatch):
        (tmp_path / "fake.json").write_text('{"rows": [2]}')
        assert self._run(tmp_path, monkeypatch, "sys.exit(1)")["rows"] == []
        assert json.loads((tmp_path / "fake.json").read_text()) == {"rows": [2]}


def test_gpu_script_says_when_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "make gpu needs a CUDA device" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stream", [[], ["--stream", "32"]], ids=["resident", "streamed"])
def test_processes_send_what_arithmetic_says(stream, tmp_path, capfd):
    out = tmp_path / "context.json"
    sizes = ["--tokens", "256", "--layers", "1", "--repeats", "1", "--d-model", "128"]
    context.main([*sizes, *stream, "--out", str(out)])
    alone, *shared = json.loads(out.read_text())["rows"]
    assert [r["variant"] for r in shared] == list(context.METHODS)
    assert all(r["sent_bytes"] == r["sent_by_arithmetic"] > 0 for r in shared)
    assert alone["sent_bytes"] == 0
    assert stream or all(r["saved_bytes"] < 0.6 * alone["saved_bytes"] for r in shared)
    assert "of alone" in capfd.readouterr().out


@pytest.mark.slow
def test_processes_sum_less_than_those_that_run_layers_again(tmp_path, capfd):
    out, d_model, tokens, layers = tmp_path / "tensor_parallel.json", 256, 256, 2
    sizes = ["--tokens", str(tokens), "--layers", str(layers), "--repeats", "1", "--d-model", str(d_model)]
    tensor_parallel.main([*sizes, "--vocab", "512", "--tile", "128", "--out", str(out)])
    rows = {r["variant"]: r for r in json.loads(out.read_text())["rows"]}
    # Looking up, of the head's gradient, and of the loss's three numbers: in all variants of ours.
    stream = tokens * d_model * 4
    ends = 2 * stream
    of_loss = 3 * tokens * 4
    by_arithmetic = {"swap": 5, "swap, x shared": 5.5, "swap, attention+mid": 4}
    for variant, sums in by_arithmetic.items():
        assert rows[variant]["summed_bytes"] == sums * layers * stream + ends + of_loss, variant
    assert rows["swap"]["summed_bytes"] < rows[tensor_parallel.CHECKPOINT]["summed_bytes"]
    assert rows["swap, x shared"]["saved_bytes"] < rows["swap"]["saved_bytes"]
    assert "of checkpointing" in capfd.readouterr().out


@pytest.mark.slow
def test_streaming_measures_memory():
    done = script("bench/stream.py", "--length", "3000")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["length"] == 3000
    assert figures["rss_bytes"] > figures["live_bytes"] > 0


def test_the_streamed_schedule_waits_for_slow_copies_and_not_for_fast_ones(unpoisoned):
    small = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96}
    fast, slow = (
        stream_schedule.simulate(1024, 128, stream_schedule.Rates(copy=rate, copy_start=0.0), **small)
        for rate in (1e18, 1e6)
    )
    assert fast["copies_hidden"] > 0.99 and abs(fast["seconds"] / fast["busy"]["compute"] - 1) < 1e-6, fast
    assert slow["copies_hidden"] < 0.6 and slow["seconds"] >= slow["busy"]["in"], slow
    assert fast["store_bytes_per_token"] == 2 * (64 + 64) + 4 * 4


@on_trial
def test_gpu_script_runs_tests_and_benchmark(tried):
    folder, said = tried
    figures = json.loads((folder / "gpu_cpu.json").read_text())
    assert figures["tests"]["passed"] == figures["tests"]["collected"] > 0
    assert figures["attention"]["rows"]
    assert {r["op"] for r in figures["norm"]["rows"]} == {"rms_norm", "layer_norm", "swiglu", "rope"}
    for benchmark in ("block", "mlp", "loss"):
        assert any("seconds" in r for r in figures[benchmark]["rows"])
        assert (folder / f"{benchmark}_cpu.json").exists()
    assert figures["tests"]["failures"] == {} and figures["tests"]["not_run"] == 0
    assert "more than 1 is faster" in said
