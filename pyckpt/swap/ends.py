"""What surrounds the layers of a causal language model of transformers, as the ends of a streamed run."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.exec.lm_ends import EmbeddingOptions, Ends, LossOptions
from pyckpt.swap import lora, parallel, peft_wrappers
from pyckpt.swap import survey as surveys
from pyckpt.swap.around import foreign, watched
from pyckpt.swap.modules import UnsupportedError, is_known, norm_eps
from pyckpt.swap.numbers import Numbers, numbers_of, other_number
from pyckpt.swap.shadow import unsharded_class
from pyckpt.tokenwise.norm import LayerNorm, Norm, RmsNorm, with_offset
from pyckpt.vocab_parallel import own_part

# Norms whose weight is one less than what it multiplies by.
_OFFSETS = {"GemmaRMSNorm": 1.0, "Gemma2RMSNorm": 1.0, "Gemma3RMSNorm": 1.0, "NemotronLayerNorm1P": 1.0}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a family's base model has its embedding and its final norm, by attribute.

    table: the embedding of positions that is added. multiplier: a number that multiplies the embedding. dropout: a
    torch.nn.Dropout, or a rate, of what the first layer is given. offset: what is added to the norm's weight; None: as
    its class is known to do. eps: the norm's, where its class has none that is known. numbers, rates: other
    numbers of a base model of any class, and its rates of dropout, with which nothing else was done there when its
    places were found.
    """

    embed: str = "embed_tokens"
    norm: str = "norm"
    table: str | None = None
    multiplier: str | None = None
    dropout: str | None = None
    offset: float | None = None
    eps: float | None = None
    numbers: Numbers | None = None
    rates: tuple[tuple[str, float], ...] = ()


def find(base: nn.Module, layers: list[str]) -> Places | None:
    """The places of a base model of any class, whose layers are at these paths; None where it has other ends.

    Found by a call of its twin with a few tokens and with layers that do nothing: the first has to be handed the
    tokens' embeddings, times an option of the model at most, and the output to be a norm of what the last one returned.
    """
    try:
        ids, embedded, made = surveys.Scene(base, layers).surroundings()
        with torch.no_grad():
            name, multiplier = _embedding_in(base, ids, embedded)
            norm, offset, eps = _norm_in(base, embedded.flatten(0, 1), made.flatten(0, 1))
    except Exception:  # of any class anything may be met
        return None
    numbers = tuple(n for n in numbers_of(base, ("",)) if n[1] != multiplier)
    found = Places(name, norm, multiplier=multiplier, offset=offset, eps=eps)
    return dataclasses.replace(found, numbers=numbers, rates=_rates(base))


