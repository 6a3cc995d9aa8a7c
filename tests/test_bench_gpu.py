"""What `make gpu` leans on, without a GPU: tests that crash, hang or lose the device; a trace's arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_gpu
import torch
from torch.overrides import TorchFunctionMode

from pyckpt import SAVE_SETS
from pyckpt.triton_kernels import attention as kernels
from pyckpt.triton_kernels import tuning

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    attention,
    block,
    block_gpu,
    common,
    extension,
    gpu,
    gpu_tests,
    hopper,
    journal,
    loss,
    mixture,
    mlp,
    norm,
    own_model,
    report,
    steps,
    stream_gpu,
    swap,
)

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
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tests.extension, "is_there", lambda: False)
    monkeypatch.setattr(gpu_tests, "TESTS", ("fake_gpu_tests.py",))
    monkeypatch.setattr(gpu_tests, "_LONGEST", 6.0)

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
    assert "not ended within 6 s" in failures["test_hang"]
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


def test_tests_that_found_no_time_are_counted_and_fail_the_run(fake, monkeypatch):
    monkeypatch.setattr(gpu_tests, "collect", lambda deadline, dry_run: (["f.py::test_a", "f.py::test_b"], {}))
    found, failures = fake("", seconds=0.0)
    assert (found["passed"], found["not_run"], failures) == (0, 2, {})
    assert gpu_tests.show(found)


def test_all_well(fake):
    found, failures = fake("def test_a(): pass\ndef test_b(): pass\ndef test_c(): pass\n", workers=2)
    assert (found["passed"], found["failed"], found["not_run"], failures) == (3, 0, 0, {})
    assert not gpu_tests.show(found)


@pytest.mark.parametrize("cut", ['{"test": "a", "outc', '{"test": "a", "text": "{1}'])
def test_a_journal_cut_off_in_a_line_is_read_up_to_it(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"test": "a", "outcome": "begun"}\n' + cut)
    assert [line["test"] for line in journal.read(path)] == ["a"]


@pytest.fixture
def share(monkeypatch, tmp_path):
    """Runs tests as a process of these outcomes would, and what every process was given."""

    def run(names, outcomes, why, seconds=60.0):
        given = []

        def process(self, left):
            given.append(left)
            with self.path.open("a") as out:
                for name in left:
                    found = outcomes.get(name, "passed")
                    for outcome in ("begun", *([found] if found != "hangs" else [])):
                        out.write(json.dumps({"test": name, "outcome": outcome, "seconds": 0.0, "text": ""}) + "\n")
                    if found != "passed":
                        time.sleep(min(seconds, 1.0) if seconds < 1.0 else 0.0)
                        return why
            return None

        monkeypatch.setattr(gpu_tests.Share, "_process", process)
        found = gpu_tests.Share(names, tmp_path / "journal.jsonl", time.monotonic() + seconds)
        found.run()
        return given, {line["test"]: line["outcome"] for line in found.ended()}

    return run


@pytest.mark.parametrize("outcome", ["hangs", "failed"])
def test_after_a_hang_or_a_lost_device_the_other_files_have_their_turn(share, outcome):
    """Others beside it may do the same: each costs a process."""
    names = ["a.py::one", "a.py::two", "b.py::one", "a.py::three", "b.py::two"]
    given, ended = share(names, {"a.py::one": outcome}, "exit status 75")
    assert given == [names, ["b.py::one", "b.py::two", "a.py::two", "a.py::three"]]
    assert ended == {**dict.fromkeys(names, "passed"), "a.py::one": "failed"}


def test_what_the_time_did_not_suffice_for_has_not_failed(share):
    """Neither the test under way nor those after it."""
    assert share(["a.py::one", "a.py::two"], {"a.py::one": "hangs"}, "the time was over", seconds=0.1)[1] == {}


def test_what_may_hang_has_less_time(tmp_path):
    share = gpu_tests.Share([], tmp_path / "journal.jsonl", 0.0)
    assert share._longest() == gpu_tests._LONGEST
    for file, longest in gpu_tests._LONGEST_OF.items():
        assert (ROOT / file).exists() and longest < gpu_tests._LONGEST
        for outcome, expected in (("begun", longest), ("passed", gpu_tests._LONGEST)):
            share.path.write_text(json.dumps({"test": f"{file}::test", "outcome": outcome}) + "\n")
            assert share._longest() == expected


# --- files that cannot be collected, processes that do not end --------------------------------------------------


def test_files_that_cannot_be_collected_are_failures_and_the_others_run(fake, monkeypatch, tmp_path, capsys):
    broken = {
        "import_tests.py": ("import no_such_module_here", "No module named 'no_such_module_here'"),
        "crash_tests.py": ("import os; os.abort()", "exit status -6"),
        "empty_tests.py": ("x = 1", "exit status 5"),
    }
    for file, (source, _) in broken.items():
        (tmp_path / file).write_text(source)
    (tmp_path / "fake_gpu_tests.py").write_text("def test_a(): pass\n")
    monkeypatch.setattr(gpu_tests, "TESTS", (*broken, "fake_gpu_tests.py"))
    found = gpu_tests.run(300.0)
    assert (found["passed"], found["failed"], found["collected"], found["not_run"]) == (1, 3, 4, 0)
    assert list(found["failures"]) == list(broken)
    for file, (_, why) in broken.items():
        assert why in found["failures"][file]
    assert gpu_tests.show(found)
    assert "FAILED crash_tests.py" in capsys.readouterr().out


def test_options_after_a_file_choose_its_tests(fake, monkeypatch, tmp_path):
    source = "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): pass\n"
    monkeypatch.setattr(gpu_tests, "TESTS", ("fake_gpu_tests.py -m gpu",))
    (tmp_path / "fake_gpu_tests.py").write_text(source)
    assert gpu_tests.collect(time.monotonic() + 60, False) == (["fake_gpu_tests.py::test_a"], {})


def test_what_a_gpu_has_to_confirm_is_first(monkeypatch):
    """And what is collected twice runs once."""

    def run(command, seconds, env):
        file = next(c for c in command if c.startswith("tests/"))
        names = [f"{file}::test"]
        if file.startswith(extension.TESTS):
            classes = extension.ON_THE_DEVICE if file == extension.TESTS else (file,)
            names = [f"{name}::test" for name in (*classes, *([file] if file == extension.TESTS else []))]
        return 0, "\n".join(names), ""

    monkeypatch.setattr(extension, "run", run)
    monkeypatch.setattr(extension, "is_there", lambda: True)
    names, broken = gpu_tests.collect(time.monotonic() + 60, False)
    assert not broken
    assert names[:6] == [
        "tests/test_cuda_kernels.py::TestOnTheDevice::test",
        "tests/test_cuda_kernels.py::TestBlock::test",
        "tests/test_hopper.py::test",
        "tests/test_offload.py::test",
        "tests/test_store.py::test",
        "tests/test_gpu.py::test",
    ]
    assert len(names) == len(set(names)) == len(gpu_tests.TESTS) + 3 and names[-1] == "tests/test_cuda_kernels.py::test"
    monkeypatch.setattr(extension, "is_there", lambda: False)
    assert not any("cuda" in name for name in gpu_tests.collect(time.monotonic() + 60, False)[0])


def test_the_files_named_are_there():
    for file in (*gpu_tests.TESTS, extension.TESTS):
        assert (ROOT / file.split()[0]).exists()
    for file in (f for f in gpu_tests.TESTS if f.endswith("-m gpu")):
        assert "@pytest.mark.gpu" in (ROOT / file.split()[0]).read_text()
    for name in extension.ON_THE_DEVICE:
        assert f"class {name.split('::')[1]}:" in (ROOT / extension.TESTS).read_text()


def test_what_asks_for_cudnns_attention_is_not_poisoned():
    """Poisoned memory takes deterministic algorithms, under which it is not used."""
    found = {n: fn for n, fn in vars(test_gpu).items() if n.startswith("test_") and "cudnn" in n}
    assert len(found) > 1
    for name, test in found.items():
        assert "unpoisoned" in inspect.signature(test).parameters, name


# Leaves a process behind that holds the output, and waits as well where it is told to.
CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open("child.txt.tmp", "w").write(str(child.pid))
os.replace("child.txt.tmp", "child.txt")
"""


