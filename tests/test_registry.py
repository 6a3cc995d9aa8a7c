"""What holds for every op: schema, fake, autograd registration, choice of backend, errors of transforms."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import a_few, check_exact
from op_samples import fused_samples
from torch import Tensor
from torch.autograd import forward_ad

import pyckpt
from pyckpt.exec import compiled
from pyckpt.ops import reference, registry
from pyckpt.ops.rope import rope_tables
from pyckpt.save import SAVE_SETS, save_set
from pyckpt.spec import GATED_MLPS, PLAIN_MLPS, BlockSpec
from pyckpt.tokenwise.parameters import parameter_shapes

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.pyckpt
Sample = tuple[Any, ...]


def randn(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


# --- samples: for every op, arguments that take each of its ways --------------------------------------------


def attention_samples(grad: bool) -> Iterator[Sample]:
    cu = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    plain, capped = (-1, 0, 0.0, 0.4), (2, 1, 1.5, 0.4)
    for options in (plain, capped, (3, 0, 0.0, 0.4)):
        yield randn(2, 5, 4, 8, grad=grad), randn(2, 7, 2, 8), randn(2, 7, 2, 8, grad=grad), None, None, *options
        yield randn(9, 4, 8, grad=grad), randn(9, 2, 8, grad=grad), randn(9, 2, 8), cu, cu, *options
    yield randn(2, 5, 4, 8), randn(2, 7, 2, 8, grad=grad), randn(2, 7, 2, 3), None, None, *plain
    extras = randn(4, grad=grad), randn(2, 4), 0.25, 5
    yield randn(2, 5, 4, 8, grad=grad), randn(2, 7, 2, 8), randn(2, 7, 2, 8), None, None, *plain, *extras
    apart = torch.tensor([[0, 0, 7, 9], [0, 2, 4, 9]], dtype=torch.int32)
    yield *(randn(9, 2, 8, grad=grad) for _ in range(3)), *apart, *plain, None, None, 0.0, None, True
    yield *(randn(2, 8, 2, 5).transpose(1, 2).requires_grad_(grad) for _ in range(3)), None, None, *plain
    yield *(randn(1, 6, 2, 8, dtype=torch.bfloat16, grad=grad) for _ in range(3)), None, None, *plain


def attention_bwd_samples() -> Iterator[Sample]:
    for q, k, v, *options in attention_samples(False):
        o, lse = ops.attention_fwd(q, k, v, *options)
        for dlse in (None, torch.randn_like(lse)):
            yield torch.randn_like(o), q, k, v, o, lse, dlse, *options


def attention_delta_samples() -> Iterator[Sample]:
    for do, _q, _k, _v, o, _lse, dlse, *_ in attention_bwd_samples():
        yield do, o, dlse


def attention_tile_samples() -> Iterator[Sample]:
    q, k, v = randn(2, 5, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 3)
    for extras in ((), (randn(4), 0.25, 5)):
        yield q, k, v, torch.zeros(2, 5, 4, 3), randn(2, 4, 5), -1, 0, 0.0, 0.4, 9, 3, *extras


def attention_tile_bwd_samples() -> Iterator[Sample]:
    for q, k, v, o, lse, *options in attention_tile_samples():
        grads = (torch.zeros_like(t) for t in (q, k, v))
        yield torch.randn_like(o), q, k, v, lse, torch.randn_like(lse), *grads, *options


def merge_samples() -> Iterator[Sample]:
    for lead, stat in (((2, 5), (2, 4, 5)), ((5,), (4, 5))):
        for dtype in (torch.float32, torch.float16):
            yield randn(*lead, 4, 3), randn(*stat), randn(*lead, 4, 3, dtype=dtype), randn(*stat)


def norm_samples(params: int, grad: bool) -> Iterator[Sample]:
    yield randn(3, 5, grad=grad), *(randn(5, grad=grad) for _ in range(params)), 1e-5
    yield randn(2, 3, 5, grad=grad), *(None for _ in range(params)), 1e-5
    yield randn(5, 3, grad=grad).t(), *(randn(5) for _ in range(params)), 1e-5
    yield randn(4, 6, dtype=torch.bfloat16, grad=grad), *(randn(6, grad=grad) for _ in range(params)), 1e-5


def norm_bwd_samples(fwd: Any, params: int, add: bool) -> Iterator[Sample]:
    for (x, *weights, eps), need in itertools.product(norm_samples(params, False), (False, True)):
        y, *stats = fwd(x, *weights, eps)
        into = (torch.randn(x.shape).to(x.dtype),) if add else ()
        yield torch.randn_like(y), x, weights[0], *stats, *into, need


def rope_samples(grad: bool) -> Iterator[Sample]:
    cos, sin = rope_tables(torch.arange(5), 4, 100.0)
    for inverse, interleaved in itertools.product((False, True), repeat=2):
        yield randn(2, 5, 3, 4, grad=grad), cos, sin, inverse, interleaved
        yield randn(5, 3, 6, grad=grad), cos, sin, inverse, interleaved
    if grad:
        yield randn(2, 3, 5, 4, grad=True).transpose(1, 2), cos, sin, False, False
    yield randn(5, 3, 4, dtype=torch.float16, grad=grad), cos, sin, False, False


def rope_qk_samples() -> Iterator[Sample]:
    for q, *options in rope_samples(False):
        yield q, randn(*q.shape[:-2], 2, q.shape[-1], dtype=q.dtype), *options


def pointwise_samples(kinds: tuple[str, ...], tensors: int, grad: bool) -> Iterator[Sample]:
    for kind in kinds:
        yield *(randn(3, 5, grad=grad) for _ in range(tensors)), kind
        yield *(randn(2, 3, 4, dtype=torch.bfloat16, grad=grad) for _ in range(tensors)), kind


def loss_samples(reductions: tuple[str, ...], grad: bool) -> Iterator[tuple[Any, ...]]:
    target = torch.tensor([0, 3, -100, 6])
    for reduction, options in itertools.product(reductions, ((0.0, 0.0, 0.0), (2.0, 0.1, 0.1))):
        x, weight, bias = randn(4, 5, grad=grad), randn(7, 5, grad=grad), randn(7, grad=grad)
        needs = (grad and reduction != "none",) * 3
        tokens = torch.rand(4).masked_fill(target == -100, 0.0)
        yield x, weight, bias, target, -100, *options, None, reduction, *needs
        yield x.detach(), weight, None, target, -100, *options, tokens, reduction, False, needs[1], False
        yield x, weight.detach(), None, target, -100, *options, tokens, reduction, needs[0], False, False


def loss_bwd_samples() -> Iterator[Sample]:
    for x, weight, bias, target, *options in loss_samples(("none",), False):
        lse = ops.linear_cross_entropy_fwd(x, weight, bias, target, *options)[1]
        options = options[: -len(("weights", "reduction", "dx", "dw", "db"))]
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            for dloss in (torch.randn(4), torch.randn(())):
                yield dloss, lse, x, weight, bias, target, *options, *needs


def loss_tile_samples() -> Iterator[Sample]:
    for x, weight, bias, target, *options in loss_samples(("sum",), False):
        tensors = (x, weight, bias)
        for needs in itertools.product((False, True), repeat=3):
            grads = [
                torch.zeros_like(t) if need and t is not None else None for t, need in zip(tensors, needs, strict=True)
            ]
            yield x, weight, bias, target, *options[:-5], torch.rand(4) if needs[0] else None, *grads


def block_samples(grad: bool) -> Iterator[Sample]:
    cu = torch.tensor([0, 4, 4, 10], dtype=torch.int32)
    kinds = {"gated": {}, "plain": {"mlp": "gelu", "norm": "layernorm", "bias": True, "rope_theta": None}}
    for (kind, options), save in itertools.product(kinds.items(), SAVE_SETS):
        spec = BlockSpec.make(8, 2, n_kv_heads=1, d_ff=12, qk_norm=kind == "gated", **options)
        weights = [randn(*shape, grad=grad) for shape in parameter_shapes(spec).values()]
        x, positions, cu_seqlens = (
            (randn(2, 5, 8, grad=grad), None, None)
            if kind == "gated"
            else (randn(10, 8, grad=grad), torch.arange(10), cu)
        )
        yield x, positions, cu_seqlens, None, weights, spec.to_string(), save, 3, 1 << 30, torch.float32


def seeded_block_samples(grad: bool) -> Iterator[Sample]:
    for x, positions, cu_seqlens, _, weights, spec, *rest in block_samples(grad):
        dropping = dataclasses.replace(BlockSpec.from_string(spec), dropout=0.3).to_string()
        yield x, positions, cu_seqlens, torch.tensor([5]), weights, dropping, *rest


def block_bwd_samples(samples: Callable[[bool], Iterator[Sample]], fwd: Any) -> Iterator[Sample]:
    for sample in samples(False):
        y, kept = fwd(*sample)
        n = len(sample[4])
        for need_dx, need_weights in ((True, [True] * n), (False, [i % 2 == 0 for i in range(n)])):
            yield torch.randn_like(y), kept, *sample, need_dx, need_weights


SAMPLES: dict[str, Callable[[bool], Iterator[Sample]]] = {
    "attention_fwd": attention_samples,
    "attention_bwd": lambda grad: attention_bwd_samples(),
    "attention_delta": lambda grad: attention_delta_samples(),
    "attention_merge_": lambda grad: merge_samples(),
    "rope_qk_": lambda grad: rope_qk_samples(),
    "attention_tile_fwd_": lambda grad: attention_tile_samples(),
    "attention_tile_bwd_": lambda grad: attention_tile_bwd_samples(),
    "add_rms_norm_fwd": lambda grad: (
        (s[0], randn(*s[0].shape, dtype=s[0].dtype), *s[1:]) for s in norm_samples(1, grad)
    ),
    "add_layer_norm_fwd": lambda grad: (
        (s[0], randn(*s[0].shape, dtype=s[0].dtype), *s[1:]) for s in norm_samples(2, grad)
    ),
    "rms_norm_fwd": lambda grad: norm_samples(1, grad),
    "rms_norm_bwd": lambda grad: norm_bwd_samples(ops.rms_norm_fwd, 1, add=False),
    "rms_norm_bwd_add_": lambda grad: norm_bwd_samples(ops.rms_norm_fwd, 1, add=True),
    "layer_norm_fwd": lambda grad: norm_samples(2, grad),
    "layer_norm_bwd": lambda grad: norm_bwd_samples(ops.layer_norm_fwd, 2, add=False),
    "layer_norm_bwd_add_": lambda grad: norm_bwd_samples(ops.layer_norm_fwd, 2, add=True),
    "rope": rope_samples,
    "rope_": lambda grad: rope_samples(False),
    "glu_fwd": lambda grad: pointwise_samples(GATED_MLPS, 2, grad),
    "glu_fwd_": lambda grad: pointwise_samples(GATED_MLPS, 2, False),
    "glu_bwd": lambda grad: pointwise_samples(GATED_MLPS, 3, False),
    "glu_bwd_": lambda grad: pointwise_samples(GATED_MLPS, 3, False),
    "act_fwd": lambda grad: pointwise_samples(PLAIN_MLPS, 1, grad),
    "act_fwd_": lambda grad: pointwise_samples(PLAIN_MLPS, 1, False),
    "act_bwd": lambda grad: pointwise_samples(PLAIN_MLPS, 2, False),
    "act_bwd_": lambda grad: pointwise_samples(PLAIN_MLPS, 2, False),
    "dropout_": lambda grad: ((randn(4, 6), r, randn(4, 6), 0.3, 5, 2) for r in (None, randn(4, 6))),
    "add_product_": lambda grad: (
        (randn(4, 6), randn(5, 4).to(d).t(), randn(5, 6).to(d)) for d in (torch.float64, torch.float32, torch.bfloat16)
    ),
    **{
        name: lambda grad, makers=makers: (make() for make in makers)
        for name, makers in fused_samples(lambda *shape: randn(*shape, dtype=torch.float32)).items()
    },
    "linear_cross_entropy_fwd": lambda grad: loss_samples(("mean", "sum", "none"), grad),
    "linear_cross_entropy_tile_": lambda grad: loss_tile_samples(),
    "linear_cross_entropy_bwd": lambda grad: loss_bwd_samples(),
    "block_fwd": block_samples,
    "block_bwd": lambda grad: block_bwd_samples(block_samples, ops.block_fwd),
    "block_fwd_seeded": seeded_block_samples,
    "block_bwd_seeded": lambda grad: block_bwd_samples(seeded_block_samples, ops.block_fwd_seeded),
    "added_tokens": lambda grad: [(torch.tensor([[0.0, -1e9], [0.0, 0.0]]), False)],
    "packed_lengths": lambda grad: [(torch.tensor([[0, 1, 0, 0, 1]]), 1, 5)],
    "padded_lengths": lambda grad: [
        (torch.tensor([[1, 1, 0], [0, 1, 1]]), "before", None, None),
        (torch.tensor([[1, 1, 0], [1, 1, 1]]), "before", 5, torch.tensor([[True, True, False]] * 2)),
    ],
}
DIFFERENTIABLE = ("attention_fwd", "rms_norm_fwd", "layer_norm_fwd", "rope", "glu_fwd", "act_fwd")
DIFFERENTIABLE += ("add_rms_norm_fwd", "add_layer_norm_fwd", "linear_cross_entropy_fwd")
DIFFERENTIABLE += ("block_fwd", "block_fwd_seeded")


def test_every_op_has_samples():
    declared = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pyckpt::")
    }
    assert declared == set(SAMPLES)
    compiled = {f"block_{way}{kind}" for way in ("fwd", "bwd") for kind in ("", "_seeded")}
    masks = {"packed_lengths", "padded_lengths", "added_tokens"}
    assert declared == set(registry.IMPLEMENTATIONS) | compiled | masks


def test_what_reads_values_on_the_host_stays_out_of_cuda_graphs():
    """Seeds would be the same at each replay, and a GPU that is waited for ends a capture."""
    outside = {n for n in SAMPLES if torch.Tag.cudagraph_unsafe in getattr(ops, n).default.tags}
    assert outside == {"block_fwd_seeded", "block_bwd_seeded", "padded_lengths", "added_tokens"}


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op = getattr(ops, name).default
    for sample in SAMPLES[name](name in DIFFERENTIABLE):
        torch.library.opcheck(op, sample, test_utils=QUICK)


@pytest.mark.parametrize("name", a_few(SAMPLES, always=range(0, len(SAMPLES), 3)))
def test_opcheck_under_dynamic_shapes(name):
    """Traced by AOTAutograd with symbolic sizes: slow, so for one sample of each op, drawn anew every time."""
    op = getattr(ops, name).default
    samples = list(SAMPLES[name](name in DIFFERENTIABLE))
    sample = samples[int(torch.randint(len(samples), ()))]
    torch.library.opcheck(op, sample, test_utils=("test_aot_dispatch_dynamic",))


# How long its result is, a fake can't know.
SIZED = [name for name in SAMPLES if name != "packed_lengths"]


@pytest.mark.parametrize("name", a_few(SIZED, always=range(1, len(SIZED), 3)))
def test_fakes_have_the_strides_of_the_results(name):
    """`torch.compile` plans memory from the fakes: sizes, strides and dtypes must be those of the real thing."""
    op = getattr(ops, name).default
    for sample in SAMPLES[name](False):
        mode = torch._subclasses.FakeTensorMode()
        with mode:
            fake = op(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, sample))
        real = op(*sample)
        pairs = zip(*(torch.utils._pytree.tree_leaves(out) for out in (fake, real)), strict=True)
        for f, r in pairs:
            if r is not None:
                assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), name


@pytest.mark.parametrize("name", SAMPLES)
def test_results_are_no_views_of_the_arguments(name):
    op = getattr(ops, name).default
    for sample in SAMPLES[name](False):
        given = {t.untyped_storage().data_ptr() for t in tensors_of(sample)}
        made = [t.untyped_storage().data_ptr() for t in tensors_of(op(*sample)) if t.numel()]
        assert not given.intersection(made)
        assert len(set(made)) == len(made)


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def test_kept_names_of_the_compiled_block_are_what_the_executor_keeps():
    for sample in block_samples(False):
        _, kept = ops.block_fwd(*sample)
        assert len(kept) == len(compiled.kept_names(BlockSpec.from_string(sample[5]), save_set(sample[6])))


# --- the choice of a backend --------------------------------------------------------------------------------


class TestChoice:
    @pytest.fixture(autouse=True)
    def no_backend_forced(self, monkeypatch):
        monkeypatch.delenv("PYCKPT_BACKEND", raising=False)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    @pytest.fixture
    def more_backends(self, monkeypatch) -> list[str]:
        """A Triton implementation of act_fwd that says when it runs."""
        calls: list[str] = []

        def triton(x: Tensor, kind: str) -> Tensor:
            calls.append(kind)
            return torch.full_like(x, 7.0)

        monkeypatch.setitem(registry.IMPLEMENTATIONS, "act_fwd", dict(registry.IMPLEMENTATIONS["act_fwd"]))
        registry.implement("act_fwd", "triton")(triton)
        return calls

    def test_default(self):
        for name in registry.IMPLEMENTATIONS:
            backend, reason = registry.choose(name, "cpu")
            compiled = "cpp" in registry.IMPLEMENTATIONS[name]
            assert backend == ("cpp" if compiled else "torch")
            assert "default on cpu" in reason

    @pytest.mark.parametrize("value", ["cutlass", "torch,triton", "0"])
    def test_a_backend_that_does_not_exist(self, monkeypatch, value):
        monkeypatch.setenv("PYCKPT_BACKEND", value)
        message = f"PYCKPT_BACKEND='{value}' names no backend; expected one of torch, cpp, triton, cuda, or unset"
        with pytest.raises(ValueError, match=message):
            registry.choose("rms_norm_fwd", "cpu")
        with pytest.raises(ValueError, match=message):
            pyckpt.rms_norm(torch.randn(2, 3))

    @pytest.mark.parametrize("value", ["", "  ", "TORCH", " torch "])
    def test_spelling(self, monkeypatch, value):
        monkeypatch.setenv("PYCKPT_BACKEND", value)
        assert registry.choose("rms_norm_fwd", "cpu")[0] == "torch"
        assert registry.forced_backend() == (value.strip().lower() or None)

    def test_a_forced_backend_that_an_op_lacks(self, monkeypatch):
        monkeypatch.setenv("PYCKPT_BACKEND", "cuda")
        backend, reason = registry.choose("act_fwd", "cpu")
        assert backend == "torch"
        assert "PYCKPT_BACKEND=cuda ignored: has no cuda implementation" in reason
        x = torch.randn(3, 4)
        assert torch.equal(pyckpt.activation(x, "relu2"), x.relu().square())

    def test_a_forced_backend_that_cannot_run_here(self, monkeypatch, more_backends):
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
        backend, reason = registry.choose("act_fwd", "cpu")
        assert backend == "torch"
        assert "PYCKPT_BACKEND=triton ignored: triton cannot run on cpu" in reason
        x = torch.randn(3, 4)
        assert torch.equal(pyckpt.activation(x, "relu2"), x.relu().square())
        assert more_backends == []

    def test_a_forced_backend_that_runs(self, monkeypatch, more_backends):
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert registry.choose("act_fwd", "cpu") == ("triton", "PYCKPT_BACKEND=triton")
        assert (pyckpt.activation(torch.randn(3, 4), "relu2") == 7.0).all()
        assert more_backends == ["relu2"]
        monkeypatch.setenv("PYCKPT_BACKEND", "torch")
        assert registry.choose("act_fwd", "cpu") == ("torch", "PYCKPT_BACKEND=torch")

    def test_cuda_prefers_triton(self, more_backends):
        assert registry.choose("act_fwd", "cuda")[0] == "triton"
        assert registry.choose("linear_cross_entropy_fwd", "cuda")[0] == "triton"

    def test_the_extension_has_to_be_measured_faster(self, monkeypatch, more_backends):
        registry.implement("act_fwd", "cuda")(lambda x, kind: x)
        assert registry.choose("act_fwd", "cuda") == ("triton", "default on cuda")
        monkeypatch.setattr(registry, "measured", lambda: {"results": "norm_x.json", "cuda_first": ["act_fwd"]})
        assert registry.choose("act_fwd", "cuda") == ("cuda", "measured faster: norm_x.json")
        assert registry.choose("act_fwd", "cpu")[0] == "torch"
        assert registry.choose("rms_norm_fwd", "cuda")[0] == "triton"
        del registry.IMPLEMENTATIONS["act_fwd"]["cuda"]
        assert registry.choose("act_fwd", "cuda") == ("triton", "default on cuda")
        monkeypatch.setenv("PYCKPT_BACKEND", "cuda")
        registry.implement("act_fwd", "cuda")(lambda x, kind: x)
        assert registry.choose("act_fwd", "cuda") == ("cuda", "PYCKPT_BACKEND=cuda")

    def test_what_was_measured_is_there_to_read(self):
        """The table names ops that exist, and a file with figures wherever it names any."""
        table = registry.measured()
        assert set(table) == {"results", "cuda_first"}
        assert set(table["cuda_first"]) <= set(registry.IMPLEMENTATIONS)
        assert not table["cuda_first"] or (ROOT / table["results"]).is_file()

    def test_no_implementation(self, monkeypatch):
        monkeypatch.setitem(registry.IMPLEMENTATIONS, "act_fwd", {"cuda": None})
        with pytest.raises(RuntimeError, match="op act_fwd has no implementation for cpu"):
            registry.choose("act_fwd", "cpu")


@pytest.mark.parametrize(
    ("capabilities", "backend"), [([(7, 5)], "torch"), ([(7, 0), (8, 6)], "triton"), ([(9, 0)], "triton")]
)
def test_gpus_whose_matrix_units_triton_lacks_have_pytorchs_kernels(capabilities, backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("PYCKPT_BACKEND", raising=False)
    registry._has_matrix_units.cache_clear()
    try:
        assert registry.choose("attention_fwd", "cuda")[0] == backend
    finally:
        monkeypatch.undo()
        registry._has_matrix_units.cache_clear()


def test_an_implementation_runs_without_autocast(monkeypatch):
    seen = []

    def fake(x: Tensor, kind: str) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return x.clone()

    monkeypatch.setitem(registry.IMPLEMENTATIONS, "act_fwd", {"torch": fake})
    with torch.autocast("cpu", torch.bfloat16):
        pyckpt.activation(torch.randn(2, 3))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_run_visible_shows_the_inside_of_an_op():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __init__(self, look_inside: bool) -> None:
            super().__init__()
            self.names: list[str] = []
            self.look_inside = look_inside

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.name())
            if self.look_inside and registry.is_pyckpt(func):
                with self:
                    return registry.run_visible(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3)
    for look_inside in (False, True):
        with Recorder(look_inside) as recorder:
            y = pyckpt.activation(x, "relu2")
        assert torch.equal(y, x.relu().square())
        assert "pyckpt::act_fwd" in recorder.names
        assert ("aten::clamp_min" in recorder.names) == look_inside


# --- what the ops refuse ------------------------------------------------------------------------------------

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]]]] = {
    "attention": (pyckpt.attention, {"q": (1, 4, 2, 4), "k": (1, 4, 2, 4), "v": (1, 4, 2, 4)}),
    "rms_norm": (pyckpt.rms_norm, {"x": (3, 4), "weight": (4,)}),
    "layer_norm": (pyckpt.layer_norm, {"x": (3, 4), "weight": (4,), "bias": (4,)}),
    "rope": (pyckpt.rope, {"x": (1, 4, 2, 4)}),
    "glu": (pyckpt.glu, {"gate": (3, 4), "up": (3, 4)}),
    "activation": (pyckpt.activation, {"x": (3, 4)}),
    "linear_cross_entropy": (
        lambda x, w: pyckpt.linear_cross_entropy(x, w, torch.tensor([0, 5, 2])),
        {"x": (3, 4), "weight": (6, 4)},
    ),
    "linear_cross_entropy none": (
        lambda x, w: pyckpt.linear_cross_entropy(x, w, torch.tensor([0, 5, 2]), reduction="none"),
        {"x": (3, 4), "weight": (6, 4)},
    ),
}
ALL_FUNCTIONS = pytest.mark.parametrize("name", FUNCTIONS)


def arguments(name: str, grad: bool = True) -> tuple[Callable[..., Tensor], list[Tensor]]:
    fn, shapes = FUNCTIONS[name]
    return fn, [randn(*s, grad=grad, dtype=torch.float64) for s in shapes.values()]


class TestTransforms:
    @ALL_FUNCTIONS
    def test_double_backward(self, name):
        fn, args = arguments(name)
        with pytest.raises(RuntimeError, match=r"double backward through the op pyckpt::\w+ is not supported"):
            torch.autograd.grad(fn(*args).square().sum(), args, create_graph=True)

    @ALL_FUNCTIONS
    def test_forward_mode(self, name):
        fn, args = arguments(name, grad=False)
        for i in range(len(args)):
            with forward_ad.dual_level():
                duals = list(args)
                duals[i] = forward_ad.make_dual(args[i], torch.ones_like(args[i]))
                with pytest.raises(RuntimeError, match="does not support forward-mode differentiation"):
                    fn(*duals)

    @ALL_FUNCTIONS
    def test_functorch(self, name):
        fn, args = arguments(name, grad=False)
        for transformed in (
            lambda: torch.func.vmap(fn)(*(a.unsqueeze(0) for a in args)),
            lambda: torch.func.grad(lambda *a: fn(*a).sum())(*args),
            lambda: torch.func.jvp(fn, tuple(args), tuple(args)),
        ):
            with pytest.raises(RuntimeError, match=r"does not support torch\.func transforms"):
                transformed()

    @ALL_FUNCTIONS
    def test_a_second_backward(self, name):
        fn, args = arguments(name)
        out = fn(*args)
        dout = torch.randn_like(out)
        first = torch.autograd.grad(out, args, dout, retain_graph=True)
        second = torch.autograd.grad(out, args, dout)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out, args, dout)

    @pytest.mark.parametrize("name", [n for n in FUNCTIONS if n not in ("rope", "linear_cross_entropy")])
    def test_a_saved_tensor_changed_in_place(self, name):
        fn, args = arguments(name)
        kept = args[0] * 1
        out = fn(kept, *args[1:])
        kept.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    @ALL_FUNCTIONS
    def test_in_a_checkpoint(self, name):
        """Nested in torch.utils.checkpoint: the same bits."""
        from torch.utils.checkpoint import checkpoint

        fn, args = arguments(name)
        want = torch.autograd.grad(fn(*args).square().sum(), args)
        for reentrant in (False, True):
            out = checkpoint(fn, *args, use_reentrant=reentrant)
            out.square().sum().backward()
            for a, b in zip(args, want, strict=True):
                assert torch.equal(a.grad, b)
                a.grad = None


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiled_by_inductor():
    """All ops in one function, through PyTorch's compiler to native code."""

    def chain(
        namespace: Any, x: Tensor, w: Tensor, head: Tensor, kv: Tensor, attend: Any, turn: Any, loss: Any
    ) -> Tensor:
        h = namespace.layer_norm(namespace.rms_norm(x, w) * 2)
        q = turn(h.view(1, 8, 2, 4))
        o = attend(q, kv, kv).reshape(8, 8)
        h = namespace.glu(o, o + 1, "swiglu") + namespace.activation(o, "gelu")
        return loss(h, head)

    target = torch.randint(0, 9, (8,))

    def ours(x: Tensor, w: Tensor, head: Tensor, kv: Tensor) -> Tensor:
        def loss(h: Tensor, head: Tensor) -> Tensor:
            return pyckpt.linear_cross_entropy(h, head, target)

        return chain(pyckpt, x, w, head, kv, pyckpt.attention, pyckpt.rope, loss)

    def truth(x: Tensor, w: Tensor, head: Tensor, kv: Tensor) -> Tensor:
        return chain(
            reference,
            x,
            w,
            head,
            kv,
            lambda q, k, v: reference.attention(q, k, v, window=(-1, 0))[0],
            lambda x: reference.rope(x, torch.arange(8)),
            lambda h, head: reference.linear_cross_entropy(h, head, target),
        )

    shapes = {"x": (8, 8), "w": (8,), "head": (9, 8), "kv": (1, 8, 2, 4)}
    inputs = {n: torch.randn(s, dtype=torch.float64) for n, s in shapes.items()}
    check_exact(torch.compile(ours, fullgraph=True), truth, inputs, terms=10.0)
