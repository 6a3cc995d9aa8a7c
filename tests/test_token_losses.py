"""`pyckpt.token_losses`, and weights of tokens in a swapped model's loss: DPO's and GRPO's log-probabilities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_same_bits
from helpers import a_few
from swap_models import FAMILIES, KINDS, InFloat64, known, make_adapted, make_batch, make_model
from test_model import make_lm

import pyckpt

transformers = pytest.importorskip("transformers")
WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"stream": pyckpt.Stream(7)},
    "recompute": {"loss": "recompute"},
    "segments": {"segments": 2},
}
# Sums in another order, of gradients that nearly cancel, in float64.
ROUNDING = 1e-10
# A router's softmax is in float32 where the backward runs it again: `InFloat64` is not on there.
ROUTED = 1e-5


def logits_of(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {"use_cache": False, **{n: t for n, t in batch.items() if n != "labels"}}
    return model(**inputs).logits


def from_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the model's own logits say."""
    labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits_of(model, batch).transpose(1, 2), labels, reduction="none")


def gradients(model: Any, losses: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    losses.backward(upstream)
    found = {
        "losses": losses.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }
    model.zero_grad()
    return found


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], rounding: float = ROUNDING) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name] - want[name]).norm() <= rounding * want[name].norm(), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", a_few([*FAMILIES, "Mixtral"], always=(0, 3, 6)))
def test_are_those_of_the_logits(family, way):
    """And so are their gradients, each token's with a weight of its own."""
    model = make_model(family, torch.float64)
    for kind in KINDS:
        batch = known(model, make_batch(kind))
        with InFloat64():
            want = from_logits(model, batch)
            upstream = torch.randn_like(want)
            want = gradients(model, want, upstream)
            pyckpt.swap(model, **WAYS[way])
            got = pyckpt.token_losses(model, **batch)
            assert got.shape == batch["labels"].shape
            assert_near(gradients(model, got, upstream), want, ROUTED if family == "Mixtral" else ROUNDING)
        pyckpt.unswap(model)


@pytest.mark.parametrize("way", WAYS)
def test_without_gradients(way):
    """As of DPO's reference model: no logits there either."""
    model, batch = make_model("Llama").eval(), make_batch("padded")
    want = from_logits(model, batch)
    pyckpt.swap(model, **WAYS[way])
    with torch.no_grad():
        got = pyckpt.token_losses(model, **batch)
        assert not got.requires_grad
        torch.testing.assert_close(got, want)
        assert model(**batch).logits is not None  # as before


def test_labels_are_the_tokens_by_default():
    model, ids = make_model("Llama"), make_batch("plain")["input_ids"]
    pyckpt.swap(model)
    losses = pyckpt.token_losses(model, ids)
    assert torch.equal(losses, pyckpt.token_losses(model, ids, ids))
    torch.testing.assert_close(losses[:, :-1].mean(), model(input_ids=ids, labels=ids).loss)
    assert (losses[:, -1] == 0).all()


def test_of_adapters_and_their_base():
    """DPO with LoRA: the reference is the model with its adapters off."""
    model, ids = make_adapted(make_model("Llama")), make_batch("plain")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        want = from_logits(model, {"input_ids": ids, "labels": ids})
    pyckpt.swap(model)
    policy = pyckpt.token_losses(model, ids)
    with torch.no_grad(), model.disable_adapter():
        reference = pyckpt.token_losses(model, ids)
    torch.testing.assert_close(reference, want)
    assert not torch.allclose(policy, reference)
    F.logsigmoid(0.1 * (reference - policy).sum(1).diff(dim=0)).neg().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_compiled():
    model, ids = make_model("Llama"), make_batch("plain")["input_ids"]
    pyckpt.swap(model)
    want = pyckpt.token_losses(model, ids)
    torch.testing.assert_close(pyckpt.token_losses(torch.compile(model, backend="eager"), ids), want)


@pytest.mark.parametrize("stream", [None, pyckpt.Stream(7)], ids=["resident", "streamed"])
def test_of_a_model_of_ours(stream):
    model = make_lm(torch.float32)
    tokens = torch.randint(0, 50, (2, 19))
    want = F.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(pyckpt.token_losses(model, tokens, stream=stream)[:, :-1], want)


