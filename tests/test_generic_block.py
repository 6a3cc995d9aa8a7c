"""The generic tokenwise parts: autograd per tile as the oracle of the hand-written backward."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_same_bits, make_block, make_input, randomise, relative_errors, step
from torch import Tensor, nn

import pyckpt

SAVES = ("attention+qkv", "attention", "input")


class Pre(nn.Module):
    """The standard pre, as a module of tokens: norm, projections, QK-norm, RoPE."""

    def __init__(self, block: pyckpt.CkptTransformerBlock) -> None:
        super().__init__()
        self.spec = block.spec
        self.norm = block.input_layernorm
        self.attn = nn.ModuleDict({n: m for n, m in block.self_attn.named_children() if n != "o_proj"})

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.rms_norm(x, x.shape[-1:], self.norm.weight, self.spec.norm_eps)
        q, k = self.attn["q_proj"](h), self.attn["k_proj"](h)
        return (
            self._finish("q_norm", q, positions),
            self._finish("k_norm", k, positions),
            self.attn["v_proj"](h),
        )

    def _finish(self, norm: str, x: Tensor, positions: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, self.spec.head_dim))
        if norm in self.attn:
            heads = F.rms_norm(heads, heads.shape[-1:], self.attn[norm].weight, self.spec.norm_eps)
        return pyckpt.rope(heads, positions, theta=self.spec.rope_theta).flatten(-2)


class Post(nn.Module):
    def __init__(self, block: pyckpt.CkptTransformerBlock) -> None:
        super().__init__()
        self.eps = block.spec.norm_eps
        self.o_proj, self.norm, self.mlp = block.self_attn.o_proj, block.post_attention_layernorm, block.mlp

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        mid = x + self.o_proj(o)
        h = F.rms_norm(mid, mid.shape[-1:], self.norm.weight, self.eps)
        return mid + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


def generic_twin(block: pyckpt.CkptTransformerBlock, **options: Any) -> pyckpt.CkptGenericBlock:
    s = block.spec
    return pyckpt.CkptGenericBlock(
        Pre(block), Post(block), s.d_model, s.n_heads, n_kv_heads=s.n_kv_heads, head_dim=s.head_dim, **options
    )


def by_parameter(block: nn.Module, results: dict[str, Tensor]) -> dict[Any, Tensor]:
    params = dict(block.named_parameters())
    return {str(id(params[n])) if n in params else n: t for n, t in results.items()}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("packed", [False, True], ids=["batched", "packed"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"window": 7}], ids=["llama", "qk_norm", "window"])
def test_is_the_oracle_of_the_standard_block(options, packed, save):
    block = make_block(tile=7, **options)
    window = {"window": options["window"]} if "window" in options else {}
    generic = generic_twin(block, save=save, tile=7, **window)
    x, cu = make_input(packed)
    dy = torch.randn_like(x)
    truth, got = step(block, x, dy, cu), step(generic, x, dy, cu)
    errors = relative_errors(by_parameter(generic, got), by_parameter(block, truth))
    assert max(errors.values()) < 1e-12


def test_every_save_set_gives_the_same_bits():
    block = make_block(torch.float32)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    for tile in (None, 7):
        results = [step(generic_twin(block, save=save, tile=tile), x, dy) for save in SAVES]
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


class ParallelPost(nn.Module):
    """What no standard block has: a parallel MLP with a gate from x, an unused weight, and layer scale."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.out, self.mlp = (
            nn.Linear(d, d),
            nn.Sequential(nn.Linear(d, 2 * d), nn.Tanh(), nn.Linear(2 * d, d)),
        )
        self.scale, self.unused = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + self.scale * self.out(o) * torch.sigmoid(x) + self.mlp(x)


class LinearPre(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x + 0.01 * positions.unsqueeze(-1)).chunk(3, dim=-1)


