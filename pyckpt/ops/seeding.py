"""Seeding PyTorch's generators of the CPU and of one device."""

from __future__ import annotations

import torch


def seed_generators(seed: int, device: torch.device) -> None:
    """Unlike torch.manual_seed it leaves the generators of other devices alone: nobody would set them back.

    Those of a GPU that has not been started yet would be seeded when it is, the same in every process.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
