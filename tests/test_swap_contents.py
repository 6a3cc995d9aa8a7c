"""What a layer of a class of its own is given, has and draws: the run in the backward finds it as it was.

Gradients are the same bits as without a swap, and what is kept is as after one run.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import importlib
import random
import types
import weakref
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyckpt

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).movedim(-3, 0).transpose(2, 3)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.changed(o).transpose(1, 2).flatten(2))

    def changed(self, o: Tensor) -> Tensor:
        return o


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x).tanh()


class Model(nn.Module):
    """Its loss calls the blocks one after the other, as `call` does with one, and reads x from what comes out."""

    def __init__(self, kind: type[Block], start: Any = lambda x: x, end: Any = lambda x: x) -> None:
        super().__init__()
        self.blocks, self._start, self._end = nn.ModuleList(kind() for _ in range(3)), start, end

    def forward(self, x: Tensor) -> Tensor:
        given = self._start(x)
        for block in self.blocks:
            given = block(given)
        return self._end(given).square().mean()


def assert_as_without_a_swap(model: Model) -> nn.Module:
    """Two steps; the swapped model is given back."""
    plain = copy.deepcopy(model.double())
    report = pyckpt.swap(model)
    assert [e.path for e in report.entries] == ["checkpointed"] * 3
    for _ in range(2):
        x, state = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.get_rng_state()
        losses = []
        for m in (plain, model):
            torch.set_rng_state(state)
            losses.append(m(x))
            losses[-1].backward()
        assert torch.equal(*losses)
        for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b), name
    return model


# --- what it is given -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class State:
    x: Tensor


@dataclasses.dataclass(slots=True)
class Slots:
    x: Tensor


class Own(dict):
    pass


class Frozen:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class ByAttribute(Block):
    def forward(self, state: Any) -> Any:
        state.x = super().forward(state.x)
        return state


class InPlace(Block):
    def forward(self, state: Any) -> Any:
        state.x += self.attn(self.norm(state.x * 1))
        state.x = state.x + self.mlp(state.x).tanh()
        return state


class ByKey(Block):
    def forward(self, state: Any) -> Any:
        state["x"] = super().forward(state["x"])
        return state


@pytest.mark.parametrize("kind", [ByAttribute, InPlace])
@pytest.mark.parametrize("make", [State, Slots, Frozen, lambda x: types.SimpleNamespace(x=x)])
def test_an_object_that_it_changes(make, kind):
    assert_as_without_a_swap(Model(kind, lambda x: make(x * 1), lambda state: state.x))


@pytest.mark.parametrize(
    "make", [dict, collections.OrderedDict, lambda: collections.defaultdict(list), Own, collections.UserDict]
)
def test_a_mapping_that_it_changes(make):
    def start(x: Tensor) -> Any:
        state = make()
        state["x"] = x
        return state

    assert_as_without_a_swap(Model(ByKey, start, lambda state: state["x"]))


def test_a_queue_that_it_adds_to():
    class Seen(Block):
        def forward(self, seen: Any) -> Any:
            seen.append(super().forward(torch.stack(list(seen)).mean(0)))
            return seen

    assert_as_without_a_swap(Model(Seen, lambda x: collections.deque([x], maxlen=2), lambda seen: seen[-1]))


def test_an_object_in_an_object():
    class Deep(Block):
        def forward(self, state: Any) -> Any:
            state["all"][0].x = super().forward(state["all"][0].x)
            return state

    assert_as_without_a_swap(Model(Deep, lambda x: {"all": [State(x)]}, lambda state: state["all"][0].x))


def test_a_cache_that_it_appends_to():
    """Keys and values of chunks before, in a class of one's own."""

    class Cached(Block):
        def forward(self, given: Any) -> Any:
            x, cache = given
            cache.keys.append(self.norm(x))
            return x + self.attn(torch.cat(cache.keys, 1))[:, -x.shape[1] :], cache

    def start(x: Tensor) -> Any:
        return x, types.SimpleNamespace(keys=[])

    assert_as_without_a_swap(Model(Cached, start, lambda given: given[0]))


def test_a_flag_that_is_called_use_cache():
    """In a class of one's own it decides what is returned."""

    class Flagged(Block):
        def forward(self, x: Tensor, use_cache: bool = False) -> Any:
            x = super().forward(x)
            return (x, x.detach()) if use_cache else (x,)

    class Flags(Model):
        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = block(x, use_cache=True)
            return x.square().mean()

    assert_as_without_a_swap(Flags(Flagged))


# --- what its attention made ----------------------------------------------------------------------------------


class Scales(Attention):
    def changed(self, o: Tensor) -> Tensor:
        o *= 0.5
        return o


class Drops(Attention):
    def changed(self, o: Tensor) -> Tensor:
        return F.dropout(o, 0.3, inplace=True)


