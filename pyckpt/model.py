"""`CkptTransformer`, a stack of blocks, and `CkptCausalLM`, a causal language model over one."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.attend.context import ContextParallel, check_context
from pyckpt.block import INIT_STD, CheckpointedBlock, CkptTransformerBlock, axes_of, run_blocks
from pyckpt.compiling import uncompiled
from pyckpt.exec.gathering import gather, gathers, hooks_of, others, unshards
from pyckpt.exec.layouts import check_whole_tokens
from pyckpt.exec.lm_ends import following
from pyckpt.exec.tiling import TILE_BYTES
from pyckpt.functional import (
    check_loss_options,
    layer_norm,
    linear_cross_entropy,
    loss_weights,
    on_meta,
    rms_norm,
)
from pyckpt.ops.chunks import acc_dtype
from pyckpt.save import Save, SaveSet
from pyckpt.shared_loss import shared_loss
from pyckpt.spec import RopeScaling, Window
from pyckpt.stream import Parts, Stream, blocks_of, check_stream, options_of, run_loss, run_stack
from pyckpt.surroundings import check_head, check_norm
from pyckpt.tokenwise.norm import with_offset
from pyckpt.tokenwise.settings import mode

Segments = int | str | None


def segment_length(segments: Segments, blocks: int) -> int:
    """Blocks in a segment, of a stack of so many blocks."""
    if segments is None:
        return 1
    return math.ceil(math.sqrt(blocks)) if segments == "sqrt" else int(segments)


class CkptTransformer(nn.ModuleList):
    """A stack of blocks, applied one after another.

    `segments` = k keeps only every k-th block's input from forward to backward, and the backward makes the inputs in
    between again, one segment at a time: memory for L blocks falls from L save sets to L / k inputs and k save sets.
    "sqrt" takes k = ceil(sqrt(L)), the least of that sum (Chen et al. 2016, section 4.1). None keeps every block's
    save set and repeats no block.

    Iterating, indexing and len() give the blocks; a slice is a stack of the same blocks, with the same `segments`.
    Forward hooks on a block (FSDP2's too) run in a call of the block alone: then segments are not used, with a warning.
    Streamed, a block with other hooks than FSDP2's is refused.

    Raises TypeError for what is no block of pyckpt, ValueError for none at all, for blocks of several widths, and for
    other `segments` than None, "sqrt" and a positive int.
    """

    _warned = False  # that segments are not used

    def __init__(self, blocks: Iterable[CheckpointedBlock], segments: Segments = None) -> None:
        blocks = list(blocks)
        if not blocks:
            raise ValueError("a CkptTransformer needs at least one block, got none")
        super().__init__(blocks)
        self.segments = segments

    @overload
    def __getitem__(self, index: slice) -> CkptTransformer: ...
    @overload
    def __getitem__(self, index: int) -> nn.Module: ...
    def __getitem__(self, index: int | slice) -> nn.Module:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return type(self)(list(self)[index], self.segments)  # type: ignore[arg-type]

    def __setitem__(self, index: int, block: nn.Module) -> None:
        place = index + len(self) if index < 0 else index
        self._check([block], place, [other for i, other in enumerate(self) if i != place])
        super().__setitem__(index, block)

    def append(self, block: nn.Module) -> CkptTransformer:
        self._check([block], len(self), list(self))
        return super().append(block)

    def insert(self, index: int, block: nn.Module) -> None:
        self._check([block], index, list(self))
        super().insert(index, block)

    def extend(self, blocks: Iterable[nn.Module]) -> CkptTransformer:
        blocks = list(blocks)
        self._check(blocks, len(self), list(self))
        return super().extend(blocks)

    @staticmethod
    def _check(blocks: list[nn.Module], start: int, others: list[nn.Module]) -> None:
        """Raise unless these, the first at the place `start`, are blocks of one width, which is that of the others."""
        for i, block in enumerate(blocks, start):
            if not isinstance(block, CheckpointedBlock):
                raise TypeError(f"block {i} is a {type(block).__name__}, expected a CkptTransformerBlock")
            width = next((b.d_model for b in (*others, *blocks)), block.d_model)
            if block.d_model != width:
                which = "the others have" if others else "the first one has"
                raise ValueError(f"block {i} has d_model={block.d_model}, {which} {width}")

    def check_filled(self) -> None:
        """Raise ValueError where blocks were taken out until there are none."""
        if not len(self):
            raise ValueError("this CkptTransformer has no blocks left: append at least one before it runs")

    def streamed_parts(self) -> Parts:
        """What a streamed run of it has in it."""
        return Parts(*blocks_of(self))

    @property
    def segments(self) -> Segments:
        return self._segments

    @segments.setter
    def segments(self, value: Segments) -> None:
        errors.check_segments(value)
        self._segments = value

    @property
    def segment_length(self) -> int:
        """Blocks in a segment."""
        return segment_length(self._segments, len(self))

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        stream: Stream | None = None,
        context: ContextParallel | None = None,
    ) -> Tensor:
        """y, with the shape and dtype of x; arguments as for a block's call.

        stream: run streamed; x and y are whole tensors, and nothing between them is. Not with `context`, as the loss.
        """
        self.check_filled()
        if stream is not None:
            check_stream(stream)
            if context is not None:
                raise ValueError(
                    "stream and context are both given, and a streamed run deals out tokens by tiles, not as the parts "
                    "that x and y are. Leave one out: the loss of a CkptCausalLM takes both, from the token ids on"
                )
            return run_stack(self, x, positions, cu_seqlens, stream)
        shared: dict[str, Any] = {} if context is None else {"context": context}
        length = self.segment_length
        if length == 1 or self._is_watched():
            for block in self:
                x = block(x, positions, cu_seqlens, **shared)
            return x
        blocks = cast("list[CheckpointedBlock]", list(self))
        if context is not None and positions is not None:
            positions = check_context(context).shard_positions(positions, x, axes_of(blocks))
        for start in range(0, len(blocks), length):
            x = run_blocks(blocks[start : start + length], x, positions, cu_seqlens, context=context)
        return x

    def _is_watched(self) -> bool:
        """Some block needs a call of its own, for its hooks or since it is in a wrapper; warns of that, once."""
        why = next((text for text in map(_why_called, self) if text is not None), None)
        if why is not None and not self._warned:
            self._warned = True
            warnings.warn(f'{why}: segments are not used. save="input" keeps as little of each block', stacklevel=5)
        return why is not None


def _why_called(block: nn.Module) -> str | None:
    """Why the block's own __call__ has to run, in words; None where its weights and its plan are enough."""
    if not isinstance(block, CheckpointedBlock):  # FSDP1 puts a wrapper in the block's place
        return f"a block is in a {type(block).__name__}"
    if block.has_own_forward:
        return f"a {type(block).__name__} has a forward of its own"
    watched = gathers(block) or others(hooks_of(block))  # no measurement of ours is to change what it measures
    return f"a {type(block).__name__} has forward hooks" if watched else None


class _Decoder(nn.Module):
    """Embedding, blocks and final norm, under the names of a Hugging Face Llama."""

    def __init__(self, embed_tokens: nn.Embedding, layers: CkptTransformer, norm: nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = layers
        self.norm = norm


class CkptCausalLM(nn.Module):
    """A causal language model: embedding, a `CkptTransformer`, a final norm, and a linear head without bias.

    Args:
        vocab_size, n_layers: V and the number of blocks.
        d_model, n_heads and the further keywords: as for `CkptTransformerBlock`; all blocks are causal.
        tie_embeddings: the head shares the embedding's weight.
        segments: as for `CkptTransformer`.

    Parameter names are those of Hugging Face's LlamaForCausalLM. `config` holds the arguments as plain numbers, with
    the defaults filled in, ready for JSON; save, segments, tile, device and dtype are not in it.

    Raises ValueError for options that do not fit, whatever their type, and TypeError for a dtype that is none, before
    any weights are made.
    """

    def __init__(
        self,
        vocab_size: int,
        n_layers: int,
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
        window: int | Window | None = None,
        softcap: float | None = None,
        attention_scale: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        tie_embeddings: bool = False,
        save: str | SaveSet | Save = "attention",
        segments: Segments = None,
        tile: int | None = None,
        tile_bytes: int = TILE_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        vocab_size = errors.positive_int("vocab_size", vocab_size)
        n_layers = errors.positive_int("n_layers", n_layers)
        errors.check_bool("tie_embeddings", tie_embeddings, ValueError)
        errors.check_segments(segments)
        options: dict[str, Any] = {
            "n_kv_heads": n_kv_heads,
            "head_dim": head_dim,
            "d_ff": d_ff,
            "norm": norm,
            "norm_eps": norm_eps,
            "norm_offset": norm_offset,
            "mlp": mlp,
            "norm_placement": norm_placement,
            "residual": residual,
            "residual_multiplier": residual_multiplier,
            "bias": bias,
            "qk_norm": qk_norm,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "rope_dim": rope_dim,
            "rope_interleaved": rope_interleaved,
            "rope_axes": rope_axes,
            "window": window,
            "softcap": softcap,
            "attention_scale": attention_scale,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = [
            CkptTransformerBlock(d_model, n_heads, **options, save=save, tile=tile, tile_bytes=tile_bytes, **factory)
            for _ in range(n_layers)
        ]
        s = self.spec = blocks[0].spec
        norm_class = nn.RMSNorm if norm == "rmsnorm" else nn.LayerNorm
        self.model = _Decoder(
            nn.Embedding(vocab_size, s.d_model, **factory),
            CkptTransformer(blocks, segments),
            norm_class(s.d_model, eps=s.norm_eps, **factory),
        )
        self.lm_head = nn.Linear(s.d_model, vocab_size, bias=False, **factory)
        self.vocab_size, self.tie_embeddings = vocab_size, tie_embeddings
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "n_layers": n_layers,
            "d_model": s.d_model,
            "n_heads": s.n_heads,
            **{name: getattr(s, name) for name in options},
            "rope_scaling": _plain(s.rope_scaling),
            "window": s.window[0] if s.window[0] >= 0 else None,
            "softcap": s.softcap or None,
            "tie_embeddings": tie_embeddings,
        }
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02; the projections that end in the residual stream by 1/sqrt(2 L) less.

        (Radford et al. 2019, section 2.3.)
        """
        nn.init.normal_(self.model.embed_tokens.weight, std=INIT_STD)
        nn.init.constant_(cast(Tensor, self.model.norm.weight), 1.0 - self.spec.norm_offset)
        if isinstance(self.model.norm, nn.LayerNorm):
            nn.init.zeros_(self.model.norm.bias)
        for block in self.blocks:
            block.reset_parameters()
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):  # type: ignore[union-attr]
                nn.init.normal_(linear.weight, std=INIT_STD / math.sqrt(2 * len(self.model.layers)))  # type: ignore
        if self.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        else:
            nn.init.normal_(self.lm_head.weight, std=INIT_STD)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As a module's: `to_empty` makes each of two places of one weight its own."""
        with self._tied():
            return super()._apply(fn, recurse)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As a module's; what was one weight is one afterwards (`assign` gives each place its own)."""
        with self._tied():
            return super().load_state_dict(state_dict, strict, assign)

    @contextlib.contextmanager
    def _tied(self) -> Iterator[None]:
        """The head has the embedding's weight afterwards, if it has it before."""
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        try:
            yield
        finally:  # what misses keys raises after it has assigned the others
            if tied:
                self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> Iterator[CkptTransformerBlock]:
        """The blocks, the first one first."""
        return (cast(CkptTransformerBlock, block) for block in self.model.layers)

    def streamed_parts(self) -> Parts:
        """What a streamed run of its loss has in it."""
        ends: dict[str, Tensor] = {f"norm.{name}": p for name, p in self.model.norm.named_parameters()}
        ends |= {"embed": self.model.embed_tokens.weight, "head": self.lm_head.weight}
        return Parts(*blocks_of(self.model.layers), ends)

    def set_save(self, save: str | SaveSet | Save) -> None:
        """Set every block's save set: a name, or a `Save` with places. Raises ValueError for one that is not there."""
        for block in self.blocks:
            block.save = save

    def set_segments(self, segments: Segments) -> None:
        """Blocks in a segment, "sqrt", or None for no segments: see `CkptTransformer`. Raises ValueError for others."""
        self.model.layers.segments = segments

    def set_tile(self, tile: int | None) -> None:
        """Tokens in a tile of every block, or None: each chooses. Raises ValueError for other values."""
        for block in self.blocks:
            block.tile = tile

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        context: ContextParallel | None = None,
    ) -> Tensor:
        """The final norm's output, (*tokens.shape, d_model): what the head reads.

        With `context`, which processes share the sequences, that of this one's tokens, of the whole ones given.
        """
        self._check_tokens(tokens, cu_seqlens)
        if context is not None:
            tokens = check_context(context).shard(tokens, -1)
        for name, module in (("model.embed_tokens", self.model.embed_tokens), ("model.norm", self.model.norm)):
            check_whole_tokens(name, module)
        x = self.model.layers(self.model.embed_tokens(tokens), positions, cu_seqlens, context=context)
        norm = self.model.norm
        check_norm(norm)
        gather(norm)
        weight = with_offset(cast(Tensor, norm.weight), self.spec.norm_offset)
        if isinstance(norm, nn.LayerNorm):
            return layer_norm(x, weight, norm.bias, self.spec.norm_eps)
        return rms_norm(x, weight, self.spec.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        context: ContextParallel | None = None,
    ) -> Tensor:
        """Logits (*tokens.shape, vocab_size). Tokens (B, S) int64, or packed (T,) with cu_seqlens.

        This holds the logits of all tokens; `loss` does not. With `context`, of this process's tokens.
        """
        return self._logits(self.hidden(tokens, positions, cu_seqlens, context=context))

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.lm_head
        if unshards(head) and not others(hooks_of(head)):
            # A call would tell FSDP2 that what it gathers with the head, a norm say, is done with the head's backward.
            gather(head)
            return nn.functional.linear(hidden, head.weight, head.bias)
        return head(hidden)

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        stream: Stream | None = None,
        context: ContextParallel | None = None,
        token_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        recompute: bool = False,
    ) -> Tensor:
        """Next-token cross-entropy in nats, without the logits of all tokens: by default the mean, a scalar.

        In float32, or float64 where the model is; with reduction "none" of the tokens' shape. A mean over no labels
        (all are -100) is NaN, as in PyTorch.

        labels: aligned with tokens, as transformers has it: the prediction at position i is compared with labels at
        i + 1; -100 is ignored; default: the tokens. The last token of each sequence predicts nothing, packed ones
        included. stream: run streamed, with memory on the device that does not depend on the sequence length. context:
        the processes that share the sequences; all give the same whole ones, of any length, and have the same loss;
        with `stream` each streams its own tiles.
        token_weight: floating, in the labels' shape and aligned with them. class_weight (vocab_size,), softcap, z_loss,
        label_smoothing, reduction and, not streamed, recompute: as in `linear_cross_entropy`.

        Embedding, norm and head are PyTorch's own: what stands in their place (adapters, a bias) is refused, and hooks
        on norm and head do not run.

        Raises ValueError, before anything runs, for shapes, dtypes and numbers that do not fit, for sequences too short
        to predict anything, and on a CPU for tokens or labels out of range: on CUDA such labels are a device-side
        assertion, and tokens are the embedding's. TypeError for tensors that are none and options of another type.
        """
        softcap, z_loss, label_smoothing = check_loss_options(reduction, softcap, z_loss, label_smoothing)
        check_norm(self.model.norm)
        check_head(self.lm_head)
        if stream is not None:
            check_stream(stream)
        if context is not None:
            check_context(context).check_alike(
                self.model.embed_tokens.weight.device,
                tokens=tokens,
                labels=labels,
                positions=positions,
                cu_seqlens=cu_seqlens,
                token_weight=token_weight,
                class_weight=class_weight,
                reduction=reduction,
                stream=options_of(stream),
            )
        labels = self._labels(tokens, labels, cu_seqlens)
        dtype = acc_dtype(self.lm_head.weight.dtype)
        weights = loss_weights(labels, token_weight, class_weight, self.vocab_size, -100, label_smoothing, dtype)
        options: dict[str, Any] = {
            "softcap": softcap,
            "z_loss": z_loss,
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "recompute": recompute,
        }
        if stream is not None:
            return run_loss(self, tokens, labels, weights, positions, cu_seqlens, stream, context, options)
        targets = _targets(labels, cu_seqlens)
        weights = None if weights is None else following(weights, 0.0)
        if context is not None:
            return self._shared_loss(tokens, targets, weights, positions, cu_seqlens, context, options)
        hidden = self.hidden(tokens, positions, cu_seqlens)
        gather(self.lm_head)
        return linear_cross_entropy(hidden, self.lm_head.weight, targets, token_weight=weights, **options)

    @uncompiled
    def _shared_loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        context: ContextParallel,
        options: dict[str, Any],
    ) -> Tensor:
        """The loss of all tokens, of which this process computes its part."""
        padding = context.padding(tokens.shape[-1])  # at the end, where no other token sees it
        if padding:
            tokens = context.padded(tokens, padding)
            if positions is not None:
                positions = context.padded_positions(positions, padding, self.spec.position_axes)
            if cu_seqlens is not None:
                cu_seqlens = nn.functional.pad(cu_seqlens, (0, 1), value=tokens.shape[-1])
        hidden = self.hidden(tokens, positions, cu_seqlens, context=context)
        gather(self.lm_head)

        def of_part(targets: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
            how = options | {"reduction": reduction, "token_weight": weights}
            return linear_cross_entropy(hidden, self.lm_head.weight, targets, **how)

        return shared_loss(context, targets, weights, -100, options["reduction"], of_part)

    def _check_tokens(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        weight = self.model.embed_tokens.weight
        if not on_meta(tokens, weight):
            errors.check_tokens(tokens, self.vocab_size, weight.device, cu_seqlens is not None)

    def _labels(self, tokens: Tensor, labels: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """The labels, default the tokens, after a check of all three."""
        self._check_tokens(tokens, cu_seqlens)
        device = self.model.embed_tokens.weight.device
        if labels is None:
            labels = tokens.long()
        errors.check_tensor("labels", labels)
        if labels.shape != tokens.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected the tokens', {tuple(tokens.shape)}")
        if not on_meta(labels, tokens):
            errors.check_labels(labels, self.vocab_size, -100, device)
        if tokens.shape[-1] < 2:
            raise ValueError("a sequence of one token predicts nothing; give at least 2 tokens")
        if cu_seqlens is not None and not on_meta(cu_seqlens, tokens):
            errors.check_cu_seqlens(cu_seqlens, tokens.shape[0], device)
        return labels

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`tokens` (B, S) followed by sampled ones: (B, S + max_new_tokens). temperature 0 takes the likeliest.

        top_k: sample from so many of the likeliest; None: from all. generator: of the tokens' device. Nothing is
        dropped: the model is in eval mode meanwhile, and has its modes again afterwards. Runs the whole context for
        every new token (there is no key/value cache): made for short samples.

        Raises ValueError for tokens and numbers that do not fit, TypeError for those of another type.
        """
        temperature = errors.number("temperature", temperature, errors.NOT_NEGATIVE)
        count = errors.integer("max_new_tokens", max_new_tokens)
        top_k = None if top_k is None else errors.integer("top_k", top_k)
        if count < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"expected max_new_tokens >= 0, and top_k None or >= 1, got {count} and {top_k}")
        self._check_tokens(tokens, None)
        with mode(self, training=False):
            for _ in range(count):
                logits = self._logits(self.hidden(tokens)[:, -1]).float()
                tokens = torch.cat([tokens, _sample(logits, temperature, top_k, generator)], dim=1)
        return tokens

    extra_config: dict[str, Any] | None = None
    """Token ids and max_position_embeddings for `save_pretrained` to write; `from_pretrained` fills it."""

    def save_pretrained(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Write a folder that transformers reads: see `pyckpt.hf.save_pretrained`."""
        from pyckpt.hf import save_pretrained

        save_pretrained(self, path, **options)

    @staticmethod
    def from_pretrained(path: str | os.PathLike[str], **options: Any) -> CkptCausalLM:
        """Read a folder that `save_pretrained` or transformers wrote: see `pyckpt.hf.load_pretrained`."""
        from pyckpt.hf import load_pretrained

        return load_pretrained(path, **options)


def _plain(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """As the argument `rope_scaling`, of what JSON has."""
    return None if scaling is None else {k: list(v) if isinstance(v, tuple) else v for k, v in scaling}


def _targets(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What the token at each place is to predict."""
    targets = following(labels, -100)
    if cu_seqlens is None:
        return targets
    places = targets.shape[0] + 1  # one more, for the last token before the first that empty sequences begin with
    last = torch.zeros(places, dtype=torch.bool, device=targets.device)
    last.index_fill_(0, (cu_seqlens[1:].long() - 1) % places, True)
    return targets.masked_fill(last[:-1], -100)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if temperature <= torch.finfo(logits.dtype).tiny:  # 0, or what a division takes for it
        return logits.argmax(dim=-1, keepdim=True)
    # From the likeliest, whose place at 0 no temperature moves: all of them divided by a small one would be infinite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