def test_an_architecture_of_its_own():
    d, heads = 24, 3
    pre, post = LinearPre(d).double(), ParallelPost(d).double()
    randomise(pre), randomise(post)
    block = pyckpt.CkptGenericBlock(pre, post, d, heads, tile=5, causal=False)
    x = torch.randn(2, 13, d, dtype=torch.float64, requires_grad=True)

    positions = torch.arange(13).repeat(2)
    q, k, v = (t.view(2, 13, heads, -1).transpose(1, 2) for t in pre(x.view(26, d), positions))
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(26, d)
    expected = post(x.view(26, d), o).view_as(x)
    dy = torch.randn_like(x)
    names, params = zip(*block.named_parameters(), strict=True)
    truth = torch.autograd.grad(expected, [x, *params], dy, allow_unused=True)
    got = torch.autograd.grad(block(x), [x, *params], dy, allow_unused=True)
    assert any(b is None for b in truth)
    for name, a, b in zip(("x", *names), got, truth, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("frozen", ["pre", "post", "both"])
def test_frozen_halves(frozen):
    block = make_block(torch.float32, tile=7)
    generic = generic_twin(block, tile=7)
    x, _ = make_input(packed=False, dtype=torch.float32)
    dy = torch.randn_like(x)
    whole = step(generic, x, dy)
    for half in ("pre", "post"):
        getattr(generic, half).requires_grad_(frozen not in (half, "both"))
    leaf = x.clone().requires_grad_()
    generic(leaf).backward(dy)
    assert torch.equal(leaf.grad, whole["dx"])
    for name, p in generic.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, whole[name])
        else:
            assert p.grad is None


def test_parameter_hooks_fire_once():
    generic = generic_twin(make_block(torch.float32), tile=3)
    fired = []
    for p in generic.parameters():
        p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
    x, _ = make_input(packed=False, dtype=torch.float32)
    generic(x).sum().backward()
    assert sorted(fired) == sorted(id(p) for p in generic.parameters())


def test_mixes_with_standard_blocks_in_a_stack():
    blocks = [make_block(tile=7) for _ in range(4)]
    mixed = [blocks[0], generic_twin(blocks[1], tile=7), blocks[2], generic_twin(blocks[3], tile=7)]
    x, _ = make_input(packed=False)
    dy = torch.randn_like(x)
    truth = step(pyckpt.CkptTransformer(blocks), x, dy)
    for segments in (None, 3):
        got = step(pyckpt.CkptTransformer(mixed, segments), x, dy)
        assert relative_errors({"dx": got["dx"], "y": got["y"]}, {"dx": truth["dx"], "y": truth["y"]})["dx"] < 1e-12


@pytest.mark.parametrize("save", ["all", "attention+mid"])
def test_save_sets_inside_post_are_refused(save):
    with pytest.raises(ValueError, match=f"save='{save.replace('+', '.')}' names tensors inside `post`"):
        generic_twin(make_block(), save=save)