def _embedding_in(base: Any, ids: Tensor, made: Tensor) -> tuple[str, str | None]:
    """The embedding's name, and that of the number that multiplies it."""
    name = next(n for n, m in base.named_children() if m is base.get_input_embeddings())
    embed = _at(base, name)
    numbers = [n for n, v in vars(base).items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    for multiplier in (None, *numbers):
        options = _options(base, Places(name, multiplier=multiplier), embed)
        looked_up = _table(embed)[ids]
        if torch.equal(looked_up.mul_(options.scale) if options.scale != 1.0 else looked_up, made):
            return name, multiplier
    raise UnsupportedError("its layers are handed something else than embeddings")


def _norm_in(base: Any, x: Tensor, made: Tensor) -> tuple[str, float, float | None]:
    """The final norm's name, what is added to its weight, and its eps where its class has none that is known."""
    for name, norm in base.named_children():
        if "Norm" not in unsharded_class(norm).__name__ or watched(norm):
            continue
        # Rows so small that eps is most of what they are divided by.
        small = x * (1e-3 / x.std())
        eps = None if norm_eps(norm) is not None else _eps_of(norm, small)
        for offset in (0.0, 1.0):
            kind, weights = _norm(norm, eps), _norm_weights(norm, x[0])
            weights["norm.weight"] = with_offset(weights["norm.weight"], offset)
            both = ((x, made), (small, norm(small)))
            if all(_same_but_for_rounding(kind.forward(weights, rows)[0], theirs) for rows, theirs in both):
                return name, offset, eps
    raise UnsupportedError("its output is no norm of what its layers make")


def _eps_of(norm: Any, small: Tensor) -> float | None:
    """Its attribute or, of a LayerNorm without weights, what y = (x - mean) / sqrt(variance + eps) says of it."""
    if isinstance(getattr(norm, "eps", None), float):
        return float(norm.eps)
    x, y = small.double(), norm(small).double()
    x = x - x.mean(-1, keepdim=True)
    divisor = (x * x).sum(-1) / (x * y).sum(-1)
    eps = float((divisor.square() - x.square().mean(-1)).median())
    return float(f"{eps:.0e}") if eps > 0.0 else None


def _same_but_for_rounding(a: Tensor, b: Tensor) -> bool:
    # Norms of transformers compute in float32, also in a model of float64.
    allowed = max(2 * torch.finfo(b.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    a, b = a.double(), b.double()
    size, error = float(b.norm()), a - b
    # Roundings have either sign: what is larger as a whole was multiplied by something.
    return float(error.norm()) <= allowed * size and abs(float((error * b).sum())) <= allowed / 8 * size**2


def ends_of(base: Any, places: Places | None, projection: Any, loss: LossOptions, run: bool) -> Ends:
    """The ends of a model with this base model and output projection, with the weights of now.

    run: for a run, whose dropout draws a seed. Raises `UnsupportedError` where something there is not what its class
    says.
    """
    if places is None:
        raise UnsupportedError("what surrounds the layers of this class is not known")
    if places.numbers is not None:
        odd = other_number(base, places.numbers)
        if odd is not None or _rates(base) != places.rates:
            raise UnsupportedError(f"of its {type(base).__name__}, {odd or 'rates of dropout have changed'}")
    embed, norm = _at(base, places.embed), getattr(base, places.norm)
    parts = {"embed": embed, "head": projection}
    words = {name: found for name, module in parts.items() if (found := parallel.words_of(module)) is not None}
    for module, known in ((base, True), (projection, False)):
        if foreign(module, replaced=known) and not (module is projection and "head" in words):
            raise UnsupportedError(f"its {type(module).__name__} has forward hooks, which a streamed run would not run")
    if lora.is_adapted(projection):
        raise UnsupportedError("its output embeddings have LoRA adapters")
    table, width = _table(embed, "embed" in words), peft_wrappers.base_of(embed).embedding_dim
    of_norm = _norm_weights(norm, table.new_ones(width))
    weights = {"embed": table, **of_norm, "head": peft_wrappers.weight_of(projection)}
    if projection.bias is not None:
        if loss.scale != 1.0:
            raise UnsupportedError("its output embeddings have a bias, which is scaled with the logits")
        weights["head.bias"] = projection.bias
    if places.table is not None:
        weights["table"] = _table(_at(base, places.table))
    offset = _OFFSETS.get(unsharded_class(norm).__name__, 0.0) if places.offset is None else places.offset
    options = _options(base, places, embed, run)
    weights |= {n: own_part(t) for n, t in weights.items() if n.partition(".")[0] in words}
    return Ends(weights, _norm(norm, places.eps), offset, options, loss, words=words)


def _rates(base: nn.Module) -> tuple[tuple[str, float], ...]:
    """Of dropout right inside it, by name, and numbers that are named so."""
    modules = ((n, m.p) for n, m in base.named_children() if isinstance(m, nn.Dropout))
    return (*modules, *((n, v) for n, v in vars(base).items() if "drop" in n and isinstance(v, float)))


def modules_of(base: Any, places: Places, projection: Any) -> list[nn.Module]:
    """Those whose weights the ends are."""
    names = (places.embed, places.table, places.norm)
    return [*(_at(base, n) for n in names if n is not None), projection]


def _at(base: Any, name: str) -> Any:
    """A module of the base model; where PEFT trains a copy of it, or rows, that."""
    return peft_wrappers.called_now(getattr(base, name))


def _table(module: Any, dealt_out: bool = False) -> Tensor:
    """Its weight. dealt_out: what its hooks, or its forward, do about the words of other processes is known."""
    peft_wrappers.check(module)
    embedding = peft_wrappers.base_of(module)
    name = type(embedding).__name__
    plain = unsharded_class(embedding) is nn.Embedding or _is_scaled(embedding)
    if not plain or (foreign(embedding) and not dealt_out):
        raise UnsupportedError(f"its embedding is of class {name} with hooks, or no plain nn.Embedding")
    if embedding.max_norm is not None or embedding.sparse or embedding.scale_grad_by_freq:
        raise UnsupportedError("its embedding has max_norm, sparse or scale_grad_by_freq")
    return peft_wrappers.weight_of(module)


def _is_scaled(embedding: Any) -> bool:
    """One of transformers (Gemma's and its like) that multiplies by its `scalar_embed_scale`."""
    kind = unsharded_class(embedding)
    return kind.__name__.endswith("ScaledWordEmbedding") and is_known(kind) and issubclass(kind, nn.Embedding)


def _norm(norm: Any, eps: float | None = None) -> Norm:
    """eps: where its class has none that is known."""
    name, known = unsharded_class(norm).__name__, norm_eps(norm)
    eps = known if eps is None else eps
    if eps is None or foreign(norm):
        raise UnsupportedError(f"its final norm is of class {name} with hooks, or none that is known")
    return (LayerNorm if "LayerNorm" in name else RmsNorm)("norm", float(eps))


def _norm_weights(norm: Any, like: Tensor) -> dict[str, Tensor]:
    """Its weights; what a class lacks is what changes nothing (`like` is a row of what it reads)."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    found = {"norm.weight": torch.ones_like(like, requires_grad=False) if weight is None else weight}
    if "LayerNorm" in unsharded_class(norm).__name__:
        found["norm.bias"] = torch.zeros_like(found["norm.weight"], requires_grad=False) if bias is None else bias
    return found


def _options(base: Any, places: Places, embed: Any, run: bool = False) -> EmbeddingOptions:
    scale, embed = 1.0, peft_wrappers.base_of(embed)
    if _is_scaled(embed):
        # Rounded as the class has it, on the CPU: to read its buffer would wait for a GPU.
        scale = float(torch.tensor(embed.scalar_embed_scale, device="cpu").to(embed.weight.dtype))
    if places.multiplier is not None:
        scale *= float(getattr(base, places.multiplier))
    rate = _rate(base, places.dropout)
    seed = int(torch.randint(2**62, (), device="cpu")) if rate and run else 0
    return EmbeddingOptions(scale, embed.padding_idx, rate, seed)


def _rate(base: Any, name: str | None) -> float:
    dropout = 0.0 if name is None else getattr(base, name)
    if isinstance(dropout, nn.Dropout):
        return float(dropout.p) if dropout.training else 0.0
    return float(dropout) if base.training else 0.0
