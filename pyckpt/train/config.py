"""What a training run is told: one dataclass, from which the command line is made too."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyckpt.save import Save

DTYPES = ("float32", "bfloat16")


def _option(default: Any, panel: str, text: str, *, free: bool = False, cli: type | None = None) -> Any:
    """A field of TrainConfig: its help text and whether it may change when a run is resumed (`free`)."""
    return field(default=default, metadata={"panel": panel, "help": text, "free": free, "cli": cli})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run.

    Every field is a flag of `pyckpt train` of the same name. Fields marked free may differ when a run is
    resumed (the text may have moved; that it is the same is checked by its tokens); all others decide the
    loss curve and must stay as they were.
    """

    data: str | None = _option(
        None, "Data", "Text file or folder; without it, Python's own standard library sources.", free=True
    )
    tokenizer: str | None = _option(
        None, "Data", "A tokenizer.json to tokenise the text with (default: bytes).", free=True
    )
    vocab_size: int | None = _option(None, "Data", "Rows of the embedding (default: the tokens there are).")

    d_model: int = _option(128, "Model", "Width of the residual stream.")
    layers: int = _option(4, "Model", "Number of transformer blocks.")
    heads: int = _option(4, "Model", "Query heads.")
    kv_heads: int | None = _option(None, "Model", "Key/value heads (default: as many as query heads).")
    d_ff: int | None = _option(None, "Model", "Width of the MLP (default: 8/3 of d_model, a multiple of 64).")
    window: int | None = _option(None, "Model", "Keys before each token that its attention sees (default: all).")
    tie_embeddings: bool = _option(False, "Model", "Share the embedding with the output head.")

    save: str = _option("attention", "Memory", "What each block keeps for the backward (save set).", free=True)
    keep_within: int | str | None = _option(
        None,
        "Memory",
        "Memory for what all blocks keep, as 20GiB: save sets are chosen to fill it (see pyckpt.keep_within).",
        free=True,
        cli=str,
    )
    segments: int | str | None = _option(
        None,
        "Memory",
        "Keep only the inputs of segments of so many blocks (a number, or sqrt).",
        free=True,
        cli=str,
    )
    place: str | None = _option(
        None,
        "Memory",
        "Where what a block keeps waits for the backward, as x=host,o=file (see pyckpt.Save).",
        free=True,
    )
    place_last: int = _option(1, "Memory", "Last blocks of which all stays on the device, with --place.", free=True)
    place_path: str | None = _option(None, "Memory", "Folder of the scratch files, with --place.", free=True)
    tile: int | None = _option(None, "Memory", "Tokens worked on at once (default: picked from the shapes).")

    stream: str | None = _option(
        None, "Memory", "Keep the sequence off the device and run tile by tile: host, file or device."
    )
    stream_tile: int = _option(4096, "Memory", "Tokens of a tile with --stream.")
    stream_path: str | None = _option(None, "Memory", "Folder of the scratch file with --stream file.", free=True)

    steps: int = _option(600, "Training", "Optimiser steps.")
    seq_len: int = _option(256, "Training", "Tokens in a sequence.")
    batch_size: int = _option(4, "Training", "Sequences in a batch.")
    grad_accum: int = _option(1, "Training", "Batches summed into one step.")
    lr: float = _option(4e-3, "Training", "Highest learning rate.")
    warmup: int | None = _option(
        None, "Training", "Steps of linear warm-up, before the cosine (default: 40, at most a quarter of --steps)."
    )
    min_lr: float = _option(0.1, "Training", "Learning rate at the end, as a fraction of --lr.")
    weight_decay: float = _option(0.1, "Training", "AdamW weight decay, on matrices only.")
    clip: float = _option(1.0, "Training", "Clip the gradient's norm to this (0: never).")
    dtype: str = _option("auto", "Training", "float32 or bfloat16 (auto: bfloat16 on a GPU).")
    device: str = _option("auto", "Training", "cpu, cuda, cuda:1, ... (auto: a GPU if there is one).", free=True)
    seed: int = _option(0, "Training", "Seed of the weights, the batches and the sample.")

    out: str = _option("runs/train", "Run", "Folder for everything that the run writes.", free=True)
    resume: bool = _option(False, "Run", "Go on from the last checkpoint in --out.", free=True)
    overwrite: bool = _option(False, "Run", "Replace the run that --out holds.", free=True)
    checkpoint_every: int = _option(100, "Run", "Steps between checkpoints.", free=True)
    keep_checkpoints: int = _option(2, "Run", "Newest checkpoints kept.", free=True)
    eval_every: int = _option(100, "Run", "Steps between validations.")
    eval_batches: int = _option(16, "Run", "Batches of a validation.")
    log_every: int = _option(25, "Run", "Steps between lines when the output is not a terminal.", free=True)

    prompt: str | None = _option(None, "Sample", "Text that the sample at the end starts from.", free=True)
    sample_tokens: int = _option(400, "Sample", "Tokens of the sample (0: none).", free=True)
    temperature: float = _option(0.7, "Sample", "Temperature of the sample (0: always the likeliest token).", free=True)

    def resolved(self) -> TrainConfig:
        """This configuration checked, with "auto" and the defaults that depend on other fields filled in.

        Raises ValueError naming the field, what was given and what is expected.
        """
        _check_types(self)
        _check_names(self)
        _check_numbers(self)
        _check_heads(self)
        _check_memory(self)
        device = resolve_device(self.device)
        dtype = self.dtype if self.dtype != "auto" else ("bfloat16" if device.startswith("cuda") else "float32")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)} or auto.")
        return dataclasses.replace(
            self,
            out=os.fspath(self.out),
            data=self.data and os.path.abspath(self.data),
            tokenizer=self.tokenizer and os.path.abspath(self.tokenizer),
            place_path=self.place_path and os.path.abspath(self.place_path),
            stream_path=self.stream_path and os.path.abspath(self.stream_path),
            device=device,
            dtype=dtype,
            warmup=self.warmup_steps,
            kv_heads=self.kv_heads or self.heads,
            d_ff=self.d_ff or -(-self.d_model * 8 // 3 // 64) * 64,
        )

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up: as given, else what leaves most of even a short run to the cosine."""
        return min(40, self.steps // 4) if self.warmup is None else self.warmup

    def kept(self) -> str | Save:
        """The save set, with its places where it has any. Raises ValueError for what is none."""
        from pyckpt.save import Save

        save = Save(self.save, _places(self.place), self.place_last, self.place_path)
        return save if save.place else self.save

    def fixed(self) -> dict[str, Any]:
        """The fields that decide the loss curve, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not f.metadata["free"]}


