"""Which decoder layers `pyckpt.swap` takes: sinks, RoPE of any type, and classes that it has no table of."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from swap_models import KINDS, OTHERS, VOCAB, check, make_batch, make_model, step
from torch import nn

import pyckpt
from pyckpt.attend.dense import DenseAttend, Layout
from pyckpt.attend.tiled import TiledAttend

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def no_fallback():
    """A fall-back to the original forward fails the test, unless it expects one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pyckpt.swap")
        yield


def assert_same_with_every_save_set(model: Any) -> None:
    batch, results = make_batch("padded"), []
    for save in pyckpt.SAVE_SETS:
        pyckpt.swap(model, save=save, tile=10)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def assert_generates_the_same(model: Any) -> None:
    ids = torch.randint(1, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    before = model.eval().generate(ids, **options)
    pyckpt.swap(model)
    assert torch.equal(model.generate(ids, **options), before)


# --- gpt-oss ---------------------------------------------------------------------------------------------------------


def make_gpt_oss(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With sinks as large as scores."""
    model = make_model("GptOss", **options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks += torch.randn(4)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_have_a_gradient(dtype):
    """With all experts at work: which are chosen may change with a rounding."""
    model = make_gpt_oss(dtype, num_experts_per_tok=4)
    check(model, [make_batch(kind) for kind in KINDS])
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_(False)
    assert not [n for n in step(model, make_batch("plain")) if "sinks" in n]


def test_gpt_oss_is_the_same_with_every_save_set():
    assert_same_with_every_save_set(make_gpt_oss())


def test_gpt_oss_generates_the_same_tokens():
    assert_generates_the_same(make_gpt_oss())


def test_gpt_oss_under_autocast_and_partly_frozen():
    """Sinks alone are trained: they have the gradient that they have beside all others."""
    model = make_gpt_oss()
    pyckpt.swap(model, tile=10)
    batch = make_batch("padded")
    with torch.autocast("cpu", torch.bfloat16):
        whole = step(model, batch)
        for name, p in model.named_parameters():
            p.requires_grad_("sinks" in name)
        alone = step(model, batch)
    assert alone.keys() == {"loss", *(n for n in whole if "sinks" in n)}
    assert_same_bits(alone, {n: whole[n] for n in alone})


def test_positions_do_not_cut_where_the_models_masks_are_not_cut():
    """This model does not tell its masks of them; a model on the meta device can't be asked, and is not guessed."""
    model = make_gpt_oss()
    pyckpt.swap(model)
    assert model.model.forward.cuts is False
    model.model.forward.cuts = None
    with pytest.warns(UserWarning, match=r"whether that cuts the model's masks is not known.* original forward"):
        model(**make_batch("packed"))


def test_sinks_cannot_be_streamed():
    attend = dataclasses.replace(DenseAttend(4, 2, 12, (-1, 0), 0.0, 0.3), sinks="attend.sinks")
    with pytest.raises(ValueError, match="attention with sinks cannot be streamed"):
        TiledAttend(attend, Layout(1, 8), 4)


# --- RoPE whose frequencies depend on the length ----------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.4],
    "long_factor": [1.0, 2.5, 4.0, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
MOVING = {
    "Phi3": {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    "Llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
}


def short_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (2, 9))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("path", ["standard", "generic"])
@pytest.mark.parametrize("family", MOVING)
def test_rope_that_depends_on_the_length(family, path):
    """Batches above and below the length at which the frequencies change, in turn.

    The last is a short one: "dynamic" keeps the frequencies of the longest batch until one is short again.
    """
    model = make_model("Qwen3" if (family, path) == ("Phi3", "generic") else family, **moving(family, path))
    if path == "generic":
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Mish()
    check(model, [make_batch("plain"), short_batch(), make_batch("padded"), make_batch("packed"), short_batch()])
    assert {e.path for e in swap_anew(model).entries[:-1]} == {path}


def moving(family: str, path: str) -> dict[str, Any]:
    """Phi-3 has fused projections, of which the generic path knows nothing: there longrope is that of a Qwen 3."""
    return MOVING[family] | ({"head_dim": 12} if (family, path) == ("Phi3", "generic") else {})


def swap_anew(model: Any, **options: Any) -> Any:
    pyckpt.unswap(model)
    return pyckpt.swap(model, tile=10, **options)


@pytest.mark.parametrize("family", MOVING)
def test_the_frequencies_of_a_call_are_those_of_its_backward(family):
    """Of two losses, one after the other, and then their backwards; in segments too."""
    model = make_model(family, **MOVING[family])
    batches, results = [make_batch("plain"), short_batch()], []
    apart = [step(model, batch) for batch in batches]
    truth = {n: sum(part[n] for part in apart) for n in apart[0]}
    for segments in (None, 2):
        pyckpt.swap(model, tile=10, segments=segments)
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        pyckpt.unswap(model)
    assert_same_bits(*results)
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, truth[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOVING)
def test_generates_beyond_the_length_as_before(family):
    assert_generates_the_same(make_model(family, **MOVING[family]))


def test_rope_that_depends_on_the_length_is_right_when_compiled():
    """The model's own forward is compiled: frequencies that were read once would be those of another length."""
    model = make_model("Phi3", attn_implementation="sdpa", num_hidden_layers=1, **MOVING["Phi3"])
    batches = [short_batch(), make_batch("plain")]
    before = [model(**batch).loss for batch in batches]
    pyckpt.swap(model)
    compiled = torch.compile(model, backend="eager")
    for batch, loss in zip(batches, before, strict=True):
        torch.testing.assert_close(compiled(**batch).loss, loss)


# --- classes without a table -----------------------------------------------------------------------------------------

OWN_LOSS = ("Cohere2", "GPTBigCode", "OPT", "VaultGemma")  # logits that are scaled or capped, another base model


@pytest.mark.parametrize("family", OTHERS)
def test_a_class_without_a_table(family):
    """Its layers run by their own forward around our attention; but for linear attention, which is left as it is."""
    left = ("model.layers.0",) if family == "Qwen3Next" else ()
    check(make_model(family), [make_batch(kind) for kind in KINDS], left + ("(model)",) * (family in OWN_LOSS))


LEFT = {
    "Bloom": ({"n_layer": 1, "n_head": 4}, "its model does not hand further arguments on"),  # ALiBi
    "DiffLlama": ({"num_hidden_layers": 1}, "calls an attention function 2 times"),
    "Doge": ({"num_hidden_layers": 1}, "its output is not that of its parts around attention"),
    "Falcon": ({"num_hidden_layers": 1}, "its model does not hand further arguments on"),
    "Phimoe": ({"num_hidden_layers": 1, "num_local_experts": 4}, "it draws random numbers for something else"),
    "XGLM": ({"num_layers": 1, "attention_heads": 4}, "does not go through transformers' attention functions"),
}


@pytest.mark.parametrize("family", LEFT)
def test_a_class_that_cannot_be_cut_is_left_with_the_reason(family):
    options, why = LEFT[family]
    model = make_model(family, **options)
    with pytest.raises(ValueError, match=rf"this class is not known, and .*{why}"):
        pyckpt.swap(model)