@pytest.mark.parametrize("kind", [Scales, Drops])
def test_an_attention_whose_output_is_written_to(kind):
    """Which autograd allows where nothing before it wants a gradient."""

    class Given(Block):
        def __init__(self) -> None:
            super().__init__()
            self.attn = kind()
            self.attn.qkv.requires_grad_(False)
            self.norm.requires_grad_(False)

    model = Model(Given)
    model.blocks[1:].requires_grad_(False)
    model.blocks = model.blocks[:1]
    plain = copy.deepcopy(model.double())
    pyckpt.swap(model)
    x, state = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.get_rng_state()
    found = []
    for m in (plain, model, model):
        torch.set_rng_state(state)
        loss, weights = m(x), [p for p in m.parameters() if p.requires_grad]
        torch.autograd.grad(loss, weights, retain_graph=True)
        found.append(torch.autograd.grad(loss, weights))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# --- what it has ----------------------------------------------------------------------------------------------


class Averages(Block):
    """A moving average that its output reads, written to as `write` does."""

    registered = True

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("mean", torch.zeros(WIDTH, dtype=torch.float64)), ("count", torch.zeros(()))):
            if self.registered:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def write(self, x: Tensor) -> None:
        self.mean.mul_(0.9).add_(x.detach().mean((0, 1)))
        self.count += 1

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        self.write(x)
        return x + self.mlp(x - self.mean).tanh()


class Unseen(Averages):
    def write(self, x: Tensor) -> None:
        self.mean.data.mul_(0.9).add_(x.detach().mean((0, 1)))
        self.count.data += 1


class Attributes(Averages):
    registered = False


class Listed(Averages):
    registered = False

    def __init__(self) -> None:
        super().__init__()
        self.both = [self.mean]

    def write(self, x: Tensor) -> None:
        self.both[0].mul_(0.9).add_(x.detach().mean((0, 1)))
        self.mean = self.both[0]
        self.count += 1


@pytest.mark.parametrize("kind", [Averages, Unseen, Attributes, Listed])
def test_a_tensor_that_it_writes_to(kind):
    model = assert_as_without_a_swap(Model(kind))
    assert [float(block.count) for block in model.blocks] == [2.0] * 3


def test_containers_of_every_kind():
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.sums = collections.Counter(), collections.defaultdict(int)
            self.nested, self.queue, self.kinds = {"a": []}, collections.deque(maxlen=9), {0}

        def forward(self, x: Tensor) -> Tensor:
            self.calls["n"] += 1
            self.sums["n"] += 1
            self.nested["a"].append(1)
            self.queue.append(1)
            self.kinds.add(len(self.kinds))
            scale = self.calls["n"] + self.sums["n"] + sum(self.nested["a"]) + len(self.queue) + len(self.kinds)
            return super().forward(x) * scale

    for block in assert_as_without_a_swap(Model(Counts)).blocks:
        assert (block.calls["n"], block.sums["n"], block.nested["a"], len(block.queue)) == (2, 2, [1, 1], 2)
        assert block.kinds == {0, 1, 2}


def test_a_module_in_a_plain_list():
    class Hidden(Block):
        def __init__(self) -> None:
            super().__init__()
            self.unseen = [nn.BatchNorm1d(WIDTH, affine=False)]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.unseen[0](x.flatten(0, 1)).view_as(x))

    model = Model(Hidden)
    for block in model.blocks:
        block.unseen[0].double()
    model = assert_as_without_a_swap(model)
    assert [int(block.unseen[0].num_batches_tracked) for block in model.blocks] == [2] * 3


def test_a_weight_that_it_writes_to():
    """By `max_norm`, or as a codebook: each once, and the second run finds what the first one found."""

    class Codes(Block):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(8, WIDTH, max_norm=0.5)
            self.codes = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x + self.places(torch.arange(x.shape[1])))
            near = torch.cdist(x, self.codes.clone()[None]).min(-1).values
            with torch.no_grad():
                self.codes.lerp_(x.mean((0, 1)).expand(4, -1), 0.1)
            return x * (1 + near[..., None])

    model = Model(Codes).double()
    plain = copy.deepcopy(model)
    found = assert_as_without_a_swap(model)
    assert not torch.equal(found.blocks[0].codes, plain.blocks[0].codes)


