"""The experts of a mixture whose output nothing reads in a backward: of their three products two are made again.

A token's share of a mixture is y = sum over its experts e of p_e W_e h_e, with h_e = act(U_e x) (Shazeer et al. 2017,
eq. 1). In a backward only dy is known of y, and with g_e = W_eᵀ dy

    dp_e = g_e · h_e,    dh_e = p_e g_e,    dW_e = (p_e dy) h_eᵀ

so that W_e h_e is made for none of them.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.casting import autocast
from pyckpt.swap.modules import is_known, is_plain
from pyckpt.swap.shadow import HOOKS, unsharded_class

# What transformers tells of experts whose products its functions make (`use_experts_implementation`).
_TOLD = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of PyTorch's grouped products
_ALIGNED = 16  # bytes, of which addresses and strides are to be multiples


def are_known(module: nn.Module) -> bool:
    """They are experts of transformers, with plain weights, and what is computed of them is known.

    Weights that FSDP2 has dealt out are plain in a call.
    """
    if not all(hasattr(module, n) for n in _TOLD) or not is_known(unsharded_class(module)):
        return False
    if any(name in vars(module) for name in ("forward", "_apply_gate")):
        return False
    if getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False):
        return False
    if getattr(module.config, "_experts_implementation", None) not in _IMPLEMENTATIONS:
        return False
    names = (_first(module), "down_proj")
    expected = {*names, *(f"{n}_bias" for n in names if module.has_bias)}
    own = dict(module.named_parameters())
    return own.keys() == expected and all(is_plain(p) and p.is_floating_point() for p in own.values())


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


class UnreadExperts(nn.Module):
    """Stands for experts, on their parameters, with their gradients; the output is zeros, or noise to try it out."""

    def __init__(self, experts: nn.Module, noisy: bool = False) -> None:
        super().__init__()
        # Attributes and activation too: `_apply_gate` of the class reads them. What is put among the parameters for a
        # call is seen in both.
        self.__dict__.update(vars(experts))
        self.__dict__.update({hooks: OrderedDict() for hooks in HOOKS})
        self._kind, self.noisy = unsharded_class(experts), noisy

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self
        p: dict[str, Any] = self._parameters
        first = _first(own)
        x, *weights = hidden_states, p[first], p.get(f"{first}_bias"), p["down_proj"], p.get("down_proj_bias")
        if own.config._experts_implementation == "grouped_mm":  # which autocast does not know
            x = x.to(weights[0].dtype)
        else:
            x, *weights = autocast(x, *weights)
        act = functools.partial(self._kind._apply_gate, self) if own.has_gate else own.act_fn
        # Beyond the last expert is none.
        shares = top_k_weights.masked_fill(top_k_index >= own.num_experts, 0.0)
        index = top_k_index.long().clamp(max=own.num_experts - 1)
        y: Tensor = _UnreadExpertsFunction.apply(x, shares, index, *weights, act, own.is_transposed)
        y = y.to(hidden_states.dtype)
        return y + torch.randn_like(y) if self.noisy else y


class _Groups:
    """Pairs of a token and one of its experts, those of an expert next to each other. index (t, k): of experts."""

    def __init__(self, index: Tensor, count: int) -> None:
        self.experts, self.order = index.flatten().sort(stable=True)
        self.tokens, self.shape, self.count = self.order // index.shape[1], index.shape, count
        each = torch.arange(count, device=index.device)
        self.ends = torch.searchsorted(self.experts, each, right=True).to(torch.int32)

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """(pairs, m): of each row (pairs, n) with its expert's matrix, of (experts, n, m)."""
        if _takes(rows, matrices):
            return F.grouped_mm(rows, matrices, offs=self.ends)
        parts = zip(self._split(rows), matrices.unbind(), strict=True)
        return torch.cat([part @ matrix for part, matrix in parts])

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """(experts, n, m): the sum over an expert's pairs of the products of left's columns and right's rows."""
        if _takes(left.t(), right):
            return F.grouped_mm(left.t(), right, offs=self.ends)
        parts = zip(self._split(left), self._split(right), strict=True)
        return torch.stack([a.t() @ b for a, b in parts])

    def sums(self, rows: Tensor) -> Tensor:
        """(experts, n): of each expert's rows, by a product, which adds them in one order."""
        return F.one_hot(self.experts, self.count).to(rows.dtype).t() @ rows

    def back(self, rows: Tensor) -> Tensor:
        """Rows (pairs, ...) as (t, k, ...)."""
        made = torch.empty_like(rows)
        made[self.order] = rows
        return made.view(*self.shape, *rows.shape[1:])

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.tensor_split(self.ends[:-1].cpu().long())


