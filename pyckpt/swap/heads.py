"""Whether the loss of a causal language model of any class is the usual one of its output embeddings' product.

Found by running the model's own forward on random hidden states in the place of those that its layers would make.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.ops.chunks import acc_dtype
from pyckpt.swap import projection as projections
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.parallel import shards_words
from pyckpt.swap.shadow import twin_of
from pyckpt.swap.survey import check_here, forked, shown

_SEQ = 7
_LOGITS = 40.0  # their size: beyond any softcap
# What is in the names of options that logits are multiplied or divided by, and that they are capped at.
_SCALES, _SOFTCAPS = ("scal", "multipl"), ("softcap", "soft_cap")


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What becomes of a product with the output embeddings, by options of the config: dotted names, or None.

    of_model: the numbers that multiply and divide are the model's own.
    """

    multiplier: str | None = None
    divisor: str | None = None
    softcap: str | None = None
    of_model: bool = False

    def scale(self, config: Any) -> float:
        """What the product is multiplied by, before it is capped."""
        scale = float(_option(config, self.multiplier)) if self.multiplier else 1.0
        return scale / float(_option(config, self.divisor)) if self.divisor else scale

    def cap(self, config: Any) -> float | None:
        return _option(config, self.softcap) if self.softcap else None

    def of(self, logits: Tensor, config: Any) -> Tensor:
        """The logits, float32 or float64, of a product."""
        logits, cap = logits.to(acc_dtype(logits.dtype)) * self.scale(config), self.cap(config)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _option(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


@dataclasses.dataclass(frozen=True)
class Tried:
    """What a model was seen to do: the class of transformers that it returns, and the module that it calls.

    That is its base model, "", or one right inside that, by name (OPT's "decoder"). `dropped`: arguments that it does
    not hand on to that module, which has none of these names. `labelled`: it hands the labels on. `scaling`: what it
    does to its logits.
    """

    output: type
    called: str
    dropped: tuple[str, ...]
    labelled: bool
    scaling: Scaling


def base_of(model: Any) -> nn.Module:
    """The model's base model; where the class names none that it has, the one that it calls `model`."""
    base = model.base_model
    return base if base is not model else getattr(model, "model", model)


def tried(model: Any) -> Tried:
    """What the model does with labels.

    Raises `UnsupportedError` where its logits are anything but its output embeddings' product with the hidden states,
    scaled and capped by its config, or its loss anything but the cross entropy of those with the next tokens.
    """
    projection = projections.of(model)
    if not shards_words(projection):
        check_here(projection)
    # Processes have to draw the same, whatever device tensors are made on by default.
    device, drawing = projection.weight.device, torch.Generator("cpu").manual_seed(0)
    with forked(device), torch.no_grad():
        hidden = torch.randn(2, _SEQ, projection.in_features, generator=drawing, device="cpu")
        hidden = hidden.to(device, projection.weight.dtype)
        hidden = hidden * (_LOGITS / projection(hidden).float().std()).to(hidden.dtype)
        labels = torch.randint(0, projection.out_features, (2, _SEQ), generator=drawing, device="cpu").to(device)
        labels[0, :2] = -100
        found = _tried(model, hidden, labels, False, _scalings(model.config))
        # As large again after what it does to them, which nothing else may fit as well.
        hidden = hidden / found.scaling.scale(model.config)
        for training in (False, True):
            _tried(model, hidden, labels, training, [found.scaling])
    return found


def _scalings(config: Any) -> list[Scaling]:
    """What the config's options may do to logits, nothing first."""
    text = config.get_text_config()
    inside = [""] if text is config else ["", *(f"{n}." for n, value in vars(config).items() if value is text)]
    numbers = [
        prefix + name
        for prefix in inside
        for name, value in vars(text if prefix else config).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
    ]
    scales = [n for n in numbers if any(part in n for part in _SCALES) and _option(config, n) != 1.0]
    caps = [None, *(n for n in numbers if any(part in n for part in _SOFTCAPS))]
    return [
        Scaling(**by, softcap=cap)
        for cap in caps
        for by in ({}, *({kind: n} for n in scales for kind in ("multiplier", "divisor")))
    ]


def _tried(model: Any, hidden: Tensor, labels: Tensor, training: bool, scalings: list[Scaling]) -> Tried:
    """Calls the model with labels, and with hidden states in the place of those that it would make."""
    from transformers.utils import ModelOutput

    mask = torch.ones_like(labels)
    mask[1, -2:] = 0  # padding that has labels, which some models leave out of their loss
    given = {
        "input_ids": labels.clamp_min(0),
        "attention_mask": mask,
        "position_ids": torch.arange(_SEQ, device=labels.device)[None],
    }
    base = _Given(hidden, base_of(model))
    try:
        made = _twin(model, base, training).forward(**given, labels=labels)
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"its forward cannot be tried out: {shown(error)}") from error
    called = base.calls()
    if len(called) != 1:
        raise UnsupportedError(f"it calls its base model {len(called)} times")
    path, arguments = called[0]
    dropped = tuple(n for n in given if n not in arguments and n not in base.names_of(path))
    labelled = arguments.get("labels") is labels
    if labelled:
        del arguments["labels"]
    odd = [n for n, value in given.items() if n not in dropped and arguments.get(n) is not value]
    odd += [n for n, value in arguments.items() if n not in given and not _is_plain(value)]
    if odd:
        raise UnsupportedError(f"it calls its base model with other arguments than its own: {', '.join(odd)}")
    known = isinstance(made, ModelOutput) and type(made).__module__.startswith("transformers.")
    if not known:
        raise UnsupportedError(f"it returns a {type(made).__name__}, which is not known")
    product = projections.of(model)(hidden)
    loss, logits = made.get("loss"), made.get("logits")  # an output of another kind has neither
    scaling = next((s for s in scalings if close(logits, s.of(product, model.config), hidden.dtype)), None)
    if scaling is None or not close(loss, _loss(logits, labels), torch.float32):
        raise UnsupportedError("its logits or loss are not those of its output embeddings alone")
    more = sorted({n for n, value in made.items() if value is not None} - {"loss", "logits"})
    if more:
        raise UnsupportedError(f"it makes {', '.join(more)} beside its logits")
    return Tried(type(made), path, dropped, labelled, scaling)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _twin(model: Any, given: _Given, training: bool) -> nn.Module:
    """The model's twin, in which `given` stands for its base model."""
    base = base_of(model)
    path = next((n for n, m in model.named_modules() if m is base and n), None)
    if path is None:
        raise UnsupportedError("its base model is not a module of its own")
    twin = twin_of(model, lambda inner, config: config if inner else returns_dicts(config), {path: given})
    twin.__dict__["training"] = training
    return twin


