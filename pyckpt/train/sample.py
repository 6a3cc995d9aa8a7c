"""Text written by a trained model."""

from __future__ import annotations

from typing import Any

import torch

from pyckpt.train.data import Corpus


def sample(model: Any, corpus: Corpus, prompt: str, tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and `tokens` tokens that continue it; the same seed gives the same text."""
    device = next(model.parameters()).device
    start = torch.tensor([corpus.encode(prompt)], dtype=torch.int64, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    output = model.generate(start, tokens, temperature=temperature, generator=generator)
    return corpus.decode(output[0].tolist())


def printable(text: str) -> str:
    """Text that is safe to show: what would steer a terminal becomes U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
