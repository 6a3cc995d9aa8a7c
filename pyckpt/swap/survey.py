"""What a model hands to its decoder layers: masks, positions and other arguments, seen in calls of its twin.

The twin (see `pyckpt.swap.shadow`) has a config with small windows, so that a window shows in a mask of a few tokens;
those of options with unheard-of names show in a longer one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt.swap.around import is_flattened
from pyckpt.swap.attention import names_limit
from pyckpt.swap.handing import HIDDEN, MASK, Arguments, Handing
from pyckpt.swap.layer import CALL
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.rope import MOVING
from pyckpt.swap.shadow import argument_names, attention_config, twin_of, unhooked, unsharded_class, untouched
from pyckpt.tokenwise.settings import mode
from pyckpt.vocab_parallel import is_dealt_out

SEQ = 11
_LONG = 1025  # of a call in which masks alone are looked at
# Of the twin's windows, a different one for each option that may be one; they count the query's own key.
_SMALL = (4, 5, 6, 7, 8, 9)
_PADDING = ((0, SEQ - 3), (2, SEQ))  # where the tokens of each row begin and end
_CUTS = (4, 7)  # where each row's second sequence begins


@dataclasses.dataclass(frozen=True)
class Handed:
    """What one layer is handed in a call of two rows of `SEQ` tokens, by name, and what it returns.

    `plain` are rows of one sequence each, `packed` of two (see `packed_positions`), of which the second does not see
    the first if `cut`. `window`: earlier keys that a token sees, None for all. `width` is that of the hidden states;
    `returns` the length of the tuple that is returned, with Nones after them, or 0 for no tuple.
    """

    plain: dict[str, Any]
    packed: dict[str, Any]
    window: int | None
    cut: bool
    returns: int
    width: int


@dataclasses.dataclass(frozen=True)
class Survey:
    """`handed`: by a layer's place, or why it can't be known.

    `cuts`: position_ids that start anew cut the model's masks. `maskless`: the model reads its mask for nothing but the
    layers' masks, and hands one of four dims on as it is. `axes`: it takes position_ids (axes, B, S), 3 of time, height
    and width, which cut nothing (Wang et al. 2024, Qwen2-VL, section 2.1); 0 where it does not. `text`: of one axis
    more, the first, which cuts its masks and does nothing else. `trains_without_cache`: it makes none in training,
    where it is not asked for one, though its config says so. `handing`: makes what is handed to the layers for a tile
    of tokens; None where that is not known to follow from their positions.
    """

    handed: dict[int, Handed | str]
    cuts: bool
    maskless: bool
    axes: int
    text: bool
    trains_without_cache: bool
    handing: Handing | None = None


def check_weights(module: nn.Module) -> None:
    """Raise `UnsupportedError` where the weights are not here to be run."""
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        if p.is_meta:
            raise UnsupportedError(f"{name} is on the meta device; swap the model when it has its weights")
        if is_dealt_out(p) or (p.numel() == 0 and hasattr(p, "ds_id")):
            raise UnsupportedError(f"{name} is sharded; swap the model before it is sharded")


def check_here(module: nn.Module) -> None:
    """Raise `UnsupportedError` where the module cannot be run outside of a call of the model."""
    check_weights(module)
    if is_flattened(module):
        raise UnsupportedError("it is sharded; swap the model before FSDP1 wraps it")


def forked(device: torch.device) -> AbstractContextManager[None]:
    """Inside, random numbers leave the generators of the CPU and of the device as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def cuts_by_positions(model: Any, paths: list[str]) -> bool | None:
    """Whether position_ids that start anew cut the masks; None where that can't be seen."""
    if packs_by_itself(model.config):
        return True
    try:
        return survey(model, paths).cuts
    except UnsupportedError:
        return None


def packs_by_itself(config: Any) -> bool:
    """The attention function is one that looks at position_ids itself."""
    return "flash" in str(getattr(config, "_attn_implementation", ""))