class LatentPre(nn.Module):
    """Latent attention (DeepSeek-V2, section 2.1), 3 heads: keys of 12 dims, of which 4 turn, values of 8."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.down, self.up = nn.Linear(d, 3 * 12), nn.Linear(d, 6 + 4), nn.Linear(6, 3 * (8 + 8))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_still, q_turned = self.q(x).unflatten(-1, (3, 12)).split((8, 4), dim=-1)
        latent, k_turned = self.down(x).split((6, 4), dim=-1)
        k_still, v = self.up(latent.tanh()).unflatten(-1, (3, 16)).split((8, 8), dim=-1)
        q_turned, k_turned = (pyckpt.rope(t, positions) for t in (q_turned, k_turned.unsqueeze(-2)))
        k = torch.cat([k_still, k_turned.expand(-1, 3, -1)], dim=-1)
        return torch.cat([q_still, q_turned], dim=-1).flatten(-2), k.flatten(-2), v.flatten(-2)


class LatentPost(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.o, self.mlp = nn.Linear(3 * 8, d), nn.Linear(d, d)

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        mid = x + self.o(o)
        return mid + self.mlp(mid).tanh()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("tile", [4, None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("how", ["resident", "offloaded", "streamed"])
def test_latent_attention(save, tile, causal, how):
    """Values of another head dim than keys, whatever the executor."""
    pre, post = LatentPre(20).double(), LatentPost(20).double()
    kept = pyckpt.Save(save, place={"x": "host", "o": "host"} if save != "input" else {"x": "host"})
    options = {"head_dim": 12, "v_head_dim": 8, "causal": causal, "tile": tile}
    saved = kept if how == "offloaded" else save
    stack = pyckpt.CkptTransformer([pyckpt.CkptGenericBlock(pre, post, 20, 3, save=saved, **options)])
    x, dy = torch.randn(2, 17, 20, dtype=torch.float64), torch.randn(2, 17, 20, dtype=torch.float64)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, x: Tensor, positions: Any = None, cu_seqlens: Any = None) -> Tensor:
            if how == "streamed":
                return stack(x, stream=pyckpt.Stream(7, "host"))
            return stack(x)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, x: Tensor, positions: Any = None, cu_seqlens: Any = None) -> Tensor:
            at = torch.arange(17).repeat(2)
            heads = (t.view(2, 17, 3, -1).transpose(1, 2) for t in pre(x.flatten(0, 1), at))
            o = F.scaled_dot_product_attention(*heads, is_causal=causal)
            return post(x.flatten(0, 1), o.transpose(1, 2).reshape(2 * 17, -1)).view_as(x)

    assert max(relative_errors(step(Whole(), x, dy), step(Plain(), x, dy)).values()) < 1e-12


def test_value_head_dims():
    for wrong in (0, -8, 8.0):
        with pytest.raises(ValueError, match="v_head_dim must be a positive int, or None for head_dim"):
            pyckpt.CkptGenericBlock(LatentPre(20), LatentPost(20), 20, 3, head_dim=12, v_head_dim=wrong)
    block = pyckpt.CkptGenericBlock(LatentPre(20), LatentPost(20), 20, 3, head_dim=12, v_head_dim=12, tile=4)
    with pytest.raises(ValueError, match=r"pre's v has shape \(4, 24\), expected \(4, 36\)"):
        block(torch.randn(1, 8, 20))


def test_wrong_shapes_are_named():
    class Wide(LinearPre):
        def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            q, k, v = super().forward(x, positions)
            return torch.cat([q, q], dim=-1), k, v

    block = pyckpt.CkptGenericBlock(Wide(24), ParallelPost(24), 24, 3, tile=4)
    with pytest.raises(ValueError, match=r"pre's q has shape \(4, 48\), expected \(4, 24\) for a tile of 4 tokens"):
        block(torch.randn(1, 8, 24))


# --- gradients of what is not the block's own ----------------------------------------------------------------------


class ConditionedPost(nn.Module):
    """Its output is scaled by a tensor that the model puts there, as in adaLN."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.out, self.scale = nn.Linear(d, d), torch.ones(d)

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return (x + self.out(o)) * self.scale


def conditioned(frozen: bool = False) -> tuple[pyckpt.CkptGenericBlock, nn.Module, Tensor]:
    block = pyckpt.CkptGenericBlock(LinearPre(12), ConditionedPost(12), 12, 2, tile=4)
    return block.requires_grad_(not frozen), nn.Linear(3, 12), torch.randn(2, 6, 12)


