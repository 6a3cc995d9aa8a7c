"""Which standard block a decoder layer of any class may be, guessed from the modules inside it.

A guess is not believed: `pyckpt.swap.probe` holds the block's output and gradients to the layer's own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyckpt.functional import layer_norm, rms_norm
from pyckpt.swap import families, lora, quantized, tables
from pyckpt.swap.modules import UnsupportedError, is_known, norm_eps, whose
from pyckpt.swap.survey import leaves
from pyckpt.swap.traced import Trace
from pyckpt.swap.weights import Source
from pyckpt.tokenwise.parameters import ATTENTION, MLP, norms_of

_FAR_OFF = 0.02
_GATE = ("gate", "w1")  # what the names of gates begin with
# (norm_placement, residual), by how many norms a layer calls before attention, between it and the MLP, and after that.
_PLACEMENTS = {
    (1, 1, 0): (("pre", "sequential"), ("pre", "parallel")),
    (2, 0, 0): (("pre", "parallel"),),
    (1, 0, 0): (("pre", "parallel_shared"),),
    (0, 1, 1): (("output", "sequential"), ("post", "sequential")),
    (1, 2, 1): (("sandwich", "sequential"),),
}


@dataclass(frozen=True)
class Cut:
    """Where a layer is cut: what is known of its `Trace`; the modules inside that it calls before attention, with the
    widths of their outputs; all that it calls, in order; and the width of the hidden states."""

    trace: Trace
    called: dict[str, int | None]
    order: tuple[str, ...]
    width: int

    @property
    def attention(self) -> str:
        return self.trace.attention


Part = tuple[dict[str, Any], tuple[Source, ...]]  # some of a block's options, and where some of its weights are


@dataclass(frozen=True)
class Guess:
    """A block's options and where its weights are; `rates`: see `pyckpt.swap.weights.Mapping`."""

    options: Mapping[str, Any]
    sources: tuple[Source, ...]
    rates: tuple[tuple[str, str], ...]


def guesses(layer: nn.Module, cut: Cut, rotary: nn.Module | None, axes: int = 0) -> Iterator[Guess]:
    """The blocks that the layer may be, likelier ones first. Raises `UnsupportedError` where it can be none.

    axes: how many the positions have that the rotary embedding takes; 0 where they are numbers.
    """
    _check_modules(layer)
    linears = {path: shape for path in cut.order if (shape := _shape(layer, path)) is not None}
    inside = {path: linears.pop(path) for path in tuple(linears) if path.startswith(f"{cut.attention}.")}
    norms = [path for path in cut.order if norm_eps(layer.get_submodule(path)) is not None]
    heads_norms = [path for path in norms if path.startswith(f"{cut.attention}.")]
    norms = [path for path in norms if path not in heads_norms]
    known = (*linears, *inside, *norms, *heads_norms)
    holding = [n.rpartition(".")[0] for n, _ in layer.named_parameters()]
    if odd := [path for path in holding if path not in known and not path.startswith(tuple(f"{n}." for n in known))]:
        raise UnsupportedError(f"it has {odd[0] or 'parameters of its own'}, which a block has not")
    common = _heads(cut) | _norm_kind(layer, [*norms, *heads_norms])
    dropout = cut.trace.dropout
    if not isinstance(dropout, str) and dropout:
        raise UnsupportedError("where its attention's rate of dropout is, is not known")
    of_attention = (("attention_dropout", dropout),) if isinstance(dropout, str) else ()
    rates = (*of_attention, *(("inside", path) for path in _rates(layer) if path != dropout))
    for parts in itertools.product(
        _multipliers(layer),
        _of_attention(inside, cut),
        _of_mlp(layer, linears, cut),
        _of_heads_norms(layer, heads_norms, cut),
        _of_norms(cut, norms, list(linears)),
        _of_rope(rotary, axes),
    ):
        options = common | {n: value for found, _ in parts for n, value in found.items()}
        sources = (source for _, of_part in parts for source in of_part)
        yield Guess(options, tuple(replace(s, transposed=_is_transposed(layer, s.path)) for s in sources), rates)


