"""`torch.nn.TransformerEncoderLayer` as a standard block, or its own modules around our attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from pyckpt.block import CheckpointedBlock, run_blocks
from pyckpt.ops.seeding import seed_generators
from pyckpt.reading import read_once
from pyckpt.save import Save, SaveSet, save_set
from pyckpt.spec import BlockSpec
from pyckpt.swap import again, generic, masks
from pyckpt.swap import survey as surveys
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.families import check_forwards, finish, spec_of
from pyckpt.swap.generic import GenericMappedBlock, Parts
from pyckpt.swap.modules import UnsupportedCallError, UnsupportedError, passes
from pyckpt.swap.numbers import ANEW, numbers_of
from pyckpt.swap.probe import check_steady
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.shadow import untouched
from pyckpt.swap.tables import Options
from pyckpt.swap.weights import Mapping, Source, rate_at, read_rates
from pyckpt.tokenwise.generic import LostGradientError
from pyckpt.tokenwise.parameters import ATTENTION, MLP

EncoderBlock = MappedBlock | GenericMappedBlock
_ACTIVATIONS = {F.gelu: "gelu"}
# Those that surely draw no random numbers.
_STEADY = (F.relu, torch.relu, F.gelu, F.silu, F.mish, F.elu, F.leaky_relu, F.softplus, torch.tanh, torch.sigmoid)


def block_of(layer: nn.TransformerEncoderLayer, causal: bool, save: str | Save, tile: int | None) -> EncoderBlock:
    """The layer as a block that is causal or not, standard if it can be, else generic (`mapping.why` says why).

    Raises `UnsupportedError`, saying why neither.
    """
    check_forwards(layer)
    try:
        return MappedBlock(layer, _standard_mapping(layer, causal), save, tile)
    except UnsupportedError as reason:
        block = _GenericEncoderBlock(layer, _generic_mapping(layer, causal, str(reason)), save, tile)
        _check_activation(layer)
        check_steady(layer, block)
        return block


def _standard_mapping(layer: nn.TransformerEncoderLayer, causal: bool) -> Mapping:
    kind = _activation(layer.activation)
    _check_kinds(layer, "self_attn", "self_attn.out_proj")
    for path in ("dropout", "dropout1", "dropout2"):
        if type(getattr(layer, path)) not in _DROPOUTS:
            raise UnsupportedError(f"it has a {type(getattr(layer, path)).__name__} where a Dropout was expected")
    if rate_at(layer, "dropout"):
        raise UnsupportedError("it drops values inside its MLP (dropout > 0), which a block does not")
    norms = (layer.norm1, layer.norm2)
    if not all(type(n) is nn.LayerNorm and n.elementwise_affine for n in norms) or norms[0].eps != norms[1].eps:
        raise UnsupportedError("its norms are not LayerNorms with weights and one eps")
    options = _options(layer, causal) | {
        "d_ff": layer.linear1.out_features,
        "norm_eps": layer.norm1.eps,
        "mlp": kind,
        "dropout": read_rates(layer, _RATES)["dropout"],
    }
    last = "post_attention_layernorm" if layer.norm_first else "post_feedforward_layernorm"
    qkv = tuple(f"{ATTENTION}.{n}_proj" for n in "qkv")
    sources = [
        Source("self_attn", qkv, (options["d_model"],) * 3, weight="in_proj_weight", bias="in_proj_bias"),
        Source("self_attn.out_proj", (f"{ATTENTION}.o_proj",)),
        Source("linear1", (f"{MLP}.up_proj",)),
        Source("linear2", (f"{MLP}.down_proj",)),
        Source("norm1", ("input_layernorm" if layer.norm_first else "post_attention_layernorm",)),
        Source("norm2", (last,)),
    ]
    return finish(layer, options, sources, rates=_RATES)


def _generic_mapping(layer: nn.TransformerEncoderLayer, causal: bool, why: str) -> Mapping:
    _check_kinds(layer, *_KINDS, why=why)
    generic.check_unwatched(layer)
    # Of the spec the generic path reads what attention is; any MLP and norm stand for the layer's own.
    spec = spec_of(_options(layer, causal) | {"mlp": "gelu"}, bias=False)
    classes = tuple((path, type(module)) for path, module in generic.inner(layer))
    return Mapping(spec, (), classes, why, rates=_ATTENTION_RATE, numbers=numbers_of(layer, ("self_attn",)))


def _check_kinds(layer: nn.Module, *paths: str, why: str = "") -> None:
    """PyTorch's attention reads its output projection's weight, and calls no module: adapters there do nothing."""
    for path in paths:
        kind = type(layer.get_submodule(path))
        if kind not in _KINDS[path]:
            reason = f"{path} is a {kind.__module__}.{kind.__name__}, not PyTorch's own"
            raise UnsupportedError(f"{reason}; {why}" if why else reason)


_ATTENTION_RATE = (("attention_dropout", "self_attn.dropout"),)
_RATES = (("inside", "dropout"), ("dropout", "dropout1"), ("dropout", "dropout2"), *_ATTENTION_RATE)
_NORMS, _DROPOUTS = (nn.LayerNorm, nn.RMSNorm, nn.Identity), (nn.Dropout, nn.Identity)
# What stands where these do must treat each token by itself, or, of attention, be what its weights say.
_KINDS: dict[str, tuple[type, ...]] = {
    "self_attn": (nn.MultiheadAttention,),
    "self_attn.out_proj": (NonDynamicallyQuantizableLinear, nn.Linear),
    **dict.fromkeys(("norm1", "norm2"), _NORMS),
    **dict.fromkeys(("dropout", "dropout1", "dropout2"), _DROPOUTS),
}
_PARTS = (*_KINDS, "linear1", "linear2")


def _options(layer: nn.TransformerEncoderLayer, causal: bool) -> Options:
    """What both paths read. Raises `UnsupportedError` for attention that is not of one input, by its weights alone."""
    attention = layer.self_attn
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise UnsupportedError("its attention has widths, biases or zeros of its own for keys and values")
    return {
        "d_model": attention.embed_dim,
        "n_heads": attention.num_heads,
        "norm": "layernorm",
        "norm_placement": "pre" if layer.norm_first else "post",
        "rope_theta": None,
        "causal": causal,
        "attention_dropout": float(attention.dropout),
    }


def _activation(activation: Any) -> str:
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation not in _ACTIVATIONS:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise UnsupportedError(f"the activation {name} is not one of a block's")
    return _ACTIVATIONS[activation]


def _check_activation(layer: nn.TransformerEncoderLayer) -> None:
    """Raise `UnsupportedError` where the activation mixes tokens (a softmax over them), of which ours has fewer dims.

    Nothing is found out of one that does not run on random numbers where the layer is.
    """
    if layer.activation in _STEADY or not passes(surveys.check_here, layer):
        return
    weight = layer.linear1.weight
    with untouched(layer), surveys.forked(weight.device), torch.no_grad():
        try:
            x, made = torch.randn(3, layer.linear2.in_features, dtype=weight.dtype, device=weight.device), []
            for given in (x[None], x):
                seed_generators(0, weight.device)
                made.append(layer.activation(given.clone()).reshape(given.shape))
        except Exception:  # of any function anything may be met
            return
    if not torch.allclose(made[0][0].double(), made[1].double(), equal_nan=True):
        raise UnsupportedError("its activation mixes tokens")


def _is_steady(activation: Any) -> bool:
    """Whether the activation surely draws no random numbers."""
    kind = type(activation)
    return activation in _STEADY or (kind.__module__ == "torch.nn.modules.activation" and kind is not nn.RReLU)


class _GenericEncoderBlock(GenericMappedBlock):
    """The encoder layer's own modules around our attention."""

    def __init__(self, layer: nn.TransformerEncoderLayer, mapping: Mapping, save: str | Save, tile: int | None) -> None:
        super().__init__(layer, mapping, save, tile)
        self._layer: tuple[nn.TransformerEncoderLayer] = (layer,)

    def _read(self) -> list[Any]:
        layer = self._layer[0]
        return [layer.norm_first, layer.activation, *(layer.get_submodule(n) for n in _PARTS)]

    def _made_of(self, layer: nn.Module, spec: BlockSpec) -> Parts:
        assert isinstance(layer, nn.TransformerEncoderLayer)
        return _Pre(layer), _Post(layer)

    @property
    def drops(self) -> bool:
        # An activation that is not known may draw what it does; a seed for nothing does no harm.
        return super().drops or (self._layer[0].training and not _is_steady(self._layer[0].activation))


