"""The tracker against what is known exactly: arithmetic, and the CPU allocator's own account."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import a_few
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyckpt
from pyckpt import measure
from pyckpt.measure import flops
from pyckpt.save import bytes_per_token
from pyckpt.spec import BlockSpec

KB = 1024  # elements of 4 bytes each: 1024 floats are one page of 4 KiB
PAGE = 4 * KB


@pytest.fixture(autouse=True)
def no_collector():
    """Nothing here may need the garbage collector: memory is counted as it is released."""
    gc.collect(1)  # of what is young: all of it takes half a second in a process with torch and transformers
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Work this small only waits for its own threads, and worst of all beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def page(**kwargs) -> torch.Tensor:
    return torch.randn(KB, **kwargs)


class Square(torch.autograd.Function):
    """Keeps its input and its weight by save_for_backward, the weight as a transpose too."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w, w.t())
        return x @ w.t()

    @staticmethod
    def backward(ctx, dy):
        x, w, _ = ctx.saved_tensors
        return dy @ w, dy.t() @ x


class TestLiveAndPeak:
    def test_temporaries_and_aliases(self):
        with measure.memory() as m:
            a = page()
            b = a.view(2, -1)[1]  # the same storage
            del a
            assert m.live_bytes == PAGE
            c = b.exp()
            assert m.live_bytes == PAGE + PAGE // 2
            del b, c
            assert m.live_bytes == 0
        assert (m.peak_bytes, m.live_bytes) == (PAGE + PAGE // 2, 0)

    def test_baseline_is_not_counted(self):
        x = page()
        with measure.memory() as m:
            x.mul_(2)
            x.view(2, -1).add_(1)
        assert (m.peak_bytes, m.live_bytes) == (0, 0)

    def test_freeing_the_baseline_is_negative(self):
        x = page()
        with measure.memory() as m:
            y = x.exp()
            del x
            z = y.exp()
            del y, z
        assert (m.peak_bytes, m.live_bytes) == (PAGE, -PAGE)

    def test_known_gradients_are_baseline(self):
        model = nn.Linear(KB, 1, bias=False)
        x = page()
        model(x).sum().backward()
        with measure.memory(model) as m:
            model.zero_grad(set_to_none=True)
            assert m.live_bytes == -PAGE
            model(x).sum().backward()
            assert m.live_bytes == 0
        assert m.live_bytes == 0

    def test_resize_and_out(self):
        with measure.memory() as m:
            out = torch.empty(0)
            torch.ones(KB, out=out)
            assert m.live_bytes == PAGE
            out.resize_(2 * KB)
            assert m.live_bytes == 2 * PAGE
            out.untyped_storage().resize_(0)
            assert m.live_bytes == 0
        assert m.peak_bytes >= 2 * PAGE

    def test_torch_tensor(self):
        with measure.memory() as m:
            a = torch.tensor([0.0] * KB)
            assert m.live_bytes == PAGE
            del a
        assert m.live_bytes == 0

    def test_held_by_autograd_alone(self):
        x = page(requires_grad=True)
        with measure.memory() as m:
            loss = x.exp().exp().sum()  # both results are saved by their nodes, and no Python name holds them
            m.mark("forward")
            loss.backward()
            m.mark("backward")
            del loss
        assert m.marks["forward"].live_bytes == 2 * PAGE + 4
        assert m.live_bytes == PAGE  # x.grad
        assert m.marks["forward"].peak_bytes <= m.marks["backward"].peak_bytes == m.peak_bytes
        x.grad = None

    def test_backward_of_retained_graph(self):
        x = page(requires_grad=True)
        with measure.memory() as m:
            loss = x.exp().sum()
            loss.backward(retain_graph=True)
            assert m.marks == {} and m.mark("kept").live_bytes == 2 * PAGE + 4
            loss.backward()
            assert m.mark("gone").live_bytes == PAGE + 4
        assert m.marks["kept"].saved_bytes == PAGE
        assert m.marks["gone"].saved_bytes == 0

    def test_double_backward(self):
        x = page(requires_grad=True)
        with measure.memory():
            (g,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.sum(), x)
        torch.testing.assert_close(h, x.exp())

    def test_checkpoint_frees_and_recomputes(self):
        x = page(requires_grad=True)

        def steps(x):
            return x.exp().exp().exp().exp()

        def measured(run):
            with measure.memory() as m:
                loss = run(x).sum()
                m.mark("forward")
                loss.backward()
                del loss
            x.grad = None
            return m

        plain, ckpt = measured(steps), measured(lambda x: checkpoint(steps, x, use_reentrant=False))
        assert plain.saved_bytes == 4 * PAGE
        assert ckpt.saved_bytes == PAGE  # x, and nothing of the graph that is rebuilt in the backward
        assert plain.marks["forward"].live_bytes == 4 * PAGE + 4
        assert ckpt.marks["forward"].live_bytes == 4
        assert ckpt.marks["forward"].peak_bytes == 2 * PAGE  # one exp in, one out
        assert ckpt.peak_bytes >= 4 * PAGE  # the recomputed graph
        assert plain.live_bytes == ckpt.live_bytes == PAGE

    def test_reentrant_checkpoint(self):
        x = page(requires_grad=True)
        with measure.memory() as m:
            checkpoint(lambda x: x.exp().exp(), x, use_reentrant=True).sum().backward()
        assert m.saved_bytes == PAGE
        assert m.live_bytes == PAGE

    def test_holds_no_tensor(self):
        with measure.memory() as m:
            x = page(requires_grad=True)
            y = x.exp()
            loss = y.sum()
            loss.backward()
            refs = [weakref.ref(t) for t in (x, y, loss)] + [weakref.ref(x.grad.untyped_storage())]
            del x, y, loss
            assert [r() for r in refs] == [None] * 4
        assert m.live_bytes == 0

    def test_graph_dropped_without_backward(self):
        with measure.memory() as m:
            x = page(requires_grad=True)
            y = x.exp()  # saves its own output
            del x, y
            assert m.mark("dropped") == measure.Mark(0, 2 * PAGE, 0)
        assert m.saved_bytes == PAGE

    def test_exception_leaves_nothing_behind(self):
        with pytest.raises(ZeroDivisionError), measure.memory() as m:
            page()
            raise ZeroDivisionError
        assert m.peak_bytes == PAGE
        with measure.memory() as again:
            pass
        assert again.peak_bytes == 0

    def test_storage_that_outlives_the_measurement(self):
        with measure.memory() as m:
            x = page()
        assert m.live_bytes == PAGE
        del x
        assert m.live_bytes == PAGE

    def test_misuse(self):
        with measure.memory() as m, pytest.raises(RuntimeError, match="can't be nested"), measure.memory():
            pass
        with pytest.raises(RuntimeError, match="used before"), m:
            pass
        with pytest.raises(RuntimeError, match="inside"):
            m.mark("late")
        with pytest.raises(ValueError, match="meta"):
            measure.memory(device="meta")
        for device in ("gpu", 1.5):
            with pytest.raises(ValueError, match=f"device={device!r} is no device; give device='cpu' or device='cuda'"):
                measure.memory(device=device)
        with pytest.raises(TypeError, match=r"modules has a int under 'a', expected a torch\.nn\.Module"):
            measure.memory(modules={"a": 3})
        with pytest.raises(TypeError, match=r"modules has a str under '1', expected a torch\.nn\.Module"):
            measure.memory(modules=[nn.Linear(2, 2), "x"])
        with pytest.raises(TypeError, match=r"model must be None or a torch\.nn\.Module, got a list"):
            measure.memory([nn.Linear(2, 2)])

    def test_a_gpu_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="device='cuda', and this PyTorch sees no CUDA device; give device='cpu'"):
            measure.memory(device="cuda")


