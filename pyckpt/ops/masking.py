"""Which keys a query sees: causal, windowed, bottom-right aligned. Geometry only, for every implementation.

Query i of Sq and key j of Sk: with p = i + offset, j is visible where p - left <= j <= p + right; a side of -1
has no limit. Causal attention has right = 0. The offset is Sk - Sq (bottom-right alignment), unless the tensors
are tiles of longer ones: then `shift`, the first query's position less the first key's.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Mask:
    """The visible region of an Sq x Sk attention."""

    sq: int
    sk: int
    left: int
    right: int
    shift: int | None = None

    @property
    def offset(self) -> int:
        return self.sk - self.sq if self.shift is None else self.shift

    @property
    def full(self) -> bool:
        """Every query sees every key."""
        return (self.left < 0 or self.left >= self.offset + self.sq - 1) and (
            self.right < 0 or self.right >= self.sk - 1 - self.offset
        )

    @property
    def plain_causal(self) -> bool:
        """Query i sees keys 0 to i, as many as there are: what causal kernels take to be so without being told."""
        wide = self.left < 0 or self.left >= self.sq - 1
        return self.sq >= self.sk and self.offset == 0 and self.right == 0 and wide

    def keys(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys that some query of [start, stop) sees; empty ranges have lo >= hi."""
        lo = 0 if self.left < 0 else max(0, start + self.offset - self.left)
        hi = self.sk if self.right < 0 else min(self.sk, stop - 1 + self.offset + self.right + 1)
        return lo, hi

    def tile(self, start: int, stop: int, lo: int, hi: int, device: torch.device) -> Tensor | None:
        """Boolean (stop - start, hi - lo), True where visible; None where all of it is."""
        first, last = start + self.offset, stop - 1 + self.offset
        if (self.left < 0 or last - self.left <= lo) and (self.right < 0 or first + self.right >= hi - 1):
            return None
        p = torch.arange(first, last + 1, device=device).unsqueeze(1)
        j = torch.arange(lo, hi, device=device)
        visible = torch.ones(stop - start, hi - lo, dtype=torch.bool, device=device)
        if self.left >= 0:
            visible &= j >= p - self.left
        if self.right >= 0:
            visible &= j <= p + self.right
        return visible

    def blind_rows(self, device: torch.device) -> Tensor | None:
        """Boolean (Sq,), True for queries that see no key; None if there are none."""
        if self.sk == 0:
            return torch.ones(self.sq, dtype=torch.bool, device=device)
        first_hi = self.sk if self.right < 0 else self.offset + self.right + 1
        last_lo = 0 if self.left < 0 else self.sq - 1 + self.offset - self.left
        if first_hi > 0 and last_lo < self.sk:
            return None
        p = torch.arange(self.sq, device=device) + self.offset
        lo = torch.zeros_like(p) if self.left < 0 else (p - self.left).clamp_min(0)
        hi = torch.full_like(p, self.sk) if self.right < 0 else (p + self.right + 1).clamp_max(self.sk)
        return lo >= hi