def returns_dicts(config: Any) -> Any:
    """The config, or a copy where it asks for tuples."""
    if getattr(config, "return_dict", True):
        return config
    made = copy.copy(config)
    made.return_dict = True
    return made


class _Given(nn.Module):
    """Returns these hidden states, and has what it was called with. So do the modules right inside it.

    Its plain attributes are those of the base model.
    """

    def __init__(self, hidden: Tensor, base: nn.Module, path: str = "") -> None:
        super().__init__()
        self._hidden, self._path, self.config = hidden, path, getattr(base, "config", None)
        self._base = (base,)  # in a tuple: no module of this one
        self._called: list[tuple[str, dict[str, Any]]] = []
        self._names = list(inspect.signature(base.forward).parameters)
        self._inside = {} if path else {n: _Given(hidden, m, n) for n, m in base.named_children()}

    def __getattr__(self, name: str) -> Any:
        inside = self.__dict__.get("_inside", {})
        if name in inside:
            return inside[name]
        base = self.__dict__.get("_base", (None,))[0]
        value = None if base is None else vars(base).get(name)
        return value if isinstance(value, (bool, int, float, str)) else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self._called.append((self._path, dict(zip(self._names, args, strict=False)) | kwargs))
        return output_class()(last_hidden_state=self._hidden)

    def names_of(self, path: str) -> list[str]:
        """The names of the arguments of the module at this path."""
        return self._inside[path]._names if path else self._names

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """Of it and of those inside: which, and with which arguments."""
        return [call for given in (self, *self._inside.values()) for call in given._called]


@functools.cache
def output_class() -> Any:
    """A base model's output: whatever models of any kind look for in it is there, and None."""
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    return Output


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def close(a: Any, b: Tensor, dtype: torch.dtype) -> bool:
    if not isinstance(a, Tensor) or a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    # Roundings alone: the products are the same. A half precision's norm of them is a quarter of its eps.
    allowed = max(torch.finfo(dtype).eps, 16 * torch.finfo(torch.float32).eps)
    return float((a.to(b.dtype) - b).norm()) <= allowed * float(b.norm())
