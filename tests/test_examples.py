"""The examples run and do what they say."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

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