def _is_there(path):
    """Whether that process still is; one that nobody has waited for yet is not."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{int(path.read_text())}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state in "ZX":
            return False
        time.sleep(0.1)
    os.kill(int(path.read_text()), signal.SIGKILL)
    return True


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.mark.slow
@linux
def test_a_file_that_hangs_is_not_waited_for_nor_what_it_started(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tests, "_COLLECTING", 8.0)
    start = time.monotonic()
    _, failures = gpu_tests_of(fake, tmp_path, CHILD + "time.sleep(600)\n")
    assert "not collected within 8 s" in failures["fake_gpu_tests.py"]
    assert time.monotonic() - start < 60
    assert not _is_there(tmp_path / "child.txt")


def test_collecting_ends_with_the_time(fake, tmp_path):
    found, failures = gpu_tests_of(fake, tmp_path, "import time; time.sleep(600)\n", seconds=2.0)
    assert "not collected within 2 s" in failures["fake_gpu_tests.py"]
    assert found["seconds"] < 30


def gpu_tests_of(fake, tmp_path, source, seconds=300.0):
    (tmp_path / "fake_gpu_tests.py").write_text(source)
    found = gpu_tests.run(seconds)
    return found, found["failures"]


@pytest.mark.slow
@linux
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "ends"])
def test_what_a_test_started_ends_with_its_process(fake, monkeypatch, tmp_path, hangs):
    body = "    " + CHILD.strip().replace("\n", "\n    ") + ("\n    time.sleep(600)" if hangs else "")
    _, failures = fake(f"def test_a():\n{body}\n")
    assert set(failures) == ({"test_a"} if hangs else set())
    assert not _is_there(tmp_path / "child.txt")


@linux
@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "ends"])
@pytest.mark.parametrize("way", ["command", "benchmark"])
def test_what_a_command_started_ends_with_it(monkeypatch, tmp_path, way, hangs):
    """The extension's build and its tests under compute-sanitizer; a benchmark."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    code = CHILD + "print('said', flush=True)\n" + ("time.sleep(600)\n" if hangs else "sys.exit(3)\n")
    (tmp_path / "bench" / "fake.py").write_text(code)
    start = time.monotonic()
    if way == "command":
        status, said, errors = extension.run([sys.executable, "bench/fake.py"], 5.0 if hangs else 60.0)
        assert (status, said, errors) == (None if hangs else 3, "said\n", "")
    else:
        found = gpu.run_script("fake", (), 1.0, 5.0 if hangs else 60.0, tmp_path / "fake.json")
        assert ("unfinished" in found, found.get("broke")) == (hangs, None if hangs else "exit status 3")
    assert time.monotonic() - start < 40
    assert not _is_there(tmp_path / "child.txt")