def test_of_a_model_of_ours_in_a_wrapper():
    """torch.compile has no part in a loss; what reduces gradients in its forward has to be called."""
    model, tokens = make_lm(torch.float32), torch.randint(0, 50, (2, 19))
    want = pyckpt.token_losses(model, tokens)
    assert torch.equal(pyckpt.token_losses(torch.compile(model, backend="eager"), tokens), want)

    class DistributedDataParallel(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    for inner in (model, torch.compile(model, backend="eager")):
        for wrapped in (DistributedDataParallel(inner), torch.compile(DistributedDataParallel(inner), backend="eager")):
            with pytest.raises(
                ValueError, match="is in a DistributedDataParallel, whose forward gives logits and no loss"
            ):
                pyckpt.token_losses(wrapped, tokens)


def test_bad_arguments():
    model, tokens = make_lm(torch.float32), torch.randint(0, 50, (2, 19))
    with pytest.raises(TypeError, match=r"input_ids must be a torch\.Tensor, got list"):
        pyckpt.token_losses(model, tokens.tolist())
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        pyckpt.token_losses(model, tokens, tokens.tolist())
    with pytest.raises(ValueError, match="reduction='mean': token_losses gives the loss of every token"):
        pyckpt.token_losses(model, tokens, reduction="mean")


def test_no_logits_are_made():
    """At 4,000 words, where they would be the largest tensor by far."""
    model, ids = make_model("Llama", vocab_size=4000), torch.randint(1, 4000, (1, 60))
    pyckpt.swap(model)
    with pyckpt.measure.memory(model) as m:
        pyckpt.token_losses(model, ids)
    assert m.live_bytes < 60 * 4000 * 4 / 4


# --- in the model's own loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("items", [None, 11])
def test_token_weights(items, way):
    model, batch = make_model("Gemma2", torch.float64), make_batch("padded")
    batch = known(model, batch)
    weights = torch.rand(batch["labels"].shape, dtype=torch.float64)
    given = {} if items is None else {"num_items_in_batch": items}
    with InFloat64():
        losses, counts = from_logits(model, batch), F.pad(weights, (0, 1))[:, 1:]
        counts = counts * (F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100)
        want = (losses * counts).sum() / (items or counts.sum())
        want = gradients(model, want, torch.ones_like(want))
        pyckpt.swap(model, **WAYS[way])
        loss = model(**batch, **given, token_weight=weights).loss
        assert_near(gradients(model, loss, torch.ones_like(loss)), want)
        shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:], F.pad(weights, (0, 1))[:, 1:]
        loss = model(**batch, **given, shift_labels=shifted[0], token_weight=shifted[1]).loss
        assert_near(gradients(model, loss, torch.ones_like(loss)), want)


@pytest.mark.parametrize("way", WAYS)
def test_smoothed_labels_and_a_loss_of_the_normaliser(way):
    model, batch = make_model("Gemma2", torch.float64), make_batch("padded")
    batch = known(model, batch)
    with InFloat64():
        logits, labels = logits_of(model, batch), F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        want = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.2)
        want = want + 0.1 * logits.logsumexp(-1).square()[labels != -100].mean()
        want = gradients(model, want, torch.ones_like(want))
        pyckpt.swap(model, **WAYS[way])
        loss = model(**batch, label_smoothing=0.2, z_loss=0.1).loss
        assert_near(gradients(model, loss, torch.ones_like(loss)), want)


def test_reductions():
    model, batch = make_model("Llama"), make_batch("padded")
    pyckpt.swap(model)
    each = model(**batch, reduction="none").loss
    torch.testing.assert_close(model(**batch, reduction="sum").loss, each.sum())
    assert_same_bits({"": model(**batch, reduction="mean").loss}, {"": model(**batch).loss})


# --- what can't be had --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reduction": "max"}, "reduction='max' does not exist; expected one of mean, sum, none"),
        ({"reduction": "mean", "num_items_in_batch": 3}, "leave out it or reduction"),
        ({"reduction": "none", "output_logits": True}, "reduction can't be had of the model's own forward.*logits are"),
        ({"token_weight": torch.ones(2, 19), "labels": None}, "token_weight can't be had .*: there are no labels"),
        ({"token_weight": torch.ones(2, 18)}, r"token_weight has shape \(2, 18\), expected \(2, 19\)"),
        ({"token_weight": torch.ones(2, 19).long()}, "token_weight has dtype torch.int64, expected one of"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1\.5"),
        ({"z_loss": float("nan")}, "z_loss must be a finite number, got nan"),
        ({"label_smoothing": 0.1, "output_logits": True}, "label_smoothing can't be had of the model's own forward"),
    ],
    ids=range(9),
)
def test_bad_calls(given, message):
    model, batch = make_model("Llama"), make_batch("plain")
    pyckpt.swap(model)
    with pytest.raises(ValueError, match=message):
        model(**batch | given)


def test_a_model_whose_loss_is_its_own():
    model, batch = make_model("Llama"), make_batch("plain")
    for swapped in (False, True):
        if swapped:
            pyckpt.swap(model, loss=False)
        with pytest.raises(ValueError, match=r"its loss is its own; pyckpt\.swap\(model\) replaces it"):
            pyckpt.token_losses(model, **batch)
    mixture = make_model("Mixtral")
    pyckpt.swap(mixture)
    with pytest.raises(ValueError, match=r"reduction can't be had .*: output_router_logits asks for the router's loss"):
        pyckpt.token_losses(mixture, **batch, output_router_logits=True)


def test_labels_of_another_shape():
    model, ids = make_model("Llama"), make_batch("plain")["input_ids"]
    pyckpt.swap(model)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 4\), expected input_ids', \(2, 19\)"):
        pyckpt.token_losses(model, ids, ids[:, :4])


def test_copies_give_the_same():
    model, ids = make_model("Llama"), make_batch("plain")["input_ids"]
    pyckpt.swap(model)
    assert torch.equal(pyckpt.token_losses(copy.deepcopy(model), ids), pyckpt.token_losses(model, ids))