class TestSaved:
    def test_parameters_and_views_of_them(self):
        lin = nn.Linear(8, 8, bias=False)
        x = torch.randn(4, 8, requires_grad=True)
        for model in (lin, None):
            with measure.memory(model) as m:
                y = lin(x).sum() + Square.apply(x, lin.weight).sum() + (x @ lin.weight.detach().t()).sum()
            assert m.saved_bytes == x.nbytes, model
            y.backward()

    def test_buffers_of_modules_that_run(self):
        norm = nn.BatchNorm1d(8).eval()
        x = torch.randn(4, 8, requires_grad=True)
        for model in (norm, None):
            with measure.memory(model) as m:
                y = norm(x)
            saved = m.saved_bytes
            del y
            assert saved == x.nbytes

    def test_each_storage_once_and_whole(self):
        x = torch.randn(4, 8, requires_grad=True)
        with measure.memory() as m:
            y = x[:1] * x[1:2] + x.exp() * x
            held = m.mark("held").saved_bytes
            del y
            assert m.mark("released").saved_bytes == 0
        assert held == m.saved_bytes == 2 * x.nbytes  # x once, though saved four times, and exp's result

    def test_same_as_autograd_alone(self):
        """The hooks change no gradient, and what a weight-free function saves is what its graph holds."""
        w = torch.randn(8, 8, requires_grad=True)
        x = torch.randn(4, 8, requires_grad=True)
        with measure.memory():
            got = torch.autograd.grad(Square.apply(x, w).square().sum(), (x, w))
        want = torch.autograd.grad((x @ w.t()).square().sum(), (x, w))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)

    def test_per_module(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        x = torch.randn(4, 8, requires_grad=True)
        with measure.memory(model, modules=[model[0], model[1]]) as m:
            model(x).sum().backward()
        assert m.per_module == {"0": 4 * 8 * 4, "1": 4 * 16 * 4}
        assert m.saved_bytes == 4 * (8 + 16 + 16) * 4  # model[2]'s input is not model[1]'s to save
        named = {"up": model[0]}
        with measure.memory(modules=named) as m:
            model(x).sum().backward()
        assert m.per_module == {"up": 4 * 8 * 4}
        assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks

    def test_module_that_raises(self):
        class Bad(nn.Module):
            def forward(self, x):
                raise ZeroDivisionError

        bad, x = Bad(), page(requires_grad=True)
        with measure.memory(modules={"bad": bad}) as m:
            with pytest.raises(ZeroDivisionError):
                bad(x)
            y = x.exp()
        del y
        assert m.per_module == {"bad": 0}
        assert m.saved_bytes == PAGE


def mlp_step(width: int = 64):
    w1, w2 = (torch.randn(width, width, requires_grad=True) for _ in range(2))
    x = torch.randn(256, width)

    def step():
        F.gelu(x @ w1).matmul(w2).square().mean().backward()
        w1.grad = w2.grad = None

    return step


def attention_step(length: int = 512):
    q = torch.randn(1, 4, length, 32, requires_grad=True)

    def step():
        scores = (q @ q.transpose(-1, -2)).softmax(-1)
        (scores @ q).sum().backward()
        q.grad = None

    return step


@pytest.mark.parametrize("make", [mlp_step, attention_step])
def test_peak_equals_the_allocators(make):
    step = make()
    with measure.memory() as m:
        step()
    alloc = measure.allocator_peak(step)
    assert m.live_bytes == alloc.live_bytes == 0
    # The allocator may see more: scratch inside kernels. Never less.
    assert m.peak_bytes <= alloc.peak_bytes <= 1.02 * m.peak_bytes + 4096


def test_peak_of_flash_attention_misses_only_its_scratch():
    q, k, v = (torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(3))

    def step():
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
        q.grad = k.grad = v.grad = None

    with measure.memory() as m:
        step()
    alloc = measure.allocator_peak(step)
    assert m.peak_bytes <= alloc.peak_bytes <= 1.5 * m.peak_bytes


def ckpt_step(save: str, **options):
    block = pyckpt.CkptTransformerBlock(64, 4, n_kv_heads=2, d_ff=96, save=save, tile=128, **options)
    x = torch.randn(1, 512, 64, requires_grad=True)
    for t in (x, *block.parameters()):
        t.grad = torch.zeros_like(t)
    return block, lambda: block(x).sum().backward()


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"window": 40, "qk_norm": True, "norm": "layernorm"}], ids=str
)
@pytest.mark.parametrize("save", a_few(pyckpt.SAVE_SETS, always=(1, 3)))
def test_peak_of_a_block_sees_inside_our_ops(save, options):
    block, step = ckpt_step(save, **options)
    step()  # what is kept for good (tables, constants) is made now
    with measure.memory(block) as m:
        step()
    alloc = measure.allocator_peak(step)
    assert m.live_bytes == alloc.live_bytes == 0
    # What is missing is the scratch inside PyTorch's flash kernel: per thread, and the same for every length. (The C++
    # kernels' is no tensor at all.) A mode holds an op's arguments until it returns, where the op itself may let go of
    # a tile's row statistics before: two float32 for each of 128 rows.
    assert m.peak_bytes - 2 * 4 * 128 <= alloc.peak_bytes <= m.peak_bytes + 2**19