def _check_modules(layer: nn.Module) -> None:
    """Raise `UnsupportedError` where a module is of somebody else's class: in another call it may do something else."""
    adapters = lora.inside(layer)
    for path, module in layer.named_modules():
        known = is_known(type(module)) or lora.is_adapted(module) or quantized.is_quantized(module)
        if path and not known and path not in adapters:
            raise UnsupportedError(f"its {path} is {whose(module)}, and may do anything")


def _shape(layer: nn.Module, path: str) -> tuple[int, int] | None:
    """(out, in) of a linear layer that a block may have, with adapters or without."""
    module = layer.get_submodule(path)
    if not (lora.is_adapted(module) or type(module).__name__ in ("Linear", "Conv1D") or quantized.is_quantized(module)):
        return None
    if any(lora.is_adapted(layer.get_submodule(around)) for around in _around(path)):
        return None
    base: Any = lora.base_of(module)
    rows, columns = quantized.shape_of(base) if quantized.is_quantized(base) else base.weight.shape
    return (columns, rows) if _is_transposed(layer, path) else (rows, columns)


def _is_transposed(layer: nn.Module, path: str) -> bool:
    return type(lora.base_of(layer.get_submodule(path))).__name__ == "Conv1D"


def _around(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


def _heads(cut: Cut) -> dict[str, Any]:
    trace = cut.trace
    if trace.sinks is not None or trace.v_head_dim != trace.head_dim or trace.returns:
        raise UnsupportedError("its attention, or what it returns, is not a block's")
    return {
        "d_model": cut.width,
        "n_heads": trace.n_heads,
        "n_kv_heads": trace.n_kv_heads,
        "head_dim": trace.head_dim,
        "window": None if trace.window[0] < 0 else trace.window[0],
        "softcap": trace.softcap or None,
        "attention_scale": trace.scale,
    }


def _of_attention(linears: dict[str, tuple[int, int]], cut: Cut) -> Iterator[Part]:
    d_q, d_kv = (n * cut.trace.head_dim for n in (cut.trace.n_heads, cut.trace.n_kv_heads))
    *before, last = linears or [""]
    if linears.get(last) != (cut.width, d_q):
        raise UnsupportedError("its attention ends in no output projection")
    out = Source(last, (f"{ATTENTION}.o_proj",))
    names = {n: f"{ATTENTION}.{n}_proj" for n in "qkv"}
    shapes = [linears[path] for path in before]
    if shapes == [(d_q + 2 * d_kv, cut.width)]:
        yield {}, (Source(before[0], tuple(names.values()), (d_q, d_kv, d_kv)), out)
        if d_q == d_kv:
            yield {}, (Source(before[0], tuple(names.values()), heads=cut.trace.n_heads), out)
        return
    found = {path.rpartition(".")[2][:1]: path for path in before}
    if len(before) == 3 and found.keys() == names.keys():
        yield {}, (*(Source(found[n], (name,)) for n, name in names.items()), out)
        return
    raise UnsupportedError("its attention's projections are not a block's")


def _of_mlp(layer: nn.Module, linears: dict[str, tuple[int, int]], cut: Cut) -> Iterator[Part]:
    *before, last = linears or [""]
    rows, d_ff = linears.get(last, (0, 0))
    shapes = [linears[path] for path in before]
    gated = shapes in ([(d_ff, cut.width)] * 2, [(2 * d_ff, cut.width)])
    if rows != cut.width or not (gated or shapes == [(d_ff, cut.width)]):
        raise UnsupportedError("its MLP's linear layers are not a block's")
    kind = tables.activation(_activation(layer, cut), gated)
    if isinstance(kind, UnsupportedError):
        raise kind
    options = {"d_ff": d_ff, "mlp": kind}
    down, up = Source(last, (f"{MLP}.down_proj",)), f"{MLP}.up_proj"
    if not gated:
        yield options, (Source(before[0], (up,)), down)
        return
    names = (f"{MLP}.gate_proj", up)
    for order in (names, names[::-1]):
        if len(before) == 1:
            yield options, (Source(before[0], order, (d_ff, d_ff)), down)
        else:
            paths = sorted(before, key=lambda path: not path.rpartition(".")[2].startswith(_GATE))
            yield options, (*(Source(p, (n,)) for p, n in zip(paths, order, strict=True)), down)


def _activation(layer: nn.Module, cut: Cut) -> nn.Module:
    """The one module outside of attention that has no parameters and is no dropout."""
    found = [
        module
        for path in cut.order
        if not path.startswith(f"{cut.attention}.") and path != cut.attention
        for module in (layer.get_submodule(path),)
        if next(module.parameters(), None) is None and not isinstance(module, (nn.Dropout, nn.Identity))
    ]
    if len({type(m) for m in found}) != 1:
        raise UnsupportedError("its MLP has no activation of its own")
    return found[0]


def _of_norms(cut: Cut, norms: list[str], mlp: list[str]) -> Iterator[Part]:
    places = {path: i for i, path in enumerate(cut.order)}
    attention, first, last = places[cut.attention], places[mlp[0]], places[mlp[-1]]
    if first < attention:
        raise UnsupportedError("its MLP runs before its attention")
    counts = [0, 0, 0]
    for path in norms:
        counts[(places[path] > attention) + (places[path] > last)] += 1
    if tuple(counts) not in _PLACEMENTS:
        raise UnsupportedError("its norms do not stand where a block's do")
    for placement, residual in _PLACEMENTS[counts[0], counts[1], counts[2]]:
        names = norms_of(placement, residual).called
        sources = tuple(Source(path, (name,)) for path, name in zip(norms, names, strict=True))
        yield {"norm_placement": placement, "residual": residual}, sources


def _norm_kind(layer: nn.Module, norms: list[str]) -> dict[str, Any]:
    """Of which kind all of them are, with what eps and what is added to their weights."""
    kinds = [_kind_of_norm(layer.get_submodule(path)) for path in norms]
    if not kinds or any(kind != kinds[0] for kind in kinds):
        raise UnsupportedError("its norms are not all of one kind")
    return kinds[0]


def _kind_of_norm(norm: Any) -> dict[str, Any]:
    eps, weight = norm_eps(norm), getattr(norm, "weight", None)
    if eps is None or not isinstance(weight, Tensor) or weight.dim() != 1:
        raise UnsupportedError("it has a norm without weights, or with several")
    x = 0.5 + torch.randn(6, weight.shape[0], device=weight.device)
    x[3:] *= 1e-3  # rows so small that eps shows
    values = {n: torch.rand(p.shape, device=p.device) for n, p in norm.named_parameters()}
    with torch.no_grad():
        theirs = functional_call(norm, values, (x,))
        for kind, offset in itertools.product(("rmsnorm", "layernorm"), (0.0, 1.0)):
            scale, shift = values["weight"] + offset, values.get("bias")
            ours = rms_norm(x, scale, eps) if kind == "rmsnorm" else layer_norm(x, scale, shift, eps)
            if (kind == "layernorm" or shift is None) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
                return {"norm": kind, "norm_eps": eps, "norm_offset": offset}
    raise UnsupportedError(f"its {type(norm).__name__} is no norm of a block's")


def _of_heads_norms(layer: nn.Module, norms: list[str], cut: Cut) -> Iterator[Part]:
    if not norms:
        yield {}, ()
        return
    found = {path.rpartition(".")[2][:1]: path for path in norms}
    if len(norms) != 2 or found.keys() != {"q", "k"}:
        raise UnsupportedError("its attention's norms are not those of queries and keys")
    width = layer.get_parameter(f"{found['q']}.weight").numel()
    sources = tuple(Source(path, (f"{ATTENTION}.{n}_norm",)) for n, path in sorted(found.items(), reverse=True))
    yield {"qk_norm": True if width == cut.trace.head_dim else "full"}, sources


def _of_rope(rotary: Any, axes: int) -> Iterator[Part]:
    for options, interleaved in itertools.product(_ropes(rotary, axes), (False, True)):
        yield options | {"rope_interleaved": interleaved}, ()
    yield {"rope_theta": None}, ()


def _ropes(rotary: Any, axes: int) -> Iterator[dict[str, Any]]:
    """The options of each kind of RoPE that a model's rotary embedding has."""
    of_pairs = _axes_of_pairs(rotary, axes) if axes else [None]
    types = getattr(rotary, "rope_type", None)
    for kind in types if isinstance(types, dict) else (None,):
        try:
            options, moving = families.rope_options(rotary, kind, {})
        except (UnsupportedError, AttributeError):
            continue
        if moving is None:
            yield from (options | {"rope_axes": found} for found in of_pairs)


def _axes_of_pairs(rotary: Any, axes: int) -> list[tuple[int, ...] | None]:
    """By which axis each pair of dims may turn: tables of positions that are 0 on all axes but one turn by that."""
    try:
        one = torch.eye(axes, dtype=torch.long, device=next(rotary.buffers()).device)
        with torch.no_grad():  # of a copy: it may keep what it has seen
            calls = [copy.deepcopy(rotary)(torch.zeros(1, device=one.device), p.view(axes, 1, 1)) for p in one]
        sines = torch.stack([sin.reshape(-1) for _, sin in calls])
    except Exception:  # of any class anything may come
        return []
    # Of each pair both dims have the same: side by side, one half after the other, or once.
    ways = (sines[:, : sines.shape[1] // 2], sines[:, ::2], sines)
    return list(dict.fromkeys(tuple(way.abs().argmax(0).tolist()) for way in ways))


def is_rope(handed: Mapping[str, Any], positions: Tensor, rotary: Any) -> bool:
    """All that a layer is handed in floating point is RoPE's, of one kind that this rotary embedding has.

    So it is at any position what it is near the first ones. handed: at these positions (t,) or (t, axes), as a batch of
    one.
    """
    given = [t for t in leaves(list(handed.values())) if isinstance(t, Tensor) and t.is_floating_point()]
    places, axes = positions.double(), positions.shape[1] if positions.dim() == 2 else 0
    for options in _ropes(rotary, axes):
        scaling, pairs = options["rope_scaling"], options["rope_axes"]
        if pairs is not None and 2 * len(pairs) != options["rope_dim"]:
            continue
        of_pairs = places[:, None] if pairs is None else places[:, list(pairs)]
        angles = of_pairs * torch.tensor(scaling["frequencies"], device=positions.device).double()
        tables = [f(angles) * scaling["amplitude"] for f in (torch.cos, torch.sin)]
        layouts = [way for t in tables for way in (t, torch.cat([t, t], -1), t.repeat_interleave(2, -1))]
        if all(any(_same_table(t, way) for way in layouts) for t in given):
            return True
    return False


def _same_table(t: Tensor, table: Tensor) -> bool:
    """But for the rounding of angles in float32."""
    return t.numel() == table.numel() and bool((t.double().reshape(table.shape) - table).abs().max() < _FAR_OFF)


def _multipliers(layer: nn.Module) -> Iterator[Part]:
    """Of what each sublayer adds to the residual stream: 1, or a number that the layer has."""
    yield {}, ()
    numbers = {v for v in vars(layer).values() if type(v) is float and v > 0.0 and v != 1.0}
    yield from (({"residual_multiplier": v}, ()) for v in sorted(numbers))


def _rates(layer: nn.Module) -> Iterator[str]:
    """The paths of what drops, or may."""
    adapters = lora.inside(layer)
    for path, module in layer.named_modules():
        if isinstance(module, nn.Dropout) and path not in adapters:
            yield path
        numbers = (n for n, v in vars(module).items() if "drop" in n and type(v) in (int, float))
        yield from (f"{path}.{n}".lstrip(".") for n in numbers)
