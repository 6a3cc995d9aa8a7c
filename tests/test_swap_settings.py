"""Swapped models whose modules are set otherwise in the backward than in the call, or get others after the swap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from swap_models import VOCAB, make_model
from torch import Tensor

import pyckpt

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FAMILIES = ["Llama", "Olmo"]


def adapted(family: str, rate: float = 0.0) -> Any:
    config = peft.LoraConfig(
        r=4, lora_dropout=rate, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(make_model(family), config).double().train()


def ids() -> Tensor:
    return torch.randint(3, VOCAB, (2, 10))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def assert_same_gradients(a: Any, b: Any) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        if p.grad is None or not p.grad.any():
            assert q.grad is None or not q.grad.any(), name
        else:
            # The losses are float32: what comes from upstream has its rounding.
            assert (p.grad - q.grad).norm() <= 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_train_mode_of_the_call_is_that_of_its_backward(family):
    """LoRA's dropout on a CPU is the modules' own."""
    model, tokens = adapted(family, 0.5), ids()
    pyckpt.swap(model)
    found = []
    for between in (lambda: None, model.eval):
        model.zero_grad()
        torch.manual_seed(3)
        loss = loss_of(model.train(), tokens)
        between()
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert not model.training
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_adapters_of_the_call_are_those_of_its_backward(family, rate):
    model, tokens = adapted(family, rate).eval(), ids()
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name or "embed_tokens" in name or "o_proj" in name)
    plain = copy.deepcopy(model)
    pyckpt.swap(model)
    for m in (plain, model):
        policy = loss_of(m, tokens)
        with m.disable_adapter():
            reference = loss_of(m, tokens)
        (policy + 2 * reference).backward()
    assert_same_gradients(plain, model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("error:.*original forward")
def test_an_adapter_that_is_added_after_the_swap(family):
    """As TRL adds one for its reference; no layer runs the original."""
    model, tokens = adapted(family), ids()
    plain = copy.deepcopy(model)
    pyckpt.swap(model)
    losses = []
    for m in (plain, model):
        torch.manual_seed(5)
        m.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        m.double().set_adapter("ref")
        losses.append([float(loss_of(m, tokens)) for _ in range(3)])
        loss_of(m, tokens).backward()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(set(losses[1])) == 1
    assert_same_gradients(plain, model)
    model.delete_adapter("default")
    plain.delete_adapter("default")
    assert float(loss_of(model, tokens)) == pytest.approx(float(loss_of(plain, tokens)), rel=1e-6)


@pytest.mark.parametrize("what", ["a layer with hooks", "an argument"])
def test_positions_that_start_anew_while_a_cache_is_on_by_default(what):
    """transformers does not look at them then, and neither do layers that read its own mask beside swapped ones."""
    model = make_model("Llama").double()
    plain = copy.deepcopy(model)
    tokens, positions = ids(), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2)
    for m in (plain, model):
        assert m.config.use_cache
        if what == "a layer with hooks":
            m.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    pyckpt.swap(model)
    more = {} if what == "a layer with hooks" else {"of_ones_own": torch.ones(1)}
    for m in (plain, model):
        m(input_ids=tokens, position_ids=positions, labels=tokens, **more).loss.backward()
    assert_same_gradients(plain, model)


def test_a_backward_hook_inside_a_layer_runs():
    model = make_model("Llama").double()
    plain, tokens = copy.deepcopy(model), ids()
    pyckpt.swap(model)
    for m in (plain, model):
        m.model.layers[0].mlp.register_full_backward_hook(lambda _, grads, __: tuple(2 * g for g in grads))
        loss_of(m, tokens).backward()
    assert_same_gradients(plain, model)


def test_frequencies_that_were_made_in_inference_mode():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = make_model("Llama", rope_parameters=scaling, max_position_embeddings=8).double()
    plain, tokens = copy.deepcopy(model), ids()
    pyckpt.swap(model)
    for m in (plain, model):
        with torch.inference_mode():
            loss_of(m, tokens)
        loss_of(m, tokens[:, :6]).backward()
    assert_same_gradients(plain, model)
