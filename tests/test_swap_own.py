"""Layers of classes that nobody knows: found in lists of modules, run again as a whole, attention's output kept."""

from __future__ import annotations

import copy
import gc
import importlib
import random
import types
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt import measure

WIDTH, HEADS, LAYERS, WORDS, SEQ = 32, 4, 3, 61, 13
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def heads_of(t: Tensor) -> Tensor:
    return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """As GPT-2 has it, with one projection."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.p, self.drop = dropout, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.c_attn(x).chunk(3, dim=-1))
        p = self.p if self.training else 0.0
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.drop(self.c_proj(o.transpose(1, 2).flatten(2)))


def mlp(dropout: float = 0.0) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout))


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = CausalSelfAttention(dropout), mlp(dropout)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TransformerBlock(nn.Module):
    """Calls attention itself, and is handed RoPE's tables and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.mlp = mlp()

    def forward(self, x: Tensor, cos: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x)
        q, k, v = (heads_of(w(h)) for w in (self.wq, self.wk, self.wv))
        q, k = (t * cos for t in (q, k))
        x = x + self.wo(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Ours(CausalSelfAttention):
    """By pyckpt's attention, whose dropout has a seed of its own."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in self.c_attn(x).chunk(3, dim=-1))
        o = pyckpt.attention(q, k, v, window=5, dropout=0.1, seed=3)
        return self.drop(self.c_proj(o.flatten(2)))


class OursBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Ours(0.2)


class VisionBlock(nn.Module):
    """With PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = (
            nn.LayerNorm(WIDTH),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
            mlp(),
        )

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        h = self.norm(x)
        x = x + self.mix(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


class Model(nn.Module):
    """A causal language model of these layers in a list of this kind."""

    def __init__(self, layers: list[nn.Module], kind: Any = nn.ModuleList) -> None:
        super().__init__()
        self.wte, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = kind({str(i): m for i, m in enumerate(layers)}) if kind is nn.ModuleDict else kind(layers)
        cos = torch.cos(torch.arange(SEQ)[:, None] / torch.arange(1, WIDTH // HEADS + 1))
        self.register_buffer("cos", cos)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.wte(ids)
        rest = (self.cos, mask) if any(isinstance(m, TransformerBlock) for m in self.layers.children()) else ()
        for layer in self.layers.children():
            x = layer(x, *rest)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def make_ids(batch: int = 2) -> Tensor:
    return torch.randint(WORDS, (batch, SEQ))


def step(model: nn.Module, *args: Any) -> dict[str, Tensor]:
    """The loss and all gradients; random numbers start anew."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    model.zero_grad()
    loss = model(*args)
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


MODELS: dict[str, Any] = {
    "block": lambda: Model([Block() for _ in range(LAYERS)]),
    "dropout": lambda: Model([Block(0.2) for _ in range(LAYERS)]),
    "inline": lambda: Model([TransformerBlock() for _ in range(LAYERS)], nn.ModuleDict),
    "ours": lambda: Model([OursBlock() for _ in range(LAYERS)]),
    "vision": lambda: Model([VisionBlock() for _ in range(LAYERS)], lambda layers: nn.Sequential(*layers)),
    "torch": lambda: Model([nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True) for _ in range(LAYERS)]),
}


@pytest.mark.parametrize("save", ["attention", "input"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits(name, save, monkeypatch):
    if name == "torch":
        own = nn.TransformerDecoderLayer.forward
        monkeypatch.setattr(nn.TransformerDecoderLayer, "forward", lambda self, x: own(self, x, 2 * x))
    model, ids = MODELS[name](), make_ids()
    before = step(model, ids)
    report = pyckpt.swap(model, save)
    assert [e.path for e in report.entries] == ["checkpointed"] * LAYERS
    assert ("attention's output are kept" in report.entries[0].why) == (save == "attention")
    assert_same_bits(step(model, ids), before)
    pyckpt.unswap(model)
    assert_same_bits(step(model, ids), before)


def flash_runs(forward: Any) -> tuple[int, int]:
    """How often attention's forward and its backward run in a step."""
    runs = [0, 0]

    def count(backward: bool) -> Any:
        def add(*args: Any, **kwargs: Any) -> int:
            runs[backward] += 1
            return 0

        return add

    mapping = {FLASH: count(False), FLASH_BACKWARD: count(True)}
    with FlopCounterMode(display=False, custom_mapping=mapping):
        forward().backward()
    return runs[0], runs[1]


@pytest.mark.parametrize(("save", "forwards"), [("attention", LAYERS), ("input", 2 * LAYERS)])
def test_attention_runs_once(save, forwards):
    model, ids = MODELS["block"](), make_ids()
    pyckpt.swap(model, save)
    assert flash_runs(lambda: model(ids)) == (forwards, LAYERS)


def test_attention_of_transformers_layers_that_cannot_be_cut_runs_once():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
    options = {"new_decoder_architecture": True, "attn_implementation": "sdpa"}
    model = transformers.FalconForCausalLM(transformers.FalconConfig(**sizes, **options))
    ids = make_ids()
    assert [e.path for e in pyckpt.swap(model).entries[:2]] == ["checkpointed"] * 2
    assert flash_runs(lambda: model(input_ids=ids, labels=ids).loss) == (2, 2)


@torch.library.custom_op("_flash_attn2_0a1b2c::_flash_attn_forward", mutates_args=())
def flash_of_the_hub(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    HubAttention.runs += 1
    scores = q @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


class HubFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        o, lse = flash_of_the_hub(q, k, v, dropout_p)
        ctx.save_for_backward(q, k, v, lse)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q, k, v, lse = ctx.saved_tensors
        p = (q @ k.transpose(-1, -2) - lse.unsqueeze(-1)).exp()
        dp = do @ v.transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ do, None


class HubAttention(CausalSelfAttention):
    """By flash-attn as transformers takes it from the hub, whose ops have a namespace for each build."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(HubFlash.apply(q, k, v, self.p).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("dropout", "runs"), [(0.0, LAYERS), (0.25, 2 * LAYERS)])
def test_attention_of_the_hub_runs_once(dropout, runs, monkeypatch):
    """Where it drops something it draws random numbers, and runs again."""
    model, ids = MODELS["block"](), make_ids()
    for layer in model.layers:
        layer.attn = HubAttention(dropout)
    before = step(model, ids)
    pyckpt.swap(model)
    monkeypatch.setattr(HubAttention, "runs", 0)
    assert_same_bits(step(model, ids), before)
    assert HubAttention.runs == runs


def test_what_is_kept():
    """Of each layer its input, o and lse; with "input" the first alone, as torch.utils.checkpoint does."""
    kept = {}
    for save in ("attention", "input"):
        model = MODELS["block"]()
        pyckpt.swap(model, save)
        x = torch.randn(1, SEQ, WIDTH, requires_grad=True)
        with measure.memory(model) as m:
            y = x
            for layer in model.layers:
                y = layer(y)
            m.mark("forward")
        kept[save] = m.marks["forward"].live_bytes
    token, lse = WIDTH * 4, HEADS * 4
    # Inputs of all but the first, and the output; what else lives is no more than the random numbers' states.
    assert kept["attention"] - kept["input"] == LAYERS * SEQ * (token + lse)


def test_any_number_of_backwards():
    model, ids = MODELS["dropout"](), make_ids()
    pyckpt.swap(model)
    torch.manual_seed(5)
    loss, weights = model(ids), list(model.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_and_frozen_weights():
    model, ids = MODELS["block"](), make_ids()
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1.mlp" in name)
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model, ids)
        pyckpt.swap(model)
        after = step(model, ids)
    assert_same_bits(after, before)
    assert all("layers.1.mlp" in name for name in after.keys() - {"loss"})


def test_a_mask_goes_to_the_kernel():
    model, ids = MODELS["inline"](), make_ids()
    mask = torch.rand(SEQ, SEQ) > 0.5
    mask.fill_diagonal_(True)
    before = step(model, ids, mask)
    pyckpt.swap(model)
    assert_same_bits(step(model, ids, mask), before)
    assert flash_runs(lambda: model(ids, mask)) == (LAYERS, LAYERS)


@pytest.mark.parametrize("name", ["block", "inline"])
@pytest.mark.parametrize("save", a_few(["attention", "input"], always=(0,)))
def test_compiles(name, save):
    model, ids = MODELS[name](), make_ids()
    before = step(model, ids)
    pyckpt.swap(model, save)
    after = step(torch.compile(model, backend="aot_eager", fullgraph=True), ids)
    for n, value in before.items():
        torch.testing.assert_close(after[n if n == "loss" else f"_orig_mod.{n}"], value, rtol=1e-4, atol=1e-5)


def test_compiled_functions_inside_stay_compiled():
    """Under a dispatch mode that does not say that it may be ignored they would run uncompiled."""
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model, ids = MODELS["block"](), make_ids()
    for layer in model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend=backend)
    before = step(model, ids)
    assert graphs
    torch.compiler.reset()
    graphs.clear()
    assert not pyckpt.swap(model).left
    after = step(model, ids)
    assert graphs
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], msg=name)
    model = MODELS["block"]()
    gelu = torch.compile(F.gelu, backend=backend)
    for layer in model.layers:
        layer.mlp[1] = Compiled(gelu)
    before = step(model, ids)
    torch.compiler.reset()
    graphs.clear()
    pyckpt.swap(model)
    after = step(model, ids)
    assert graphs
    assert_same_bits(after, before)


class Compiled(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_copies_are_swapped_on_their_own():
    model, ids = MODELS["block"](), make_ids()
    before = step(model, ids)
    pyckpt.swap(model)
    twin = copy.deepcopy(model)
    pyckpt.unswap(model)
    assert flash_runs(lambda: twin(ids)) == (LAYERS, LAYERS)
    assert_same_bits(step(twin, ids), before)
    pyckpt.unswap(twin)


# --- what layers keep ------------------------------------------------------------------------------------------------


class Keeping(Block):
    """Has statistics, a counter, a list, a tensor that it puts anew, and random numbers of three other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.calls, self.seen, self.last = 0, [], None
        self.generator = torch.Generator().manual_seed(3)
        self.register_buffer("usage", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = x.detach().mean()
        self.usage += 1
        self.total = self.total + self.usage
        x = x * torch.rand((), generator=self.generator) * random.random() * np.random.rand()
        return super().forward(self.norm(x.transpose(1, 2)).transpose(1, 2))


def kept_by(model: nn.Module) -> list[Any]:
    return [(m.calls, list(m.seen), m.last, m.generator.get_state()) for m in model.modules() if isinstance(m, Keeping)]


def test_what_layers_keep_is_kept_once():
    plain, ids = Model([Keeping() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    for of_plain, of_ours in zip(plain.layers, ours.layers, strict=True):  # generators are shared by deepcopy
        of_plain.generator, of_ours.generator = (torch.Generator().manual_seed(3) for _ in range(2))
    pyckpt.swap(ours)
    for _ in range(2):
        assert_same_bits(step(ours, ids), step(plain, ids))
        for (calls, seen, last, state), (calls2, seen2, last2, state2) in zip(
            kept_by(ours), kept_by(plain), strict=True
        ):
            assert (calls, seen) == (calls2, seen2) and torch.equal(last, last2) and torch.equal(state, state2)
        for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(a, b), name
    assert ours.layers[0].calls == 2


class Renaming(Block):
    """Its last attribute goes by another name after a run, with the same value."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        factor = 2.0 if hasattr(self, "fresh") else 3.0
        if hasattr(self, "fresh"):
            del self.fresh
            self.used = None
        return super().forward(x * factor)


def test_an_attribute_by_another_name_is_there_again():
    plain, ids = Model([Renaming() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)
    for m in (*plain.layers, *ours.layers):  # after the swap, which has attributes of its own
        m.fresh = None
    for _ in range(2):
        assert_same_bits(step(ours, ids), step(plain, ids))
    assert all(hasattr(m, "used") and not hasattr(m, "fresh") for m in ours.layers)


OF_A_DEVICE = torch.Generator()


class DrawingOnADevice(Block):
    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return super().forward(x * torch.rand(WIDTH, generator=OF_A_DEVICE))


def test_a_devices_generator_draws_the_same_again(monkeypatch):
    """One that stands for a GPU's, which torch.utils.checkpoint sees to by tensors that it is given itself."""
    plain, ids = Model([DrawingOnADevice() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)
    once = importlib.import_module("pyckpt.swap.once")
    monkeypatch.setattr(once, "_devices", lambda tensors: [torch.device("cuda", 1)])
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: OF_A_DEVICE.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: OF_A_DEVICE.set_state(state))
    made = []
    for model in (plain, ours):
        OF_A_DEVICE.manual_seed(5)
        made.append((step(model, ids), OF_A_DEVICE.get_state()))
    assert_same_bits(made[1][0], made[0][0])
    assert torch.equal(made[1][1], made[0][1])  # a second run leaves it as it was


def test_the_devices_on_which_a_layer_may_draw(monkeypatch):
    devices = importlib.import_module("pyckpt.swap.once")._devices
    with FakeTensorMode():
        first, second, meta = (torch.empty(2, device=d) for d in ("cuda:0", "cuda:1", "meta"))
    tensors = [torch.empty(2), first, second, meta, first]
    assert torch.cuda.is_initialized() or devices(tensors) == []  # fakes, of no GPU
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert devices(tensors) == [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.mark.parametrize("when", ["ahead", "back", "both"])
@pytest.mark.parametrize("what", ["hook", "pre-hook", "module"])
def test_the_second_run_has_the_modules_and_hooks_of_the_first(what, when):
    """Put inside a layer around the forward alone (an interpreter's hooks), or before the backward."""
    plain, ids = Model([Block() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)

    def put(model: Any) -> Any:
        block = model.layers[1]
        if what == "hook":
            return block.attn.register_forward_hook(lambda module, args, made: 3 * made).remove
        if what == "pre-hook":
            return block.mlp.register_forward_pre_hook(lambda module, args: (args[0].sin(),)).remove
        was, block.mlp = block.mlp, torch.nn.Tanh()
        return lambda: setattr(block, "mlp", was)

    def run(model: Any) -> dict[str, Tensor]:
        undo = put(model) if when != "back" else lambda: None
        loss = model(ids)
        if when == "ahead":
            undo()
        elif when == "back":
            undo = put(model)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        inside = list(model.layers[1].children())
        loss.backward()
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
        assert list(model.layers[1].children()) == inside
        if when != "ahead":
            undo()
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    assert_same_bits(run(ours), run(plain))


class Wrapped(nn.Module):
    """With a norm before and a residual around, as many have it around attention and MLP alike."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class RelPosMHA(CausalSelfAttention):
    """An attention by name alone."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(t) for t in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Conformer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = RelPosMHA()


class InParts(nn.Module):
    """A model whose layers are lists, or dicts, of what they consist of."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.wte = kind, nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(self._layer() for _ in range(LAYERS))

    def _layer(self) -> nn.Module:
        if self.kind == "dict":
            return nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "attention": CausalSelfAttention(), "ffn": mlp()})
        if self.kind == "bare sequence":
            return nn.Sequential(nn.LayerNorm(WIDTH), CausalSelfAttention(), mlp())
        parts = Wrapped(CausalSelfAttention()), Wrapped(mlp())
        return nn.Sequential(*parts) if self.kind == "sequence" else nn.ModuleList(parts)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        for layer in self.layers:
            if isinstance(layer, nn.Sequential):
                x = layer(x)
            elif isinstance(layer, nn.ModuleDict):
                x = x + layer["attention"](layer["norm"](x))
                x = x + layer["ffn"](x)
            else:
                for part in layer:
                    x = part(x)
        return x.cos().sum()


PARTS = {"list": ["0", "1"], "sequence": ["0", "1"], "dict": ["attention", "ffn"], "bare sequence": []}


@pytest.mark.parametrize("kind", PARTS)
def test_layers_that_are_lists_of_their_parts(kind):
    """Each part that has modules inside runs again, not the attention's alone."""
    model, ids = InParts(kind), make_ids()
    before = step(model, ids)
    report = pyckpt.swap(model)
    expected = [f"layers.{i}.{n}" for i in range(LAYERS) for n in PARTS[kind]] or [f"layers.{i}" for i in range(LAYERS)]
    assert [e.name for e in report.entries] == expected
    assert_same_bits(step(model, ids), before)
    pyckpt.unswap(model)
    assert_same_bits(step(model, ids), before)


def test_an_attention_of_an_abbreviated_name():
    model, ids = Model([Conformer() for _ in range(LAYERS)]), make_ids()
    before = step(model, ids)
    assert [e.name for e in pyckpt.swap(model).entries] == [f"layers.{i}" for i in range(LAYERS)]
    assert_same_bits(step(model, ids), before)


def test_a_layer_in_two_places_is_named_once():
    model = Model([Block() for _ in range(LAYERS)])
    model.again = model.layers
    assert [e.name for e in pyckpt.swap(model).entries] == [f"layers.{i}" for i in range(LAYERS)]


class Reading(Block):
    """Computes with what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.last = 0, [], {}
        self.register_buffer("usage", torch.zeros(()))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.calls += 1
        self.usage += 1.0
        self.total = self.total + self.usage
        x = x * (self.calls + self.total + len(self.seen) + self.last.pop("x", 0.0)) + self.usage
        self.seen.append(self.calls)
        self.last["x"] = x.detach().mean()
        return super().forward(x)


def test_what_layers_keep_is_there_again():
    """Several calls before the backward of each: a second run has what that call had."""
    plain, batches = Model([Reading() for _ in range(LAYERS)]), [make_ids() for _ in range(3)]
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)

    def run(model: nn.Module) -> dict[str, Tensor]:
        losses = [model(ids) for ids in batches]
        for loss in losses[::-1]:
            loss.backward()
        losses[0] = model(batches[0])  # and what is there after it is what a next call has
        losses[0].backward()
        return {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())

    assert_same_bits(run(ours), run(plain))
    assert [m.seen for m in ours.layers] == [m.seen for m in plain.layers] == [[1, 2, 3, 4]] * LAYERS


@pytest.mark.parametrize("uncompiled", [False, True])
def test_a_layer_that_compile_breaks_out_of(uncompiled):
    """PyTorch's own checkpointing runs it then, which undoes nothing; left uncompiled it is ours."""
    plain = Model([Reading() for _ in range(LAYERS)])
    ours, ids = copy.deepcopy(plain), make_ids()
    pyckpt.swap(ours)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    if not uncompiled:
        with pytest.warns(UserWarning, match="torch.compile breaks out of a layer"):
            compiled(ids)
        return
    for layer in ours.layers:
        layer.forward = torch.compiler.disable(layer.forward)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="pyckpt.swap")
        loss = compiled(ids)
    loss.backward()
    expected = step(plain, ids)
    torch.testing.assert_close(
        {n: p.grad for n, p in ours.named_parameters()}, {n: expected[n] for n, _ in ours.named_parameters()}
    )


def test_weights_of_a_functional_call():
    """`torch.func.functional_call` has them in their places for the forward alone."""
    plain, ids = Model([Block() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)
    weights = {n: torch.randn_like(p).mul_(0.1).requires_grad_() for n, p in plain.named_parameters()}

    def run(model: nn.Module) -> dict[str, Tensor]:
        loss = torch.func.functional_call(model, weights, (ids,))
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    assert_same_bits(run(ours), run(plain))
    assert_same_bits(step(ours, ids), step(plain, ids))


def test_eval_mode_since_the_forward():
    """Dropout that was there is there again."""
    plain, ids = Model([Block(0.3) for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)

    def run(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(3)
        loss = model.train()(ids)
        model.eval()
        loss.backward()
        assert not any(m.training for m in model.modules())
        return {n: p.grad for n, p in model.named_parameters()}

    assert_same_bits(run(ours), run(plain))


def test_plain_checkpointing_would_count_twice():
    """Else the test above proves nothing."""
    model, ids = Model([Keeping()]), make_ids()
    layer = model.layers[0]
    layer.forward = lambda x, own=layer.forward: checkpoint(own, x, use_reentrant=False)
    step(model, ids)
    assert layer.calls == 2 and int(layer.norm.num_batches_tracked) == 2


class Writing(Block):
    """Writes to what it is given, to part of it through a view, and to a sum that all layers are handed."""

    def forward(self, x: Tensor, total: dict[str, Tensor]) -> Tensor:
        x += self.ln_2.bias
        x[:, 1:].mul_(2.0)
        torch._foreach_add_([total["of all"]], [x.sum()])
        return super().forward(x)


class Chain(nn.Module):
    """Layers that are handed a sum. What comes of one is written to before the next takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Writing() for _ in range(LAYERS))
        for layer in self.layers:
            nn.init.normal_(layer.ln_2.bias)

    def forward(self, x: Tensor) -> Tensor:
        total, x = {"of all": torch.zeros(())}, x * 1.0
        for layer in self.layers:
            x = layer(x, total)
            x.add_(1.0)
        return x.square().sum() + total["of all"].square()


@pytest.mark.parametrize("save", ["attention", "input"])
def test_what_layers_write_to_in_place(save):
    """The second run has what the first one had; whoever holds what was handed sees one run."""
    plain, x = Chain(), torch.randn(2, SEQ, WIDTH, requires_grad=True)
    ours = copy.deepcopy(plain)
    assert len(pyckpt.swap(ours, save=save).entries) == LAYERS
    before = step(plain, x) | {"x": x.grad}
    x.grad = None
    assert_same_bits(step(ours, x) | {"x": x.grad}, before)
    loss = ours(x)  # and so has a third
    names, weights = zip(*ours.named_parameters(), strict=True)
    for _ in range(2):
        grads = torch.autograd.grad(loss, weights, retain_graph=True)
        assert_same_bits(dict(zip(names, grads, strict=True)), {n: before[n] for n in names})


class Stacked(Block):
    """As in a U-Net: half of the layers put what they make on a stack, half take it from there."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor, skips: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
        if self.up:
            return super().forward(x + skips.pop() * kwargs.pop(f"scale {len(skips)}", 0.0))
        skips.append(super().forward(x))
        return skips[-1] * 0.5


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Stacked(up) for up in (False, False, True, True))

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        kwargs = {"scale 0": 2.0, "scale 1": 3.0, "left": 1}
        for layer in self.layers:
            x = layer(x, skips, kwargs)
        assert not skips and kwargs == {"left": 1}
        return x.square().sum()


def test_lists_and_dicts_that_layers_are_handed_change_once():
    plain, x = UNet(), torch.randn(2, SEQ, WIDTH)
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)
    assert_same_bits(step(ours, x), step(plain, x))


def test_what_is_written_to_after_a_layer_ran_is_an_error():
    """As it is for a layer whose input autograd has saved; torch.utils.checkpoint would run on other values."""
    model = Model([Block() for _ in range(LAYERS)])
    pyckpt.swap(model)
    x = torch.randn(2, SEQ, WIDTH)
    y = model.layers[0](x)
    x.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = model.layers[0](x)
    with torch.no_grad():
        model.layers[0].ln_2.bias.add_(1.0)
    with pytest.raises(RuntimeError, match=r"a weight .* has been modified by an inplace operation"):
        y.sum().backward()


class Graph(Block):
    """Is handed a sparse matrix, and has one: they have no memory that others could share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mix", torch.randn(WIDTH, WIDTH).relu().to_sparse())

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        x = (
            x
            + torch.sparse.mm(near, x.flatten(1)).view_as(x)
            + torch.sparse.mm(self.mix, x.flatten(0, 1).t()).t().view_as(x)
        )
        return super().forward(x)


def test_sparse_arguments_and_buffers():
    plain, x = nn.ModuleList([Graph(), Graph()]), torch.randn(3, SEQ, WIDTH)
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)

    def run(layers: nn.ModuleList) -> dict[str, Tensor]:
        y, near = x, torch.eye(3).to_sparse().coalesce()
        for layer in layers:
            y = layer(y, near)
        y.square().sum().backward()
        return {n: p.grad for n, p in layers.named_parameters()}

    assert_same_bits(run(ours), run(plain))


def test_writing_by_what_is_no_op_is_refused():
    """By a kernel of one's own, say, which tells autograd as it should."""

    class Kernel(Block):
        def forward(self, x: Tensor) -> Tensor:
            x.detach().numpy()[:] += 1.0
            torch.autograd.graph.increment_version(x)
            return super().forward(x)

    layers = nn.ModuleList([Kernel()])
    pyckpt.swap(layers)
    with pytest.raises(RuntimeError, match="an inplace operation that is no op"):
        layers[0](torch.randn(2, SEQ, WIDTH))


def test_writing_to_what_two_arguments_share_is_refused():
    class Shared(Block):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x += y
            return super().forward(x)

    layers = nn.ModuleList([Shared()])
    pyckpt.swap(layers)
    x = torch.randn(2, SEQ, WIDTH)
    assert layers[0](x, x).requires_grad  # one and the same
    with pytest.raises(RuntimeError, match="whose memory is another one's too"):
        layers[0](x, x[:, :1])


def test_hooks_inside_leave_a_layer_as_it_is():
    model, ids, seen = MODELS["block"](), make_ids(), []
    model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    report = pyckpt.swap(model)
    assert [e.path for e in report.entries] == ["checkpointed", "original", "checkpointed"]
    assert "mlp has forward hooks" in report.left[0].why
    step(model, ids)
    assert len(seen) == 1


@pytest.mark.parametrize("save", ["attention", "input"])
def test_the_second_run_takes_the_attention_of_the_first(save):
    """As `sdpa_kernel` chose it around the model's call, or around the backward."""
    plain, ids = Model([Block() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours, save=save)

    def run(model: nn.Module, forward: SDPBackend, backward: SDPBackend) -> dict[str, Tensor]:
        model.zero_grad()
        with sdpa_kernel(forward):
            loss = model(ids)
        with sdpa_kernel(backward):
            loss.backward()
            assert not torch.backends.cuda.math_sdp_enabled() or backward == SDPBackend.MATH
        return {n: p.grad for n, p in model.named_parameters()}

    kernels = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
    for choice in (kernels, kernels[::-1]):
        assert_same_bits(run(ours, *choice), run(plain, *choice))


class Catching(Block):
    """As what generates code and tells more of its errors does (einx)."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        try:
            return super().forward(x)
        except Exception as error:
            raise ValueError(f"generated code failed: {error}") from error


def test_the_end_of_a_second_run_passes_through_what_catches_errors():
    plain, ids = Model([Catching() for _ in range(LAYERS)]), make_ids()
    ours = copy.deepcopy(plain)
    pyckpt.swap(ours)
    assert_same_bits(step(ours, ids), step(plain, ids))
    del ours.layers[0].mlp  # an error of its own
    with pytest.raises(ValueError, match="generated code failed: "):
        ours(ids)


@pytest.mark.parametrize("kind", [Block, Catching])
def test_a_second_run_leaves_nothing_behind(kind):
    """Not even until the garbage is collected: an error's traceback holds frames, and those what was made in them."""
    made: list[weakref.ref[Tensor]] = []

    class Watched(kind):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            made.append(weakref.ref(x))
            x = x * 1.0
            made.append(weakref.ref(x))
            return super().forward(x)

    model, ids = Model([Watched() for _ in range(LAYERS)]), make_ids()
    pyckpt.swap(model)
    gc.collect()
    gc.disable()
    try:
        model(ids).backward()
        assert len(made) == 4 * LAYERS and not any(t() is not None for t in made)
    finally:
        gc.enable()


# --- which modules are layers ----------------------------------------------------------------------------------------


class Stage(nn.Module):
    """Layers in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attention_pool = nn.ModuleList([Block(), Block()]), CausalSelfAttention()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.attention_pool(x)


class TwoAttentions(nn.Module):
    """Its attentions are in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.attns, self.mlp = nn.ModuleList([CausalSelfAttention(), CausalSelfAttention()]), mlp()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        for attn in self.attns:
            x = x + attn(x)
        return x + self.mlp(x)


class ResidualAttentionBlock(Block):
    """By its name both."""


class Listed(nn.ModuleList):
    """A layer that its model puts together."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(modules)

    def forward(self, x: Tensor) -> Tensor:
        attn, mlp, norm = self
        return norm(x + attn(x) + mlp(x))


class Turn(nn.ModuleList):
    """A sublayer that its model puts together."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


class Mixer(nn.Module):
    """Calls attention by a function of its module, which nothing but that function's code tells."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x + self.proj(attend(x, x, x))


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (lambda: [Stage(), Stage()], ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]),
        (lambda: [TwoAttentions(), Block()], ["0", "1"]),
        (lambda: [ResidualAttentionBlock()], ["0"]),
        (lambda: [Mixer(), mlp(), nn.LayerNorm(WIDTH)], ["0"]),
        (
            lambda: [Listed(CausalSelfAttention(), mlp(), nn.LayerNorm(WIDTH)) for _ in range(2)],
            ["0.0", "0.1", "1.0", "1.1"],
        ),
        (
            lambda: [
                *(Turn([nn.LayerNorm(WIDTH), m, nn.Identity()]) for m in (CausalSelfAttention(), mlp(), Stage())),
                Turn([nn.LayerNorm(WIDTH), mlp(), nn.ReLU()]),
                Turn([mlp(), mlp()]),
            ],
            ["0.1", "1.1", "2.1.blocks.0", "2.1.blocks.1"],
        ),
        (lambda: [nn.TransformerEncoderLayer(WIDTH, HEADS, batch_first=True), Block()], ["0", "1"]),
        (lambda: [CausalSelfAttention(), mlp(), CausalSelfAttention(), mlp(), nn.ReLU()], ["0", "1", "2", "3"]),
    ],
    ids=[
        "stages",
        "two attentions",
        "named both",
        "by a function",
        "no module",
        "in turn",
        "beside known layers",
        "flat",
    ],
)
def test_which_modules_are_layers(layers, found):
    model, ids = Model(layers()), make_ids()
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.layers):
        pyckpt.swap(model.eval())
    else:
        before = step(model, ids)
        pyckpt.swap(model)
        assert_same_bits(step(model, ids), before)
    names = [n for n, m in model.named_modules() if "forward" in m.__dict__]
    assert names == [f"layers.{n}" for n in found]


def test_nothing_to_swap():
    """No attention, our own blocks, and layers that PyTorch checkpoints already."""
    none, ours = r"no transformer layer was found\n.*by the attention in them", "its blocks are pyckpt's own"
    for layer, said in (
        (mlp(), none),
        (pyckpt.CkptTransformerBlock(WIDTH, HEADS), ours),
        (checkpoint_wrapper(Block()), r"layers\.0 \(Block\): PyTorch's checkpoint_wrapper runs it again already"),
    ):
        with pytest.raises(ValueError, match=said):
            pyckpt.swap(Model([layer]))


def test_streaming_takes_layers_that_are_cut():
    with pytest.raises(ValueError, match="this model has none that can be streamed"):
        pyckpt.swap(MODELS["block"](), stream=pyckpt.Stream(tile=8))
    assert pyckpt.swap(MODELS["block"](), segments=2).entries[0].why.endswith("; not in segments")


# --- classes derived from PyTorch's encoder layer -----------------------------------------------------------------


class Derived(nn.TransformerEncoderLayer):
    """With an attention of its own, which scales what the layer's gives."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.5))

    def _sa_block(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return self.scale * super()._sa_block(x, *rest, **options)


def parametrized() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True)
    nn.utils.parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    return layer


@pytest.mark.parametrize("make", [Derived, parametrized])
def test_encoder_layers_of_other_kinds_run_again_as_a_whole(make):
    """The same bits, dropout among them, and less is kept."""
    model, ids, saved = Model([make() for _ in range(2)]), make_ids(), []
    with measure.memory(model) as m:
        before = step(model, ids)
    saved.append(m.saved_bytes)
    report = pyckpt.swap(model)
    assert [e.path for e in report.entries] == ["checkpointed"] * 2
    with measure.memory(model) as m:
        assert_same_bits(step(model, ids), before)
    saved.append(m.saved_bytes)
    assert saved[1] < saved[0] / 2


def test_a_layer_that_was_compiled_by_itself_is_told_of():
    for layers in ([torch.compile(Block())], [Block()]):
        if not hasattr(layers[0], "_orig_mod"):
            layers[0].attn = torch.compile(layers[0].attn)
        with pytest.raises(ValueError, match=r"was compiled by itself \(torch.compile\); swap the model first"):
            pyckpt.swap(Model(layers))


def test_decoder_layers_in_a_model_without_a_config():
    """No model of transformers is around them: nothing is said of one, and one layer may stand in several places."""
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    model.layers = nn.ModuleList([layer, layer])
    report = pyckpt.swap(model, segments=2)
    assert {e.path for e in report.entries} == {"checkpointed"}
    assert all(e.why.endswith("kept: a class of torch; not in segments") for e in report.entries)


# --- where layers stand -----------------------------------------------------------------------------------------------


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return torch.softmax(q @ k.mT, -1) @ v


class AttentionOfHeads(nn.Module):
    """Heads that are modules, and named after attention too."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(type("AttentionHead", (Head,), {})() for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], -1)


class Beside(nn.Module):
    """Attentions and MLPs in lists of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(CausalSelfAttention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(mlp() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for attention, then in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + then(x)
        return x


class Middle(nn.Module):
    """A block in a list, and one of its class that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.middle = nn.ModuleList(Block() for _ in range(2)), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.middle(self.blocks[0](x)))


class Named(nn.Module):
    """The attentions of its blocks stand in a list as well."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [Block() for _ in range(LAYERS)]
        self.attentions, self.blocks = nn.ModuleList(b.attn for b in blocks), nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


def in_turns() -> nn.Module:
    return nn.Sequential(*(Wrapped(m()) for _ in range(LAYERS) for m in (CausalSelfAttention, mlp)))


def of_heads() -> nn.Module:
    def part(inner: nn.Module) -> nn.Module:
        return Wrapped(nn.Sequential(nn.LayerNorm(WIDTH), inner))

    return nn.Sequential(*(nn.Sequential(part(AttentionOfHeads()), part(mlp())) for _ in range(LAYERS)))


PLACES: dict[str, tuple[Any, list[str]]] = {
    "beside": (Beside, [f"{name}.{i}" for name in ("attentions", "mlps") for i in range(LAYERS)]),
    "middle": (Middle, ["blocks.0", "blocks.1", "middle"]),
    "named": (Named, [f"blocks.{i}" for i in range(LAYERS)]),
    "alone": (Alone, ["layer"]),
    "in turns": (in_turns, [str(i) for i in range(2 * LAYERS)]),
    "of heads": (of_heads, [f"{i}.{n}" for i in range(LAYERS) for n in range(2)]),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_layers_stand(name):
    """Nothing with attention, or beside it, is left, and nothing runs three times."""
    make, expected = PLACES[name]
    model, x = make(), torch.randn(2, SEQ, WIDTH, requires_grad=True)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        y = model(x)
        y.cos().sum().backward()
        return {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with FlopCounterMode(display=False) as before:
        truth = run()
    assert sorted(e.name for e in pyckpt.swap(model).entries) == sorted(expected)
    with FlopCounterMode(display=False) as after:
        assert_same_bits(run(), truth)
    assert after.get_total_flops() <= 4 / 3 * before.get_total_flops()


class ByPlace(Block):
    """Any number of arguments, and then some by name alone."""

    def forward(self, x: Tensor, *skips: Tensor, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        return super().forward(x) * scale + sum(skips)


class ByPlaceAlone(Block):
    """A further argument may have the name of the first."""

    def forward(self, x: Tensor, /, **more: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + more["x"]


@pytest.mark.parametrize("kind", [ByPlace, ByPlaceAlone])
def test_arguments_by_place(kind):
    layers, x = nn.ModuleList(kind() for _ in range(2)), torch.randn(2, SEQ, WIDTH, requires_grad=True)

    def run() -> dict[str, Tensor]:
        y = x
        for layer in layers:
            y = layer(y, x, x, scale=0.5) if kind is ByPlace else layer(y, x=x)
        return dict(enumerate(torch.autograd.grad(y.cos().sum(), [x, *layers.parameters()])))  # type: ignore[arg-type]

    before = run()
    assert not pyckpt.swap(layers).left
    assert_same_bits(run(), before)


def test_a_forward_of_its_own_inside_a_layer():
    """As somebody has written it for the module: it is called again, which its class's own would be."""
    model, ids = MODELS["block"](), make_ids()
    inner = model.layers[1].mlp
    inner.forward = types.MethodType(lambda self, x: 2.0 * type(self).forward(self, x), inner)
    before = step(model, ids)
    assert not pyckpt.swap(model).left
    assert_same_bits(step(model, ids), before)


def test_what_pytorchs_wrapper_checkpoints_is_left_and_told():
    model, ids = MODELS["block"](), make_ids()
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    before = step(model, ids)
    report = pyckpt.swap(model)
    assert [e.name for e in report.left] == ["layers.1"]
    assert "checkpoint_wrapper runs it again already" in report.left[0].why
    assert_same_bits(step(model, ids), before)
    layers = nn.ModuleList(checkpoint_wrapper(nn.TransformerEncoderLayer(WIDTH, HEADS)) for _ in range(2))
    with pytest.raises(ValueError, match=r"0 \(TransformerEncoderLayer\): PyTorch's checkpoint_wrapper"):
        pyckpt.swap(layers)


@pytest.mark.parametrize("kind", ["own", "encoder", "Llama"])
def test_a_checkpoint_around_swapped_layers_is_told_of(kind):
    if kind == "Llama":
        swap_models = pytest.importorskip("swap_models")
        pytest.importorskip("transformers")
        model, batch = swap_models.make_model("Llama"), swap_models.make_batch("plain")
        layers, run = model.model.layers, lambda: swap_models.step(model, batch)
    elif kind == "own":
        model, ids = MODELS["block"](), make_ids()
        layers, run = model.layers, lambda: step(model, ids)
    else:
        layers, x = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, HEADS, dropout=0.0)]), torch.randn(3, 2, WIDTH)
        model, run = layers, lambda: dict(enumerate(torch.autograd.grad(layers[0](x).sum(), layers.parameters())))
    pyckpt.swap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = run()
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    with pytest.warns(UserWarning, match="recomputes already, and runs once more than it has to"):
        after = run()
    assert_same_bits(dict(enumerate(after.values())), dict(enumerate(before.values())))