def test_our_ops_are_opened_and_others_left_alone():
    x = torch.randn(64, 64)
    with measure.memory() as m:
        y = pyckpt.rms_norm(x, torch.ones(64))
    assert m.peak_bytes >= y.nbytes
    torch.testing.assert_close(y, F.rms_norm(x, (64,), eps=1e-5))


@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
def test_saved_bytes_of_each_block(save):
    model = pyckpt.CkptCausalLM(50, 3, 64, 4, n_kv_heads=2, d_ff=96, save=save)
    tokens = torch.randint(50, (2, 128))
    with measure.memory(model) as m:
        loss = model.loss(tokens)
        forward = m.mark("forward")
        loss.backward()
    want = 2 * 128 * bytes_per_token(model.spec, save, torch.float32)
    assert list(m.per_module) == [f"model.layers.{i}" for i in range(3)]
    assert all(abs(got - want) <= 0.01 * want for got in m.per_module.values())
    assert m.saved_bytes == forward.saved_bytes >= sum(m.per_module.values())
    # What autograd saves is what is alive (but for the input tokens), so nothing is kept on the side.
    assert abs(forward.live_bytes - forward.saved_bytes) <= 0.05 * forward.saved_bytes


def test_segments_keep_inputs_only():
    model = pyckpt.CkptCausalLM(50, 4, 64, 4, d_ff=96, segments=2)
    tokens = torch.randint(50, (1, 256))
    with measure.memory(model) as m:
        model.loss(tokens).backward()
    one = 256 * bytes_per_token(model.spec, "attention", torch.float32)
    assert m.saved_bytes < 4 * one
    assert set(m.per_module.values()) == {0}