def test_a_weight_that_something_else_writes_to_is_an_error():
    model = Model(Block)
    pyckpt.swap(model)
    loss = model(torch.randn(2, 5, WIDTH))
    with torch.no_grad():
        model.blocks[1].mlp.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class EndingInABias(Block):
    """A Linear of what is not contiguous is a product and a sum, which needs nothing for its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x).transpose(0, 1)).transpose(0, 1)


def test_steps_of_an_optimizer_in_the_backward():
    """One for each weight as soon as it has its gradient: a bias at the end has it before the layer runs again."""
    model = Model(EndingInABias).double()
    plain = copy.deepcopy(model)
    pyckpt.swap(model)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for m in (plain, model):
        for p in m.parameters():
            p.register_post_accumulate_grad_hook(_descend)
        for _ in range(3):
            m(x).backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name


def _descend(p: Tensor) -> None:
    with torch.no_grad():
        p.sub_(p.grad, alpha=0.1)
    p.grad = None


def test_an_output_that_is_held_after_the_backward_holds_nothing_else():
    model = Model(Block, start=lambda x: x * 1)
    pyckpt.swap(model)
    found: list[Any] = []
    hook = model.blocks[1].register_forward_pre_hook(lambda module, args: found.append(weakref.ref(args[0])))
    loss = model(torch.randn(2, 5, WIDTH))
    hook.remove()
    loss.backward()
    assert loss.grad_fn is not None and found[0]() is None


# --- what it draws --------------------------------------------------------------------------------------------


def bernoulli(generator: Any, n: int) -> Tensor:
    if isinstance(generator, torch.Generator):
        return torch.rand(n, generator=generator, dtype=torch.float64).view(-1, 1, 1)
    return torch.tensor([generator.random() for _ in range(n)], dtype=torch.float64).view(-1, 1, 1)


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "python": lambda: random.Random(1),
    "numpy": lambda: numpy.random.default_rng(1),
    "numpy, the older": lambda: numpy.random.RandomState(1),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("held", ["attribute", "list", "argument"])
def test_a_generator_draws_the_same_again(name, held):
    class Draws(Block):
        def __init__(self) -> None:
            super().__init__()
            self.own = GENERATORS[name]() if held == "attribute" else [GENERATORS[name]()]

        def forward(self, given: Any) -> Any:
            x, generator = given
            own = generator if held == "argument" else self.own if held == "attribute" else self.own[0]
            return super().forward(x) * bernoulli(own, len(x)), generator

    class Drawing(Model):
        def forward(self, x: Tensor) -> Tensor:
            given = x, GENERATORS[name]()
            for block in self.blocks:
                given = block(given)
            return given[0].square().mean()

    model = Drawing(Draws)
    plain, x = copy.deepcopy(model.double()), torch.randn(4, 5, WIDTH, dtype=torch.float64)
    for block in plain.blocks:  # a copied torch.Generator is not one with the state
        block.own = GENERATORS[name]() if held == "attribute" else [GENERATORS[name]()]
    pyckpt.swap(model)
    for _ in range(2):
        losses = [m(x) for m in (plain, model)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


class Given(Block):
    """What is given beside x."""

    def forward(self, pair: Any) -> Any:
        x, other = pair
        return super().forward(self.with_(x, other)), other

    def with_(self, x: Tensor, other: Any) -> Tensor:
        return x


class Normalized(Given):
    def with_(self, x: Tensor, other: nn.Module) -> Tensor:
        return other(x.transpose(1, 2)).transpose(1, 2)


class Counting(nn.Module):
    """Each call is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.scale = 0, nn.Parameter(torch.ones(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale * self.calls


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(WIDTH),
        Counting,
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(WIDTH, WIDTH, 1)),
    ],
    ids=["BatchNorm", "one that counts", "spectral norm"],
)
def test_a_module_that_it_is_given(make):
    """What that keeps by itself too is as after one run."""

    model = assert_as_without_a_swap(Sharing(make()))
    assert getattr(model.shared, "calls", 6) == 6  # three blocks, two steps


class Sharing(Model):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__(Normalized)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block((x, self.shared))
        return x.square().mean()


class Numbered(Given):
    def with_(self, x: Tensor, other: Any) -> Tensor:
        it = other.x if isinstance(other, State) else other[0] if isinstance(other, list) else other
        return next(it) * x


@pytest.mark.parametrize("held", [lambda it: it, lambda it: [it], State], ids=["itself", "list", "object"])
def test_an_iterator_that_it_is_given_is_read_once(held):
    def start(x: Tensor) -> Any:
        return x, held(iter([float(i + 1) for i in range(9)]))

    with pytest.warns(UserWarning, match="Numbered is given an iterator, which can be read once: it stores everything"):
        assert_as_without_a_swap(Model(Numbered, start, lambda pair: pair[0]))


