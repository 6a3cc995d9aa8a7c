"""The ops that fuse a product with what stands around it: on PyTorch's products and on our kernels, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import a_few, assert_close_to_truth, assert_exact
from torch import Tensor

from pyckpt.ops import reference, triton_backend
from pyckpt.ops.rope import rope_tables
from pyckpt.spec import GATED_MLPS, MLPS

ops = torch.ops.pyckpt
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
EPS = 1e-3
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SIZES = [(1, 16, 16), (33, 48, 72), (70, 100, 33), (5, 130, 64)]  # tokens, width, columns of the product
NORMS = pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])


@pytest.fixture(autouse=True)
def every_backend(backend) -> None:
    pass


def rand(*shape: int, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    size = (shape[-1] ** -0.5 if len(shape) == 2 else 1.0) if scale is None else scale
    return (torch.randn(*shape, dtype=torch.float64, device=DEVICE) * size).to(dtype)


class Normed:
    """x, a norm's weights, and statistics as the ops want them."""

    def __init__(self, tokens: int, width: int, centered: bool, dtype: torch.dtype) -> None:
        self.x = (rand(tokens, width, dtype=torch.float64, scale=1.0) * 2 + 0.7).to(dtype)
        self.weight = rand(width, dtype=dtype)
        self.bias = rand(width, dtype=dtype) if centered else None
        mean, self.rstd = ops.row_statistics(self.x, centered, EPS)
        self.mean = mean if centered else None

    @property
    def args(self) -> tuple[Any, ...]:
        return self.x, self.mean, self.rstd, self.weight, self.bias

    def made(self, dtype: torch.dtype) -> Tensor:
        """The norm in plain PyTorch, in a dtype."""
        x, w = self.x.to(dtype), self.weight.to(dtype)
        if self.bias is None:
            return F.rms_norm(x, w.shape, w, EPS)
        return F.layer_norm(x, w.shape, w, self.bias.to(dtype), EPS)


def check(got: Tensor, plain: Tensor, truth: Tensor, what: str, terms: float = 1.0) -> None:
    """By the 2x rule; in float64 to the order of sums."""
    if got.dtype == torch.float64:
        assert_exact(got, truth, what, terms=100.0)
    else:
        assert_close_to_truth(got, plain, truth, what=what, terms=terms)


def in_both(fn: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """What plain PyTorch makes in the dtype, and in float64."""
    return fn(dtype), fn(torch.float64)


@NORMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (7, 63), (130, 64), (3, 1000)])
def test_row_statistics(tokens, width, dtype, centered):
    x = rand(tokens, width, dtype=dtype, scale=1.0) + 1.0
    mean, rstd = ops.row_statistics(x, centered, EPS)
    _, want_mean, want_rstd = (
        ops.layer_norm_fwd(x.double(), None, None, EPS)
        if centered
        else (None, None, ops.rms_norm_fwd(x.double(), None, EPS)[1])
    )
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(acc).eps
    assert mean.dtype == rstd.dtype == acc
    assert (rstd - want_rstd).abs().max() <= 16 * eps * want_rstd.abs().max()
    if centered:
        assert (mean - want_mean).abs().max() <= 16 * eps * x.double().abs().max()
    else:
        assert mean.numel() == 0


@NORMS
@BIAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_residual(size, dtype, bias, centered):
    tokens, width, columns = size
    x, w = rand(tokens, width, dtype=dtype, scale=1.0), rand(columns, width, dtype=dtype)
    b = rand(columns, dtype=dtype) if bias else None
    residual = rand(tokens, columns, dtype=dtype, scale=1.0)
    out = torch.empty_like(residual)
    mean, rstd = ops.linear_residual_(x, w, b, residual, out, True, centered, EPS)

    def formula(d: torch.dtype) -> Tensor:
        return residual.to(d) + F.linear(x.to(d), w.to(d), None if b is None else b.to(d))

    check(out, *in_both(formula, dtype), "out")
    again = ops.row_statistics(out, centered, EPS)
    assert torch.equal(mean, again[0])
    assert torch.equal(rstd, again[1])
    over = residual.clone()
    nothing = ops.linear_residual_(x, w, b, over, over, False, False, 0.0)
    assert torch.equal(over, out)
    assert all(t.numel() == 0 for t in nothing)


