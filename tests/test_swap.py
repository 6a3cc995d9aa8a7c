"""`pyckpt.swap`: the losses and gradients of the model as it was, for every family, mask and tool."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import assert_as_good, assert_same_bits
from helpers import a_few
from swap_models import (
    FAMILIES,
    KINDS,
    MIXTURES,
    VOCAB,
    InFloat64,
    State,
    assert_copies_are_swapped_on_their_own,
    assert_generates_the_same,
    assert_same_with_every_save_set,
    assert_step_as_good,
    check,
    check_under_autocast,
    make_batch,
    make_model,
    step,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyckpt
from pyckpt.swap import families
from pyckpt.swap.shadow import argument_names

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "docs"))
import swap_table

transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("no_fallback")


@pytest.mark.parametrize("implementation", a_few([None, "eager"], always=(0,)))
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, implementation):
    """By the attention function that the family takes by itself, and by the eager one, which all have."""
    options = {"attn_implementation": implementation} if implementation else {}
    check(make_model(family, **options), [make_batch(kind) for kind in KINDS])


@pytest.mark.parametrize("family", ["Gemma3", "GPT2", "Llama"])
def test_loss_and_gradients_in_bfloat16(family):
    check(make_model(family, torch.bfloat16), [make_batch(kind) for kind in KINDS])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_saves_sets_give_the_same_bits(implementation):
    assert_same_with_every_save_set(make_model("Qwen3", attn_implementation=implementation))


@pytest.mark.parametrize("segments", a_few([1, 2, 3, "sqrt", 9], always=(1, 3)))
@pytest.mark.parametrize("family", ["Gemma3", "GPT2", "Qwen3Moe"])
def test_segments_give_the_same_bits(family, segments):
    """Of five layers, with both paths in one segment for the mixture of experts."""
    layers = {
        "Gemma3": {"num_hidden_layers": 5, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2},
        "GPT2": {"num_hidden_layers": 5},
        "Qwen3Moe": {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]},
    }
    model, batch = make_model(family, **layers[family]), make_batch("padded")

    def assert_same_step() -> None:
        results = []
        for option in (None, segments):
            pyckpt.swap(model, tile=10, segments=option)
            results.append(step(model, batch))
            pyckpt.unswap(model)
        assert_same_bits(*results)

    assert_same_step()
    if family != "GPT2":
        model.model.layers[1].self_attn.is_causal = False  # so that it is left as it was, between two segments
        assert_same_step()


def test_a_segment_keeps_its_input_alone():
    model, ids = make_model("Llama", num_hidden_layers=6), torch.randint(1, VOCAB, (1, 64))
    kept = {}
    for segments in (None, 2, 3, 6):
        pyckpt.swap(model, segments=segments, loss=False)
        with pyckpt.measure.memory(model) as m:
            hidden = model.model(ids, use_cache=False).last_hidden_state
        kept[segments] = m.saved_bytes
        pyckpt.unswap(model)
        del hidden
    inputs = 64 * 48 * 4
    assert kept[2] - kept[3] == inputs
    assert kept[3] - kept[6] == inputs
    assert kept[None] - kept[2] == 3 * inputs + 6 * (inputs + 64 * 4 * 4)  # three inputs more, and o and lse of six


def test_segments_are_not_used_where_somebody_looks_at_each_layer():
    model, batch = make_model("Llama", num_hidden_layers=4), make_batch("plain")
    pyckpt.swap(model, tile=10)
    truth, states = step(model, batch), model(**batch, output_hidden_states=True).hidden_states
    pyckpt.unswap(model)
    pyckpt.swap(model, tile=10, segments=2)
    with pytest.warns(UserWarning, match="every layer's: segments are not used"):
        found = model(**batch, output_hidden_states=True).hidden_states
    for a, b in zip(found, states, strict=True):
        assert torch.equal(a, b)
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    with pytest.warns(UserWarning, match="LlamaDecoderLayer has forward hooks: segments are not used"):
        assert_same_bits(truth, step(model, batch))
    assert torch.equal(seen[0], states[2])
    handle.remove()


def test_what_is_kept_may_wait_in_a_file():
    model, batch = make_model("Llama", num_hidden_layers=4), make_batch("padded")
    pyckpt.swap(model, tile=10)
    truth = step(model, batch)
    pyckpt.unswap(model)
    pyckpt.swap(model, pyckpt.Save("attention", {"x": "file", "o": "file"}), tile=10)
    assert_same_bits(truth, step(model, batch))


def check_generic_save_sets(model: Any, why: str) -> None:
    """A swapped model's layers are generic, for this reason, and the same bits with every save set."""
    batch, results = make_batch("padded"), []
    for save in pyckpt.SAVE_SETS:
        pyckpt.unswap(model)
        report = pyckpt.swap(model, save=save, tile=10)
        assert [e.path for e in report.entries] == ["generic", "generic", "standard"]
        assert why in report.entries[0].why
        results.append(step(model, batch))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize(
    "family", a_few(["Cohere", "Gemma3", "Granite", "Llama", "Olmo2", "Qwen3", "SmolLM3"], always=(0, 1, 4))
)
def test_the_generic_path(family):
    """For an activation that no standard block has; with every save set, whose gradients are the same bits."""
    model = make_model(family)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Mish()
    check(model, [make_batch(kind) for kind in KINDS])
    check_generic_save_sets(model, "the activation Mish is not one of a block's")


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(family):
    model = make_model(family)
    check(model, [make_batch(kind) for kind in KINDS])
    pyckpt.unswap(model)
    assert [e.path for e in pyckpt.swap(model).entries] == ["generic", "generic", "standard"]
    assert type(model(**make_batch("plain"))).__name__ == "MoeCausalLMOutputWithPast"


