"""The examples run and do what they say."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> dict[str, Any]:
    """What the example of this name defines; run as a script it would find its neighbours by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return runpy.run_path(str(EXAMPLES / name))


def test_finetune_llama(capsys, tmp_path):
    pytest.importorskip("transformers")
    main = load("finetune_llama.py")["main"]
    losses = main(["--steps", "12", "--seq-len", "128"])
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert "5 swapped, 0 left as they are" in capsys.readouterr().out
    streamed = main(["--steps", "2", "--seq-len", "128", "--stream", "file"])
    assert len(streamed) == 2
    assert "streamed from the token ids on" in capsys.readouterr().out
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(SystemExit):
        main(["--text", str(short)])
    assert "has 9 bytes, fewer than --seq-len 512; give a longer text" in capsys.readouterr().err


def test_finetune_llama_with_lora(capsys, tmp_path, monkeypatch):
    """Adapters alone are trained; loaded over the base as it was, they do what they were trained for."""
    peft = pytest.importorskip("peft")
    example = load("finetune_llama.py")
    torch.manual_seed(3)
    base = example["small_llama"]()
    torch.manual_seed(3)
    options = ["--lora", "4", "--seq-len", "128"]
    losses = example["main"]([*options, "--steps", "12", "--output", str(tmp_path / "adapter")])
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    out = capsys.readouterr().out
    assert "5 swapped, 0 left as they are" in out and "36,352 of 807,552 parameters are trained" in out
    tokens = example["batches"](Path(argparse.__file__).read_bytes(), 2, 128, 1)[0]
    with torch.no_grad():
        before = float(base(input_ids=tokens, labels=tokens).loss)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert float(adapted(input_ids=tokens, labels=tokens).loss) < before - 0.5
    assert [found.name for found in tmp_path.iterdir()] == ["adapter"]
    with pytest.raises(SystemExit):
        example["main"]([*options, "--output", str(tmp_path / "adapter")])
    assert "adapter exists already; give another folder" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example["main"](options)
    assert "--lora needs peft, which is not installed: pip install peft" in capsys.readouterr().err


def test_own_model(capsys, tmp_path):
    main = load("own_model.py")["main"]
    losses = main(["--steps", "12", "--save", "input"])
    # At first every byte is as likely.
    assert len(losses) == 12 and losses[0] == pytest.approx(math.log(256), abs=0.3) and losses[-1] < losses[0] - 0.5
    assert "bytes kept for each, peak" in capsys.readouterr().out
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(SystemExit):
        main(["--text", str(empty)])
    assert "has no line of two bytes or more with text in it" in capsys.readouterr().err


BAD = {
    "--lines=0": ("own_model.py", "argument --lines: must be at least 1, got 0"),
    "--steps=-3": ("own_model.py", "argument --steps: must be at least 1, got -3"),
    "--text=.": ("own_model.py", "argument --text: . is no file"),
    "--seq-len=1": ("finetune_llama.py", "argument --seq-len: must be at least 2, got 1"),
    "--batch=x": ("finetune_llama.py", "argument --batch: invalid number value: 'x'"),
}


@pytest.mark.parametrize("option", BAD)
def test_a_bad_argument_is_named(option, capsys):
    example, message = BAD[option]
    with pytest.raises(SystemExit):
        load(example)["main"]([option])
    assert message in capsys.readouterr().err


def test_own_model_predicts_nothing_across_lines():
    """The loss of two packed lines is the mean of each by itself, by its number of predictions."""
    model = load("own_model.py")["LineModel"](d_model=32, n_layers=2)
    tokens = torch.randint(256, (19,))

    def loss(first: int, last: int, *ends: int) -> float:
        return float(model.loss(tokens[first:last], torch.tensor([0, *ends], dtype=torch.int32)).detach())

    assert loss(0, 19, 7, 19) == pytest.approx((6 * loss(0, 7, 7) + 11 * loss(7, 19, 12)) / 17, rel=1e-5)


def fsdp2(world: int, *options: str) -> str:
    """What the example prints in as many processes: one is this one, which starts nothing."""
    options = (*options, "--seq-len", "64")
    if world == 1:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            for name, value in single.items():
                patch.setenv(name, value)
            patch.setattr(torch.cuda, "is_available", lambda: False)
            try:
                load("fsdp2.py")["main"]([*options])
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()
        return printed.getvalue()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2.py"), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_fsdp2_trains_as_one_process_does(capsys, tmp_path):
    """Four steps of one process; two of two, streamed and shared, and the rest by one from their checkpoint; two of
    four, that share tokens and weights."""
    pytest.importorskip("transformers")
    whole, half, rest, shared = (str(tmp_path / name) for name in ("whole", "half", "rest", "shared"))
    losses, saved = {}, {}
    for world, folder, options in (
        (1, whole, ["--steps", "4"]),
        (2, half, ["--steps", "2", "--share", "2", "--stream", "24"]),
        (4, shared, ["--steps", "2", "--share", "2", "--tensor", "2"]),
        (1, rest, ["--steps", "4", "--resume", half]),
    ):
        printed = fsdp2(world, "--checkpoint", folder, *options)
        losses[folder] = [float(found) for found in re.findall(r"loss ([\d.]+)", printed)]
        saved[folder] = load("finetune_llama.py")["small_llama"]().state_dict()
        dcp.load({"model": saved[folder]}, checkpoint_id=folder)
    assert len(losses[whole]) == 4 and losses[whole][-1] < losses[whole][0]
    # Sums in another order: float32 roundings of a loss of about 5, which three steps of AdamW pass on.
    assert losses[half] + losses[rest] == pytest.approx(losses[whole], rel=1e-4)
    assert losses[shared] == pytest.approx(losses[half], rel=1e-4)
    # Steps of AdamW at a rate of 1e-3 move each weight by some 1e-3: what was not saved would differ by that. Where a
    # gradient is nearly all rounding, of sums in another order, so is a share of the step.
    for name, p in saved[whole].items():
        torch.testing.assert_close(saved[rest][name], p, rtol=1e-4, atol=1e-4)
        assert float((saved[rest][name] - p).abs().median()) <= 1e-6
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(SystemExit):
        fsdp2(1, "--steps", "4", "--resume", whole)
    assert "has 4 steps, --steps 4 asks for no more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fsdp2(1, "--resume", str(tmp_path))
    assert f"argument --resume: {tmp_path} is no folder of a checkpoint" in capsys.readouterr().err
