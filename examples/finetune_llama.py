"""Fine-tune a Hugging Face model with `pyckpt.swap`: the loop is the usual one, with one line more.

    python examples/finetune_llama.py                  # a small random Llama, on the text of a Python module
    python examples/finetune_llama.py --text book.txt --seq-len 4096 --steps 100

Tokens are bytes, so that nothing has to be downloaded. With a model of your own, `from_pretrained` takes the place of
`small_llama`.
"""

from __future__ import annotations

import torch
import transformers
from arguments import at_least, parser_of, text_of

import pyckpt


def small_llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def batches(text: bytes, batch: int, seq_len: int, steps: int) -> torch.Tensor:
    """Random pieces of the text, (steps, batch, seq_len) int64."""
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(tokens) - seq_len + 1, (steps, batch))
    return tokens[starts[..., None] + torch.arange(seq_len)]


def main(arguments: list[str] | None = None) -> list[float]:
    parser = parser_of(__doc__, steps=30)
    parser.add_argument("--batch", type=at_least(1), default=2)
    parser.add_argument("--seq-len", type=at_least(2), default=512)
    parser.add_argument("--save", default="attention", choices=pyckpt.SAVE_SETS)
    args = parser.parse_args(arguments)
    text = text_of(parser, args)

    model = small_llama()
    print(pyckpt.swap(model, save=args.save))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step, tokens in enumerate(batches(text, args.batch, args.seq_len, args.steps)):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
