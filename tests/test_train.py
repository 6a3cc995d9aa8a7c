"""Training: data, settings, optimiser, checkpoints, and whole runs of a tiny model, killed and resumed."""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import math
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import a_few
from torch import nn

from pyckpt import CkptCausalLM, train
from pyckpt.train import checkpoint as checkpoints
from pyckpt.train import data, loop, optim
from pyckpt.train.folder import RunFolder
from pyckpt.train.history import History, MetricsLog
from pyckpt.train.sample import printable, start_of
from pyckpt.train.signals import StopRequest
from pyckpt.train.trainer import Trainer

for _extra in ("rich", "matplotlib", "safetensors", "tokenizers"):
    pytest.importorskip(_extra, reason="needs pip install 'pyckpt[train]'")

TEXT = "".join(f"def f{i % 7}(x):\n    return x + {i % 10}\n\n" for i in range(600))
TINY: dict[str, Any] = {
    "d_model": 32,
    "layers": 2,
    "heads": 2,
    "seq_len": 32,
    "batch_size": 4,
    "steps": 20,
    "warmup": 2,
    "lr": 1e-2,
    "checkpoint_every": 5,
    "eval_every": 8,
    "eval_batches": 2,
    "sample_tokens": 8,
    "device": "cpu",
    "dtype": "float32",
}

SMALLEST: dict[str, Any] = {"layers": 1, "batch_size": 1, "eval_batches": 1, "steps": 1, "warmup": 0}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text(TEXT)
    return path


def config(text: Path, **changes: Any) -> train.TrainConfig:
    return train.TrainConfig(**{**TINY, "data": str(text), "out": str(text.parent / "run"), **changes})


def resume(given: train.TrainConfig) -> train.TrainConfig:
    return dataclasses.replace(given, resume=True)


def weights_of(result: train.TrainResult) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in result.model.named_parameters()}


def assert_same(one: train.TrainResult, other: train.TrainResult) -> None:
    assert one.history.train == other.history.train
    assert one.history.validation == other.history.validation
    others = weights_of(other)
    for name, weight in weights_of(one).items():
        assert torch.equal(weight, others[name]), name