def _takes(a: Tensor, b: Tensor) -> bool:
    """PyTorch has grouped products for these."""
    if a.dtype not in _GROUPED or a.dtype != b.dtype or not (_is_aligned(a) and _is_aligned(b)):
        return False
    return not a.is_cuda or torch.cuda.get_device_capability(a.device) >= (8, 0)


def _is_aligned(t: Tensor) -> bool:
    unit, *steps = sorted(t.stride())
    return unit == 1 and all(n % _ALIGNED == 0 for n in (t.data_ptr(), *(step * t.element_size() for step in steps)))


class _UnreadExpertsFunction(torch.autograd.Function):
    """y (t, d) of zeros, for x (t, d), shares (t, k) of experts index (t, k) and their weights.

    up (experts, f or 2 f, d), down (experts, d, f), or `transposed`; biases or None; act: of (pairs, f or 2 f).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shares: Tensor,
        index: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        act: Callable[[Tensor], Tensor],
        transposed: bool,
    ) -> Tensor:
        groups = _Groups(index, up.shape[0])
        made = groups.product(x[groups.tokens], up if transposed else up.mT)
        made = made if up_bias is None else made + up_bias[groups.experts]
        ctx.save_for_backward(x, shares, made, up, down, down_bias)
        ctx.groups, ctx.act, ctx.transposed = groups, act, transposed
        return x.new_zeros((x.shape[0], down.shape[2 if transposed else 1]))

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = dys
        x, shares, made, up, down, down_bias = ctx.saved_tensors
        groups, transposed, wanted = ctx.groups, ctx.transposed, ctx.needs_input_grad
        share = shares.flatten()[groups.order, None]
        rows = dy.to(made.dtype)[groups.tokens]
        with torch.enable_grad():
            leaf = made.detach().requires_grad_()
            hidden = ctx.act(leaf).to(down.dtype)
        back = groups.product(rows, down.mT if transposed else down)
        (d_made,) = torch.autograd.grad(hidden, leaf, (back * share).to(hidden.dtype))
        hidden = hidden.detach()
        d_share = None
        if wanted[1]:
            dtype = functools.reduce(torch.promote_types, (back.dtype, share.dtype, torch.float32))
            d_share = (back.to(dtype) * hidden).sum(1)
            if down_bias is not None:
                d_share = d_share + (rows.to(dtype) * down_bias[groups.experts]).sum(1)
            d_share = groups.back(d_share.to(share.dtype))
        weighted = (rows * share).to(made.dtype)
        d_down = _weights(groups, hidden, weighted, transposed) if wanted[5] else None
        d_down_bias = groups.sums(weighted) if wanted[6] else None
        d_up = _weights(groups, x[groups.tokens], d_made, transposed) if wanted[3] else None
        d_up_bias = groups.sums(d_made) if wanted[4] else None
        dx = None
        if wanted[0]:
            dx = groups.back(groups.product(d_made, up.mT if transposed else up)).sum(1)
        return dx, d_share, None, d_up, d_up_bias, d_down, d_down_bias, None, None


def _weights(groups: _Groups, given: Tensor, made: Tensor, transposed: bool) -> Tensor:
    """The gradient of matrices, of what they were given and of the gradient of what they made."""
    return groups.outer(given, made) if transposed else groups.outer(made, given)
