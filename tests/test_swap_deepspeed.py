"""Swapped models under DeepSpeed's ZeRO and Ulysses, two processes over gloo: the gradients of one without it."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_as_good
from processes import compile_nothing_of_deepspeed, needs_gloo, run_processes, zero_config
from swap_models import InFloat64, make_adapted, make_model, step

import pyckpt
from pyckpt import measure

pytest.importorskip("transformers")
ADVICE = (
    "set_z3_leaf_modules(model, [LlamaDecoderLayer]) before deepspeed.initialize): LlamaModel runs its original "
    "forward, each layer again as a whole in the backward"
)
# By the stage and what else there is to it: what is warned of in the first step.
EXPECTED = {
    (1, ""): [],
    (2, ""): [],
    (3, "leaves"): [],
    (3, "leaves of views"): [],
    (3, "leaves, swapped late"): [],
    (3, "leaves, LoRA"): [],
    (3, "leaves, streamed"): [],
    (3, "leaves of views, streamed"): [],
    (3, "leaves, LoRA, streamed"): [],
    (3, "tied leaves, streamed"): [],
    (3, "no leaves"): [ADVICE],
    (3, "no leaves, swapped late"): [],
}


def engine_of(model: Any, stage: int) -> Any:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, config=zero_config(stage), optimizer=torch.optim.SGD(trained, 0.0))[0]


def check(rank: int, stage: int, kind: str) -> None:
    from deepspeed.utils import safe_get_full_grad, set_z3_leaf_modules

    family, tied = "Phi3" if "views" in kind else "Llama", "tied" in kind
    model, tokens = make_model(family, tie_word_embeddings=tied), torch.randint(1, 61, (4, 17))
    if "LoRA" in kind:
        model = make_adapted(model, target_modules="all-linear")
        if "streamed" not in kind:
            model.enable_input_require_grads()  # DeepSpeed's hooks on a leaf need that, with and without a swap
    batch = {"input_ids": tokens, "labels": tokens}
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), batch)
    plain = step(model, batch)
    del truth["loss"], plain["loss"]  # of all processes
    if "leaves" in kind and "no leaves" not in kind:
        layers = model.get_base_model().model.layers if "LoRA" in kind else model.model.layers
        set_z3_leaf_modules(model, [type(layers[0])])
    stream = pyckpt.Stream(7) if "streamed" in kind else None
    if "late" not in kind:
        assert not pyckpt.swap(model, tile=5, stream=stream).left
    engine = engine_of(model, stage)
    if "late" in kind:
        report = pyckpt.swap(model, tile=5, stream=stream)
        assert not report.left
        assert report.entries[0].path == ("checkpointed" if "no leaves" in kind else "standard"), str(report)
    mine = tokens.chunk(2)[rank]
    for i in range(2):  # a second step finds what the first left behind
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message="pyckpt.swap")
            out = engine(input_ids=mine, labels=mine)
            assert out.logits is None
            engine.backward(out.loss)
        grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
        engine.step()
        assert_as_good(grads, plain, truth, torch.float32)
        warned = [str(w.message) for w in caught if "pyckpt.swap" in str(w.message)]
        expected = [] if i else EXPECTED[stage, kind]
        assert len(warned) == len(expected) and all(e in w for e, w in zip(expected, warned, strict=True)), warned


def worker(rank: int, seed: int) -> None:
    compile_nothing_of_deepspeed()
    for stage, kind in EXPECTED:
        print(f"rank {rank}: ZeRO-{stage} {kind}", flush=True)
        torch.manual_seed(seed)
        check(rank, stage, kind)


@pytest.mark.slow
@needs_gloo
def test_zero_gives_the_gradients_of_one_process(seed):
    missing = [name for name in ("deepspeed", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    run_processes(2, worker, seed)


def ulysses(rank: int, seed: int) -> None:
    """Each process has some of the tokens, and all of them for some of attention's heads (Jacobs et al. 2023)."""
    compile_nothing_of_deepspeed()
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed("gloo")
    torch.manual_seed(seed)
    model, tokens = make_model("Llama", attn_implementation="sdpa"), torch.randint(1, 61, (1, 32))
    labels = torch.cat([tokens[:, 1:], torch.full((1, 1), -100)], 1)
    batch = {"input_ids": tokens, "position_ids": torch.arange(32)[None], "shift_labels": labels, "labels": labels}
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), {"input_ids": tokens, "labels": tokens})
    plain = step(model, {"input_ids": tokens, "labels": tokens})
    del truth["loss"], plain["loss"]  # of one number the rounding is chance
    early = copy.deepcopy(model)
    assert not pyckpt.swap(early).left
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model,
        core_attn_implementation="sdpa",
        sequence_parallel_size=2,
        micro_batch_size=1,
        seq_length=32,
        seq_length_is_variable=True,
    )
    mine = {n: t.chunk(2, 1)[rank] for n, t in batch.items()}
    share = (mine["labels"] != -100).sum() / (labels != -100).sum()
    with measure.memory() as stored:
        model(**mine)
    assert not pyckpt.swap(model).left
    for swapped, told in ((model, []), (early, ["its attention function 'sdpa' is of deepspeed"])):
        with warnings.catch_warnings(record=True) as caught, measure.memory() as kept:
            warnings.filterwarnings("always", message="pyckpt.swap")
            loss = swapped(**mine).loss * share
        warned = [str(w.message) for w in caught if "pyckpt.swap" in str(w.message)]
        assert len(warned) == len(told)
        assert all(t in w and "again as a whole" in w for t, w in zip(told, warned, strict=True))
        assert kept.saved_bytes < stored.saved_bytes / 2
        loss.backward()
        grads = {n: p.grad for n, p in swapped.named_parameters()}
        for t in grads.values():
            torch.distributed.all_reduce(t)
        assert_as_good(grads, plain, truth, torch.float32)


@pytest.mark.slow
@needs_gloo
def test_under_ulysses(seed):
    pytest.importorskip("deepspeed")
    run_processes(2, ulysses, seed)