@pytest.mark.parametrize("tool", ["nvcc", "compute-sanitizer"])
def test_the_extensions_commands_say_when_they_took_too_long(monkeypatch, tmp_path, tool):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nprintf 'so far'\nsleep 600\n")
    program.chmod(0o755)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "build.py").write_text("import time; time.sleep(600)")
    monkeypatch.setattr(extension.shutil, "which", lambda name, path=None: str(program))
    start = time.monotonic()
    if tool == "nvcc":
        assert extension.build(1.0)["reason"] == "not built within 1 s"
    else:
        assert extension.sanitize(2.0) == dict.fromkeys(extension.TOOLS, "not ended within 1 s: so far")
    assert time.monotonic() - start < 30


def test_compute_sanitizer_is_found_where_nvcc_is(monkeypatch, tmp_path):
    """And where it is not there, the results say so."""
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    run = SimpleNamespace(device=torch.device("cuda"), figures={})
    monkeypatch.setattr(extension, "is_there", lambda: True)
    assert extension.sanitizer() is None and not gpu._Run._can_sanitize(run)
    assert run.figures == {"sanitizer": {"unavailable": "no such program"}}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "compute-sanitizer").touch(0o755)
    assert extension.sanitizer() == f"{tmp_path}/bin/compute-sanitizer" and gpu._Run._can_sanitize(run)


@pytest.fixture
def stuck(monkeypatch):
    """No process ends when it is killed, as one in the driver."""
    kill, started = extension._kill, []
    monkeypatch.setattr(extension, "_kill", started.append)
    monkeypatch.setattr(extension, "PATIENCE", 0.5)
    yield
    for process in started:
        kill(process)
        process.wait(30)


@pytest.mark.slow
def test_a_process_that_cannot_be_killed_is_left(stuck, fake, tmp_path, monkeypatch):
    start = time.monotonic()
    sleep = [sys.executable, "-c", "import time; time.sleep(120)"]
    assert extension.run(sleep, 0.5)[0] is None
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "fake.py").write_text("import time; time.sleep(120)")
    assert "unfinished" in gpu.run_script("fake", (), 1.0, 1.0, tmp_path / "fake.json")
    found, failures = fake("import time\ndef test_a(): time.sleep(120)\ndef test_b(): pass\n")
    assert set(failures) == {"test_a"} and found["passed"] == 1
    extension.end_all()
    extension.begin()
    assert time.monotonic() - start < 100


def test_a_share_that_does_not_end_is_left(fake, monkeypatch):
    monkeypatch.setattr(extension, "PATIENCE", 0.5)
    monkeypatch.setattr(gpu_tests.Share, "run", lambda self: time.sleep(120))
    monkeypatch.setattr(gpu_tests, "collect", lambda deadline, dry_run: (["f.py::test_a"], {}))
    start = time.monotonic()
    found, _ = fake("", seconds=1.0)
    assert time.monotonic() - start < 60
    assert found["not_run"] == 1


