"""The parameters of a standard block: their names, those of Hugging Face's decoder layers, and their shapes."""

from __future__ import annotations

from pyckpt.spec import BlockSpec

INPUT_NORM = "input_layernorm"
POST_NORM = "post_attention_layernorm"
ATTENTION = "self_attn"
MLP = "mlp"


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
        if spec.bias:
            shapes[f"{name}.bias"] = shape[:1]
    if spec.qk_norm:
        shapes[f"{ATTENTION}.q_norm.weight"] = shapes[f"{ATTENTION}.k_norm.weight"] = (spec.head_dim,)
    for name in norm_names(spec):
        shapes[f"{name}.weight"] = (d,)
        if spec.norm == "layernorm":
            shapes[f"{name}.bias"] = (d,)
    return shapes


def norm_names(spec: BlockSpec) -> tuple[str, ...]:
    """The norms over the width of the residual stream."""
    return (INPUT_NORM,) if spec.residual == "parallel_shared" else (INPUT_NORM, POST_NORM)


def pre_parameters(spec: BlockSpec) -> tuple[str, ...]:
    """The parameters whose gradient comes through q, k, v."""
    return tuple(n for n in parameter_shapes(spec) if n.startswith((INPUT_NORM, ATTENTION)) and ".o_proj" not in n)
