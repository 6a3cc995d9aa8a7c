"""The stack and the causal language model."""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blocks import assert_as_good, assert_same_bits, make_block, make_input, randomise, relative_errors, step
from helpers import a_few, assert_exact

import pyckpt
from pyckpt.compare.baseline import PlainCausalLM

SIZES = {"vocab_size": 50, "n_layers": 5, "d_model": 32, "n_heads": 4}
OPTIONS = {"n_kv_heads": 2, "d_ff": 48}


def make_lm(dtype: torch.dtype = torch.float64, **options) -> pyckpt.CkptCausalLM:
    model = pyckpt.CkptCausalLM(**SIZES, **{**OPTIONS, **options}, dtype=torch.float64)
    randomise(model)
    return model.to(dtype)


def loss_and_grads(model, *args, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model.loss(*args, **kwargs)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.parametrize("segments", a_few([None, 1, 2, 3, "sqrt", 5, 7], always=(0, 2, 4)))
@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
def test_segments_and_save_sets_give_the_same_bits(segments, save):
    torch.manual_seed(3)
    stack = pyckpt.CkptTransformer([make_block(torch.float32, tile=10) for _ in range(5)])
    x, cu = make_input(packed=True, dtype=torch.float32)
    dy = torch.randn_like(x)
    plain = step(stack, x, dy, cu)
    stack.segments = segments
    for block in stack:
        block.save = save
    assert_same_bits(plain, step(stack, x, dy, cu))


@pytest.mark.parametrize("frozen", [[], [0], [0, 1], [1, 3], [4], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("input_grad", [True, False])
def test_segments_with_frozen_blocks(frozen, input_grad):
    stack = pyckpt.CkptTransformer([make_block(torch.float32, tile=10) for _ in range(5)])
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    whole = step(stack, x, dy)
    for i in frozen:
        stack[i].requires_grad_(False)
    if not input_grad and len(frozen) == 5:
        assert not stack(x).requires_grad
        return
    stack.segments = 3
    leaf = x.clone().requires_grad_(input_grad)
    stack(leaf).backward(dy)
    if input_grad:
        assert torch.equal(leaf.grad, whole["dx"])
    for name, p in stack.named_parameters():
        assert torch.equal(p.grad, whole[name]) if p.requires_grad else p.grad is None


class Wrapped(torch.nn.Module):
    """In a block's place, as FSDP1 puts itself there."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args)


@pytest.mark.parametrize("how", ["hook", "pre-hook", "wrapper"])
def test_segments_do_not_pass_over_what_watches_a_block(how):
    stack = pyckpt.CkptTransformer([make_block(torch.float32, tile=10) for _ in range(5)], segments=2)
    x, _ = make_input(packed=False, dtype=torch.float32)
    expected, seen = stack(x), []
    if how == "hook":
        stack[3].register_forward_hook(lambda module, args, y: seen.append(module))
    elif how == "pre-hook":
        stack[3].register_forward_pre_hook(lambda module, args: seen.append(module))
    else:
        stack[3].forward = lambda *args: seen.append(stack[3]) or type(stack[3].block).forward(stack[3].block, *args)
        setattr(stack, "3", Wrapped(stack[3]))
    what = "is in a Wrapped" if how == "wrapper" else "CkptTransformerBlock has forward hooks"
    with pytest.warns(UserWarning, match=f"{what}: segments are not used"):
        assert torch.equal(stack(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once for a stack
        stack(x)
    assert len(seen) == 2


def test_a_measurement_leaves_segments_as_they_are():
    stack = pyckpt.CkptTransformer([make_block(torch.float32, tile=10) for _ in range(4)], segments=2)
    x, _ = make_input(packed=False, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pyckpt.measure.memory(stack, device="cpu"):
            stack(x).sum().backward()


def test_a_slice_is_a_stack_with_the_same_segments():
    stack = pyckpt.CkptTransformer([make_block(torch.float32) for _ in range(5)], segments=2)
    part = stack[1:]
    assert isinstance(part, pyckpt.CkptTransformer) and part.segments == 2 and list(part) == list(stack)[1:]
    assert stack[-1] is list(stack)[4]


def test_what_is_no_block_of_a_stack_is_refused_at_once():
    stack = pyckpt.CkptTransformer([make_block(torch.float32) for _ in range(2)])
    first, width = stack[0], stack[0].d_model
    ways = {
        "append": (2, stack.append),
        "insert": (1, lambda block: stack.insert(1, block)),
        "extend": (2, lambda block: stack.extend([block])),
        "+=": (2, lambda block: stack.__iadd__([block])),
        "[0] =": (0, lambda block: stack.__setitem__(0, block)),
        "[-1] =": (1, lambda block: stack.__setitem__(-1, block)),
    }
    for place, way in ways.values():
        with pytest.raises(TypeError, match=f"block {place} is a Linear, expected a CkptTransformerBlock"):
            way(torch.nn.Linear(3, 3))
        with pytest.raises(ValueError, match=f"block {place} has d_model=16, the others have {width}"):
            way(pyckpt.CkptTransformerBlock(16, 2))
    assert len(stack) == 2 and stack[0] is first
    for _, way in ways.values():
        way(make_block(torch.float32))
    assert len(stack) == 6 and stack[0] is not first
    with pytest.raises(IndexError):
        stack[9] = first


@pytest.mark.parametrize("packed", [False, True])
def test_shapes_without_values(packed):
    model = pyckpt.CkptCausalLM(**SIZES, **OPTIONS, segments=2, dropout=0.1, device="meta", dtype=torch.bfloat16)
    tokens = torch.zeros((2, 8), dtype=torch.int64, device="meta")
    cu = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    tokens = tokens.view(-1) if packed else tokens
    logits = model(tokens, cu_seqlens=cu)
    assert logits.is_meta and logits.shape == (*tokens.shape, 50) and logits.dtype == torch.bfloat16
    assert model.loss(tokens, cu_seqlens=cu).shape == ()
    x = torch.empty((2, 8, 32), dtype=torch.bfloat16, device="meta", requires_grad=True)
    model.model.layers(x).backward(torch.empty_like(x))
    assert x.grad.shape == x.shape and model.model.layers[0].mlp.down_proj.weight.grad.shape == (32, 48)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", [{}, {"norm": "layernorm", "mlp": "gelu"}], ids=["llama", "layernorm"])
def test_loss_and_gradients_equal_plain_pytorch(tie, options):
    model = make_lm(tie_embeddings=tie, **options)
    plain = PlainCausalLM(**SIZES, **OPTIONS, **options, tie_embeddings=tie, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 19))
    labels = tokens.clone()
    labels[0, 3:7] = -100
    for args in ((tokens,), (tokens, labels)):
        errors = relative_errors(loss_and_grads(model, *args), loss_and_grads(plain, *args))
        assert max(errors.values()) < 1e-12


def of_draws(model, draws: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Losses of all the draws, gradients of the first: one loss is one number, its error 0 now and then by luck."""
    grads = loss_and_grads(model, draws[0])
    assert grads["loss"].dtype in (torch.float32, torch.float64)
    with torch.no_grad():
        return grads | {"loss": torch.stack([model.loss(tokens) for tokens in draws])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_error_is_at_most_twice_pytorchs_own(dtype):
    model = make_lm(dtype)
    plains = [PlainCausalLM(**SIZES, **OPTIONS, dtype=d) for d in (dtype, torch.float64)]
    for plain in plains:
        plain.load_state_dict(model.state_dict())
    draws = [torch.randint(0, 50, (4, 64)) for _ in range(8)]
    ours, (theirs, truth) = of_draws(model, draws), [of_draws(plain, draws) for plain in plains]
    assert_as_good(ours, theirs, truth, dtype)


def test_packed_sequences_do_not_predict_each_other():
    model = make_lm()
    lengths = [7, 1, 12, 5]
    parts = [torch.randint(0, 50, (n,)) for n in lengths]
    cu = torch.tensor([0, 7, 8, 20, 25], dtype=torch.int32)
    with torch.no_grad():
        packed = model.loss(torch.cat(parts), cu_seqlens=cu)
        separate = [model.loss(p[None], reduction="sum") for p in parts if len(p) > 1]
    assert float(packed) == pytest.approx(float(sum(separate)) / (7 + 12 + 5 - 3), rel=1e-12)


def test_logits_and_loss_agree():
    model = make_lm()
    tokens = torch.randint(0, 50, (2, 19))
    logits = model(tokens)
    assert logits.shape == (2, 19, 50)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(model.loss(tokens)) == pytest.approx(float(expected), rel=1e-12)


def test_loss_options_reach_the_head():
    model = make_lm()
    tokens = torch.randint(0, 50, (2, 19))
    logits = 5.0 * torch.tanh(model(tokens)[:, :-1].flatten(0, 1) / 5.0)
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    expected = expected + 1e-3 * logits.logsumexp(-1).square().mean()
    got = model.loss(tokens, softcap=5.0, label_smoothing=0.1, z_loss=1e-3)
    assert float(got) == pytest.approx(float(expected), rel=1e-12)
    weights = list(model.parameters())
    again = torch.autograd.grad(
        model.loss(tokens, softcap=5.0, label_smoothing=0.1, z_loss=1e-3, recompute=True), weights
    )
    for found, wanted in zip(again, torch.autograd.grad(got, weights), strict=True):
        assert_exact(found, wanted)


@pytest.mark.parametrize("stream", [None, pyckpt.Stream(5)], ids=["resident", "streamed"])
def test_what_is_no_option_of_the_loss_is_refused(stream):
    """Of the head's own loss too: the last token has the label that is ignored, and the head no bias."""
    model = make_lm()
    for name in ("ignore_index", "bias"):
        with pytest.raises(TypeError, match=rf"loss\(\) got an unexpected keyword argument '{name}'"):
            model.loss(torch.randint(0, 50, (1, 7)), stream=stream, **{name: None})


BAD_LOSSES = [
    ({"reduction": "avg"}, ValueError, "reduction='avg' does not exist; expected one of mean, sum, none"),
    ({"z_loss": math.inf}, ValueError, "z_loss must be a finite number, got inf"),
    ({"z_loss": math.nan}, ValueError, "z_loss must be a finite number, got nan"),
    ({"z_loss": torch.tensor(0.1, requires_grad=True)}, ValueError, "z_loss gets no gradient here"),
    ({"z_loss": "1"}, TypeError, "z_loss must be a number, got '1'"),
    ({"softcap": -1.0}, ValueError, "softcap must be None or a positive number, got -1.0"),
    ({"softcap": torch.tensor(9.0, requires_grad=True)}, ValueError, "softcap gets no gradient here"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": torch.tensor(0.1, requires_grad=True)}, ValueError, "label_smoothing gets no gradient here"),
    ({"labels": [1, 2]}, TypeError, r"labels must be a torch\.Tensor, got list"),
]


@pytest.mark.parametrize("how", ["resident", "streamed", "shared"])
@pytest.mark.parametrize(("options", "error", "message"), BAD_LOSSES, ids=range(len(BAD_LOSSES)))
def test_bad_options_of_a_loss_are_refused_before_anything_runs(how, options, error, message):
    model = make_lm(dropout=0.5)
    model.hidden = None  # nothing is to be called
    context = object.__new__(pyckpt.ContextParallel)  # there are no processes here
    context._compared = True
    way = {"resident": {}, "streamed": {"stream": pyckpt.Stream(5)}, "shared": {"context": context}}[how]
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        model.loss(torch.randint(0, 50, (1, 7), generator=torch.Generator().manual_seed(1)), **options, **way)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_of_a_loss_may_be_of_any_kind():
    model, tokens = make_lm(), torch.randint(0, 50, (2, 9))
    numbers = {"softcap": 8.0, "z_loss": 0.5, "label_smoothing": 0.25}
    for stream in (None, pyckpt.Stream(5)):
        want = model.loss(tokens, **numbers, stream=stream)
        for kind in (np.float32, torch.tensor):
            assert torch.equal(model.loss(tokens, **{n: kind(v) for n, v in numbers.items()}, stream=stream), want)


def test_a_stack_that_was_emptied_is_refused():
    stack = pyckpt.CkptTransformer([make_block(torch.float32)])
    block = stack.pop(0)
    x = torch.randn(1, 5, 48)
    runs = (lambda: stack(x), lambda: stack(x, stream=pyckpt.Stream(5)), lambda: pyckpt.Stream(5).estimate(stack, 5))
    for run in runs:
        with pytest.raises(ValueError, match="this CkptTransformer has no blocks left: append at least one"):
            run()
    assert torch.equal(stack.append(block)(x), block(x))


def test_weights_belong_to_labels():
    model = make_lm()
    tokens, weights, classes = torch.randint(0, 50, (2, 19)), torch.rand(2, 19).double(), torch.rand(50).double()
    losses = model.loss(tokens, reduction="none")[:, :-1]
    expected = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
    assert float(model.loss(tokens, token_weight=weights)) == pytest.approx(float(expected), rel=1e-12)
    logits = model(tokens)[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, tokens[:, 1:].flatten(), classes)
    assert float(model.loss(tokens, class_weight=classes)) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match=r"token_weight has shape \(2, 18\), expected \(2, 19\)"):
        model.loss(tokens, token_weight=weights[:, 1:])


def test_names_are_those_of_a_llama():
    names = set(make_lm().state_dict())
    layer = {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    assert names == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{n}" for i in range(5) for n in layer),
    }


def test_config_rebuilds_the_model():
    model = make_lm(window=9, tie_embeddings=True)
    again = pyckpt.CkptCausalLM(**json.loads(json.dumps(model.config)), dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 50, (2, 19))
    assert torch.equal(model.loss(tokens), again.loss(tokens))


def test_config_is_ready_for_json_whatever_was_given():
    options = {
        "softcap": torch.tensor(3.0),
        "window": np.int64(3),
        "norm_eps": np.float32(0.25),
        "rope_dim": np.int64(4),
    }
    scaling = {"rope_type": "given", "frequencies": np.ones(2), "amplitude": np.float32(0.5)}
    model = pyckpt.CkptCausalLM(np.int64(50), np.int64(2), np.int64(32), np.int64(4), **options, rope_scaling=scaling)
    config = json.loads(json.dumps(model.config))
    assert config == model.config and config.items() >= {"softcap": 3.0, "window": 3, "rope_dim": 4}.items()
    assert pyckpt.CkptCausalLM(**config).spec == model.spec
    plain = pyckpt.CkptCausalLM(50, 2, 32, 4).config
    assert (plain["softcap"], plain["window"], plain["rope_scaling"], plain["d_ff"]) == (None, None, None, 128)
    assert plain.keys() == inspect.signature(pyckpt.CkptCausalLM).parameters.keys() - {
        *("save", "segments", "tile", "tile_bytes", "device", "dtype")
    }


def test_bad_options_draw_nothing():
    before = torch.get_rng_state()
    for options in ({"tie_embeddings": "no"}, {"segments": 0}, {"save": "most"}, {"tile": -1}, {"softcap": "1"}):
        with pytest.raises(ValueError, match=rf"{next(iter(options))}(=| must be)"):
            pyckpt.CkptCausalLM(50, 2, 32, 4, **options)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_embeddings_are_one_parameter():
    model = make_lm(tie_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len([n for n, _ in model.named_parameters() if "lm_head" in n]) == 0


def test_tied_embeddings_stay_tied_where_a_state_dict_is_refused():
    """As one without the head: what it has is assigned before its lack is told."""
    model = pyckpt.CkptCausalLM(31, 2, 32, 4, tie_embeddings=True)
    state = {name: t + 1.0 for name, t in model.state_dict().items() if name != "lm_head.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .lm_head.weight"):
        model.load_state_dict(state, assign=True)
    model.load_state_dict(state, strict=False, assign=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"])


def test_settings_reach_every_block():
    model = make_lm()
    model.set_save("input")
    model.set_tile(16)
    model.set_segments("sqrt")
    assert {(b.save, b.tile) for b in model.model.layers} == {("input", 16)}
    assert model.model.layers.segment_length == 3


def test_generate_is_greedy_at_temperature_zero_and_repeats_with_a_seed():
    model = make_lm()
    prompt = torch.randint(0, 50, (2, 4))
    greedy = model.generate(prompt, 5, temperature=0)
    assert greedy.shape == (2, 9) and torch.equal(greedy[:, :4], prompt)
    for i in range(4, 9):
        assert torch.equal(greedy[:, i], model(greedy[:, :i])[:, -1].argmax(-1))
    assert torch.equal(model.generate(prompt, 5, top_k=1), greedy)
    samples = [model.generate(prompt, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_generate_refuses_nonsense():
    with pytest.raises(ValueError, match="temperature must be a finite number >= 0, got -1"):
        make_lm().generate(torch.zeros(1, 1, dtype=torch.long), 5, temperature=-1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number >= 0, got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be a finite number >= 0, got inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number >= 0, got '1'"),
        ({"top_k": True}, TypeError, "top_k must be an int, got True"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got 2.0"),
        ({"top_k": 0}, ValueError, "expected max_new_tokens >= 0, and top_k None or >= 1, got 0 and 0"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an int, got 1.5"),
        ({"max_new_tokens": -1}, ValueError, "expected max_new_tokens >= 0"),
        ({"tokens": torch.zeros(4, dtype=torch.long)}, ValueError, r"tokens must be \(B, S\), got shape \(4,\)"),
        ({"tokens": torch.full((1, 2), 50)}, ValueError, "token 50 is out of range"),
        ({"tokens": [[1, 2]]}, TypeError, r"tokens must be a torch\.Tensor, got list"),
    ],
)
def test_generate_checks_before_it_samples(changes, error, message):
    given = {"tokens": torch.zeros(1, 1, dtype=torch.long), "max_new_tokens": 0, **changes}
    with pytest.raises(error, match=message):
        make_lm().generate(**given)


def test_generate_drops_nothing_and_leaves_the_modes_as_they_were():
    model, prompt = make_lm(dropout=0.5), torch.randint(0, 50, (2, 4))
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    found = model.generate(prompt, 5, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(found, copy.deepcopy(model).eval().generate(prompt, 5, temperature=0))
    model.lm_head.forward = None
    with pytest.raises(TypeError):
        model.generate(prompt, 1)
    assert {name: module.training for name, module in model.named_modules()} == modes


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-37, 1e-20])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    model, prompt = make_lm(torch.float32), torch.randint(0, 50, (2, 4))
    greedy = model.generate(prompt, 5, temperature=0)
    assert torch.equal(model.generate(prompt, 5, temperature=temperature), greedy)


def test_trains():
    """A few steps of AdamW learn a repeating sequence: gradients point the right way through the whole model."""
    torch.manual_seed(0)
    model = pyckpt.CkptCausalLM(**SIZES, **OPTIONS, segments=2)
    tokens = torch.arange(40).remainder(8).repeat(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 3.5 and losses[-1] < 0.1


def test_it_takes_the_keywords_of_a_block():
    of_block, of_model = (inspect.signature(c).parameters for c in (pyckpt.CkptTransformerBlock, pyckpt.CkptCausalLM))
    assert set(of_block) - {"causal"} <= set(of_model)
    assert all(of_model[n].default == p.default for n, p in of_block.items() if n in of_model)


def test_a_residual_multiplier():
    tokens = torch.randint(0, 31, (2, 19))
    kind = {"vocab_size": 31, "n_layers": 2, "d_model": 24, "n_heads": 2, "residual_multiplier": 0.22}
    model = pyckpt.CkptCausalLM(**kind, dtype=torch.float64)
    plain = PlainCausalLM(**kind, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    assert_exact(model.loss(tokens), plain.loss(tokens))
    assert_exact(model.loss(tokens, stream=pyckpt.Stream(8)), plain.loss(tokens))
    again = pyckpt.CkptCausalLM(**model.config, dtype=torch.float64)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.loss(tokens), model.loss(tokens))


def test_a_model_from_the_meta_device_is_initialised_and_tied():
    options = {"d_ff": 24, "norm": "layernorm", "tie_embeddings": True}
    model = pyckpt.CkptCausalLM(30, 2, 16, 2, **options, device="meta").to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.reset_parameters()
    assert all(p.isfinite().all() for p in model.parameters())
    other = pyckpt.CkptCausalLM(30, 2, 16, 2, **options, device="meta")
    for assign in (True, False):
        if not assign:
            other = pyckpt.CkptCausalLM(30, 2, 16, 2, **options, device="meta").to_empty(device="cpu")
        other.load_state_dict(model.state_dict(), assign=assign)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    untied = pyckpt.CkptCausalLM(30, 2, 16, 2, d_ff=24)
    untied.load_state_dict(untied.state_dict(), assign=True)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


# --- what stands in the place of a model's own modules ---------------------------------------------------------------


class Half(pyckpt.CkptTransformerBlock):
    def forward(self, x, *args, **kwargs):
        return 0.5 * super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("how", ["class", "instance"])
def test_a_blocks_own_forward_runs_or_is_refused(how):
    options = {"d_ff": 24, "dtype": torch.float64}
    blocks = [(Half if how == "class" else pyckpt.CkptTransformerBlock)(16, 4, **options) for _ in range(2)]
    if how == "instance":
        for block in blocks:
            block.forward = lambda *args, _of=block, **kwargs: 0.5 * type(_of).forward(_of, *args, **kwargs)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    one_by_one = pyckpt.CkptTransformer(blocks)(x)
    assert not torch.allclose(one_by_one, pyckpt.CkptTransformer(blocks)[0](x))
    with pytest.warns(UserWarning, match="has a forward of its own: segments are not used"):
        assert torch.equal(pyckpt.CkptTransformer(blocks, segments=2)(x), one_by_one)
    with pytest.raises(ValueError, match=r"block 0 is a .* with a forward of its own, and a streamed run calls none"):
        pyckpt.CkptTransformer(blocks)(x, stream=pyckpt.Stream(4))


def test_a_forward_in_an_inner_layer_is_refused():
    block = pyckpt.CkptTransformerBlock(16, 4, d_ff=24)
    block.mlp.up_proj.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj of this CkptTransformerBlock is a Linear, which"):
        block(torch.randn(1, 3, 16))


class Lookup(torch.nn.Embedding):
    def forward(self, tokens):
        return 2.0 * super().forward(tokens)


REPLACED = {
    "a head with a bias": ("lm_head", lambda: torch.nn.Linear(48, 61), "lm_head is a Linear with a bias", True),
    "a head of another class": ("lm_head", lambda: torch.nn.Identity(), "lm_head is a Identity, expected", True),
    "no norm": ("model.norm", lambda: torch.nn.Identity(), r"model\.norm is a Identity, expected", True),
    "a norm without weight": ("model.norm", lambda: torch.nn.RMSNorm(48, elementwise_affine=False), "a weight", True),
    "another norm": ("model.norm", lambda: torch.nn.LayerNorm(48), "expected the rmsnorm of the model", False),
    "another embedding": ("model.embed_tokens", lambda: Lookup(61, 48), "is a Lookup, expected a plain", False),
    "max_norm": ("model.embed_tokens", lambda: torch.nn.Embedding(61, 48, max_norm=1.0), "with max_norm", False),
    "sparse": ("model.embed_tokens", lambda: torch.nn.Embedding(61, 48, sparse=True), "with sparse", False),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_the_loss_would_leave_out_is_refused(what):
    path, make, said, everywhere = REPLACED[what]
    model = pyckpt.CkptCausalLM(61, 1, 48, 4)
    model.set_submodule(path, make())
    tokens = torch.randint(0, 61, (2, 9))
    with pytest.raises(ValueError, match=said):
        model.loss(tokens, stream=pyckpt.Stream(4))
    if everywhere:
        with pytest.raises(ValueError, match=said):
            model.loss(tokens)
    else:
        assert torch.isfinite(model.loss(tokens))


def test_adapters_beside_the_head_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(pyckpt.CkptCausalLM(61, 1, 48, 4), config).base_model.model
    with pytest.raises(ValueError, match=r"expected a .*merge adapters"):
        model.loss(torch.randint(0, 61, (2, 9)))
