"""What a transformer block computes: the frozen description that every executor and kernel reads.

A `BlockSpec` holds shapes and options and no tensors. It can be hashed, compared, and written as a string and
read back (`to_string`, `from_string`), which is how it travels through a `torch.library` schema.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from typing import Any, NamedTuple

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
    def norms_input(self) -> bool:
        """A norm stands before each sublayer."""
        return self.norm_placement in ("pre", "sandwich")

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

    def to_string(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_string(text: str) -> BlockSpec:
        fields = json.loads(text)
        fields["window"] = tuple(fields["window"])
        fields["low_rank"] = tuple(LowRank(*a) for a in fields["low_rank"])
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
        causal: bool = True,
        window: int | Window | None = None,
        softcap: float | None = None,
        attention_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
    ) -> BlockSpec:
        """Check the options of `CkptTransformerBlock` and fill in the defaults. Raises ValueError."""
        _positive_int("d_model", d_model)
        _positive_int("n_heads", n_heads)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        _positive_int("n_kv_heads", n_kv_heads)
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
        _positive_int("head_dim", head_dim)
        _one_of("norm", norm, NORMS)
        _one_of("mlp", mlp, MLPS)
        _one_of("norm_placement", norm_placement, NORM_PLACEMENTS)
        _one_of("residual", residual, RESIDUALS)
        if residual != "sequential" and norm_placement != "pre":
            raise ValueError(
                f"residual={residual!r} with norm_placement={norm_placement!r}: the norms of a parallel block stand "
                "before its sublayers; use norm_placement='pre' or residual='sequential'"
            )
        _positive_float("residual_multiplier", residual_multiplier)
        if residual_multiplier != 1.0 and norm_placement != "pre":
            raise ValueError(
                f"residual_multiplier={residual_multiplier} with norm_placement={norm_placement!r}: a norm after the "
                "sublayer has a weight that scales it; use norm_placement='pre' or residual_multiplier=1.0"
            )
        _positive_float("norm_eps", norm_eps)
        if not isinstance(norm_offset, (int, float)) or isinstance(norm_offset, bool) or not math.isfinite(norm_offset):
            raise ValueError(f"norm_offset must be a finite number, got {norm_offset!r}")
        if not (isinstance(bias, bool) or bias in BIASED_PARTS):
            raise ValueError(f"bias must be True, False, or one of {', '.join(BIASED_PARTS)}, got {bias!r}")
        if d_ff is None:
            d_ff = -(-8 * d_model // 3 // 128) * 128 if mlp in GATED_MLPS else 4 * d_model
        _positive_int("d_ff", d_ff)
        if not (isinstance(qk_norm, bool) or qk_norm == "full"):
            raise ValueError(
                f"qk_norm must be True (over each head), 'full' (over all of them) or False, got {qk_norm!r}"
            )
        if rope_theta is not None:
            _positive_float("rope_theta", rope_theta)
            if head_dim % 2 and rope_dim is None:
                raise ValueError(
                    f"head_dim={head_dim} is odd, and RoPE rotates pairs of dimensions; use an even head_dim or "
                    "rope_theta=None"
                )
        if softcap is not None and not (math.isfinite(softcap) and softcap >= 0):
            raise ValueError(f"softcap must be None or a positive number, got {softcap!r}")
        _check_rope_dim(rope_dim, head_dim, rope_theta)
        scaling = canonical_rope_scaling(rope_scaling, rope_theta)
        check_frequencies(scaling, rope_dim or head_dim)
        if attention_scale is not None:
            _positive_float("attention_scale", attention_scale)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        _rate("dropout", dropout)
        _rate("attention_dropout", attention_dropout)
        return BlockSpec(
            d_model=int(d_model),
            n_heads=int(n_heads),
            n_kv_heads=int(n_kv_heads),
            head_dim=int(head_dim),
            d_ff=int(d_ff),
            norm=norm,
            norm_eps=float(norm_eps),
            norm_offset=float(norm_offset),
            mlp=mlp,
            norm_placement=norm_placement,
            residual=residual,
            residual_multiplier=float(residual_multiplier),
            bias=bias,
            qk_norm=qk_norm,
            rope_theta=None if rope_theta is None else float(rope_theta),
            rope_scaling=scaling,
            rope_dim=None if rope_dim == head_dim else rope_dim,
            rope_interleaved=bool(rope_interleaved),
            causal=bool(causal),
            window=canonical_window(causal, window),
            softcap=float(softcap or 0.0),
            attention_scale=None if attention_scale is None else float(attention_scale),
            dropout=float(dropout),
            attention_dropout=float(attention_dropout),
        )


def canonical_window(causal: bool, window: int | Window | None) -> Window:
    """Turn `causal` and the user's `window` (None, int, or (left, right)) into one (left, right), -1 = no limit.

    An int is (window, 0), as in flash-attn's sliding window. Causal attention has right = 0.
    """
    if window is None:
        return (-1, 0) if causal else (-1, -1)
    given = window if isinstance(window, (tuple, list)) else (window, 0)
    sides = [_integer(w) for w in given]
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


def _integer(value: Any) -> int | None:
    """Of an int, of NumPy's, and of a tensor of one; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a tensor of floats
        return None


