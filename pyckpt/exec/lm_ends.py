"""The two ends of a streamed causal language model: the embedding, and the final norm with the head and its loss."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from pyckpt.attend.dense import Layout
from pyckpt.exec.ends import Gradients, Named, Tensors
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.direct import ops
from pyckpt.ops.linear_cross_entropy import counted, unit_of
from pyckpt.tokenwise.gradients import WeightGradients
from pyckpt.tokenwise.norm import Norm, with_offset
from pyckpt.vocab_parallel import Words, check_whole

IGNORE = -100


class _TableGradient:
    """The gradient of a table whose rows were looked up, (rows, d_model), summed in float32 in a fixed order."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, like: Tensor, ids: Tensor, dx: Tensor) -> None:
        if self.total is None:
            self.total = torch.zeros(like.shape, dtype=acc_dtype(dx.dtype), device=dx.device)
        if not like.shape[0]:  # of a process that has no words
            return
        dx = dx.to(self.total.dtype)
        # Each is the one that adds in a fixed order on its device.
        if dx.is_cuda:
            self.total.index_put_((ids,), dx, accumulate=True)
        else:
            self.total.index_add_(0, ids, dx)


@dataclasses.dataclass(frozen=True)
class EmbeddingOptions:
    """x = dropout(scale * embed[token] + table[position]); the table is the weight "table", where there is one.

    unlearned: the token whose row gets no gradient from here (`padding_idx` of torch.nn.Embedding). rate, seed: of the
    dropout, by Philox on the row's number.
    """

    scale: float = 1.0
    unlearned: int | None = None
    rate: float = 0.0
    seed: int = 0


class Embedding:
    """`Source`: rows of the weight "embed" by token id. Gradients are summed in float32.

    words: which of them this process has, where they are dealt out.
    """

    def __init__(
        self,
        tokens: Tensor,
        wanted: Collection[str],
        positions: Callable[[slice], Tensor],
        options: EmbeddingOptions = EmbeddingOptions(),
        words: Words | None = None,
    ) -> None:
        self._tokens, self._positions, self._options = tokens.reshape(-1), positions, options
        self._words = words
        self.read_forward: Tensors = ()
        self.read_backward: Tensors = (self._tokens,)
        self._sums = {name: _TableGradient() for name in ("embed", "table") if name in wanted}

    def fill(self, w: Named, rows: slice, out: Tensor) -> None:
        if self._words is None:
            torch.index_select(w["embed"], 0, self._tokens[rows], out=out)
        else:
            self._words.look_up(w["embed"], self._tokens[rows], out)
        if self._options.scale != 1.0:
            out.mul_(self._options.scale)
        if "table" in w:
            out += w["table"][self._positions(rows)]
        self._drop_(out, rows)

    def backward(self, w: Named, rows: slice, dx: Tensor) -> None:
        if not self._sums:
            return
        dx = dx.to(acc_dtype(dx.dtype), copy=True)
        self._drop_(dx, rows)
        if "table" in self._sums:
            self._sums["table"].add(w["table"], self._positions(rows), dx)
        if "embed" in self._sums:
            dx.mul_(self._options.scale)
            ids = self._tokens[rows]
            if self._words is not None:
                ids, own = self._words.rows(ids, w["embed"])
                dx.masked_fill_(~own.unsqueeze(1), 0.0)
            self._sums["embed"].add(w["embed"], ids, dx)

    def _drop_(self, x: Tensor, rows: slice) -> None:
        o = self._options
        if o.rate:
            ops.dropout_(x, None, x, o.rate, o.seed, rows.start)

    def gradients(self, w: Named) -> Gradients:
        found: Gradients = {}
        for name, table in self._sums.items():
            found[name], table.total = table.total, None
        unlearned = self._options.unlearned
        embed = found.get("embed")
        if embed is not None and unlearned is not None:
            first = 0 if self._words is None else self._words.first
            embed[max(unlearned - first, 0) : max(unlearned - first + 1, 0)] = 0.0
        return found


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Of `linear_cross_entropy`; "mean" divides by the number of labels that are not ignored, or by the sum of their
    weights. `scale` multiplies what the head reads."""

    reduction: str = "mean"
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = IGNORE
    scale: float = 1.0


class Targets:
    """What each token is to predict: the label after it, none (`ignore_index`) where the token is one of `ends`.

    labels: (T,) int64. ends: sorted, the last token of each sequence; None: the labels are the targets.
    weights: (T,), what the loss of each label is multiplied by, 0 where it is ignored; None: ones.
    """

    def __init__(
        self, labels: Tensor, ends: Sequence[int] | None, ignore_index: int, weights: Tensor | None = None
    ) -> None:
        self._labels, self._ends, self._ignore = labels.reshape(-1), ends, ignore_index
        self._weights = None if weights is None else weights.reshape(-1)
        self.given: Tensors = (self._labels, self._weights)
        self._unit: Tensor | None = None

    def padded(self, tokens: int) -> Targets:
        """With so many more tokens at the end, which predict nothing."""
        pad = torch.nn.functional.pad
        weights = None if self._weights is None else pad(self._weights, (0, tokens))
        return Targets(pad(self._labels, (0, tokens), value=self._ignore), self._ends, self._ignore, weights)

    @property
    def unit(self) -> Tensor | None:
        """`unit_of` all weights; None where there are none."""
        if self._unit is None and self._weights is not None:
            self._unit = unit_of(self._weights)
        return self._unit

    def of(self, rows: slice) -> Tensor:
        target = self._next(self._labels, rows, self._ignore)
        if self._ends is None:
            return target
        low, high = (bisect.bisect_left(self._ends, token) for token in (rows.start, rows.stop))
        if low < high:
            ends = [end - rows.start for end in self._ends[low:high]]
            target.index_fill_(0, torch.tensor(ends, device=target.device), self._ignore)
        return target

    def weights_of(self, rows: slice, target: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Of the targets `of` these rows."""
        if self._weights is None:
            return None
        return self._next(self._weights, rows, 0.0).to(dtype).masked_fill(target == self._ignore, 0.0)

    def _next(self, values: Tensor, rows: slice, last: float) -> Tensor:
        """What is given for each of these tokens, of values that are given for each label."""
        if self._ends is None:
            return values[rows]
        found = values.new_full((rows.stop - rows.start,), last)
        after = values[rows.start + 1 : rows.stop + 1]
        found[: after.shape[0]] = after
        return found