@pytest.mark.slow
def test_after_a_hang_the_other_files_are_first(fake, monkeypatch, tmp_path):
    """One that hangs may have others beside it that do."""
    monkeypatch.setattr(gpu_tests, "TESTS", ("fake_gpu_tests.py", "other_tests.py"))
    note = "import time\ndef note(name): open('order.txt', 'a').write(name)\n"
    (tmp_path / "other_tests.py").write_text(note + "def test_c(): note('c')\n")
    _, failures = fake(note + "def test_a(): note('a'); time.sleep(600)\ndef test_b(): note('b')\n")
    assert set(failures) == {"test_a"}
    assert (tmp_path / "order.txt").read_text() == "acb"


def test_a_share_that_breaks_fails_its_tests(fake, monkeypatch):
    def process(self, names):
        raise OSError("no space left on device")

    monkeypatch.setattr(gpu_tests.Share, "_process", process)
    _, failures = fake("def test_a(): pass\ndef test_b(): pass\n")
    assert set(failures) == {"test_a", "test_b"} and "no space left" in failures["test_a"]


# --- the script: results are left, whatever happens -------------------------------------------------------------


@pytest.fixture
def out(monkeypatch, tmp_path):
    """Where results are handed to."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setenv("OUT", str(folder))
    monkeypatch.setattr(common, "stamp", lambda device: {"device": "none", "commit": "none"})
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    return folder


ALL_WELL = {"passed": 1, "failed": 0, "skipped": 0, "collected": 1, "not_run": 0, "failures": {}, "seconds": 1.0}
PARTS = ("--dry-run", "--only", "tests", "norm", "mlp")
FILE = "gpu_cpu_tests_norm_mlp.json"


def _left(folder):
    return json.loads((folder / FILE).read_text())


@pytest.mark.parametrize("part", ["tests", "norm", "none"])
def test_a_part_that_raises_is_noted_and_the_next_ones_run(monkeypatch, out, capsys, part):
    def tests(seconds, dry_run, found, keep):
        if part == "tests":
            raise RuntimeError("nothing was collected")
        found |= ALL_WELL

    def benchmark(name, budget, left, folder, device, found):
        if part == name:
            raise RuntimeError("no such benchmark")
        found |= {"rows": [name]}

    monkeypatch.setattr(gpu, "_ours_failed", lambda found: False)
    monkeypatch.setattr(gpu_tests, "run", tests)
    monkeypatch.setattr(gpu, "run_benchmark", benchmark)
    assert gpu.main([*PARTS]) == (part != "none")
    left = _left(out)
    assert [name for name in ("tests", "norm", "mlp") if "broke" in left[name]] == ([part] if part != "none" else [])
    assert left["mlp"]["rows"] == ["mlp"]
    if part != "none":
        assert "RuntimeError" in left[part]["broke"] and "RuntimeError" in capsys.readouterr().out


def test_results_are_handed_over_after_every_part(monkeypatch, out):
    there = []

    def look():
        there.append([k for k in ("tests", "norm", "mlp") if (out / FILE).exists() and _left(out).get(k)])

    def tests(seconds, dry_run, found, keep):
        found |= ALL_WELL
        keep()  # while they run
        look()

    def benchmark(name, budget, left, folder, device, found):
        look()
        found |= {"rows": [name]}

    monkeypatch.setattr(gpu, "_ours_failed", lambda found: False)
    monkeypatch.setattr(gpu_tests, "run", tests)
    monkeypatch.setattr(gpu, "run_benchmark", benchmark)
    assert gpu.main([*PARTS]) == 0
    assert there == [["tests"], ["tests"], ["tests", "norm"]]
    assert [path.name for path in out.iterdir()] == [FILE]


@pytest.mark.slow
def test_what_is_known_is_kept_while_tests_run(fake, monkeypatch):
    monkeypatch.setattr(gpu_tests, "_KEEP", 0.1)
    kept, found = [], {}
    monkeypatch.setattr(gpu_tests, "run", lambda *a, run=gpu_tests.run: run(*a, found=found, keep=keep))

    def keep():
        kept.append(found["passed"])

    fake("import time\ndef test_a(): pass\ndef test_b(): time.sleep(2)\n")
    assert {0, 1, 2} >= set(kept) >= {1} and found["passed"] == 2


def test_a_copy_that_fails_leaves_the_one_before_and_breaks_nothing(monkeypatch, out):
    def copy(path, to):
        (Path(to) / path.name if Path(to).is_dir() else Path(to)).write_text("{half")
        raise OSError("no space left on device")

    (out / FILE).write_text('{"before": true}')
    monkeypatch.setattr(gpu_tests, "run", lambda seconds, dry_run, found, keep: found.update(ALL_WELL))
    monkeypatch.setattr(gpu, "run_benchmark", lambda *a: a[-1].update(rows=[]))
    monkeypatch.setattr(gpu.shutil, "copy", copy)
    assert gpu.main([*PARTS]) == 1
    assert _left(out) == {"before": True}


def test_a_result_that_is_no_json_breaks_its_benchmark_alone(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "fake.py").write_text("import sys; open(sys.argv[-1], 'w').write('{')")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = gpu.run_script("fake", (), 60.0, 60.0, tmp_path / "fake.json")
    assert found["rows"] == [] and "no JSON" in found["broke"]


# bench/gpu.py with other tests and benchmarks, in `sys.argv[1]`. What a shell runs in the background ignores SIGINT.
SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from bench import common, extension, gpu, gpu_tests
common.ROOT = gpu.ROOT = Path(sys.argv[1])
common.stamp = lambda device: {"device": "none", "commit": "none"}
gpu_tests.TESTS = ("fake_gpu_tests.py",)
"""


