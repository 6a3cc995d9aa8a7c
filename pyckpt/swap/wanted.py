"""What a call of a swapped model asks of its loss."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyckpt.exec.lm_ends import Targets, following
from pyckpt.functional import loss_weights

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a call asks for: labels (B, S), each token's the label after it; `shift_labels` are those of each token.

    items: what the sum is divided by, instead of the number of labels. asked: the reduction, where the call names one.
    token_weight: (B, S), of each label.
    """

    OURS: ClassVar = ("reduction", "token_weight")
    ARGUMENTS: ClassVar = ("num_items_in_batch", "shift_labels", "ignore_index", *OURS)

    labels: Tensor
    items: Any = None
    shift_labels: Tensor | None = None
    ignored: int = IGNORED
    asked: str | None = None
    token_weight: Tensor | None = None

    @staticmethod
    def of(labels: Tensor, items: Any, shift_labels: Tensor | None, ignored: int | None, *ours: Any) -> Wanted:
        wanted = Wanted(labels, items, shift_labels, IGNORED if ignored is None else ignored, *ours)
        if wanted.asked not in (None, "mean", "sum", "none"):
            raise ValueError(f"reduction={wanted.asked!r} does not exist; expected one of mean, sum, none")
        if wanted.asked is not None and items is not None:
            raise ValueError("num_items_in_batch divides the sum of the losses: leave out it or reduction")
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


def asks_ours(given: dict[str, Any]) -> list[str]:
    """The arguments of a call that the original does not have."""
    return [n for n in Wanted.OURS if given.get(n) is not None]


def for_the_original(given: dict[str, Any], why: str) -> dict[str, Any]:
    """The arguments without ours. Raises ValueError where those ask for something."""
    ours = asks_ours(given)
    if ours:
        raise ValueError(f"{', '.join(ours)} can't be had of the model's own forward, which has to run: {why}")
    return {n: v for n, v in given.items() if n not in Wanted.OURS}
