"""Swapped encoder layers of PyTorch in calls, and after changes, that their blocks do not compute."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from torch import Tensor, nn

import pyckpt
from pyckpt import measure

WIDTH, SEQ = 16, 7
PATHS = {"standard": "gelu", "generic": "relu"}
Step = dict[str, Tensor]


def make(activation: Any = "gelu", norm_first: bool = True, **options: Any) -> nn.TransformerEncoder:
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | options
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, activation=activation, norm_first=norm_first, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def inputs() -> Tensor:
    return torch.randn(2, SEQ, WIDTH, dtype=torch.float64)


def step(model: nn.Module, x: Tensor, read: Any = slice(None), **options: Any) -> Step:
    model.zero_grad()
    loss = model(x, **options)[:, read].square().mean()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(a: Step, b: Step) -> None:
    assert a.keys() == b.keys()
    for name, t in a.items():
        torch.testing.assert_close(t, b[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def causal() -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(SEQ, dtype=torch.float64)


# --- masks that are added --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1.0, 2.0, -50.0, math.nan])
@pytest.mark.parametrize("path", PATHS)
def test_a_padding_mask_that_is_added_is_not_padding(path, number):
    """Unless it hides: PyTorch adds numbers to the scores. The layers run as a whole, with the same bits."""
    model, x, added = make(PATHS[path]), inputs(), torch.zeros(2, SEQ, dtype=torch.float64)
    added[0, 5:] = number
    before = step(model, x, 0, src_key_padding_mask=added)
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match=r"src_key_padding_mask that is added to scores.* whole in the backward"):
        after = step(model, x, 0, src_key_padding_mask=added)
    assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in after.items())


@pytest.mark.parametrize("number", [-math.inf, -1e9, torch.finfo(torch.float32).min, -1e4])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_padding_mask_of_numbers_that_hide_is_padding(number, is_causal):
    model, x, added = make(), inputs(), torch.zeros(2, SEQ, dtype=torch.float64)
    added[0, 5:] = number
    options = {"src_key_padding_mask": added} | ({"mask": causal()} if is_causal else {})
    before = step(model, x, slice(5), **options)
    pyckpt.swap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(step(model, x, slice(5), **options), before)


@pytest.mark.parametrize("is_causal", [False, True])
def test_finite_numbers_hide_nothing_where_a_query_sees_nothing_else(is_causal):
    """There the numbers, all the same, are of no effect."""
    model, x, added = make(), inputs(), torch.zeros(2, SEQ, dtype=torch.float64)
    added[0, : 2 if is_causal else SEQ] = -1e4
    options = {"src_key_padding_mask": added} | ({"mask": causal()} if is_causal else {})
    before = step(model, x, **options)
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match="of finite numbers, where some query sees padding alone"):
        assert_same_bits(step(model, x, **options), before)
    added[added < 0] = -math.inf  # as where a mask says True
    told = options | {"src_key_padding_mask": added < 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(*(model.layers[0](x, o.get("mask"), o["src_key_padding_mask"]) for o in (options, told)))


def copy_of(model: nn.Module) -> nn.Module:
    """Not swapped."""
    twin = copy.deepcopy(model)
    pyckpt.unswap(twin)
    return twin


def test_a_padding_mask_that_is_added_in_a_compiled_model():
    model, x, added = make(), inputs(), torch.zeros(2, SEQ, dtype=torch.float64)
    pyckpt.swap(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    added[0, 5:] = -math.inf
    options = {"src_key_padding_mask": added}
    torch.testing.assert_close(compiled(x, **options), model(x, **options))
    added[0, 5:] = -1.0
    with pytest.raises(RuntimeError, match=r"neither are 0 nor hide a token.* came to a compiled model"):
        compiled(x, **options)


@pytest.mark.parametrize("path", PATHS)
def test_is_causal_without_a_mask_is_pytorchs_error(path):
    layer = make(PATHS[path]).layers[0]
    pyckpt.swap(layer)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        layer(inputs(), is_causal=True)
    layer(inputs(), src_mask=causal(), is_causal=True)


# --- what changes after the swap -------------------------------------------------------------------------------------


def renew(path: str) -> Callable[[nn.Module], None]:
    """Puts another module of the same class there."""

    def change(layer: nn.Module) -> None:
        torch.manual_seed(3)
        parent, _, name = path.rpartition(".")
        setattr(layer.get_submodule(parent), name, copy.deepcopy(layer.get_submodule(path)))
        with torch.no_grad():
            for p in layer.get_submodule(path).parameters():
                p += 0.3 * torch.randn_like(p)

    return change


@pytest.mark.parametrize("name", ["linear1", "linear2", "norm1", "norm2", "self_attn", "self_attn.out_proj"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_module_of_the_same_class_in_the_place_of_another(path, norm_first, name):
    """It runs, and has the gradients, without a warning."""
    model, x = make(PATHS[path], norm_first), inputs()
    pyckpt.swap(model)
    step(model, x)
    renew(name)(model.layers[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(step(model, x), step(copy_of(model), x))
    assert_close(step(copy.deepcopy(model), x), step(model, x))


def set_heads(layer: Any) -> None:
    layer.self_attn.num_heads, layer.self_attn.head_dim = 4, 4


def widen(layer: Any) -> None:
    layer.linear1, layer.linear2 = (nn.Linear(*s, dtype=torch.float64) for s in ((WIDTH, 24), (24, WIDTH)))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "eps": (lambda layer: setattr(layer.norm2, "eps", 0.5), r"norm2 now has eps 0\.5, not the 1e-05 it was when"),
    "heads": (set_heads, "self_attn now has num_heads 4, not the 2 it was when swapped"),
    "width": (widen, r"its linear1\.out_features is now 24, not the 32"),
    "norm_first": (lambda layer: setattr(layer, "norm_first", False), "it now has norm_first False, not the True"),
    "activation": (lambda layer: setattr(layer, "activation", torch.tanh), "it now has activation tanh, not the gelu"),
    "gelu": (
        lambda layer: setattr(layer, "activation", nn.GELU("tanh")),
        "it now has activation GELU",
    ),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_layer_is_told_after_the_swap(kind, path):
    """A standard block has it from the swap, and is left for the original forward; a layer's own modules follow."""
    model, x = make(PATHS[path]), inputs()
    pyckpt.swap(model)
    change, message = CHANGES[kind]
    for layer in model.layers:
        change(layer)
    truth = step(copy_of(model), x)
    if path == "standard" or kind == "heads":
        with pytest.warns(UserWarning, match=f"{message}.* original forward, again as a whole in the backward"):
            assert_same_bits(step(model, x), truth)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_close(step(model, x), truth)