class _Pre(nn.Module):
    """q, k, v (t, d_model) of x (t, d_model); positions are not read."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm = layer.norm1 if layer.norm_first else nn.Identity()
        self.self_attn = layer.self_attn

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        # The attention's output projection is read by `post`.
        return ((n, p) for n, p in super().named_parameters(*args, **kwargs) if ".out_proj." not in n)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        attention = self.self_attn
        return F.linear(self.norm(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)


class _Post(nn.Module):
    """y (t, d_model) of x (t, d_model) and the attention output o (t, d_model)."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.norm_first, self.activation = layer.norm_first, layer.activation
        self.out_proj, self.dropout1 = layer.self_attn.out_proj, layer.dropout1
        self.linear1, self.dropout, self.linear2, self.dropout2 = (
            layer.get_submodule(n) for n in ("linear1", "dropout", "linear2", "dropout2")
        )
        # With norm_first the first norm is read by `pre`.
        self.norm1, self.norm2 = nn.Identity() if layer.norm_first else layer.norm1, layer.norm2

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        mid = self.norm1(x + self.dropout1(self.out_proj(o)))
        if self.norm_first:
            return mid + self._mlp(self.norm2(mid))
        return self.norm2(mid + self._mlp(mid))

    def _mlp(self, h: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(h)))))


