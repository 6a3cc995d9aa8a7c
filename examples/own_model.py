"""A model of one's own with `CkptTransformerBlock`: own embedding, packed lines of text, and a loss without logits.

    python examples/own_model.py                       # on the text of a Python module
    python examples/own_model.py --text book.txt --save input --steps 100

Lines of different lengths are packed one after the other, without padding: each sees itself alone. Tokens are bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from arguments import at_least, parser_of
from torch import Tensor, nn

import pyckpt

IGNORED = -100


class LineModel(nn.Module):
    """Predicts each byte of a line from those before it."""

    def __init__(self, d_model: int = 128, n_layers: int = 4, save: str = "attention") -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)  # it is the head too: at first all bytes are as likely
        self.blocks = nn.ModuleList(
            pyckpt.CkptTransformerBlock(d_model, n_heads=4, n_kv_heads=2, qk_norm=True, window=64, save=save)
            for _ in range(n_layers)
        )
        self.norm = nn.Parameter(torch.ones(d_model))

    def loss(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of packed tokens (T,), whose lines start at cu_seqlens (N + 1,) int32."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cu_seqlens=cu_seqlens)
        x = pyckpt.rms_norm(x, self.norm)
        target = tokens.roll(-1)
        target[cu_seqlens[1:].long() - 1] = IGNORED  # the last byte of a line predicts nothing
        return pyckpt.linear_cross_entropy(x, self.embedding.weight, target, ignore_index=IGNORED)


def lines_of(text: bytes) -> list[bytes]:
    """Those that predict something: of two bytes and more."""
    return [line for line in text.splitlines() if line.strip() and len(line) > 1]


def batches(text: bytes, lines: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random lines of the text, packed: tokens (T,) int64, and where each line starts and the last one ends."""
    found = lines_of(text)
    for _ in range(steps):
        chosen = [found[i] for i in torch.randint(len(found), (lines,))]
        lengths = torch.tensor([0, *(len(line) for line in chosen)])
        yield torch.tensor(list(b"".join(chosen))), lengths.cumsum(0).to(torch.int32)


def main(arguments: list[str] | None = None) -> list[float]:
    parser = parser_of(__doc__, steps=30)
    parser.add_argument("--lines", type=at_least(1), default=32, help="in a batch")
    parser.add_argument("--save", default="attention", choices=pyckpt.SAVE_SETS)
    args = parser.parse_args(arguments)
    text = args.text.read_bytes()
    if not lines_of(text):
        parser.error(f"{args.text} has no line of two bytes or more with text in it; give another file")

    model = LineModel(save=args.save)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, (tokens, cu_seqlens) in enumerate(batches(text, args.lines, args.steps)):
        # Measuring takes time itself: the first step shows what all of them take.
        with pyckpt.measure.memory(model) if step == 0 else contextlib.nullcontext() as memory:
            loss = model.loss(tokens, cu_seqlens)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}")
        if memory is not None:
            kept = memory.saved_bytes / len(tokens)
            print(f"{len(tokens):,} tokens: {kept:,.0f} bytes kept for each, peak {memory.peak_bytes:,} bytes")
    return losses


if __name__ == "__main__":
    main()