@pytest.mark.parametrize("of_config", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_the_loss_with_a_share_of_the_routers_is_the_models_own(family, of_config):
    model = make_model(family, output_router_logits=of_config, router_aux_loss_coef=0.7)
    batch = make_batch("padded") | ({} if of_config else {"output_router_logits": True})
    before, state = model(**batch), step(model, batch)
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match=r"output_router_logits=True .* original forward"):
        after = model(**batch)
    assert torch.equal(after.loss, before.loss) and torch.equal(after.aux_loss, before.aux_loss)
    assert after.logits is not None and len(after.router_logits) == len(before.router_logits)
    assert_same_bits(step(model, batch), state)
    without = model(**batch | {"output_router_logits": False})
    assert without.logits is None and without.loss < before.loss


@pytest.mark.parametrize("family", ["GraniteMoe", "Jamba", "Qwen3Moe"])
def test_what_the_routers_made_is_recorded_once(family):
    """By hooks that transformers sets at the first call: of a model swapped before it, or of one of its twins."""
    model = make_model(family, output_router_logits=True)
    other, batch = copy.deepcopy(model), make_batch("plain")
    pyckpt.swap(model)
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not hooks
    with pytest.warns(UserWarning, match=r"output_router_logits=True .* original forward"):
        after = model(**batch)
    assert_same_bits(dict(enumerate(after.router_logits)), dict(enumerate(other(**batch).router_logits)))


def test_what_is_dropped_on_the_generic_path_is_dropped_again():
    """As LoRA drops the input of a projection: the gradient is that of the loss with the same values dropped."""
    model = make_model("Llama", torch.float64, attention_dropout=0.2)
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Sequential(nn.Dropout(0.3), layer.self_attn.q_proj)
        layer.mlp.up_proj = nn.Sequential(nn.Dropout(0.3), layer.mlp.up_proj)
    assert_same_with_every_save_set(model, seed=3)
    batch = make_batch("padded")
    pyckpt.swap(model, tile=10)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad(), InFloat64():
            return model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0].square().sum()

    weight = model.model.layers[0].self_attn.q_proj[1].weight
    direction, eps = torch.randn_like(weight), 1e-6
    torch.manual_seed(3)
    with InFloat64():
        value = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0].square().sum()
    (grad,) = torch.autograd.grad(value, weight)
    with torch.no_grad():
        weight += eps * direction
        up = loss()
        weight -= 2 * eps * direction
        slope = (up - loss()) / (2 * eps)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["Gemma3", "Llama"])