def test_a_measurement_that_cant_start_is_not_in_the_way(monkeypatch):
    def fails(self):
        raise RuntimeError("no driver")

    weight = torch.ones(4, requires_grad=True)
    m = measure.memory(device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(type(m._gauge), "start", fails)
        with pytest.raises(RuntimeError, match="no driver"), m:
            pass
    kept = (weight * 2).exp()
    assert m.saved_bytes == 0  # its hooks are gone
    with m:
        kept = (weight * 2).exp()
    assert m.saved_bytes == kept.nbytes


class TestTiming:
    def test_turns_rotate(self):
        order = []
        stats = measure.interleaved({n: lambda n=n: order.append(n) for n in "abc"}, repeats=3, warmup=1)
        assert "".join(order) == "abcbcacababc"
        assert all(len(s.all) == 3 and s.median > 0 and s.iqr >= 0 for s in stats.values())

    def test_a_clock_of_cuda_is_that_of_its_device(self, monkeypatch):
        """On a machine with several, the current device need not be the one that works."""
        current, seen = [torch.device("cuda:0")], []

        @contextlib.contextmanager
        def device(wanted):
            current.append(wanted)
            yield
            current.pop()

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                seen.append(current[-1])

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return 1000.0

        for name, fake in (("device", device), ("Event", Event), ("synchronize", lambda: seen.append(current[-1]))):
            monkeypatch.setattr(torch.cuda, name, fake)
        stats = measure.interleaved({"a": lambda: seen.append(current[-1])}, 1, 0, device="cuda:1")
        assert stats["a"].all == (1.0,)
        assert seen == [torch.device("cuda:1")] * 4

    def test_stats(self):
        s = measure.Stats.of([4.0, 1.0, 2.0, 3.0, 5.0])
        assert (s.median, s.iqr, s.all[0]) == (3.0, 2.0, 4.0)
        assert measure.Stats.of([2.0]) == measure.Stats(2.0, 0.0, (2.0,))

    @pytest.mark.parametrize("bad", [{"variants": {}}, {"repeats": 0}, {"warmup": -1}])
    def test_misuse(self, bad):
        with pytest.raises(ValueError):
            measure.interleaved(**{"variants": {"a": lambda: None}, **bad})


class TestFlops:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("window", [None, 0, 3, (2, 5), (-1, 4), (100, 100)])
    @pytest.mark.parametrize("length", [1, 7, 16])
    def test_pairs(self, length, causal, window):
        spec = BlockSpec.make(16, 2, causal=causal, window=window)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        left, right = spec.window
        seen = torch.ones(length, length, dtype=torch.bool)
        if left >= 0:
            seen &= j >= i - left
        if right >= 0:
            seen &= j <= i + right
        got = flops.attention_pairs(length, causal=causal, window=spec.window)
        if causal and (left < 0 or left >= length):  # by convention half, without the half diagonal
            assert got == length * length / 2
        else:
            assert got == seen.sum().item()

    def test_block(self):
        spec = BlockSpec.make(64, 4, n_kv_heads=2, d_ff=96)
        S, B = 128, 3
        weights = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96
        assert flops.block_flops(spec, S, B, backward=False) == B * (2 * S * weights + 4 * 64 * S * S / 2)
        assert flops.block_flops(spec, S) == 3 * flops.block_flops(spec, S, backward=False)
        whole = flops.causal_lm_flops(spec, 2, 1000, S)
        assert whole == 2 * flops.block_flops(spec, S) + 6 * S * 64 * 1000

    def test_misuse(self):
        spec = BlockSpec.make(16, 2)
        for length in (-5, 0, 1.5, True):
            with pytest.raises(ValueError, match=f"length must be a positive int, got {length}"):
                flops.block_flops(spec, length)
        for name in ("n_layers", "vocab_size", "batch"):
            with pytest.raises(ValueError, match=f"{name} must be a positive int, got 0"):
                flops.causal_lm_flops(**{"spec": spec, "n_layers": 1, "vocab_size": 9, "length": 4, name: 0})
        with pytest.raises(TypeError, match=r"spec must be .*, got a CkptTransformerBlock; give its \.spec"):
            flops.block_flops(pyckpt.CkptTransformerBlock(16, 2), 5)

    def test_block_against_torchs_counter(self):
        from torch.utils.flop_counter import FlopCounterMode

        from pyckpt.compare.baseline import PlainBlock

        spec = BlockSpec.make(32, 4, n_kv_heads=2, causal=False, mlp="gelu")
        block = PlainBlock(32, 4, n_kv_heads=2, causal=False, mlp="gelu")
        # The counter has no formula for the CPU's fused attention.
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
            block(torch.randn(1, 48, 32))
        assert counter.get_total_flops() == flops.block_flops(spec, 48, backward=False)


def test_units():
    assert [measure.format_bytes(n) for n in (0, 1000, 1024, 1536, 150 * 2**20, -(2**30))] == [
        "0 B",
        "1000 B",
        "1.00 KiB",
        "1.50 KiB",
        "150 MiB",
        "-1.00 GiB",
    ]
    assert [measure.format_seconds(s) for s in (0.0, 1e-6, 0.0412, 1.5, 100)] == [
        "0.00 us",
        "1.00 us",
        "41.2 ms",
        "1.50 s",
        "100 s",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_baseline_and_peak():
    before = torch.ones(2**20, device="cuda")
    x = torch.randn(2**20, device="cuda", requires_grad=True)
    with measure.memory(device="cuda") as m:
        loss = x.exp().exp().sum()
        m.mark("forward")
        loss.backward()
        del loss
    assert m.saved_bytes == 2 * 2**22
    assert m.marks["forward"].live_bytes >= 2 * 2**22
    assert m.peak_bytes >= 3 * 2**22
    assert m.live_bytes == 2**22  # x.grad
    assert before.sum() == 2**20
