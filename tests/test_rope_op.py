"""Rotary position embedding against complex multiplication, its own inverse, and Hugging Face's frequencies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import LOW_DTYPES, a_few, assert_close_to_truth, assert_exact, check_exact, step
from torch import Tensor

import pyckpt
from pyckpt.ops import chunks, reference
from pyckpt.ops.rope import rope_tables

ops = torch.ops.pyckpt
INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(params=["one-chunk", "many-chunks", "triton"])
def chunking(request, monkeypatch) -> None:
    if request.param == "triton":
        monkeypatch.setenv("PYCKPT_BACKEND", "triton")
    if request.param == "many-chunks":
        monkeypatch.setattr(chunks, "_CPU_CHUNK_ELEMENTS", 50)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def positions_of(kind: str, batch: int, seq: int) -> Tensor | None:
    return {
        "default": None,
        "shared": torch.randint(0, 10**6, (seq,)),
        "each": torch.randint(0, 1000, (batch, seq)),
        "int32": torch.randint(0, 1000, (seq,), dtype=torch.int32),
        "negative": torch.arange(seq) - seq,
    }[kind]


class TestExact:
    @INTERLEAVED
    @pytest.mark.parametrize("positions", a_few(["default", "shared", "each", "int32", "negative"], always=(0, 2)))
    @pytest.mark.parametrize(("dim", "rotary_dim"), [(2, None), (8, None), (8, 2), (8, 6), (7, 4), (96, 96)])
    def test_dims_and_positions(self, dim, rotary_dim, positions, interleaved, chunking):
        pos = positions_of(positions, 2, 11)
        r = rotary_dim or dim
        check_exact(
            lambda x: pyckpt.rope(x, pos, theta=500.0, rotary_dim=rotary_dim, interleaved=interleaved),
            lambda x: reference.rope(x, torch.arange(11) if pos is None else pos, 500.0, r, interleaved),
            {"x": randn(2, 11, 3, dim)},
        )

    @INTERLEAVED
    @pytest.mark.parametrize(("seq", "heads"), [(1, 1), (239, 1), (113, 3), (2000, 2)])
    def test_packed(self, seq, heads, interleaved):
        pos = torch.randint(0, 100, (seq,))
        check_exact(
            lambda x: pyckpt.rope(x, pos, interleaved=interleaved),
            lambda x: reference.rope(x, pos, interleaved=interleaved),
            {"x": randn(seq, heads, 4)},
        )

    @INTERLEAVED
    @pytest.mark.parametrize("rotary_dim", [None, 4])
    def test_layouts(self, rotary_dim, interleaved, chunking):
        pos = torch.arange(9)
        layouts = {
            "heads first": randn(2, 3, 9, 6).transpose(1, 2),
            "last dim strided": randn(2, 9, 6, 3).transpose(2, 3),
            "one projection": randn(2, 9, 3, 2, 6).unbind(2)[1],
            "expanded": randn(2, 9, 1, 6).expand(2, 9, 3, 6),
        }
        for x in layouts.values():
            assert not x.is_contiguous()
            check_exact(
                lambda x: pyckpt.rope(x, rotary_dim=rotary_dim, interleaved=interleaved),
                lambda x: reference.rope(x, pos, rotary_dim=rotary_dim, interleaved=interleaved),
                {"x": x},
            )

    @INTERLEAVED
    def test_upstream_gradients_that_are_not_contiguous(self, interleaved, chunking):
        pos, x = torch.arange(9), {"x": randn(2, 9, 3, 6)}
        for dy in (randn(2, 3, 6, 9).permute(0, 3, 1, 2), torch.ones((), dtype=torch.float64).expand(2, 9, 3, 6)):
            got, _ = step(lambda x: pyckpt.rope(x, rotary_dim=4, interleaved=interleaved), x, [dy])
            want, _ = step(lambda x: reference.rope(x, pos, 1e4, 4, interleaved), x, [dy])
            assert_exact(got["dx"], want["dx"])

    @INTERLEAVED
    def test_in_place_and_inverse(self, interleaved, chunking):
        cos, sin = rope_tables(torch.arange(7), 4, 100.0, dtype=torch.float64)
        whole = randn(2, 7, 5, 6)
        x = whole[:, :, 1:3]
        want = ops.rope(x, cos, sin, False, interleaved)
        before = whole.clone()
        ops.rope_(x, cos, sin, False, interleaved)
        assert torch.equal(x, want)
        assert torch.equal(whole[:, :, 3:], before[:, :, 3:])
        ops.rope_(x, cos, sin, True, interleaved)
        assert_exact(whole, before)

    @INTERLEAVED
    def test_q_and_k_at_once(self, interleaved, chunking):
        q, k = randn(3, 7, 4, 6), randn(3, 7, 2, 6)
        tables = rope_tables(torch.arange(7), 4, 100.0, dtype=torch.float64)
        want = [ops.rope(t, *tables, True, interleaved) for t in (q, k)]
        ops.rope_qk_(q, k, *tables, True, interleaved)
        assert torch.equal(q, want[0]) and torch.equal(k, want[1])

    def test_scores_depend_on_the_distance_alone(self):
        q, k = randn(1, 1, 1, 16), randn(1, 1, 1, 16)

        def score(i: int, j: int) -> Tensor:
            qi, kj = (pyckpt.rope(t, torch.tensor([p])) for t, p in ((q, i), (k, j)))
            return (qi * kj).sum()

        assert_exact(score(1007, 1004), score(3, 0), terms=100.0)


@pytest.mark.usefixtures("backend")
class TestPrecision:
    @INTERLEAVED
    @pytest.mark.parametrize("dtype", LOW_DTYPES)
    @pytest.mark.parametrize(("seq", "heads"), [(1, 1), (239, 1), (113, 3)])
    def test_against_the_formula(self, seq, heads, dtype, interleaved):
        pos = torch.randint(0, 2000, (seq,))
        x, dy = randn(2, seq, heads, 16).to(dtype), randn(2, seq, heads, 16).to(dtype)
        cos, sin = (t.unsqueeze(1) for t in rope_tables(pos, 16, 1e4, dtype=dtype))

        def plain(x: Tensor) -> Tensor:
            a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
            out = (a * cos - b * sin, b * cos + a * sin)
            return torch.stack(out, -1).flatten(-2) if interleaved else torch.cat(out, -1)

        want, _ = step(lambda x: reference.rope(x, pos, interleaved=interleaved), {"x": x.double()}, [dy])
        low, _ = step(plain, {"x": x}, [dy])
        got, _ = step(lambda x: pyckpt.rope(x, pos, interleaved=interleaved), {"x": x}, [dy])
        for name in want:
            assert_close_to_truth(got[name], low[name], want[name], what=name)

    def test_far_positions(self):
        """Angles are float64 products: at a million, float32 ones would be off by some hundredths."""
        x, pos = torch.randn(1, 3, 1, 64), torch.tensor([10**6, 10**7, 2**31])
        want = reference.rope(x.double(), pos, theta=500000.0)
        assert (pyckpt.rope(x, pos, theta=500000.0) - want).abs().max() < 1e-6 * x.abs().max()


class TestScaling:
    def test_linear_divides_the_positions(self):
        x, pos = randn(1, 5, 2, 8), torch.arange(5) * 4
        got = pyckpt.rope(x, pos, scaling={"rope_type": "linear", "factor": 4.0})
        assert_exact(got, reference.rope(x, torch.arange(5)))

    def test_llama3_by_its_definition(self):
        """Long waves are divided by the factor, short ones kept, those between blended by the turns they make."""
        for j in range(32):
            freq = 500000.0 ** (-2 * j / 64)
            wavelength = 2 * math.pi / freq
            if wavelength > 8192 / 1.0:
                want = freq / 8.0
            elif wavelength < 8192 / 4.0:
                want = freq
            else:
                smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
                want = (1 - smooth) * freq / 8.0 + smooth * freq
            x = torch.zeros(1, 1, 1, 64, dtype=torch.float64)
            x[..., j] = 1.0
            got = pyckpt.rope(x, torch.tensor([100]), theta=500000.0, scaling=LLAMA3)
            wanted = torch.zeros_like(x)
            wanted[..., j], wanted[..., j + 32] = math.cos(100 * want), math.sin(100 * want)
            assert_exact(got, wanted)

    @pytest.mark.parametrize("scaling", [None, LLAMA3, {"rope_type": "linear", "factor": 4.0}], ids=str)
    def test_against_transformers(self, scaling):
        modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
        config = modeling.LlamaConfig(
            hidden_size=64,
            num_attention_heads=2,
            max_position_embeddings=8192,
            rope_parameters={"rope_theta": 500000.0, "rope_type": "default"} | (scaling or {}),
        )
        x, pos = torch.randn(1, 9, 2, 32), torch.randint(0, 9000, (1, 9))
        cos, sin = modeling.LlamaRotaryEmbedding(config)(x, pos)
        want, _ = modeling.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        got = pyckpt.rope(x, pos, theta=500000.0, scaling=scaling)
        assert (got - want).abs().max() < 5e-3  # theirs has float32 angles

    def test_default_is_none(self):
        x = randn(1, 5, 2, 8)
        assert torch.equal(pyckpt.rope(x, scaling={"rope_type": "default"}), pyckpt.rope(x))


class TestAutograd:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, dynamic):
        fn = torch.compile(
            lambda x: pyckpt.rope(x * 2, rotary_dim=4).sin(), fullgraph=True, backend="aot_eager", dynamic=dynamic
        )
        for s in (6, 9) if dynamic else (6,):
            check_exact(
                fn,
                lambda x: reference.rope(x * 2, torch.arange(x.shape[1]), rotary_dim=4).sin(),
                {"x": randn(2, s, 2, 6)},
            )

    def test_nothing_of_x_is_saved(self):
        x = torch.randn(2, 50, 4, 16, requires_grad=True)
        with pyckpt.measure.memory() as m:
            y = pyckpt.rope(x)
            tables = 2 * 50 * 8 * 4
            assert m.saved_bytes == tables
            assert m.live_bytes == y.nbytes + tables

    def test_the_same_bits_every_time(self, unpoisoned):
        x = {"x": torch.randn(2, 300, 4, 16)}
        first, douts = step(pyckpt.rope, x)
        for _ in range(20):
            again, _ = step(pyckpt.rope, x, douts)
            assert all(torch.equal(again[n], first[n]) for n in first)

    def test_no_heads(self, backend):
        x = torch.randn(2, 3, 0, 4, requires_grad=True)
        y = pyckpt.rope(x)
        y.sum().backward()
        assert y.shape == x.shape == x.grad.shape


class Positioned(torch.nn.Module):
    """Positions, slopes and sinks that are the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(5))
        self.register_buffer("slopes", torch.rand(2, 4))
        self.sinks = torch.nn.Parameter(torch.randn(4))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        turned = pyckpt.rope(q, self.positions)
        return pyckpt.attention(turned, k, k, sinks=self.sinks) + pyckpt.attention(q, k, k, alibi_slopes=self.slopes)