def survey(model: Any, paths: list[str]) -> Survey:
    """Call the model's twin with a few tokens; the model stays as it is. `paths` are those of its layers.

    Raises `UnsupportedError` where it can't be called, or where its masks are not those of causal attention.
    """
    check_here(model)
    scene = Scene(model, paths)
    plain = scene.run()
    lost = [place for place, call in plain.items() if CALL not in call]
    if lost or len(plain) < len(paths):
        raise UnsupportedError("its model does not hand further arguments on to its layers")
    padded = scene.run(attention_mask=_padding_mask(scene.device))
    packed, cuts = scene.packed(plain)
    long = scene.run(min(_LONG, getattr(model.config, "max_position_embeddings", None) or _LONG))
    handed: dict[int, Handed | str] = {}
    for place, call in plain.items():
        try:
            kinds = ((None, call), ("padded", padded[place]), ("packed" if cuts else None, packed[place]))
            windows = {scene.window(c.get(MASK), kind) for kind, c in kinds}
            if len(windows) > 1:
                raise UnsupportedError("padding or packing changes its window")
            if scene.window(long[place].get(MASK), None) not in windows:
                raise UnsupportedError("its mask is another one for more tokens")
            returns, width = scene.returned(place), call[HIDDEN].shape[-1]
            both = _arguments(call), _arguments(packed[place])
            handed[place] = Handed(*both, windows.pop(), cuts, returns, width)
        except UnsupportedError as reason:
            handed[place] = str(reason)
    maskless = scene.maskless(plain, padded)
    axes = scene.axes(plain)
    calls = [(plain, None), (packed, packed_positions(scene.device) if scene.takes_positions() else None), (long, None)]
    if axes:
        calls.append((scene.run(position_ids=scene.apart(axes).movedim(-1, 0)), scene.apart(axes)))
    handing = scene.handing(calls) if maskless else None
    text, without = bool(axes) and scene.text(plain, axes), scene.trains_without_cache(plain, axes)
    return Survey(handed, cuts, maskless, axes, text, without, handing)


def packed_positions(device: torch.device) -> Tensor:
    """position_ids (2, SEQ) of rows of two sequences each."""
    rows = [torch.cat([torch.arange(n, device=device), torch.arange(SEQ - n, device=device)]) for n in _CUTS]
    return torch.stack(rows)


def packed_lengths(device: torch.device) -> Tensor:
    """cu_seqlens of those rows, one after the other."""
    return torch.tensor([0, _CUTS[0], SEQ, SEQ + _CUTS[1], 2 * SEQ], dtype=torch.int32, device=device)


def far_positions(config: Any, device: torch.device) -> Tensor:
    """Of the tokens of two rows as one, as far as the model goes: not so far that a rounding of angles shows."""
    most = getattr(config, "max_position_embeddings", None) or _LONG
    return torch.arange(2 * SEQ, device=device) + max(0, min(most, _LONG) - 2 * SEQ)


def distant_positions(device: torch.device) -> Tensor:
    """Of as many tokens, as far as sequences go: angles in float32 are off there, by a few thousandths."""
    return torch.arange(2 * SEQ, device=device) * 2999 + 1