class Learning(Block):
    """It takes a gradient inside itself, as layers do that learn at test time."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.steps = nn.Parameter(torch.randn(WIDTH, WIDTH)), 0
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.seen += 1
        x = self.seen * self.drop(super().forward(x))
        error = torch.func.vmap(torch.func.grad(lambda w, row: (row @ w - row).square().sum()), in_dims=(None, 0))
        return x + self.steps * torch.bmm(x, self.memory - 0.01 * error(self.memory, x))


def test_gradients_by_torch_func_inside_run_once():
    """PyTorch takes none under a checkpoint: what the first run had begun, and drawn, is undone."""
    with pytest.warns(UserWarning, match=r"Learning calls torch\.func\.grad or its like: it stores everything"):
        model = assert_as_without_a_swap(Model(Learning))
    assert [block.steps for block in model.blocks] == [2] * 3


def test_gradients_by_torch_func_of_the_model():
    model = Model(Block).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    before = torch.func.grad(model)(x)
    pyckpt.swap(model)
    assert torch.equal(torch.func.grad(model)(x), before)


class Caching(Given):
    """Writes to a cache whose keys and values are views of one tensor."""

    def with_(self, x: Tensor, other: Any) -> Tensor:
        keys, values = other
        keys[:, :2], values[:, :2] = x[:, :2], 2 * x[:, :2]
        return x + keys.sum() + values.sum()


def test_a_frozen_layer_without_gradients_runs_once():
    def call(model: Model) -> Tensor:
        return model(torch.ones(2, 5, WIDTH))

    model = Model(Caching, lambda x: (x, torch.zeros(2, 2, 4, WIDTH).unbind()), lambda pair: pair[0])
    model.eval().requires_grad_(False)
    before = call(model)
    pyckpt.swap(model)
    assert torch.equal(call(model), before)


class Remembering(nn.Module):
    """A decoder layer of Transformer-XL's kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.self_attn, self.memories = nn.LayerNorm(WIDTH), Attention(), [torch.zeros(1, WIDTH)]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = hidden_states + self.self_attn(self.norm(hidden_states)) + self.memories[-1].sum()
        self.memories.append(x.detach())
        return x


class RememberingDecoderLayer(Remembering):
    pass


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.embed_tokens = types.SimpleNamespace(vocab_size=50), nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(RememberingDecoderLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask)
        return x


def test_a_swap_leaves_lists_as_they_are():
    """It calls a model of such layers for a look at what they are handed."""
    model = LanguageModel()
    kept = [list(layer.memories) for layer in model.layers]
    pyckpt.swap(model)
    for layer, had in zip(model.layers, kept, strict=True):
        assert len(layer.memories) == 1 and layer.memories[0] is had[0]


class Jagged(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.contiguous().unflatten(-1, (2, -1)).transpose(1, 2) for t in self.attn.qkv(self.norm(x)).chunk(3, -1)
        )
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return x + self.mlp(self.attn.out(o)).tanh()


@pytest.mark.parametrize("save", ["attention", "input"])
def test_sequences_of_several_lengths_in_a_nested_tensor(save):
    """torch.utils.checkpoint asks parts of them for their shapes, which they do not have."""

    def run(model: Model) -> dict[str, Tensor]:
        model.zero_grad()
        x = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        for block in model.blocks:
            x = block(x)
        x.values().square().sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    rows = [torch.randn(n, WIDTH) for n in (6, 4, 9)]
    model = Model(Jagged)
    before = run(model)
    pyckpt.swap(model, save)
    for name, gradient in run(model).items():
        assert torch.equal(gradient, before[name]), name


# --- NumPy's global generator ----------------------------------------------------------------------------------------


def test_numpys_state_is_what_numpy_says():
    """Read from its memory where it has not changed, a normal number that waits to be drawn included."""
    numpy_state = importlib.import_module("pyckpt.swap.numpy_state")
    for draw in (
        numpy.random.rand,
        numpy.random.randn,
        lambda: numpy.random.shuffle([1, 2, 3]),
        lambda: numpy.random.seed(5),
    ):
        for _ in range(3):  # randn has one waiting after every other call
            draw()
            state = numpy_state.numpy_state()
            want = numpy.random.get_state()
            assert all(numpy.array_equal(a, b) for a, b in zip(state, want, strict=True))
            assert all(numpy.array_equal(a, b) for a, b in zip(numpy_state.numpy_state(), want, strict=True))
            drawn = numpy.random.randn(3), numpy.random.rand()
            numpy_state.set_numpy_state(state)
            again = numpy.random.randn(3), numpy.random.rand()
            assert all(numpy.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
            numpy_state.set_numpy_state(state)


def test_numpys_state_of_another_kind_of_generator():
    numpy_state = importlib.import_module("pyckpt.swap.numpy_state")
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(3))
    try:
        state = numpy_state.numpy_state()
        drawn = numpy.random.rand(3)
        numpy_state.set_numpy_state(state)
        assert numpy.array_equal(numpy.random.rand(3), drawn)
    finally:
        numpy.random.set_bit_generator(before)
