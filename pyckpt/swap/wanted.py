"""What a call of a swapped model asks of its loss, and whether it is ours or the original's."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyckpt.exec.lm_ends import Targets, following
from pyckpt.functional import check_loss_numbers, loss_weights
from pyckpt.swap.around import moves
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.replaced import Replaced

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a call asks for: labels (B, S), each token's the label after it; `shift_labels` are those of each token.

    items: what the sum is divided by, instead of the number of labels. asked: the reduction, where the call names one.
    token_weight: (B, S), of each label. label_smoothing, z_loss: as in `linear_cross_entropy`.
    """

    OURS: ClassVar = ("reduction", "token_weight", "label_smoothing", "z_loss")
    ARGUMENTS: ClassVar = ("num_items_in_batch", "shift_labels", "ignore_index", *OURS)

    labels: Tensor
    items: Any = None
    shift_labels: Tensor | None = None
    ignored: int = IGNORED
    asked: str | None = None
    token_weight: Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @staticmethod
    def of(labels: Tensor, items: Any, shift_labels: Tensor | None, ignored: int | None, *ours: Any) -> Wanted:
        asked, token_weight, *numbers = ours
        more = (0.0 if n is None else n for n in numbers)
        wanted = Wanted(
            labels, items, shift_labels, IGNORED if ignored is None else ignored, asked, token_weight, *more
        )
        if wanted.asked not in (None, "mean", "sum", "none"):
            raise ValueError(f"reduction={wanted.asked!r} does not exist; expected one of mean, sum, none")
        if wanted.asked is not None and items is not None:
            raise ValueError("num_items_in_batch divides the sum of the losses: leave out it or reduction")
        check_loss_numbers(wanted.label_smoothing, wanted.z_loss)
        if wanted.token_weight is not None:
            # For its errors, before anything runs.
            loss_weights(wanted.given, wanted.token_weight.to(wanted.given.device), None, 0, wanted.ignored, 0.0)
        return wanted

    @property
    def reduction(self) -> str:
        return self.asked or ("mean" if self.items is None else "sum")

    @property
    def given(self) -> Tensor:
        return self.labels if self.shift_labels is None else self.shift_labels

    @property
    def read(self) -> Tensor:
        """(B, S) bool: the tokens that have something to predict."""
        return self.shifted() != self.ignored

    def divided(self, loss: Tensor) -> Tensor:
        """The loss, by the number of items where that is given."""
        if self.items is None:
            return loss
        return loss / (self.items.to(loss.device) if isinstance(self.items, Tensor) else self.items)

    def shifted(self) -> Tensor:
        return self._next(self.given, self.ignored)

    def weights(self, device: torch.device, shape: torch.Size) -> Tensor | None:
        """Of `shifted`, in this shape."""
        if self.token_weight is None:
            return None
        return self._next(self.token_weight, 0.0).to(device).reshape(shape)

    def _next(self, values: Tensor, last: float) -> Tensor:
        """What is given for each token, of values that are given for each label."""
        return following(values, last) if self.shift_labels is None else values

    def targets(self, ids: Tensor) -> Targets:
        """Of a streamed run over ids (B, S), which shifts the labels tile by tile."""
        labels, weights = self.given.to(ids.device), self.token_weight
        if weights is not None:
            weights = weights.to(ids.device).masked_fill(labels == self.ignored, 0.0)
        if self.shift_labels is not None:
            return Targets(labels, None, self.ignored, weights)
        if labels.shape != ids.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}, expected {tuple(ids.shape)} as input_ids")
        seq = ids.shape[1]
        return Targets(labels, range(seq - 1, ids.numel(), seq), self.ignored, weights)


class SwappedLoss(Replaced):
    """A model's forward, which computes the loss of labels itself where it may, and else is the original.

    `kind`: True, "always": without gradients too, where the original would return logits beside the loss; or
    "recompute": the backward makes the logits again.

    A call may also ask for what the original does not have: `reduction="none"`, the losses (B, S) of the single tokens,
    `token_weight` (B, S), `label_smoothing` and `z_loss`, see `linear_cross_entropy`. They are never left to the
    original.
    """

    def __init__(self, module: nn.Module, kind: bool | str) -> None:
        super().__init__(module)
        self.always, self.recompute = kind == "always", kind == "recompute"

    def _check(self) -> None:
        """Raise `UnsupportedError` where the loss cannot be made without logits now."""
        raise NotImplementedError

    def _loss(self, given: dict[str, Any]) -> Any:
        """What a call with these arguments returns."""
        raise NotImplementedError

    def _handed_back(self, loss: Tensor, wanted: Wanted) -> Tensor:
        """Divided as asked, and with a device_map where the labels are, as what does not run here would have it."""
        loss = wanted.divided(loss)
        return loss.to(wanted.labels.device) if moves(self.module) else loss

    def _own(self, given: dict[str, Any], logits: bool) -> str | None:
        """Why a call of these arguments is the original's, if it is; `logits`: it asks for them."""
        if given.get("labels") is None or logits:
            return "logits are asked for" if logits else "there are no labels"
        return None if self.always or torch.is_grad_enabled() or _ours(given) else "gradients are off"

    def _by_itself(self, given: dict[str, Any], why: str) -> Any:
        """The original. Raises ValueError where the call asks for what it does not have."""
        ours = _ours(given)
        if ours:
            raise ValueError(f"{', '.join(ours)} can't be had of the model's own forward, which has to run: {why}")
        return self.original(**{n: v for n, v in given.items() if n not in Wanted.OURS})

    def _checked(self, given: dict[str, Any]) -> Any:
        """The loss or, where that can't be, the original, with a warning."""
        try:
            self._check()
            if self.patched:
                raise UnsupportedError(self.patched)
        except UnsupportedError as reason:
            self.warn(f"{reason}: the loss is the model's own, from logits")
            return self._by_itself(given, str(reason))
        return self._loss(given)


def _ours(given: dict[str, Any]) -> list[str]:
    """The arguments of a call that the original does not have."""
    return [n for n in Wanted.OURS if not _asks_nothing(given.get(n))]


def _asks_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value == 0.0)
