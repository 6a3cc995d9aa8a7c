"""A training run from the text to the trained model."""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyckpt.extras import require
from pyckpt.files import replacing
from pyckpt.measure import format_bytes, format_seconds
from pyckpt.train import checkpoint as checkpoints
from pyckpt.train.config import TrainConfig
from pyckpt.train.data import load_corpus
from pyckpt.train.folder import RunFolder
from pyckpt.train.history import History, MetricsLog
from pyckpt.train.memory import StepMemory, peak_so_far, probe
from pyckpt.train.plot import loss_curve
from pyckpt.train.progress import Progress, progress_for
from pyckpt.train.sample import printable, sample, start_of
from pyckpt.train.signals import StopRequest
from pyckpt.train.trainer import StepInterrupted, Trainer

_STOPPING = "\nStopping after this step, with a checkpoint (Ctrl-C once more: at once, without one).\n"

_STOPPING_STREAM = "\nStopping after this tile: the step under way is given up, those before it are in a checkpoint.\n"


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to.

    steps: done, less than config.steps if `stopped_by` is a signal's number. validation_loss: nats per token,
    the last measured. step_memory: of one forward and backward. sample: with its prompt; "" if stopped.
    """

    out: Path
    config: TrainConfig
    steps: int
    history: History
    validation_loss: float
    bits_per_byte: float
    step_memory: StepMemory
    model: Any
    sample: str = ""
    stopped_by: int | None = None


def run(
    config: TrainConfig, console: Any = None, on_step: Callable[[dict[str, Any]], None] | None = None
) -> TrainResult:
    """Train a causal language model as `config` says and write everything into config.out.

    console: a rich.console.Console to report to; None reports nothing. on_step: called after each step with
    its line of the log (and after its checkpoint, if one was due).

    SIGINT, SIGTERM and SIGHUP end the run after the step under way, with a checkpoint; a streamed one after the tile
    under way, with a checkpoint of the steps before. PyTorch's global random state is as before when this returns.

    Raises ValueError for settings, data or a folder that can't be used, and RuntimeError for a damaged
    checkpoint, a missing extra, a loss that is not finite, a GPU out of memory; the first three before
    anything is changed. Where a streamed run's store has no room: MemoryError, or of a disk OSError, before too.
    """
    require("training", "safetensors", "matplotlib", *(["tokenizers"] if config.tokenizer else []))
    config = config.resolved()
    folder = RunFolder(Path(config.out))
    folder.check(config)
    corpus = load_corpus(config.data, config.seq_len, config.tokenizer, config.vocab_size, config.out)
    start_of(corpus, config.prompt)  # so that a bad prompt fails now, not after the training
    progress = progress_for(console, corpus.unit, config.log_every)
    device = torch.device(config.device)
    devices = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        StopRequest((_STOPPING if config.stream is None else _STOPPING_STREAM) if console is not None else "") as stop,
    ):
        trainer = Trainer(config, corpus)
        progress.table(_description(trainer) + _stream_rows(trainer))
        with folder.locked():
            folder.check(config)  # again: another process may have begun a run since
            notes = _resume(trainer, folder) if config.resume else []
            trainer.stopping = lambda: stop
            memory = _probe(trainer)
            if not config.resume:  # not before the probe: a step that fails leaves no run that would be in the way
                folder.begin(config)
            progress.table(_memory_rows(trainer, memory) + _time_rows(trainer))
            for note in notes:
                progress.note(note)
            _train(trainer, folder, progress, stop, on_step)
            return _finish(trainer, folder, progress, memory, stop)


def _resume(trainer: Trainer, folder: RunFolder) -> list[str]:
    """Go on from the last checkpoint, if there is one; gives what there is to tell."""
    config = trainer.config
    found = checkpoints.steps(folder.checkpoints)
    if not found:
        return ["No checkpoint was written yet: starting from the first step."]
    last = trainer.restore(found[-1])
    notes = [f"Resuming after step {last.step} of {config.steps}."]
    then, now = (last.torch_version, last.threads), (torch.__version__, torch.get_num_threads())
    if then != now:
        notes.append(
            f"Begun with PyTorch {then[0]} on {then[1]} threads, now {now[0]} on {now[1]}: the last bits of "
            f"the losses may differ."
        )
    return notes


def _probe(trainer: Trainer) -> StepMemory:
    """Measure the first batch's forward and backward, and drop its gradients."""
    config, tokens = trainer.config, _probed_tokens(trainer)
    try:
        if tokens is not None:  # else the probe itself takes all of the store
            trainer.reserve()
        memory = probe(trainer.model, lambda: trainer.accumulate(0, tokens))
    except torch.OutOfMemoryError as error:
        kept = f"save={config.save!r}" if trainer.kept is None else f"keep_within={config.keep_within!r}"
        less = "" if trainer.kept is None else "a smaller --keep-within, "
        raise RuntimeError(
            f"one step with batch_size={config.batch_size}, seq_len={config.seq_len} and "
            f"{kept} does not fit in the GPU's memory. Lower --batch-size (and raise --grad-accum), or "
            f"keep less there: {less}--save input, --segments sqrt, --place x=host. ({str(error).splitlines()[0]})"
        ) from error
    finally:
        trainer.optimizer.zero_grad()
    return dataclasses.replace(memory, peak_bytes=memory.peak_bytes + _unprobed_store(trainer))