def test_the_generic_path_under_autocast(family):
    model = make_model(family)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Mish()
    check_under_autocast(model, make_batch("padded"))


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 2.5}, {"rope_type": "yarn", "factor": 4.0}])
def test_other_types_of_rope(rope):
    rope = {"rope_theta": 1e4, "original_max_position_embeddings": 16, **rope}
    check(make_model("Llama", rope_parameters=rope), [make_batch("plain")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cohere_with_a_norm_for_each_head(dtype):
    """Its layers are generic; the gradients are the same bits with every save set."""
    model = make_model("Cohere", dtype, use_qk_norm=True)
    check(model, [make_batch(kind) for kind in KINDS])
    check_generic_save_sets(model, "QK-norm is a LayerNorm with a weight for each head")


def test_neox_in_sequence_and_without_biases():
    check(make_model("GPTNeoX", use_parallel_residual=False, attention_bias=False), [make_batch("plain")])


@pytest.mark.parametrize("family", ["GPT2", "Gemma3", "Llama", "Phi3"])
def test_generates_the_same_tokens(family):
    assert_generates_the_same(make_model(family))


def test_unswap_leaves_everything_as_it_was():
    model = make_model("Phi3")
    batch = make_batch("padded")
    before, names, parameters = step(model, batch), list(model.state_dict()), dict(model.named_parameters())
    logits = model(batch["input_ids"]).logits
    modules = dict(model.named_modules())
    pyckpt.swap(model)
    assert list(model.state_dict()) == names
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[n] for n, p in model.named_parameters())
    pyckpt.unswap(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert_same_bits(step(model, batch), before)
    assert torch.equal(model(batch["input_ids"]).logits, logits)
    with pytest.raises(ValueError, match="the model is not swapped"):
        pyckpt.unswap(model)


@pytest.mark.parametrize("told", [True, False], ids=["wraps", "a plain function"])
def test_unswap_of_a_forward_that_was_wrapped_since(told):
    model = make_model("Llama")
    pyckpt.swap(model)
    ours = model.forward

    def wrapped(*args, **kwargs):
        return ours(*args, **kwargs)

    wrapped = functools.wraps(ours)(wrapped) if told else wrapped

    model.forward = wrapped
    with pytest.raises(RuntimeError, match="the forward of the model was replaced after the swap"):
        pyckpt.unswap(model)
    assert model(**make_batch("plain")).logits is None
    model.forward = ours
    pyckpt.unswap(model)


def test_a_forward_that_was_there_before_is_kept():
    """Of a layer or of the whole model it may do more than is known. Of the model around the layers it is called."""
    model = make_model("Llama")
    calls: list[str] = []

    def count(module: nn.Module, name: str) -> Any:
        own = module.forward

        def counted(*args, **kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        module.forward = counted
        return counted

    counted = [count(m, n) for m, n in ((model, "head"), (model.model, "model"), (model.model.layers[0], "layer"))]
    batch = make_batch("padded")
    before = step(model, batch)
    calls.clear()
    assert [e.path for e in pyckpt.swap(model).entries] == ["original", "standard", "original"]
    for name, value in step(model, batch).items():
        torch.testing.assert_close(value, before[name])
    assert calls == ["head", "model", "layer"]
    pyckpt.unswap(model)
    assert [model.forward, model.model.forward, model.model.layers[0].forward] == counted


def test_needs_transformers_for_its_own_models_alone():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, pyckpt\n"
        "layer = torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, activation='gelu')\n"
        "print(len(pyckpt.swap(layer).swapped))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("family", ["Gemma2", "VaultGemma"])
def test_a_softcap_that_sdpa_leaves_out(family):
    """transformers before 5.21 takes sdpa for Gemma 2 by itself, without its softcap."""
    model, batch = make_model(family), make_batch("plain")
    assert model.config._attn_implementation == "eager"
    before = step(model, batch)
    pyckpt.swap(model)
    model.config._attn_implementation = "sdpa"
    with pytest.warns(UserWarning, match="caps its attention's scores, which transformers' sdpa leaves out"):
        after = step(model, batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)


def test_logits_are_there_for_those_who_ask():
    model = make_model("Gemma2")
    batch = make_batch("plain")
    before = model(**batch)
    pyckpt.swap(model)
    torch.testing.assert_close(model(batch["input_ids"]).logits, before.logits)
    both = model(**batch, output_logits=True)
    torch.testing.assert_close(both.logits, before.logits)
    torch.testing.assert_close(both.loss, before.loss)
    with torch.no_grad():
        assert model(**batch).logits is not None
    loss, *rest = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, before.loss)
    assert not rest
    pyckpt.unswap(model)
    pyckpt.swap(model, loss="always")
    with torch.no_grad():
        assert model(**batch).logits is None
    pyckpt.unswap(model)
    pyckpt.swap(model, loss=False)
    assert model(**batch).logits is not None


@pytest.mark.parametrize("family", ["Bloom", "Falcon", "Mamba"])
def test_a_config_that_asks_for_tuples(family):
    """Most of transformers' models fail with one; the losses of these are ours all the same."""
    model, batch = make_model(family, return_dict=False), make_batch("plain")
    expected = model(**batch)[0]
    report = pyckpt.swap(model)
    assert report.entries[-1].path == "standard"
    made = model(**batch)
    assert isinstance(made, tuple)
    torch.testing.assert_close(made[0], expected)


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_a_loss_that_makes_its_logits_again(family):
    """The same loss and gradients, and neither gradient of the head's product waits for the backward."""
    model = make_model(family)
    batch = make_batch("plain")
    found = {}
    for kind in (True, "recompute"):
        report = pyckpt.swap(model, loss=kind)
        assert ("again" in str(report)) == (kind == "recompute")
        model.zero_grad()
        with pyckpt.measure.memory(model) as m:
            loss = model(**batch).loss
            kept = m.live_bytes
            loss.backward()
        found[kind] = loss.detach(), kept, {n: p.grad for n, p in model.named_parameters()}
        pyckpt.unswap(model)
    (loss, kept, grads), (again, kept_again, grads_again) = found.values()
    assert torch.equal(loss, again)
    for name, g in grads.items():
        torch.testing.assert_close(grads_again[name], g, msg=lambda m, name=name: f"{name}: {m}")
    head = model.get_output_embeddings().weight
    assert kept_again <= kept - head.numel() * 4 + batch["labels"].numel() * 4  # but each token's logsumexp does


@pytest.mark.parametrize("use_cache", [None, False, True])
def test_positions_cut_the_batch_where_they_do_in_transformers(use_cache):
    """It looks at them where it makes no cache; by default it makes one."""
    model = make_model("Llama")
    batch = make_batch("packed") | {"use_cache": use_cache}
    before = model(**batch).loss
    pyckpt.swap(model, loss="always")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pyckpt.swap: use_cache=True")
        torch.testing.assert_close(model(**batch).loss, before)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**batch).loss, before)


def test_the_losss_options():
    model = make_model("Llama")
    batch = make_batch("plain")
    shifted = batch["labels"].roll(-2, 1)
    cases = [
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor(50)},
        {"shift_labels": shifted},
        {"ignore_index": 7, "num_items_in_batch": 11},
    ]
    before = [model(**batch, **options).loss for options in cases]
    pyckpt.swap(model)
    for loss, options in zip(before, cases, strict=True):
        torch.testing.assert_close(model(**batch, **options).loss, loss)


