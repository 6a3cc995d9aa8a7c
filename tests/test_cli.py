"""The command line: what it passes on, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyckpt import cli, compare, train
from pyckpt.compare.results import Results, Row

for _extra in ("typer", "rich", "matplotlib"):
    pytest.importorskip(_extra, reason="needs pip install 'pyckpt[train]'")


def pyckpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    command = [sys.executable, "-c", "from pyckpt.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    """Run the command in this process; gives the exit code, or the message it ends with."""
    monkeypatch.setattr(sys, "argv", ["pyckpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[train.TrainConfig]:
    """Instead of training, note the configurations."""
    seen: list[train.TrainConfig] = []
    monkeypatch.setattr(train, "run", lambda config, console=None: seen.append(config))
    monkeypatch.setattr(train, "exit_code", lambda result: 0)
    return seen


@pytest.mark.parametrize("command", ["train", "compare", "doctor"])
def test_each_command_has_help_in_80_columns(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert called(monkeypatch, command, "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown and max(map(len, shown.splitlines())) <= 80


def test_every_setting_of_a_run_is_a_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(monkeypatch, "train", "--help")
    shown = capsys.readouterr().out
    for name in train.TrainConfig.__dataclass_fields__:
        assert name == "data" or f"--{name.replace('_', '-')} " in shown


def test_flags_become_the_configuration(run: list[train.TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = "train text.txt --d-model 64 --lr 1e-3 --segments 2 --save input --tie-embeddings --out there"
    assert called(monkeypatch, *flags.split()) == 0
    assert called(monkeypatch, "train", "--segments", "sqrt", "--overwrite") == 0
    assert run == [
        train.TrainConfig(
            data="text.txt", d_model=64, lr=1e-3, segments=2, save="input", tie_embeddings=True, out="there"
        ),
        train.TrainConfig(segments="sqrt", overwrite=True),
    ]


def test_a_resumed_run_keeps_its_own_settings(
    run: list[train.TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pyckpt.train.folder import RunFolder

    begun = train.TrainConfig(d_model=64, steps=50, overwrite=True, out=str(tmp_path))
    RunFolder(tmp_path).begin(begun)
    assert called(monkeypatch, "train", "--resume", "--out", tmp_path, "--save", "input") == 0
    assert run == [train.TrainConfig(d_model=64, steps=50, out=str(tmp_path), resume=True, save="input")]


@pytest.mark.parametrize(
    ("begun", "flags", "resumed"),
    [
        ({"keep_within": "1GiB"}, "--save input", {"save": "input"}),
        ({"keep_within": "1GiB"}, "--segments sqrt", {"segments": "sqrt"}),
        ({"keep_within": "1GiB"}, "--keep-within 2GiB", {"keep_within": "2GiB"}),
        ({"keep_within": "1GiB"}, "--prompt x", {"keep_within": "1GiB", "prompt": "x"}),
        ({"save": "input", "segments": 2}, "--keep-within 1GiB", {"keep_within": "1GiB"}),
        ({"place": "x=file", "place_path": "."}, "--keep-within 1GiB", {"keep_within": "1GiB"}),
    ],
)
def test_what_a_resumed_run_keeps_is_what_is_said_last(
    begun: dict[str, Any],
    flags: str,
    resumed: dict[str, Any],
    run: list[train.TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from pyckpt.train.folder import RunFolder

    RunFolder(tmp_path).begin(train.TrainConfig(**begun))
    assert called(monkeypatch, "train", "--resume", "--out", tmp_path, *flags.split()) == 0
    assert run == [train.TrainConfig(resume=True, out=str(tmp_path), **resumed)]
    run[0].resolved()


def test_a_run_that_was_moved_is_resumed_where_it_is_now(
    run: list[train.TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And not one that is still, or again, where it was begun."""
    from pyckpt.train.folder import RunFolder

    monkeypatch.chdir(tmp_path)
    for name in ("runs/train", "runs/mine"):
        Path(name).mkdir(parents=True)
        RunFolder(Path(name)).begin(train.TrainConfig(out="runs/mine"))
    assert called(monkeypatch, "train", "--resume") == 0
    assert run == [train.TrainConfig(resume=True, out=str(Path("runs/train")))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "/no/such/file"], "/no/such/file does not exist"),
        (["train", ""], "data='' names nothing: give a path"),
        (["train", "--seed", str(1 << 64)], "expected a number below 2**64"),
        (["train", "--heads", "5"], "does not divide by heads=5"),
        (["train", "--segments", "cbrt"], "expected sqrt or a whole number"),
        (["train", "--resume", "--overwrite"], "one of them"),
        (["train", "--resume", "--out", "/no/such/run"], "/no/such/run holds no run"),
        (["compare", "--lengths", "512,many"], "'many' was given, expected whole numbers"),
        (["compare", "--dtype", "int8"], "dtype='int8'"),
        (["compare", "--device", "abacus"], "device='abacus'"),
        (["compare", "--variants", "best"], "'best'"),
        (["compare", "--vocab-size", "1"], "vocab_size must be None or an int of at least 2, got 1"),
        (["compare", "--budget", "-1"], "budget_seconds must be None or a number of seconds, at least 0, got -1.0"),
        (["compare", "--budget", "inf"], "at least 0, got inf"),
        (["compare", "--seed", str(1 << 64)], "seed must be an int of at least 0 and below 2**63, got 1844"),
        (["compare", "--out", "file"], "out=file is a file: give the name of a folder"),
        (["compare", "--out", "file/under"], "out=file/under can't be made a folder"),
        (["train", "two", "--seq-len", "2"], "two is too short: of its 2 bytes"),
        (["train", "three", "--seq-len", "2"], "three is too short: of its 3 bytes the validation part has 0 bytes"),
        (["train", "three", "--out", "file"], "out=file is a file: give the name of a folder"),
        (["train", "empty"], "empty holds no text"),
        (["train", "folder"], "folder holds no text files"),
        (["train", "--steps", "3", "--warmup", "4"], "warmup=4 is longer than steps=3"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("file", "x\n"), ("empty", ""), ("two", "ab"), ("three", "abc")):
        Path(name).write_text(text, encoding="utf-8")
    Path("folder").mkdir()
    said = called(monkeypatch, *arguments)
    assert isinstance(said, str) and said.startswith("pyckpt: error: ")
    assert message in said and "\n" not in said


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pyckpt", "--debug", "train", "/no/such/file"])
    with pytest.raises(ValueError, match="does not exist"):
        cli.main()