def _script(tmp_path, code, *arguments):
    """That script, and where it hands results to."""
    out = tmp_path / "out"
    out.mkdir()
    env = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT + code, str(tmp_path), "--dry-run", *arguments]
    return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL), out


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("part", ["tests", "norm"])
def test_a_signal_ends_every_process_and_leaves_what_was_found(tmp_path, part, number):
    hang = "    " + CHILD.strip().replace("\n", "\n    ") + "\n    time.sleep(600)\n"
    (tmp_path / "fake_gpu_tests.py").write_text(
        f"class TestBadInput:\n  def test_a(self): pass\n  def test_b(self):\n{hang}"
    )
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "norm.py").write_text(
        f"import sys\nopen(sys.argv[-1], 'w').write('{{\"rows\": [1]}}')\ndef run():\n{hang}\nrun()"
    )
    code = "gpu_tests._WORKERS = 1\nsys.exit(gpu.main(sys.argv[2:]))\n"
    process, out = _script(tmp_path, code, "--only", part)
    try:
        until = time.monotonic() + 90
        while not (tmp_path / "child.txt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    finally:
        process.kill()
        process.wait(30)
    assert not _is_there(tmp_path / "child.txt")
    left = json.loads((out / f"gpu_cpu_{part}.json").read_text())
    assert left["unfinished"] == f"signal {int(number)}"
    if part == "tests":
        assert (left["tests"]["passed"], left["tests"]["collected"]) == (1, 2)
    else:
        assert left["norm"] == {"rows": [1], "unfinished": f"signal {int(number)}"}
        assert json.loads((out / "norm_cpu.json").read_text())["rows"] == [1]


def test_a_signal_that_was_ignored_still_is(monkeypatch):
    """As nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with gpu._signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_script_ends_whatever_it_waits_for(tmp_path):
    code = (
        "gpu._OVER = 1.0\ngpu_tests.run = lambda *a: (a[2].update(passed=3), time.sleep(600))\n"
        "sys.exit(gpu.main(sys.argv[2:]))\n"
    )
    process, out = _script(tmp_path, code, "--only", "tests", "--minutes", "0.02")
    try:
        assert process.wait(90) == 1
    finally:
        process.kill()
        process.wait(30)
    left = json.loads((out / "gpu_cpu_tests.json").read_text())
    assert left["tests"] == {"passed": 3} and "had not ended" in left["unfinished"]


def test_nothing_is_started_once_all_was_ended(tmp_path, monkeypatch):
    extension.end_all()
    try:
        with pytest.raises(extension.StoppedError):
            extension.start([sys.executable, "-c", ""])
    finally:
        extension.begin()
    assert extension.run([sys.executable, "-c", "print(3)"], 60.0)[:2] == (0, "3\n")


# --- a GPU that is not there ------------------------------------------------------------------------------------


class _OnTheCPU(TorchFunctionMode):
    """Whatever is asked for on a GPU is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        return func(*map(self._here, args), **{k: self._here(v) for k, v in (kwargs or {}).items()})

    def _here(self, given):
        return "cpu" if isinstance(given, (str, torch.device)) and str(given).startswith("cuda") else given


class _Event:
    """Every run between two of them takes a millisecond."""

    def __init__(self, enable_timing): ...
    def record(self): ...
    def synchronize(self): ...
    def elapsed_time(self, other):
        return 1.0


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The benchmarks' GPU code with tensors on the CPU, results under `tmp_path` as an H200's, nothing compiled.

    Yields the functions that were to be compiled, with their options.
    """
    compiled = []
    instead = {
        "is_available": lambda: True,
        "get_device_name": lambda device=None: "NVIDIA H200",
        "get_device_capability": lambda device=None: (9, 0),
        "memory_allocated": lambda device=None: 1000,
        "max_memory_allocated": lambda device=None: 2000,
        "Event": _Event,
        "Stream": object,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        **dict.fromkeys(("device", "stream", "graph"), lambda *a: contextlib.nullcontext()),
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "_sleep"), lambda *a: None),
    }
    for name, fake in instead.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(norm, "_LAUNCHES", 1)
    monkeypatch.setattr(common, "ceiling", lambda device: 1.0)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(steps, "free", lambda device: None)  # collects garbage, which takes long here
    monkeypatch.setattr(steps, "compiled", lambda fn, **options: compiled.append(options) or fn)
    monkeypatch.setattr(block_gpu.Setup, "of", lambda device, small: block_gpu.Setup(TINY, device, torch.bfloat16, 33))
    with _OnTheCPU():
        yield compiled


TINY = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 176}


def _rows(tmp_path, name):
    figures = json.loads((tmp_path / f"{name}_h200.json").read_text())
    assert figures["device"] == "NVIDIA H200"
    return figures["rows"]


def _table(name, columns=5):
    """The table that the report makes of a result: as many cells in every row."""
    rows = [line for line in report.TABLES[name]().splitlines() if line.startswith("|")]
    assert len(rows) > 2 and len({row.count("|") for row in rows}) == 1 and rows[0].count("|") > columns
    return rows


def test_the_script_as_on_a_gpu(pretended, monkeypatch, tmp_path):
    ran = []

    def run_script(name, options, budget, left, path, found=None):
        ran.append((name, options))
        found = {} if found is None else found
        found |= {"rows": [], "tuned": []}
        return found

    for name, found in {"build": {"built": True}, "sanitize": {"memcheck": "clean"}, "is_there": True}.items():
        monkeypatch.setattr(extension, name, lambda *a, found=found: found)
    monkeypatch.setattr(extension, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(gpu_tests, "run", lambda seconds, dry_run, found, keep: found.update(ALL_WELL))
    monkeypatch.setattr(gpu, "run_script", run_script)
    assert gpu.main(["--tune"]) == 0
    figures = json.loads((tmp_path / "gpu_h200.json").read_text())
    assert figures["extension"]["built"] and figures["sanitizer"] == {"memcheck": "clean"}
    assert figures["tests"] == ALL_WELL and figures["tuned"] == []
    assert ran == [*((n, b.gpu) for n, b in gpu.BENCHMARKS.items()), ("attention", ("--tune",))]


@pytest.mark.parametrize("name", gpu.BENCHMARKS)
def test_a_benchmark_takes_the_options_it_is_given(pretended, monkeypatch, tmp_path, name):
    script = sys.modules[f"bench.{name}"]
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_80")  # where the one for Hopper has nothing to do
    monkeypatch.setattr(block_gpu if script is block else script, "run", lambda *a: {"rows": []}, raising=False)
    options = [*gpu.BENCHMARKS[name].gpu, "--budget", "1", "--out", str(tmp_path / "a.json")]
    assert script.main(options) == 0


def test_attention_as_on_a_gpu(pretended, monkeypatch, tmp_path):
    sizes = ((40, True, 4), (40, True, 2), (64, False, 4))
    monkeypatch.setattr(attention, "cases", lambda which: [attention.Case(n, 16, c, 4, kv, 2) for n, c, kv in sizes])
    assert attention.main(["--quick", "--no-flex"]) == 0
    rows = {(r["length"], r["kv_heads"], r["variant"]): r for r in _rows(tmp_path, "attention")}
    for length, _, kv_heads in sizes:
        ours = rows[length, kv_heads, "pyckpt"]
        assert ours["forward_ms"] == ours["backward_call_ms"] == 1.0 and ours["error"] < 0.01
        assert "backend" in rows[length, kv_heads, "cudnn"]["failed"]  # there is none for a CPU
    table = [[cell.strip() for cell in row.split("|")[1:4]] for row in _table("attention-gpu")[2:]]
    assert table == [["16", "full", "64"], ["16", "causal", "40"], ["16", "causal, 2 heads a key head", "40"]]
    assert "pyckpt over the others" in "\n".join(gpu.summary({"rows": list(rows.values())}))


def test_a_case_of_attention_that_breaks_costs_no_other(pretended, monkeypatch, tmp_path):
    def measure(case, flex, device, repeats):
        if case.length == 4096:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")
        return [{"variant": "flash", "failed": "none"}]

    monkeypatch.setattr(attention, "measure", measure)
    assert attention.main(["--quick"]) == 1
    rows = _rows(tmp_path, "attention")
    assert len(rows) == len(attention.cases("quick"))
    broken = {r["length"]: r["failed"] for r in rows if r["variant"] == steps.EVERY}
    assert broken == {4096: "RuntimeError: CUDA error: an illegal memory access was encountered"}


def test_an_error_without_words_is_a_row(pretended, monkeypatch):
    """As a bare assert's in a compiler."""

    def bare(q, k, v):
        raise AssertionError

    monkeypatch.setattr(attention, "variants", lambda *a: {"pyckpt": bare})
    (row,) = attention.measure(attention.Case(8, 16, True, 2, 2, 1), False, "cuda", 3)
    assert row["failed"] == "AssertionError: "
    problem = SimpleNamespace(case=attention.Case(8, 16, True, 2, 2, 1), candidates=lambda *a: [tuning.Config(64, 64)])
    problem.run = lambda op, config: bare(1, 2, 3) if config else [torch.ones(2)]
    rows = hopper.measure(problem, "fwd", True, time.monotonic() + 60)
    assert [r.get("failed") for r in rows] == [None, "AssertionError: "]


def test_flex_attention_is_compiled_for_each_case_and_keeps_its_graph(pretended):
    case = attention.Case(64, 16, False, 2, 2, 1)
    for _ in range(2):
        assert attention.FLEX in attention.variants(case, True, "cuda")
    assert pretended == [{"keep_graph": True}] * 2


def test_tuning_outlives_a_tile_that_does_not_compile(pretended, monkeypatch, tmp_path, capsys):
    configs = [tuning.Config(64, 64), tuning.Config(64, 32), tuning.Config(32, 64)]

    def time_config(config, go):
        if config is configs[1]:
            raise RuntimeError("PassManager::run failed")
        if len(done) > 5:
            raise KeyboardInterrupt  # what was found before is there
        done.append(config)
        return 2.0 if config is configs[0] else 1.0

    done = []
    monkeypatch.setattr(attention.Case, "of", lambda *a: attention.Case(8, 16, True, 2, 2, 1))
    monkeypatch.setattr(kernels, "forward", lambda q, k, v, options: (q, q))
    monkeypatch.setattr(kernels, "delta", lambda do, o: o)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "candidates", lambda key: configs)
    monkeypatch.setattr(tuning, "time_config", time_config)
    with pytest.raises(KeyboardInterrupt):
        attention.main(["--tune"])
    found = json.loads((tmp_path / "attention_tuning_h200.json").read_text())["tuned"]
    assert [(r["ms"], r["table_ms"], len(r["all"])) for r in found] == [(1.0, 2.0, 3)] * 3
    assert "PassManager::run failed" in capsys.readouterr().out