class SwappedEncoderLayer(Replaced):
    """src (B, S, d_model), or (S, B, d_model) without batch_first, to the same shape.

    src_mask: None or the causal mask; src_key_padding_mask: None or padding at either end. Others, nested tensors and
    unbatched ones run the original forward.
    """

    _lost = ""
    """What, in a call before this one, would have got no gradient."""

    def __init__(self, module: nn.TransformerEncoderLayer, blocks: dict[bool, EncoderBlock]) -> None:
        super().__init__(module)
        self.blocks = blocks  # by causal

    @property
    def _twice(self) -> bool:
        """The original may run twice, with what is inside now."""
        return passes(generic.check_runs_twice, self.module)

    @property
    def batch_first(self) -> bool:
        return bool(self.module.get_submodule("self_attn").batch_first)

    @property
    def ways(self) -> tuple[CheckpointedBlock, ...]:
        return tuple(self.blocks.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        src = given["src"]
        if src.is_nested or not src.numel() or (given.get("is_causal") and given.get("src_mask") is None):
            return self.original(**given)  # the last is an error of PyTorch's
        self.warn_of_a_checkpoint()
        if src.dim() != 3:  # a sequence without a batch
            return again.run_twice(self, (), given, self._save) if self._twice else self.original(**given)
        try:
            causal, cu_seqlens = self._masks(given)
            return self._run(self.blocks[causal], src, cu_seqlens)
        except LostGradientError as reason:
            # As in the next call, most likely: to find out again there would take attention's time.
            self._lost = f"{reason.what} and is no parameter of the layer"
            return self._original(UnsupportedCallError(self._lost), given)
        except UnsupportedError as reason:
            return self._original(reason, given)

    def _run(self, block: EncoderBlock, src: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        batch_first = self.batch_first
        x = src if batch_first else src.transpose(0, 1)
        if cu_seqlens is None:
            y = run_blocks([block], x, None, None)
        else:
            y = run_blocks([block], x.flatten(0, 1), None, cu_seqlens, checked=True).view(x.shape)
        return y if batch_first else y.transpose(0, 1)

    def _original(self, reason: UnsupportedError, given: dict[str, Any]) -> Any:
        """Its original forward, for this reason: again in the backward, if it is the call's and not the layer's."""
        twice = isinstance(reason, UnsupportedCallError) and self._twice
        how = "again as a whole in the backward" if twice else "which stores everything"
        self.warn(f"{reason}: {type(self.module).__name__} runs its original forward, {how}")
        return again.run_twice(self, (), given, self._save) if twice else self.original(**given)

    @property
    def _save(self) -> SaveSet:
        return save_set(self.blocks[False].save)

    def _masks(self, given: dict[str, Any]) -> tuple[bool, Tensor | None]:
        if self._lost and torch.is_grad_enabled():
            raise UnsupportedCallError(self._lost)
        mapping = self.blocks[False].mapping
        change = self.patched or mapping.change(self.module) or _change(self.module, mapping)
        if change is not None:
            raise UnsupportedCallError(change)
        src, mask, padding = (given.get(n) for n in ("src", "src_mask", "src_key_padding_mask"))
        assert src is not None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (mask, padding)):
            raise UnsupportedCallError("a mask that has a gradient, which a block does not give")
        batch, seq = src.shape[:2] if self.batch_first else (src.shape[1], src.shape[0])
        causal = mask is not None
        if mask is not None and not _says_causal(mask, seq, self):
            raise UnsupportedCallError("a src_mask that is not the causal one")
        if padding is None:
            return causal, None
        what = ("packed", causal, batch, seq)
        return causal, read_once(padding, what, self, lambda: _packed(padding, causal, batch, seq))


def _packed(padding: Tensor, causal: bool, batch: int, seq: int) -> Tensor | None:
    """cu_seqlens of the flat batch, as `masks.packed` gives them."""
    tokens = ~padding if padding.dtype == torch.bool else _tokens(padding, causal)
    return masks.packed(tokens, None, batch, seq, masks.Sight("before" if causal else "all"))


def _change(layer: Any, mapping: Mapping) -> str | None:
    """What of the layer, beside its modules' classes, is not as its mapping has it."""
    if mapping.why or layer.linear1.out_features == mapping.spec.d_ff:  # on the generic path its own modules run
        return None
    return f"its linear1.out_features is now {layer.linear1.out_features}, not the {mapping.spec.d_ff} {ANEW}"


def _tokens(padding: Tensor, causal: bool) -> Tensor:
    """Where a mask (B, S) that is added to the scores has tokens: 0 there, and a number that hides at padding.

    Raises `UnsupportedCallError` for any other.
    """
    if torch.compiler.is_compiling():
        return added_tokens(padding, causal)
    tokens, hidden = padding == 0, padding <= masks.HIDDEN
    added = "a src_key_padding_mask that is added to scores, "
    if not bool((tokens | hidden).all()):
        raise UnsupportedCallError(
            f"{added}with numbers that neither are 0 nor hide a token (-inf, or below {masks.HIDDEN})"
        )
    # A query all of whose keys have one number sees them as without it; -inf makes it NaN.
    sees = tokens[:, :1] if causal else tokens.any(1, keepdim=True)
    if bool((hidden & ~sees & (padding != float("-inf"))).any()):
        raise UnsupportedCallError(f"{added}of finite numbers, where some query sees padding alone")
    return tokens


# It looks at values, for which a GPU is waited for: nothing that a CUDA graph may hold.
@torch.library.custom_op("pyckpt::added_tokens", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def added_tokens(padding: Tensor, causal: bool) -> Tensor:
    """`_tokens` of a graph, which says nothing of values."""
    try:
        return _tokens(padding, causal)
    except UnsupportedError as reason:
        raise RuntimeError(
            f"{reason} came to a compiled model, which cannot take another way; call pyckpt.unswap(model), or the "
            "model without torch.compile"
        ) from reason


@added_tokens.register_fake
def _added_tokens_fake(padding: Tensor, causal: bool) -> Tensor:
    return torch.empty_like(padding, dtype=torch.bool)


def _says_causal(mask: Tensor, seq: int, asker: object) -> bool:
    """The mask hides exactly the later keys: True there, or -inf in a mask that is added."""
    if torch.compiler.is_compiling() or tuple(mask.shape) != (seq, seq):
        return False
    return read_once(mask, "causal", asker, lambda: _is_causal(mask))


def _is_causal(mask: Tensor) -> bool:
    later = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.equal(mask, later)
    # Not by `mask[~later]`, whose indices take eight times the mask.
    return torch.equal(mask == float("-inf"), later) and not bool(mask.masked_fill(later, 0.0).any())