def _probed_tokens(trainer: Trainer) -> int | None:
    """Of each sequence: all (None); of a long streamed one some tiles, which take as much, and not a step's time."""
    config = trainer.config
    if config.stream in (None, "device") or 4 * config.stream_tile >= config.seq_len:
        return None
    return 4 * config.stream_tile


def _unprobed_store(trainer: Trainer) -> int:
    """Bytes of the store for the tokens that were not probed, where it is in the memory that was: a CPU's "host"."""
    config, tokens = trainer.config, _probed_tokens(trainer)
    if trainer.stream is None or tokens is None or (config.stream, trainer.device.type) != ("host", "cpu"):
        return 0
    whole, part = (trainer.stream.estimate(trainer.model, n, config.batch_size) for n in (config.seq_len, tokens))
    return whole.store_bytes - part.store_bytes


def _time_rows(trainer: Trainer) -> list[tuple[str, str]]:
    """Of a streamed step that is longer than what was probed: its time, from that of as many tiles by their FLOPs.

    Not from the rate of a product: at small widths most of the time is not in products.
    """
    config, tokens = trainer.config, _probed_tokens(trainer)
    if trainer.stream is None or tokens is None:
        return []
    begin = time.perf_counter()
    trainer.accumulate(0, tokens)
    trainer.optimizer.zero_grad()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    taken = time.perf_counter() - begin
    whole, part = (trainer.stream.estimate(trainer.model, n, config.batch_size).flops for n in (config.seq_len, tokens))
    text = f"about {format_seconds(taken * whole / part)} a step; {tokens:,} tokens took {format_seconds(taken)}"
    return [("Time", text)]


def _train(
    trainer: Trainer,
    folder: RunFolder,
    progress: Progress,
    stop: StopRequest,
    on_step: Callable[[dict[str, Any]], None] | None,
) -> None:
    config = trainer.config
    log = MetricsLog(folder.metrics, trainer.history)

    def validate() -> None:
        loss = trainer.validate()
        log.write({"step": trainer.done, "validation_loss": loss, "bits_per_byte": trainer.bits_per_byte(loss)})
        progress.validated(loss)

    saved = trainer.done

    def checkpoint() -> None:
        nonlocal saved
        checkpoints.write(folder.checkpoints, trainer.checkpoint(), config.keep_checkpoints)
        saved = trainer.done

    trainer.on_tile = progress.tile
    try:
        progress.start(trainer.done, config.steps)
        if not trainer.history.validation or _validation_due(trainer):  # a streamed one may have been given up
            validate()
        while trainer.done < config.steps and not stop:
            record = trainer.step()
            log.write(record)
            progress.step(record, peak_so_far(trainer.device))
            if _validation_due(trainer):
                validate()
            if trainer.done == config.steps or trainer.done % config.checkpoint_every == 0:
                checkpoint()
            if on_step is not None:
                on_step(record)
        if stop and 0 < trainer.done != saved:
            checkpoint()
    except StepInterrupted:
        if not trainer.history.validation:
            raise  # not even what a model is before training is known: there is nothing to keep
        trainer.optimizer.zero_grad()
        if 0 < trainer.done != saved:
            checkpoint()
    finally:
        progress.stop()
        log.close()


def _validation_due(trainer: Trainer) -> bool:
    """After the steps done so far, and not made yet."""
    config, made = trainer.config, trainer.history.validation
    at_this_step = trainer.done == config.steps or trainer.done % config.eval_every == 0
    return at_this_step and (not made or made[-1][0] != trainer.done)


def _finish(
    trainer: Trainer, folder: RunFolder, progress: Progress, memory: StepMemory, stop: StopRequest
) -> TrainResult:
    config = trainer.config
    loss = trainer.history.validation[-1][1]
    result = TrainResult(
        out=folder.path,
        config=config,
        steps=trainer.done,
        history=trainer.history,
        validation_loss=loss,
        bits_per_byte=trainer.bits_per_byte(loss),
        step_memory=memory,
        model=trainer.model,
    )
    if trainer.done < config.steps or _validation_due(trainer):
        _report_stop(trainer, folder, progress)
        return dataclasses.replace(result, stopped_by=stop.signal)
    text = _artifacts(trainer, folder)
    result = dataclasses.replace(result, sample=text)
    _report(result, trainer, folder, progress)
    return result


