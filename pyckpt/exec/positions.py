"""The positions of a range of tokens, from what a run was given."""

from __future__ import annotations

import torch
from torch import Tensor

from pyckpt.attend.dense import Layout
from pyckpt.tokenwise.positions import Counted, Positions


def positions_of(layout: Layout, given: Tensor | None, rows: slice, device: torch.device) -> Positions:
    """Those that were given, (T,), or else each token's place in its sequence."""
    if given is not None:
        return Positions(device, lambda: given[rows])
    starts = layout.starts[0]
    if starts is None:
        return Positions(device, Counted(rows.start, rows.stop, layout.seq))
    return Positions(device, lambda: _in_sequences(starts, rows, device))


def _in_sequences(starts: Tensor, rows: slice, device: torch.device) -> Tensor:
    tokens = torch.arange(rows.start, rows.stop, device=device)
    return tokens - starts[torch.searchsorted(starts.contiguous(), tokens, right=True) - 1]
