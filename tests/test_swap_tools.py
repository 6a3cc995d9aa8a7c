"""Swapped models under the tools that people train with: the same results as without the swap."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import types
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from swap_models import (
    VOCAB,
    InFloat64,
    as_before,
    assert_step_as_good,
    make_adapted,
    make_batch,
    make_model,
    make_tokenizer,
    step,
)
from torch import nn

import pyckpt
from pyckpt.swap.layer import SwappedLayer
from pyckpt.swap.replaced import replaced_in

pytest.importorskip("transformers")
State = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("no_fallback")


# --- Mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["standard", "generic"])
def test_float16_with_a_grad_scaler(path):
    """Unscaled gradients as good as those before; a step whose gradients overflow is left out."""
    model, batch = make_model("Llama"), make_batch("padded")
    for layer in model.model.layers if path == "generic" else ():
        layer.mlp.act_fn = nn.Mish()
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)

    def scaled(scale: float) -> tuple[State, float]:
        """A step of SGD at a rate of 0: the unscaled gradients, and the scale after it."""
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=scale), torch.optim.SGD(model.parameters(), 0.0)
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        grads = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        return {"loss": loss.detach(), **grads}, scaler.get_scale()

    plain, same = scaled(2.0**10)
    assert same == 2.0**10
    assert pyckpt.swap(model, tile=10).entries[0].path == path
    ours, same = scaled(2.0**10)
    assert same == 2.0**10
    assert_step_as_good(ours, plain, truth, torch.float16)
    assert scaled(2.0**40)[1] == 2.0**39


# --- DeepSpeed: its own tests, for where it is installed, are in test_swap_deepspeed.py ------------------------------


def test_hooks_of_zero3_inside_a_layer_are_warned_of_with_what_to_do():
    model = make_model("Llama")
    pyckpt.swap(model)
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight.ds_id = 0  # as ZeRO-3 marks its parameters
    projection.register_forward_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"q_proj has forward hooks.*set_z3_leaf_modules\(model, \[LlamaDecoderLayer"):
        model(**make_batch("plain"))


# --- Accelerate ------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate():
    """The library. What an Accelerator decides for the whole process is forgotten before and after."""
    library = pytest.importorskip("accelerate")
    reset = functools.partial(library.state.AcceleratorState._reset_state, reset_partial_state=True)
    reset()
    yield library
    reset()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accumulated_and_clipped_by_accelerate(accelerate, precision):
    """Over batches of two lengths, by `accumulate`: the clipped gradients and the mean loss."""
    model, batches = make_model("Qwen2"), [make_batch(kind) for kind in ("padded", "packed")]
    exact = copy.deepcopy(model).double()

    def run(module: nn.Module, mixed: str) -> State:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=mixed)
        optimizer = torch.optim.SGD(module.parameters(), 0.0)
        module, optimizer = accelerator.prepare(module, optimizer)
        losses = []
        for batch in batches:
            with accelerator.accumulate(module):
                losses.append(module(**batch).loss)
                accelerator.backward(losses[-1])
                if accelerator.sync_gradients:
                    assert accelerator.clip_grad_norm_(module.parameters(), 0.1) > 0.1
                    grads = {n: p.grad.clone() for n, p in module.named_parameters()}
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": torch.stack(losses).mean().detach(), **grads}

    with InFloat64():
        truth = run(exact, "no")
    plain = run(copy.deepcopy(model), precision)
    pyckpt.swap(model, tile=10)
    ours = run(model, precision)
    assert_step_as_good(ours, plain, truth, torch.float32 if precision == "no" else torch.bfloat16)


def test_a_copy_of_what_accelerate_prepared_is_one_of_its_own(accelerate):
    """Its forward in mixed precision wraps ours, which must be the copy's: with its weights, and back without it."""
    model, batch = make_model("Qwen2"), make_batch("plain")
    pyckpt.swap(model)
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    copied = copy.deepcopy(prepared)
    before = step(prepared, batch)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    # Logits of 0 in bfloat16, and their loss in float32.
    assert copied(**batch).loss.item() == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert_same_bits(step(prepared, batch), before)
    assert dict(replaced_in(copied))[""].module is copied


def test_without_accelerates_mixed_precision_again(accelerate):
    """`unwrap_model(keep_fp32_wrapper=False)` makes a method of what it finds under its own forward."""
    model, batch = make_model("Qwen2"), make_batch("plain")
    pyckpt.swap(model)
    before = step(model, batch)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    made = model(batch["input_ids"], labels=batch["labels"])
    assert made.logits is None
    copied = copy.deepcopy(model)
    assert_same_bits(step(copied, batch), before)
    for module in (model, copied):
        pyckpt.unswap(module)
        names = {"forward", "_pyckpt_forward", "_replicate_for_data_parallel"}
        assert not [n for n, m in module.named_modules() if names & set(vars(m))]


