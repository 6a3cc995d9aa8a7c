"""Swapped models of which something is changed afterwards, or that are asked for more than their logits."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import GPT2_SIZES, VOCAB, make_batch, make_model, step

import pyckpt

transformers = pytest.importorskip("transformers")

# Each with dropout where its class has any.
CHANGED = {
    "Llama": {"attention_dropout": 0.3},
    "GPT2": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
    "GPTNeoX": {"hidden_dropout": 0.3, "attention_dropout": 0.0},
    "Phi3": {"resid_pdrop": 0.3},
    "Starcoder2": {"residual_dropout": 0.3},
    "GptOss": {"attention_dropout": 0.3},
    "Olmo3": {"attention_dropout": 0.3},
}


def set_rates(layer: torch.nn.Module, rate: float) -> None:
    """Of its dropout modules, and of those that are numbers."""
    for module in layer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        for name in ("attention_dropout", "residual_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", a_few(CHANGED, always=(0, 1)))
def test_dropout_follows_the_rates_of_the_call(family, streamed, no_fallback):
    """As TRL switches dropout off, after a swap: as if swapped since, and so it is when it is switched on again."""
    model, batch = make_model(family, **CHANGED[family]), make_batch("plain")
    stream = pyckpt.Stream(7) if streamed else None
    layers = model.transformer.h if family == "GPT2" else model.base_model.layers

    def seeded() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return step(model, batch)

    pyckpt.swap(model, tile=10, stream=stream)
    with_dropout = seeded()
    for rate in (0.0, 0.4):
        for layer in layers:
            set_rates(layer, rate)
        changed = seeded()
        pyckpt.unswap(model)
        pyckpt.swap(model, tile=10, stream=stream)
        assert_same_bits(changed, seeded())
        assert changed["loss"] != with_dropout["loss"]


def test_dropout_that_a_block_lacks_runs_the_original_forward():
    model, batch = make_model("GPT2"), make_batch("plain")
    pyckpt.swap(model)
    model.transformer.h[1].mlp.dropout.p = 0.3
    with pytest.warns(UserWarning, match=r"dropout after attention and after the MLP differ: \[0\.0, 0\.3\]"):
        model(**batch)
    layer = torch.nn.TransformerEncoderLayer(48, 4, 72, 0.0, "gelu", batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2)
    pyckpt.swap(encoder)
    encoder.layers[0].dropout.p = 0.3
    with pytest.warns(UserWarning, match="its dropout was switched on since it was swapped"):
        encoder(torch.randn(2, 9, 48))


def test_a_compiled_model_follows_the_rates_of_the_call():
    model, batch = make_model("Llama", attn_implementation="sdpa", attention_dropout=0.3), make_batch("plain")
    pyckpt.swap(model, tile=10)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    assert torch.equal(compiled(**batch).loss, model(**batch).loss)


def unswap_one(model: Any) -> None:
    if "forward" in vars(model.model.layers[1]):
        pyckpt.unswap(model.model.layers[1])


def put_one_in(model: Any) -> None:
    layer = copy.deepcopy(model.model.layers[1])
    if "forward" in vars(layer):
        pyckpt.unswap(layer)
    model.model.layers[1] = layer


def take_one_out(model: Any) -> None:
    model.model.layers = model.model.layers[:1]


def see_later_tokens(model: Any) -> None:
    model.config.is_causal = False


def see_later_tokens_by_attention(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False


CHANGES = [unswap_one, put_one_in, take_one_out, see_later_tokens, see_later_tokens_by_attention]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_layers_and_attention_that_is_not_causal_any_more(change):
    """Layers that are not swapped find the model's own mask, and segments run no others than the model has."""
    model, batch = make_model("Llama"), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, segments=2, loss=False)
    change(plain)
    change(model)
    with pytest.warns(UserWarning, match="runs its original forward"):
        found = step(model, batch)
    assert_same_bits(found, step(plain, batch))


def test_layers_that_are_wrapped_since_are_the_same():
    model, batch = make_model("Llama"), make_batch("plain")
    pyckpt.swap(model)
    before = step(model, batch)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    assert_same_bits({"loss": model(**batch).loss}, {"loss": before["loss"]})


def test_a_head_of_more_than_logits_keeps_its_loss():
    """GPT-2's with a choice among sentences: what its own forward makes beside the logits is there."""
    config = transformers.GPT2Config(**GPT2_SIZES, num_labels=1, summary_first_dropout=0.0)
    model = transformers.GPT2DoubleHeadsModel(config).train()
    model.transformer.drop.p = 0.0
    for layer in model.transformer.h:
        set_rates(layer, 0.0)
    ids = torch.randint(1, VOCAB, (2, 3, 8))
    choice = {"mc_token_ids": torch.full((2, 3), 7), "mc_labels": torch.tensor([0, 2])}
    before = model(input_ids=ids, labels=ids, **choice)
    head = pyckpt.swap(model).left[0]
    assert "it makes mc_logits beside its logits" in head.why
    after = model(input_ids=ids, labels=ids, **choice)
    for name in ("loss", "mc_loss"):  # after two layers of another order of sums, in float32
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-6)


def test_an_argument_for_the_heads_own_forward():
    class Scored(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any = None, labels: Any = None, weight: Any = None, **given: Any) -> Any:
            out = super().forward(input_ids=input_ids, labels=labels, **given)
            return out if weight is None else dataclasses.replace(out, loss=weight * out.loss)

    like = make_model("Llama")
    model, batch = Scored(like.config).train(), make_batch("plain")
    pyckpt.swap(model)
    assert model(**batch).logits is None
    with torch.no_grad():
        before = model(**batch, output_logits=True).loss
    with pytest.warns(UserWarning, match="weight is for the model's own forward"):
        after = model(**batch, weight=torch.tensor(2.0))
    assert torch.equal(after.loss, 2 * before)


@pytest.mark.parametrize("family", ["GraniteMoe", "Qwen3Moe"])
def test_another_implementation_of_the_experts_is_followed(family, monkeypatch):
    from transformers.integrations import moe

    called = []
    known = moe.ALL_EXPERTS_FUNCTIONS.items()
    ways = {n: (lambda *a, n=n, f=f, **k: (called.append(n), f(*a, **k))[1]) for n, f in known}
    monkeypatch.setattr(moe.ALL_EXPERTS_FUNCTIONS, "_local_mapping", ways)
    model, batch = make_model(family), make_batch("plain")
    pyckpt.swap(model, tile=10)
    step(model, batch)
    assert not called
    model.set_experts_implementation("batched_mm")
    step(model, batch)
    assert set(called) == {"batched_mm"}
