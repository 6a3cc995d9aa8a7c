"""Whether a decoder layer of any class can be cut at its attention, found by running it on a few random tokens.

The layer's own forward with eager attention, and the block that would stand in its place, run on random weights in
float32: the layer's own may hide a part (zeros in an adapter) or make attention nearly uniform. Outputs and all
gradients have to agree, for rows of one sequence and of two, in eval and in training mode, with dropout made idle,
tiles that end anywhere in a row, and one of a single token. What is then left to chance is a layer that behaves
differently for more tokens than these; the mask's window is read from the config (see `pyckpt.swap.survey`), and a
layer that counts tokens by itself before its attention is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyckpt.exec import node
from pyckpt.precision import exact_products
from pyckpt.swap import survey as surveys
from pyckpt.swap.generic import GenericMappedBlock
from pyckpt.swap.handing import MASK, Arguments
from pyckpt.swap.modules import UnsupportedError, passes
from pyckpt.swap.recognize import Cut
from pyckpt.swap.shadow import attention_config, twin_of, untouched
from pyckpt.swap.survey import SEQ, Handed, packed_lengths, visible
from pyckpt.swap.tap import Idle, Taken, Tap, configs_of, tapped
from pyckpt.swap.traced import Trace, TracedBlock, TracedTokenwise, cut_mapping, is_around, unit_of
from pyckpt.swap.unread import stand_in
from pyckpt.tokenwise.seeded import generator_states, have_drawn
from pyckpt.tokenwise.settings import mode

FAR = "far"  # a kind of rows, beside "plain" and "packed"
TILE = 7  # of 2 * SEQ tokens: it ends within rows, and the last tile is a single token
_CLOSE = 2e-4  # of the largest value; float32 roundings are far below, any other formula far above
_ODD_RATE = 0.375
_LAST = 4  # of modules: a gated MLP's three linear layers, and attention's beside it
_COUNTS = (torch.arange, torch.cumsum, Tensor.cumsum, torch.linspace)
_Forward = Callable[[Tensor, str, "Watch"], Tensor]  # of x (2, SEQ, width), a kind of rows, what watches functions
_UNREAD = ("output_attentions", "use_cache", "output_router_logits")


def check_steady(layer: nn.Module, block: GenericMappedBlock) -> None:
    """Raise `UnsupportedError` where the layer's own modules, run a second time, would compute something else.

    They draw random numbers by other means than dropout, or keep what they have seen (the vectors of a spectral norm).
    Nothing is found out where the weights are not here, or run on another device alone, as quantized ones may.
    """
    if not passes(surveys.check_here, layer):
        return
    device = next(layer.parameters()).device
    with (
        mode(layer, training=True),
        untouched(layer) as changed,
        surveys.forked(device),
        torch.no_grad(),
        Watch() as watch,
    ):
        before, (pre, post) = generator_states(device), block.parts
        try:
            dtype = next(p.dtype for p in pre.parameters() if p.is_floating_point())
            x = torch.ones(2, block.d_model, dtype=dtype, device=device)
            post(x, pre(x, torch.arange(2, device=device))[0])
        except Exception:  # of any module anything may be met
            return
        drawn = have_drawn(before, device) and not block.drops  # what drops gets a seed, and all draw from that
        block.draws = watch.drops and not block.drops
    if drawn:
        raise UnsupportedError("it draws random numbers for something else than dropout")
    if changed:
        raise UnsupportedError(f"its {changed[0]} keeps what it has seen")


class Probe:
    """A layer's own forward and others in its place, on random weights; see above."""

    def __init__(self, layer: nn.Module, handed: Handed, device: torch.device) -> None:
        self.layer, self.handed, self.device = layer, handed, device
        self.eager = twin_of(layer, lambda _, config: attention_config(config, "eager"))
        self.tap = Tap()
        self._configs = configs_of(layer, self.tap)
        self.weights = {n: _stand_in(p) for n, p in layer.named_parameters()}
        self.buffers = {n: _widened(b) for n, b in layer.named_buffers()}
        self.x = torch.randn(2, SEQ, handed.width, device=device)
        self.arguments = {kind: _widened_all(getattr(handed, kind)) for kind in ("plain", "packed")}

    @contextlib.contextmanager
    def handed_far(self, arguments: dict[str, Any]) -> Iterator[None]:
        """Inside there is a third kind, `FAR`: both rows as one, for which the layer is handed these arguments."""
        before = self.arguments.get(FAR)
        self.arguments[FAR] = _widened_all(arguments)
        try:
            yield
        finally:
            self.arguments[FAR] = before or {}

    def cut(self) -> Cut:
        """Where the layer calls its attention, and with what."""
        with mode(self.layer, training=False):
            path, called, taken, watch = self._taken()
            if taken.options.get("dropout"):
                raise UnsupportedError("its attention drops values in eval mode")
        if watch.counted:
            raise UnsupportedError("it counts tokens by itself before its attention")
        with mode(self.layer, training=True):
            dropout = self._where_dropout_is(path) or self._dropout()
        order = self._check_run(path)
        return Cut(self._put_together(path, taken, dropout), called, order, self.handed.width)

    def trace(self, cut: Cut, alike: dict[Any, Any]) -> Trace:
        trace = dataclasses.replace(cut.trace, **self._parameters(cut.trace, cut.called))
        key = self.key(trace)
        gradients = key not in alike
        trace = dataclasses.replace(trace, unread=self._unread(trace, alike.get(key)))
        try:
            draws = self.compare_modes(self._as_traced(trace), gradients)
        except UnsupportedError:
            if not trace.unread:
                raise
            # What no gradient depends on in eval mode, one may in training mode.
            trace = dataclasses.replace(trace, unread=())
            draws = self.compare_modes(self._as_traced(trace), gradients)
        alike[key] = trace.unread
        return dataclasses.replace(trace, draws=draws)

    def key(self, of: Any) -> Any:
        """What makes layers alike."""
        return type(self.layer), of, tuple((n, p.shape) for n, p in self.layer.named_parameters())

    # --- what attention is ----------------------------------------------------------------------------------------

    def _taken(self) -> tuple[str, dict[str, int | None], Taken, Watch]:
        """The path of the attention, the modules that were called before it (see `_calls`), and what it is given."""
        twin = tapped(self.layer, self._configs)
        called: dict[str, int | None] = {}
        with _calls(twin, called), Watch() as watch:
            taken = self.tap.take(lambda: self._call(twin, "plain", self.x[:1]))
        path = next((p for p, m in twin.named_modules() if m is taken.module), None)
        if path is None:
            raise UnsupportedError("the attention function is not called by a module of its own")
        return path, called, taken, watch

    def _dropout(self) -> float:
        return float(self._taken()[2].options.get("dropout") or 0.0)

    def _where_dropout_is(self, attention: str) -> str | None:
        """The path of the number or the `nn.Dropout` that attention's rate follows, inside the layer."""
        for path, holder, name in _rates(self.layer.get_submodule(attention), attention):
            before = getattr(holder, name)
            try:
                setattr(holder, name, _ODD_RATE)
                if self._dropout() == _ODD_RATE:
                    return path
            except Exception:  # a config may refuse it: no rate, then
                continue
            finally:
                setattr(holder, name, before)
        return None

    def _call(self, twin: nn.Module, kind: str, x: Tensor, mask: Tensor | None = None) -> Any:
        """What the twin returns for both rows of x, or for the first alone."""
        names = {n for n, _ in (*twin.named_parameters(), *twin.named_buffers())}
        values = {n: t for n, t in (self.weights | self.buffers).items() if n in names}
        of_both = self.arguments[kind]
        given = of_both if len(x) > 1 or kind == FAR else Arguments(of_both, 2, SEQ).of(slice(0, SEQ))
        return functional_call(twin, values, (x,), {**given, MASK: mask})

    def _check_run(self, attention: str) -> tuple[str, ...]:
        """The modules inside, in the order in which they are called.

        Raises `UnsupportedError` where a part of the layer is not run: its gradient would be 0 instead of None.
        """
        called: dict[str, int | None] = {}
        with mode(self.layer, training=False), _calls(self.eager, called), torch.no_grad():
            self.layer_forward(self.x, "plain")
        run = {unit_of(path, attention) for path in called}
        units = {unit_of(name, attention): name for name in self.weights}
        idle = sorted(unit for unit, name in units.items() if unit not in run and unit != name)
        if idle:
            raise UnsupportedError(f"it has {', '.join(idle)}, which it does not run")
        return tuple(path for path in called if path)

    def _put_together(self, path: str, taken: Taken, dropout: float | str) -> Trace:
        options, window = taken.options, self.handed.window
        self._check_options(options, taken)
        scale = options.get("scaling")
        return Trace(
            attention=path,
            n_heads=taken.n_heads,
            n_kv_heads=taken.n_kv_heads,
            head_dim=taken.head_dim,
            v_head_dim=taken.v_head_dim,
            window=(-1 if window is None else window, 0),
            softcap=float(options.get("softcap") or 0.0),
            scale=taken.head_dim**-0.5 if scale is None else float(scale),
            dropout=dropout,
            sinks=self._sinks(options.get("s_aux")),
            pre=(),
            post=(),
            idle=(),
            unread=(),
            arguments=tuple(self.handed.plain),
            returns=self.handed.returns,
            draws=False,
        )

    def _check_options(self, options: dict[str, Any], taken: Taken) -> None:
        """Every option of the attention function is one that ours has, or one that says nothing."""
        if options.get("is_causal") is False or getattr(taken.module, "is_causal", True) is False:
            raise UnsupportedError("its attention is not causal")
        for name in ("scaling", "softcap", "dropout"):
            if isinstance(options.get(name), Tensor):
                raise UnsupportedError(f"{name} of its attention is a tensor")
        window, told = self.handed.window, options.get("sliding_window")
        if "sliding_window" in options and (told is None) != (window is None):
            raise UnsupportedError(f"its attention is told of a window of {told}, and its mask shows {window}")
        if told is not None and told - 1 != window:
            raise UnsupportedError(f"its attention is told of a window of {told}, and its mask shows {window} + 1")
        known = {"scaling", "softcap", "dropout", "sliding_window", "s_aux", "is_causal", *_UNREAD, *self.handed.plain}
        odd = sorted(n for n, value in options.items() if n not in known and value is not None)
        if odd:
            raise UnsupportedError(f"its attention has the option {', '.join(odd)}")
        if taken.n_heads % taken.n_kv_heads or not len(taken.q) == len(taken.k) == len(taken.v) == SEQ:
            raise UnsupportedError("its queries, keys and values are not those of grouped heads")

    def _sinks(self, given: Tensor | None) -> str | None:
        if given is None:
            return None
        name = next((n for n, t in self.weights.items() if t is given), None)
        if name is None:
            raise UnsupportedError("its attention's sinks are not a parameter of its own")
        return name

    # --- which parameters and modules either part runs on ---------------------------------------------------------

    def _parameters(self, trace: Trace, called: dict[str, Any]) -> dict[str, Any]:
        units = {unit_of(path, trace.attention) for path in called if not is_around(path, trace.attention)}
        idle = self._idle(trace, {u: called[u] for u in units if called.get(u)})
        direct = {n for n in self.weights if unit_of(n, trace.attention) == n}
        pre = tuple(n for n in self.weights if n in direct or unit_of(n, trace.attention) in units)
        post = tuple(n for n in self.weights if unit_of(n, trace.attention) not in dict(idle))
        return {"pre": pre, "post": post, "idle": idle}

    def _idle(self, trace: Trace, shapes: dict[str, Any]) -> tuple[tuple[str, int], ...]:
        """The modules before attention whose output `post` does not read.

        Where their outputs are cut into heads, one head is enough: what is done with it (RoPE) is done for nothing.
        """
        o = self.some_o(trace)
        with mode(self.layer, training=False), torch.no_grad():
            whole = self.post({}, o, self.x[:1])
            idle: dict[str, int] = {}
            for path, full in shapes.items():
                for width in (*sorted({d for d in (trace.head_dim, trace.v_head_dim) if full % d == 0}), full):
                    tried: dict[str, nn.Module] = {p: Idle(w, noisy=True) for p, w in {**idle, path: width}.items()}
                    try:
                        made = self.post(tried, o, self.x[:1])
                    except Exception:  # somebody asks for the full width
                        continue
                    if made.shape == whole.shape and close(made, whole):
                        idle[path] = width
                        break
        return tuple(idle.items())

    def _unread(self, trace: Trace, known: tuple[str, ...] | None) -> tuple[str, ...]:
        """The modules after attention whose outputs no gradient depends on; of `known` ones all, or none.

        They are looked for from the last one on, the end of an MLP: linear layers, and a mixture's experts.
        """
        o, dy = self.some_o(trace), torch.randn_like(self.x[:1])
        idle: dict[str, nn.Module] = {path: Idle(width) for path, width in trace.idle}
        with mode(self.layer, training=False):
            truth = self._post_gradients(idle, o, dy)
            tries = [[path] for path in self._perhaps_unread(idle, o)] if known is None else [list(known)]
            found: list[str] = []
            for paths in tries:
                noisy = {p: stand_in(self.layer.get_submodule(p), noisy=True) for p in (*found, *paths)}
                try:
                    made = self._post_gradients(idle | {p: m for p, m in noisy.items() if m is not None}, o, dy)
                except Exception:  # it is called in another way than others of its kind
                    continue
                if all(close(made[n], t) for n, t in truth.items()):
                    found += paths
        return tuple(found)

    def _perhaps_unread(self, idle: dict[str, nn.Module], o: Tensor) -> list[str]:
        """The last ones that `post` calls, the last first."""
        called: dict[str, int | None] = {}
        with _calls(tapped(self.layer, self._configs, idle), called) as twin, torch.no_grad():
            self.tap.fill(lambda: self._call(twin, "plain", self.x[:1]), o)
        found = {path for path, m in self.layer.named_modules() if stand_in(m) is not None and path not in idle}
        return [path for path in reversed(called) if path in found][:_LAST]

    def some_o(self, trace: Trace) -> Tensor:
        return torch.randn(SEQ, trace.n_heads, trace.v_head_dim, device=self.device)

    def post(self, replaced: dict[str, nn.Module], o: Tensor, x: Tensor) -> Tensor:
        twin = tapped(self.layer, self._configs, replaced)
        made = self.tap.fill(lambda: self._call(twin, "plain", x), o)
        return made[0] if isinstance(made, tuple) else made

    def _post_gradients(self, replaced: dict[str, nn.Module], o: Tensor, dy: Tensor) -> dict[str, Tensor]:
        """Those of x, o and the weights."""
        made = self._results(lambda x, o: self.post(replaced, o, x), dy, x=self.x[:1], o=o)
        return {n: t for n, t in made.items() if n != "y"}

    # --- the comparison -------------------------------------------------------------------------------------------

    def compare_modes(self, block: _Forward, gradients: bool) -> bool:
        """`_compare` in eval and in training mode; whether a function drops values."""
        draws = False
        for training, kind in ((False, "plain"), (True, "packed")):
            with mode(self.layer, training), Watch() as watch:
                self._compare(block, kind, watch, gradients)
            draws = draws or watch.drops
        return draws

    def _compare(self, block: _Forward, kind: str, watch: Watch, gradients: bool) -> None:
        """Raise `UnsupportedError` where the block's output or gradients are not the layer's."""
        dy = torch.randn_like(self.x) if gradients else None
        before = generator_states(self.device)
        truth = self._results(lambda x: self.layer_forward(x, kind), dy)
        if have_drawn(before, self.device):
            raise UnsupportedError("it draws random numbers for something else than dropout")
        self._check_buffers()
        if not close(self._results(lambda x: self.layer_forward(x, kind), None)["y"], truth["y"]):
            raise UnsupportedError("it gives different results when it runs again")
        ours = self._results(lambda x: block(x, kind, watch), dy)
        floor = max((float(t.abs().max()) for n, t in truth.items() if n != "y"), default=0.0)
        odd = [n for n, t in truth.items() if not close(ours[n], t, 0.0 if n == "y" else 0.01 * floor)]
        if odd:
            what = "its output" if "y" in odd else f"the gradient of {odd[0]}"
            raise UnsupportedError(f"{what} is not that of its parts around attention (tried with random weights)")

    def _results(self, forward: Callable[..., Tensor], dy: Tensor | None, **inputs: Tensor) -> dict[str, Tensor]:
        """The output y and, with dy, the gradients of the inputs, by default x, and of the weights."""
        leaves = {n: t.clone().requires_grad_() for n, t in (inputs or {"x": self.x}).items()}
        given = leaves | {n: t for n, t in self.weights.items() if t.requires_grad}
        with torch.enable_grad():
            y = forward(*leaves.values())
        _check_leaves(y, list(given.values()))
        if dy is None:
            return {"y": y.detach()}
        grads = torch.autograd.grad(y, list(given.values()), dy, allow_unused=True)
        made = {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(given.items(), grads, strict=True)}
        return {"y": y.detach(), **made}

    def layer_forward(self, x: Tensor, kind: str) -> Tensor:
        if kind == FAR:
            seen = visible(None, self.handed.window, self.device, 2 * SEQ)[:1]
            made = self._call(self.eager, kind, x.reshape(1, 2 * SEQ, -1), _adding(seen))
            return (made[0] if isinstance(made, tuple) else made).view(x.shape)
        seen = visible("packed" if kind == "packed" and self.handed.cut else None, self.handed.window, self.device)
        made = self._call(self.eager, kind, x, _adding(seen))
        return made[0] if isinstance(made, tuple) else made

    def _as_traced(self, trace: Trace) -> _Forward:
        return lambda x, kind, watch: self._traced_forward(trace, x, kind, watch)

    def _traced_forward(self, trace: Trace, x: Tensor, kind: str, watch: Watch) -> Tensor:
        mapping = cut_mapping(self.layer, trace.attention, self.handed.width, "probe")
        block = TracedBlock(self.layer, mapping, "attention", TILE, trace)
        weights = block.named(self.weights)
        with block.called_with(self.arguments[kind], 2, SEQ):
            plan = block.plan(2 * SEQ, x.dtype, x.dtype, self.device)
        if isinstance(plan.tokenwise, TracedTokenwise):
            plan.tokenwise.around = watch  # in its backward no mode of the caller's is on
        run = node.Run([plan], [tuple(weights)], x.dtype)
        # No seed: attention drops nothing.
        rest = (None, tuple(weights.values()))
        if kind == "packed" and self.handed.cut:
            return node.execute(run, x.flatten(0, 1), None, packed_lengths(self.device), *rest).view(x.shape)
        return node.execute(run, x, None, None, *rest)

    def _check_buffers(self) -> None:
        for name, buffer in self.layer.named_buffers():
            if not torch.equal(_widened(buffer), self.buffers[name]):
                raise UnsupportedError(f"it changes its buffer {name}")


