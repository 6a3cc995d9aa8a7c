"""Fine-tune a Hugging Face model with `pyckpt.swap`: the loop is the usual one, with one line more.

    python examples/finetune_llama.py                  # a small random Llama, on the text of a Python module
    python examples/finetune_llama.py --text book.txt --seq-len 4096 --steps 100
    python examples/finetune_llama.py --lora 8 --seq-len 8192 --output adapter     # needs peft
    python examples/finetune_llama.py --stream host --batch 1 --seq-len 16384 --steps 3

With --lora adapters alone are trained. With --stream only tiles of the sequence are on the device. Tokens are bytes, so
that nothing has to be downloaded. With a model of your own, `from_pretrained` takes the place of `small_llama`.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
import transformers
from arguments import a_new_folder, at_least, parser_of, text_of

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


def with_adapters(model: transformers.PreTrainedModel, rank: int) -> torch.nn.Module:
    """The model with LoRA on every linear layer but the head; the rest is frozen."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def save(model: torch.nn.Module, folder: Path) -> None:
    """The adapters, or without them the model. The folder has its name when all is there."""
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    aside.rename(folder)


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
    parser.add_argument("--stream", choices=pyckpt.store.STORES, help="run streamed, with the sequence in this store")
    parser.add_argument("--lora", type=at_least(1), metavar="RANK", help="train LoRA adapters of this rank alone")
    parser.add_argument("--output", type=a_new_folder, help="a new folder, for the trained adapters or model")
    args = parser.parse_args(arguments)
    text = text_of(parser, args)
    if args.lora and importlib.util.find_spec("peft") is None:
        parser.error("--lora needs peft, which is not installed: pip install peft")

    model = small_llama()
    if args.lora:
        model = with_adapters(model, args.lora)  # before the swap
    stream = None if args.stream is None else pyckpt.Stream(store=args.stream)
    print(pyckpt.swap(model, save=args.save, stream=stream))
    model.train()  # from_pretrained gives one in eval mode
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = (sum(p.numel() for p in parameters) for parameters in (trained, model.parameters()))
    print("{:,} of {:,} parameters are trained".format(*numbers))
    optimizer = torch.optim.AdamW(trained, lr=1e-2 if args.lora else 1e-3)
    losses = []
    for step, tokens in enumerate(batches(text, args.batch, args.seq_len, args.steps)):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(f"step {step}: loss {losses[-1]:.3f}")
    if args.output is not None:
        save(model, args.output)
    return losses


if __name__ == "__main__":
    main()