class Made(nn.Module):
    """Gives what it was made with."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, *given: Tensor) -> Any:
        return self.made


def test_parts_that_are_none_are_refused_in_words():
    x, good = torch.randn(1, 6, 12), Made((torch.zeros(6, 12),) * 3)
    with pytest.raises(TypeError, match=r"pre must be a torch\.nn\.Module, got function"):
        pyckpt.CkptGenericBlock(lambda x, positions: x, good, 12, 2)
    for made, given in (((x, x), "Tensor, Tensor"), (x[0], "Tensor"), (None, "NoneType"), ([], "nothing")):
        with pytest.raises(TypeError, match=f"pre gave {given}, expected three tensors, q, k and v"):
            pyckpt.CkptGenericBlock(Made(made), good, 12, 2)(x)
    with pytest.raises(TypeError, match="post gave tuple, expected one tensor, y"):
        pyckpt.CkptGenericBlock(good, Made((x[0], None)), 12, 2)(x)


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scale_that_would_hide_nothing_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be None or a positive finite number, got"):
        pyckpt.CkptGenericBlock(LinearPre(12), ConditionedPost(12), 12, 2, scale=scale)


def test_a_scale_with_a_gradient_is_refused():
    with pytest.raises(ValueError, match=r"scale gets no gradient here: .*have pre multiply q by it"):
        scale = torch.tensor(1.0, requires_grad=True)
        pyckpt.CkptGenericBlock(LinearPre(12), ConditionedPost(12), 12, 2, scale=scale)


@pytest.mark.parametrize("kind", ["generic", pytest.param("segment", marks=pytest.mark.slow)])
def test_nothing_of_what_a_backward_makes_again_is_compiled(kind):
    """It would be in the forward alone: other bits, and a new graph for every call of a generic block."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    block = pyckpt.CkptTransformer([make_block(), make_block()], segments=2)
    if kind == "generic":
        block = generic_twin(make_block())
    compiled = torch.compile(block, backend=record)
    compiled(make_input(packed=False)[0])
    names = [n.name for graph in graphs for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    assert not any(part in name for name in names for part in ("linear", "mm", "norm", "attention"))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_that_would_be_lost_is_an_error(frozen, compiled):
    """Of a tensor that is an attribute, also where nothing of the block has a gradient; not one without a gradient."""
    block, cond, x = conditioned(frozen)
    run = torch.compile(block, backend="eager") if compiled else block
    run(x)
    block.post.scale = cond(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"post\.scale that post reads requires a gradient, which would be lost"):
        run(x)
    with torch.no_grad():
        run(x)
    block.post.scale = block.post.scale.detach()
    run(x)


def test_a_gradient_of_what_a_closure_holds_is_not_lost_silently():
    activation, pre = nn.PReLU(), LinearPre(12)
    pre.forward = lambda x, positions: pre.qkv(activation(x)).chunk(3, dim=-1)
    block, x = pyckpt.CkptGenericBlock(pre, ConditionedPost(12), 12, 2), torch.randn(2, 6, 12)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(1,\) that pre reads requires a gradient"):
        block(x)
    pre.activation = activation
    block(x).sum().backward()
    assert activation.weight.grad is not None


def test_a_tensor_of_each_call_in_the_place_of_a_parameter_has_its_gradient():
    """As the error advises."""
    block, cond, x = conditioned()
    del block.post.scale
    block.post.scale = nn.Parameter(torch.zeros(12))
    grads = []
    for run in (lambda: torch.func.functional_call(block, {"post.scale": cond(torch.ones(3))}, (x,)), None):
        if run is None:
            del block.post.scale
            block.post.scale = torch.ones(12)
            run = lambda: block(x) * cond(torch.ones(3))  # noqa: E731
        grads.append(torch.autograd.grad(run().square().sum(), list(cond.parameters())))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["weight_norm", "adapter", "tied"])
def test_parameters_by_other_ways_are_the_blocks_own(kind):
    block, _, x = conditioned()
    post: Any = block.post
    if kind == "weight_norm":
        nn.utils.parametrizations.weight_norm(post.out)
    elif kind == "adapter":
        block.requires_grad_(False)
        post.out = nn.Sequential(post.out, nn.Linear(12, 12))
    else:
        post.out = nn.Sequential(post.out, nn.Linear(12, 12))
        post.out[1].weight = post.out[0].weight
    block(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters() if p.requires_grad)


class SharedPre(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.qkv = norm, nn.Linear(12, 36)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm(x)).chunk(3, dim=-1)


class SharedPost(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.out, self.norm = nn.Linear(12, 12), norm

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + self.out(self.norm(o)).tanh()


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("how", ["one tile", "tiles", "streamed", "post alone"])
def test_a_module_that_both_parts_share(how, save):
    """Its gradient is the sum of both, by plain autograd in float64; its hooks run once."""
    norm = nn.LayerNorm(12)
    randomise(norm)
    pre, post = SharedPre(norm).double(), SharedPost(norm).double()
    if how == "post alone":
        pre.qkv.requires_grad_(False)
    block = pyckpt.CkptGenericBlock(pre, post, 12, 2, save=save, tile=None if how == "one tile" else 5)
    x = torch.randn(2, 13, 12, dtype=torch.float64, requires_grad=True)
    flat = x.flatten(0, 1)
    heads = (t.view(2, 13, 2, -1).transpose(1, 2) for t in pre(flat, torch.arange(26)))
    o = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(26, 12)
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    truth = torch.autograd.grad(post(flat, o).square().sum(), leaves)
    fired = []
    norm.weight.register_hook(lambda grad: fired.append(grad))
    stream = {"stream": pyckpt.Stream(7, "host")} if how == "streamed" else {}
    y = pyckpt.CkptTransformer([block])(x, **stream)
    got = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)
    assert len(fired) == 1


