"""Swapped models of which something is changed afterwards, or that are asked for more than their logits."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import GPT2_SIZES, VOCAB, make_batch, make_model, step
from torch import Tensor
from torch.nn import functional as F

import pyckpt
from pyckpt import measure

transformers = pytest.importorskip("transformers")
sdpa = F.scaled_dot_product_attention

# Each with dropout where its class has any.
CHANGED = {
    "Llama": {"attention_dropout": 0.3},
    "GPT2": {"resid_pdrop": 0.3, "attn_pdrop": 0.2},
    "GPTNeoX": {"hidden_dropout": 0.3, "attention_dropout": 0.0},
    "Phi3": {"resid_pdrop": 0.3},
    "Starcoder2": {"residual_dropout": 0.3},
    "GptOss": {"attention_dropout": 0.3},
    "Olmo3": {"attention_dropout": 0.3},
    "Phi": {"resid_pdrop": 0.3},
    "SeedOss": {"residual_dropout": 0.3, "attention_dropout": 0.1},
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


class Renamed(torch.nn.Linear):
    """A linear layer by another name, as a method of adapters may put one in."""


def change_its_eps(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def put_another_class_in(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.__class__ = Renamed


@pytest.mark.parametrize("change", [change_its_eps, put_another_class_in], ids=lambda change: change.__name__)
@pytest.mark.parametrize("how", ["resident", "segments", "stream"])
def test_layers_that_have_changed_run_again_as_a_whole(change, how):
    model, batch = make_model("Llama"), make_batch("plain")
    options: dict[str, Any] = {"segments": {"segments": "sqrt"}, "stream": {"stream": pyckpt.Stream(7)}}.get(how, {})
    swapped = copy.deepcopy(model)
    pyckpt.swap(swapped, loss=False, **options)
    for m in (model, swapped):
        change(m)
    with measure.memory() as stored:
        truth = step(model, batch)
    with measure.memory() as kept, pytest.warns(UserWarning, match="each layer again as a whole in the backward"):
        assert_same_bits(step(swapped, batch), truth)
    assert kept.saved_bytes < stored.saved_bytes / 2


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


# --- attention by other functions, or of other keys ---------------------------------------------------------


def sharper(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
    """An attention function of one's own, in transformers' registry."""
    o = sdpa(q, k, v, is_causal=True, scale=3 * scaling, enable_gqa=True)
    return o.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["Llama", "Glm"])
def test_an_attention_function_of_ones_own_runs(family, monkeypatch, no_fallback):
    """Nobody knows what it computes: the report says so, and layers run again as a whole."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sharper", sharper)
    model, batch = make_model(family), make_batch("plain")
    model.config._attn_implementation = "sharper"
    plain = step(copy.deepcopy(model), batch)
    entry = pyckpt.swap(model, loss=False).entries[0]
    assert entry.path == "checkpointed" and "'sharper' is of test_swap_changes" in entry.why
    assert_same_bits(step(model, batch), plain)


