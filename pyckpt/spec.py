"""What a transformer block computes: the frozen description that every executor and kernel reads.

A `BlockSpec` holds shapes and options and no tensors. It can be hashed, compared, and written as a string and
read back (`to_string`, `from_string`), which is how it travels through a `torch.library` schema.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyckpt import errors

NORMS = ("rmsnorm", "layernorm")
GATED_MLPS = ("swiglu", "geglu", "geglu_tanh")
PLAIN_MLPS = ("gelu", "gelu_tanh", "relu2")
MLPS = GATED_MLPS + PLAIN_MLPS
BIASED_PARTS = ("qkv", "attention", "mlp")
NORM_PLACEMENTS = ("pre", "sandwich", "output", "post")
RESIDUALS = ("sequential", "parallel", "parallel_shared")
ROPE_TYPES = ("linear", "llama3", "given")
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
}
_FREQUENCIES = errors.Range("finite numbers", errors.FINITE.holds)
Window = tuple[int, int]
RopeScaling = tuple[tuple[str, Any], ...]


class LowRank(NamedTuple):
    """A low-rank product beside one of a block's linear layers, as in LoRA (Hu et al. 2021, eq. 3):

        y = x Wᵀ + b + scale (dropout(x) Aᵀ) Bᵀ

    with A (rank, in), B (out, rank), and `dropout` the rate. `linear` is the layer's name; `key` tells apart what
    stands beside the same one.
    """

    linear: str
    key: str
    rank: int
    scale: float
    dropout: float = 0.0

    @property
    def a(self) -> str:
        """The name of A among a block's parameters."""
        return f"{self.linear}.lora_A.{self.key}"

    @property
    def b(self) -> str:
        return f"{self.linear}.lora_B.{self.key}"


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Shapes and options of one block. Build it with `BlockSpec.make`, which checks and fills in defaults.

    `window` is (left, right): how many keys are visible before and after the query's own, -1 for no limit.
    Causal blocks have right = 0. `softcap` 0.0 means none; `rope_theta` None means no rotary embedding.
    `rope_dim`: leading dims of a head that RoPE turns, None for all; `rope_interleaved`: pairs (2i, 2i + 1).
    `rope_axes`: by which axis of its token's position each pair of dims turns; None where positions have one.
    `attention_scale` of the scores: None for head_dim ** -0.5.
    `norm_offset` is added to the norms' weights.
    `norm_placement`: norms of a sublayer's input ("pre"), of its output, of both ("sandwich"), or of the sum ("post").
    `bias`: on all linear layers, on none, or on a part: "qkv", "attention" (those and the output's) or "mlp".
    `qk_norm`: over each head of q and k (True) or over all of them ("full").
    `residual` "parallel" adds attention and MLP to the same x, "parallel_shared" from one norm of it.
    `residual_multiplier`: of what each sublayer adds to the residual stream.
    `dropout` is the rate on the outputs of attention and of the MLP, `attention_dropout` that on probabilities.
    `low_rank`: products beside the linear layers, of a block that runs on another layer's weights (`pyckpt.swap`).
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    mlp: str = "swiglu"
    norm_placement: str = "pre"
    residual: str = "sequential"
    residual_multiplier: float = 1.0
    bias: bool | str = False
    qk_norm: bool | str = False
    rope_theta: float | None = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_dim: int | None = None
    rope_interleaved: bool = False
    rope_axes: tuple[int, ...] | None = None
    causal: bool = True
    window: Window = (-1, -1)
    softcap: float = 0.0
    attention_scale: float | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    low_rank: tuple[LowRank, ...] = ()

    @property
    def d_q(self) -> int:
        """Width of q and of the attention output: n_heads * head_dim."""
        return self.n_heads * self.head_dim

    @property
    def d_kv(self) -> int:
        """Width of k and of v: n_kv_heads * head_dim."""
        return self.n_kv_heads * self.head_dim

    @property
    def gated(self) -> bool:
        return self.mlp in GATED_MLPS

    @property
    def parallel(self) -> bool:
        """Attention and MLP read the same x: there is no residual stream between them."""
        return self.residual != "sequential"

    @property
    def norms_after(self) -> bool:
        """A norm stands after each sublayer: of its output, or of the sum with the residual stream."""
        return self.norm_placement != "pre"

    @property
    def norms_sum(self) -> bool:
        """The norm after a sublayer is of the sum, so that the residual stream itself is normed."""
        return self.norm_placement == "post"

    @property
    def drops(self) -> bool:
        """Something is dropped at random in training."""
        return any(rate > 0.0 for rate in (self.dropout, self.attention_dropout, *(a.dropout for a in self.low_rank)))

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def d_rope(self) -> int:
        """Dims of a head that RoPE turns, where there is RoPE."""
        return self.rope_dim or self.head_dim

    @property
    def position_axes(self) -> int:
        """How many numbers a token's position is, one for each axis; 0 where it is one number without an axis."""
        return 0 if self.rope_axes is None else max(self.rope_axes) + 1

    def without_dropout(self) -> BlockSpec:
        """The same of a block that drops nothing."""
        low_rank = tuple(a._replace(dropout=0.0) for a in self.low_rank)
        return dataclasses.replace(self, dropout=0.0, attention_dropout=0.0, low_rank=low_rank)

    def to_string(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_string(text: str) -> BlockSpec:
        fields = json.loads(text)
        fields["window"] = tuple(fields["window"])
        fields["low_rank"] = tuple(LowRank(*a) for a in fields["low_rank"])
        if fields.get("rope_axes") is not None:
            fields["rope_axes"] = tuple(fields["rope_axes"])
        if fields["rope_scaling"] is not None:
            fields["rope_scaling"] = tuple(
                (k, tuple(v) if isinstance(v, list) else v) for k, v in fields["rope_scaling"]
            )
        return BlockSpec(**fields)

    @staticmethod
    def make(
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_ff: int | None = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_offset: float = 0.0,
        mlp: str = "swiglu",
        norm_placement: str = "pre",
        residual: str = "sequential",
        residual_multiplier: float = 1.0,
        bias: bool | str = False,
        qk_norm: bool | str = False,
        rope_theta: float | None = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_axes: Sequence[int] | None = None,
        causal: bool = True,
        window: int | Window | None = None,
        softcap: float | None = None,
        attention_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
    ) -> BlockSpec:
        """Check the options of `CkptTransformerBlock` and fill in the defaults.

        Raises ValueError for whatever does not fit, of a wrong type too: the options are often a config file's.
        """
        d_model = errors.positive_int("d_model", d_model)
        n_heads = errors.positive_int("n_heads", n_heads)
        n_kv_heads = n_heads if n_kv_heads is None else errors.positive_int("n_kv_heads", n_kv_heads)
        if n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads={n_heads} is not a multiple of n_kv_heads={n_kv_heads}; grouped-query attention needs "
                "the same number of query heads for every key/value head"
            )
        if head_dim is None:
            if d_model % n_heads:
                raise ValueError(
                    f"d_model={d_model} is not a multiple of n_heads={n_heads}; choose another n_heads or give "
                    "head_dim explicitly"
                )
            head_dim = d_model // n_heads
        head_dim = errors.positive_int("head_dim", head_dim)
        _one_of("norm", norm, NORMS)
        _one_of("mlp", mlp, MLPS)
        _one_of("norm_placement", norm_placement, NORM_PLACEMENTS)
        _one_of("residual", residual, RESIDUALS)
        if residual != "sequential" and norm_placement != "pre":
            raise ValueError(
                f"residual={residual!r} with norm_placement={norm_placement!r}: the norms of a parallel block stand "
                "before its sublayers; use norm_placement='pre' or residual='sequential'"
            )
        residual_multiplier = _number("residual_multiplier", residual_multiplier, errors.POSITIVE)
        if residual_multiplier != 1.0 and norm_placement != "pre":
            raise ValueError(
                f"residual_multiplier={residual_multiplier} with norm_placement={norm_placement!r}: a norm after the "
                "sublayer has a weight that scales it; use norm_placement='pre' or residual_multiplier=1.0"
            )
        norm_eps = _number("norm_eps", norm_eps, errors.POSITIVE)
        norm_offset = _number("norm_offset", norm_offset, errors.FINITE)
        if not (isinstance(bias, bool) or bias in BIASED_PARTS):
            raise ValueError(f"bias must be True, False, or one of {', '.join(BIASED_PARTS)}, got {bias!r}")
        if d_ff is None:
            d_ff = -(-8 * d_model // 3 // 128) * 128 if mlp in GATED_MLPS else 4 * d_model
        d_ff = errors.positive_int("d_ff", d_ff)
        if not (isinstance(qk_norm, bool) or qk_norm == "full"):
            raise ValueError(
                f"qk_norm must be True (over each head), 'full' (over all of them) or False, got {qk_norm!r}"
            )
        if rope_theta is not None:
            rope_theta = _number("rope_theta", rope_theta, errors.POSITIVE)
            if head_dim % 2 and rope_dim is None:
                raise ValueError(
                    f"head_dim={head_dim} is odd, and RoPE rotates pairs of dimensions; use an even head_dim or "
                    "rope_theta=None"
                )
        softcap = 0.0 if softcap is None else _number("softcap", softcap, errors.SOFTCAP)
        rope_dim = _checked_rope_dim(rope_dim, head_dim, rope_theta)
        errors.check_bool("rope_interleaved", rope_interleaved, ValueError)
        errors.check_bool("causal", causal, ValueError)
        scaling = canonical_rope_scaling(rope_scaling, rope_theta)
        check_frequencies(scaling, rope_dim or head_dim)
        if rope_axes is not None and rope_theta is None:
            raise ValueError("rope_axes was given with rope_theta=None: there is no rotary embedding")
        if attention_scale is not None:
            attention_scale = _number("attention_scale", attention_scale, errors.POSITIVE)
        dropout = _number("dropout", dropout, errors.RATE)
        if attention_dropout is None:
            attention_dropout = dropout
        attention_dropout = _number("attention_dropout", attention_dropout, errors.RATE)
        return BlockSpec(
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            d_ff=d_ff,
            norm=norm,
            norm_eps=norm_eps,
            norm_offset=norm_offset,
            mlp=mlp,
            norm_placement=norm_placement,
            residual=residual,
            residual_multiplier=residual_multiplier,
            bias=bias,
            qk_norm=qk_norm,
            rope_theta=rope_theta,
            rope_scaling=scaling,
            rope_dim=None if rope_dim == head_dim else rope_dim,
            rope_interleaved=rope_interleaved,
            rope_axes=canonical_axes(rope_axes, rope_dim or head_dim),
            causal=causal,
            window=canonical_window(causal, window),
            softcap=softcap,
            attention_scale=attention_scale,
            dropout=dropout,
            attention_dropout=attention_dropout,
        )


def canonical_window(causal: bool, window: int | Window | None) -> Window:
    """Turn `causal` and the user's `window` (None, int, or (left, right)) into one (left, right), -1 = no limit.

    An int is (window, 0), as in flash-attn's sliding window. Causal attention has right = 0.
    """
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    given = window if isinstance(window, (tuple, list)) else (window, 0)
    sides = [errors.as_int(w) for w in given]
    if given is not window and sides[0] is not None and sides[0] < 0:
        raise ValueError(
            f"window={window} is negative; give the number of earlier keys a query may see, or None for no limit"
        )
    if len(sides) != 2 or any(w is None or not -1 <= w < 2**63 for w in sides):
        raise ValueError(
            f"window must be None, an int >= 0, or a pair (left, right) of ints >= -1 (-1: no limit), got {window!r}"
        )
    left, right = sides
    return (left, 0) if causal else (left, right)  # type: ignore[return-value]


def canonical_rope_scaling(
    scaling: dict[str, Any] | None, theta: float | None, name: str = "rope_scaling", theta_name: str = "rope_theta"
) -> RopeScaling | None:
    """A dict as in Hugging Face configs as plain numbers; None where nothing is scaled.

    The names are those of the caller's arguments. Raises ValueError for what does not fit.
    """
    if scaling is None:
        return None
    if theta is None:
        raise ValueError(f"{name} was given with {theta_name}=None: there is no rotary embedding to scale")
    if not isinstance(scaling, dict):
        raise ValueError(f"{name} must be None or a dict as in Hugging Face configs, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    # A config's rope_parameters hold what is an argument of its own here.
    if scaling.get("rope_theta") not in (None, theta):
        raise ValueError(f"{name} has rope_theta={scaling['rope_theta']!r}, and {theta!r} is given beside it")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"{name} has partial_rotary_factor={scaling['partial_rotary_factor']!r}, which is not read: give the "
            "number of dims that RoPE turns, rope_dim (rotary_dim of pyckpt.rope)"
        )
    if kind is None and not scaling.keys() <= {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"{name} has no rope_type, which says how to scale; got {scaling!r}")
    if kind in (None, "default"):
        return None
    if kind not in ROPE_TYPES:
        raise ValueError(f"{name} type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    if kind == "given":
        return _given_frequencies({"amplitude": 1.0, **scaling}, name)
    missing = [key for key in _ROPE_KEYS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"{name} of type {kind!r} lacks {', '.join(missing)}; got {scaling!r}")
    values = {key: _plain_number(f"{name}'s {key}", scaling[key]) for key in _ROPE_KEYS[kind]}
    if kind == "llama3" and not values["low_freq_factor"] < values["high_freq_factor"]:
        raise ValueError(
            f"{name}'s low_freq_factor={values['low_freq_factor']} must be below its "
            f"high_freq_factor={values['high_freq_factor']}"
        )
    return (("rope_type", kind), *values.items())


def _given_frequencies(scaling: dict[str, Any], name: str) -> RopeScaling:
    """The frequencies themselves, one for each pair of dims, and what multiplies cos and sin."""
    given: Any = scaling.get("frequencies")
    errors.check_constant(f"{name}'s frequencies", given, "turn x by plain PyTorch")
    frequencies = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(frequencies, (tuple, list)) or not frequencies:
        raise ValueError(
            f"{name} of type 'given' needs frequencies, a list of one number for each pair of dims that RoPE "
            f"turns; got {given!r}"
        )
    if not all(type(f) is float and math.isfinite(f) for f in frequencies):  # they are, most often
        frequencies = [_number(f"{name}'s frequencies", f, _FREQUENCIES) for f in frequencies]
    return (
        ("rope_type", "given"),
        ("amplitude", _number(f"{name}'s amplitude", scaling["amplitude"], errors.POSITIVE)),
        ("frequencies", tuple(frequencies)),
    )


def check_frequencies(scaling: RopeScaling | None, dims: int, name: str = "rope_scaling") -> None:
    given = dict(scaling or ()).get("frequencies")
    if given is not None and 2 * len(given) != dims:
        raise ValueError(
            f"{name} gives {len(given)} frequencies, expected {dims // 2}: one for each pair of the {dims} dims "
            "that RoPE turns"
        )


def canonical_axes(axes: Any, dims: int, name: str = "rope_axes") -> tuple[int, ...] | None:
    """One axis for each pair of these dims. Raises ValueError for what does not fit."""
    if axes is None:
        return None
    given = axes.tolist() if hasattr(axes, "tolist") else axes
    numbers = [errors.as_int(a) for a in given] if isinstance(given, (tuple, list)) else []
    found = tuple(a for a in numbers if a is not None and a >= 0)
    if not found or len(found) != len(numbers):
        raise ValueError(f"{name} must be None or a list of ints >= 0, one for each pair of dims, got {axes!r}")
    if 2 * len(found) != dims:
        raise ValueError(
            f"{name} gives {len(found)} axes, expected {dims // 2}: one for each pair of the {dims} dims that RoPE "
            "turns"
        )
    left_out = set(range(max(found))) - set(found)
    if left_out:
        raise ValueError(f"{name} leaves out axis {min(left_out)}: number those that turn something from 0 on")
    return found


def _checked_rope_dim(rope_dim: Any, head_dim: int, theta: float | None) -> int | None:
    if rope_dim is None:
        return None
    dim = errors.positive_int("rope_dim", rope_dim)
    if dim % 2 or dim > head_dim:
        raise ValueError(f"rope_dim={dim} must be even and at most head_dim={head_dim}: RoPE turns pairs of dims")
    if theta is None:
        raise ValueError("rope_dim was given with rope_theta=None: there is no rotary embedding")
    return dim


def _number(name: str, value: Any, allowed: errors.Range) -> float:
    return errors.number(name, value, allowed, wrong_type=ValueError)


def _plain_number(name: str, value: Any) -> float:
    """A positive number; an int as it is, which config files keep."""
    found = _number(name, value, errors.POSITIVE)
    whole = errors.as_int(value)
    return found if whole is None else whole


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist; expected one of {', '.join(choices)}")