class OneProjection(nn.Module):
    """Of q and k by one module, with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)
        self.k = self.q

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


class Sum(nn.Module):
    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + o


@pytest.mark.parametrize("tile", [4, 64])
def test_a_module_in_two_places_of_a_part(tile):
    """It has its parameters afterwards, and the gradients of both places."""
    block = pyckpt.CkptGenericBlock(OneProjection(), Sum(), 8, 2, tile=tile).double()
    before, x = dict(block.named_parameters()), torch.randn(1, 6, 8, dtype=torch.float64)
    q, k, v = (t.view(1, 6, 2, 4) for t in block.pre(x[0], torch.arange(6)))
    want = torch.autograd.grad((x + pyckpt.attention(q, k, v).flatten(2)).square().sum(), [*before.values()])
    for _ in range(2):
        block(x).square().sum().backward()
        after = dict(block.named_parameters())
        assert after.keys() == before.keys() and all(after[n] is p for n, p in before.items())
    for p, g in zip(before.values(), want, strict=True):
        assert torch.allclose(p.grad, 2 * g, rtol=1e-10, atol=1e-10)


class _Sums(nn.Module):
    """A post whose backward gives one tensor to two weights, and an expanded one to a third."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(d, d, dtype=torch.float64)) for _ in range(2))
        self.c = nn.Parameter(torch.randn(d, dtype=torch.float64))
        self.d = nn.Parameter(torch.randn(1, d, dtype=torch.float64))

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + F.linear(o, self.a + self.b) + self.c.sum() + self.d


class _Projections(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, 3 * d, dtype=torch.float64)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.linear(x).chunk(3, -1)


@pytest.mark.parametrize("tile", [1, 4, 16])
def test_gradients_that_share_memory_are_summed_apart(tile):
    """Autograd may give one tensor for several weights, an expanded one, or what came from upstream."""
    block = pyckpt.CkptGenericBlock(_Projections(8), _Sums(8), 8, 2, tile=tile)
    x = torch.randn(1, 13, 8, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    before = dy.clone()
    block(x).backward(dy)
    assert torch.equal(dy, before)
    found = {n: p.grad.clone() for n, p in block.named_parameters()} | {"x": x.grad.clone()}
    x.grad = None
    block.zero_grad()
    q, k, v = (t.view(1, 13, 2, 4).transpose(1, 2) for t in block.pre(x[0], None))
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(13, 8)
    block.post(x[0], o)[None].backward(dy)
    for name, p in (*block.named_parameters(), ("x", x)):
        assert torch.allclose(found[name], p.grad, rtol=1e-10, atol=1e-10), name


class _Adapted(nn.Module):
    """A post whose weight is that of all blocks, and what it adds to it: gradients of both in one memory."""

    def __init__(self, base: nn.Parameter) -> None:
        super().__init__()
        self.base, self.own = base, nn.Parameter(torch.randn(base.numel(), dtype=base.dtype))

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        return x + F.linear(o, self.base + self.own.view_as(self.base))


@pytest.mark.parametrize("how", ["resident", "together", "by block"])
def test_gradients_of_one_memory_are_each_weights_own(how):
    """Where they are added to: in a second backward, and as those of a weight that several blocks read."""
    base = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
    blocks = 1 if how == "resident" else 2
    stack = pyckpt.CkptTransformer(
        [pyckpt.CkptGenericBlock(_Projections(8), _Adapted(base), 8, 2) for _ in range(blocks)]
    )
    stream = {} if how == "resident" else {"stream": pyckpt.Stream(16, "host", gradients=how)}
    x, found = torch.randn(1, 13, 8, dtype=torch.float64), []
    for tile in (16, 5):  # sums of several tiles have memory of their own
        stack.zero_grad()
        for block in stack:
            block.tile = tile
        for _ in range(2):
            stack(x, **stream).square().sum().backward()
        found.append([p.grad.clone() for p in stack.parameters()])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_threads_may_use_one_block():
    """PyTorch's notes on autograd allow it: none is to see what another has put in the place of parameters."""
    block = pyckpt.CkptGenericBlock(_Projections(8), _Sums(8), 8, 2, tile=4)
    parameters, x = list(block.parameters()), torch.randn(1, 13, 8, dtype=torch.float64)
    want, wrong = torch.autograd.grad(block(x).square().sum(), parameters), []

    def work() -> None:
        for _ in range(10):
            try:
                torch.testing.assert_close(torch.autograd.grad(block(x).square().sum(), parameters), want)
            except Exception as error:
                wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))


