"""RoPE whose frequencies depend on the length of the batch ("dynamic", "longrope")."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.spec import BlockSpec, canonical_rope_scaling

MOVING = ("dynamic", "longrope")
"""Types of RoPE, as `rope_type` names them, of which that is true."""


class MovingRope:
    """The frequencies of a model's rotary embedding as its last call left them.

    The model calls it before its layers, and it writes down the frequencies that it has chosen for the batch.
    """

    def __init__(self, rotary: nn.Module, prefix: str) -> None:
        self._rotary, self._prefix = (rotary,), prefix
        self._seen: tuple[Tensor, int | None, Any] | None = None

    def now(self, spec: BlockSpec) -> BlockSpec:
        """The spec with the present frequencies."""
        frequencies = getattr(self._rotary[0], f"{self._prefix}inv_freq")
        version = None if frequencies.is_inference() else frequencies._version
        # Read once a call, not by every layer: a GPU has to be waited for.
        if self._seen is None or self._seen[0] is not frequencies or self._seen[1] != version:
            self._seen = frequencies, version, given(self._rotary[0], self._prefix)
        return dataclasses.replace(spec, rope_scaling=canonical_rope_scaling(self._seen[2], spec.rope_theta))


class Frequencies:
    """Those of a model's rotary embedding, which may be `None`, as they were when the model was swapped."""

    def __init__(self, rotary: Any) -> None:
        buffers = {} if rotary is None else dict(rotary.named_buffers(recurse=False))
        # Not "original_inv_freq", which stands beside them.
        names = [n for n in buffers if n.endswith("inv_freq") and "original" not in n and not buffers[n].is_meta]
        self._then = {n: buffers[n].double().tolist() for n in names}
        self._scales = {
            n: getattr(rotary, n, None) for n in (m.replace("inv_freq", "attention_scaling") for m in names)
        }
        # How many pairs of dims turn by each axis of positions, where it says so.
        self._sections = copy.deepcopy(getattr(rotary, "mrope_section", None))
        self._seen: dict[str, Tensor] = {}

    def differ(self, rotary: Any) -> bool:
        """They are others now, but for a rounding to the dtype that they have been brought to since."""
        if self._then:
            errors.check_transforms("a swapped model")  # of which numbers can't be read
        if any(getattr(rotary, n, None) != scale for n, scale in self._scales.items()):
            return True
        if self._sections is not None and getattr(rotary, "mrope_section", None) != self._sections:
            return True
        return any(self._differs(n, getattr(rotary, n, None), then) for n, then in self._then.items())

    def _differs(self, name: str, now: Tensor | None, then: list[float]) -> bool:
        if now is None or now.shape != (len(then),):
            return True
        if self._seen.get(name) is not now:  # whose values a GPU has to be waited for; DDP writes them at each call
            if now.double().tolist() != torch.tensor(then, dtype=torch.float64, device="cpu").to(now.dtype).tolist():
                return True
            self._seen[name] = now
        return False


def given(rotary: Any, prefix: str) -> dict[str, Any]:
    """The frequencies and the amplitude of a rotary embedding, as `rope_scaling` of a block."""
    return {
        "rope_type": "given",
        "frequencies": tuple(getattr(rotary, f"{prefix}inv_freq").double().tolist()),
        "amplitude": float(getattr(rotary, f"{prefix}attention_scaling")),
    }