@pytest.mark.parametrize(
    ("said", "shown"), [("this run needs 9 bytes of host memory", "this run needs 9 bytes"), ("", "out of memory")]
)
def test_too_little_memory_is_one_line(said: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError(said)

    monkeypatch.setattr(train, "run", fails)
    assert called(monkeypatch, "train").startswith(f"pyckpt: error: {shown}")


def test_what_an_encoding_lacks_is_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a pipe on Windows, or under PYTHONIOENCODING=ascii."""
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", write_through=True))
    monkeypatch.setattr("pyckpt.doctor.main_text", lambda: "2 × 3\n")
    assert called(monkeypatch, "doctor") == 0
    assert out.getvalue() == b"2 ? 3\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_one_line_that_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == missing or n.startswith(missing + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert called(monkeypatch, "--help") == (
        f"pyckpt: error: the command line needs {missing}: pip install 'pyckpt[train]'"
    )


@pytest.mark.slow
def test_the_version_and_the_doctor_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyckpt as package

    shown = pyckpt("--version").stdout
    assert shown == f"pyckpt {package.__version__}\n"
    module = subprocess.run([sys.executable, "-m", "pyckpt", "--version"], capture_output=True, text=True)
    assert module.stdout == shown
    found = pyckpt("doctor")
    assert found.returncode == 0 and "torch" in found.stdout and "attention_fwd" in found.stdout


def test_training_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n\n" * 300, encoding="utf-8")
    size = ["--d-model", 16, "--layers", 1, "--heads", 2, "--seq-len", 16, "--batch-size", 2]
    arguments = ["train", text, *size, "--steps", 3, "--sample-tokens", 5, "--out", tmp_path / "run"]
    first = pyckpt(*arguments)
    assert first.returncode == 0, first.stderr
    assert "step 3/3  loss" in first.stdout and "Validation loss" in first.stdout
    assert (tmp_path / "run" / "loss.png").exists() and (tmp_path / "run" / "model").is_dir()
    refused = called(monkeypatch, *arguments)
    assert "holds a run already" in refused and "\n" not in refused


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_in_a_pipeline_whose_reader_is_gone_leaves_a_checkpoint(tmp_path: Path) -> None:
    """Of `pyckpt train 2>&1 | tee log`, Ctrl-C ends tee too, and often first."""
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x + 1\n\n" * 300, encoding="utf-8")
    size = ["--d-model", 16, "--layers", 1, "--heads", 2, "--seq-len", 16, "--batch-size", 2, "--log-every", 1]
    # A shell's background jobs ignore SIGINT, and so would their children.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from pyckpt.cli import main; main()"
    )
    arguments = ["train", text, *size, "--steps", 1_000_000, "--warmup", 0, "--out", tmp_path / "run"]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert any(line.startswith(b"step ") and b" peak " in line for line in process.stdout)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_comparing_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    flags = f"compare --lengths 16,32 --d-model 32 --heads 2 --repeats 1 --device cpu --out {tmp_path / 'out'}"
    assert called(monkeypatch, *flags.split(), "--variants", "plain,checkpoint,attention") == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "out" / "compare.png") in shown  # in one piece, however long
    assert max(len(line) for line in shown.splitlines() if str(tmp_path) not in line) <= 80
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert {(row["length"], row["variant"]) for row in found["rows"]} == {
        (length, variant) for length in (16, 32) for variant in ("plain", "checkpoint", "attention")
    }
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")


def a_comparison(**row: Any) -> Results:
    sizes = {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_ff": 64, "causal": True}
    config = {**sizes, "n_layers": 1, "batch": 1, "dtype": "float32"}
    return Results(config, "a CPU", {}, [Row(16, "plain", **row)])


def test_a_comparison_is_on_the_disk_before_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pyckpt compare | head` reads a few lines and is gone: rich ends the process."""

    def gone(*_: Any) -> None:
        raise SystemExit(1)

    found = a_comparison(peak_bytes=1, saved_bytes=1, seconds=1.0, iqr_seconds=0.0, all_seconds=(1.0,))
    monkeypatch.setattr(compare, "run", lambda **_: found)
    monkeypatch.setattr(compare, "show", gone)
    assert called(monkeypatch, "compare", "--out", tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.png"]


def test_a_comparison_that_failed_throughout_is_shown_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "run", lambda **_: a_comparison(error="out of memory"))
    assert "nothing to draw" in called(monkeypatch, "compare", "--out", tmp_path)
    assert "OOM" in capsys.readouterr().out
    assert Results.load_json(tmp_path / "compare.json").rows == [Row(16, "plain", error="out of memory")]


def test_a_folder_that_cant_be_written_to_is_refused_before_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(compare, "run", lambda **_: pytest.fail("it ran"))
    assert f"out={tmp_path} can't be written to" in called(monkeypatch, "compare", "--out", tmp_path)


def test_importing_it_imports_no_compiler() -> None:
    """torch._dynamo takes as long as PyTorch itself."""
    code = "import sys, pyckpt; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