def _rates(module: nn.Module, path: str) -> Iterator[tuple[str, Any, str]]:
    """What may be a rate of dropout: its path, what has it, and its name there."""
    for prefix, holder in ((path, module), (f"{path}.config", getattr(module, "config", None))):
        values = dict(getattr(holder, "__dict__", {}))
        yield from ((f"{prefix}.{n}", holder, n) for n, v in values.items() if "drop" in n and type(v) in (int, float))
    yield from ((f"{path}.{n}", child, "p") for n, child in module.named_children() if type(child) is nn.Dropout)


def _stand_in(p: Tensor) -> Tensor:
    """Random numbers for a parameter: matrices that keep the size of what they multiply, vectors around 1.

    Parameters too: of a tensor that is none PEFT's `target_parameters`, which parametrize in a call, make a buffer.
    """
    if not p.is_floating_point():
        return nn.Parameter(p.detach(), requires_grad=False)
    made = torch.randn(p.shape, device=p.device)
    return nn.Parameter(made * (p.shape[-1] * p.shape[-2]) ** -0.25 if p.dim() > 1 else 1.0 + 0.3 * made)


def _widened(t: Tensor) -> Tensor:
    """A copy, in float32 where it is of another floating dtype."""
    return t.detach().to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)


def _widened_all(values: Any) -> Any:
    if isinstance(values, dict):
        return {n: _widened_all(v) for n, v in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(_widened_all(v) for v in values)
    return _widened(values) if isinstance(values, Tensor) else values


def _adding(seen: Tensor) -> Tensor:
    """A mask that is added to scores, of what is seen (rows, S, S)."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, lowest)[:, None]


def close(a: Tensor, b: Tensor, floor: float = 0.0) -> bool:
    return bool(a.isfinite().all()) and float((a - b).abs().max()) <= _CLOSE * max(float(b.abs().max()), floor)


def _check_leaves(y: Tensor, known: list[Tensor]) -> None:
    """Raise `UnsupportedError` where y depends on a tensor with a gradient that is none of these."""
    ids, seen, todo = {id(t) for t in known}, set(), [y.grad_fn]
    while todo:
        fn = todo.pop()
        if fn is None or fn in seen:
            continue
        seen.add(fn)
        if id(getattr(fn, "variable", known[0])) not in ids:
            raise UnsupportedError("it runs on parameters that are not its own")
        todo += [f for f, _ in fn.next_functions]


class Watch(TorchFunctionMode):
    """Makes dropout idle and writes down whether there was any (`drops`), or a count of tokens (`counted`)."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = self.counted = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | (kwargs or {})
        if func is F.dropout:
            self.drops = self.drops or (given.get("p", 0.5) > 0.0 and given.get("training", True))
            return given["input"]
        self.counted = self.counted or func in _COUNTS
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _calls(twin: nn.Module, called: dict[str, int | None]) -> Iterator[nn.Module]:
    """Writes down the modules that are called, by path, with the width of an output that goes by the input's rows."""
    paths = {module: path for path, module in twin.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        if module in paths:
            called.setdefault(paths[module], None)

    def after(module: nn.Module, args: Any, made: Any) -> None:
        if module in paths and args and isinstance(args[0], Tensor) and isinstance(made, Tensor):
            by_row = made.shape[:-1] == args[0].shape[:-1]
            called[paths[module]] = made.shape[-1] if by_row else None

    handles = (
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after),
    )
    try:
        yield twin
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Products in float32 proper, whatever the caller has chosen."""
    with exact_products(), torch.autocast(device.type, enabled=False):
        yield