def following(values: Tensor, last: float) -> Tensor:
    """Of each place (..., S) the value of the next one, of the last place `last`."""
    return torch.nn.functional.pad(values[..., 1:], (0, 1), value=last)


def last_tokens(layout: Layout) -> Sequence[int]:
    """The last token of each sequence that has one. On the host: to ask a GPU for each tile's would wait for it."""
    if layout.cu_seqlens is None:
        return range(layout.seq - 1, layout.tokens, layout.seq)
    return [stop - 1 for start, stop in itertools.pairwise(layout.cu_seqlens.tolist()) if stop > start]


class _Head:
    """Final norm, head and cross-entropy of a tile, with their gradients: what both kinds of `Loss` share.

    Weights are "norm.weight", "norm.bias", "head" and "head.bias", the last one where the head has one.
    """

    def __init__(
        self,
        norm: Norm,
        norm_offset: float,
        dtype: torch.dtype,
        options: LossOptions,
        n_tiles: int,
        wanted: Collection[str],
        need_dx: bool,
        words: Words | None = None,
    ) -> None:
        self._norm, self._norm_offset, self._dtype, self._options = norm, norm_offset, dtype, options
        self._words = words
        self._of_head = [n for n in wanted if n.startswith("head")]
        self._of_norm = [n for n in wanted if not n.startswith("head")]
        self._grads = WeightGradients(self._of_norm, n_tiles)
        self._sums: dict[str, Tensor] = {}
        self._need_dx = need_dx

    def losses(self, w: Named, x: Tensor, target: Tensor) -> Tensor:
        return self._run(w, self._normed(w, x)[0], target, None, None, {})

    def losses_and_gradients(
        self, w: Named, x: Tensor, target: Tensor, dloss: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Losses (t,) and the gradient of x, (t, d_model), where it is needed; sums those of the weights.

        dloss: (t,) the gradient of each loss, None for ones.
        """
        hidden, stats = self._normed(w, x)
        inward = self._need_dx or bool(self._of_norm)
        dhidden = torch.empty_like(hidden) if inward else None
        for n in self._of_head:
            if n not in self._sums:
                self._sums[n] = torch.zeros(w[n].shape, dtype=acc_dtype(self._dtype), device=x.device)
        losses = self._run(w, hidden, target, dloss, dhidden, self._sums)
        if dhidden is None:
            return losses, None
        if self._options.scale != 1.0:
            dhidden *= self._options.scale
        dx = torch.zeros_like(x)
        self._norm.backward_add(self._norm_weights(w), dhidden, x, stats, dx, self._grads)
        return losses, dx if self._need_dx else None

    def _norm_weights(self, w: Named) -> Named:
        return {**w, "norm.weight": with_offset(w["norm.weight"], self._norm_offset)}

    def _normed(self, w: Named, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, stats = self._norm.forward(self._norm_weights(w), x)
        hidden = hidden.to(self._dtype)
        return hidden if self._options.scale == 1.0 else hidden * self._options.scale, stats

    def _run(
        self,
        w: Named,
        hidden: Tensor,
        target: Tensor,
        dloss: Tensor | None,
        dhidden: Tensor | None,
        sums: dict[str, Tensor],
    ) -> Tensor:
        o, bias = self._options, w.get("head.bias")
        of_tile = ops.linear_cross_entropy_tile_ if self._words is None else self._words.tile_
        return of_tile(
            hidden,
            w["head"].to(self._dtype),
            None if bias is None else bias.to(self._dtype),
            target,
            *(o.ignore_index, o.softcap, o.z_loss, o.label_smoothing),
            dloss,
            dhidden,
            sums.get("head"),
            sums.get("head.bias"),
        )

    def gradients(self, w: Named) -> dict[str, Tensor]:
        """The sums so far, in the accumulation dtype."""
        acc = acc_dtype(self._dtype)
        found = {n: self._grads.result(n, w[n].to(acc)) for n in self._of_norm}
        sums, self._sums = self._sums, {}
        return {n: g for n, g in found.items() if g is not None} | sums


class ReducedLoss:
    """`Sink`: the mean or the sum of the losses; their gradients are made in the forward, while there are logits.

    They are those of the sum, and the backward scales them, as `linear_cross_entropy` does.
    """

    deferred = False

    def __init__(self, head: _Head, targets: Targets, options: LossOptions, leaves: bool, trained: bool) -> None:
        self.leaves = leaves
        self._head, self._targets, self._trained = head, targets, leaves or trained
        self.read_forward: Tensors = targets.given
        self.read_backward: Tensors = ()
        self._mean, self._ignore = options.reduction == "mean", options.ignore_index
        self._loss: Tensor | None = None
        self._count: Tensor | None = None
        self._scale: Tensor | None = None

    def forward(self, w: Named, rows: slice, x: Tensor) -> None:
        target = self._targets.of(rows)
        weights = self._targets.weights_of(rows, target, acc_dtype(x.dtype))
        if self._trained:
            unit = self._targets.unit
            inward = None if weights is None or unit is None else weights / unit.to(weights.dtype)
            losses, dx = self._head.losses_and_gradients(w, x, target, inward)
            if dx is not None:
                x.copy_(dx)
        else:
            losses = self._head.losses(w, x, target)
        loss = losses.sum() if weights is None else (losses * weights).sum()
        count = counted(target, weights, self._ignore)
        self._loss = loss if self._loss is None else self._loss + loss
        self._count = count if self._count is None else self._count + count

    def result(self) -> Tensor:
        assert self._loss is not None and self._count is not None
        return self._loss / self._count if self._mean else self._loss

    def take(self, w: Named, upstream: Tensor) -> None:
        assert self._count is not None
        self._scale = upstream / self._count.masked_fill(self._count == 0, 1) if self._mean else upstream
        if self._targets.unit is not None:
            self._scale = self._scale * self._targets.unit.to(self._scale.dtype)

    def upstream(self, rows: slice, left: Tensor, out: Tensor | None) -> None:
        assert self._scale is not None and out is not None
        # A factor of one dimension, or it would be rounded to the gradient's dtype before the product.
        torch.mul(left, self._scale.view(1).to(acc_dtype(left.dtype)), out=out)

    def gradients(self, w: Named) -> Gradients:
        assert self._scale is not None
        return {n: g.mul_(self._scale) for n, g in self._head.gradients(w).items()}  # before they are rounded


class TokenLosses:
    """`Sink`: the loss of every token, (T,), each with a gradient of its own: the backward makes the logits again."""

    leaves = False
    deferred = True

    def __init__(self, head: _Head, targets: Targets, tokens: int) -> None:
        self._head, self._targets, self._tokens = head, targets, tokens
        self.read_forward: Tensors = ()
        self.read_backward: Tensors = targets.given
        self._losses: Tensor | None = None
        self._given: tuple[Named, Tensor] | None = None

    def forward(self, w: Named, rows: slice, x: Tensor) -> None:
        target = self._targets.of(rows)
        losses = self._head.losses(w, x, target)
        weights = self._targets.weights_of(rows, target, losses.dtype)
        if weights is not None:
            losses *= weights
        if self._losses is None:
            self._losses = losses.new_zeros(self._tokens)  # other processes' are 0 here
        self._losses[rows] = losses

    def result(self) -> Tensor:
        assert self._losses is not None
        losses, self._losses = self._losses, None
        return losses

    def take(self, w: Named, upstream: Tensor) -> None:
        self._given = w, upstream.reshape(-1)

    def upstream(self, rows: slice, left: Tensor, out: Tensor | None) -> None:
        assert self._given is not None
        w, dloss = self._given[0], self._given[1][rows]
        target = self._targets.of(rows)
        weights = self._targets.weights_of(rows, target, dloss.dtype)
        dloss = dloss if weights is None else dloss * weights
        dx = self._head.losses_and_gradients(w, left, target, dloss)[1]
        if out is not None:
            assert dx is not None
            out.copy_(dx)

    def gradients(self, w: Named) -> Gradients:
        self._given = None
        return {**self._head.gradients(w)}


@dataclasses.dataclass(frozen=True)
class Ends:
    """What surrounds the blocks of a causal language model: weights by name, and what is done with them.

    weights: "embed" (V, d_model), "head" (V, d_model) and "norm.weight"; where the model has them "norm.bias",
    "head.bias" and "table" (positions, d_model). norm: the final one, of the name "norm". start: an empty tensor whose
    gradient tells who gathers the weights that the backward is done with them. words: which rows of "embed" and of
    "head" this process has, of one whose words are dealt out.
    """

    weights: Named
    norm: Norm
    norm_offset: float = 0.0
    embedding: EmbeddingOptions = EmbeddingOptions()
    loss: LossOptions = LossOptions()
    start: Tensor | None = None
    words: Mapping[str, Words] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if "head" in self.words:
            check_whole(self.loss.label_smoothing)

    def source(self, tokens: Tensor, wanted: Collection[str], positions: Callable[[slice], Tensor]) -> Embedding:
        """wanted: the weights that want a gradient."""
        return Embedding(tokens, wanted, positions, self.embedding, self.words.get("embed"))

    def sink(
        self, targets: Targets, tokens: int, dtype: torch.dtype, n_tiles: int, wanted: Collection[str], need_dx: bool
    ) -> ReducedLoss | TokenLosses:
        """dtype: of the products. need_dx: the last block wants its output's gradient."""
        wanted = [n for n in wanted if n not in ("embed", "table")]
        words = self.words.get("head")
        head = _Head(self.norm, self.norm_offset, dtype, self.loss, n_tiles, wanted, need_dx, words)
        if self.loss.reduction == "none":
            return TokenLosses(head, targets, tokens)
        return ReducedLoss(head, targets, self.loss, need_dx, bool(wanted))
