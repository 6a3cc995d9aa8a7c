"""The examples run and do what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_finetune_llama(capsys, tmp_path):
    pytest.importorskip("transformers")
    main = runpy.run_path(str(EXAMPLES / "finetune_llama.py"))["main"]
    losses = main(["--steps", "12", "--seq-len", "128"])
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert "5 swapped, 0 left as they are" in capsys.readouterr().out
    short = tmp_path / "short.txt"
    short.write_text("few words")
    with pytest.raises(SystemExit):
        main(["--text", str(short)])
    assert "has 9 bytes, fewer than --seq-len 512; give a longer text" in capsys.readouterr().err


def test_own_model(capsys, tmp_path):
    main = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"]
    losses = main(["--steps", "12", "--save", "input"])
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    assert "bytes kept for each" in capsys.readouterr().out
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(SystemExit):
        main(["--text", str(empty)])
    assert "has no line with text in it; give another file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_fsdp2_trains_as_one_process_does(tmp_path):
    pytest.importorskip("transformers")
    losses = {}
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
        options = ["--steps", "4", "--seq-len", "64", "--checkpoint", str(tmp_path / f"of {world}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, str(EXAMPLES / "fsdp2.py"), *options], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        losses[world] = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
        assert (tmp_path / f"of {world}" / ".metadata").exists()
    assert len(losses[1]) == 4 and losses[1][-1] < losses[1][0]
    # Sums in another order: float32 roundings of a loss of about 5, which three steps of AdamW pass on.
    assert losses[2] == pytest.approx(losses[1], rel=1e-4)
    assert not list(tmp_path.glob("*.part"))
