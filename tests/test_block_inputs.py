"""Bad input: each mistake has an error of its own that says what was given and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks import make_block, make_input
from torch import nn

import pyckpt
from pyckpt.save import SaveSet, save_set

BAD_OPTIONS = {
    "heads that do not divide": ((48, 5), {}, r"d_model=48 is not a multiple of n_heads=5.*head_dim"),
    "groups that do not divide": ((48, 4), {"n_kv_heads": 3}, r"n_heads=4 is not a multiple of n_kv_heads=3"),
    "odd head dim with RoPE": ((9, 3), {}, r"head_dim=3 is odd.*rope_theta=None"),
    "zero width": ((0, 4), {}, r"d_model must be a positive int, got 0"),
    "width no int": ((48.0, 4), {}, r"d_model must be a positive int, got 48\.0"),
    "negative d_ff": ((48, 4), {"d_ff": -1}, r"d_ff must be a positive int, got -1"),
    "unknown norm": (
        (48, 4),
        {"norm": "batchnorm"},
        r"norm='batchnorm' does not exist; expected one of rmsnorm",
    ),
    "unknown mlp": ((48, 4), {"mlp": "moe"}, r"mlp='moe' does not exist; expected one of swiglu"),
    "unknown placement": (
        (48, 4),
        {"norm_placement": "before"},
        r"norm_placement='before' does not exist; expected one of pre, sandwich, output, post",
    ),
    "parallel with norms after": (
        (48, 4),
        {"residual": "parallel", "norm_placement": "post"},
        r"the norms of a parallel block stand before its sublayers; use norm_placement='pre' or residual",
    ),
    "unknown bias": ((48, 4), {"bias": "o"}, r"bias must be True, False, or one of qkv, attention, mlp, got 'o'"),
    "bias no bool": ((48, 4), {"bias": 1}, r"bias must be True, False, or one of"),
    "odd rope_dim": ((48, 4), {"rope_dim": 5}, r"rope_dim=5 must be even and at most head_dim=12"),
    "wide rope_dim": ((48, 4), {"rope_dim": 14}, r"rope_dim=14 must be even and at most head_dim=12"),
    "rope_dim no int": ((48, 4), {"rope_dim": 0.5}, r"rope_dim must be a positive int, got 0\.5"),
    "rope_dim without RoPE": ((48, 4), {"rope_dim": 4, "rope_theta": None}, r"rope_dim was given with rope_theta=None"),
    "negative scale": ((48, 4), {"attention_scale": -1.0}, r"attention_scale must be a positive finite number"),
    "no frequencies": ((48, 4), {"rope_scaling": {"rope_type": "given"}}, r"needs frequencies, .*got None"),
    "few frequencies": (
        (48, 4),
        {"rope_scaling": {"rope_type": "given", "frequencies": [1.0, 0.1]}},
        r"gives 2 frequencies, expected 6",
    ),
    "odd frequency": (
        (48, 4),
        {"rope_scaling": {"rope_type": "given", "frequencies": [float("nan")] * 6}},
        r"frequencies must be finite numbers, got nan",
    ),
    "zero multiplier": ((48, 4), {"residual_multiplier": 0.0}, r"residual_multiplier must be a positive finite number"),
    "multiplier after a norm": (
        (48, 4),
        {"residual_multiplier": 0.5, "norm_placement": "post"},
        r"residual_multiplier=0\.5 with norm_placement='post'",
    ),
    "offset no number": ((48, 4), {"norm_offset": "1"}, r"norm_offset must be a finite number, got '1'"),
    "infinite offset": ((48, 4), {"norm_offset": float("inf")}, r"norm_offset must be a finite number, got inf"),
    "unknown qk_norm": ((48, 4), {"qk_norm": "head"}, r"qk_norm must be True \(over each head\), 'full' .*got 'head'"),
    "unknown residual": (
        (48, 4),
        {"residual": "none"},
        r"residual='none' does not exist; expected one of sequential, parallel, parallel_shared",
    ),
    "unknown save set": (
        (48, 4),
        {"save": "everything"},
        r"save='everything' does not exist; expected one of 'all'",
    ),
    "save set no string": ((48, 4), {"save": 3}, r"save=3 does not exist"),
    "negative eps": ((48, 4), {"norm_eps": -1.0}, r"norm_eps must be a positive finite number"),
    "zero theta": ((48, 4), {"rope_theta": 0.0}, r"rope_theta must be a positive finite number"),
    "unknown rope type": (
        (48, 4),
        {"rope_scaling": {"rope_type": "yarn"}},
        r"'yarn' is not supported; expected one",
    ),
    "rope scaling a number": ((48, 4), {"rope_scaling": 8.0}, r"must be None or a dict .*, got 8\.0"),
    "rope scaling without a type": ((48, 4), {"rope_scaling": {"factor": 8.0}}, r"has no rope_type"),
    "rope scaling with another theta": (
        (48, 4),
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        r"rope_scaling has rope_theta=500000\.0, and 10000\.0 is given",
    ),
    "rope scaling of a part": (
        (48, 4),
        {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=0\.5, which is not read: .* rope_dim",
    ),
    "rope scaling lacks": ((48, 4), {"rope_scaling": {"rope_type": "linear"}}, r"lacks factor"),
    "rope factor zero": (
        (48, 4),
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        r"rope_scaling's factor must be a positive finite number, got 0",
    ),
    "rope factor text": (
        (48, 4),
        {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
        r"rope_scaling's factor must be a positive finite number, got '2'",
    ),
    "llama3 bands crossed": (
        (48, 4),
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            }
        },
        r"low_freq_factor=4 must be below its high_freq_factor=1",
    ),
    "scaling without rope": (
        (48, 4),
        {"rope_theta": None, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        r"rope_theta=None",
    ),
    "negative window": ((48, 4), {"window": -3}, r"window=-3 is negative; .* or None for no limit"),
    "window of three": ((48, 4), {"window": (1, 2, 3)}, r"window must be None, an int >= 0, or a pair"),
    "negative softcap": ((48, 4), {"softcap": -2.0}, r"softcap must be None or a positive number"),
    "tile zero": ((48, 4), {"tile": 0}, r"tile must be None or a positive int"),
    "dropout of one": ((48, 4), {"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
    "negative dropout": ((48, 4), {"attention_dropout": -0.1}, r"attention_dropout must be a number in"),
    "tile_bytes zero": ((48, 4), {"tile_bytes": 0}, r"tile_bytes must be a positive int"),
    "tile_bytes no int": ((48, 4), {"tile_bytes": 1e9}, r"tile_bytes must be a positive int"),
    "tile no int": ((48, 4), {"tile": 2.5}, r"tile must be None or a positive int"),
    "softcap text": ((48, 4), {"softcap": "2"}, r"softcap must be None or a positive number, got '2', a str"),
    "softcap a bool": ((48, 4), {"softcap": True}, r"softcap must be None or a positive number, got True"),
    "softcap of two": ((48, 4), {"softcap": torch.ones(2)}, r"softcap must be .*, got a Tensor of shape \(2,\)"),
    "softcap with a gradient": (
        (48, 4),
        {"softcap": torch.tensor(2.0, requires_grad=True)},
        r"softcap gets no gradient here: give softcap\.detach\(\), or a number",
    ),
    "scale a bool": ((48, 4), {"attention_scale": True}, r"attention_scale must be a positive finite number, got True"),
    "dropout nothing": ((48, 4), {"dropout": None}, r"dropout must be a number in \[0, 1\), got None"),
    "theta a bool": ((48, 4), {"rope_theta": True}, r"rope_theta must be a positive finite number, got True"),
    "eps nothing": ((48, 4), {"norm_eps": None}, r"norm_eps must be a positive finite number, got None"),
    "causal no bool": ((48, 4), {"causal": "no"}, r"causal must be True or False, got 'no', a str"),
    "interleaved no bool": ((48, 4), {"rope_interleaved": 1}, r"rope_interleaved must be True or False, got 1"),
    "a dtype for integers": (
        (48, 4),
        {"dtype": torch.int32},
        r"dtype is torch\.int32, expected None or one of float32",
    ),
    "a complex dtype": ((48, 4), {"dtype": torch.complex64}, r"dtype is torch\.complex64, expected None or one of"),
    "a float8": ((48, 4), {"dtype": torch.float8_e4m3fn}, r"dtype is torch\.float8_e4m3fn, expected None or one of"),
    "a save set of flags": (
        (48, 4),
        {"save": SaveSet("mine", qkv=True)},
        r"save=SaveSet\(name='mine'.* does not exist; expected one of 'all'",
    ),
    "a save set of other flags": ((48, 4), {"save": SaveSet("all")}, r"save=SaveSet\(name='all'.* does not exist"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options(case):
    args, options, message = case
    with pytest.raises(ValueError, match=message):
        pyckpt.CkptTransformerBlock(*args, **options)


def test_a_dtype_by_its_name_is_refused():
    for make in (pyckpt.CkptTransformerBlock, lambda *sizes, **options: pyckpt.CkptCausalLM(9, 1, *sizes, **options)):
        with pytest.raises(TypeError, match=r"dtype must be None or a torch\.dtype, as torch\.bfloat16, got 'float32'"):
            make(48, 4, dtype="float32")
        with pytest.raises(ValueError, match=r"dtype is torch\.int32, expected None or one of float32"):
            make(48, 4, dtype=torch.int32)


def test_numbers_of_every_kind_are_options():
    numbers = {"softcap": 2.0, "attention_scale": 0.5, "norm_eps": 0.25, "dropout": 0.5, "rope_theta": 500.0}
    sizes = {"n_kv_heads": 2, "d_ff": 72, "window": 3, "rope_dim": 4}
    want = pyckpt.CkptTransformerBlock(48, 4, **numbers, **sizes, tile=8)
    for as_float, as_int in ((np.float32, np.int64), (torch.tensor, torch.tensor)):
        given = {n: as_float(v) for n, v in numbers.items()} | {n: as_int(v) for n, v in sizes.items()}
        block = pyckpt.CkptTransformerBlock(as_int(48), as_int(4), **given, tile=as_int(8))
        assert (block.spec, block.spec_text, block.tile) == (want.spec, want.spec_text, 8)


def test_the_save_set_that_a_block_says_may_be_given_to_it():
    for given in (*pyckpt.SAVE_SETS, *map(save_set, pyckpt.SAVE_SETS)):
        block = make_block(save=given)
        name = block.save
        block.save = block.save
        assert block.save == name == (given if isinstance(given, str) else given.name)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"v_head_dim": True}, ValueError, "v_head_dim must be a positive int, or None for head_dim, got True"),
        ({"v_head_dim": 2.0}, ValueError, "v_head_dim must be a positive int"),
        ({"scale": "1"}, TypeError, "scale must be None or a positive number, got '1'"),
        ({"scale": True}, TypeError, "scale must be None or a positive number, got True"),
        ({"causal": "no"}, ValueError, "causal must be True or False, got 'no'"),
        ({"softcap": torch.tensor(1.0, requires_grad=True)}, ValueError, "softcap gets no gradient here"),
    ],
)
def test_bad_options_of_a_generic_block(options, error, message):
    with pytest.raises(error, match=message):
        pyckpt.CkptGenericBlock(nn.Linear(8, 8), nn.Linear(8, 8), 8, 2, **options)


def test_positions_may_be_one_row():
    x, positions = make_input(packed=False)[0], torch.arange(25).flip(0)
    block = make_block()
    assert torch.equal(block(x, positions[None]), block(x, positions))
    x, cu = make_input(packed=True)
    positions = torch.arange(x.shape[0]).flip(0)
    assert torch.equal(block(x, positions[None], cu), block(x, positions, cu))
    with pytest.raises(ValueError, match=r"positions have shape \(2, 25\), expected \(50,\)"):
        block(x, positions.view(2, 25), cu)
    stack, stream = pyckpt.CkptTransformer([block]), pyckpt.Stream(7)
    assert torch.equal(stack(x, positions[None], cu, stream=stream), stack(x, positions, cu, stream=stream))
    model, tokens = lm(), torch.randint(0, 20, (x.shape[0],))
    for options in ({}, {"stream": stream}):
        losses = [model.loss(tokens, None, p, cu, **options) for p in (positions, positions[None])]
        assert torch.equal(*losses)


def test_nested_activations_are_refused():
    with pytest.raises(ValueError, match="x is a nested tensor, expected a dense one"):
        make_block()(torch.nested.nested_tensor([torch.randn(3, 48), torch.randn(2, 48)]))


def test_attributes_are_checked_and_left_as_they_were():
    block = make_block()
    with pytest.raises(ValueError, match="does not exist"):
        block.save = "nothing"
    with pytest.raises(ValueError, match="tile must be"):
        block.tile = -4
    with pytest.raises(ValueError, match="tile_bytes must be"):
        block.tile_bytes = None
    assert (block.save, block.tile, block.tile_bytes) == ("attention", None, 1 << 30)


BAD_INPUTS = {
    "rank 2 without cu_seqlens": (
        lambda x: (x[0],),
        ValueError,
        r"must be \(B, S, d_model\), got shape \(25, 48\)",
    ),
    "rank 4": (lambda x: (x[None],), ValueError, r"must be \(B, S, d_model\)"),
    "width": (lambda x: (x[..., :32],), ValueError, r"width 32 in its last dim, expected d_model=48"),
    "dtype": (
        lambda x: (x.float(),),
        ValueError,
        r"x has dtype torch\.float32 and .* has torch\.float64; convert",
    ),
    "integers": (lambda x: (x.long(),), ValueError, r"dtype torch\.int64, expected one of float32"),
    "device": (lambda x: (x.to("meta"),), ValueError, r"x is on meta and .* is on cpu; move one"),
    "empty": (lambda x: (x[:, :0],), ValueError, r"x is empty: shape \(2, 0, 48\)"),
    "no tensor": (lambda x: ([1.0],), TypeError, r"x must be a torch\.Tensor, got list"),
    "positions' shape": (
        lambda x: (x, torch.arange(7)),
        ValueError,
        r"positions have shape \(7,\), expected",
    ),
    "positions' dtype": (lambda x: (x, torch.rand(25)), ValueError, r"positions have dtype torch\.float32"),
    "cu_seqlens with rank 3": (
        lambda x: (x, None, torch.tensor([0, 25], dtype=torch.int32)),
        ValueError,
        r"must be packed as \(T, d_model\)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_inputs(case):
    make, error, message = case
    x, _ = make_input(packed=False)
    with pytest.raises(error, match=message):
        make_block()(*make(x))


BAD_CU_SEQLENS = {
    "int64": (torch.tensor([0, 50]), r"dtype torch\.int64, expected int32"),
    "descending": (
        torch.tensor([0, 30, 20, 50], dtype=torch.int32),
        r"must not descend: entry 2 is 20, after 30",
    ),
    "short": (
        torch.tensor([0, 20, 49], dtype=torch.int32),
        r"end at the number of tokens, 50; it goes from 0 to 49",
    ),
    "long": (
        torch.tensor([0, 20, 51], dtype=torch.int32),
        r"end at the number of tokens, 50; it goes from 0 to 51",
    ),
    "late start": (torch.tensor([1, 50], dtype=torch.int32), r"begin with 0 .* goes from 1 to 50"),
    "one entry": (torch.tensor([0], dtype=torch.int32), r"at least 2 entries"),
    "matrix": (torch.zeros(2, 2, dtype=torch.int32), r"one-dimensional"),
    "list": ([0, 50], r"must be a torch\.Tensor, got list"),
}


@pytest.mark.parametrize("case", BAD_CU_SEQLENS.values(), ids=BAD_CU_SEQLENS.keys())
def test_bad_cu_seqlens(case):
    cu, message = case
    x, _ = make_input(packed=True)
    with pytest.raises((ValueError, TypeError), match=message):
        make_block()(x, cu_seqlens=cu)


def test_inner_layers_that_were_replaced_are_noticed():
    """An adapter put inside would be ignored by the block's kernels: an error, not a silently wrong result."""
    block = make_block()
    x, _ = make_input(packed=False)
    block.self_attn.q_proj.lora_A = nn.Parameter(torch.zeros(2, 48, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"q_proj\.lora_A added or missing"):
        block(x)


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * super().forward(x)


def test_an_inner_layer_of_another_class_is_noticed():
    """Its parameters have the names and shapes of the one that was there, and nothing would call it."""
    block, (x, _) = make_block(), make_input(packed=False)
    block.mlp.up_proj = ScaledLinear(48, 72, bias=False, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"mlp\.up_proj of this CkptTransformerBlock is a ScaledLinear"):
        block(x)
    # Another class with the same call, as FSDP2 makes them.
    block.mlp.up_proj.__class__ = type("FSDPLinear", (nn.Linear,), {})
    block(x)


@pytest.mark.parametrize("save", ["attention", "all"])
def test_an_inner_layer_of_another_shape_is_noticed(save):
    block, (x, _) = make_block(save=save), make_input(packed=False)
    block.mlp = make_block(d_ff=40).mlp
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight has shape \(40, 48\), expected \(72, 48\)"):
        block(x)


def test_a_norm_without_values_is_noticed():
    """PyTorch multiplies by a tensor on the meta device in place, does nothing, and says nothing."""
    block, (x, _) = make_block(), make_input(packed=False)
    block.input_layernorm.to("meta")
    with pytest.raises(ValueError, match=r"x is on cpu and input_layernorm\.weight is on meta"):
        block(x)


def test_a_generic_block_without_values_is_refused():
    block = pyckpt.CkptGenericBlock(nn.Linear(16, 48, device="meta"), nn.Linear(16, 16, device="meta"), 16, 2)
    with pytest.raises(ValueError, match="on the meta device, where a CkptGenericBlock cannot run"):
        block(torch.empty(1, 4, 16, device="meta"))


def test_functions_give_shapes_of_tensors_without_values():
    q, k, v = (torch.empty(2, 6, heads, width, device="meta") for heads, width in ((4, 8), (2, 8), (2, 5)))
    o, lse = pyckpt.attention(q, k, v, return_lse=True)
    assert o.is_meta and o.shape == (2, 6, 4, 5) and lse.shape == (2, 4, 6)
    cu = torch.empty(3, dtype=torch.int32, device="meta")
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    assert pyckpt.attention(q, k, v, cu_seqlens=cu, cu_seqlens_k=cu).shape == (12, 4, 5)
    x, weight = torch.empty(2, 6, 8, device="meta"), torch.empty(50, 8, device="meta", requires_grad=True)
    target = torch.empty(2, 6, dtype=torch.int64, device="meta")
    assert pyckpt.linear_cross_entropy(x, weight, target, reduction="none").shape == (2, 6)
    pyckpt.linear_cross_entropy(x, weight, target).backward()
    assert weight.grad.shape == (50, 8)
    with pytest.raises(ValueError, match="labels are on meta, x is on cpu"):
        pyckpt.linear_cross_entropy(torch.empty(2, 6, 8), torch.empty(50, 8), target)


def test_unlike_blocks_do_not_stack():
    with pytest.raises(ValueError, match="block 1 has d_model=32, the first one has 48"):
        pyckpt.CkptTransformer([make_block(), pyckpt.CkptTransformerBlock(32, 4)])
    with pytest.raises(TypeError, match="block 0 is a Linear"):
        pyckpt.CkptTransformer([nn.Linear(3, 3)])
    with pytest.raises(ValueError, match="at least one block"):
        pyckpt.CkptTransformer([])


@pytest.mark.parametrize("segments", [0, -1, "half", 2.0, True])
def test_bad_segments(segments):
    with pytest.raises(ValueError, match="segments must be None, 'sqrt' or a positive int"):
        pyckpt.CkptTransformer([make_block()], segments)


def lm() -> pyckpt.CkptCausalLM:
    return pyckpt.CkptCausalLM(20, 1, 16, 2, d_ff=16)


BAD_TOKENS = {
    "too large": (torch.tensor([[1, 20]]), None, r"token 20 is out of range: expected 0 to 19"),
    "negative": (torch.tensor([[1, -1]]), None, r"token -1 is out of range"),
    "rank": (torch.tensor([1, 2]), None, r"tokens must be \(B, S\), got shape \(2,\)"),
    "floats": (torch.rand(1, 4), None, r"tokens have dtype torch\.float32"),
    "empty": (torch.zeros(1, 0, dtype=torch.long), None, r"tokens are empty"),
    "one token": (torch.tensor([[1]]), None, r"a sequence of one token predicts nothing"),
    "label too large": (
        torch.tensor([[1, 2]]),
        torch.tensor([[1, 20]]),
        r"label 20 is out of range: .* or -100",
    ),
    "label negative": (torch.tensor([[1, 2]]), torch.tensor([[1, -1]]), r"label -1 is out of range"),
    "labels' shape": (torch.tensor([[1, 2]]), torch.tensor([[1]]), r"labels have shape \(1, 1\), expected"),
    "labels' dtype": (torch.tensor([[1, 2]]), torch.rand(1, 2), r"labels have dtype torch\.float32"),
}


@pytest.mark.parametrize("case", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
def test_bad_tokens(case):
    tokens, labels, message = case
    with pytest.raises(ValueError, match=message):
        lm().loss(tokens, labels)


@pytest.mark.parametrize("name", ["vocab_size", "n_layers"])
def test_bad_sizes_of_the_model(name):
    sizes = {"vocab_size": 20, "n_layers": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a positive int, got 0"):
        pyckpt.CkptCausalLM(**sizes, d_model=16, n_heads=2)


@pytest.mark.parametrize("what", ["block", "rms_norm", "glu", "attention", "linear_cross_entropy"])
def test_a_batch_of_gradients_is_refused_in_words(what):
    """As vmap brings it; of its own it says that some op in place cannot run."""
    block, x = make_block(), make_input(False)[0].requires_grad_()
    heads, target = x.view(*x.shape[:2], 4, -1), torch.zeros(x.shape[:2], dtype=torch.long)
    y = {
        "block": lambda: block(x),
        "rms_norm": lambda: pyckpt.rms_norm(x),
        "glu": lambda: torch.ops.pyckpt.glu_fwd(x, x * 2, "swiglu"),
        "attention": lambda: pyckpt.attention(heads, heads, heads),
        "linear_cross_entropy": lambda: pyckpt.linear_cross_entropy(x, torch.randn(7, x.shape[-1]).double(), target),
    }[what]()
    with pytest.raises(RuntimeError, match="takes one gradient at a time"):
        torch.autograd.grad(y, x, torch.randn(3, *y.shape, dtype=y.dtype), is_grads_batched=True)


def test_a_low_precision_x_under_autocast():
    """As a linear layer before the block makes it there."""
    block, x = make_block().float(), make_input(False)[0].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().mean().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"or run under torch\.autocast"):
        block(x)


def test_a_compiled_blocks_second_derivative_is_refused():
    """It was taken for 0 by a compiler that leaves autograd as it is."""
    torch.compiler.reset()
    block, x = make_block(), make_input(False)[0].requires_grad_()
    y = torch.compile(block, backend="eager")(x)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