def on_axes(positions: Tensor, axes: int) -> Tensor:
    """(..., axes) of positions (...): others on each axis, as far off."""
    return torch.stack([positions] + [(positions * (2 * n + 1) + n) // (2 * n + 2) for n in range(1, axes)], -1)


def visible(kind: str | None, window: int | None, device: torch.device, seq: int = SEQ) -> Tensor:
    """(2, seq, seq): which key each query sees, causal, in rows that are plain (None), "padded" or "packed"."""
    token = torch.arange(seq, device=device)
    distance = token[:, None] - token
    seen = (distance >= 0).expand(2, seq, seq)
    if window is not None:
        seen = seen & (distance <= window)
    if kind == "padded":
        seen = seen & _padding_mask(device).bool()[:, None]
    elif kind == "packed":
        second = token >= torch.tensor(_CUTS, device=device)[:, None]
        seen = seen & (second[:, :, None] == second[:, None])
    return seen


def _padding_mask(device: torch.device) -> Tensor:
    mask = torch.zeros(2, SEQ, dtype=torch.long, device=device)
    for row, (start, stop) in zip(mask, _PADDING, strict=True):
        row[start:stop] = 1
    return mask


def _arguments(call: dict[str, Any]) -> dict[str, Any]:
    return {n: value for n, value in call.items() if n not in (CALL, HIDDEN, MASK)}


class Scene:
    """The twin of a model, whose layers write down what they are given and hand the hidden states on."""

    def __init__(self, model: Any, paths: list[str]) -> None:
        self._model, self._paths, self.config = model, paths, model.config
        if getattr(model.config, "layerdrop", 0):
            raise UnsupportedError("its model leaves out layers at random (layerdrop)")
        self.device = next(model.parameters()).device
        self._returns: dict[int, Any] = {}
        self._calls: dict[int, dict[str, Any]] = {}
        self._states: set[tuple[int, int]] = set()
        self._in_a_row = True  # a layer is handed what the one before has returned, to which nobody has written
        limits = sorted(n for n, v in vars(model.config).items() if _is_limit(n, v))
        lists = [
            n for n, v in vars(model.config).items() if names_limit(n) and isinstance(v, (list, tuple, dict)) and v
        ]
        inside = [n for n, v in vars(model.config).items() if hasattr(v, "_attn_implementation")]
        lists += [f"{n}.{m}" for n in inside for m, v in vars(getattr(model.config, n)).items() if _is_limit(m, v)]
        if lists or len(limits) > len(_SMALL):
            raise UnsupportedError(f"its config has options that may be windows: {', '.join(lists or limits)}")
        self._limits = dict(zip(limits, _SMALL, strict=False))
        self._vocab = int(getattr(model.config, "vocab_size", 2))
        replaced: dict[str, nn.Module] = {p: self._recorder(i, model.get_submodule(p)) for i, p in enumerate(paths)}
        for name, child in model.named_children():
            # Rotary embeddings may keep what they have seen.
            if next(child.parameters(), None) is None and next(child.buffers(), None) is not None:
                replaced[name] = copy.deepcopy(child)
        self._twin = twin_of(model, self._config, replaced)
        self._twin.__dict__["training"] = False

    def _config(self, path: str, config: Any) -> Any:
        return attention_config(config, "eager", **{n: v for n, v in self._limits.items() if n in vars(config)})

    def _recorder(self, place: int, layer: nn.Module) -> nn.Module:
        twin = twin_of(layer, self._config)
        own = unsharded_class(layer).forward
        names = argument_names(layer)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            self._calls[place] = given
            self._states.add((id(given[HIDDEN]), given[HIDDEN]._version))
            if place not in self._returns:
                with unhooked(layer):
                    self._returns[place] = own(twin, **{n: v for n, v in given.items() if n != CALL})
            made = self._returns[place]
            return (given[HIDDEN], *made[1:]) if isinstance(made, tuple) else given[HIDDEN]

        twin.__dict__["forward"] = forward
        return twin

    def run(self, seq: int = SEQ, **options: Any) -> dict[int, dict[str, Any]]:
        """What each layer is given in a call of two rows with these options."""
        self._calls, self._states = {}, set()
        generator = torch.Generator("cpu").manual_seed(0)
        self._ids = ids = torch.randint(0, self._vocab, (2, seq), generator=generator, device="cpu").to(self.device)
        try:
            with torch.no_grad(), forked(self.device), untouched(self._model):
                self._made = self._twin.forward(input_ids=ids, **{"use_cache": False, CALL: True, **options})
        except Exception as error:
            raise UnsupportedError(f"its model cannot be called for a look at it: {shown(error)}") from error
        if any(tuple(call[HIDDEN].shape[:-1]) != (2, seq) for call in self._calls.values()):
            raise UnsupportedError("its model hands hidden states of another shape to its layers")
        self._in_a_row = self._in_a_row and len(self._states) == 1
        return self._calls

    @contextlib.contextmanager
    def _in_training(self) -> Iterator[None]:
        """Inside, the twin itself is in training mode; the modules in it are the model's own."""
        self._twin.__dict__["training"] = True
        try:
            yield
        finally:
            self._twin.__dict__["training"] = False

    def surroundings(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a call in training mode: token ids, what the first layer is handed, and what becomes of the same after
        the last one."""
        with self._in_training(), mode(self._model, training=True):
            handed = self.run()[0][HIDDEN]
        if not self._in_a_row:
            raise UnsupportedError("its model does something between its layers")
        return self._ids, handed, self._made.last_hidden_state

    def takes_positions(self) -> bool:
        return "position_ids" in argument_names(self._twin)

    def packed(self, plain: dict[int, dict[str, Any]]) -> tuple[dict[int, dict[str, Any]], bool]:
        """A call with rows of two sequences, and whether its masks are cut between them."""
        if not self.takes_positions():
            return plain, False
        found = self.run(position_ids=packed_positions(self.device))
        pairs = [(call.get(MASK), found[place].get(MASK)) for place, call in plain.items()]
        return found, any(not _same_mask(a, b) for a, b in pairs if isinstance(a, Tensor) and a.dim() == 4)

    def axes(self, plain: dict[int, dict[str, Any]]) -> int:
        """position_ids (3, 2, seq) that start anew are taken, other than those of one axis, and change no mask: 3."""
        positions = packed_positions(self.device)
        try:
            one, three = (
                self.run(position_ids=torch.stack([positions, other, other])) for other in (positions, 2 * positions)
            )
        except UnsupportedError:
            return 0
        masks = all(_equal(call.get(MASK), plain[place].get(MASK)) for place, call in three.items())
        return 3 if masks and any(not same(one[place], call) for place, call in three.items()) else 0

    def apart(self, axes: int) -> Tensor:
        """Positions (2, SEQ, axes), which are others on each axis."""
        return on_axes(torch.arange(2 * SEQ, device=self.device).view(2, SEQ), axes)

    def trains_without_cache(self, plain: dict[int, dict[str, Any]], axes: int) -> bool:
        """In training masks are cut where positions start anew, though the config has a cache made by default.

        Of text, where that stands before other axes.
        """
        if not (getattr(self.config, "use_cache", False) and self.takes_positions()):
            return False
        positions = packed_positions(self.device)
        given = [positions, torch.stack([positions, *self.apart(axes).unbind(-1)])] if axes else [positions]
        try:
            with self._in_training():
                found = [self.run(position_ids=p, use_cache=None) for p in given]
        except UnsupportedError:
            return False
        pairs = ((call[MASK], calls[i].get(MASK)) for calls in found for i, call in plain.items() if _has_mask(call))
        return any(not _same_mask(*pair) for pair in pairs)

    def text(self, plain: dict[int, dict[str, Any]], axes: int) -> bool:
        """With a first axis more the masks are cut where its positions start anew, and layers turn by the others."""
        first, others = packed_positions(self.device), list(self.apart(axes).unbind(-1))
        try:
            more, three = (self.run(position_ids=torch.stack(p)) for p in ([first, *others], others))
        except UnsupportedError:
            return False
        cut = any(not _same_mask(call[MASK], more[i].get(MASK)) for i, call in plain.items() if _has_mask(call))
        return cut and all(_equal(_turning(call), _turning(three[i])) for i, call in more.items())

    def handing(self, calls: list[tuple[dict[int, dict[str, Any]], Tensor | None]]) -> Handing | None:
        """Makes what was handed to the layers in these calls, at positions (2, seq) or (2, seq, axes)."""
        modules = self._model.modules()
        if any(_moves(getattr(m, "rope_type", None)) for m in modules) or not self._in_a_row:
            return None
        try:
            found = Handing(self._model, self._paths, [self.returned(place) for place in range(len(self._paths))])
            with forked(self.device), untouched(self._model) as changed:
                same = all(self._made_by(found, call, positions) for call, positions in calls)
        except Exception:  # of any class anything may be met
            return None
        return found if same and not changed else None

    def _made_by(self, handing: Handing, call: dict[int, dict[str, Any]], given: Tensor | None) -> bool:
        """It makes what the layers were handed in this call, for tiles of any tokens."""
        seq = call[0][HIDDEN].shape[1]
        positions = torch.arange(seq, device=self.device).repeat(2) if given is None else given.flatten(0, 1)
        x = call[0][HIDDEN].flatten(0, 1)
        whole = {place: Arguments(_arguments(c), 2, seq) for place, c in call.items()}
        for rows in (slice(seq - 1, seq + 9), slice(2 * seq - 5, 2 * seq), slice(0, 6), slice(seq - 1, seq)):
            made = handing.of(x[rows], positions[rows])
            if not all(same(made[place], arguments.of(rows)) for place, arguments in whole.items()):
                return False
        return True

    def window(self, mask: Any, kind: str | None) -> int | None:
        """The layer's window, of the model's own config. Raises `UnsupportedError` for no mask of causal attention."""
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
            raise UnsupportedError("it is not handed a mask for all of its heads")
        seen = mask if mask.dtype == torch.bool else mask == 0
        if mask.dtype != torch.bool and bool((mask[~seen] > -1e4).any()):
            raise UnsupportedError("its mask adds numbers to the scores")
        seq = mask.shape[-1]
        seen = seen[:, 0].expand(2, seq, seq)
        # What padding sees does not matter.
        rows = _padding_mask(self.device).bool() if kind == "padded" else slice(None)
        if torch.equal(seen[rows], visible(kind, None, self.device, seq)[rows]):
            return None
        for name, small in self._limits.items():
            if torch.equal(seen[rows], visible(kind, small - 1, self.device, seq)[rows]):
                return int(getattr(self.config, name)) - 1
        raise UnsupportedError("its mask is not that of causal attention" + (f", {kind}" if kind else ""))

    def returned(self, place: int) -> int:
        made = self._returns[place]
        if isinstance(made, Tensor):
            return 0
        if not (isinstance(made, tuple) and isinstance(made[0], Tensor) and all(m is None for m in made[1:])):
            raise UnsupportedError("it returns more than hidden states")
        return len(made)

    def maskless(self, plain: dict[int, dict[str, Any]], padded: dict[int, dict[str, Any]]) -> bool:
        """The model's own mask of two dims, and one of four, change nothing but the layers' masks."""
        try:
            dummy = self.run(attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self.device))
        except UnsupportedError:
            return False
        return all(same(plain[i], padded[i]) and same(plain[i], dummy[i]) for i in plain)


def _moves(rope_type: Any) -> bool:
    """RoPE's frequencies depend on the length of the batch, of one of the kinds of layers at least."""
    kinds = rope_type.values() if isinstance(rope_type, dict) else (rope_type,)
    return any(kind in MOVING for kind in kinds)


def _is_limit(name: str, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0 and names_limit(name)


def _same_mask(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and b.dim() == 4 and torch.equal(*torch.broadcast_tensors(a, b))


def _has_mask(call: dict[str, Any]) -> bool:
    mask = call.get(MASK)
    return isinstance(mask, Tensor) and mask.dim() == 4


def _turning(call: dict[str, Any]) -> list[Any]:
    """What of a call's arguments is no whole number: RoPE's tables."""
    given = leaves(list(_arguments(call).values()))
    return [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Two calls of a layer are the same but for the mask."""
    pairs = [(a.get(n), b.get(n)) for n in a.keys() | b.keys() if n != MASK]
    return all(_equal(x, y) for x, y in pairs)


def _equal(a: Any, b: Any) -> bool:
    found, other = list(leaves(a)), list(leaves(b))
    return len(found) == len(other) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y) and x == y
        for x, y in zip(found, other, strict=True)
    )


def leaves(value: Any) -> Iterator[Any]:
    """What stands in tuples and lists, in order."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def shown(error: Exception) -> str:
    """The error in a line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"[:160]
