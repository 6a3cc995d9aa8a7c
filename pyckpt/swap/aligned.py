"""Losses of labels that are aligned with the logits: masked language models, and encoders with a decoder.

Whatever such a model does before its output embeddings (BERT's transform, T5's scaling) runs as it is: in a call with
labels the output embeddings keep their input and make no logits, and the loss is made of what they kept. That the
model's loss is the usual one is found out by its own forward on a few tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyckpt.functional import linear_cross_entropy
from pyckpt.ops.chunks import acc_dtype
from pyckpt.ops.seeding import seed_generators
from pyckpt.swap import projection as projections
from pyckpt.swap.around import called, foreign
from pyckpt.swap.by_thread import ByThread
from pyckpt.swap.heads import close, output_class, returns_dicts
from pyckpt.swap.modules import UnsupportedError
from pyckpt.swap.replaced import Replaced
from pyckpt.swap.shadow import argument_names, twin_of, untouched
from pyckpt.swap.survey import check_here, forked, shown
from pyckpt.swap.wanted import IGNORED, SwappedLoss, Wanted
from pyckpt.tokenwise.settings import mode

_SEQ = 7
_LOGITS = 40.0  # their size: beyond any softcap
_ITEMS = 5
_CACHES = ("past_key_values", "cache")
_OTHERS = ("ignore_index", "shift_labels")


@dataclasses.dataclass(frozen=True)
class Aligned:
    """What a model was seen to do with labels.

    decodes: they become the decoder's tokens where none are given. caches: a call with labels returns a cache. items:
    num_items_in_batch divides the sum of the losses; None: it is not taken, or does something else.
    """

    decodes: bool
    caches: bool
    items: bool | None


class SwappedProjection(Replaced):
    """The output embeddings' forward. Inside `taking` a call keeps its input, and gives zeros for one token."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self._of_call = ByThread()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        taken = self._of_call.taken
        if taken is None:
            return self.original(*args, **kwargs)
        (hidden,) = self.given(args, kwargs).values()
        taken.append((hidden, _nothing(self.module, hidden)))
        return taken[-1][1]

    @contextmanager
    def taking(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Of each call inside: its input, and what it gave."""
        taken: list[tuple[Tensor, Tensor]] = []
        self._of_call.taken = taken
        try:
            yield taken
        finally:
            self._of_call.taken = None


def _nothing(projection: Any, hidden: Tensor) -> Tensor:
    """Zeros (1, ..., V) in the place of logits: what the model adds to its logits is added to these."""
    return hidden.new_zeros(*[1] * (hidden.dim() - 1), projection.out_features)


class SwappedAligned(SwappedLoss):
    """With labels: the loss, by `linear_cross_entropy`, and no logits. Else, or where it can't be: the original."""

    def __init__(self, module: nn.Module, found: Aligned, projection: SwappedProjection, kind: bool | str) -> None:
        super().__init__(module, kind)
        self._found, self._projection, self._path = found, projection, _path_of(module, projection.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        why = self._own(given, given.pop("output_logits", False))
        if why is not None:
            return self._by_itself(given, why)
        others = [n for n, value in given.items() if value is not None and self._is_other(n)]
        if self.asks(given, "output_router_logits"):  # its loss has a share of the router's
            others.append("output_router_logits")
        if others:
            self.warn(f"{', '.join(others)} is for the model's own loss, which runs, with logits")
            return self._by_itself(given, f"{', '.join(others)} is for that")
        return self._checked(given)

    def _is_other(self, name: str) -> bool:
        """An argument that changes the loss in a way that is not ours."""
        if name == "num_items_in_batch":
            return self._found.items is None
        return name in _OTHERS or ("label" in name and name != "labels" and name not in Wanted.OURS)

    def _check(self) -> None:
        projection = self._projection.module
        if projections.of(self.module, projection) is not projection or not self._projection.in_place():
            raise UnsupportedError("its output embeddings are others than at the swap")
        projections.check(projection, replaced=True)
        _check_around(self.module, self._path)

    def _loss(self, given: dict[str, Any]) -> Any:
        model: Any = self.module
        labels, as_dict = given.pop("labels"), given.pop("return_dict", None)
        asked = (given.pop(n, None) for n in ("num_items_in_batch", *Wanted.OURS))
        wanted = self._wanted(labels, *asked)
        as_dict = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
        given |= self._for_labels(given, labels)
        with self._projection.taking() as taken:
            made = self.original(**given, **({} if as_dict else {"return_dict": True}))
        if len(taken) != 1:
            raise RuntimeError(
                f"{type(model).__name__} called its output embeddings {len(taken)} times in a call with labels, and "
                "once when it was swapped; swap it with loss=False"
            )
        (hidden, nothing), projection = taken[0], self._projection.module
        added = None if made.logits is nothing else made.logits.flatten()
        of_head = functools.partial(_of_head, projection, added, wanted, self.recompute)
        loss = self._handed_back(called(projection, of_head, hidden), wanted)
        rest = {n: value for n, value in made.items() if n not in ("loss", "logits")}
        made = type(made)(loss=loss, logits=None, **rest)
        return made if as_dict else made.to_tuple()

    def _for_labels(self, given: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        """What the model makes of labels for its decoder."""
        if not self._found.decodes:
            return {}
        named = given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None
        tokens = {} if named else {"decoder_input_ids": _decoder_tokens(self.module, labels)}
        return tokens if self._found.caches else {**tokens, "use_cache": False}

    def _wanted(self, labels: Tensor, items: Any, *ours: Any) -> Wanted:
        # Each label is given in its own place, as `shift_labels` are to a causal model.
        return Wanted.of(labels, items if self._found.items else None, labels, None, *ours)


def _of_head(projection: Any, added: Tensor | None, wanted: Wanted, recompute: bool, hidden: Tensor) -> Tensor:
    """added: (V,), to the logits."""
    x, weight = projections.factors(projection, hidden)
    biases = [b.to(x.device) for b in (projection.bias, added) if b is not None]
    labels = wanted.shifted().to(x.device)
    return linear_cross_entropy(
        x.reshape(*labels.shape, x.shape[-1]),
        weight,
        labels,
        bias=sum(biases[1:], biases[0]) if biases else None,
        ignore_index=IGNORED,
        reduction=wanted.reduction,
        token_weight=wanted.weights(x.device, labels.shape),
        label_smoothing=wanted.label_smoothing,
        z_loss=wanted.z_loss,
        recompute=recompute,
    )


def swapped(model: nn.Module, kind: bool | str) -> list[Replaced]:
    """What takes the place of the model's forward and of its output embeddings'. Raises as `tried` does."""
    projection = SwappedProjection(projections.of(model))
    return [projection, SwappedAligned(model, tried(model), projection, kind)]


# --- what a model does with labels ------------------------------------------------------------------------------


def tried(model: Any) -> Aligned:
    """What the model does with labels.

    Raises `UnsupportedError` where its logits are anything but its output embeddings' product with something, or its
    loss anything but the cross entropy of those with the labels.
    """
    projection = projections.of(model)
    projections.check(projection)
    _check_around(model, _path_of(model, projection))
    check_here(model)
    device = projection.weight.device
    with forked(device), torch.no_grad(), untouched(model):
        try:
            found = [_tried(model, projection, training) for training in (False, True)]
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(f"its forward cannot be tried out: {shown(error)}") from error
    if found[0].items != found[1].items or found[0].caches != found[1].caches:
        raise UnsupportedError("it does another thing with labels in training mode")
    return found[0]


def _path_of(model: nn.Module, projection: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is projection)


def _check_around(model: nn.Module, path: str) -> None:
    """Raise `UnsupportedError` where a module around the output embeddings has hooks, which would see no logits."""
    module = model
    for name in path.split(".")[:-1]:
        module = module.get_submodule(name)
        if foreign(module):
            raise UnsupportedError(f"{type(module).__name__} has forward hooks, which would see no logits")


def _tried(model: Any, projection: Any, training: bool) -> Aligned:
    given, labels = _inputs(model, projection)
    run = functools.partial(_run, model, projection, training, given)
    decoder = _decoder_tokens(model, labels) if decodes(model) else None
    taken, alone = run(factor=0.0, decoder=decoder, labels=None)
    factor = _LOGITS / float(projection(alone).float().std())
    made, hidden = run(factor=factor, decoder=None, labels=labels)
    if not close(alone, hidden, hidden.dtype):
        raise UnsupportedError("labels change what its output embeddings are given")
    logits = projection(hidden) * factor + taken.logits
    if not close(made.logits, logits, hidden.dtype):
        raise UnsupportedError("its logits are not those of its output embeddings alone")
    if taken.logits.numel() != projection.out_features:
        raise UnsupportedError("it adds to its logits what is not the same for all tokens")
    if not _is_loss(made.loss, made.logits, labels, "mean"):
        raise UnsupportedError("its loss is not the cross entropy of its logits with the labels")
    more = {n for n, value in made.items() if value is not None} ^ {n for n, v in taken.items() if v is not None}
    if more - {"loss", *_CACHES}:
        raise UnsupportedError(f"it makes {', '.join(sorted(more))} of labels or without them")
    return Aligned(decodes(model), more.isdisjoint(_CACHES), _items(run, factor, labels, made.logits))


def _items(run: Any, factor: float, labels: Tensor, logits: Tensor) -> bool | None:
    try:
        loss = run(factor=factor, decoder=None, labels=labels, num_items_in_batch=_ITEMS)[0].loss
    except TypeError:
        return None
    if _is_loss(loss * _ITEMS, logits, labels, "sum"):
        return True
    return False if _is_loss(loss, logits, labels, "mean") else None


def _is_loss(loss: Any, logits: Tensor, labels: Tensor, reduction: str) -> bool:
    """It is the cross entropy, in the dtype of the logits or in a better one."""
    rows = logits.flatten(0, 1)
    found = (F.cross_entropy(z, labels.flatten(), reduction=reduction) for z in (rows, rows.to(acc_dtype(rows.dtype))))
    return any(close(loss, expected, loss.dtype) for expected in found)


def _inputs(model: Any, projection: Any) -> tuple[dict[str, Any], Tensor]:
    """Arguments of a call, and labels (2, S)."""
    device, vocab, names = projection.weight.device, projection.out_features, argument_names(model)
    labels = torch.randint(vocab, (2, _SEQ), device=device)
    labels[0, :2] = IGNORED
    if decodes(model):
        width = getattr(model.config, "hidden_size", None)
        if not isinstance(width, int):
            raise UnsupportedError("its config has no hidden_size")
        encoded = torch.randn(2, _SEQ - 2, width, device=device, dtype=projection.weight.dtype)
        return {"encoder_outputs": output_class()(last_hidden_state=encoded)}, labels
    if model.main_input_name != "input_ids" or "input_ids" not in names:
        raise UnsupportedError(f"it takes {model.main_input_name}")
    tokens = torch.randint(vocab, (2, _SEQ), device=device)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, labels


def decodes(model: nn.Module) -> bool:
    """It is an encoder with a decoder."""
    return {"decoder_input_ids", "encoder_outputs"} <= set(argument_names(model))


def _decoder_tokens(model: Any, labels: Tensor) -> Tensor:
    """The labels, each one place later: by the model's own method, where it has one."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    first, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    return F.pad(labels[:, :-1], (1, 0), value=first).masked_fill(F.pad(labels[:, :-1] == IGNORED, (1, 0)), padding)


def _run(
    model: Any,
    projection: Any,
    training: bool,
    given: dict[str, Any],
    *,
    factor: float,
    decoder: Tensor | None,
    **labels: Any,
) -> tuple[Any, Tensor]:
    """What a twin returns whose logits are multiplied, and what its output embeddings are given."""
    loud = _Loud(projection, factor)
    path = _path_of(model, projection)
    twin = twin_of(model, lambda inner, config: config if inner else returns_dicts(config), {path: loud})
    if decoder is not None:
        given = given | {"decoder_input_ids": decoder}
    seed_generators(0, projection.weight.device)
    with mode(model, training):
        twin.__dict__["training"] = training
        made = twin.forward(**given, **labels)
    if len(loud.taken) != 1:
        raise UnsupportedError(f"it calls its output embeddings {len(loud.taken)} times")
    if not hasattr(made, "logits") or not type(made).__module__.startswith("transformers."):
        raise UnsupportedError(f"it returns a {type(made).__name__}, which is not known")
    return made, loud.taken[0]


class _Loud(nn.Module):
    """Output embeddings whose logits are multiplied; by 0: as those that make none."""

    def __init__(self, projection: Any, factor: float) -> None:
        super().__init__()
        self._projection, self._factor, self.taken = (projection,), factor, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_projection"][0], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.taken.append(hidden)
        projection = self._projection[0]
        return projection(hidden) * self._factor if self._factor else _nothing(projection, hidden)