@pytest.mark.parametrize("family", ["Granite", "Cohere2"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_heads_bias_is_scaled_with_its_logits(family, streamed):
    """And Cohere's logits by the model's own number. Such a head is not streamed; its layers are."""
    model = make_model(family)
    model.lm_head = nn.Linear(48, VOCAB)
    if family == "Cohere2":
        model.logit_scale = 0.7
    if not streamed:
        check(model, [make_batch("plain")])
        return
    with pytest.warns(UserWarning, match="bias, which is scaled with the logits: the layers are streamed"):
        check(model, [make_batch("plain")], stream=pyckpt.Stream(7))


def test_hidden_states_are_those_of_the_original():
    model = make_model("Llama")
    batch = make_batch("plain")
    before = model(**batch, output_hidden_states=True).hidden_states
    pyckpt.swap(model)
    after = model(**batch, output_hidden_states=True).hidden_states
    assert len(after) == len(before) == 3
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b)


def test_no_mask_of_the_sequence_squared_is_made(monkeypatch):
    """Not for padding or packing either, by any op of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Shapes(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    self.seen.add(tuple(t.shape))
            return out

    model = make_model("Llama", attn_implementation="sdpa")
    pyckpt.swap(model)
    for kind in KINDS:
        batch = make_batch(kind)
        seq = batch["input_ids"].shape[1]
        with Shapes() as shapes:
            model(**batch)
        assert not [s for s in shapes.seen if s[-2:] == (seq, seq)]


FALLBACKS = {
    "output_attentions": {"output_attentions": True},
    "mask with holes": {"attention_mask": torch.tensor([[1, 0, 1] * 6 + [1]] * 2)},
    "mask of four dims": {"attention_mask": torch.zeros(2, 1, 19, 19)},
    "unknown argument": {"is_causal": True},
    "use_cache": {"use_cache": True},
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_known_runs_the_original_and_warns_once(name):
    model = make_model("Llama")
    batch = make_batch("plain") | FALLBACKS[name]
    before = model(**batch)
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match=r"pyckpt\.swap: .*original forward"):
        after = model(**batch)
    torch.testing.assert_close(after.loss, before.loss)
    if before.attentions is not None:
        torch.testing.assert_close(after.attentions, before.attentions)
    model(**batch)  # no second warning, which would be an error here


def test_a_loss_of_ones_own_from_hidden_states():
    model, ids = make_model("Llama", torch.float64), make_batch("plain")["input_ids"]
    options = {"label_smoothing": 0.1, "z_loss": 1e-4}

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        pyckpt.linear_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:], **options).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1)
    (loss + 1e-4 * logits.logsumexp(-1).square().mean()).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    pyckpt.swap(model)
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, expected[name])


def test_a_prefix_runs_the_original_and_warns_in_training():
    model, batch = make_model("Llama"), make_batch("plain")
    name = "cache" if "cache" in argument_names(model) else "past_key_values"  # since transformers 5.24, and before
    with torch.no_grad():
        prefix = model(torch.randint(1, VOCAB, (2, 3)), use_cache=True).past_key_values

    def loss() -> torch.Tensor:
        return model(**batch, **{name: copy.deepcopy(prefix)}).loss

    before = loss()
    pyckpt.swap(model)
    with torch.no_grad():
        loss()
    with pytest.warns(UserWarning, match=r"a cache is given in training .*original forward"):
        torch.testing.assert_close(loss(), before)


def test_a_changed_layer_runs_the_original():
    model = make_model("Llama")
    pyckpt.swap(model)
    seen = []
    projection = model.model.layers[1].mlp.up_proj
    handle = projection.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"mlp\.up_proj has forward hooks"):
        model(**make_batch("plain"))
    assert seen
    handle.remove()
    model.model.layers[1].mlp.up_proj = nn.utils.parametrizations.weight_norm(projection)
    with pytest.warns(UserWarning, match=r"mlp\.up_proj is now a .*ParametrizedLinear"):
        model(**make_batch("plain"))


@pytest.mark.parametrize("path", ["mlp", "self_attn", "mlp.act_fn", "post_attention_layernorm", "self_attn.o_proj"])
def test_hooks_anywhere_in_a_layer_are_seen(path):
    """Before the swap, and after it: each is called once a step, and not by the swap itself."""
    model, batch, calls = make_model("Llama"), make_batch("plain"), []
    module = model.model.layers[0].get_submodule(path)
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    report = pyckpt.swap(model)
    assert f"{path} has forward hooks" in report.left[0].why and not calls
    step(model, batch)
    assert len(calls) == 1
    pyckpt.unswap(model)
    handle.remove()
    assert not pyckpt.swap(model).left
    module.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match=f"{path} has forward hooks.* original forward, which stores everything"):
        step(model, batch)
    assert len(calls) == 2


def test_an_activation_that_is_replaced_after_the_swap_is_used():
    model, batch = make_model("Llama"), make_batch("plain")
    pyckpt.swap(model)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Tanh()
    with pytest.warns(UserWarning, match=r"mlp\.act_fn is now a torch.*Tanh, not the .*SiLU"):
        after = step(model, batch)
    pyckpt.unswap(model)
    before = step(model, batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_a_linear_layer_of_another_make_is_not_taken_for_plain():
    class Linear(nn.Linear):  # as PEFT calls its own
        pass

    model = make_model("Llama")
    model.model.layers[0].self_attn.k_proj = Linear(48, 24)
    first, second, _ = pyckpt.swap(model).entries
    assert (first.path, second.path) == ("generic", "standard")
    assert "self_attn.k_proj is a test_swap." in first.why


def test_layers_that_are_not_known_are_left_and_named():
    model = make_model("Llama")
    layer = model.model.layers[0]
    layer.self_attn.is_causal = False  # which eager attention does not read
    assert pyckpt.swap(model).entries[0].path == "checkpointed"
    pyckpt.unswap(model)
    handle = layer.mlp.register_forward_hook(lambda *_: None)
    batch = make_batch("padded")
    before = step(model, batch)
    report = pyckpt.swap(model)
    (left,) = report.left
    assert left.name == "model.layers.0"
    assert left.why == "its attention is not causal, and mlp has forward hooks, which a swapped layer would not run"
    assert "model.layers.0" in str(report) and "2 swapped, 1 left as they are" in str(report)
    for name, value in step(model, batch).items():
        torch.testing.assert_close(value, before[name])
    handle.remove()


def test_bad_input():
    model = make_model("Llama")
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        pyckpt.swap(3)
    with pytest.raises(ValueError, match="save='none' does not exist"):
        pyckpt.swap(model, save="none")
    with pytest.raises(ValueError, match="tile must be None or a positive int"):
        pyckpt.swap(model, tile=0)
    with pytest.raises(ValueError, match="segments must be None, 'sqrt' or a positive int"):
        pyckpt.swap(model, segments=0)
    with pytest.raises(ValueError, match="loss must be True, False, 'always' or 'recompute', got 'never'"):
        pyckpt.swap(model, loss="never")
    with pytest.raises(ValueError, match=r"nothing to swap in this Linear: no transformer layer was found"):
        pyckpt.swap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"nothing to swap in this CkptCausalLM: its blocks are pyckpt's own"):
        pyckpt.swap(pyckpt.CkptCausalLM(8, 1, 16, 2))
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        layer.mlp.act_fn.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match=r"(?s)layers cannot be swapped.*layers\.1 .*attention is not causal, and .*hooks"
    ):
        pyckpt.swap(model)
    assert all("forward" not in m.__dict__ for m in model.modules())
    model = make_model("Llama")
    pyckpt.swap(model)
    with pytest.raises(ValueError, match="swapped already"):
        pyckpt.swap(model)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("GPT2", {"add_cross_attention": True}, "cross attention"),
        ("Phi3", {"resid_pdrop": 0.1, "attn_implementation": "sdpa"}, None),
        ("Gemma3", {"use_bidirectional_attention": True}, "not causal"),
    ],
)
def test_options_of_configs(family, options, why):
    model = make_model(family, **options)
    entries = pyckpt.swap(model).entries
    assert {e.path for e in entries[:-1]} == {"standard" if why is None else "checkpointed"}
    assert why is None or why in entries[0].why


def test_an_older_transformers_is_refused(monkeypatch):
    model = make_model("Llama")
    monkeypatch.setattr(families, "OLDEST", (99, 0))
    with pytest.raises(ValueError, match=r"transformers is \d.*before 99\.0; install transformers>=99"):
        pyckpt.swap(model)


@pytest.mark.slow
def test_the_page_says_what_a_swap_reports():
    assert swap_table.filled(swap_table.PAGE.read_text()) == swap_table.PAGE.read_text(), (
        "run python docs/swap_table.py"
    )


def test_dropout_is_applied_in_training_alone():
    model = make_model("GPT2", resid_pdrop=0.3, attn_pdrop=0.2)
    batch = make_batch("plain")
    model.eval()
    before = model(**batch, use_cache=False).loss
    pyckpt.swap(model)
    torch.testing.assert_close(model(**batch).loss, before)
    model.train()
    torch.manual_seed(3)
    first = step(model, batch)
    torch.manual_seed(3)
    assert_same_bits(first, step(model, batch))
    assert not torch.equal(first["loss"], step(model, batch)["loss"])


def test_gradient_checkpointing_is_not_doubled():
    model = make_model("Llama")
    batch = make_batch("plain")
    pyckpt.swap(model)
    before = step(model, batch)
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="gradient checkpointing is ignored"):
        first = step(model, batch)
    assert_same_bits(first, before)


def test_autocast_frozen_parameters_and_hooks():
    model = make_model("Llama")
    batch = make_batch("padded")
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name or "norm" in name)
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model, batch)
        pyckpt.swap(model)
        calls: dict[str, int] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
        after = step(model, batch)
    assert_step_as_good(after, before, truth, torch.bfloat16)
    assert set(calls.values()) == {1} and calls.keys() == after.keys() - {"loss"}


def test_copies_are_swapped_on_their_own():
    assert_copies_are_swapped_on_their_own(make_model("Llama"))


@pytest.mark.parametrize("kind", a_few(KINDS, always=(1,)))
def test_compiles_without_a_break(kind):
    """Padding and packing too: another batch, cut into more sequences, takes the same graph."""
    model, graphs = make_model("Llama", attn_implementation="sdpa"), []
    pyckpt.swap(model)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        batch = make_batch(kind)
        if graphs and kind == "padded":
            batch["attention_mask"][1] = 1
        elif graphs and kind == "packed":
            batch["position_ids"] = torch.cat([torch.arange(n) for n in (2, 9, 9, 10)])[None]
        before = step(model, batch)
        assert_same_bits(step(compiled, batch), {f"_orig_mod.{n}" if n != "loss" else n: t for n, t in before.items()})
        graphs.append(backend.frame_count)
    assert graphs == [1, 1]


def test_padding_between_tokens_is_an_error_in_a_graph():
    model, batch = make_model("Llama", attn_implementation="sdpa"), make_batch("padded")
    pyckpt.swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch["attention_mask"][0, 5] = 0
    with pytest.raises(RuntimeError, match=r"padding between tokens came to a compiled model.*pyckpt\.unswap"):
        compiled(**batch)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Olmo", "Falcon"])
def test_layers_that_are_compiled_one_by_one(family):
    """By `Module.compile`, after the swap; of layers that are cut a copy runs, and is not to call what was compiled."""
    model, batch = make_model(family), make_batch("plain")
    before = step(model, batch)
    pyckpt.swap(model, loss=False)
    for layer in model.transformer.h if family == "Falcon" else model.model.layers:
        layer.compile(backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = step(model, batch)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_a_swapped_model_is_exported(strict):
    model = make_model("Llama").eval()
    pyckpt.swap(model)
    given = {"input_ids": make_batch("plain")["input_ids"], "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (), given, strict=strict)
        torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits)


def test_vmap_over_models_is_refused():
    model = make_model("Llama").eval()
    pyckpt.swap(model)
    parameters, buffers = torch.func.stack_module_state([model, model])
    given = {"input_ids": make_batch("plain")["input_ids"], "use_cache": False}
    with pytest.raises(RuntimeError, match=r"a swapped model does not support torch\.func transforms"):
        torch.vmap(lambda p, b: torch.func.functional_call(model, (p, b), kwargs=given).logits)(parameters, buffers)


def test_the_generic_path_is_not_compiled_but_right():
    """It breaks the graph at each layer, and what it drops is dropped again."""
    model = make_encoder(layers=1, batch_first=True)
    pyckpt.swap(model, tile=10)
    x, weight = torch.randn(2, 19, 48), torch.randn(2, 19, 48)
    made = []
    for module in (model, torch.compile(model, backend="aot_eager")):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        params = dict(model.named_parameters())
        grads = torch.autograd.grad((y * weight).sum(), [leaf, *params.values()])
        made.append(dict(zip(["y", "dx", *params], [y.detach(), *grads], strict=True)))
    assert_same_bits(*made)


# --- torch.nn.TransformerEncoderLayer ------------------------------------------------------------------------------


def make_encoder(dtype: torch.dtype = torch.float32, layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    """Layers with every parameter random, in training mode, with PyTorch's defaults where nothing is given."""
    layer = nn.TransformerEncoderLayer(48, 4, 72, **options)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    randomise(model)
    return model.to(dtype)


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)