def test_a_residual_stream_of_its_own_dtype():
    """Autocast: products in the low precision, the residual stream in float32."""
    x, w = rand(33, 48, dtype=torch.float16, scale=1.0), rand(70, 48, dtype=torch.float16)
    residual = rand(33, 70, dtype=torch.float32, scale=1.0)
    out = torch.empty_like(residual)
    _, rstd = ops.linear_residual_(x, w, None, residual, out, True, False, EPS)
    truth = residual.double() + x.double() @ w.double().t()
    plain = residual + x @ w.t()
    check(out, plain, truth, "out")
    assert torch.equal(rstd, ops.row_statistics(out, False, EPS)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width", "heads", "dim"), [(1, 16, 1, 16), (33, 48, 3, 20), (40, 30, 2, 128)])
def test_linear_delta(tokens, width, heads, dim, dtype):
    d, w = rand(tokens, width, dtype=dtype, scale=1.0), rand(width, heads * dim, dtype=dtype, scale=width**-0.5)
    o = rand(tokens, heads * dim, dtype=dtype, scale=1.0)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    do, delta = torch.empty_like(o), torch.empty(heads, tokens, dtype=acc, device=DEVICE)
    ops.linear_delta_(d, w, o, do, delta)
    check(do, *in_both(lambda t: d.to(t) @ w.to(t), dtype), "do")
    want = (do.double() * o.double()).view(tokens, heads, dim).sum(-1).t()
    assert (delta - want).abs().max() <= 16 * dim**0.5 * torch.finfo(acc).eps * (do.double() * o).abs().max()


HEADS: dict[str, dict[str, Any]] = {
    "rope": {},
    "interleaved": {"interleaved": True},
    "partial": {"rotated": 8},
    "partial-interleaved": {"rotated": 4, "interleaved": True},
    "plain": {"rotated": 0},
    "qk_norm": {"qk_norm": True},
    "qk_norm-plain": {"qk_norm": True, "rotated": 0},
    "wide": {"head_dim": 80, "heads": (3, 1)},
    "many": {"head_dim": 16, "heads": (9, 5), "qk_norm": True},
}


def qkv_case(
    dtype: torch.dtype,
    centered: bool = False,
    bias: bool = False,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 20,
    rotated: int | None = None,
    interleaved: bool = False,
    qk_norm: bool = False,
    tokens: int = 37,
) -> dict[str, Any]:
    width = 50
    normed = Normed(tokens, width, centered, dtype)
    counts = (heads[0], heads[1], heads[1])
    rotated = head_dim if rotated is None else rotated
    table = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.arange(5, 5 + tokens, device=DEVICE)
    return {
        "normed": normed,
        "weights": [rand(n * head_dim, width, dtype=dtype) for n in counts],
        "biases": [rand(n * head_dim, dtype=dtype) if bias else None for n in counts],
        "norms": [rand(head_dim, dtype=dtype) if qk_norm else None for _ in range(2)],
        "tables": rope_tables(positions, rotated, 1e4, dtype=table) if rotated else (None, None),
        "interleaved": interleaved,
        "head_dim": head_dim,
    }


def run_qkv(case: dict[str, Any], raw: bool = False) -> list[Tensor]:
    normed = case["normed"]
    outs = [normed.x.new_empty(normed.x.shape[0], w.shape[0]) for w in case["weights"]]
    raws = [torch.empty_like(t) for t in outs[:2]] if raw else [None, None]
    ops.norm_qkv_(
        *normed.args,
        *case["weights"],
        *case["biases"],
        *case["norms"],
        EPS,
        *case["tables"],
        case["interleaved"],
        case["head_dim"],
        *outs,
        *raws,
    )
    return [*outs, *raws] if raw else outs


def turned(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE in plain PyTorch of the first values of t (t, heads, head_dim); cos, sin (t, 1, r/2)."""
    half = cos.shape[-1]
    head, rest = t[..., : 2 * half], t[..., 2 * half :]
    a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1), rest], -1)


def plain_qkv(case: dict[str, Any], d: torch.dtype) -> list[Tensor]:
    h = case["normed"].made(d)
    found = []
    for i, (w, b) in enumerate(zip(case["weights"], case["biases"], strict=True)):
        t = F.linear(h, w.to(d), None if b is None else b.to(d)).unflatten(1, (-1, case["head_dim"]))
        if i < 2 and case["norms"][i] is not None:
            t = F.rms_norm(t, t.shape[-1:], case["norms"][i].to(d), EPS)
        if i < 2 and case["tables"][0] is not None:
            t = turned(t, *(table.to(d).unsqueeze(1) for table in case["tables"]), case["interleaved"])
        found.append(t.flatten(1))
    return found


class TestQKV:
    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1,)))
    @pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS.keys())
    def test_against_pytorch(self, kind, dtype):
        case = qkv_case(dtype, **kind)
        for name, got, plain, truth in zip(
            "qkv", run_qkv(case), *in_both(lambda d: plain_qkv(case, d), dtype), strict=True
        ):
            check(got, plain, truth, name)

    @NORMS
    def test_norms_and_biases(self, centered):
        case = qkv_case(torch.float32, centered, bias=True, qk_norm=True)
        found = in_both(lambda d: plain_qkv(case, d), torch.float32)
        for name, got, plain, truth in zip("qkv", run_qkv(case), *found, strict=True):
            check(got, plain, truth, name)

    @pytest.mark.parametrize("kind", ["qk_norm", "qk_norm-plain", "many", "wide"])
    @pytest.mark.parametrize("dtype", a_few([torch.float32, torch.float16], always=(1,)))
    def test_kept_raw_ones_are_finished_with_the_same_bits(self, dtype, kind):
        case = qkv_case(dtype, **{**HEADS[kind], "qk_norm": True})
        q, k, _, raw_q, raw_k = run_qkv(case, raw=True)
        for raw, weight, want in ((raw_q, case["norms"][0], q), (raw_k, case["norms"][1], k)):
            out = torch.empty_like(raw)
            ops.qk_finish_(raw, weight, EPS, *case["tables"], case["interleaved"], case["head_dim"], out)
            assert torch.equal(out, want)

    def test_some_of_them(self):
        """As a streamed run asks for them: the same bits."""
        case = qkv_case(torch.float32, bias=True, qk_norm=True)
        q, k, v = run_qkv(case)
        for wanted in ((q, None, None), (None, k, v), (None, k, None)):
            outs = [None if t is None else torch.empty_like(t) for t in wanted]
            options = (*case["norms"], EPS, *case["tables"], case["interleaved"], case["head_dim"])
            ops.norm_qkv_(
                *case["normed"].args, *case["weights"], *case["biases"], *options, *outs, None, None
            )  # fmt: skip
            assert all(t is None or torch.equal(t, w) for t, w in zip(outs, wanted, strict=True))

    def test_rows_of_views(self):
        """x, q, k and v as parts of wider tensors, as a tile of a longer sequence and a fused projection have them."""
        case = qkv_case(torch.float32)
        want = run_qkv(case)
        normed = case["normed"]
        wide = torch.full((37, 90), float("nan"), device=DEVICE)
        wide[:, 20:70] = normed.x
        normed.x = wide[:, 20:70]
        both = torch.full((37, 80 + 40 + 40 + 7), 5.0, device=DEVICE)
        outs = [both[:, :80], both[:, 80:120], both[:, 120:160]]
        nothing = (None,) * 5  # neither biases nor QK-norm
        ops.norm_qkv_(*normed.args, *case["weights"], *nothing, EPS, *case["tables"], False, 20, *outs, None, None)
        assert all(torch.equal(a, b) for a, b in zip(outs, want, strict=True))
        assert (both[:, 160:] == 5).all()


def finish_bwd_case(
    dtype: torch.dtype,
    tokens: int = 37,
    heads: int = 3,
    head_dim: int = 20,
    rotated: int | None = None,
    interleaved: bool = False,
) -> dict[str, Any]:
    rotated = head_dim if rotated is None else rotated
    table = torch.float64 if dtype == torch.float64 else torch.float32
    positions = torch.arange(5, 5 + tokens, device=DEVICE)
    return {
        "d": rand(tokens, heads * head_dim, dtype=dtype, scale=1.0),
        "raw": rand(tokens, heads * head_dim, dtype=dtype, scale=1.5),
        "weight": rand(head_dim, dtype=dtype),
        "tables": rope_tables(positions, rotated, 1e4, dtype=table) if rotated else (None, None),
        "interleaved": interleaved,
        "head_dim": head_dim,
    }


def run_finish_bwd(case: dict[str, Any], d: Tensor, need_dw: bool = True) -> Tensor:
    options = (EPS, *case["tables"], case["interleaved"], case["head_dim"])
    return ops.qk_finish_bwd_(d, case["raw"], case["weight"], *options, need_dw)


def plain_finish_bwd(case: dict[str, Any], d: torch.dtype) -> list[Tensor]:
    """The gradients of the raw values and of the weight, by autograd."""
    raw, weight = (case[n].detach().to(d).requires_grad_() for n in ("raw", "weight"))
    t = F.rms_norm(raw.unflatten(1, (-1, case["head_dim"])), weight.shape, weight, EPS)
    if case["tables"][0] is not None:
        t = turned(t, *(table.to(d).unsqueeze(1) for table in case["tables"]), case["interleaved"])
    return list(torch.autograd.grad(t.flatten(1), [raw, weight], case["d"].to(d)))


FINISH_BWD_FORMS: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"interleaved": True},
    "partial": {"rotated": 8},
    "partial-interleaved": {"rotated": 4, "interleaved": True},
    "norope": {"rotated": 0},
    "one-token": {"tokens": 1, "heads": 1},
    "tiles": {"tokens": 131, "heads": 11, "head_dim": 16},
    "more-tiles-than-programs": {"tokens": 140, "heads": 9, "head_dim": 80},
    "odd": {"head_dim": 15, "rotated": 6},
}


class TestBackwardOfQKNorm:
    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1, 2)))
    @pytest.mark.parametrize("form", FINISH_BWD_FORMS.values(), ids=FINISH_BWD_FORMS.keys())
    def test_against_autograd(self, form, dtype):
        case = finish_bwd_case(dtype, **form)
        d = case["d"].clone()
        dw = run_finish_bwd(case, d)
        plain, truth = in_both(lambda t: plain_finish_bwd(case, t), dtype)
        check(d, plain[0], truth[0], "d")
        # The weight's gradient is a sum over tokens and heads, in another order than PyTorch's.
        assert dw.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        check(dw.to(dtype), plain[1], truth[1], "dw", terms=(d.numel() / case["head_dim"]) ** 0.5)

    def test_without_a_gradient_of_the_weight(self):
        case = finish_bwd_case(torch.float32)
        d, again = case["d"].clone(), case["d"].clone()
        assert run_finish_bwd(case, d, need_dw=False).numel() == 0
        assert run_finish_bwd(case, again).numel() == case["head_dim"]
        assert torch.equal(d, again)

    def test_a_weight_in_float32(self):
        """As Gemma's, whose offset is added in float32."""
        case = finish_bwd_case(torch.float16)
        case["weight"] = 1.0 + case["weight"].float()
        d = case["d"].clone()
        dw = run_finish_bwd(case, d)
        plain, truth = in_both(lambda t: plain_finish_bwd(case, t), torch.float16)
        check(d, plain[0], truth[0], "d")
        check(dw.half(), plain[1], truth[1], "dw", terms=d.shape[0] ** 0.5)

    @pytest.mark.parametrize("form", [{}, {"interleaved": True}], ids=["halves", "interleaved"])
    def test_rows_of_views(self, form):
        """d and raw as parts of wider tensors: the same bits, and nothing written beside them."""
        case = finish_bwd_case(torch.float32, **form)
        want = case["d"].clone()
        want_dw = run_finish_bwd(case, want)
        wide = torch.full((40, 100), float("nan"), device=DEVICE)
        wide[:37, 7:67] = case["raw"]
        case["raw"] = wide[:37, 7:67]
        beside = torch.full((40, 90), 5.0, device=DEVICE)
        d = beside[:37, 3:63]
        d.copy_(case["d"])
        assert torch.equal(run_finish_bwd(case, d), want_dw)
        assert torch.equal(d, want)
        d.fill_(5.0)
        assert (beside == 5).all()

    def test_no_tokens(self):
        case = finish_bwd_case(torch.float32, tokens=0)
        dw = run_finish_bwd(case, case["d"])
        assert torch.equal(dw, torch.zeros_like(dw))
        assert dw.shape == (case["head_dim"],)

    def test_a_row_of_zeros(self):
        """Of padding, say: rstd is then large, and nothing else."""
        case = finish_bwd_case(torch.float32)
        case["raw"][5] = 0
        d = case["d"].clone()
        run_finish_bwd(case, d)
        plain, truth = in_both(lambda t: plain_finish_bwd(case, t), torch.float32)
        check(d, plain[0], truth[0], "d")


def mlp_case(kind: str, dtype: torch.dtype, centered: bool, bias: bool, size: tuple[int, int, int]) -> dict[str, Any]:
    tokens, width, d_ff = size
    gated = kind in GATED_MLPS
    return {
        "normed": Normed(tokens, width, centered, dtype),
        "w_gate": rand(d_ff, width, dtype=dtype) if gated else None,
        "b_gate": rand(d_ff, dtype=dtype) if gated and bias else None,
        "w_up": rand(d_ff, width, dtype=dtype),
        "b_up": rand(d_ff, dtype=dtype) if bias else None,
        "kind": kind,
        "w_down": rand(width + 3, d_ff, dtype=dtype, scale=d_ff**-0.5),
        "dy": rand(tokens, width + 3, dtype=dtype, scale=1.0),
    }


def mlp_args(case: dict[str, Any]) -> tuple[Any, ...]:
    return (*case["normed"].args, *(case[n] for n in ("w_gate", "b_gate", "w_up", "b_up", "kind")))


def plain_mlp(case: dict[str, Any], d: torch.dtype) -> dict[str, Tensor]:
    """act, the gradients of what enters it, and those of the weights before it, by autograd."""
    h = case["normed"].made(d)
    w = {n: case[n].to(d) for n in ("w_gate", "b_gate", "w_up", "b_up") if case[n] is not None}
    inner = {n: F.linear(h, w[f"w_{n}"], w.get(f"b_{n}")) for n in ("gate", "up") if f"w_{n}" in w}
    leaves = {n: t.detach().requires_grad_() for n, t in inner.items()}
    if "gate" in leaves:
        act = reference.glu(leaves["gate"], leaves["up"], case["kind"])
    else:
        act = reference.activation(leaves["up"], case["kind"])
    dact = case["dy"].to(d) @ case["w_down"].to(d)
    grads = torch.autograd.grad(act, list(leaves.values()), dact)
    found = {"act": act.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}
    return found | inner | {f"dw_{n}": g.t() @ h for n, g in zip(leaves, grads, strict=True)}


class TestMLP:
    @NORMS
    @pytest.mark.parametrize("kind", MLPS)
    def test_in_float32(self, kind, centered):
        self.check(mlp_case(kind, torch.float32, centered, bias=centered, size=SIZES[1]))

    @pytest.mark.parametrize("kind", ["swiglu", "gelu"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [SIZES[0], SIZES[2]])
    def test_dtypes_and_sizes(self, size, dtype, kind):
        self.check(mlp_case(kind, dtype, False, True, size))

    def check(self, case: dict[str, Any]) -> None:
        dtype, shape = case["w_up"].dtype, (case["dy"].shape[0], case["w_up"].shape[0])
        gated = case["w_gate"] is not None
        names = ("act", "gate", "up") if gated else ("act", "up")
        plain, truth = in_both(lambda d: plain_mlp(case, d), dtype)
        got = {n: torch.empty(shape, dtype=dtype, device=DEVICE) for n in (*names, "dgate", "dup")}
        act, gate, up = got["act"], got["gate"] if gated else None, got["up"]
        ops.norm_mlp_(*mlp_args(case), act, gate, up)
        alone = torch.empty_like(act)
        ops.norm_mlp_(*mlp_args(case), alone, None, None)
        assert torch.equal(alone, act)

        dgate, dup = got["dgate"] if gated else None, got["dup"]
        again = torch.empty_like(act)
        ops.norm_mlp_bwd_(case["dy"], case["w_down"], *mlp_args(case), None, None, again, dgate, dup)
        assert torch.equal(again, act)
        kept = [torch.empty_like(act) for _ in range(3)]
        given = (gate, up)
        ops.norm_mlp_bwd_(
            case["dy"], case["w_down"], *mlp_args(case), *given, kept[0], kept[1] if gated else None, kept[2]
        )
        for a, b in zip(kept, (act, dgate, dup), strict=True):
            assert b is None or torch.equal(a, b)

        for n in ("gate", "up") if gated else ("up",):
            total = torch.empty_like(case[f"w_{n}"])
            ops.norm_wgrad_(got[f"d{n}"], *case["normed"].args, total, False)
            got[f"dw_{n}"] = total
        for name, want in truth.items():
            # A weight's gradient is a sum over tokens, in another order than PyTorch's.
            check(got[name], plain[name], want, name, terms=shape[0] ** 0.5 if name.startswith("dw") else 1.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_weight_gradients_are_added_up_in_float32(self, dtype):
        normed, dy = Normed(70, 50, False, dtype), rand(70, 33, dtype=dtype, scale=1.0)
        total = torch.full((33, 50), 3.0, device=DEVICE)
        ops.norm_wgrad_(dy, *normed.args, total, True)
        plain, truth = in_both(lambda d: 3.0 + dy.to(d).t() @ normed.made(d), dtype)
        assert_close_to_truth(total.to(dtype), plain, truth, terms=70**0.5)

    def test_a_gate_where_there_is_none(self):
        for kind, gated in (("swiglu", False), ("gelu", True)):
            case = mlp_case("swiglu" if gated else "gelu", torch.float32, False, False, SIZES[1]) | {"kind": kind}
            act = torch.empty(33, 72, device=DEVICE)
            with pytest.raises(ValueError, match="has no gate" if gated else "needs a gate"):
                ops.norm_mlp_(*mlp_args(case), act, None, None)


class TestInputGradient:
    """Of linear layers that read the same x: one sum of products."""

    @pytest.mark.parametrize("dtype", a_few(DTYPES, always=(1, 2)))
    @pytest.mark.parametrize("d_outs", [(16,), (33, 48), (72, 40, 17), (64, 32, 32), (9, 8, 7, 6)], ids=str)
    @pytest.mark.parametrize(("tokens", "width"), [(1, 16), (37, 70), (64, 96)])
    def test_against_pytorch(self, tokens, width, d_outs, dtype):
        dys = [rand(tokens, n, dtype=dtype, scale=1.0) for n in d_outs]
        weights = [rand(n, width, dtype=dtype, scale=n**-0.5) for n in d_outs]
        out = torch.empty(tokens, width, dtype=dtype, device=DEVICE)
        ops.linears_input_grad_(dys, weights, out)

        def formula(d: torch.dtype) -> Tensor:
            return sum((dy.to(d) @ w.to(d) for dy, w in zip(dys, weights, strict=True)), torch.zeros_like(out, dtype=d))

        check(out, *in_both(formula, dtype), "out")

    def test_rows_of_views(self):
        """Gradients, weights and result as parts of wider tensors: nothing is written beside it."""
        dys, weights = (
            [rand(37, n, dtype=torch.float32) for n in (40, 20)],
            [rand(n, 50, dtype=torch.float32) for n in (40, 20)],
        )
        plain, truth = in_both(
            lambda d: dys[0].to(d) @ weights[0].to(d) + dys[1].to(d) @ weights[1].to(d), torch.float32
        )
        both = torch.full((37, 80), float("nan"), device=DEVICE)
        both[:, 5:45], both[:, 50:70] = dys
        stacked = torch.full((60, 64), float("nan"), device=DEVICE)
        stacked[:, 3:53] = torch.cat(weights)
        out = torch.full((40, 66), 5.0, device=DEVICE)
        parts = [both[:, 5:45], both[:, 50:70]], [stacked[:40, 3:53], stacked[40:, 3:53]]
        ops.linears_input_grad_(*parts, out[:37, 9:59])
        check(out[:37, 9:59], plain, truth, "out")
        out[:37, 9:59] = 5.0
        assert (out == 5).all()

    def test_no_tokens(self):
        out = torch.empty(0, 8, device=DEVICE)
        ops.linears_input_grad_([torch.empty(0, 6, device=DEVICE)], [rand(6, 8, dtype=torch.float32)], out)


class TestTheKernelsAlone:
    """What only the launchers check, or that only the kernels can get wrong."""

    @pytest.fixture(autouse=True)
    def kernels_only(self, backend) -> None:
        if backend != "triton":
            pytest.skip("of the Triton kernels")

    def test_the_same_bits_every_time(self):
        case = mlp_case("swiglu", torch.float32, True, True, (70, 100, 33))
        runs = []
        for _ in range(3):
            outs = [torch.empty(70, 33, device=DEVICE) for _ in range(3)]
            ops.norm_mlp_bwd_(case["dy"], case["w_down"], *mlp_args(case), None, None, *outs)
            runs.append(outs)
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))

    def test_the_same_bits_of_qk_norms_gradients_every_time(self):
        case = finish_bwd_case(torch.float32, **FINISH_BWD_FORMS["more-tiles-than-programs"])
        runs = []
        for _ in range(3):
            d = case["d"].clone()
            runs.append((run_finish_bwd(case, d), d))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))

    def test_bad_gradients_of_q_and_k(self):
        case = finish_bwd_case(torch.float32)
        d = case["d"].clone()
        for spoil, message in (
            ({"raw": case["raw"][:, :40]}, r"raw must be \(37, 60\) with a unit last stride, got \(37, 40\)"),
            ({"raw": case["raw"].half()}, r"raw is torch.float16 on .*, expected torch.float32"),
            ({"head_dim": 8, "weight": case["weight"][:8], "tables": (None, None)}, "60 columns of q or k: expected"),
            ({"weight": case["weight"][:18]}, r"q_norm must be contiguous \(20,\), got \(18,\)"),
            ({"tables": tuple(t[:30] for t in case["tables"])}, r"cos must be contiguous \(37, 10\), got \(30, 10\)"),
        ):
            with pytest.raises(ValueError, match=message):
                run_finish_bwd(case | spoil, d)
        with pytest.raises(ValueError, match=r"d must be \(37, 60\) with a unit last stride"):
            run_finish_bwd(case, rand(37, 120, dtype=torch.float32)[:, ::2])
        assert torch.equal(d, case["d"])

    def test_bad_gradients_of_linear_layers(self):
        dy, w, out = (rand(*s, dtype=torch.float32) for s in ((33, 40), (40, 48), (33, 48)))
        for args, message in (
            (([], [], out), "0 gradients and 0 weights: the kernel takes one to three pairs"),
            (([dy, dy], [w], out), "2 gradients and 1 weights"),
            (([dy], [w[:39]], out), r"weight 0 must be \(40, 48\) with a unit last stride, got \(39, 48\)"),
            (([dy, dy[:32]], [w, w], out), r"gradient 1 must be \(33, 40\)"),
            (([dy, dy], [w, w.half()], out), r"weight 1 is torch.float16 on .*, expected torch.float32"),
            (([dy], [w], out.t().contiguous().t()), r"out must be \(33, 48\) with a unit last stride"),
        ):
            with pytest.raises(ValueError, match=message):
                ops.linears_input_grad_(*args)

    def test_what_lies_beside_a_matrix_is_not_touched(self):
        """Rows of wider tensors, NaN between them; tokens beyond the last are not written."""
        normed = Normed(33, 40, False, torch.float32)
        wide = torch.full((33, 64), float("nan"), device=DEVICE)
        wide[:, :40] = normed.x
        normed.x = wide[:, :40]
        weight = torch.full((72, 64), float("nan"), device=DEVICE)
        weight[:, 7:47] = rand(72, 40, dtype=torch.float32)
        out = torch.full((40, 100), 9.0, device=DEVICE)
        ops.norm_mlp_(*normed.args, None, None, weight[:, 7:47], None, "gelu", out[:33, 5:77], None, None)
        assert out[:33, 5:77].isfinite().all()
        assert (out[33:] == 9).all()
        assert (out[:, :5] == 9).all()
        assert (out[:, 77:] == 9).all()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            ({"rstd": torch.zeros(3)}, r"rstd must be contiguous \(33,\)"),
            ({"weight": torch.zeros(7)}, r"the norm's weight must be contiguous \(48,\)"),
            ({"x": torch.zeros(33, 48, dtype=torch.int32)}, "x is torch.int32|dtype torch.int32"),
            ({"x": torch.zeros(33, 0)}, "x must have at least one column to be normalised"),
        ],
        ids=["rstd", "weight", "dtype", "no columns"],
    )
    def test_bad_norms(self, spoil, message):
        normed = Normed(33, 48, False, torch.float32)
        for name, t in spoil.items():
            setattr(normed, name, t.to(DEVICE))
        w = rand(72, 48, dtype=torch.float32)
        with pytest.raises(ValueError, match=message):
            ops.norm_mlp_(*normed.args, None, None, w, None, "gelu", w.new_empty(33, 72), None, None)

    def test_bad_matrices(self):
        normed, w = Normed(33, 48, False, torch.float32), rand(72, 48, dtype=torch.float32)
        with pytest.raises(ValueError, match=r"act must be \(33, 72\) with a unit last stride, got \(33, 71\)"):
            ops.norm_mlp_(*normed.args, None, None, w, None, "gelu", w.new_empty(33, 71), None, None)
        with pytest.raises(ValueError, match=r"the weight of up must be \(72, 48\)"):
            ops.norm_mlp_(*normed.args, None, None, w[:, :47], None, "gelu", w.new_empty(33, 72), None, None)
        out = w.new_empty(33, 72)
        with pytest.raises(ValueError, match=r"weight is torch.float16 on .*, expected torch.float32"):
            ops.linear_residual_(normed.x, w.half(), None, out, out, False, False, 0.0)

    def test_choice(self, monkeypatch):
        choice = triton_backend.kernels("fused.choice")
        table = [choice.Key(a, o, d, s) for a in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter")
                 for o in choice.OPS for d in ("half", "float32") for s in ("wide", "narrow")]  # fmt: skip
        for key in table:
            assert choice.config(key).block_n % 64 == 0 or key.op != "residual"  # the shares of statistics
            assert choice.config(key).exact == "ieee" or (key.arch, key.dtype) != ("gfx942", "float32")
            assert not choice.fuses(key)  # until a measurement says otherwise
        monkeypatch.setenv("PYCKPT_FUSED", "qkv, mlp")
        assert {k.op for k in table if choice.fuses(k)} == {"qkv", "mlp"}
        monkeypatch.setenv("PYCKPT_FUSED", "all")
        assert all(choice.fuses(k) for k in table)
        monkeypatch.setenv("PYCKPT_FUSED", "qkv,conv")
        with pytest.raises(ValueError, match=r"PYCKPT_FUSED='qkv,conv': expected all, none, or some of qkv,residual"):
            choice.fuses(table[0])