@pytest.mark.parametrize("of", ["x", "o"])
def test_writing_in_place_to_what_a_part_is_given_is_an_error(of):
    class Writes(_Sums):
        def forward(self, x: Tensor, o: Tensor) -> Tensor:
            if of == "x":
                x += o
            else:
                o *= 2
            return super().forward(x, o)

    block = pyckpt.CkptGenericBlock(_Projections(8), Writes(8), 8, 2)
    x = torch.randn(1, 13, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="post writes in place to what it is given"):
        block(x)
    with torch.no_grad():
        block(x)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_its_modules_run_under_autocast(x_dtype):
    block = pyckpt.CkptGenericBlock(_Projections(8), _Sums(8), 8, 2).float()
    x = torch.randn(1, 13, 8).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().mean().backward()
    assert y.dtype == x_dtype and block.post.a.grad.dtype == torch.float32


class Dropping(nn.Module):
    """`post` that drops values of both its sublayers."""

    def __init__(self, width: int, dropout: nn.Module) -> None:
        super().__init__()
        self.o_proj, self.mlp, self.dropout = nn.Linear(width, width), nn.Linear(width, width), dropout

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        mid = x + self.dropout(self.o_proj(o))
        return mid + self.dropout(F.gelu(self.mlp(mid)))


class Projections(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.dropout = nn.Linear(width, 3 * width), nn.Dropout(0.2)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return self.dropout(self.qkv(x)).chunk(3, -1)


def dropping(save: str = "attention", dropout: nn.Module | None = None, tile: int = 7) -> pyckpt.CkptGenericBlock:
    parts = Projections(16), Dropping(16, nn.Dropout(0.3) if dropout is None else dropout)
    return pyckpt.CkptGenericBlock(*parts, 16, 2, save=save, tile=tile).double()


def assert_is_its_gradient(run: Any, module: nn.Module) -> None:
    """The loss falls as the gradients of its parameters say, while the same values are dropped."""

    def loss() -> Tensor:
        torch.manual_seed(3)
        return run()

    weights = list(module.parameters())
    grads = torch.autograd.grad(loss(), weights)
    ways = [torch.randn_like(w) for w in weights]
    found = []
    for step_size in (1e-5, -1e-5):
        with torch.no_grad():
            for w, way in zip(weights, ways, strict=True):
                w += step_size * way
            found.append(float(loss()))
            for w, way in zip(weights, ways, strict=True):
                w -= step_size * way
    slope = sum(float((g * way).sum()) for g, way in zip(grads, ways, strict=True))
    # Differences of float64 over 1e-5: 1e-10 of the loss, and the third derivative's 1e-10.
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("save", SAVES)
def test_what_dropout_drops_it_drops_again(save):
    block, x = dropping(save), torch.randn(2, 19, 16, dtype=torch.float64)
    assert_is_its_gradient(lambda: block(x).square().mean(), block)
    assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize("segments", [None, 2])
def test_what_dropout_drops_it_drops_again_in_segments_and_streams(segments):
    stack = pyckpt.CkptTransformer([dropping() for _ in range(2)], segments)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    assert_is_its_gradient(lambda: stack(x).square().mean(), stack)
    assert_is_its_gradient(lambda: stack(x, stream=pyckpt.Stream(tile=6)).square().mean(), stack)


def test_the_train_mode_of_the_call_is_that_of_its_backward():
    block, x = dropping(), torch.randn(2, 19, 16, dtype=torch.float64)
    found = []
    for train, after in ((True, True), (True, False), (False, False), (False, True)):
        torch.manual_seed(3)
        loss = block.train(train)(x).square().mean()
        block.train(after)
        found.append(torch.autograd.grad(loss, list(block.parameters())))
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(g, h) for g, h in zip(found[a], found[b], strict=True))
    before = torch.get_rng_state()
    block.eval()(x)
    assert torch.equal(torch.get_rng_state(), before)


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


def test_what_draws_by_a_function_is_an_error():
    block, x = dropping(dropout=ByFunction()), torch.randn(2, 19, 16, dtype=torch.float64)
    block.pre.dropout.p = 0.0
    with pytest.raises(RuntimeError, match=r"post draws random numbers.*nn\.Dropout modules"):
        block(x)
    with torch.no_grad():
        block(x)
    block.eval()(x).sum().backward()