@pytest.mark.parametrize("compile_too", [False, True])
def test_norm_as_on_a_gpu(pretended, monkeypatch, tmp_path, compile_too):
    """torch.compile anew for each case: at the ninth version of a function PyTorch would go on uncompiled."""
    monkeypatch.setattr(norm, "cases", lambda device: [norm.Case(op, 8, 256) for op in norm._STANDS_FOR])
    monkeypatch.setattr(norm, "copy_bandwidth", lambda device, repeats: 1e9)
    assert norm.main(["--repeats", "1", *([] if compile_too else ["--no-compile"])]) == 0
    rows = _rows(tmp_path, "norm")
    assert all(r["backward_seconds"] == 1e-3 for r in rows)
    assert {r["variant"] for r in rows} == {"pyckpt", "eager", *(["compiled"] if compile_too else [])}
    assert pretended == [{"keep_graph": True}] * 4 * compile_too
    _table("norm-gpu")


def test_a_norm_that_is_not_a_number_has_no_time(pretended, monkeypatch):
    def wrong(x, weight, eps):
        y = torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
        return y + (0 * weight - 0 * weight).sqrt().sum()  # dw alone is NaN

    monkeypatch.setattr(norm.pyckpt, "rms_norm", wrong)
    rows = norm.measure(norm.Case("rms_norm", 8, 256), "cuda", 1, 1e9, compile_too=False)
    assert "wrong: error nan" in rows[0]["failed"] and "forward_seconds" not in rows[0]
    assert "forward_seconds" in rows[1]


