"""The transformer block and the causal language model as one writes them in plain PyTorch.

The same mathematics, options and parameter names as `pyckpt.CkptTransformerBlock` and `pyckpt.CkptCausalLM`,
written with PyTorch's own functions and nothing of this package but the check of the options: what the others
are compared with, in speed, in memory and in every number they give.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyckpt.spec import BlockSpec

RopeTables = tuple[Tensor, Tensor]


class PlainBlock(nn.Module):
    """A transformer block: ``h = x + Attention(Norm(x))``, then ``h + MLP(Norm(h))``.

    Or, by option, both side by side on ``x``, or with norms after the sublayers.

    Takes the options of `CkptTransformerBlock` and its ``state_dict``. ``x`` is (B, S, d_model), or packed
    (T, d_model) with ``cu_seqlens``; ``positions`` are the tokens' positions (S,), (B, S) or (T,), by default
    counted from 0 in each sequence; with ``rope_axes`` they have one more dim, of the axes. ``rope`` may give
    `rope_tables` made once for all blocks of a stack.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        spec = self.spec = BlockSpec.make(d_model, n_heads, **options)
        if spec.norm_placement in ("pre", "sandwich"):
            self.input_layernorm = _norm(spec, device, dtype)
        self.self_attn = PlainAttention(spec, device, dtype)
        if spec.residual != "parallel_shared":
            self.post_attention_layernorm = _norm(spec, device, dtype)
        if spec.norm_placement == "sandwich":
            self.pre_feedforward_layernorm = _norm(spec, device, dtype)
        if spec.norm_placement != "pre":
            self.post_feedforward_layernorm = _norm(spec, device, dtype)
        self.mlp = PlainMLP(spec, device, dtype)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rope: RopeTables | None = None,
    ) -> Tensor:
        if rope is None:
            rope = rope_tables(self.spec, x, positions, cu_seqlens)
        attention = functools.partial(self.self_attn, rope=rope, cu_seqlens=cu_seqlens)
        m = self.spec.residual_multiplier
        if self.spec.residual != "sequential":
            h = self.input_layernorm(x)
            shared = self.spec.residual == "parallel_shared"
            return x + m * attention(h) + m * self.mlp(h if shared else self.post_attention_layernorm(x))
        if self.spec.norm_placement == "post":
            x = self.post_attention_layernorm(x + attention(x))
            return self.post_feedforward_layernorm(x + self.mlp(x))
        if self.spec.norm_placement == "output":
            x = x + self.post_attention_layernorm(attention(x))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        if self.spec.norm_placement == "sandwich":
            x = x + self.post_attention_layernorm(attention(self.input_layernorm(x)))
            return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        x = x + m * attention(self.input_layernorm(x))
        return x + m * self.mlp(self.post_attention_layernorm(x))