def check_encoder(model: nn.Module, path: str, batch_first: bool) -> None:
    """Output and gradients without a mask, with padding, and causal, by the 2x rule against the layers themselves.

    Those of padding too, which sees the tokens.
    """
    x, weight = (torch.randn((2, 19, 48) if batch_first else (19, 2, 48)) for _ in range(2))
    padding, after = (torch.zeros(2, 19, dtype=torch.bool) for _ in range(2))
    padding[0, :4] = padding[1, :2] = padding[1, 12:] = after[1, 12:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(19)

    def run(module: nn.Module, dtype: torch.dtype) -> list[State]:
        results = []
        both = {"mask": causal.to(dtype), "src_key_padding_mask": torch.zeros(2, 19, dtype=dtype)}
        both["src_key_padding_mask"][after] = float("-inf")
        for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal.to(dtype)}, both):
            leaf = x.to(dtype).requires_grad_()
            y = module(leaf, **options)
            params = dict(module.named_parameters())
            grads = torch.autograd.grad((y * weight).sum(), [leaf, *params.values()])
            results.append(dict(zip(["y", "dx", *params], [y.detach(), *grads], strict=True)))
        return results

    truth, plain = run(copy.deepcopy(model).double(), torch.float64), run(model, torch.float32)
    assert [e.path for e in pyckpt.swap(model, tile=10).entries] == [path] * 2
    for ours, p, t in zip(run(model, torch.float32), plain, truth, strict=True):
        assert_as_good(ours, p, t, torch.float32)