def test_block_as_on_a_gpu(pretended, tmp_path):
    assert block.main(["40", "--layers", "2", "--repeats", "1"]) == 0
    figures = json.loads((tmp_path / "block_h200_x2.json").read_text())
    found = {r["variant"] for r in figures["rows"] if "seconds" in r}
    assert found == {"plain", "compiled", "checkpoint", *SAVE_SETS, "all, cudnn", "attention, cudnn"}
    assert all(r["sdpa"]["best"] == "flash" for r in figures["rows"] if r["variant"] == "plain")
    assert "unchecked" not in figures
    _table("block-gpu")


@pytest.mark.parametrize("script", [mlp, loss], ids=["mlp", "loss"])
def test_the_parts_of_a_block_as_on_a_gpu(pretended, monkeypatch, tmp_path, script):
    case = mlp.Case(33, 32, 72, "swiglu") if script is mlp else loss.Case(63, 64, 1000)
    monkeypatch.setattr(script, "cases", lambda device, quick: [case])
    assert script.main(["--repeats", "1"]) == 0
    name = "mlp" if script is mlp else "loss"
    rows = _rows(tmp_path, name)
    assert {r["variant"] for r in rows if "seconds" in r} >= {"pyckpt", "eager", "compiled"}
    assert all(r["peak_bytes"] == 1000 for r in rows if "seconds" in r)
    _table(name)


