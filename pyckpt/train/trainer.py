"""One run's moving parts: model, optimiser, place in the data; a step, a validation, a checkpoint."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyckpt.keep import Kept, keep_within
from pyckpt.ops.seeding import seed_generators
from pyckpt.stream import Stream
from pyckpt.train import checkpoint as checkpoints
from pyckpt.train.checkpoint import Checkpoint
from pyckpt.train.config import TrainConfig
from pyckpt.train.data import Corpus, training_batch, validation_batches
from pyckpt.train.history import History
from pyckpt.train.optim import Optimizer


class StepInterrupted(KeyboardInterrupt):
    """A streamed step was given up between two tiles; weights and optimiser are those after the step before."""


class _ReservedError(Exception):
    """A streamed step has its store, and need not go on."""


class Trainer:
    """Everything that a step changes. The next batch is a function of `done`, the steps behind, alone."""

    def __init__(self, config: TrainConfig, corpus: Corpus) -> None:
        """config: a resolved one. Sets the seed of PyTorch's global generators, of the CPU and of its device."""
        self.config, self.corpus = config, corpus
        self.device = torch.device(config.device)
        seed_generators(config.seed, self.device)
        self.model = _build(config, corpus)
        self.kept = self._keep()
        self.optimizer = Optimizer(self.model, config)
        self.history = History()
        self.stopping: Callable[[], object] = lambda: False
        self.on_tile: Callable[[str, int, int], None] = lambda what, block, tile: None
        self.stream = self._stream()
        self._validation = validation_batches(corpus.validation, config.eval_batches, config.batch_size, config.seq_len)

    def _keep(self) -> Kept | None:
        config = self.config
        if config.keep_within is None:
            return None
        return keep_within(self.model, config.keep_within, config.batch_size * config.seq_len)

    def _stream(self) -> Stream | None:
        config = self.config
        if config.stream is None:
            return None
        return Stream(config.stream_tile, config.stream, config.stream_path, progress=self._between_tiles)

    def _between_tiles(self, what: str, block: int, tile: int) -> None:
        if self.stopping():
            raise StepInterrupted
        self.on_tile(what, block, tile)

    @property
    def done(self) -> int:
        return len(self.history.train)

    def step(self) -> dict[str, Any]:
        """Take one step; gives its line of the log.

        Raises RuntimeError when the loss or the gradient is not finite.
        """
        started = time.perf_counter()
        number = self.done + 1
        loss = self.accumulate(self.done)
        if not math.isfinite(loss):
            raise _diverged("loss", loss, number)
        rate, norm = self.optimizer.step(number)
        if not math.isfinite(norm):
            raise _diverged("gradient norm", norm, number)
        self.history.train.append(loss)
        seconds = time.perf_counter() - started
        tokens = self.config.grad_accum * self.config.batch_size * self.config.seq_len
        return {
            "step": number,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "seconds": round(seconds, 6),
        }

    def accumulate(self, done: int, tokens: int | None = None) -> float:
        """Forward and backward of the step after `done` steps; gives its loss and leaves the gradients.

        tokens: of the first so many of each sequence alone.
        """
        count = self.config.grad_accum
        losses = []
        for part in range(count):
            loss = self.model.loss(self._batch(done * count + part)[:, :tokens], stream=self.stream)
            (loss / count).backward()
            self.optimizer.collect()
            losses.append(loss.item())
        return math.fsum(losses) / count

    def reserve(self) -> None:
        """Have the store of a streamed run take what a whole step needs, which it keeps for the steps.

        Raises MemoryError or OSError where the machine does not have it.
        """
        if self.stream is None:
            return

        def enough(what: str, block: int, tile: int) -> None:
            raise _ReservedError

        between, self.stream.progress = self.stream.progress, enough
        try:
            with contextlib.suppress(_ReservedError):
                self.model.loss(self._batch(0), stream=self.stream)
        finally:
            self.stream.progress = between

    def _batch(self, index: int) -> Tensor:
        config = self.config
        batch = training_batch(self.corpus.train, config.seed, index, config.batch_size, config.seq_len)
        return batch.to(self.device)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation sequences, nats per token; noted in the history.

        Raises RuntimeError when it is not finite.
        """
        self.model.eval()
        total, rows = 0.0, 0
        for batch in self._validation:
            total += self.model.loss(batch.to(self.device), stream=self.stream).item() * len(batch)
            rows += len(batch)
        self.model.train()
        loss = total / rows
        if not math.isfinite(loss):  # before a checkpoint of such weights takes the place of a good one
            raise _diverged("validation loss", loss, self.done)
        self.history.validation.append((self.done, loss))
        return loss

    def bits_per_byte(self, loss: float) -> float:
        """A loss in nats per token as bits per byte of the text, which no tokenizer changes."""
        tokens_per_byte = len(self.corpus.validation) / self.corpus.validation_bytes
        return loss * tokens_per_byte / math.log(2)

    def checkpoint(self) -> Checkpoint:
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        return Checkpoint(
            step=self.done,
            settings=self.config.fixed(),
            data=self.corpus.fingerprint,
            weights=dict(self.optimizer.weights),
            state={"optimizer": self.optimizer.state(), "rng": rng, "history": self.history.state()},
        )

    def restore(self, path: Path) -> Checkpoint:
        """Take over a checkpoint; nothing is changed unless all of it can be read and fits."""
        found = checkpoints.read(path)
        shapes = {name: tuple(weight.shape) for name, weight in self.optimizer.weights.items()}
        checkpoints.check(found, path, self.config.fixed(), self.corpus.fingerprint, shapes)
        history = History.from_state(found.state["history"])
        if len(history.train) != found.step:
            raise RuntimeError(f"checkpoint {path} is of step {found.step} but has {len(history.train)} losses.")
        self.optimizer.load(found.weights, found.state["optimizer"])
        torch.set_rng_state(found.state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in found.state["rng"]:
            torch.cuda.set_rng_state(found.state["rng"]["cuda"], self.device)
        self.history = history
        return found


def _build(config: TrainConfig, corpus: Corpus) -> Any:
    from pyckpt.model import CkptCausalLM

    model = CkptCausalLM(
        corpus.vocab_size,
        config.layers,
        config.d_model,
        config.heads,
        n_kv_heads=config.kv_heads,
        d_ff=config.d_ff,
        window=config.window,
        tie_embeddings=config.tie_embeddings,
        segments=config.segments,
        save=config.kept(),
        tile=config.tile,
        device=config.device,
        dtype=getattr(torch, config.dtype),
    )
    # For config.json: nothing of it changes what is computed.
    model.extra_config = {"max_position_embeddings": config.seq_len, "eos_token_id": corpus.end_of_text}
    return model


def _diverged(what: str, value: float, step: int) -> RuntimeError:
    return RuntimeError(
        f"the {what} is {value} at step {step}: training has diverged. Lower --lr or lengthen --warmup; "
        f"checkpoints from before are intact."
    )