def name_another(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config._attn_implementation = "sharper"


def put_another(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of transformers' own, as DeepSpeed's Ulysses does."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sharper)


def mask_otherwise(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def put_below(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of PyTorch's, as `context_parallel` does."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **options: sdpa(*a, **options) / 2)


def rotate_otherwise(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the modelling file, and wrapped as decorators do it."""
    file = sys.modules[type(model).__module__]
    own = file.apply_rotary_pos_emb

    @functools.wraps(own)
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        return own(q, k, sin, cos, *rest, **options)

    monkeypatch.setattr(file, "apply_rotary_pos_emb", rotated)


def mask_a_prefix(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the modelling file: the first five tokens see each other (a prefix language model)."""
    file = sys.modules[type(model).__module__]
    name = "create_causal_mask" if model.config.model_type != "mistral" else "create_sliding_window_causal_mask"
    monkeypatch.setattr(file, name, prefixed)


def prefixed(inputs_embeds: Tensor, **_: Any) -> Tensor:
    batch, seq = inputs_embeds.shape[:2]
    seen = torch.ones(seq, seq, dtype=torch.bool).tril()
    seen[:5, :5] = True
    return seen.expand(batch, 1, seq, seq)


@pytest.mark.parametrize("change", [rotate_otherwise, mask_a_prefix], ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", ["Mistral", "Glm"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_functions_of_the_modelling_file(when, family, change, monkeypatch, request):
    """What a block would leave out without a word: as if there were no swap."""
    if family == "Glm":
        request.getfixturevalue("cut")
    model, batch = make_model(family, attn_implementation="sdpa"), make_batch("plain")
    plain = copy.deepcopy(model)
    if when == "before":
        change(plain, monkeypatch)
    pyckpt.swap(model, loss=False)
    if when == "after":
        change(plain, monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="pyckpt.swap")
        got = step(model, batch)
    truth = step(plain, batch)
    warned = [str(w.message) for w in caught if "pyckpt.swap" in str(w.message)]
    # A layer that no table knows calls what is in its file; the model's masks are another matter.
    blocks = when == "after" and (family == "Mistral" or change is mask_a_prefix)
    assert all("it was when swapped" in w and "again as a whole" in w for w in warned) and len(warned) == blocks
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-4, atol=1e-6)


def narrow_the_window(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.sliding_window = 3


def stretch_positions(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 4


def turn_twice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.rotary_emb.register_forward_hook(lambda module, args, made: tuple(2 * t for t in made))


def turn_otherwise(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = model.model.rotary_emb
    own = type(rotary).forward
    rotary.forward = lambda x, position_ids: own(rotary, x, 2 * position_ids)


def add_a_bias(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(48))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (turn_twice, "its rotary embedding has forward hooks"),
        (turn_otherwise, "its rotary embedding has a forward in the place"),
        (add_a_bias, r"mlp\.down_proj now has a bias"),
        (name_another, "'sharper' is of test_swap_changes"),
        (put_another, "'sdpa' is of test_swap_changes"),
        (mask_otherwise, "are made by test_swap_changes"),
        (put_below, "is not PyTorch's own"),
        (narrow_the_window, r"config.sliding_window is now 3, not the 7"),
        (stretch_positions, "RoPE's frequencies are not those"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_attention_that_is_another_one_since(change, said, monkeypatch):
    """As if there were no swap, and layers keep their inputs alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sharper", sharper)
    model, batch = make_model("Mistral"), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    for m in (plain, model):
        change(m, monkeypatch)
    with pytest.warns(UserWarning, match=f"{said}.*again as a whole in the backward"):
        found = step(model, batch)
    assert_same_bits(found, step(plain, batch))


@pytest.mark.parametrize("change", [turn_twice, turn_otherwise], ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", ["Llama", "Glm"])
def test_a_rotary_embedding_of_ones_own_is_called(family, change, monkeypatch, no_fallback):
    """A block has its frequencies alone: such layers are cut at their attention, and handed what it gives."""
    model, batch = make_model(family), make_batch("plain")
    change(model, monkeypatch)
    truth = step(model, batch)
    assert pyckpt.swap(model).entries[0].path == "generic"
    found = step(model, batch)
    for name, t in truth.items():
        torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-5)


def test_frequencies_that_were_rounded_to_another_dtype_are_the_same(no_fallback):
    model, batch = make_model("Gemma3"), make_batch("plain")
    pyckpt.swap(model)
    step(model.bfloat16(), batch)


# --- classes whose forwards are replaced, as tools do that bring kernels of their own ------------------------


@pytest.mark.parametrize("name", ["LlamaMLP", "LlamaDecoderLayer", "LlamaModel", "LlamaForCausalLM"])
def test_a_class_with_another_forward_since(name, monkeypatch):
    from transformers.models.llama import modeling_llama

    model, batch = make_model("Llama"), make_batch("plain") | {"use_cache": False}
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=name == "LlamaForCausalLM")
    kind = getattr(modeling_llama, name)
    before = kind.forward

    def other(self: Any, *args: Any, **given: Any) -> Any:
        made = before(self, *args, **given)
        if isinstance(made, Tensor):
            return 2 * made
        which = "loss" if "loss" in made else "last_hidden_state"
        made[which] = 2 * made[which]
        return made

    monkeypatch.setattr(kind, "forward", other)
    with pytest.warns(UserWarning, match=f"the forward of {name} is not the one that its class was made with"):
        found = step(model, batch)
    for n, t in step(plain, batch).items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-6)


def test_an_encoder_layers_linear_with_another_forward_since(monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True).train()
    plain, x = copy.deepcopy(layer), torch.randn(2, 5, 16)
    pyckpt.swap(layer)
    before = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: 2 * before(self, x))
    with pytest.warns(UserWarning, match="the forward of"):
        assert torch.equal(layer(x), plain(x))


# --- which layers run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["segments", "stream"])
def test_one_layer_in_several_places(how):
    """A run of layers would have it once."""
    model, batch = make_model("Llama"), make_batch("plain") | {"use_cache": False}
    model.model.layers[1] = model.model.layers[0]
    plain = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"model\.layers has one layer in several places"):
        pyckpt.swap(model, **{how: 2 if how == "segments" else pyckpt.Stream(7)})
    pyckpt.swap(model)
    found = step(model, batch)
    for n, t in step(plain, batch).items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["segments", "stream"])
def test_fewer_layers_by_the_config(how):
    """transformers' models call as many as that says."""
    model, batch = make_model("Llama"), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, **{how: 2 if how == "segments" else pyckpt.Stream(7)})
    for m in (plain, model):
        m.config.num_hidden_layers = 1
    with pytest.warns(UserWarning, match=r"config\.num_hidden_layers is not the number of its layers"):
        found = step(model, batch)
    assert not any("layers.1." in n and t.any() for n, t in found.items())
    for n, t in step(plain, batch).items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-6)


# --- dropout by the modes of single modules ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["GPT2", "GPTNeoX", "Phi3"])
def test_dropout_modules_in_eval_mode_drop_nothing(family, no_fallback):
    model, batch = make_model(family, **CHANGED[family] | {"attn_pdrop": 0.0}), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, tile=10)
    for m in (plain, model):
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    found = step(model, batch)
    for n, t in step(plain, batch).items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5)


def test_attention_in_eval_mode_drops_nothing(no_fallback):
    model, batch = make_model("Llama", attention_dropout=0.3), make_batch("plain")
    pyckpt.swap(model)
    for layer in model.model.layers:
        layer.self_attn.eval()
    found = step(model, batch)
    set_rates(model, 0.0)
    assert_same_bits(found, step(model, batch))


def test_dropout_in_training_mode_drops_in_a_layer_in_eval_mode():
    """As in estimates of uncertainty by dropout."""
    model, batch = make_model("GPT2", resid_pdrop=0.3).eval(), make_batch("plain") | {"use_cache": False}
    pyckpt.swap(model, loss=False)
    for module in model.modules():
        module.training = isinstance(module, torch.nn.Dropout)
    with pytest.warns(UserWarning, match=r"attn\.resid_dropout is in training mode"):
        first = model(**batch).loss
    assert not torch.equal(first, model(**batch).loss)


@pytest.mark.parametrize("family", ["Gemma", "Mixtral", "DeepseekV3", "Falcon"])
def test_hooks_that_are_put_inside_between_forward_and_backward_change_nothing(family):
    model, batch = make_model(family), make_batch("plain")
    pyckpt.swap(model, tile=10)
    before = step(model, batch)
    loss = model(**batch).loss
    inside = [m for name, m in model.named_modules() if "layers." in name or ".h." in name]
    handles = [m.register_forward_hook(lambda module, args, made: None if made is None else 1 / 0) for m in inside]
    loss.backward()
    for handle in handles:
        handle.remove()
    assert_same_bits({n: p.grad for n, p in model.named_parameters()}, {n: t for n, t in before.items() if n != "loss"})