def _stream(monkeypatch, *arguments):
    monkeypatch.setattr(stream_gpu, "LLAMA", {"vocab_size": 100, **TINY})
    monkeypatch.setattr(sys, "argv", ["stream_gpu.py", "300", "--tile", "64", *arguments])
    return stream_gpu.main()


def test_streaming_as_on_a_gpu(pretended, monkeypatch, tmp_path):
    monkeypatch.setattr(stream_gpu, "trace", lambda step: step() or {"hidden": 0.5})
    assert _stream(monkeypatch) == 0
    rows = {r["variant"]: r for r in _rows(tmp_path, "stream")}
    assert list(rows) == ["streamed", "cudnn", "resident", "checkpoint"]
    assert all("failed" not in r and r["peak_bytes"] == 1000 and r["seconds"] > 0 for r in rows.values())
    assert rows["streamed"]["hidden"] == 0.5
    _table("stream-gpu")


def test_a_step_that_cannot_be_traced_keeps_its_time(pretended, monkeypatch, tmp_path):
    def trace(step):
        raise RuntimeError("CUPTI is not there")

    monkeypatch.setattr(stream_gpu, "trace", trace)
    monkeypatch.setattr(block_gpu, "best_sdpa", lambda *a: pytest.fail("it has no row that needs it"))
    assert _stream(monkeypatch, "--only", "streamed") == 0
    (row,) = _rows(tmp_path, "stream")
    assert row["seconds"] > 0 and row["untraced"] == "RuntimeError: CUPTI is not there"


def test_both_models_of_the_streamed_benchmark_are_the_same(pretended):
    run = stream_gpu.Run(torch.device("cuda"), 2, 1, {"vocab_size": 100, **TINY})
    tokens = torch.randint(0, 100, (1, 30))
    assert torch.allclose(run.ours.loss(tokens).float(), run.plain.loss(tokens).float(), rtol=0.01)
    grads = {n: p.grad.data_ptr() for n, p in run.ours.named_parameters()}
    assert grads == {n: p.grad.data_ptr() for n, p in run.plain.named_parameters()}


def test_what_hopper_found_before_it_broke_is_left(pretended, monkeypatch, tmp_path, capsys):
    def measure(problem, op, quick, deadline, rows):
        rows.append({**dataclasses.asdict(problem), "op": op, "variant": hopper.TRITON})
        rows.append(
            {**dataclasses.asdict(problem), "op": op, "variant": "(64, 64)", "failed": "AcceleratorError: lost"}
        )
        if op == "dkdv":
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(tuning, "architecture", lambda device: tuning.HOPPER)
    monkeypatch.setattr(hopper, "Problem", lambda case: case)
    monkeypatch.setattr(hopper, "measure", measure)
    assert hopper.main(["--quick"]) == 1
    rows = _rows(tmp_path, "hopper")
    broken = [r for r in rows if r["variant"] == steps.EVERY]
    assert [r["op"] for r in broken] == ["dkdv"] * 4 and "unspecified launch failure" in broken[0]["failed"]
    assert sum(r["variant"] == "(64, 64)" for r in rows) == 14
    assert "AcceleratorError: lost" in capsys.readouterr().out


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


def test_a_mixtures_benchmark_measures_every_variant(monkeypatch):
    pytest.importorskip("transformers")
    small = {"hidden_size": 64, "moe_intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, size in {**small, "head_dim": 32}.items():
        monkeypatch.setitem(mixture.CONFIG, name, size)
    rows = swap.measure(mixture.make_model(4, 512), 512, 1, mixture.NAMES)
    assert [row["variant"] for row in rows] == mixture.NAMES and all(row["seconds"] > 0 for row in rows)
    peaks = {row["variant"]: row["peak_bytes"] for row in rows}
    assert max(peaks["swap"], peaks["swap, streamed"]) < peaks["transformers"]
    assert set(swap.ratios(rows)["swap"]) >= {"time over checkpointing", "peak over transformers"}


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
