"""Numbers and switches of layers that are set anew after the swap: a block has those of the swap in its spec."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from swap_models import make_batch, make_model, step
from torch import nn

import pyckpt
from pyckpt.swap.numbers import numbers_of

pytest.importorskip("transformers")

# Family, the path of a module of its first layer, the name of its attribute, another value.
CHANGES: list[tuple[str, str, str, Any]] = [
    ("SmolLM3", "self_attn", "use_rope", 0),
    ("Exaone4", "self_attn", "is_sliding", False),
    ("Cohere2", "self_attn", "sliding_window", 5),
    ("Gemma2", "self_attn", "attn_logit_softcapping", 0.5),
    ("Gemma2", "pre_feedforward_layernorm", "eps", 0.5),
    ("Granite", "", "residual_multiplier", 0.9),
    ("Mixtral", "self_attn", "scaling", 0.9),
]


def change(model: Any, path: str, name: str, value: Any) -> None:
    module = model.model.layers[0].get_submodule(path)
    assert hasattr(module, name)
    setattr(module, name, value)


def check(family: str, path: str, name: str, value: Any) -> None:
    """With the change the numbers are those of the model that nobody swapped; taken back, the blocks run again."""
    model, batch = make_model(family), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    before = step(model, batch)
    was = getattr(model.model.layers[0].get_submodule(path), name)
    for m in (model, plain):
        change(m, path, name, value)
    with pytest.warns(UserWarning, match=f"{path or 'it'} now has {name} {value}, not the "):
        found = step(model, batch)
    assert_same_bits(found, step(plain, batch))
    change(model, path, name, was)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(step(model, batch), before)


@pytest.mark.parametrize(("family", "path", "name", "value"), CHANGES)
def test_of_a_family(family, path, name, value):
    check(family, path, name, value)


@pytest.mark.parametrize(("family", "path", "name", "value"), CHANGES[:6])
def test_of_a_layer_that_was_tried_out(untabled, family, path, name, value):
    check(family, path, name, value)


@pytest.mark.parametrize(
    ("family", "name", "value"), [("Llama", "scaling", 0.9), ("Gemma2", "attn_logit_softcapping", 0.5)]
)
def test_of_a_layer_that_is_cut_at_its_attention(cut, family, name, value):
    """What attention is given is known from the trial; the rest of the layer runs itself."""
    check(family, "self_attn", name, value)


def test_other_attributes_may_change():
    """Those that tools write for themselves, that no block reads, or that are read at each call."""
    model, batch = make_model("Llama"), make_batch("plain")
    layer = model.model.layers[0]
    layer.self_attn.q_proj.calls, layer.self_attn.calls, layer.calls = 0, 0, 0
    pyckpt.swap(model)
    before = step(model, batch)
    layer.self_attn.q_proj.calls, layer.self_attn.calls, layer.calls = 1, 2, 3
    layer.self_attn.layer_idx = 7
    layer.mlp.hidden_size = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(step(model, batch), before)


def test_a_copy_has_its_own():
    model, batch = make_model("SmolLM3"), make_batch("plain")
    pyckpt.swap(model, loss=False)
    copied = copy.deepcopy(model)
    change(copied, "self_attn", "use_rope", 0)
    with pytest.warns(UserWarning, match="now has use_rope"):
        found = step(copied, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found["loss"] != step(model, batch)["loss"]


def test_a_compiled_model_sees_the_change():
    model, batch = make_model("Llama"), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch).loss.backward()
    for m in (model, plain):
        change(m, "self_attn", "scaling", 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = compiled(**batch).loss
    torch.testing.assert_close(loss, plain(**batch).loss, rtol=1e-6, atol=0.0)  # float32's own, of a mean


def squared(x: torch.Tensor) -> torch.Tensor:
    return x.relu().square()


@pytest.mark.parametrize(
    ("family", "act"), [("GPTNeoX", "gelu"), ("Gemma2", "gelu_pytorch_tanh"), ("Phi", "gelu_python")]
)
def test_a_function_inside_of_an_activation(family, act):
    """Which some of transformers' hold: another one after the swap, and before."""
    from transformers.activations import ACT2FN

    model, batch = make_model(family), make_batch("plain")
    body = model.gpt_neox if family == "GPTNeoX" else model.model
    for layer in body.layers:
        layer.mlp.register_module("act" if family == "GPTNeoX" else _name(layer.mlp), ACT2FN[act])
    plain = copy.deepcopy(model)
    assert {e.path for e in pyckpt.swap(model, loss=False).entries} == {"standard"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(copy.deepcopy(model), batch)
    for m in (model, plain):
        for module in m.modules():
            if hasattr(module, "act") and callable(module.act) and not isinstance(module.act, nn.Module):
                module.act = squared
    with pytest.warns(UserWarning, match="now has act squared, not the"):
        found = step(model, batch)
    before = step(plain, batch)
    assert_same_bits(found, before)
    pyckpt.unswap(model)
    assert "standard" not in {e.path for e in pyckpt.swap(model, loss=False).entries}
    torch.testing.assert_close(step(model, batch)["loss"], before["loss"])


def _name(mlp: Any) -> str:
    return next(n for n in ("act_fn", "activation_fn") if hasattr(mlp, n))


def test_what_is_a_number():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.scale, self.made, self.dropout, self.seen, self.names = 2.0, "unread", 0.1, 3, ["scale"]
            self._inner = 4

        def forward(self, x: Any) -> Any:
            return self.half(self.drop(x)) * self.dropout * self._inner * len(self.names)

        def half(self, x: Any) -> Any:
            return x * self.scale * self.twice

        @property
        def twice(self) -> Any:
            return self.seen

        def extra_repr(self) -> str:
            return self.made

    assert numbers_of(Layer(), ("", "drop")) == (("", "scale", 2.0), ("", "seen", 3))


# --- of a layer that is cut, of a model, and of what surrounds its layers ---------------------------------------------


@pytest.mark.parametrize(
    ("family", "path", "name", "value"),
    [
        ("StableLm", "model.layers", "use_parallel_residual", True),
        ("OPT", "model.decoder.layers", "do_layer_norm_before", False),
    ],
)
def test_switches_of_a_layer_that_is_cut(family, path, name, value):
    """Its trace goes by them: of what its parts read, for one."""
    model, batch = make_model(family), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    for m in (model, plain):
        for layer in m.get_submodule(path):
            assert getattr(layer, name) != value
            setattr(layer, name, value)
    with pytest.warns(UserWarning, match=f"it now has {name} {value}"):
        found = step(model, batch)
    assert_same_bits(found, step(plain, batch))


def test_attention_that_sees_both_ways_since():
    model, batch = make_model("Gemma3"), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    for m in (model, plain):
        m.config.use_bidirectional_attention = True
    with pytest.warns(UserWarning, match=r"config\.use_bidirectional_attention is now True"):
        found = step(model, batch)
    assert_same_bits(found, step(plain, batch))


@pytest.mark.parametrize(
    "how", [{"segments": 2}, {"stream": pyckpt.Stream(6)}, {}], ids=["segments", "stream", "alone"]
)
@pytest.mark.parametrize("what", ["hook", "forward"])
def test_a_rotary_embedding_that_is_another_one_since(what, how):
    """Its tables are made anew for tiles in segments and streams; else layers are handed what the model has made."""
    model, batch = make_model("StableLm", num_hidden_layers=2), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, **how)
    for m in (model, plain):
        rotary = m.model.rotary_emb
        if what == "hook":
            rotary.register_forward_hook(lambda module, args, made: tuple(1.5 * t for t in made))
        else:
            own = type(rotary).forward
            rotary.forward = lambda x, position_ids, _of=rotary, _own=own: _own(_of, x, 3 * position_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if how else "error")
        found = step(model, batch)
    for name, value in step(plain, batch).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["GraniteMoe", "GPTJ"])
def test_what_surrounds_a_stream_multiplies_or_drops_since(family):
    """By numbers that did nothing when the places of embedding and norm were found: the layers alone are streamed."""
    options = {"embedding_multiplier": 1.0} if family == "GraniteMoe" else {}
    model, batch = make_model(family, **options), make_batch("plain")
    plain = copy.deepcopy(model)
    pyckpt.swap(model, stream=pyckpt.Stream(6))
    for m in (model, plain):
        if family == "GraniteMoe":
            m.model.embedding_multiplier = 9.0
        else:
            m.transformer.drop.p = 0.5
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="the layers are streamed, and not what surrounds them"):
        found = step(model, batch)
    torch.manual_seed(1)
    for name, value in step(plain, batch).items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