def files_under(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


# Data


def test_without_a_path_the_text_is_pythons_own_library() -> None:
    corpus = data.load_corpus(None, 256)
    again = data.load_corpus(None, 256)
    assert corpus.fingerprint == again.fingerprint
    assert corpus.fingerprint is corpus.fingerprint  # not made for every checkpoint anew
    assert corpus.vocab_size == 256 and corpus.train.dtype == torch.uint8
    assert 1_000_000 < corpus.total_bytes <= data.STDLIB_BYTES
    held = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.04 < held < 0.12
    assert b"import " in bytes(corpus.train.tolist())


def test_a_batch_is_a_function_of_seed_and_number() -> None:
    tokens = torch.arange(200, dtype=torch.int32)
    batch = data.training_batch(tokens, 3, 7, 16, 10)
    assert batch.shape == (16, 10) and batch.dtype == torch.int64
    assert torch.equal(batch, data.training_batch(tokens, 3, 7, 16, 10))
    assert torch.equal(batch - batch[:, :1], torch.arange(10).expand(16, 10))  # runs of neighbours
    assert not torch.equal(batch, data.training_batch(tokens, 3, 8, 16, 10))
    assert not torch.equal(batch, data.training_batch(tokens, 4, 7, 16, 10))


def test_batches_reach_every_place_about_equally_often() -> None:
    tokens = torch.arange(20)
    starts = torch.cat([data.training_batch(tokens, 0, i, 8, 5)[:, 0] for i in range(800)])
    counts = torch.bincount(starts, minlength=16)
    assert len(counts) == 16  # the last start is 20 - 5
    assert counts.min() > 0.8 * 400 and counts.max() < 1.2 * 400


def test_a_split_is_by_whole_files_where_they_fit() -> None:
    texts = [(str(i), bytes([i]) * 100) for i in range(40)]
    first, held = data.split(texts)
    assert first == texts[:38] and held == texts[38:]


@pytest.mark.parametrize("line", [b"a line of text\n", "süß".encode(), b"x"])
def test_one_file_is_split_between_lines_or_characters(line: bytes) -> None:
    whole = line * 2000
    first, held = data.split([("one", whole)])
    start, end = first[0][1], held[0][1]
    assert start + end == whole
    assert 0.05 <= len(end) / len(whole) < 0.06
    start.decode(), end.decode()
    assert not line.endswith(b"\n") or start.endswith(b"\n")


def test_validation_sequences_are_fixed_and_within_the_text() -> None:
    tokens = torch.arange(103)
    batches = data.validation_batches(tokens, 2, 3, 10)
    rows = torch.cat(batches)
    assert [tuple(b.shape) for b in batches] == [(3, 10), (3, 10)]
    assert rows[0, 0] == 0 and rows[-1, -1] == 102
    assert [tuple(b.shape) for b in data.validation_batches(tokens, 99, 8, 50)] == [(2, 50)]


def test_a_folder_is_read_without_hidden_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / ".hidden").write_text("secret" * 100)
    (tmp_path / "sub/.git/c").write_text("secret" * 100)
    (tmp_path / "image").write_bytes(b"\0\1\2" * 100)
    corpus = data.load_corpus(str(tmp_path), 32)
    assert corpus.files == 2
    assert b"secret" not in bytes(corpus.train.tolist() + corpus.validation.tolist())
    assert "1 file" in corpus.notes[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["</s>"]
    )
    made.train_from_iterator([TEXT], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def test_text_is_tokenised_by_a_tokenizer_json(text: Path, tokenizer: Path) -> None:
    corpus = data.load_corpus(str(text), 32, str(tokenizer))
    tokens = [*corpus.train.tolist(), *corpus.validation.tolist()]
    assert corpus.train.dtype == torch.int32 and max(tokens) < corpus.vocab_size
    assert len(tokens) < len(TEXT) / 2
    assert corpus.decode(tokens).replace("</s>", "") == TEXT
    assert corpus.validation_bytes == len(corpus.decode(corpus.validation.tolist()).removesuffix("</s>").encode())
    assert corpus.decode(corpus.encode("def f1(x):")) == "def f1(x):"


def test_pieces_of_a_long_text_are_all_tokenised(tmp_path: Path, tokenizer: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 15)
    corpus = data.load_corpus(str(long), 32, str(tokenizer))
    both = corpus.decode([*corpus.train.tolist(), *corpus.validation.tolist()])
    assert both.replace("</s>", "") == TEXT * 15


def test_a_tokenizer_cuts_and_fills_up_nothing(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    changed = Tokenizer.from_file(str(tokenizer))
    changed.enable_truncation(64)
    changed.enable_padding(length=10_000)
    changed.save(str(tmp_path / "changed.json"))
    corpus = data.load_corpus(str(text), 32, str(tmp_path / "changed.json"))
    assert corpus.fingerprint == data.load_corpus(str(text), 32, str(tokenizer)).fingerprint


def test_tokens_of_many_bytes_are_held_out_in_sequences(text: Path, tokenizer: Path) -> None:
    """Two sequences' worth of bytes are much less than a sequence of tokens."""
    whole = data.load_corpus(str(text), 32, str(tokenizer))
    tokens = len(whole.train) + len(whole.validation)
    corpus = data.load_corpus(str(text), tokens // 10, str(tokenizer))
    assert len(corpus.validation) >= tokens // 10
    both = corpus.decode([*corpus.train.tolist(), *corpus.validation.tolist()])
    assert both.replace("</s>", "") == TEXT
    with pytest.raises(ValueError, match="too short"):
        data.load_corpus(str(text), tokens // 2, str(tokenizer))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links_to_a_file_are_read_once(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).write_text(TEXT + name)
    alone = data.load_corpus(str(tmp_path), 32)
    (tmp_path / "d").symlink_to("a")
    os.link(tmp_path / "b", tmp_path / "e")
    again = data.load_corpus(str(tmp_path), 32)
    assert (again.files, again.fingerprint) == (3, alone.fingerprint)


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 elsewhere")
def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xfe.txt")).write_text(TEXT)
    corpus = data.load_corpus(str(folder), 32)
    assert corpus.files == 1
    corpus.name.encode()


@pytest.mark.parametrize("inside", [".", "runs/one"])
def test_a_run_inside_its_own_data_is_not_trained_on(tmp_path: Path, inside: str) -> None:
    (tmp_path / "text.py").write_text(TEXT)
    (tmp_path / inside).mkdir(parents=True, exist_ok=True)
    given = config(tmp_path / "text.py", data=str(tmp_path), out=str(tmp_path / inside), steps=4, checkpoint_every=2)

    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    train.run(given, on_step=stop)
    if inside != ".":
        (tmp_path / inside / "log.txt").write_text("step 1")
    assert train.run(resume(given)).steps == 4
    assert data.load_corpus(str(tmp_path), 32).files == 1
    train.run(dataclasses.replace(given, out=str(tmp_path / "another"), steps=1, warmup=0))
    assert data.load_corpus(str(tmp_path), 32).files == 1


def test_data_that_cant_be_used_is_refused(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, short, binary, latin, broken = (tmp_path / n for n in ("empty", "short", "binary", "latin", "broken"))
    folder = tmp_path / "folder"
    folder.mkdir()
    empty.write_text("")
    short.write_text("too short\n")
    binary.write_bytes(b"\0" * 5000)
    latin.write_bytes("schön\n".encode("latin-1") * 500)
    broken.write_text("{")
    full = tmp_path / "full"
    full.write_text(TEXT)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("does not exist", (tmp_path / "none", 32)),
        ("no text", (empty, 32)),
        ("no text files", (folder, 32)),
        ("not text", (binary, 32)),
        ("too short.*seq_len=32", (short, 32)),
        ("too short", (full, 20000)),
        ("not UTF-8.*0xf6", (latin, 32, str(tokenizer))),
        ("does not exist.*tokenizer.json", (full, 32, str(tmp_path / "none"))),
        ("can't be read as a tokenizer.json", (full, 32, str(broken))),
        ("vocab_size=100.*256 tokens", (full, 32, None, 100)),
        ("vocab_size=256.*tokens", (full, 32, str(tokenizer), 256)),
    ]
    for message, (path, *arguments) in cases:
        with pytest.raises(ValueError, match=message):
            data.load_corpus(str(path), *arguments)
    monkeypatch.setattr(Path, "read_bytes", _refuse)
    with pytest.raises(ValueError, match="can't be read: Permission denied"):
        data.load_corpus(str(full), 32)


def _refuse(path: Path) -> bytes:
    raise PermissionError(13, "Permission denied", str(path))


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 30, "heads": 4}, "does not divide by heads=4"),
        ({"data": ""}, "data='' names nothing"),
        ({"tokenizer": ""}, "tokenizer='' names nothing"),
        ({"out": ""}, "out='' names nothing"),
        ({"seed": 1 << 64}, r"seed=18446744073709551616: expected a number below 2\*\*64"),
        ({"d_model": 9, "heads": 3}, "head dim of 3.*even"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads=3"),
        ({"layers": 0}, "layers=0"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number"),
        ({"steps": True}, "steps=True"),
        ({"seq_len": 1}, "at least 2"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
        ({"min_lr": 2.0}, "min_lr=2"),
        ({"warmup": 30}, "longer than steps=20"),
        ({"save": "nothing"}, "save='nothing'"),
        ({"segments": "cbrt"}, "segments='cbrt'"),
        ({"segments": 0}, "segments=0"),
        ({"dtype": "float8"}, "dtype='float8'"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"resume": True, "overwrite": True}, "one of them"),
        ({"place": "x=file", "place_path": "/no/such/folder"}, "'/no/such/folder' is no folder"),
        ({"data": 5}, "data=5: expected a path"),
        ({"out": None}, "out=None: expected a path"),
        ({"place": {"x": "file"}}, r"place=\{'x': 'file'\}: expected text"),
        ({"stream": 5}, "stream=5: expected text"),
        ({"prompt": 5}, "prompt=5: expected text"),
        ({"resume": "x"}, "resume='x': expected True or False"),
        ({"tie_embeddings": 1}, "tie_embeddings=1: expected True or False"),
        ({"lr": True}, "lr=True: expected a number"),
        ({"lr": "1"}, "lr='1': expected a number"),
        ({"save": None}, "save=None: expected text"),
        ({"segments": 2.0}, "segments=2.0: expected a whole number or text"),
        ({"keep_within": 1.5}, "keep_within=1.5: expected a whole number or text"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(text: Path, changes: dict[str, Any], message: str) -> None:
    given = config(text, **changes)
    with pytest.raises(ValueError, match=message):
        train.run(given)
    assert not (text.parent / "run").exists()


def test_defaults_that_depend_on_others_are_filled_in() -> None:
    full = train.TrainConfig(d_model=192, heads=6, data="x").resolved()
    assert (full.kv_heads, full.d_ff) == (6, 512)
    assert full.dtype == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert Path(str(full.data)).is_absolute()
    assert full.warmup == 40 and train.TrainConfig(steps=3).resolved().warmup == 0
    assert train.TrainConfig(steps=80).resolved().warmup == 20
    assert full.resolved() == full


def test_folders_mean_the_same_in_another_one(tmp_path: Path) -> None:
    """A run is resumed from wherever its user is then."""
    paths = train.TrainConfig(data=tmp_path / "a", out=tmp_path / "b", lr=1, temperature=0).resolved()
    assert (paths.data, paths.out) == (str(tmp_path / "a"), str(tmp_path / "b"))
    placed = train.TrainConfig(place="x=file", place_path=os.path.relpath(tmp_path)).resolved()
    streamed = train.TrainConfig(stream="file", stream_path=os.path.relpath(tmp_path)).resolved()
    assert placed.place_path == streamed.stream_path == os.path.abspath(tmp_path)


def test_a_run_whose_first_step_fails_is_not_in_the_way(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    given = config(text, steps=1, warmup=None)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "accumulate", fails)
        with pytest.raises(RuntimeError, match=r"save='attention' does not fit.*keep less there: --save input"):
            train.run(given)
        with pytest.raises(RuntimeError, match=r"keep_within='1GiB' does not fit.*: a smaller --keep-within, --save"):
            train.run(dataclasses.replace(given, keep_within="1GiB"))
    assert files_under(Path(given.out)) == {}
    assert train.run(given).steps == 1


# Optimiser


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    given = train.TrainConfig(steps=110, warmup=10, lr=1.0, min_lr=0.1)
    rates = [optim.learning_rate(given, step) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert optim.learning_rate(train.TrainConfig(steps=1, warmup=0, lr=1.0), 1) == pytest.approx(0.1)


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optim.Optimizer(model, train.TrainConfig(steps=2, warmup=0, lr=0.1, min_lr=1.0, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(1)
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 - 0.1 * 0.5) if parameter.ndim == 2 else before[name]
        torch.testing.assert_close(parameter.detach(), shrunk)


def test_small_updates_of_bf16_weights_are_not_lost() -> None:
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    settings = train.TrainConfig(steps=100, warmup=0, lr=1e-3, min_lr=1.0, weight_decay=0.0, clip=0.0)
    optimizer = optim.Optimizer(layer, settings)
    for step in range(1, 101):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.collect()
        optimizer.step(step)
    assert optimizer.weights["weight"].dtype == torch.float32
    torch.testing.assert_close(layer.weight.float(), torch.full((8, 8), 0.9), atol=4e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_changes_no_weight(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 4, dtype=dtype)
    optimizer = optim.Optimizer(layer, train.TrainConfig(steps=2, warmup=0))
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    optimizer.collect()
    before = [p.detach().clone() for p in (*layer.parameters(), *optimizer.weights.values())]
    _, norm = optimizer.step(1)
    assert not math.isfinite(norm)
    for now, then in zip((*layer.parameters(), *optimizer.weights.values()), before, strict=True):
        assert torch.equal(now, then) and now.grad is None


def test_accumulated_batches_are_one_large_batch(text: Path) -> None:
    whole = train.run(config(text, steps=3, batch_size=4))
    parts = train.run(config(text, steps=3, batch_size=2, grad_accum=2, out=str(text.parent / "parts")))
    assert parts.history.train == pytest.approx(whole.history.train, rel=1e-5)


# Checkpoints


def a_checkpoint(step: int = 5) -> checkpoints.Checkpoint:
    weights = {"w": torch.full((2, 3), float(step)), "b": torch.zeros(3)}
    state = {"optimizer": {"state": {}}, "history": {"train": [1.0] * step, "validation": []}}
    return checkpoints.Checkpoint(step, {"lr": 0.1, "steps": 9}, "abc", weights, state)


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, a_checkpoint(), keep=2)
    found = checkpoints.read(path)
    assert (found.step, found.settings, found.data) == (5, {"lr": 0.1, "steps": 9}, "abc")
    assert found.state == a_checkpoint().state
    assert torch.equal(found.weights["w"], torch.full((2, 3), 5.0))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        checkpoints.write(tmp_path, a_checkpoint(step), keep=2)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [p.name for p in tmp_path.glob("step-*")]
    assert [p.name for p in checkpoints.steps(tmp_path)] == ["step-00000010", "step-00000015"]


def test_what_a_killed_run_left_is_swept_away_and_never_read(tmp_path: Path) -> None:
    left = tmp_path / ".step-00000010.tmp"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    checkpoints.write(tmp_path, a_checkpoint(5), keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_a_checkpoint_that_cant_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoints.write(tmp_path, a_checkpoint(5), keep=1)
    before = files_under(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match=r"step 10 could not be written.*No space left.*intact"):
        checkpoints.write(tmp_path, a_checkpoint(10), keep=1)
    assert files_under(tmp_path) == before
    assert checkpoints.read(path).step == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_the_files_of_a_checkpoint_are_as_readable_as_others(tmp_path: Path) -> None:
    path = checkpoints.write(tmp_path, a_checkpoint(), keep=1)
    (tmp_path / "mine").touch()
    assert {p.stat().st_mode for p in path.iterdir()} == {(tmp_path / "mine").stat().st_mode}


def test_a_file_system_without_modes_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    assert checkpoints.read(checkpoints.write(tmp_path, a_checkpoint(), keep=1)).step == 5


@pytest.mark.skipif(sys.platform == "win32", reason="Windows can't open folders")
def test_a_file_system_that_cant_sync_folders_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    assert checkpoints.read(checkpoints.write(tmp_path, a_checkpoint(), keep=1)).step == 5

    def none(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", none)  # of a file it is an error
    with pytest.raises(RuntimeError, match="Input/output error"):
        checkpoints.write(tmp_path, a_checkpoint(6), keep=1)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
@pytest.mark.parametrize("harm", [_cut_short, _flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_told_from_a_good_one(tmp_path: Path, name: str, harm: Any) -> None:
    checkpoints.write(tmp_path, a_checkpoint(5), keep=2)
    path = checkpoints.write(tmp_path, a_checkpoint(10), keep=2)
    if name == "checkpoint.json" and harm is _flip_a_bit:
        head = json.loads((path / name).read_text()) | {"format": "another"}
        (path / name).write_text(json.dumps(head))
    else:
        harm(path / name)
    with pytest.raises(RuntimeError, match=r"step-00000010 is damaged: .*Remove .* and resume from step-00000005"):
        checkpoints.read(path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    given = a_checkpoint()
    path = checkpoints.write(tmp_path, given, keep=2)
    found = checkpoints.read(path)
    shapes = {"w": (2, 3), "b": (3,)}
    checkpoints.check(found, path, given.settings, "abc", shapes)
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("lr: 0.1 there, 0.2 given", ({"lr": 0.2, "steps": 9}, "abc", shapes)),
        ("other text", (given.settings, "abd", shapes)),
        (r"w is \(2, 3\) there and \(2, 4\)", (given.settings, "abc", shapes | {"w": (2, 4)})),
    ]
    for message, arguments in cases:
        with pytest.raises(ValueError, match=message):
            checkpoints.check(found, path, *arguments)


def test_a_refused_checkpoint_changes_nothing(text: Path) -> None:
    given = config(text).resolved()
    corpus = data.load_corpus(given.data, given.seq_len)
    one = Trainer(given, corpus)
    one.step()
    path = checkpoints.write(text.parent / "c", one.checkpoint(), keep=1)
    _flip_a_bit(path / "state.pt")
    other = Trainer(dataclasses.replace(given, seed=1), corpus)
    before = {name: p.detach().clone() for name, p in other.model.named_parameters()}
    with pytest.raises(RuntimeError, match="damaged"):
        other.restore(path)
    checkpoints.write(text.parent / "c", one.checkpoint(), keep=1)
    with pytest.raises(ValueError, match="seed: 0 there, 1 given"):
        other.restore(path)
    assert other.done == 0
    assert all(torch.equal(p, before[name]) for name, p in other.model.named_parameters())


def test_the_log_is_cut_back_to_the_checkpoint_and_mended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 3.0, "lr": 0.1},
        {"step": 1, "validation_loss": 3.5},
        {"step": 2, "loss": 2.5},
    ]
    lines += [{"step": 3, "loss": 2.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    log = MetricsLog(path, History([3.0, 2.4], [(0, 4.0), (1, 3.5)]))
    log.write({"step": 3, "loss": 1.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0, "validation_loss": 4.0},
        *lines[:2],
        {"step": 2, "loss": 2.4},
        {"step": 3, "loss": 1.5},
    ]


def test_a_log_that_cant_be_written_says_what_to_do(tmp_path: Path) -> None:
    class Full(io.StringIO):
        name = "metrics.jsonl"

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        close = flush

    log = MetricsLog(tmp_path / "metrics.jsonl", History())
    log.close()
    log._file = Full()
    with pytest.raises(RuntimeError, match=r"metrics\.jsonl could not be written: No space left.*then resume"):
        log.write({"step": 1, "loss": 1.5})
    log.close()


# Whole runs


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> train.TrainResult:
    """20 steps without a break."""
    path = tmp_path_factory.mktemp("straight") / "text.py"
    path.write_text(TEXT)
    return train.run(config(path))


def test_a_run_learns_and_leaves_everything_behind(straight: train.TrainResult) -> None:
    result, folder = straight, RunFolder(straight.out)
    losses = result.history.train
    assert result.steps == len(losses) == 20 and result.stopped_by is None
    assert losses[0] > 5 and losses[-1] < 3.5
    assert [step for step, _ in result.history.validation] == [0, 8, 16, 20]
    assert result.validation_loss == result.history.validation[-1][1] < 3.5
    assert result.bits_per_byte == pytest.approx(result.validation_loss / math.log(2))
    assert result.step_memory.peak_bytes >= result.step_memory.saved_bytes > 0
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == losses
    assert {"lr", "grad_norm", "tokens", "seconds"} <= lines[1].keys()
    assert folder.plot.read_bytes().startswith(b"\x89PNG\r\n") and folder.plot.stat().st_size > 10_000
    assert folder.sample.read_text(encoding="utf-8") == result.sample + "\n"
    assert result.sample.startswith("\n")
    assert [p.name for p in checkpoints.steps(folder.checkpoints)] == ["step-00000015", "step-00000020"]


def test_the_model_that_is_left_is_the_model_that_was_trained(straight: train.TrainResult) -> None:
    from pyckpt import hf

    loaded = hf.load_pretrained(str(RunFolder(straight.out).model))
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.loss(tokens), straight.model.loss(tokens))


def test_a_run_leaves_global_random_state_and_handlers_alone(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail("nobody sets other GPUs' state back"))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    train.run(config(text, steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_same_settings_give_the_same_run(text: Path, straight: train.TrainResult) -> None:
    again = train.run(config(text, save="input", segments="sqrt", checkpoint_every=99))
    assert again.history.train == straight.history.train  # nor do save sets and segments change a bit
    assert again.sample == straight.sample
    other = train.run(config(text, seed=1, out=str(text.parent / "other")))
    assert other.history.train != straight.history.train


# Runs a training in a process of its own, to be killed. argv: config as JSON, threads, where to die.
_DOOMED = """
import json, os, pathlib, signal, sys
import torch
torch.set_num_threads(int(sys.argv[2]))
from pyckpt import train

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "while writing":
    rename, count = pathlib.Path.rename, [0]
    def dying(self, target):
        count[0] += 1
        die() if count[0] == 3 else None
        return rename(self, target)
    pathlib.Path.rename = dying
    train.run(train.TrainConfig(**json.loads(sys.argv[1])))
else:
    last = int(sys.argv[3])
    train.run(train.TrainConfig(**json.loads(sys.argv[1])), on_step=lambda r: r["step"] == last and die())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(
    ("where", "last"), a_few([("13", "step-00000010"), ("while writing", "step-00000010")], always=(1,), names=2)
)
def test_a_killed_run_resumes_to_the_same_curve_and_weights(
    text: Path, straight: train.TrainResult, where: str, last: str
) -> None:
    given = config(text)
    arguments = [json.dumps(dataclasses.asdict(given)), str(torch.get_num_threads()), where]
    killed = subprocess.run([sys.executable, "-c", _DOOMED, *arguments], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = RunFolder(Path(given.out))
    assert checkpoints.steps(folder.checkpoints)[-1].name == last
    assert len(folder.metrics.read_text().splitlines()) > 10
    resumed = train.run(resume(given))
    assert_same(resumed, straight)
    assert resumed.sample == straight.sample
    steps = [line["step"] for line in map(json.loads, folder.metrics.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 21))
    assert not list(folder.checkpoints.glob(".*"))


_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.mark.parametrize("number", a_few(_SIGNALS, always=(-1,)))
def test_a_signal_ends_a_run_with_a_checkpoint(text: Path, straight: train.TrainResult, number: int) -> None:
    given, before = config(text), signal.signal(number, signal.SIG_DFL)  # nohup ignores one of them
    try:
        stopped = train.run(given, on_step=lambda r: signal.raise_signal(number) if r["step"] == 6 else None)
    finally:
        signal.signal(number, before)
    assert stopped.stopped_by == number and train.exit_code(stopped) == 128 + number
    assert stopped.steps == 6 and stopped.sample == ""
    assert checkpoints.steps(RunFolder(stopped.out).checkpoints)[-1].name == "step-00000006"
    assert_same(train.run(resume(given)), straight)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_a_hang_up_that_is_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_without_stderr_writes_to_no_other_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """`2>&-`: the next file that is opened has the number 2."""
    written: list[bytes] = []
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr("pyckpt.train.signals.os.write", lambda number, text: written.append(text))
    with StopRequest("stopping") as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop
    assert written == []


def test_a_second_ctrl_c_ends_a_run_at_once(text: Path) -> None:
    def twice(record: dict[str, Any]) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt):
        train.run(config(text), on_step=twice)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_is_seen_while_the_main_thread_is_in_a_call_of_c() -> None:
    """As in a GPU's backward, which another thread runs: Python's handlers wait for the main one."""
    libc, mutex, seen = ctypes.CDLL(None), ctypes.create_string_buffer(128), []

    def between_tiles() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            until = time.monotonic() + 60
            while not stop and time.monotonic() < until:
                time.sleep(0.001)
            seen.append((bool(stop), stop.signal))
        finally:
            libc.pthread_mutex_unlock(mutex)

    with StopRequest() as stop:
        libc.pthread_mutex_lock(mutex)
        thread = threading.Timer(0.1, between_tiles)
        thread.start()
        libc.pthread_mutex_lock(mutex)  # no signal ends this
        thread.join()
        assert stop and stop.signal == signal.SIGTERM
    assert seen == [(True, None)]


def test_the_memory_of_a_streamed_step_is_measured_on_some_tiles(text: Path, monkeypatch) -> None:
    """A whole step of a million tokens would take as long as the first of training."""
    lengths, loss = [], CkptCausalLM.loss
    monkeypatch.setattr(
        CkptCausalLM,
        "loss",
        lambda self, tokens, **given: lengths.append(tokens.shape[1]) or loss(self, tokens, **given),
    )
    streamed = {"seq_len": 64, "stream": "file", "stream_tile": 8, "stream_path": str(text.parent)}
    train.run(config(text, **SMALLEST, **streamed))
    assert lengths[:3] == [64, 32, 32] and set(lengths[3:]) == {64}  # the first one for its store alone


def test_the_memory_of_a_cpus_own_store_is_that_of_all_tokens(text: Path) -> None:
    peaks = []
    for store in ("host", "device"):
        given = config(text, layers=1, batch_size=1, seq_len=64, stream=store, stream_tile=8).resolved()
        peaks.append(loop._probe(Trainer(given, data.load_corpus(given.data, 64))).peak_bytes)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_a_store_without_room_is_refused_before_a_run_begins(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though what is measured, a few tiles, has room."""
    given = config(text, steps=1, warmup=None, seq_len=256, batch_size=1, stream="host", stream_tile=8)
    monkeypatch.setattr("pyckpt.store.host.available_bytes", lambda: 100_000)
    with pytest.raises(MemoryError, match="bytes of host memory, and 100,000 are available"):
        train.run(given)
    assert files_under(Path(given.out)) == {}


@pytest.mark.parametrize("store", a_few(["host", "file"], always=(1,)))
def test_a_streamed_run_learns_the_same_and_stops_inside_a_step(text: Path, store: str, monkeypatch) -> None:
    """Between two tiles: the step is given up, the ones before are in a checkpoint, and the run goes on from there."""
    plain = train.run(config(text, steps=8, eval_every=4, checkpoint_every=3))
    path = {"stream_path": str(text.parent)} if store == "file" else {}
    given = config(text, steps=8, eval_every=4, checkpoint_every=3, stream=store, stream_tile=24, **path)
    whole = train.run(dataclasses.replace(given, out=str(text.parent / "whole")))
    assert whole.history.train == pytest.approx(plain.history.train, rel=1e-4)
    assert whole.validation_loss == pytest.approx(plain.validation_loss, rel=1e-3)
    seen: list[tuple[str, int, int]] = []

    def in_the_middle(self: Any, *at: Any) -> None:
        seen.append(at)
        if len(seen) == 200:  # of a step after some
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pyckpt.train.progress.Progress.tile", in_the_middle)
    given = dataclasses.replace(given, out=str(text.parent / "stopped"))
    stopped = train.run(given)
    assert stopped.stopped_by == signal.SIGINT
    assert 0 < stopped.steps < 8
    assert len(seen) == 200
    monkeypatch.undo()
    assert_same(train.run(resume(given)), whole)


def test_a_streamed_run_says_what_it_will_take(text: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    streamed = {"seq_len": 80, "stream": "host", "stream_tile": 16}
    train.run(config(text, **SMALLEST, **streamed), console=console)
    assert re.search(r"Streamed .* on the device, .* in the host store *\n", console.file.getvalue())
    assert re.search(r"Time .*about .* a step; 64 tokens took", console.file.getvalue())


def test_what_is_kept_may_wait_in_a_file(text: Path, straight: train.TrainResult) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    places = {"place": "x=file, o=file,lse=host", "place_last": 0, "place_path": str(text.parent)}
    given = config(text, out=str(text.parent / "placed"), **places)
    assert_same(train.run(given, console=console), straight)
    assert "(save='attention', place='x=file, o=file,lse=host')" in " ".join(console.file.getvalue().split())
    first = train.run(dataclasses.replace(given, overwrite=True), on_step=lambda r: signal.raise_signal(signal.SIGINT))
    assert first.steps < first.config.steps
    assert_same(train.run(dataclasses.replace(resume(given), place=None, place_path=None)), straight)


def test_blocks_keep_what_the_memory_holds(text: Path, straight: train.TrainResult) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    given = config(text, out=str(text.parent / "kept"), keep_within="1GiB")
    assert_same(train.run(given, console=console), straight)
    assert f"(save: {given.layers} of 'all')" in " ".join(console.file.getvalue().split())


def test_bad_settings_of_memory(text: Path) -> None:
    for changes, message in (
        ({"keep_within": "much"}, "keep_within='much': expected a number of bytes above 0, or text such as '20GiB'"),
        ({"keep_within": "1GiB", "segments": 2}, "keep_within and segments were both given"),
        ({"keep_within": "1GiB", "stream": "host"}, "keep_within and stream were both given"),
        ({"keep_within": "1GiB", "save": "input"}, "keep_within and save were both given"),
        ({"place": "x"}, "place='x': expected each tensor once, with its place"),
        ({"place": "x=host,x=file"}, "expected each tensor once"),
        ({"place": "q=host"}, "names nothing that save='attention' keeps"),
        ({"place": "x=disk"}, "'disk' does not exist"),
        ({"place": "x=file", "place_path": "/nowhere"}, "nowhere"),
        ({"place_path": "/tmp"}, "no tensor has the place 'file'"),
        ({"place": "x=host", "place_last": -1}, "place_last=-1"),
        ({"place": "x=host", "stream": "host"}, "place and stream were both given"),
        ({"stream": "disk"}, "store='disk' does not exist"),
        ({"stream_path": "/tmp"}, "without stream"),
        ({"stream": "file", "stream_path": "/nowhere"}, "is no folder"),
        ({"stream": "host", "stream_tile": 0}, "stream_tile=0"),
    ):
        with pytest.raises(ValueError, match=message):
            train.run(config(text, **changes))


def test_a_bf16_run_resumes_exactly_too(text: Path) -> None:
    given = config(text, steps=8, checkpoint_every=3, dtype="bfloat16", tie_embeddings=True)
    whole = train.run(given)
    parted = dataclasses.replace(given, out=str(text.parent / "parted"))
    train.run(parted, on_step=lambda r: signal.raise_signal(signal.SIGINT) if r["step"] == 4 else None)
    assert_same(train.run(resume(parted)), whole)


def test_a_checkpoint_of_a_version_with_fewer_settings_is_resumed(text: Path, straight: train.TrainResult) -> None:
    given = config(text)
    train.run(given, on_step=lambda r: signal.raise_signal(signal.SIGINT) if r["step"] == 4 else None)
    newer = ("window", "stream", "stream_tile", "stream_path", "place", "place_last", "place_path")
    for file in Path(given.out).rglob("*.json"):
        content = json.loads(file.read_text())
        settings = content.get("config" if file.name == "run.json" else "settings", {})
        for name in newer:
            settings.pop(name, None)
        file.write_text(json.dumps(content))
    assert_same(train.run(resume(given)), straight)


def test_a_run_with_a_window_is_saved_as_a_model_that_has_one(text: Path) -> None:
    result = train.run(config(text, steps=3, window=9))
    assert result.model.config["window"] == 9
    written = json.loads((RunFolder(Path(result.out)).model / "config.json").read_text())
    assert (written["model_type"], written["sliding_window"]) == ("mistral", 10)  # its own key counts there


def test_a_run_with_a_tokenizer(text: Path, tokenizer: Path) -> None:
    given = config(text, tokenizer=str(tokenizer), prompt="def f1", steps=8)
    result = train.run(given)
    assert result.sample.startswith("def f1")
    assert result.bits_per_byte < result.validation_loss / math.log(2) / 2  # a token is several bytes
    assert 256 < result.model.config["vocab_size"] <= 300
    with pytest.raises(ValueError, match="other text"):
        train.run(resume(dataclasses.replace(given, tokenizer=None, vocab_size=None)))


def test_a_finished_run_resumed_is_finished(text: Path) -> None:
    given = config(text, steps=6)
    first = train.run(given)
    RunFolder(first.out).plot.unlink()
    calls: list[dict[str, Any]] = []
    again = train.run(resume(given), on_step=calls.append)
    assert_same(again, first)
    assert not calls and again.sample == first.sample and RunFolder(again.out).plot.exists()


def test_a_run_killed_before_its_first_checkpoint_starts_again(text: Path, straight: train.TrainResult) -> None:
    given = config(text)

    def fail(record: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train.run(given, on_step=fail)
    assert_same(train.run(resume(given)), straight)


def test_a_folder_in_use_is_never_written_over_by_accident(text: Path) -> None:
    given = config(text, steps=3)
    train.run(given)
    folder = RunFolder(Path(given.out))
    before = files_under(folder.path)
    refusals: list[tuple[str, train.TrainConfig]] = [
        ("holds a run already.*--resume.*--overwrite", given),
        (r"other settings \(lr is 0.01 there, 0.5 was given\)", resume(dataclasses.replace(given, lr=0.5))),
        ("holds no run to resume", resume(dataclasses.replace(given, out=str(text.parent / "none")))),
        ("is a file", dataclasses.replace(given, out=str(text))),
    ]
    for message, refused in refusals:
        with pytest.raises(ValueError, match=message):
            train.run(refused)
    with folder.locked(), pytest.raises(RuntimeError, match="another process is training"):
        train.run(dataclasses.replace(given, overwrite=True))
    assert files_under(folder.path) == before
    replaced = train.run(dataclasses.replace(given, steps=4, overwrite=True))
    assert replaced.steps == 4
    assert [p.name for p in checkpoints.steps(folder.checkpoints)] == ["step-00000004"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_a_run_that_is_replaced_leaves_what_its_links_lead_to(text: Path) -> None:
    given = config(text, **SMALLEST)
    out = Path(given.out)
    out.mkdir()
    RunFolder(out).begin(given)
    for name in ("checkpoints", "model"):
        (text.parent / name).mkdir()
        (text.parent / name / "mine").write_text("years of work")
        (out / name).symlink_to(text.parent / name)
    before = files_under(text.parent / "checkpoints") | files_under(text.parent / "model")
    assert train.run(dataclasses.replace(given, overwrite=True)).steps == 1
    assert not (out / "checkpoints").is_symlink() and not (out / "model").is_symlink()
    assert files_under(text.parent / "checkpoints") | files_under(text.parent / "model") == before


def test_a_run_half_replaced_may_be_replaced_again(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, folder = config(text, **SMALLEST), RunFolder(text.parent / "run")
    folder.path.mkdir()
    folder.begin(given)
    folder.checkpoints.mkdir()

    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fails)
        with pytest.raises(OSError, match="Input/output"):
            folder.begin(given)
    assert train.run(dataclasses.replace(given, overwrite=True)).steps == 1


@pytest.mark.parametrize("name", ["data", "tokenizer"])
def test_what_a_run_reads_is_not_removed_with_the_one_it_replaces(text: Path, tokenizer: Path, name: str) -> None:
    given = config(text, overwrite=True)
    RunFolder(Path(given.out)).path.mkdir()
    RunFolder(Path(given.out)).begin(given)
    inside = RunFolder(Path(given.out)).model / "mine"
    inside.parent.mkdir()
    inside.write_bytes({"data": text, "tokenizer": tokenizer}[name].read_bytes())
    with pytest.raises(ValueError, match=f"{name}=.*mine belongs to the run that --overwrite removes: copy it"):
        train.run(dataclasses.replace(given, **{name: str(inside)}))
    assert inside.exists()


def test_files_of_others_are_never_replaced(text: Path) -> None:
    mine = text.parent / "mine"
    (mine / "model").mkdir(parents=True)
    (mine / "model" / "precious").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds model, but no run"):
            train.run(config(text, out=str(mine), overwrite=overwrite))
    (mine / "run.json").write_text('{"name": "of another program"}')
    with pytest.raises(RuntimeError, match="is not a run of this version"):
        train.run(config(text, out=str(mine), overwrite=True))
    assert files_under(mine) == {
        "model/precious": b"years of work",
        "run.json": b'{"name": "of another program"}',
    }


def test_a_run_on_changed_text_is_not_resumed(text: Path) -> None:
    given = config(text, steps=4, checkpoint_every=2)
    train.run(given, on_step=lambda r: signal.raise_signal(signal.SIGINT) if r["step"] == 2 else None)
    before = files_under(Path(given.out))
    text.write_text(TEXT + "# one line more\n")
    with pytest.raises(ValueError, match="the files or the tokenizer have changed"):
        train.run(resume(given))
    assert files_under(Path(given.out)) == before


def test_a_run_that_diverges_says_so(text: Path) -> None:
    with pytest.raises(RuntimeError, match=r"diverged\. Lower --lr"):
        train.run(config(text, lr=1e30, clip=0.0, warmup=0))


def test_a_validation_that_is_not_finite_ends_a_run_before_its_checkpoint(text: Path) -> None:
    given = config(text, steps=8, eval_every=4, checkpoint_every=2, keep_checkpoints=1)

    def spoil(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            patch.setattr(CkptCausalLM, "loss", _only_trains(CkptCausalLM.loss))

    nan = "the validation loss is nan at step 4: training has diverged"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match=nan):
        train.run(given, on_step=spoil)
    assert [p.name for p in checkpoints.steps(RunFolder(Path(given.out)).checkpoints)] == ["step-00000002"]


def _only_trains(loss: Any) -> Any:
    return lambda self, tokens, **given: loss(self, tokens, **given) * (1.0 if self.training else math.nan)


def test_a_missing_extra_is_named_before_any_work(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyckpt.extras.find_spec", lambda name: None if name == "matplotlib" else object())
    given = config(text)
    with pytest.raises(RuntimeError, match=r"training needs matplotlib: pip install 'pyckpt\[train\]'"):
        train.run(given)
    assert not Path(given.out).exists()


def test_a_prompt_without_tokens_is_refused_before_the_training(text: Path) -> None:
    given = config(text, prompt="")
    with pytest.raises(ValueError, match="prompt='' has no tokens"):
        train.run(given)
    assert not Path(given.out).exists()
    corpus = dataclasses.replace(data.load_corpus(str(text), 32), prompt="")
    shown, tokens = start_of(corpus, None)
    assert len(tokens) == 1 and corpus.decode(tokens) == shown


# What is shown


@pytest.mark.parametrize("terminal", [False, True])
def test_the_report_fits_80_columns(text: Path, terminal: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=terminal, color_system=None, legacy_windows=False)
    train.run(config(text, **{**SMALLEST, "steps": 20}, log_every=5), console)
    plain = Text.from_ansi(out.getvalue()).plain if terminal else out.getvalue()
    assert max(len(line.rstrip()) for line in plain.replace("\r", "\n").splitlines()) <= 80
    for shown in ("Data", "Memory", "from forward to", "loss", "bytes/s", "Validation loss", "bits"):
        assert shown in plain
    assert ("step 20/20  loss" in plain) is not terminal
    assert ("20/20 ━" in plain) is terminal


def test_a_terminal_that_renews_nothing_gets_lines() -> None:
    from rich.console import Console

    from pyckpt.train.progress import Bar, Lines, progress_for

    for kind, term in ((Lines, "dumb"), (Bar, "xterm")):
        console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": term})
        assert type(progress_for(console, "byte", 25)) is kind


@pytest.mark.parametrize(("tokens", "rate"), [(30, "0.5 "), (54_000, "900.0 "), (60_000, "1.0k "), (9e7, "1.50M ")])
def test_a_slow_run_has_a_rate_too(tokens: int, rate: str) -> None:
    from pyckpt.train.progress import Progress

    progress = Progress()
    progress.step({"tokens": tokens, "seconds": 60.0}, ("RSS", 0))
    assert progress.rate == f"{rate}bytes/s"


def test_the_title_of_the_plot_is_no_formula(tmp_path: Path) -> None:
    from pyckpt.train.plot import loss_curve

    loss_curve(tmp_path / "loss.png", [1.0, 2.0], [], unit="byte", title="data/x$^$y.txt")
    assert (tmp_path / "loss.png").exists()


def test_the_command_that_resumes_can_be_copied(text: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=40)
    out = str(text.parent / "a folder's name that is longer than the line")
    stopped = train.run(config(text, out=out), console, lambda record: signal.raise_signal(signal.SIGINT))
    assert stopped.stopped_by == signal.SIGINT
    (line,) = (line for line in console.file.getvalue().splitlines() if "--resume" in line)
    assert shlex.split(line) == ["pyckpt", "train", "--resume", "--out", out]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_console_that_breaks_does_not_end_a_run(text: Path, terminal: bool) -> None:
    from rich.console import Console

    class Breaking(io.StringIO):
        broken = False

        def write(self, given: str) -> int:
            if self.broken:
                raise OSError(5, "Input/output error")  # what a terminal that was closed says
            return super().write(given)

    def hang_up(record: dict[str, Any]) -> None:
        file.broken = True

    file = Breaking()
    console = Console(file=file, force_terminal=terminal)
    assert train.run(config(text, steps=3, log_every=1), console, hang_up).steps == 3
    assert console.quiet


def test_a_sample_can_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\tc\nd\x07é") == "a\N{REPLACEMENT CHARACTER}[2Jb\tc\nd\N{REPLACEMENT CHARACTER}é"
