"""The forward of a causal language model whose loss makes no logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyckpt import errors
from pyckpt.attend.context import ContextParallel
from pyckpt.compiling import uncompiled
from pyckpt.exec.lm_ends import Ends, LossOptions
from pyckpt.functional import linear_cross_entropy
from pyckpt.shared_loss import shared_loss
from pyckpt.stream import Parts, options_of
from pyckpt.swap import ends, heads
from pyckpt.swap import projection as projections
from pyckpt.swap.around import called, foreign, gather
from pyckpt.swap.decoder import SwappedDecoder
from pyckpt.swap.ends import Places
from pyckpt.swap.heads import Scaling
from pyckpt.swap.layer import CALL
from pyckpt.swap.modules import UnsupportedError, is_own_forward
from pyckpt.swap.shadow import argument_names, unsharded_class
from pyckpt.swap.wanted import IGNORED, SwappedLoss, Wanted

KINDS = ("always", "recompute")
_UNSCALED = Scaling()


@dataclasses.dataclass(frozen=True)
class Head:
    """What a family does to its logits, and what it is made of.

    output: the class that the model returns, or the name of one in transformers.modeling_outputs. places: where the
    base model has what surrounds the layers, where that is known. `body`: which module right inside the base model it
    calls, "" for the base model itself; `dropped`: arguments that it does not hand on to that; `labelled`: it hands the
    labels on.
    """

    scaling: Scaling = _UNSCALED
    output: str | type = "CausalLMOutputWithPast"
    places: Places | None = None
    body: str = ""
    dropped: tuple[str, ...] = ()
    labelled: bool = False


_PLAIN = Head(places=Places())
_MIXTURE = Head(output="MoeCausalLMOutputWithPast", places=Places())
_DIVIDED = Scaling(divisor="logits_scaling")
_CAP = Scaling(softcap="final_logit_softcapping")
_SOFTCAPPED = Head(_CAP, places=Places())
HEADS = {
    "ArceeForCausalLM": _PLAIN,
    "Cohere2ForCausalLM": Head(Scaling(multiplier="logit_scale", of_model=True), places=Places()),
    "CohereForCausalLM": Head(Scaling(multiplier="logit_scale", of_model=True), places=Places()),
    "Ernie4_5ForCausalLM": _PLAIN,
    "Exaone4ForCausalLM": _PLAIN,
    "GPT2LMHeadModel": Head(
        output="CausalLMOutputWithCrossAttentions", places=Places("wte", "ln_f", table="wpe", dropout="drop")
    ),
    "GPTBigCodeForCausalLM": Head(
        output="CausalLMOutputWithCrossAttentions", places=Places("wte", "ln_f", table="wpe", dropout="drop")
    ),
    "GPTNeoXForCausalLM": Head(places=Places("embed_in", "final_layer_norm", dropout="emb_dropout")),
    "GemmaForCausalLM": _PLAIN,
    "Gemma2ForCausalLM": _SOFTCAPPED,
    "Gemma3ForCausalLM": _SOFTCAPPED,
    "GlmForCausalLM": _PLAIN,
    "Glm4ForCausalLM": _PLAIN,
    "GptOssForCausalLM": _MIXTURE,
    "GraniteForCausalLM": Head(_DIVIDED, places=Places(multiplier="embedding_multiplier")),
    "GraniteMoeForCausalLM": Head(_DIVIDED, output="MoeCausalLMOutputWithPast"),
    "HeliumForCausalLM": _PLAIN,
    "LlamaForCausalLM": _PLAIN,
    "MinistralForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "MixtralForCausalLM": _MIXTURE,
    "NanoChatForCausalLM": Head(_CAP),
    "NemotronForCausalLM": _PLAIN,
    "Olmo2ForCausalLM": _PLAIN,
    "Olmo3ForCausalLM": _PLAIN,
    "PhiForCausalLM": Head(places=Places(norm="final_layernorm", dropout="embed_dropout")),
    "Phi3ForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": _PLAIN,
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _MIXTURE,
    "SeedOssForCausalLM": _PLAIN,
    "SmolLM3ForCausalLM": _PLAIN,
    "Starcoder2ForCausalLM": Head(places=Places(dropout="embedding_dropout")),
    "VaultGemmaForCausalLM": Head(_CAP),
}


def head_of(model: nn.Module, decoders: Sequence[SwappedDecoder] = ()) -> Head:
    """The model's `Head`. Raises `UnsupportedError` where its loss is not known to be the usual one.

    `decoders` are those of which one may be its base model.
    """
    check(model)
    head = _known_head(model)
    base = heads.base_of(model)
    if not is_own_forward(unsharded_class(base)):
        head = dataclasses.replace(head, places=None)  # it may do anything around its layers
    if head.places is None and not head.body:
        layers = [d.paths for d in decoders if d.module is base and d.streams]
        return dataclasses.replace(head, places=ends.find(base, layers[0])) if layers else head
    return head


def _known_head(model: nn.Module) -> Head:
    kind = unsharded_class(model)
    # Another's class may have the same name, and a class another's forward.
    if kind.__name__ in HEADS and kind.__module__.startswith("transformers.models.") and is_own_forward(kind):
        return HEADS[kind.__name__]
    try:
        found = heads.tried(model)
    except UnsupportedError as reason:
        raise UnsupportedError(f"this class is not known, and {reason}") from reason
    return Head(found.scaling, found.output, body=found.called, dropped=found.dropped, labelled=found.labelled)


def check(model: nn.Module) -> None:
    """Raise `UnsupportedError` where the loss is not the usual one of plain output embeddings."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        raise UnsupportedError("its loss_function is not transformers' ForCausalLMLoss")
    projections.check(projections.of(model))