_AT_LEAST: dict[str, float] = {
    **dict.fromkeys(("d_model", "layers", "heads", "kv_heads", "d_ff", "tile", "stream_tile", "vocab_size"), 1),
    **dict.fromkeys(("steps", "batch_size", "grad_accum", "checkpoint_every", "keep_checkpoints"), 1),
    **dict.fromkeys(("eval_every", "eval_batches", "log_every"), 1),
    **dict.fromkeys(("window", "warmup", "min_lr", "weight_decay", "clip", "seed", "sample_tokens", "temperature"), 0),
    "place_last": 0,
    "seq_len": 2,
}


_PATHS = ("data", "tokenizer", "place_path", "stream_path", "out")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}


def _check_types(config: TrainConfig) -> None:
    """Raise ValueError where a field has none of the types that it is annotated with."""
    for name, kinds in _kinds().items():
        value, path = getattr(config, name), name in _PATHS
        if not (_fits(value, kinds) or (path and isinstance(value, os.PathLike))):
            words = ["a path"] if path else [text for kind, text in _WORDS.items() if kind in kinds]
            raise ValueError(f"{name}={value!r}: expected {' or '.join(words)}.")


def _fits(value: object, kinds: frozenset[type]) -> bool:
    """As isinstance, but that a bool is no int, and an int is a number."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds or float in kinds
    return isinstance(value, tuple(kinds))


@functools.cache
def _kinds() -> dict[str, frozenset[type]]:
    """By field the types of its annotation."""
    hints = typing.get_type_hints(TrainConfig)
    return {name: frozenset(typing.get_args(hint) or (hint,)) for name, hint in hints.items()}


def _check_names(config: TrainConfig) -> None:
    for name in ("data", "tokenizer", "out"):  # an empty one is most often a shell's variable that was not set
        if getattr(config, name) == "":
            raise ValueError(f"{name}='' names nothing: give a path (. is the folder you are in), or leave {name} out.")


def _check_numbers(config: TrainConfig) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}={value}: expected a number that is at least {least}.")
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr={config.lr!r}: expected a number above 0.")
    if config.seed >= 1 << 64:
        raise ValueError(
            f"seed={config.seed}: expected a number below 2**64, which is all that PyTorch's generators take."
        )
    if config.min_lr > 1:
        raise ValueError(f"min_lr={config.min_lr}: expected a fraction of lr, between 0 and 1.")
    if config.warmup is not None and config.warmup > config.steps:
        raise ValueError(f"warmup={config.warmup} is longer than steps={config.steps}: lower warmup.")
    if config.resume and config.overwrite:
        raise ValueError("resume and overwrite were both given: expected one of them.")


def _check_heads(config: TrainConfig) -> None:
    if config.d_model % config.heads:
        raise ValueError(
            f"d_model={config.d_model} does not divide by heads={config.heads}: choose a multiple of heads."
        )
    head_dim = config.d_model // config.heads
    if head_dim % 2:
        raise ValueError(
            f"d_model={config.d_model} over heads={config.heads} gives a head dim of {head_dim}, and RoPE "
            f"needs an even one: choose another d_model or number of heads."
        )
    if config.kv_heads is not None and config.heads % config.kv_heads:
        raise ValueError(
            f"heads={config.heads} does not divide by kv_heads={config.kv_heads}: choose a divisor of heads."
        )


def _places(given: str | None) -> dict[str, str]:
    """By tensor, of "x=host,o=file"."""
    places: dict[str, str] = {}
    for part in given.split(",") if given else ():
        tensor, equals, place = (word.strip() for word in part.partition("="))
        if not (tensor and equals and place) or tensor in places:
            raise ValueError(f"place={given!r}: expected each tensor once, with its place, as x=host,o=file.")
        places[tensor] = place
    return places


def _check_memory(config: TrainConfig) -> None:
    from pyckpt.measure.units import parse_bytes
    from pyckpt.store import make_store

    config.kept()
    if config.keep_within is not None:
        parse_bytes(config.keep_within, "keep_within")
        others = {"segments": config.segments, "place": config.place, "stream": config.stream}
        others["save"] = None if config.save == TrainConfig.save else config.save
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"keep_within and {given[0]} were both given: expected one of them.")
    if config.stream is not None and config.place is not None:
        raise ValueError("place and stream were both given: a streamed run has one store, of --stream.")
    if config.stream is not None:
        make_store(config.stream, config.stream_path)
    elif config.stream_path is not None:
        raise ValueError("stream_path was given without stream: expected stream=file.")
    segments = config.segments
    if segments is None or segments == "sqrt":
        return
    if not isinstance(segments, int) or segments < 1:
        raise ValueError(f"segments={segments!r}: expected sqrt, or a whole number of blocks in a segment.")


def resolve_device(name: str) -> str:
    """`name`, or for "auto" the GPU if there is one; ValueError for a device that this machine hasn't."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name!r}, but this PyTorch ({torch.__version__}) sees no CUDA device: use cpu.")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device={name!r}, but there are only {torch.cuda.device_count()} CUDA devices.")
    return name
