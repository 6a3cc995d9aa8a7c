"""Text written by a trained model."""

from __future__ import annotations

from typing import Any

import torch

from pyckpt.train.data import Corpus


def start_of(corpus: Corpus, prompt: str | None) -> tuple[str, list[int]]:
    """What a sample starts from, as text and as tokens; the corpus' own start for None.

    Raises ValueError for a prompt that has no tokens.
    """
    text = corpus.prompt if prompt is None else prompt
    tokens = corpus.encode(text)
    if tokens:
        return text, tokens
    if prompt is not None:
        raise ValueError(f"prompt={prompt!r} has no tokens: give some text.")
    tokens = corpus.validation[:1].tolist()  # a tokenizer may drop line ends
    return corpus.decode(tokens), tokens


def sample(model: Any, corpus: Corpus, start: list[int], tokens: int, temperature: float, seed: int) -> str:
    """The text of the tokens `start` and of `tokens` more; the same seed gives the same text."""
    device = next(model.parameters()).device
    context = torch.tensor([start], dtype=torch.int64, device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    output = model.generate(context, tokens, temperature=temperature, generator=generator)
    return corpus.decode(output[0].tolist())


def printable(text: str) -> str:
    """Text that is safe to show: what would steer a terminal becomes U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