@pytest.mark.parametrize(("activation", "path"), [("gelu", "standard"), ("relu", "generic")])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers(norm_first, batch_first, activation, path):
    options = {"dropout": 0.0, "activation": activation, "batch_first": batch_first, "norm_first": norm_first}
    model = make_encoder(**options)
    check_encoder(model, path, batch_first)
    x = torch.randn((2, 19, 48) if batch_first else (19, 2, 48))
    with pytest.warns(UserWarning, match="a src_mask that is not the causal one"):
        model(x, mask=torch.zeros(19, 19))


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_of_other_parts(norm_first):
    """An activation with a weight, norms of another kind and of another eps, and no biases."""
    options = {"activation": nn.PReLU(), "batch_first": True, "norm_first": norm_first}
    model = make_encoder(dropout=0.0, bias=False, **options)
    for layer in model.layers:
        layer.norm1, layer.norm2 = nn.RMSNorm(48, eps=0.1), nn.LayerNorm(48, eps=1e-3)
        layer.dropout = nn.Identity()
    randomise(model)
    check_encoder(model, "generic", batch_first=True)


def test_encoder_layers_whose_norms_are_not_layernorms_are_not_taken_for_such():
    model = make_encoder(dropout=0.0, activation="gelu", batch_first=True)
    for layer in model.layers:
        layer.norm1, layer.norm2 = nn.RMSNorm(48, eps=1e-5), nn.RMSNorm(48, eps=1e-5)
    check_encoder(model, "generic", batch_first=True)