def canonical_rope_scaling(scaling: dict[str, Any] | None, theta: float | None) -> RopeScaling | None:
    if scaling is None:
        return None
    if theta is None:
        raise ValueError("rope_scaling was given with rope_theta=None: there is no rotary embedding to scale")
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be None or a dict as in Hugging Face configs, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type"))
    # A config's rope_parameters hold what is an argument of its own here.
    if scaling.get("rope_theta") not in (None, theta):
        raise ValueError(f"rope_scaling has rope_theta={scaling['rope_theta']!r}, and {theta!r} is given beside it")
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(
            f"rope_scaling has partial_rotary_factor={scaling['partial_rotary_factor']!r}, which is not read: give the "
            "number of dims that RoPE turns, rope_dim (rotary_dim of pyckpt.rope)"
        )
    if kind is None and not scaling.keys() <= {"rope_theta", "partial_rotary_factor"}:
        raise ValueError(f"rope_scaling has no rope_type, which says how to scale; got {scaling!r}")
    if kind in (None, "default"):
        return None
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    if kind == "given":
        return _given_frequencies({"amplitude": 1.0, **scaling})
    missing = [key for key in _ROPE_KEYS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}; got {scaling!r}")
    for key in _ROPE_KEYS[kind]:
        _positive_float(f"rope_scaling's {key}", scaling[key])
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise ValueError(
            f"rope_scaling's low_freq_factor={scaling['low_freq_factor']} must be below its "
            f"high_freq_factor={scaling['high_freq_factor']}"
        )
    return (("rope_type", kind), *((key, scaling[key]) for key in _ROPE_KEYS[kind]))


def _given_frequencies(scaling: dict[str, Any]) -> RopeScaling:
    """The frequencies themselves, one for each pair of dims, and what multiplies cos and sin."""
    frequencies = scaling.get("frequencies")
    if not isinstance(frequencies, (tuple, list)) or not frequencies:
        raise ValueError(
            "rope_scaling of type 'given' needs frequencies, a list of one number for each pair of dims that RoPE "
            f"turns; got {frequencies!r}"
        )
    for value in frequencies:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"rope_scaling's frequencies must be finite numbers, got {value!r}")
    _positive_float("rope_scaling's amplitude", scaling["amplitude"])
    return (
        ("rope_type", "given"),
        ("amplitude", float(scaling["amplitude"])),
        ("frequencies", tuple(float(f) for f in frequencies)),
    )


def check_frequencies(scaling: RopeScaling | None, dims: int) -> None:
    given = dict(scaling or ()).get("frequencies")
    if given is not None and 2 * len(given) != dims:
        raise ValueError(
            f"rope_scaling gives {len(given)} frequencies, expected {dims // 2}: one for each pair of the {dims} dims "
            "that RoPE turns"
        )


def _check_rope_dim(rope_dim: Any, head_dim: int, theta: float | None) -> None:
    if rope_dim is None:
        return
    _positive_int("rope_dim", rope_dim)
    if rope_dim % 2 or rope_dim > head_dim:
        raise ValueError(f"rope_dim={rope_dim} must be even and at most head_dim={head_dim}: RoPE turns pairs of dims")
    if theta is None:
        raise ValueError("rope_dim was given with rope_theta=None: there is no rotary embedding")


def _positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive int, got {value!r}")


def _positive_float(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


def _rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} does not exist; expected one of {', '.join(choices)}")
