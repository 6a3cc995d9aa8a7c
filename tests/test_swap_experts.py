"""What stands for a mixture's experts in a backward: their gradients, without the product that no gradient needs."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from blocks import assert_as_good, relative_errors
from swap_models import EXPERTS, MIXTURES, check, make_batch, make_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.swap.experts import UnreadExperts, are_known

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_fallback")

TOKENS, WIDTH, D_FF, CHOSEN = 29, 48, 24, 2
ODD = 27  # a width whose rows are not of 16 bytes each


def experts_of(
    family: str, implementation: str, dtype: torch.dtype = torch.float32, count: int = 4, width: int = D_FF
) -> Any:
    """So many of them, of a model of this family."""
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "mlp_hidden_act": "silu",
    }
    counts = dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts"), count)
    sizes |= {**counts, "moe_latent_size": None}
    config = getattr(transformers, f"{family}Config")(**sizes, experts_implementation=implementation)
    file = importlib.import_module(type(config).__module__.replace("configuration", "modeling"))
    experts = getattr(file, f"{family}Experts")(config)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.2)
    assert are_known(experts)
    return experts.to(dtype)


def routed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, which experts a token meets, and with which shares: one expert meets no token, and one meets one."""
    index = torch.stack([torch.randperm(2)[:CHOSEN] for _ in range(TOKENS)])
    index[0, 0] = 3
    return torch.randn(TOKENS, WIDTH, dtype=dtype), index, torch.rand(TOKENS, CHOSEN, dtype=dtype)


def gradients(experts: nn.Module, x: Tensor, index: Tensor, shares: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x, shares = x.clone().requires_grad_(), shares.clone().requires_grad_()
    given = {"x": x, "shares": shares, **dict(experts.named_parameters())}
    y = experts(x, index, shares)
    assert y.shape == x.shape and y.dtype == x.dtype
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), dy), strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3", "NemotronH"])
def test_gradients_are_those_of_the_experts(family, implementation):
    """With biases and without, stored either way round, gated and not."""
    experts = experts_of(family, implementation)
    given = routed(torch.float32)
    dy = torch.randn_like(given[0])
    ours = gradients(UnreadExperts(experts), *given, dy)
    theirs = gradients(experts, *given, dy)
    experts.config._experts_implementation = "eager"
    truth = gradients(experts.double(), given[0].double(), given[1], given[2].double(), dy.double())
    assert_as_good(ours, theirs, truth, torch.float32)


@pytest.mark.parametrize("width", [D_FF, ODD])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_in_other_dtypes_and_widths(dtype, family, width):
    """float64 has no grouped products, nor have odd widths; in bfloat16 shares are float32, as routers make them."""
    experts, (x, index, shares) = experts_of(family, "eager", dtype, width=width), routed(torch.float64)
    dy = torch.randn_like(x)
    truth = gradients(copy.deepcopy(experts).double(), x.to(dtype).double(), index, shares, dy.to(dtype).double())
    shares = shares if dtype == torch.float64 else shares.float()
    given = (x.to(dtype), index, shares)
    ours, theirs = (gradients(m, *given, dy.to(dtype)) for m in (UnreadExperts(experts), experts))
    if dtype == torch.float64:
        assert max(relative_errors(ours, truth).values()) < 1e-12
    else:
        assert_as_good(ours, theirs, truth, dtype)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_last_expert_is_none(dtype, count):
    """As where experts are dealt out, or a router chooses to do nothing."""
    experts, (x, _, shares) = experts_of("Mixtral", "eager", dtype, count), routed(dtype)
    index = torch.stack([torch.randperm(count + 1)[:CHOSEN] for _ in range(TOKENS)])
    dy = torch.randn_like(x)
    errors = relative_errors(*(gradients(m, x, index, shares, dy) for m in (UnreadExperts(experts), experts)))
    assert max(errors.values()) < 100 * torch.finfo(dtype).eps


def test_only_what_is_asked_for_is_made():
    """Of frozen experts neither weights' products; of x that wants none not that one."""
    experts, (x, index, shares) = experts_of("Mixtral", "eager", torch.float64), routed(torch.float64)
    stand_in = UnreadExperts(experts)
    made = {}
    for what in ("all", "frozen", "weights alone"):
        for p in experts.parameters():
            p.requires_grad_(what != "frozen")
        x, shares = x.detach(), shares.detach()
        if what != "weights alone":
            x, shares = x.requires_grad_(), shares.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            stand_in(x, index, shares).sum().backward()
        made[what] = counter.get_total_flops()
    product = 2 * TOKENS * CHOSEN * WIDTH * D_FF  # of one of an expert's three matrices
    assert made == {"all": 8 * product, "frozen": 5 * product, "weights alone": 6 * product}


@pytest.mark.parametrize("family", [*MIXTURES, "DeepseekV3"])
def test_a_step_makes_one_product_less(family, monkeypatch):
    """Of twelve with each pair of a token and an expert: forward 3, of which 2 again, backward 6."""
    options = {**EXPERTS, "mlp_only_layers": [], "first_k_dense_replace": 0, "num_hidden_layers": 1}
    model, batch = make_model(family, torch.float64, **options), make_batch("plain")
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    made = []
    for stand_in in (False, True):
        if not stand_in:
            for name in ("generic", "unread"):
                monkeypatch.setattr(importlib.import_module(f"pyckpt.swap.{name}"), "are_known", lambda _: False)
        pyckpt.swap(model)
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        made.append(counter.get_total_flops())
        pyckpt.unswap(model)
        monkeypatch.undo()
    pairs, shape = batch["input_ids"].numel() * CHOSEN, experts.down_proj[0].shape
    product = 2 * pairs * shape.numel()
    biases = sum(p.numel() for n, p in experts.named_parameters() if n.endswith("bias"))
    assert made[0] - made[1] == product - 2 * pairs * biases  # whose sums are products with zeros and ones


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", [*MIXTURES, "DeepseekV3"])
def test_models(family, implementation):
    model = make_model(family, num_hidden_layers=1, num_experts_per_tok=4, experts_implementation=implementation)
    if implementation == "eager":
        check(model, [make_batch("padded")])
        return
    # Their grouped products know no float64.
    batch, results = make_batch("padded"), []
    for swapped in (False, True):
        if swapped:
            pyckpt.swap(model, tile=10)
        model.zero_grad()
        model(**batch).loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert max(relative_errors(*results).values()) < 1e-4


def test_experts_with_a_gate_of_their_own_run_again():
    experts = experts_of("GptOss", "eager")
    experts._apply_gate = lambda made: made.chunk(2, -1)[0]
    assert not are_known(experts)


def test_experts_that_something_reads_run_again():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as file

    class Reading(file.DeepseekV3MoE):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).tanh()

    model = make_model("DeepseekV3", num_hidden_layers=1, first_k_dense_replace=0)
    model.model.layers[0].mlp.__class__ = Reading
    pyckpt.swap(model)
    assert "mlp.experts" not in model.model.layers[0].forward.block.trace.unread
    pyckpt.unswap(model)
    check(model, [make_batch("plain")])
