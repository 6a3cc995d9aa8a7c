"""``run``: measure every variant at every length."""

from __future__ import annotations

import contextlib
import errno
import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from pyckpt import measure
from pyckpt.compare.results import OUT_OF_MEMORY, PLAIN, Results, Row, label
from pyckpt.compare.variants import VARIANTS, Batch, Config, Workload
from pyckpt.errors import NOT_NEGATIVE, Range, as_int, check_dtype, number, positive_int
from pyckpt.measure.flops import block_flops, causal_lm_flops
from pyckpt.spec import BlockSpec

DEFAULT_LENGTHS = (512, 1024, 2048, 4096)
# The gradient error of a correct variant against plain, both rounding in this dtype, is well below these.
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_BUDGET = Range("None or a number of seconds, at least 0", NOT_NEGATIVE.holds)
_SHORTAGES = (RuntimeError, MemoryError, OSError)  # the kinds of error that `out_of_memory` may be true of


def run(
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    d_model: int = 256,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    d_ff: int | None = None,
    n_layers: int = 1,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    variants: Sequence[str] | None = None,
    repeats: int = 3,
    budget_seconds: float | None = None,
    *,
    vocab_size: int | None = None,
    tile: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> Results:
    """Train (forward and backward) the same weights on the same data in every variant at every length.

    Variants are "plain" (PyTorch's own functions, everything stored), "checkpoint" (`torch.utils.checkpoint`,
    non-reentrant, around each plain block), the save sets of `CkptTransformerBlock`, and "streamed" (the sequence in a
    file on a CPU, in host memory on a GPU; a stack without vocabulary still holds x and y whole); None is all of them.

    At the shortest length each variant's gradients are compared with those of "plain" first. Then, at each
    length, the memory of every variant is measured in a run of its own, and their times in turn in the same
    process.
    Gradients, weights and inputs are allocated before, and are not part of any figure.

    Args:
        lengths: tokens per sequence.
        vocab_size: None trains a stack of ``n_layers`` blocks on random hidden states; a number trains a
            causal LM of this vocabulary on random tokens, with its loss.
        tile: tokens in a tile of the save sets; None lets each choose.
        repeats: timed runs of each variant.
        budget_seconds: fewer repeats, and in the end fewer lengths, so that the whole ends in about this
            time; the shortest length is measured in any case. None: no limit.
        progress: called with a short line before each piece of work.
        options: further options of the block (``norm``, ``mlp``, ``window``, ``softcap``, ...), but no dropout: each
            variant would drop other values.

    Returns:
        Results, lengths ascending. A variant that runs out of memory, or of disk for its scratch file, has a row
        that says so. ``notes`` says what the budget left out.

    Raises:
        ValueError: for a bad length, variant or option; TypeError: for a dtype that is none. RuntimeError: when
            gradients differ from those of "plain".
    """
    lengths, chosen = _checked(lengths, variants)
    n_layers, batch = positive_int("n_layers", n_layers), positive_int("batch", batch)
    repeats = positive_int("repeats", repeats)
    words = as_int(vocab_size)
    if vocab_size is not None and (words is None or words < 2):
        raise ValueError(f"vocab_size must be None or an int of at least 2, got {vocab_size!r}: one word says nothing")
    if budget_seconds is not None:
        budget_seconds = number("budget_seconds", budget_seconds, _BUDGET)
    drawn = as_int(seed)
    if drawn is None or not 0 <= drawn < 1 << 63:
        raise ValueError(f"seed must be an int of at least 0 and below 2**63, got {seed!r}")
    check_dtype("dtype", dtype, optional=False)
    options = {"n_kv_heads": n_kv_heads, "d_ff": d_ff, **options}
    spec = BlockSpec.make(d_model, n_heads, **options)
    _check_comparable(spec, vocab_size)
    if vocab_size is not None:
        options.pop("causal", None)  # which a causal LM is
    config = Config(
        spec,
        options,
        n_layers,
        batch,
        dtype,
        torch.device(device),
        vocab_size=words,
        tile=tile,
        seed=drawn,
    )
    return _Run(config, chosen, repeats, budget_seconds, progress or (lambda _: None)).all(lengths)


class _OutOfMemoryError(Exception):
    """This variant ran out of memory."""

    def __init__(self, variant: str) -> None:
        super().__init__(variant)
        self.variant = variant


class _Run:
    def __init__(
        self,
        config: Config,
        variants: tuple[str, ...],
        repeats: int,
        budget: float | None,
        progress: Callable[[str], None],
    ) -> None:
        self.config = config
        self.variants = variants
        self.repeats = repeats
        self.budget = budget
        self.deadline = None if budget is None else time.monotonic() + budget
        self.progress = progress
        self.work = Workload(config, variants)
        self.results = Results(config.to_dict(), device_name(config.device), versions(), [])

    def all(self, lengths: list[int]) -> Results:
        self.progress(f"checking the gradients of {len(self.variants)} variants at S = {lengths[0]}")
        errors = self._gradient_errors(lengths[0])
        rate = 0.0  # seconds per model FLOP of one run of every variant
        for i, length in enumerate(lengths):
            flops = self._flops(length)
            if i and not self._worth_starting(rate * flops):
                left_out = ", ".join(map(str, lengths[i:]))
                self.results.notes.append(f"S = {left_out} left out: the time budget is spent.")
                break
            rows, seconds = self._measure(length, sum(map(self._flops, lengths[i:])))
            self.results.rows += [self._with_error(row, errors, lengths[0]) for row in rows]
            rate = seconds / flops
        return self.results

    def _worth_starting(self, round_seconds: float) -> bool:
        """Whether a length fits: it takes at least one measurement of memory and one timed run a variant."""
        if self.deadline is None or self.budget is None:
            return True
        # A longer length has larger, more efficient products than the one its time is guessed from.
        return time.monotonic() + 2 * round_seconds < self.deadline + 0.25 * self.budget

    def _measure(self, length: int, flops_to_come: float) -> tuple[list[Row], float]:
        """The rows of one length, and the seconds of one run of every variant."""
        try:
            batch = self.work.batch(length)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return [Row(length, variant, error=OUT_OF_MEMORY) for variant in self.variants], 0.0
        memory: dict[str, tuple[int, int] | str] = {}
        start = time.monotonic()
        for variant in self.variants:
            self.progress(f"S = {length}: memory of {variant}")
            memory[variant] = self._memory(variant, batch)
        seconds = time.monotonic() - start  # measuring memory takes a little longer than running
        repeats = self._affordable(seconds, self._flops(length) / flops_to_come)
        times = self._times(batch, length, memory, repeats)
        rows = [self._row(length, v, memory[v], times.get(v)) for v in self.variants]
        return rows, sum(stats.median for stats in times.values()) or seconds

    def _memory(self, variant: str, batch: Batch) -> tuple[int, int] | str:
        try:
            with measure.memory(self.work.model(variant), device=self.config.device) as m:
                self.work.step(variant, batch)()
        except _SHORTAGES as error:
            if not out_of_memory(error):
                raise
            if not isinstance(error, RuntimeError):  # of the machine, not of the device: what was short?
                self.results.notes.append(f"S = {batch.x.shape[1]}, {label(variant)}: {_reason(error)}.")
            return OUT_OF_MEMORY
        return m.peak_bytes, m.saved_bytes

    def _times(
        self, batch: Batch, length: int, memory: dict[str, tuple[int, int] | str], repeats: int
    ) -> dict[str, measure.Stats]:
        """Of the variants that have a figure in `memory`; one that runs out of memory now is noted there.

        The others are timed from the start again then: all in the same turns.
        """
        while steps := {v: self._named_step(v, batch) for v in self.variants if not isinstance(memory[v], str)}:
            self.progress(f"S = {length}: time of {len(steps)} variants in turn, {repeats} times")
            try:
                # The measurement of memory has warmed each variant up.
                return measure.interleaved(steps, repeats, warmup=0, device=self.config.device)
            except _OutOfMemoryError as error:
                memory[error.variant] = OUT_OF_MEMORY
        return {}

    def _named_step(self, variant: str, batch: Batch) -> Callable[[], None]:
        """A variant's step; where it runs out of memory, the error says which one did."""
        step = self.work.step(variant, batch)

        def run() -> None:
            try:
                step()
            except _SHORTAGES as error:
                if not out_of_memory(error):
                    raise
                raise _OutOfMemoryError(variant) from None

        return run

    def _affordable(self, round_seconds: float, share: float) -> int:
        """How many timed rounds fit into this length's share of the time left."""
        if self.deadline is None or self.budget is None:
            return self.repeats
        # Short lengths cost more than their FLOPs say, and little anyway: a twentieth is theirs in any case.
        allowance = max(share * (self.deadline - time.monotonic()), 0.05 * self.budget)
        return max(1, min(self.repeats, int(allowance / max(round_seconds, 1e-9))))

    def _row(self, length: int, variant: str, memory: tuple[int, int] | str, time_: measure.Stats | None) -> Row:
        if isinstance(memory, str) or time_ is None:
            return Row(length, variant, error=str(memory))
        return Row(
            length,
            variant,
            peak_bytes=memory[0],
            saved_bytes=memory[1],
            seconds=time_.median,
            iqr_seconds=time_.iqr,
            all_seconds=time_.all,
            model_flops=self._flops(length),
        )

    def _flops(self, length: int) -> float:
        c = self.config
        if c.vocab_size is not None:
            return causal_lm_flops(c.spec, c.n_layers, c.vocab_size, length, c.batch)
        return c.n_layers * block_flops(c.spec, length, c.batch)

    def _gradient_errors(self, length: int) -> dict[str, float]:
        """Each variant's relative gradient error against plain; a wrong variant is not worth timing.

        Variants for which the memory is not enough are left out, all of them where it is not enough for plain.
        """
        want = self._gradients(PLAIN, length)
        errors: dict[str, float] = {}
        unchecked = []
        for variant in self.variants:
            got = None if want is None else self._gradients(variant, length)
            if want is None or got is None:
                unchecked.append(variant)
                continue
            errors[variant] = _relative_error(got, want)
            limit = GRADIENT_TOLERANCE.get(self.config.dtype, 1e-1)
            if not errors[variant] <= limit:
                raise RuntimeError(
                    f"variant {variant!r} is wrong at S = {length}: its gradients differ from those of plain "
                    f"PyTorch by {errors[variant]:.2e} (relative), more than {limit:.0e}; nothing was timed"
                )
        if unchecked:
            self.results.notes.append(
                f"Gradients of {', '.join(unchecked)} not checked: out of memory at S = {length}."
            )
        return errors

    def _gradients(self, variant: str, length: int) -> list[Tensor] | None:
        """None where the memory is not enough."""
        try:
            return self.work.gradients(variant, self.work.batch(length))
        except _SHORTAGES as error:
            if not out_of_memory(error):
                raise
            return None

    @staticmethod
    def _with_error(row: Row, errors: dict[str, float], length: int) -> Row:
        if row.length != length or row.error is not None:
            return row
        return Row(**{**vars(row), "gradient_error": errors.get(row.variant)})


def device_name(device: torch.device) -> str:
    """What the figures were measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    try:
        from pyckpt._version import __version__

        found["pyckpt"] = __version__
    except ImportError:  # pragma: no cover
        pass
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine() or "CPU"


def _checked(lengths: Sequence[int], variants: Sequence[str] | None) -> tuple[list[int], tuple[str, ...]]:
    if not lengths or any((as_int(n) or 0) < 2 for n in lengths):
        raise ValueError(f"lengths must be one or more ints of at least 2, got {lengths!r}")
    chosen = VARIANTS if variants is None else tuple(dict.fromkeys(variants))
    unknown = [v for v in chosen if v not in VARIANTS]
    if unknown or not chosen:
        raise ValueError(
            f"variants {unknown or list(chosen)!r} don't exist; "
            f"expected one or more of {', '.join(map(repr, VARIANTS))}"
        )
    return sorted({int(n) for n in lengths}), chosen


def _check_comparable(spec: BlockSpec, vocab_size: int | None) -> None:
    """Raise ValueError for what the variants would not compute the same of."""
    for name in ("dropout", "attention_dropout"):
        if getattr(spec, name):
            raise ValueError(
                f"{name}={getattr(spec, name)}: each variant would drop other values, and their gradients could not be "
                "compared; leave it out"
            )
    if vocab_size is not None and not spec.causal:
        raise ValueError("causal=False with vocab_size: a causal LM sees no later tokens; leave one of them out")


def _relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    # Over all gradients together: some are zero by nature (a key's bias) and have no relative error.
    difference = sum((a.double() - b.double()).square().sum().item() for a, b in zip(got, want, strict=True))
    size = sum(b.double().square().sum().item() for b in want)
    if size == 0:
        return math.inf if difference else 0.0
    return (difference / size) ** 0.5


def out_of_memory(error: Exception) -> bool:
    """Of the device, of the machine, or of the disk that a streamed sequence is on."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    return full or isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or "out of memory"
