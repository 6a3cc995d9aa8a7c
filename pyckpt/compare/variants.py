"""The variants that are compared: ways to train the same weights on the same input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.compare.baseline import PlainBlock, PlainCausalLM, PlainStack
from pyckpt.compare.results import BASELINES, CHECKPOINT, STREAMED
from pyckpt.ops.seeding import seed_generators
from pyckpt.save import SAVE_SETS, bytes_per_token
from pyckpt.spec import BlockSpec
from pyckpt.stream import Stream

VARIANTS = (*BASELINES, *SAVE_SETS, STREAMED)
_STREAM_TILE = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Config:
    """What is trained: a stack of ``n_layers`` blocks, or with a ``vocab_size`` a causal LM over them."""

    spec: BlockSpec
    options: dict[str, Any]
    n_layers: int
    batch: int
    dtype: torch.dtype
    device: torch.device
    vocab_size: int | None = None
    tile: int | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("spec", "options", "dtype", "device")}
        return {
            **vars(self.spec),
            **plain,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def saved_bytes(self, save: str, length: int) -> int:
        """Bytes a stack with this save set keeps by arithmetic."""
        return self.n_layers * self.batch * length * bytes_per_token(self.spec, save, self.dtype)


class Workload:
    """The same weights in a plain model and in a checkpointed one, and one step of each variant.

    Every weight and the input have their gradient allocated from the start, so that measured memory is
    activations and transients only.
    """

    def __init__(self, config: Config, variants: tuple[str, ...]) -> None:
        self.config = config
        devices = [config.device] if config.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the caller's random numbers go on as if nothing had been drawn
            seed_generators(config.seed, config.device)
            self._plain = _plain_model(config)
            self._ckpt: Any = None
            if any(variant not in BASELINES for variant in variants):
                self._ckpt = _ckpt_model(config)
                self._ckpt.load_state_dict(self._plain.state_dict())
        # On a CPU the host's memory is the device's: there the sequence goes to a file.
        kind = config.device.type
        self._stream = Stream(config.tile or _STREAM_TILE[kind], "file" if kind == "cpu" else "host")
        for model in (self._plain, self._ckpt):
            for parameter in () if model is None else model.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def model(self, variant: str) -> nn.Module:
        """The module of a variant, set to it."""
        if variant in BASELINES:
            plain = self._plain
            stack = plain.model.layers if isinstance(plain, PlainCausalLM) else plain
            stack.checkpointed = variant == CHECKPOINT
            return self._plain
        for block in self._ckpt.model.layers if self.config.vocab_size is not None else self._ckpt:
            block.save = "attention" if variant == STREAMED else variant
            block.tile = self.config.tile
        return self._ckpt

    def batch(self, length: int) -> Batch:
        """Fresh random data of a length: hidden states and the gradient of the output, or tokens."""
        c = self.config
        generator = torch.Generator(device=c.device).manual_seed(c.seed + length)
        if c.vocab_size is not None:
            size = (c.batch, length)
            return Batch(torch.randint(c.vocab_size, size, generator=generator, device=c.device), None)
        x, dy = (
            torch.randn(c.batch, length, c.spec.d_model, generator=generator, device=c.device, dtype=c.dtype)
            for _ in range(2)
        )
        x.requires_grad_().grad = torch.zeros_like(x)
        return Batch(x, dy)

    def step(self, variant: str, batch: Batch) -> Callable[[], None]:
        """Forward and backward of a variant, adding to the gradients."""

        options = {"stream": self._stream} if variant == STREAMED else {}

        def run() -> None:
            model: Any = self.model(variant)
            if batch.dy is None:
                model.loss(batch.x, **options).backward()
            else:
                model(batch.x, **options).backward(batch.dy)

        return run

    def gradients(self, variant: str, batch: Batch) -> list[Tensor]:
        """The gradients of one step: of the input, if it has one, and of every weight in order of name."""
        model = self.model(variant)
        sources = [
            *([batch.x] if batch.dy is not None else []),
            *(p for _, p in sorted(model.named_parameters())),
        ]
        for source in sources:
            source.grad.zero_()  # type: ignore[union-attr]
        self.step(variant, batch)()
        return [source.grad.clone() for source in sources]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Batch:
    """``x`` (B, S, d_model) with ``dy``, the gradient of the output; or tokens (B, S) and no ``dy``."""

    x: Tensor
    dy: Tensor | None


def _plain_model(config: Config) -> PlainStack | PlainCausalLM:
    spec, kind = config.spec, {"device": config.device, "dtype": config.dtype, **config.options}
    if config.vocab_size is not None:
        return PlainCausalLM(config.vocab_size, config.n_layers, spec.d_model, spec.n_heads, **kind)
    return PlainStack([PlainBlock(spec.d_model, spec.n_heads, **kind) for _ in range(config.n_layers)])


def _ckpt_model(config: Config) -> nn.Module:
    spec, kind = config.spec, {"device": config.device, "dtype": config.dtype, **config.options}
    if config.vocab_size is not None:
        from pyckpt.model import CkptCausalLM

        return CkptCausalLM(config.vocab_size, config.n_layers, spec.d_model, spec.n_heads, **kind)
    from pyckpt.block import CkptTransformerBlock
    from pyckpt.model import CkptTransformer

    return CkptTransformer(CkptTransformerBlock(spec.d_model, spec.n_heads, **kind) for _ in range(config.n_layers))
