"""`pyckpt.swap(stream=)`: the losses and gradients of the model as it was, with tiles alone on the device."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits, relative_errors
from helpers import a_few
from swap_models import (
    FAMILIES,
    KINDS,
    MIXTURES,
    OTHERS,
    VOCAB,
    InFloat64,
    assert_step_as_good,
    check,
    known,
    make_adapted,
    make_batch,
    make_model,
    step,
)
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.measure.flops import attention_pairs

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_fallback")
# Sums in another order, of gradients that nearly cancel, in float64.
ROUNDING = 1e-11


def stream(tile: int = 7, store: Any = "host", **options: Any) -> pyckpt.Stream:
    return pyckpt.Stream(tile, store, **options)


@pytest.mark.parametrize("family", a_few(FAMILIES, always=range(0, len(FAMILIES), 2)))
def test_loss_and_gradients(family):
    model = make_model(family)
    check(model, [make_batch(kind) for kind in KINDS], stream=stream())
    pyckpt.unswap(model)
    assert "streamed from the token ids on" in pyckpt.swap(model, stream=stream()).entries[-1].why


@pytest.mark.parametrize("family", ["Cohere", "Gemma3", "GPT2", "Qwen3"])
def test_loss_and_gradients_in_bfloat16(family):
    check(make_model(family, torch.bfloat16), [make_batch(kind) for kind in KINDS], stream=stream(11, "file"))


def errors_of_streaming(model: Any, batch: dict[str, Any], **options: Any) -> float:
    """The largest relative error of loss and gradients, against the same model swapped without a stream."""
    pyckpt.swap(model)
    with InFloat64():
        resident = step(model, batch)
    pyckpt.unswap(model)
    pyckpt.swap(model, stream=stream(), **options)
    with InFloat64():
        return max(relative_errors(step(model, batch), resident).values())


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(family):
    """In float64: a router's gradient is a difference of experts' outputs, whose float32 rounding is luck.

    In a backward its own probabilities are float32 all the same: one in some thousand rounds otherwise in another tile.
    """
    model = make_model(family, torch.float64)
    for kind in KINDS:
        assert errors_of_streaming(model, make_batch(kind)) < 1e-8
        pyckpt.unswap(model)


def shifted(batch: dict[str, Any]) -> dict[str, Any]:
    """With labels that are of each token already, as sequence parallelism hands them out."""
    labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    return {**batch, "shift_labels": labels.contiguous()}


@pytest.mark.parametrize(
    "extra",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 5},
        "shifted",
        "embeddings",
        "base",
    ],
    ids=str,
)
def test_what_a_call_may_ask_for(extra):
    model, batch = make_model("Gemma3", torch.float64), make_batch("padded")
    if extra == "shifted":
        batch = shifted(batch)
    elif extra == "embeddings":  # the layers alone are streamed, with a warning
        ids = batch.pop("input_ids")
        batch["inputs_embeds"] = model.get_input_embeddings()(ids).detach().requires_grad_()
        warnings.filterwarnings("ignore", message=".*called with inputs_embeds .*: the layers are streamed")
    elif extra == "base":
        del batch["labels"]
        pyckpt.swap(model, stream=stream())
        seen: list[tuple[str, int, int]] = []
        streamed = model.model(**batch, use_cache=False).last_hidden_state
        pyckpt.unswap(model)
        pyckpt.swap(model, stream=stream(progress=lambda *at: seen.append(at)))
        assert torch.equal(model.model(**batch, use_cache=False).last_hidden_state, streamed)
        assert {what for what, _, _ in seen} == {"embed", "forward", "head"}
        return
    else:
        batch |= extra
    if "ignore_index" in batch:
        batch["labels"][batch["labels"] == -100] = 5
    assert errors_of_streaming(model, batch) < ROUNDING


@pytest.mark.parametrize("options", [{"segments": 2}, {"segments": "sqrt", "save": "input"}, {"save": "all"}], ids=str)
@pytest.mark.parametrize("family", ["Llama", "GptOss"])
def test_segments_and_save_sets_give_the_same_bits(family, options):
    layers = {"num_hidden_layers": 5} if family == "Llama" else {}
    model, batch = make_model(family, **layers), make_batch("padded")
    results = []
    for given in ({}, options):
        pyckpt.swap(model, stream=stream(), **given)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    assert_same_bits(*results)


@pytest.mark.parametrize("family", ["GPT2", "Phi3", "GptOss", "DeepseekV3", "adapters"])
def test_gradients_by_block_are_the_same_bits(family):
    """Of weights that are parts of one matrix too, and of a loss whose layers alone are streamed."""
    model, batch, results = make_model("Llama" if family == "adapters" else family), make_batch("padded"), []
    if family == "adapters":
        model = make_adapted(model, target_modules=["q_proj", "down_proj"])
    base = {n: v for n, v in batch.items() if n != "labels"} | {"use_cache": False}
    for kind in ("together", "by block"):
        pyckpt.swap(model, stream=stream(gradients=kind))
        results.append(step(model, batch))
        model.base_model(**base)[0].square().sum().backward()
        results[-1] |= {f"{n} of hidden states": p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        pyckpt.unswap(model)
    assert_same_bits(*results)


def test_the_row_of_the_padding_token_learns_nothing_from_being_looked_up():
    model, batch = make_model("Llama", torch.float64), make_batch("plain")
    batch["input_ids"][0, 4:7] = 0
    assert model.model.embed_tokens.padding_idx == 0
    assert errors_of_streaming(model, batch) < ROUNDING
    assert not step(model, batch)["model.embed_tokens.weight"][0].any()


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Starcoder2"])
def test_dropout_of_embeddings(family):
    """The gradient is that of the loss with the same values dropped; without training nothing is."""
    rates = {"GPT2": {"embd_pdrop": 0.4}, "GPTNeoX": {"hidden_dropout": 0.4}, "Starcoder2": {"embedding_dropout": 0.4}}
    model, batch = make_model(family, torch.float64, **rates[family]), make_batch("plain")
    pyckpt.swap(model, stream=stream())

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        with InFloat64():
            return model(**batch).loss

    weight = model.get_input_embeddings().weight
    direction, eps = torch.randn_like(weight), 1e-6
    (grad,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight += eps * direction
    up = loss()
    with torch.no_grad():
        weight -= 2 * eps * direction
    slope = (up - loss()).detach() / (2 * eps)
    # Differences of a loss that is rounded to float32 in places.
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)
    dropped = loss()
    model.eval()
    kept = loss()
    assert kept != dropped
    pyckpt.unswap(model)
    torch.testing.assert_close(loss(), kept, rtol=1e-5, atol=0.0)


def test_adapters_on_a_frozen_base():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("Llama"), peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p) if "lora_B" in name else 0.0
    exact, batch = copy.deepcopy(model).double(), make_batch("padded")
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    pyckpt.swap(model, stream=stream())
    ours = step(model, batch)
    assert all("lora" in n for n in ours.keys() - {"loss"})
    assert_step_as_good(ours, plain, truth, torch.float32)


def test_copies_have_a_store_of_their_own():
    model, batch = make_model("Llama"), make_batch("plain")
    pyckpt.swap(model, stream=stream(store="file"))
    before = step(model, batch)  # from here on the store keeps its file for the next step
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(step(twin, batch), before)
        del twin
        gc.collect()
        assert_same_bits(step(model, batch), before)


def test_after_gradient_checkpointing_was_enabled():
    """transformers leaves a hook on the embedding, which only makes its output want a gradient."""
    model, batch, seen = make_model("Llama"), make_batch("padded"), []
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    model.enable_input_require_grads()
    pyckpt.swap(model, stream=stream(progress=lambda what, *_: seen.append(what)))
    step(model, batch)
    assert {"embed", "forward", "head", "backward"} == set(seen)


def test_autocast_and_hooks():
    model, batch, fired = make_model("Qwen2"), make_batch("padded"), []
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, batch)
        pyckpt.swap(model, stream=stream())
        fired.clear()
        ours = step(model, batch)
    assert sorted(fired) == sorted(n for n, _ in model.named_parameters())
    assert_step_as_good(ours, plain, truth, torch.bfloat16)


def growth_of_the_peak(family: str, **options: Any) -> int:
    """Bytes, from 160 tokens to 320, in tiles of 32."""
    model = make_model(family, max_position_embeddings=4096, **options)
    pyckpt.swap(model, stream=stream(32, "file"))
    peaks = {}
    for seq in (160, 320):
        ids = torch.randint(1, VOCAB, (1, seq))
        with pyckpt.measure.memory(model) as m:
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        peaks[seq] = m.peak_bytes
    return peaks[320] - peaks[160]


def test_the_peak_does_not_grow_with_the_length():
    # Ids, labels, and what is made of them are an int64 of every token.
    assert growth_of_the_peak("Llama") <= 160 * 8 * 4


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("family", ["Llama", "Olmo2", "GPT2", "Gemma2", "Mixtral"])
def test_estimates(family):
    """The store's bytes are exact, the peak above weights' gradients is bounded, and products are those counted."""
    model = make_model(family)
    opened, store = [], pyckpt.store.FileStore()
    store.check = lambda plan: opened.append(plan.store_bytes)
    pyckpt.swap(model, stream=(kept := stream(16, store)))
    ids = torch.randint(1, VOCAB, (1, 64))
    found = kept.estimate(model, 64)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pyckpt.measure.memory(model) as m:
        model(input_ids=ids, labels=ids).loss.backward()
    assert opened == [found.store_bytes]
    assert m.peak_bytes <= found.device_bytes + sum(p.nbytes for p in model.parameters())
    # PyTorch's counter counts softcapped attention by its parts, and can't look into a backward by autograd.grad.
    if family not in ("Gemma2", "Mixtral"):
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "attention" not in str(op))
        attention = 2 * 3.5 * 4 * attention_pairs(64) * 48  # two layers
        assert found.flops == pytest.approx(products + attention, rel=0.05)
    pyckpt.unswap(model)
    pyckpt.swap(model)  # what streaming would take
    assert kept.estimate(model, 64) == found
    with pytest.raises(ValueError, match="has nothing that can be streamed as one run"):
        pyckpt.unswap(model)
        kept.estimate(model, 64)


def test_estimates_with_adapters_are_smaller():
    model = make_model("Llama")
    pyckpt.swap(model)
    whole = stream(16).estimate(model, 64)
    pyckpt.unswap(model)
    adapted = make_adapted(model, target_modules=["q_proj", "v_proj"])
    pyckpt.swap(adapted)
    found = stream(16).estimate(adapted, 64)
    assert found.flops < whole.flops
    assert found.device_bytes < whole.device_bytes


def test_without_gradients():
    """A call with labels returns logits, unless loss="always", and then it is streamed from the token ids on."""
    model, batch = make_model("Llama").eval(), make_batch("padded")
    with torch.no_grad():
        before = model(**batch)
        pyckpt.swap(model, stream=stream())
        after = model(**batch, use_cache=False)
        seen_tokens = batch["attention_mask"] > 0
        torch.testing.assert_close(after.logits[seen_tokens], before.logits[seen_tokens])
        pyckpt.unswap(model)
        seen: list[str] = []
        pyckpt.swap(model, stream=stream(progress=lambda what, *_: seen.append(what)), loss="always")
        always = model(**batch)
    assert always.logits is None and math.isclose(always.loss, before.loss, rel_tol=1e-5)
    assert {"embed", "forward", "head"} == set(seen)


def test_where_somebody_looks_at_each_layer_it_is_not_streamed():
    model, batch = make_model("Llama", num_hidden_layers=4), make_batch("plain")
    pyckpt.swap(model)
    truth, states = step(model, batch), model(**batch, output_hidden_states=True).hidden_states
    pyckpt.unswap(model)
    calls: list[Any] = []
    pyckpt.swap(model, stream=stream(progress=lambda *at: calls.append(at)))
    with pytest.warns(UserWarning, match="every layer's: streaming is not used"):
        found = model(**batch, output_hidden_states=True).hidden_states
    for a, b in zip(found, states, strict=True):
        assert torch.equal(a, b)
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: None)
    with pytest.warns(UserWarning, match="LlamaDecoderLayer has forward hooks: streaming is not used"):
        assert_same_bits(truth, step(model, batch))
    assert not calls
    handle.remove()


@pytest.mark.parametrize("what", ["layer", "embedding", "norm", "base"])
def test_what_cannot_be_streamed_from_the_ids_on_has_its_layers_streamed(what):
    model, batch = make_model("Llama", torch.float64, num_hidden_layers=5), make_batch("padded")
    if what == "layer":
        layer = model.model.layers[2]  # so that it is left as it was
        layer.self_attn.is_causal = False
        layer.mlp.register_forward_hook(lambda m, args, out: None)
        message = "some of its layers are not streamed, or need the model's own forward"
    else:
        place = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "base": model.model}[what]
        place.register_forward_hook(lambda m, args, out: None)
        message = "has forward hooks|with hooks"
    with pytest.warns(UserWarning, match=f"({message}).*: the layers are streamed, and not what surrounds them"):
        assert errors_of_streaming(model, batch) < ROUNDING


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_needs_the_models_own_forward(kind):
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 6, "long_factor": [2.0 + i for i in range(6)]}
        rope |= {"original_max_position_embeddings": 16}
    model = make_model("Llama", torch.float64, rope_parameters=rope, max_position_embeddings=16)
    ids = torch.randint(1, VOCAB, (1, 29))
    with pytest.warns(UserWarning, match="need the model's own forward: the layers are streamed"):
        assert errors_of_streaming(model, {"input_ids": ids, "labels": ids}) < ROUNDING


def test_layers_that_are_not_streamed_run_on_the_device():
    """Between two runs of those that are: of a class that mixes tokens elsewhere than in its attention."""
    model, batch = make_model("Llama", num_hidden_layers=5), make_batch("plain")

    class MyDecoderLayer(type(model.model.layers[2])):  # type: ignore[misc]
        def forward(self, hidden_states, **options):
            return super().forward(hidden_states + 0.1 * hidden_states.roll(1, 1), **options)

    model.model.layers[2].__class__ = MyDecoderLayer
    with pytest.warns(UserWarning, match="some of its layers are not streamed"):
        check(model, [batch], stream=stream())
    pyckpt.unswap(model)
    report = pyckpt.swap(model, stream=stream())
    assert ["; streamed" in e.why for e in report.entries[:-1]] == [True, True, False, True, True]
    assert "not streamed from the token ids on: some of its layers" in report.entries[-1].why
    with pytest.raises(ValueError, match="none that can be streamed"):
        pyckpt.swap(make_model("OPT"), stream=stream())


# --- classes that no table knows --------------------------------------------------------------------------------------

# What is handed to their layers follows from positions; all but these are streamed from the token ids on.
UNTABLED = [f for f in OTHERS if f not in ("OPT", "Qwen3Next")]
ODD_ENDS = ("NanoChat",)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", a_few(UNTABLED, always=range(0, len(UNTABLED), 2)))
def test_a_class_without_a_table(family):
    if family in ODD_ENDS:
        warnings.filterwarnings("ignore", message=".*the layers are streamed, and not what surrounds them")
    model = make_model(family)
    check(model, [make_batch(kind) for kind in KINDS], stream=stream())
    pyckpt.unswap(model)
    *layers, head = pyckpt.swap(model, stream=stream()).entries
    assert all("; streamed by 7 tokens" in e.why for e in layers)
    assert ("; streamed from the token ids on" in head.why) == (family not in ODD_ENDS)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", ["DeepseekV3", "Exaone4"])
def test_a_class_without_a_table_in_bfloat16_and_in_a_file(family):
    check(make_model(family, torch.bfloat16), [make_batch(kind) for kind in KINDS], stream=stream(11, "file"))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("options", [{"segments": 2}, {"save": "input"}, {"save": "all"}], ids=str)
def test_a_class_without_a_table_gives_the_same_bits_whatever_it_keeps(options):
    model, batch, results = make_model("Glm4", num_hidden_layers=5), make_batch("padded"), []
    for given in ({}, options):
        pyckpt.swap(model, stream=stream(), **given)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    assert_same_bits(*results)


def test_the_peak_of_a_class_without_a_table_does_not_grow_with_the_length():
    # Ids and labels, as above. Each token at every expert: how many meet at one would be chance.
    assert growth_of_the_peak("DeepseekV3", num_experts_per_tok=4, topk_group=2) <= 160 * 8 * 4


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("how", ["autocast", "adapters", "copies", "dropout"])
def test_a_class_without_a_table_as_it_is_used(how):
    options = {"attention_dropout": 0.3} if how == "dropout" else {}
    model, batch = make_model("Glm", **options), make_batch("padded")
    if how == "adapters":
        model = make_adapted(model, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, known(model, batch))
    batch = known(model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain = step(model, batch)
        pyckpt.swap(model, stream=stream())
        if how == "dropout":
            model.eval()
            kept = model.train()(**batch).loss
            torch.manual_seed(3)
            results = [step(model, batch)]
            pyckpt.unswap(model)
            pyckpt.swap(model, tile=10)
            torch.manual_seed(3)
            results.append(step(model, batch))
            assert max(relative_errors(*results).values()) < 1e-5 and kept != results[0]["loss"]
            return
        ours = step(model, batch)
        if how == "copies":
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert_same_bits(step(twin, batch), ours)
    assert_step_as_good(ours, plain, truth, torch.bfloat16 if how == "autocast" else torch.float32)


@pytest.mark.usefixtures("cut")
def test_estimates_of_a_class_without_a_table():
    model, opened, store = make_model("Glm"), [], pyckpt.store.FileStore()
    store.check = lambda plan: opened.append(plan.store_bytes)
    pyckpt.swap(model, stream=(kept := stream(16, store)))
    found, ids = kept.estimate(model, 64), torch.randint(1, VOCAB, (1, 64))
    model(input_ids=ids, labels=ids).loss.backward()
    assert opened == [found.store_bytes]


ENDS = {
    "a scaled embedding": (lambda self, x: x * self.embed_scale, None),
    "dropped embeddings": (lambda self, x: torch.nn.functional.dropout(x, 0.2, self.training), None),
    "normed embeddings": (lambda self, x: self.norm(x), None),
    "a scaled output": (None, lambda self, y: y * 1.01),
    "a norm of its own": (None, lambda self, y: y + 0.05 * y.square()),
}


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ENDS)
def test_ends_are_those_that_a_call_shows(what, dtype):
    model, batch, (before, after) = make_model("Glm", dtype), make_batch("padded"), ENDS[what]

    class Odd(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **given):
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
                inputs_embeds = before(self, inputs_embeds) if before else inputs_embeds
            given |= {"attention_mask": attention_mask, "position_ids": position_ids}
            made = super().forward(inputs_embeds=inputs_embeds, **given)
            made.last_hidden_state = after(self, made.last_hidden_state) if after else made.last_hidden_state
            return made

    model.model.__class__ = Odd
    model.model.embed_scale = 3.0
    found = pyckpt.swap(model, stream=stream()).entries[-1].why
    assert ("; streamed from the token ids on" in found) == (what == "a scaled embedding")
    pyckpt.unswap(model)
    if what == "a scaled embedding":
        check(model, [batch], stream=stream())


@pytest.mark.usefixtures("cut")
def test_a_layer_of_other_widths_is_not_streamed():
    """The store of a run has keys and values of one width."""
    model, batch = make_model("Glm", num_hidden_layers=3), make_batch("plain")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    model.model.layers[1] = type(model.model.layers[1])(config, 1)
    with pytest.warns(UserWarning, match="some of its layers are not streamed"):
        check(model, [batch], stream=stream())
    pyckpt.unswap(model)
    layers = pyckpt.swap(model, stream=stream()).entries[:-1]
    assert ["; streamed" in e.why for e in layers] == [True, False, True]


class Shifting(torch.nn.Module):
    """A rotary embedding that counts from the first token of what it is given."""

    def __init__(self, own: torch.nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.own(x, position_ids - position_ids[:, :1])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("why", ["dynamic", "shifting", "between"])
def test_what_does_not_follow_from_positions_is_not_streamed(why):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    model = make_model("Glm", num_hidden_layers=2, **({"rope_parameters": rope} if why == "dynamic" else {}))
    if why == "shifting":
        model.model.rotary_emb = Shifting(model.model.rotary_emb)
    elif why == "between":
        # Something is done to hidden states on their way from one layer to the next.
        class Between(type(model.model)):  # type: ignore[misc]
            def forward(self, **given: Any) -> Any:
                handles = [layer.register_forward_pre_hook(self.add, with_kwargs=True) for layer in self.layers]
                try:
                    return super().forward(**given)
                finally:
                    [handle.remove() for handle in handles]

            @staticmethod
            def add(module: Any, args: Any, kwargs: Any) -> Any:
                return (args[0] + 1.0, *args[1:]), kwargs

        model.model.__class__ = Between
    report = pyckpt.swap(model, segments=2)
    assert all(e.why.endswith("; not in segments") for e in report.entries[:-1])
    pyckpt.unswap(model)
    with pytest.raises(ValueError, match="none that can be streamed"):
        pyckpt.swap(model, stream=stream())


@pytest.mark.slow
def test_compiled():
    """A streamed run is not compiled; what is around it may be."""
    model, batch = make_model("Llama"), make_batch("plain")
    pyckpt.swap(model, stream=stream())
    want = step(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Dynamo")  # of what of it cannot be captured
        loss = torch.compile(model, backend="aot_eager")(**batch).loss
    loss.backward()
    assert torch.equal(loss, want["loss"])
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, want[name])


def test_bad_input():
    model = make_model("Llama")
    with pytest.raises(TypeError, match=r"stream must be a pyckpt\.Stream, got str"):
        pyckpt.swap(model, stream="host")
    encoder = torch.nn.TransformerEncoderLayer(16, 2, 24)
    with pytest.raises(ValueError, match=r"stream= takes decoder layers .* none that can be streamed"):
        pyckpt.swap(encoder, stream=stream())
    assert "forward" not in encoder.__dict__
    pyckpt.swap(model, stream=stream())
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 9), VOCAB), labels=torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"label {VOCAB} is out of range"):
        model(input_ids=torch.ones(1, 9, dtype=torch.int64), labels=torch.full((1, 9), VOCAB))