def seeded(model: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> State:
    """Output and gradients of a run that draws from seed 3, with padding."""
    torch.manual_seed(3)
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[1, 12:] = True
    x = x.clone().requires_grad_()
    y = model(x, src_key_padding_mask=padding)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad((y * weight).sum(), [x, *params.values()])
    return dict(zip(["y", "x", *params], [y.detach(), *grads], strict=True))


def test_encoder_layers_compile_with_padding():
    model = make_encoder(dropout=0.0, activation="gelu", batch_first=True)
    pyckpt.swap(model, tile=10)
    given = torch.randn(2, 19, 48), torch.randn(2, 19, 48)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_bits(
        seeded(whole, *given), {f"_orig_mod.{n}" if "." in n else n: t for n, t in seeded(model, *given).items()}
    )


@pytest.mark.parametrize(("norm_first", "mode"), [(True, "training"), (False, "training"), (True, "dropout alone")])
def test_what_encoder_layers_drop_is_dropped_again(norm_first, mode):
    """The gradients are the same bits with every save set, and the slope of the seeded loss, in float64."""
    options = {"batch_first": True, "norm_first": norm_first}
    # ReLU, the default, has corners, where there is no slope.
    model = make_encoder(torch.float64, activation=nn.SiLU(), **options)
    if mode == "dropout alone":  # as for sampling from a trained model
        model.eval()
        for layer in model.layers:
            layer.dropout.train()
    x, weight = torch.randn(2, 19, 48, dtype=torch.float64), torch.randn(2, 19, 48, dtype=torch.float64)
    results = []
    for save in ("attention", "input", "attention+qkv", "attention"):
        assert [e.path for e in pyckpt.swap(model, save=save, tile=10).entries] == ["generic", "generic"]
        results.append(seeded(model, x, weight))
        pyckpt.unswap(model)
    for other in results[1:]:
        assert_same_bits(results[0], other)
    pyckpt.swap(model, tile=10)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
    assert_slopes(model, x, weight, results[0])


def assert_slopes(model: nn.Module, x: torch.Tensor, weight: torch.Tensor, made: State, eps: float = 1e-6) -> None:
    """The gradients `made` of `seeded`, against the slope along one random direction of all that they are of."""
    leaves = [x, *model.parameters()]
    directions = [torch.randn_like(t) for t in leaves]
    ends = []
    for scale in (eps, -2 * eps):
        with torch.no_grad():
            for t, d in zip(leaves, directions, strict=True):
                t += scale * d
        ends.append((seeded(model, x, weight)["y"] * weight).sum())
    names = ("x", *(n for n, _ in model.named_parameters()))
    found = torch.stack([(made[n] * d).sum() for n, d in zip(names, directions, strict=True)])
    slope = (ends[0] - ends[1]) / (2 * eps)
    torch.testing.assert_close(found.sum(), slope, rtol=0.0, atol=1e-6 * found.abs().max().item() + 1e-6)


def test_encoder_layers_by_default_repeat_with_the_seed():
    model = make_encoder(batch_first=True)
    x, weight, results = torch.randn(2, 19, 48), torch.randn(2, 19, 48), []
    for save in ("attention", "attention", "input"):
        pyckpt.swap(model, save=save, tile=10)
        results.append(seeded(model, x, weight))
        pyckpt.unswap(model)
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("site", ["self_attn", "dropout", "dropout1", "dropout2"])
def test_every_dropout_of_an_encoder_layer_drops(site):
    """Each alone, and in training alone. Of the last one it is seen what is zero, and how the rest is scaled."""
    # In float64: what the last one drops is seen by a division, whose divisors come near zero.
    model = make_encoder(torch.float64, layers=1, batch_first=True, norm_first=True)
    layer = model.layers[0]
    for name in {"dropout", "dropout1", "dropout2"} - {site}:
        getattr(layer, name).p = 0.0
    layer.self_attn.dropout = 0.3 if site == "self_attn" else 0.0
    x = torch.randn(2, 19, 48, dtype=torch.float64)
    before = model.eval()(x)
    pyckpt.swap(model, tile=10)
    torch.testing.assert_close(model(x), before)
    made = model.train()(x)
    assert not torch.allclose(made, before)
    if site == "dropout2":
        pyckpt.unswap(model)
        layer.dropout2.p = 0.0
        added = before - x - layer._sa_block(layer.norm1(x), None, None)
        kept = (made - before + added) / added
        assert torch.allclose(kept * 0.9, (kept > 0.5).double(), atol=1e-6)
        assert 0.05 < (kept < 0.5).double().mean() < 0.15


def test_an_activation_that_draws_at_random_draws_the_same_again():
    model = make_encoder(torch.float64, activation=nn.RReLU(0.1, 0.9), dropout=0.0, batch_first=True)
    x, weight = torch.randn(2, 19, 48, dtype=torch.float64), torch.randn(2, 19, 48, dtype=torch.float64)
    assert [e.path for e in pyckpt.swap(model, tile=10).entries] == ["generic", "generic"]
    # Smaller steps, which meet few corners.
    assert_slopes(model, x, weight, seeded(model, x, weight), eps=1e-8)


def test_encoder_layers_by_default_without_dropout_in_eval_mode():
    model = make_encoder(batch_first=True).eval()
    x = torch.randn(2, 19, 48)
    before = model(x)
    with torch.no_grad():
        fast = model(x)
    pyckpt.swap(model)
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        torch.testing.assert_close(model(x), fast)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layers_under_autocast_and_partly_frozen(norm_first):
    # Smooth: at ReLU's corner bfloat16 decides by chance which unit has a slope, in either implementation.
    model = make_encoder(dropout=0.0, activation=nn.SiLU(), batch_first=True, norm_first=norm_first)
    for name, p in model.named_parameters():
        p.requires_grad_("in_proj" in name or "norm2" in name or "linear1" in name)
    x, weight = torch.randn(2, 19, 48), torch.randn(2, 19, 48)

    def run(module: nn.Module, dtype: torch.dtype) -> State:
        params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        leaf = x.to(dtype).requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad((y * weight).sum(), [leaf, *params.values()])
        return dict(zip(["y", "dx", *params], [y.detach(), *grads], strict=True))

    truth = run(copy.deepcopy(model).double(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(model, torch.float32)
        assert [e.path for e in pyckpt.swap(model, tile=10).entries] == ["generic", "generic"]
        ours = run(model, torch.float32)
    assert [t.dtype for t in ours.values()] == [t.dtype for t in plain.values()]
    assert_as_good(ours, plain, truth, torch.bfloat16)


def test_copies_of_encoder_layers_are_swapped_on_their_own():
    model = make_encoder(batch_first=True, activation=nn.PReLU())
    x, weight = torch.randn(2, 19, 48), torch.randn(2, 19, 48)
    pyckpt.swap(model, tile=10)
    before = seeded(model, x, weight)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(seeded(twin, x, weight), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert not seeded(twin, x, weight)["y"].any()
        assert_same_bits(seeded(model, x, weight), before)
        pyckpt.unswap(twin)


def test_encoder_layers_of_unknown_parts_run_again_as_a_whole_and_are_named():
    def message(**parts: nn.Module) -> str:
        layer = nn.TransformerEncoderLayer(48, 4, 72)
        for name, part in parts.items():
            setattr(layer, name, part)
        (entry,) = pyckpt.swap(layer).entries
        assert entry.path == "checkpointed"
        return entry.why

    assert "norm1 is a torch.nn.modules.batchnorm.BatchNorm1d" in message(norm1=nn.BatchNorm1d(48))
    assert "dropout2 is a torch.nn.modules.dropout.Dropout1d" in message(dropout2=nn.Dropout1d(0.1))
    assert "biases or zeros of its own" in message(self_attn=nn.MultiheadAttention(48, 4, add_bias_kv=True))
    layer = nn.TransformerEncoderLayer(48, 4, 72)
    layer.linear1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="linear1 has forward hooks"):
        pyckpt.swap(layer)


# --- transformers' Trainer -------------------------------------------------------------------------------------------


def test_trainer_trains_as_before(tmp_path):
    """With accumulation, evaluation with metrics of the logits, and columns chosen by the forward's signature."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": torch.randint(1, VOCAB, (n,))} for n in (19, 12, 7, 19, 5, 9, 11, 3)]

    def collate(chosen: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([r["input_ids"] for r in chosen], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.masked_fill(ids == 0, -100)}

    options = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    options |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 1, "disable_tqdm": True}
    model, results = make_model("Qwen3"), []
    for trained in (copy.deepcopy(model), model):
        if trained is model:
            pyckpt.swap(model)
        trainer = transformers.Trainer(
            model=trained,
            args=transformers.TrainingArguments(str(tmp_path), **options),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=collate,
            compute_metrics=lambda p: {"width": p.predictions.shape[-1]},
        )
        trainer.train()
        metrics = trainer.evaluate()
        assert metrics["eval_width"] == VOCAB
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append(torch.tensor([*losses, metrics["eval_loss"]]))
    assert len(results[0]) == 5
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_arguments_by_their_places_are_as_before():
    """Too many, and one that is given twice, are errors as without a swap; none was named wrongly."""
    model, ids = make_model("Llama"), make_batch("plain")["input_ids"]
    places = [n for n in inspect.signature(model.forward).parameters if n != "kwargs"]
    by_name = [ids, *(ids if n == "labels" else None for n in places[1:])]
    before = model(*by_name).loss
    pyckpt.swap(model)
    torch.testing.assert_close(model(*by_name).loss, before, rtol=1e-5, atol=1e-6)
    for call in (model, model.model):
        with pytest.raises(TypeError, match="positional arguments"):
            call(ids, *[None] * 20)
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            call(ids, input_ids=ids)
        for given in ({}, {"input_ids": ids, "inputs_embeds": model.model.embed_tokens(ids)}):
            with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
                call(**given)
