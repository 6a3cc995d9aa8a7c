"""The parameters of a standard block: their names, those of Hugging Face's decoder layers, and their shapes."""

from __future__ import annotations

import dataclasses

from pyckpt.spec import BlockSpec

ATTENTION = "self_attn"
MLP = "mlp"
_QKV = tuple(f"{ATTENTION}.{n}_proj" for n in "qkv")
_BIASED = {
    "qkv": _QKV,
    "attention": (*_QKV, f"{ATTENTION}.o_proj"),
    "mlp": tuple(f"{MLP}.{n}_proj" for n in ("gate", "up", "down")),
}


def parameter_shapes(spec: BlockSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of a standard block with its shape, in the order of a Hugging Face Llama decoder layer."""
    d, f = spec.d_model, spec.d_ff
    linears = {
        f"{ATTENTION}.q_proj": (spec.d_q, d),
        f"{ATTENTION}.k_proj": (spec.d_kv, d),
        f"{ATTENTION}.v_proj": (spec.d_kv, d),
        f"{ATTENTION}.o_proj": (d, spec.d_q),
        **({f"{MLP}.gate_proj": (f, d)} if spec.gated else {}),
        f"{MLP}.up_proj": (f, d),
        f"{MLP}.down_proj": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{name}.weight"] = shape
        if spec.bias is True or name in _BIASED.get(str(spec.bias), ()):
            shapes[f"{name}.bias"] = shape[:1]
        for adapter in spec.low_rank:
            if adapter.linear == name:
                shapes |= {adapter.a: (adapter.rank, shape[1]), adapter.b: (shape[0], adapter.rank)}
    if spec.qk_norm:
        for n, width in (("q", spec.d_q), ("k", spec.d_kv)):
            shapes[f"{ATTENTION}.{n}_norm.weight"] = (width if spec.qk_norm == "full" else spec.head_dim,)
    for name in norm_names(spec).called:
        shapes[f"{name}.weight"] = (d,)
        if spec.norm == "layernorm":
            shapes[f"{name}.bias"] = (d,)
    return shapes


@dataclasses.dataclass(frozen=True)
class NormNames:
    """The norms over the width of the residual stream, by where they stand; None where there is none."""

    attention: str | None = "input_layernorm"
    after_attention: str | None = None
    mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None

    @property
    def called(self) -> tuple[str, ...]:
        """Those that there are, in the order of a block's forward."""
        return tuple(dict.fromkeys(n for n in dataclasses.astuple(self) if n is not None))


_AFTER = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_PLACEMENTS = {
    "pre": NormNames(),
    "sandwich": dataclasses.replace(_AFTER, attention="input_layernorm", mlp="pre_feedforward_layernorm"),
    "output": _AFTER,
    "post": _AFTER,
}


def norm_names(spec: BlockSpec) -> NormNames:
    return norms_of(spec.norm_placement, spec.residual)


def norms_of(placement: str, residual: str) -> NormNames:
    """Of a block with this `norm_placement` and this `residual`."""
    names = _PLACEMENTS[placement]
    return dataclasses.replace(names, mlp=names.attention) if residual == "parallel_shared" else names


def pre_parameters(spec: BlockSpec) -> tuple[str, ...]:
    """The parameters whose gradient comes through q, k, v."""
    own = tuple(f"{n}." for n in (ATTENTION, norm_names(spec).attention) if n is not None)
    return tuple(n for n in parameter_shapes(spec) if n.startswith(own) and ".o_proj" not in n)
