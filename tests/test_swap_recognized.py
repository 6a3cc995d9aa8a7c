"""Decoder layers that no table of `pyckpt.swap` knows, and that are found to be standard blocks by trying them out."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import (
    FAMILIES,
    KINDS,
    TABLED,
    TRIED,
    YARN,
    assert_copies_are_swapped_on_their_own,
    assert_generates_the_same,
    assert_same_with_every_save_set,
    check,
    check_under_autocast,
    make_adapted,
    make_batch,
    make_model,
    step,
)
from torch import nn

import pyckpt
from pyckpt.swap.layer import SwappedLayer

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_fallback")


def paths(model: Any, **options: Any) -> list[str]:
    """Of its layers."""
    return [e.path for e in pyckpt.swap(model, **options).entries[:-1]]


def mappings(model: Any) -> list[Any]:
    """Of its layers, as blocks."""
    pyckpt.swap(model)
    found = [m.forward.block.mapping for m in model.modules() if isinstance(getattr(m, "forward", None), SwappedLayer)]
    pyckpt.unswap(model)
    return found


@pytest.mark.parametrize("family", a_few(TABLED, always=range(0, len(TABLED), 2)))
def test_a_table_without_weights(family):
    """As with them: it is the same block."""
    with torch.device("meta"):
        bare = make_model(family)
    model = make_model(family)
    bare.base_model.rotary_emb = model.base_model.rotary_emb
    assert [m.spec for m in mappings(bare)] == [m.spec for m in mappings(model)]
    check(model, [make_batch(kind) for kind in KINDS])


@pytest.mark.parametrize("family", [*FAMILIES, *TABLED])
def test_what_is_found_is_what_tables_say(family, request):
    model = make_model(family)
    known = mappings(model)
    request.getfixturevalue("untabled")
    found = mappings(model)
    for ours, table in zip(found, known, strict=True):
        assert ours.spec == table.spec or not table.why
        assert _places(ours) == _places(table)


def _places(mapping: Any) -> dict[str, tuple[Any, ...]]:
    """Where each of a block's weights is."""
    of_source = (
        (n, (s.path, s.rows, s.transposed, s.heads, s.names.index(n))) for s in mapping.sources for n in s.names
    )
    return dict(of_source)


@pytest.mark.parametrize("family", TRIED)
def test_a_block_is_found(family):
    model = make_model(family)
    check(model, [make_batch(kind) for kind in KINDS])
    pyckpt.unswap(model)
    assert set(paths(model)) == {"standard"}


@pytest.mark.parametrize("family", a_few([*TABLED, *TRIED], always=range(1, len(TABLED), 3)))
@pytest.mark.parametrize("table", [True, False])
def test_it_is_streamed_from_the_token_ids_on(family, table, request):
    if not table and family != "GPTBigCode":  # what surrounds whose layers, a table of positions, no call shows
        request.getfixturevalue("untabled")
    model, stream = make_model(family), pyckpt.Stream(7)
    check(model, [make_batch(kind) for kind in ("padded", "packed")], stream=stream)
    pyckpt.unswap(model)
    assert "; streamed from the token ids on" in pyckpt.swap(model, stream=stream).entries[-1].why


@pytest.mark.usefixtures("untabled")
def test_it_is_as_good_in_bfloat16_and_under_autocast():
    check(make_model("Glm4", torch.bfloat16), [make_batch(kind) for kind in KINDS])
    model = make_model("Gemma")
    check_under_autocast(model, make_batch("padded"))
    pyckpt.unswap(model)
    assert set(paths(model, tile=10)) == {"standard"}


@pytest.mark.usefixtures("untabled")
def test_it_is_the_same_with_every_save_set():
    assert_same_with_every_save_set(make_model("Glm", num_hidden_layers=1))


@pytest.mark.usefixtures("untabled")
def test_it_is_the_same_in_segments_and_with_all_kept():
    model, batch, results = make_model("Exaone4", num_hidden_layers=2), make_batch("padded"), []
    for given in ({}, {"segments": 2}, {"save": "all"}):
        pyckpt.swap(model, tile=7, **given)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.usefixtures("untabled")
def test_it_generates_the_same_tokens_and_is_copied_and_put_back():
    model = make_model("Helium")
    assert_generates_the_same(model)
    assert_copies_are_swapped_on_their_own(make_model("Nemotron"))


@pytest.mark.usefixtures("untabled")
def test_adapters_are_a_blocks():
    model = make_adapted(make_model("Cohere2"), target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
    report = pyckpt.swap(model)
    assert "as a standard block with LoRA adapters" in report.entries[0].why
    pyckpt.unswap(model)
    check(model, [make_batch("padded")])


@pytest.mark.usefixtures("untabled")
def test_layers_that_are_alike_are_tried_with_one_guess(monkeypatch):
    """The gradients of one are held to its own; of the others the output is."""
    trial: Any = importlib.import_module("pyckpt.swap.trial")
    own, tried = trial._Standard._check, []

    def counted(self: Any, *args: Any, gradients: bool) -> None:
        tried.append(gradients)
        own(self, *args, gradients=gradients)

    monkeypatch.setattr(trial._Standard, "_check", counted)
    assert set(paths(make_model("SeedOss", num_hidden_layers=4))) == {"standard"}
    assert tried.count(False) == 3 and tried[-3:] == [False] * 3


# --- what is no block, or might be none -------------------------------------------------------------------------------


class Louder(nn.Module):
    """An MLP of somebody else's, which computes what the layer's own does."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation_fn = own.gate_up_proj, own.down_proj, own.activation_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))


def louder(layer: Any) -> None:
    layer.mlp = Louder(layer.mlp)


def two_eps(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 1e-3


def dropping(layer: Any) -> None:
    layer.add_module("dropout", nn.Dropout(0.2))
    own = layer.mlp.activation_fn
    layer.mlp.activation_fn = nn.Sequential(own, layer.dropout)


def another_activation(layer: Any) -> None:
    layer.mlp.activation_fn = nn.Softplus()


def shared_norm(layer: Any) -> None:
    layer.post_attention_layernorm = layer.input_layernorm


def more_weights(layer: Any) -> None:
    layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Linear(48, 48))


def scaled(layer: Any) -> None:
    layer.self_attn.scaling *= 2.0


CHANGES = (louder, two_eps, dropping, another_activation, shared_norm, more_weights, scaled)


@pytest.mark.usefixtures("untabled")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_no_block_is_cut(change):
    """And of what is one, everything is read from the layer, not from its class."""
    model = make_model("Glm")
    for layer in model.model.layers:
        change(layer)
    assert ("standard" in paths(model)) == (change is scaled)
    pyckpt.unswap(model)
    if change is not dropping:
        check(model, [make_batch("padded")])


class Bent(nn.Module):
    """A rotary embedding that stops counting far out."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own, self.rope_type, self.attention_scaling = own, own.rope_type, own.attention_scaling
        self.register_buffer("inv_freq", own.inv_freq)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self.own(x, position_ids.clamp(max=5000))


@pytest.mark.usefixtures("untabled")
def test_rope_that_changes_far_out_is_the_models_own():
    model = make_model("Glm", max_position_embeddings=2**16)
    model.model.rotary_emb = Bent(model.model.rotary_emb)
    assert set(paths(model)) == {"generic"}


def test_queries_that_are_scaled_by_their_positions_are_the_layers_own():
    """Ministral 3's, from `original_max_position_embeddings` on."""
    rope = {**YARN, "llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    model = make_model("Ministral3", rope_parameters={**rope, "original_max_position_embeddings": 2048})
    assert set(paths(model)) == {"generic"}