def test_a_graph_of_any_size_with_tensors_of_its_own():
    """torch.compile finds no shape of sizes that vary among others by `in`."""
    module, q, k = Positioned(), torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), module(q, k))


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"x": torch.randn(3, 4)}, r"x must be \(B, S, H, D\) or \(T, H, D\), got shape \(3, 4\)"),
            ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x has dtype torch.int64, expected"),
            ({"x": torch.randn(2, 3, 1, 5)}, "the rotary dim must be even and at most the head dim 5, got 5"),
            ({"rotary_dim": 3}, "the rotary dim must be even and at most the head dim 4, got 3"),
            ({"rotary_dim": 6}, "the rotary dim must be even and at most the head dim 4, got 6"),
            ({"rotary_dim": 0}, "the rotary dim must be even and at most the head dim 4, got 0"),
            ({"positions": torch.arange(4)}, r"positions must be ints of shape \(2, 3\) or \(3,\), got \(4,\)"),
            ({"positions": torch.arange(3.0)}, "positions must be ints .* torch.float32"),
            ({"positions": torch.arange(3, device="meta")}, "positions are on meta, x is on cpu"),
            ({"positions": torch.arange(3) * 1j}, "positions must be ints .* torch.complex64"),
            ({"positions": torch.ones(3).bool()}, "positions must be ints .* torch.bool"),
            ({"theta": -1.0}, "theta must be a positive finite number, got -1.0"),
            ({"theta": torch.tensor(9.0, requires_grad=True)}, r"theta gets no gradient here: give theta\.detach\(\)"),
            ({"scaling": {"rope_type": "given", "frequencies": [1.0]}}, "gives 1 frequencies, expected 2"),
            ({"scaling": {"rope_type": "given", "frequencies": [1.0] * 2}, "rotary_dim": 2}, "gives 2 .* expected 1"),
            ({"scaling": {"rope_type": "yarn"}}, "^scaling type 'yarn' is not supported; expected one of linear"),
            ({"scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks high_freq_factor, low_freq_factor"),
            ({"scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "^scaling has rope_theta=5.0"),
            ({"scaling": {"rope_type": "given", "frequencies": [1.0, "2"]}}, "^scaling's frequencies must be finite"),
            (
                {"scaling": {"rope_type": "given", "frequencies": torch.ones(2, requires_grad=True)}},
                "get.* no gradient",
            ),
            ({"scaling": 2.0}, "^scaling must be None or a dict"),
        ],
        ids=range(21),
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            pyckpt.rope(**{"x": torch.randn(2, 3, 1, 4)} | options)

    def test_types(self):
        with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
            pyckpt.rope([1.0])
        with pytest.raises(TypeError, match=r"positions must be a torch\.Tensor, got list"):
            pyckpt.rope(torch.randn(2, 3, 4), [0, 1])
        x = torch.randn(2, 3, 4)
        for theta in (True, "1e4", None, torch.ones(2)):
            with pytest.raises(TypeError, match="theta must be a positive number, got"):
                pyckpt.rope(x, theta=theta)
        for interleaved in ("no", 1, None):
            with pytest.raises(TypeError, match="interleaved must be True or False, got"):
                pyckpt.rope(x, interleaved=interleaved)
        for dim in (2.0, "2", True):
            with pytest.raises(TypeError, match="rotary_dim must be an int, got"):
                pyckpt.rope(x, rotary_dim=dim)


def test_one_row_of_positions_is_for_every_sequence():
    x, positions = torch.randn(3, 5, 2, 8), torch.tensor([4, 0, 7, 1, 9])
    want = pyckpt.rope(x, positions)
    assert torch.equal(pyckpt.rope(x, positions[None]), want)
    assert torch.equal(pyckpt.rope(x[0], positions[None]), want[0])  # packed


def test_frequencies_of_every_kind():
    x, values = torch.randn(2, 3, 2, 8), [1.0, 0.5, 0.25, 0.125]
    want = pyckpt.rope(x, scaling={"rope_type": "given", "frequencies": values})
    kinds = (np.array(values), torch.tensor(values), [np.float32(v) for v in values], tuple(map(torch.tensor, values)))
    for given in (*kinds, [1, 0.5, np.float64(0.25), 0.125]):
        assert torch.equal(pyckpt.rope(x, scaling={"rope_type": "given", "frequencies": given}), want)
    want = pyckpt.rope(x, theta=500.0, rotary_dim=4)
    for theta, dim in ((500, np.int64(4)), (np.float32(500), torch.tensor(4)), (torch.tensor(500.0), 4)):
        assert torch.equal(pyckpt.rope(x, theta=theta, rotary_dim=dim), want)


def test_frequencies_that_are_given_are_no_copy_from_the_host_in_a_graph(monkeypatch):
    """Which a CUDA graph could not hold. The device is a stand-in: its tensors are on the CPU."""
    from pyckpt.ops import rope

    class Device:
        type = "cuda"

    full, cpu = torch.full, torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "full", lambda *args, device, **kw: full(*args, device=cpu, **kw))
    monkeypatch.setattr(torch, "tensor", None)
    assert rope._from_host((0.5, 0.25), Device()).tolist() == [0.5, 0.25]
