"""The how-to page: its snippets are Python that names what there is, and so are the tests that it leans on."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import compile_nothing_of_deepspeed, needs_gloo, zero_config
from swap_models import VOCAB, make_model, make_tokenizer
from test_swap_vision import make as make_vision

import pyckpt
from pyckpt import doctor

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_name_what_there_is(snippet):
    tree = ast.parse(snippet)
    names = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pyckpt"]
    assert names
    assert all(hasattr(pyckpt, name) for name in names)


def names_of(snippet: str, folder: Path) -> dict[str, Any]:
    """What the page says there is, and what else a snippet takes for granted, small; skips where a tool is missing."""
    for tool in re.findall(r"^(?:import|from) (peft|trl|deepspeed|accelerate)", snippet, flags=re.MULTILINE):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool}")
    if "BitsAndBytes" in snippet and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    seen: dict[str, Any] = {}
    if ".visual" in snippet:
        model, seen = make_vision("Qwen2VL")
    else:
        model = make_model("Llama", attn_implementation="sdpa")
    ids = torch.randint(1, VOCAB, (2, 19))
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    found = {"model": model, "ids": ids, "batches": [ids] * 4, "data": rows, "folder": folder, "batch": seen}
    found["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = {"max_steps": 1, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    if "from_pretrained(folder" in snippet:
        model.save_pretrained(folder)
    if "trl" in snippet:
        import datasets
        import trl

        found["data"] = datasets.Dataset.from_list(rows)
        found |= {"arguments": trl.SFTConfig(str(folder), bf16=False, **options), "tokenizer": make_tokenizer()}
    elif "Trainer" in snippet:
        from transformers import TrainingArguments

        found["arguments"] = TrainingArguments(str(folder), **options)
    elif "deepspeed" in snippet:
        compile_nothing_of_deepspeed()
        found["config"] = zero_config(3) | {"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}
    return found


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A group of one process, for the snippets that are about several, in a folder of its own."""
    accelerate = importlib.util.find_spec("accelerate") is not None
    if accelerate:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # DeepSpeed leaves its own there
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield tmp_path
    torch.distributed.destroy_process_group()
    if accelerate:
        AcceleratorState._reset_state(reset_partial_state=True)


@needs_gloo
@pytest.mark.filterwarnings("ignore:pyckpt.swap. gradient checkpointing")
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, alone):
    """On a CPU; in whole, and those that swap the model have done it."""
    pytest.importorskip("transformers")
    names = names_of(snippet, alone)
    exec(compile(snippet.replace('"cuda"', '"cpu"'), "how-to.md", "exec"), names)
    models = [names["model"], *([names["mine"]] if "mine" in names else [])]
    swapped = [m for model in models for m in model.modules() if "forward" in m.__dict__]
    assert swapped or "swap" not in snippet


def test_the_tests_that_are_named_are_there():
    named = re.findall(r"`(tests/\w+\.py)::(?:\w+::)?(\w+)`", PAGE)
    assert len(named) >= 10
    for path, name in named:
        assert re.search(rf"^ *def {name}\(", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE), name


@pytest.mark.parametrize("page", ["how-to.md", "swap.md", "troubleshooting.md"])
def test_links_lead_somewhere(page):
    folder = ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", (folder / page).read_text(encoding="utf-8")):
        assert link.startswith("http") or (folder / link).exists(), link


def test_every_variable_that_is_read_is_on_the_page_and_in_the_doctors_report():
    read = set()
    for folder in ("pyckpt", "triton_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            read |= set(re.findall(r"\"(PYCKPT_[A-Z_]+)\"", path.read_text(encoding="utf-8")))
    assert len(read) >= 5
    assert read <= set(re.findall(r"^\| `(\w+)`", PAGE, flags=re.MULTILINE))
    settings = dict(doctor.report())["Settings"]
    assert read <= {name for name, _ in settings}