def _artifacts(trainer: Trainer, folder: RunFolder) -> str:
    """Write the picture, the sample and the model; gives the sample."""
    from pyckpt.hf import save_pretrained

    config, corpus = trainer.config, trainer.corpus
    title = f"pyckpt train: {corpus.name}"
    save_pretrained(trainer.model, str(folder.model), tokenizer=corpus.tokenizer)
    loss_curve(folder.plot, trainer.history.train, trainer.history.validation, unit=corpus.unit, title=title)
    text = ""
    if config.sample_tokens:
        _, start = start_of(corpus, config.prompt)
        text = sample(trainer.model, corpus, start, config.sample_tokens, config.temperature, config.seed)
    with replacing(folder.sample) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return text


def _description(trainer: Trainer) -> list[tuple[str, str]]:
    config, corpus = trainer.config, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    held = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    tokens = "" if corpus.tokenizer is None else f", {_count(len(corpus.train) + len(corpus.validation))} tokens"
    batch = config.batch_size * config.grad_accum
    seen = config.steps * batch * config.seq_len
    heads = f"{config.heads} heads" + (f" ({config.kv_heads} key/value)" if config.kv_heads != config.heads else "")
    rows = [
        (
            "Data",
            f"{corpus.name}: {_number_of('file', corpus.files)}, {_count(corpus.total_bytes)} bytes{tokens}; "
            f"{held:.0%} for validation",
        ),
        (
            "Model",
            f"{_number_of('block', config.layers)} of d_model {config.d_model}, {heads}, d_ff {config.d_ff}; "
            f"{_count(parameters)} parameters, {config.dtype} on {config.device}",
        ),
        (
            "Training",
            f"{_number_of('step', config.steps)} of {batch} × {config.seq_len} {corpus.unit}s: "
            f"{_count(seen)} {corpus.unit}s",
        ),
    ]
    return rows + [("", note) for note in corpus.notes]


def _stream_rows(trainer: Trainer) -> list[tuple[str, str]]:
    if trainer.stream is None:
        return []
    config, model = trainer.config, trainer.model
    return [("Streamed", str(trainer.stream.estimate(model, config.seq_len, config.batch_size)))]


def _number_of(what: str, number: int) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _memory_rows(trainer: Trainer, memory: StepMemory) -> list[tuple[str, str]]:
    config = trainer.config
    segments = "" if config.segments is None else f", segments={config.segments!r}"
    places = "" if config.place is None else f", place={config.place!r}"
    kept = f"save={config.save!r}" if trainer.kept is None else f"save: {trainer.kept.runs}"
    text = (
        f"a step needs {format_bytes(memory.peak_bytes)} above weights and optimiser, "
        f"{format_bytes(memory.saved_bytes)} of them kept from forward to backward "
        f"({kept}{segments}{places})"
    )
    return [("Memory  ", text)]


def _report_stop(trainer: Trainer, folder: RunFolder, progress: Progress) -> None:
    progress.note(f"Stopped after step {trainer.done} of {trainer.config.steps}. Nothing is lost. To go on:")
    progress.command(f"  pyckpt train --resume --out {shlex.quote(str(folder.path))}")


def _report(result: TrainResult, trainer: Trainer, folder: RunFolder, progress: Progress) -> None:
    unit = trainer.corpus.unit
    first = result.history.validation[0][1]
    what, peak = peak_so_far(trainer.device)
    owner = "allocated on the GPU" if what == "GPU" else "of the whole process in RAM"
    progress.note()
    if result.sample:
        prompt, _ = start_of(trainer.corpus, result.config.prompt)
        progress.quote(f"What the model writes after {prompt!r}", printable(result.sample))
        progress.note()
    progress.table(
        [
            (
                "Validation loss",
                f"{result.validation_loss:.3f} nats per {unit} (before training {first:.3f}, "
                f"guessing {math.log(trainer.corpus.vocab_size):.3f}); {result.bits_per_byte:.3f} bits per "
                f"byte",
            ),
            ("Speed", progress.summary),
            ("Peak memory", f"{format_bytes(peak)} {owner}"),
            ("Loss curve", str(folder.plot)),
            ("Loss of each step", str(folder.metrics)),
            ("Trained model", f"{folder.model} (Hugging Face Llama format)"),
        ]
    )


def _count(number: int) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def exit_code(result: TrainResult) -> int:
    """What a shell expects of a process that ended so: 0, or 128 + the signal's number."""
    return 0 if result.stopped_by is None else 128 + signal.Signals(result.stopped_by).value