# --- gradients of what is not the layer's own ------------------------------------------------------------------------


def test_what_an_activation_holds_by_itself_has_its_gradient():
    """The layer runs as a whole from then on, as its own modules could not tell; without gradients as before."""
    act = nn.PReLU(dtype=torch.float64)
    model, x = make(lambda h: act(h)), inputs()
    model.activation = act  # for `step` to see; it is none of the layer's modules
    before = step(model, x)
    assert [e.path for e in pyckpt.swap(model).entries] == ["generic"] * 2
    message = (
        r"a tensor of shape \(1,\) that post reads requires a gradient and is no parameter.* whole in the backward"
    )
    with pytest.warns(UserWarning, match=message):
        assert_same_bits(step(model, x), before)
    with measure.memory(model) as swapped:
        assert_same_bits(step(model, x), before)
    twin = copy_of(model)
    with measure.memory(twin) as whole:
        step(twin, x)
    assert swapped.saved_bytes < whole.saved_bytes
    with torch.no_grad():
        torch.testing.assert_close(model(x), copy_of(model)(x))


@pytest.mark.parametrize("path", PATHS)
def test_no_sequences(path):
    model = make(PATHS[path])
    pyckpt.swap(model)
    assert model(torch.randn(0, SEQ, WIDTH, dtype=torch.float64)).shape == (0, SEQ, WIDTH)


@pytest.mark.parametrize("path", PATHS)
def test_a_sequence_without_a_batch_runs_again_as_a_whole(path):
    model, x = make(PATHS[path]), torch.randn(SEQ, WIDTH, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), x)[0]
    with pyckpt.measure.memory() as stored:
        model(x)
    pyckpt.swap(model)
    with pyckpt.measure.memory() as ours:
        y = model(x)
    assert ours.saved_bytes < stored.saved_bytes / 2
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], plain)


# --- what has a gradient, and what has none ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("which", ["mask", "padding"])
def test_a_mask_that_learns_has_its_gradient(which, path):
    """Also while all that it adds is 0, which is where it begins."""
    layer, x = make(PATHS[path]).layers[0], inputs()
    bias = torch.zeros((SEQ, SEQ) if which == "mask" else (2, SEQ), dtype=torch.float64, requires_grad=True)
    given = {"src_mask": causal() + bias} if which == "mask" else {"src_key_padding_mask": bias}

    def gradient() -> Tensor:
        return torch.autograd.grad(layer(x, **given).square().mean(), bias, retain_graph=True)[0]

    before = gradient()
    pyckpt.swap(nn.ModuleList([layer]))
    with pytest.warns(UserWarning, match="a mask that has a gradient.*again as a whole in the backward"):
        assert torch.equal(gradient(), before)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, **given)


@pytest.mark.parametrize("path", PATHS)
def test_adapters_that_pytorch_does_not_call_do_nothing(path):
    """Its attention reads its output projection's weight, and calls no module."""
    peft = pytest.importorskip("peft")
    model, x = nn.ModuleDict({"encoder": make(PATHS[path])}), inputs()
    config = peft.LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).double()
    before = adapted.base_model.model["encoder"](x)
    report = pyckpt.swap(adapted)
    assert {e.path for e in report.entries} == {"checkpointed"}
    assert torch.equal(adapted.base_model.model["encoder"](x), before)


@pytest.mark.parametrize(
    "activation",
    [nn.Softmax(1), nn.Softmax(-1), nn.RReLU(), nn.functional.silu],
    ids=["tokens", "features", "random", "silu"],
)
def test_an_activation_that_mixes_tokens_is_run_as_a_whole(activation):
    model, x = make(activation), inputs()
    torch.manual_seed(1)
    before = step(model, x)
    path = "checkpointed" if getattr(activation, "dim", None) == 1 else "generic"
    state = torch.get_rng_state()
    assert {e.path for e in pyckpt.swap(model).entries} == {path}
    assert torch.equal(torch.get_rng_state(), state)
    if not isinstance(activation, nn.RReLU):  # which on the generic path draws by a seed of the call
        assert_close(step(model, x), before)
