"""What surrounds the layers of a causal language model of transformers, as the ends of a streamed run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.exec.lm_ends import EmbeddingOptions, Ends, LossOptions
from pyckpt.swap.modules import UnsupportedError, norm_eps, watched
from pyckpt.tokenwise.norm import LayerNorm, RmsNorm

# Norms whose weight is one less than what it multiplies by.
_OFFSETS = {"Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0}
_SCALED = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a family's base model has its embedding and its final norm, by attribute.

    table: the embedding of positions that is added. multiplier: a number that multiplies the embedding. dropout: a
    torch.nn.Dropout, or a rate, of what the first layer is given.
    """

    embed: str = "embed_tokens"
    norm: str = "norm"
    table: str | None = None
    multiplier: str | None = None
    dropout: str | None = None


def ends_of(base: Any, places: Places | None, projection: nn.Linear, loss: LossOptions) -> Ends:
    """The ends of a model with this base model and output projection, with the weights of now.

    Raises `UnsupportedError` where something there is not what its class says.
    """
    if places is None:
        raise UnsupportedError("what surrounds the layers of this class is not known")
    if watched(base, replaced=True):
        raise UnsupportedError(f"its {type(base).__name__} has forward hooks, which a streamed run would not run")
    embed, norm = getattr(base, places.embed), getattr(base, places.norm)
    weights = {"embed": _table(embed), "norm.weight": norm.weight, "head": projection.weight}
    if projection.bias is not None:
        weights["head.bias"] = projection.bias
    if places.table is not None:
        weights["table"] = _table(getattr(base, places.table))
    kind, eps = _norm(norm)
    if kind is LayerNorm:
        bias = getattr(norm, "bias", None)
        weights["norm.bias"] = torch.zeros_like(norm.weight, requires_grad=False) if bias is None else bias
    return Ends(weights, kind("norm", eps), _OFFSETS.get(type(norm).__name__, 0.0), _options(base, places, embed), loss)


def _table(embedding: Any) -> Tensor:
    name = type(embedding).__name__
    if not (type(embedding) is nn.Embedding or name in _SCALED) or watched(embedding):
        raise UnsupportedError(f"its embedding is a {name} with hooks, or no plain nn.Embedding")
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
        raise UnsupportedError("its embedding has max_norm, sparse or scale_grad_by_freq")
    return embedding.weight


def _norm(norm: Any) -> tuple[type[LayerNorm] | type[RmsNorm], float]:
    name, eps = type(norm).__name__, norm_eps(norm)
    if eps is None or watched(norm):
        raise UnsupportedError(f"its final norm is a {name} with hooks, or none that is known")
    return (RmsNorm if name.endswith("RMSNorm") else LayerNorm), float(eps)


def _options(base: Any, places: Places, embed: Any) -> EmbeddingOptions:
    scale = 1.0
    if type(embed).__name__ in _SCALED:
        # Rounded as the class has it, on the CPU: to read its buffer would wait for a GPU.
        scale = float(torch.tensor(embed.scalar_embed_scale, device="cpu").to(embed.weight.dtype))
    if places.multiplier is not None:
        scale *= float(getattr(base, places.multiplier))
    rate = _rate(base, places.dropout)
    seed = int(torch.randint(2**62, (), device="cpu")) if rate else 0
    return EmbeddingOptions(scale, embed.padding_idx, rate, seed)


def _rate(base: Any, name: str | None) -> float:
    dropout = 0.0 if name is None else getattr(base, name)
    if isinstance(dropout, nn.Dropout):
        return float(dropout.p) if dropout.training else 0.0
    return float(dropout) if base.training else 0.0