def test_what_looks_at_the_function_of_a_forward():
    """As TRL from 1.8 to 1.14 does, which hands on the signature of its first argument's method."""
    model = make_model("Qwen2")
    before = inspect.signature(type(model).forward)
    pyckpt.swap(model)
    assert inspect.signature(model.forward.__func__) == before
    method = types.MethodType(model.forward.__func__, model)
    assert inspect.signature(method) == inspect.signature(model.forward)
    batch = make_batch("plain")
    assert torch.equal(method(**batch).loss, model(**batch).loss)


# --- torch.nn.DataParallel -------------------------------------------------------------------------------------------


def test_data_parallels_replicas_are_refused():
    """They would run with the weights of the first; with one device there are none."""
    model, batch = make_model("Qwen2"), make_batch("plain")
    pyckpt.swap(model)
    before = step(model, batch)
    assert_same_bits(step(nn.DataParallel(model).module, batch), before)
    for module in (model, model.model.layers[0], copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="one process for each GPU"):
            module._replicate_for_data_parallel()
    pyckpt.unswap(model)
    model._replicate_for_data_parallel()


# --- Gradient checkpointing ------------------------------------------------------------------------------------------


def test_gradient_checkpointing_around_a_layers_call_is_not_doubled(monkeypatch):
    """As transformers 5.0 has it, where later versions have it in the layer's forward."""
    from torch.utils.checkpoint import checkpoint

    model, batch = make_model("Llama"), make_batch("padded")

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(nn.Module.__call__, layer, **kwargs)
        return checkpoint(run, *args, use_reentrant=False) if layer.gradient_checkpointing else run(*args)

    monkeypatch.setattr(type(model.model.layers[0]), "__call__", call)
    pyckpt.swap(model)
    before, calls, own = step(model, batch), [], SwappedLayer.__call__
    monkeypatch.setattr(SwappedLayer, "__call__", lambda layer, *a, **k: calls.append(layer) or own(layer, *a, **k))
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is ignored"):
        assert_same_bits(step(model, batch), before)
    assert len(calls) == 2
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_what_trls_packing_gives_beside_positions():
    """Its collator's tensors for kernels that take packed sequences: they say what the positions say."""
    batch = make_batch("packed")
    starts = torch.tensor([0, 5, 6, 30], dtype=torch.int32)
    batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 24, "max_length_k": 24}
    batch |= {"seq_idx": (batch["position_ids"] == 0).cumsum(1).int() - 1}
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, -100)
    assert as_before(make_model("Llama", attn_implementation="sdpa"), batch)[0].path == "standard"


SFT = {
    "padded": {},
    "packed": {"packing": True, "activation_checkpointing": True},
    "completion": {},
    "LoRA": {},
    "swapped after": {},
}


@pytest.mark.parametrize("kind", SFT)
def test_sfttrainer_trains_as_before(kind, tmp_path):
    """Losses, entropy and accuracy of tokens, and evaluation, as of the model that is not swapped."""
    trl, datasets = pytest.importorskip("trl", minversion="1.15"), pytest.importorskip("datasets")
    rows = [{"input_ids": torch.randint(1, VOCAB, (n,)).tolist()} for n in (19, 12, 7, 19, 5, 9, 11, 3)]
    if kind == "completion":
        rows = [{**row, "completion_mask": [int(i > 2) for i in range(len(row["input_ids"]))]} for row in rows]
    data = datasets.Dataset.from_list(rows)
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    options |= {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 1, "disable_tqdm": True}
    # With Adam's own epsilon a weight whose gradient is nearly all rounding would take a whole step, either way.
    options |= {"max_length": 24, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
    options |= {"activation_checkpointing": False, **SFT[kind]}
    model, results = make_model("Qwen3", attn_implementation="sdpa"), []
    if kind == "LoRA":
        model = make_adapted(model, target_modules="all-linear")
    for swapped in (False, True):
        trained = copy.deepcopy(model)
        if swapped and kind != "swapped after":
            pyckpt.swap(trained)
        trainer = trl.SFTTrainer(
            model=trained,
            args=trl.SFTConfig(str(tmp_path), **options),
            train_dataset=data,
            eval_dataset=data,
            processing_class=make_tokenizer(),
        )
        if swapped and kind == "swapped after":
            assert not pyckpt.swap(trainer.model, loss=False).left
        warned = swapped and options["activation_checkpointing"]
        with pytest.warns(UserWarning, match="checkpointing is ignored") if warned else contextlib.nullcontext():
            trainer.train()
        entries = [*trainer.state.log_history, trainer.evaluate()]
        results.append([{n: e[n] for n in e if n.endswith(("loss", "entropy", "accuracy", "norm"))} for e in entries])
    assert [sorted(e) for e in results[0]] == [
        *[["entropy", "grad_norm", "loss", "mean_token_accuracy"]] * 2,
        ["train_loss"],
        ["eval_entropy", "eval_loss", "eval_mean_token_accuracy"],
    ]
    for ours, before in zip(*reversed(results), strict=True):
        assert ours == pytest.approx(before, rel=1e-4)
