"""What is read of tensors on the host, for which a GPU has to be waited for: not by each layer of a model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyckpt
from pyckpt import errors, reading


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are on a GPU, as far as reading them goes."""
    monkeypatch.setattr(reading, "_is_waited_for", lambda t: type(t) is Tensor)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that wait for values, by name; but those of a CPU's kernels, which read where sequences begin."""
    calls: list[str] = []

    def watched(name: str) -> Callable[[Tensor], Any]:
        own = getattr(Tensor, name)

        def call(t: Tensor) -> Any:
            if Path(sys._getframe(1).f_code.co_filename).parent.name != "ops":
                calls.append(name)
            return own(t)

        return call

    for name in ("tolist", "item", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, watched(name))
    return calls


def test_padding_that_a_broadcast_has_written_to(waited_for):
    """Into a buffer of one's own, as stages of a pipeline have it: no version tells of that."""
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, activation="gelu", batch_first=True) for _ in range(2)
    ).double()
    plain = copy.deepcopy(layers)
    pyckpt.swap(layers)
    x, padding = torch.randn(2, 7, 16, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.bool)
    for length in (5, 3, 7):
        written = torch.zeros(2, 7, dtype=torch.bool)
        written[1, length:] = True
        padding.data.copy_(written)
        ours, theirs = x, x
        for a, b in zip(layers, plain, strict=True):
            ours, theirs = (m(h, src_key_padding_mask=padding) for m, h in ((a, ours), (b, theirs)))
        torch.testing.assert_close(ours[~padding], theirs[~padding])


def test_until_it_is_written_to(waited_for):
    t, made = torch.zeros(3), []

    def look() -> float:
        made.append(1)
        return float(t.sum())

    first, second, third = object(), object(), object()
    assert [reading.read_once(t, "sum", asker, look) for asker in (first, second)] == [0.0, 0.0] and len(made) == 1
    t += 1
    assert reading.read_once(t, "sum", third, look) == 3.0 and len(made) == 2
    assert reading.read_once(t, "another", third, look) == 3.0 and len(made) == 3
    t.data.zero_()  # unheard, as what a broadcast writes, but another pass
    assert reading.read_once(t, "sum", third, look) == 0.0 and len(made) == 4


def test_on_a_cpu_each_time():
    """NumPy may have written there, unheard."""
    t = torch.zeros(3)
    assert reading.read_once(t, "sum", object(), lambda: float(t.sum())) == 0.0
    t.numpy()[:] = 1.0
    assert reading.read_once(t, "sum", object(), lambda: float(t.sum())) == 3.0


def test_an_error_is_one_each_time(waited_for):
    cu = torch.tensor([0, 5, 3, 8], dtype=torch.int32)
    for _ in range(2):
        with pytest.raises(ValueError, match="must not descend"):
            errors.check_cu_seqlens(cu, 8, cu.device, asker=object())


@pytest.mark.parametrize("streamed", [False, True])
def test_packed_sequences_of_a_stack(streamed, waited_for, read):
    counts = []
    for depth in (2, 5):
        blocks = [pyckpt.CkptTransformerBlock(16, 2, d_ff=16) for _ in range(depth)]
        stack = pyckpt.CkptTransformer(blocks)
        x, cu = torch.randn(12, 16, requires_grad=True), torch.tensor([0, 5, 12], dtype=torch.int32)
        read.clear()
        stack(x, cu_seqlens=cu, **({"stream": pyckpt.Stream(4)} if streamed else {})).sum().backward()
        counts.append(read.count("tolist"))
    assert counts[0] == counts[1]


def test_padding_in_a_graph(waited_for):
    """Where nothing is read, and nothing may be kept with a tensor."""
    layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
    pyckpt.swap(layer)
    x, padding = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding)[~padding], layer(x, src_key_padding_mask=padding)[~padding]
    )


@pytest.mark.parametrize("masks", ["causal", "padding", "both"])
def test_masks_of_an_encoder(masks, waited_for, read):
    counts = []
    for depth in (2, 5):
        layer = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        pyckpt.swap(model)
        x, padding = torch.randn(2, 7, 16), torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 5:] = True
        given = {"mask": nn.Transformer.generate_square_subsequent_mask(7)} if masks != "padding" else {}
        given |= {"src_key_padding_mask": padding} if masks != "causal" else {}
        read.clear()
        model(x, **given).sum().backward()
        counts.append(len(read))
    assert counts[0] == counts[1]