class PlainAttention(nn.Module):
    """Multi-head attention with grouped key/value heads on `scaled_dot_product_attention`."""

    def __init__(self, spec: BlockSpec, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.spec = spec
        options: dict[str, Any] = {"bias": spec.bias in (True, "qkv", "attention"), "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(spec.d_model, spec.d_q, **options)
        self.k_proj = nn.Linear(spec.d_model, spec.d_kv, **options)
        self.v_proj = nn.Linear(spec.d_model, spec.d_kv, **options)
        options["bias"] = spec.bias in (True, "attention")
        self.o_proj = nn.Linear(spec.d_q, spec.d_model, **options)
        if spec.qk_norm:
            full = spec.qk_norm == "full"
            self.q_norm = _rms_norm(spec, spec.d_q if full else spec.head_dim, device, dtype)
            self.k_norm = _rms_norm(spec, spec.d_kv if full else spec.head_dim, device, dtype)

    def forward(self, x: Tensor, rope: RopeTables | None, cu_seqlens: Tensor | None) -> Tensor:
        # (..., T, H * D) -> (..., H, T, D)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.spec.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.spec.head_dim)).transpose(-3, -2) for t in (q, k, v))
        if self.spec.qk_norm is True:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (_rotate(t, rope, self.spec.rope_interleaved) for t in (q, k))
        if cu_seqlens is None:
            o = _attention(self.spec, q, k, v)
        else:
            lengths = cu_seqlens.diff().tolist()
            parts = zip(q.split(lengths, -2), k.split(lengths, -2), v.split(lengths, -2), strict=True)
            o = torch.cat([_attention(self.spec, *(t.unsqueeze(0) for t in part))[0] for part in parts], dim=-2)
        return self.o_proj(o.transpose(-3, -2).flatten(-2))


class PlainMLP(nn.Module):
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` for the kinds without a gate."""

    def __init__(self, spec: BlockSpec, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": spec.bias in (True, "mlp"), "device": device, "dtype": dtype}
        self.kind = spec.mlp
        self.gate_proj = nn.Linear(spec.d_model, spec.d_ff, **options) if spec.gated else None
        self.up_proj = nn.Linear(spec.d_model, spec.d_ff, **options)
        self.down_proj = nn.Linear(spec.d_ff, spec.d_model, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return self.down_proj(_activation(self.kind, self.up_proj(x)))
        return self.down_proj(_activation(self.kind, self.gate_proj(x)) * self.up_proj(x))


class PlainStack(nn.ModuleList):
    """Blocks one after the other, each in a non-reentrant `torch.utils.checkpoint` if ``checkpointed``."""

    def __init__(self, blocks: list[PlainBlock], checkpointed: bool = False) -> None:
        super().__init__(blocks)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        block: Any = self[0]
        rope = rope_tables(block.spec, x, positions, cu_seqlens)
        for block in self:
            if self.checkpointed:
                x = checkpoint(block, x, positions, cu_seqlens, rope, use_reentrant=False)
            else:
                x = block(x, positions, cu_seqlens, rope)
        return x


class _Decoder(nn.Module):
    def __init__(self, embedding: nn.Embedding, blocks: list[PlainBlock], checkpointed: bool) -> None:
        super().__init__()
        weight = embedding.weight
        self.embed_tokens = embedding
        self.layers = PlainStack(blocks, checkpointed)
        self.norm = _norm(blocks[0].spec, weight.device, weight.dtype)

    def forward(self, tokens: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        return self.norm(self.layers(self.embed_tokens(tokens), positions, cu_seqlens))


class PlainCausalLM(nn.Module):
    """Embedding, a `PlainStack`, the last norm and the head, with ``LlamaForCausalLM``'s parameter names."""

    def __init__(
        self,
        vocab_size: int,
        n_layers: int,
        d_model: int,
        n_heads: int,
        *,
        tie_embeddings: bool = False,
        checkpointed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = [PlainBlock(d_model, n_heads, **kind, **options) for _ in range(n_layers)]
        self.model = _Decoder(nn.Embedding(vocab_size, d_model, **kind), blocks, checkpointed)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False, **kind)
        if tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, S, V) of ``tokens`` (B, S), or (T, V) of packed (T,)."""
        return self.lm_head(self.model(tokens, positions, cu_seqlens))

    def loss(self, tokens: Tensor, labels: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Mean cross entropy of ``tokens`` (B, S) against the token that follows; label -100 is ignored."""
        logits = self(tokens, positions)[:, :-1].flatten(0, 1)
        target = (tokens if labels is None else labels)[:, 1:].flatten()
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        return F.cross_entropy(logits, target)


def rope_tables(
    spec: BlockSpec, x: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> RopeTables | None:
    """cos and sin (..., T, dims that are turned) of the rotary angles in ``x``'s dtype; None without RoPE."""
    if spec.rope_theta is None:
        return None
    axes = spec.rope_axes
    if positions is None:  # the same on all axes
        positions, axes = _positions(x, cu_seqlens), None
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, spec.d_rope, 2, device=x.device, dtype=precise) / spec.d_rope
    frequencies = _scaled(spec, spec.rope_theta**-exponents)
    of_pairs = positions.unsqueeze(-1) if axes is None else positions[..., list(axes)]
    angles = of_pairs.to(precise) * frequencies
    angles = angles.repeat_interleave(2, dim=-1) if spec.rope_interleaved else torch.cat([angles, angles], dim=-1)
    if angles.dim() == 3:
        angles = angles.unsqueeze(1)  # (B, 1, S, D), for every head
    amplitude = dict(spec.rope_scaling or ()).get("amplitude", 1.0)
    return (amplitude * angles.cos()).to(x.dtype), (amplitude * angles.sin()).to(x.dtype)


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = torch.arange(x.shape[-2], device=x.device)
    if cu_seqlens is None:
        return count
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff().long())
    return count - starts


def _scaled(spec: BlockSpec, frequencies: Tensor) -> Tensor:
    scaling = dict(spec.rope_scaling or ())
    if not scaling:
        return frequencies
    if scaling["rope_type"] == "given":
        return torch.tensor(scaling["frequencies"], device=frequencies.device, dtype=frequencies.dtype)
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    # llama3: by wavelength, between those much shorter and those longer than the original context.
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / frequencies
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > context / low, frequencies / factor, between)
    return torch.where(wavelength < context / high, frequencies, scaled)


def _rotate(x: Tensor, rope: RopeTables, interleaved: bool) -> Tensor:
    cos, sin = rope
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    return torch.cat([x * cos + turned * sin, rest], dim=-1)


def _attention(spec: BlockSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, S, D), k and v (B, Hkv, S, D) -> (B, H, S, D)."""
    if spec.softcap:
        return _softcapped_attention(spec, q, k, v)
    grouped = spec.n_kv_heads != spec.n_heads
    mask = _window_mask(spec, q.shape[-2], q.device)
    causal = spec.causal and mask is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=spec.scale, enable_gqa=grouped
    )


def _softcapped_attention(spec: BlockSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    group = spec.n_heads // spec.n_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * spec.scale
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    visible = _visible(spec, q.shape[-2], q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(dim=-1) @ v


def _window_mask(spec: BlockSpec, length: int, device: torch.device) -> Tensor | None:
    """The mask that SDPA needs; None where its own causal flag, or nothing, says the same."""
    left, right = spec.window
    limited = left >= 0 if spec.causal else (left >= 0 or right >= 0)
    return _visible(spec, length, device) if limited else None


def _visible(spec: BlockSpec, length: int, device: torch.device) -> Tensor | None:
    """(S, S), True where query i may see key j: i - left <= j <= i + right. None: everywhere."""
    left, right = spec.window
    if spec.causal:
        right = 0
    if left < 0 and right < 0:
        return None
    visible = torch.ones(length, length, dtype=torch.bool, device=device)
    if left >= 0:
        visible = visible.triu(-left)
    if right >= 0:
        visible = visible.tril(right)
    return visible


def _activation(kind: str, x: Tensor) -> Tensor:
    if kind == "swiglu":
        return F.silu(x)
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind.endswith("_tanh") else "none")


def _norm(spec: BlockSpec, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    if spec.norm == "rmsnorm":
        return _rms_norm(spec, spec.d_model, device, dtype)
    options: dict[str, Any] = {"eps": spec.norm_eps, "device": device, "dtype": dtype}
    return OffsetLayerNorm(spec, **options) if spec.norm_offset else nn.LayerNorm(spec.d_model, **options)


def _rms_norm(spec: BlockSpec, width: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.RMSNorm:
    options: dict[str, Any] = {"eps": spec.norm_eps, "device": device, "dtype": dtype}
    return OffsetRMSNorm(spec, width, **options) if spec.norm_offset else nn.RMSNorm(width, **options)


class OffsetRMSNorm(nn.RMSNorm):
    """An RMSNorm whose weight is ``norm_offset`` less than what it multiplies by, in float32 or better."""

    def __init__(self, spec: BlockSpec, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.offset = spec.norm_offset
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide) + self.offset
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


class OffsetLayerNorm(nn.LayerNorm):
    """The same of a LayerNorm."""

    def __init__(self, spec: BlockSpec, **options: Any) -> None:
        super().__init__(spec.d_model, **options)
        self.offset = spec.norm_offset
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide) + self.offset, self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