def _output_class(output: str | type) -> Any:
    from transformers import modeling_outputs

    return getattr(modeling_outputs, output) if isinstance(output, str) else output


class SwappedHead(SwappedLoss):
    """With labels: the loss, by `linear_cross_entropy`, and no logits. Else, or where it can't be: the original.

    With `context` processes share the sequences of a call whose loss it is, and no others.
    """

    def __init__(self, module: nn.Module, head: Head, kind: bool | str, context: ContextParallel | None = None) -> None:
        super().__init__(module, kind)
        self.head, self.context = head, context
        self.always |= context is not None  # no process has the logits of all tokens
        self._output = _output_class(head.output)
        self._fields = tuple(f.name for f in dataclasses.fields(self._output) if f.name not in ("loss", "logits"))
        self._handed_on_to_none = self._names_of_its_own()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.given(args, kwargs)
        asked = given.pop("output_logits", False) or not self._no_logits(given.get("logits_to_keep", 0))
        if self.asks(
            given, "output_router_logits"
        ):  # its loss has a share of the router's logits, which the layers would have to return
            return self._by_itself(given, "output_router_logits asks for the router's loss")
        own = [n for n in self._handed_on_to_none if given.get(n) is not None and given[n] is not False]
        if own:
            self.warn(f"{', '.join(own)} is for the model's own forward, which runs, with logits")
            return self._by_itself(given, f"{', '.join(own)} is for that")
        why = self._own(given, asked)
        return self._checked(given) if why is None else self._by_itself(given, why)

    def _by_itself(self, given: dict[str, Any], why: str) -> Any:
        if self.context is not None and self.module.training and torch.is_grad_enabled():
            self.warn(f"{why}: such a call runs whole in every process")
        return super()._by_itself(given, why)

    def _check(self) -> None:
        check(self.module)

    def _names_of_its_own(self) -> list[str]:
        """Arguments that it takes, that are not handed on, and of which nothing else is known."""
        handed = argument_names(self.body)
        if "input_ids" not in handed:  # a wrapper that hands on whatever it is given
            return []
        known = {"labels", "logits_to_keep", "return_dict", "use_cache", *Wanted.ARGUMENTS, *self.head.dropped}
        return [n for n in self.names if n not in known and n not in handed and not n.startswith("output_")]

    @property
    def body(self) -> nn.Module:
        """What gives the hidden states."""
        return heads.base_of(self.module).get_submodule(self.head.body)

    @property
    def _decoder(self) -> SwappedDecoder | None:
        """Its forward, where that is swapped."""
        forward = self.body.__dict__.get("forward")
        return forward if isinstance(forward, SwappedDecoder) else None

    @staticmethod
    def _no_logits(keep: Any) -> bool:
        return keep is None or (isinstance(keep, int) and keep == 0)

    def _loss(self, given: dict[str, Any]) -> Any:
        if self.context is not None and torch.compiler.is_compiling():
            return _uncompiled(self, given)  # what processes say to each other is nothing that a graph knows
        return self._made(given)

    def _made(self, given: dict[str, Any]) -> Any:
        model: Any = self.module
        labels = given["labels"] if self.head.labelled else given.pop("labels")
        for name in ("logits_to_keep", *self.head.dropped):
            given.pop(name, None)
        as_dict = given.pop("return_dict", None)
        wanted = Wanted.of(labels, *(given.pop(n, None) for n in Wanted.ARGUMENTS))
        decoder, loss, outputs, context = self._decoder, None, None, None
        if decoder is not None:
            given[CALL] = wanted.read
            if decoder.stream is not None:
                loss = _streamed_uncompiled(self, decoder, given, wanted)
            elif self.context is not None:
                given, context = self._told(decoder, given, wanted)
        if loss is None:
            tuples = not getattr(getattr(self.body, "config", None), "return_dict", True)
            outputs = self.body(**given, **({"return_dict": True} if tuples else {}))
            loss = self._of_hidden(outputs.last_hidden_state, wanted, context)
        elif loss.dim():
            loss = loss.view(labels.shape)
        made = self._output(
            loss=self._handed_back(loss, wanted), logits=None, **{n: getattr(outputs, n, None) for n in self._fields}
        )
        if as_dict is None:
            as_dict = getattr(model.config, "return_dict", True)
        return made if as_dict else made.to_tuple()

    def _told(
        self, decoder: SwappedDecoder, given: dict[str, Any], wanted: Wanted
    ) -> tuple[dict[str, Any], ContextParallel | None]:
        """The arguments, with what the layers are told, and the processes that share the call, where they do."""
        self._check_labels(decoder, given, wanted)
        why = self._why_whole(decoder, given)
        if why is not None:
            self.warn(f"{why}: such a call runs whole in every process")
            return given, None
        call = decoder.prepare({n: v for n, v in given.items() if n != CALL}, wanted.read, self.context)
        if call is None or call.context is None:
            return given, None
        self._check_whole(given, wanted, call.context)
        return given | {CALL: call}, call.context

    @staticmethod
    def _check_labels(decoder: SwappedDecoder, given: dict[str, Any], wanted: Wanted) -> None:
        if wanted.given.shape != decoder.tokens(given):
            raise ValueError(
                f"labels have shape {tuple(wanted.given.shape)}, expected those of the whole sequences, "
                f"{decoder.tokens(given)}"
            )

    def _why_whole(self, decoder: SwappedDecoder, given: dict[str, Any]) -> str | None:
        """Why processes can't share this call, where they can't."""
        if decoder.asks(given, "output_hidden_states"):
            return "output_hidden_states asks for those of all tokens"
        base = heads.base_of(self.module)
        around = ends.modules_of(base, self._places, projections.of(self.module))
        odd = next((m for m in around if foreign(m)), base if foreign(base, replaced=True) else None)
        return None if odd is None else f"its {type(odd).__name__} has forward hooks, which may mix tokens"

    @property
    def _places(self) -> Places:
        assert self.head.places is not None  # as `check_shared`, or `ends` in a streamed call, has seen
        return self.head.places

    def _check_whole(self, given: dict[str, Any], wanted: Wanted, context: ContextParallel) -> None:
        """What one process would find in its part, while others wait for it, all find in the whole."""
        device, ids = projections.of(self.module).weight.device, given.get("input_ids")
        stream = self._decoder.stream if self._decoder is not None else None
        said = None if stream is None else f"{options_of(stream.stream)}, segments={stream.segments}"
        told = {n: given.get(n) for n in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")}
        told |= {"labels": wanted.given, "token_weight": wanted.token_weight, "reduction": wanted.reduction}
        context.check_alike(device, **told, stream=said)
        errors.check_labels(wanted.given.to(device), _words(projections.of(self.module)), wanted.ignored, device)
        if ids is not None:
            embed: Any = ends.modules_of(heads.base_of(self.module), self._places, None)[0]
            errors.check_tokens(ids, _words(embed), ids.device, packed=False)
        if self._places.table is not None:
            table: Any = ends.modules_of(heads.base_of(self.module), self._places, None)[1]
            _check_places(given.get("position_ids"), wanted.given.shape[-1], _words(table))

    def _streamed(self, decoder: SwappedDecoder, given: dict[str, Any], wanted: Wanted) -> Tensor | None:
        """The loss, streamed from the token ids on; None where the layers alone are streamed, or nothing is."""
        if self.context is not None:
            self._check_labels(decoder, given, wanted)
        call = decoder.prepare({n: v for n, v in given.items() if n != CALL}, wanted.read)
        whole = "" if self.context is None else ", in every process all tokens"
        if call is None or call.stream is None:
            if whole:
                self.warn("a call that is not streamed runs whole in every process")
            return None
        try:
            _check_layers(decoder)
            ids = self._ids(given)
            self.ends()
        except UnsupportedError as reason:
            self.warn(f"{reason}: the layers are streamed, and not what surrounds them{whole}")
            return None
        model: Any = self.module
        base, projection = heads.base_of(model), projections.of(model)
        device = projection.weight.device
        if self.context is None:
            errors.check_labels(wanted.given.to(device), _words(projection), wanted.ignored, device)
        else:
            self._check_whole(given, wanted, self.context)
            call = dataclasses.replace(call, context=self.context)

        def run(start: Tensor) -> Tensor:
            around = dataclasses.replace(self.ends(wanted), start=start)
            return decoder.stream_loss(call, ids, wanted.targets(ids), around)

        gather(base)
        for module in ends.modules_of(base, self._places, projection):
            run = functools.partial(called, module, run)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        return run(torch.zeros((), device=device, requires_grad=trained))

    def streamed_parts(self) -> Parts | None:
        """What is streamed with the loss; None where that is the layers alone, or nothing."""
        parts = None if self._decoder is None else self._decoder.streamed_parts()
        try:
            return None if parts is None else dataclasses.replace(parts, ends=self.ends().weights, context=self.context)
        except UnsupportedError:
            return None

    def check_shared(self, decoder: SwappedDecoder | None) -> None:
        """Raise `UnsupportedError` where tokens may be mixed by something else than the layers' attention."""
        if decoder is None or not decoder.streams:
            raise UnsupportedError("some of its layers need the model's own forward")
        if self.head.places is None:
            raise UnsupportedError("what surrounds the layers of this class is not known")
        assert self.context is not None
        for layer in decoder.layers:
            like = layer.block.like_weights()
            self.context.attend(layer.block.plan(1, like.dtype, like.dtype, like.device).attend)

    def check_streamed(self, decoder: SwappedDecoder | None) -> None:
        """Raise `UnsupportedError` where the loss cannot be streamed from the token ids on, over these layers."""
        _check_layers(decoder)
        self.ends()

    @staticmethod
    def _ids(given: dict[str, Any]) -> Tensor:
        if given.get("input_ids") is None or any(given.get(n) is not None for n in ("inputs_embeds", "token_type_ids")):
            raise UnsupportedError("it is called with inputs_embeds or token_type_ids")
        return given["input_ids"]

    def ends(self, wanted: Wanted | None = None) -> Ends:
        """What surrounds the layers. Raises `UnsupportedError` where that is not known."""
        model: Any = self.module
        options = LossOptions(softcap=self._softcap or 0.0, ignore_index=IGNORED, scale=self._scale)
        if wanted is not None:
            numbers = {"label_smoothing": float(wanted.label_smoothing), "z_loss": float(wanted.z_loss)}
            options = dataclasses.replace(options, reduction=wanted.reduction, ignore_index=wanted.ignored, **numbers)
        places, run = self.head.places, wanted is not None
        return ends.ends_of(heads.base_of(model), places, projections.of(model), options, run)

    @property
    def _softcap(self) -> float | None:
        return self.head.scaling.cap(self.module.config)

    @property
    def _scale(self) -> float:
        scaling = self.head.scaling
        return scaling.scale(self.module if scaling.of_model else self.module.config)

    def _of_hidden(self, hidden: Tensor, wanted: Wanted, context: ContextParallel | None = None) -> Tensor:
        """The loss of hidden states (B, S, d_model), those of this process's tokens with `context`."""
        projection: Any = projections.of(self.module)

        def of_part(*given: Any) -> Tensor:
            return called(projection, functools.partial(self._of_head, projection, wanted, *given), hidden)

        targets = wanted.shifted().to(hidden.device)
        if context is None:
            lead = hidden.shape[:-1]
            return of_part(targets.reshape(lead), wanted.weights(hidden.device, lead), wanted.reduction)
        given = targets.shape
        targets = targets.reshape(hidden.shape[0], -1)  # packed rows may be one
        weights = wanted.weights(hidden.device, targets.shape)
        loss = shared_loss(context, targets, weights, wanted.ignored, wanted.reduction, of_part)
        return loss.view(given) if loss.dim() else loss

    def _of_head(
        self, projection: Any, wanted: Wanted, targets: Tensor, weights: Tensor | None, reduction: str, hidden: Tensor
    ) -> Tensor:
        (x, weight), bias = projections.factors(projection, hidden), projection.bias
        return linear_cross_entropy(
            x if self._scale == 1.0 else x * self._scale,
            weight,
            targets.to(x.device).reshape(x.shape[:-1]),
            bias=bias if bias is None or self._scale == 1.0 else bias * self._scale,
            ignore_index=wanted.ignored,
            reduction=reduction,
            token_weight=None if weights is None else weights.to(x.device).reshape(x.shape[:-1]),
            softcap=self._softcap,
            label_smoothing=wanted.label_smoothing,
            z_loss=wanted.z_loss,
            recompute=self.recompute,
        )


def _words(module: Any) -> int:
    """Of an embedding or a head, whose weight ZeRO-3 may have taken away."""
    weight = module.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _check_places(positions: Tensor | None, tokens: int, rows: int) -> None:
    """Raise ValueError where a table of positions has too few rows; on a GPU what is given is not looked at."""
    last = tokens - 1
    if positions is not None:
        if positions.is_cuda or not positions.numel():
            return
        first, last = int(positions.min()), int(positions.max())
        last = first if first < -rows else last
    if not -rows <= last < rows:
        raise ValueError(f"position {last} is out of range: the model has a table of {rows} positions")


_streamed_uncompiled = uncompiled(SwappedHead._streamed)
_uncompiled = uncompiled(SwappedHead._made)


def _check_layers(decoder: SwappedDecoder | None) -> None:
    if decoder is None or not decoder.streams:
        raise UnsupportedError("some of its layers are not streamed, or need the model's own forward")
