"""Layers of odd classes in `pyckpt.swap`: around attention may stand anything, and nothing deceives the probe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from swap_models import EXPERTS, KINDS, InFloat64, assert_same_with_every_save_set, check, make_batch, make_model, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.swap.unread import Unread

transformers = pytest.importorskip("transformers")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")


pytestmark = pytest.mark.usefixtures("no_fallback")


class OddAttention(llama.LlamaAttention):
    """A Llama's attention, with places for what is odd."""

    function = staticmethod(llama.eager_attention_forward)

    def before(self, hidden: Tensor) -> Tensor:
        return hidden

    def options(self, hidden: Tensor) -> dict[str, Any]:
        return {}

    def mask(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def after(self, o: Tensor, hidden: Tensor, v: Tensor) -> Tensor:
        return self.o_proj(o)

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        hidden = self.before(hidden_states)
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = llama.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.function)
        options = {"dropout": 0.0, "scaling": self.scaling, **self.options(hidden)}
        o = attend(self, q, k, v, self.mask(attention_mask), **options)[0].flatten(2)
        return self.after(o, hidden_states, v), None


class OddDecoderLayer(llama.LlamaDecoderLayer):
    """A Llama's layer around it."""

    attention: type = OddAttention

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = self.attention(config, layer_idx)

    def outer(self, mid: Tensor, made: Tensor) -> Any:
        return mid + made

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        x = hidden_states
        mid = x + self.self_attn(self.input_layernorm(x), position_embeddings, attention_mask)[0]
        return self.outer(mid, self.mlp(self.post_attention_layernorm(mid)))


def odd_model(kind: type, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A Llama whose one layer, or that layer's attention, is of this class."""
    model = make_model("Llama", num_hidden_layers=1, **options)
    if issubclass(kind, OddAttention):
        kind = type("OddDecoderLayer", (OddDecoderLayer,), {"attention": kind})
    layer = kind(model.config, 0)
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.1 * torch.randn_like(p)
    model.model.layers[0] = layer
    return model.to(dtype).train()


# --- what is right ---------------------------------------------------------------------------------------------------


class Gated(OddAttention):
    """Reads what it was given, and its values, after attention too; scores have another scale."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, config.hidden_size)

    def options(self, hidden):
        return {"scaling": 0.4}

    def after(self, o, hidden, v):
        values = v.repeat_interleave(self.num_key_value_groups, 1).transpose(1, 2).flatten(2)
        return self.o_proj(o * self.gate(hidden).sigmoid() + 0.3 * values)


class Weighed(OddDecoderLayer):
    attention = Gated

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def outer(self, mid, made):
        return self.weight * mid - 0.4 * made


class Scaled(OddDecoderLayer):
    """The gradient of the gain, and no other, depends on what the MLP makes."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.gain = nn.Parameter(torch.ones(config.hidden_size))

    def outer(self, mid, made):
        return mid + self.gain * made


class ReadInTraining(OddDecoderLayer):
    """In training mode gradients depend on what the MLP makes."""

    def outer(self, mid, made):
        return mid + (made.sigmoid() if self.training else made)


def softcapped(module, query, key, value, attention_mask, scaling, softcap, **kwargs):
    """Attention as its options say, softcap among them."""
    groups = module.num_key_value_groups
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap) + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class Softcapped(OddAttention):
    function = staticmethod(softcapped)

    def options(self, hidden):
        return {"softcap": 0.7}


@pytest.mark.parametrize("kind", [OddDecoderLayer, Weighed, Scaled, ReadInTraining, Softcapped])
def test_what_stands_around_attention_may_be_anything(kind):
    """With every save set, whose gradients are the same bits."""
    model = odd_model(kind, **({"attn_implementation": "eager"} if kind is Softcapped else {}))
    check(model, [make_batch(kind) for kind in KINDS])
    pyckpt.unswap(model)
    assert_same_with_every_save_set(model)


class Dropping(OddDecoderLayer):
    """Drops values by a function, of which no module tells."""

    def outer(self, mid, made):
        return mid + F.dropout(made, 0.3, self.training)


def test_what_a_function_drops_is_dropped_again():
    """The gradient is the slope of the loss with the same values dropped; another seed drops others."""
    model = odd_model(Dropping, torch.float64)
    assert_same_with_every_save_set(model, seed=3)
    batch = make_batch("padded")
    pyckpt.swap(model, tile=10)
    weight = model.model.layers[0].self_attn.v_proj.weight

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        with InFloat64():
            return model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0].square().sum()

    assert loss(3) == loss(3) != loss(4)
    (grad,) = torch.autograd.grad(loss(3), weight)
    direction, eps, ends = torch.randn_like(weight), 1e-6, []
    for scale in (eps, -2 * eps):
        with torch.no_grad():
            weight += scale * direction
            ends.append(loss(3))
    slope = (ends[0] - ends[1]) / (2 * eps)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=1e-4)
    assert model.eval().model.layers[0].forward.block.drops is False


# --- what is refused -------------------------------------------------------------------------------------------------


class Shifted(OddAttention):
    """Queries, keys and values of the token before."""

    def before(self, hidden):
        return F.pad(hidden, (0, 0, 1, 0))[:, :-1]


class Counting(OddAttention):
    """Scores grow with the position, as some do from thousands of tokens on: nothing shows at the first."""

    def before(self, hidden):
        steps = torch.arange(hidden.shape[1], device=hidden.device) // 8192
        return hidden * (1.0 + 0.1 * steps)[:, None]


class Lasting(OddAttention):
    """Behaves differently for many tokens."""

    def before(self, hidden):
        return hidden * (2.0 if hidden.shape[1] > 8 else 1.0)


class Blind(OddAttention):
    def mask(self, mask):
        return None


class Told(OddAttention):
    """Tells its attention of a window that its mask does not have."""

    def options(self, hidden):
        return {"sliding_window": 6}


class Biased(OddAttention):
    def options(self, hidden):
        return {"position_bias": torch.zeros(1)}


class Bidirectional(OddAttention):
    def options(self, hidden):
        return {"is_causal": False}


def steeper(module, query, key, value, attention_mask, **kwargs):
    """Not what its options say."""
    return llama.eager_attention_forward(module, 1.5 * query, key, value, attention_mask, **kwargs)


class Steeper(OddAttention):
    function = staticmethod(steeper)


class Learned(OddAttention):
    """Sinks that are made of a parameter."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.sinks = nn.Parameter(torch.ones(config.num_attention_heads))

    def options(self, hidden):
        return {"s_aux": 2.0 * self.sinks}


class Twice(OddAttention):
    def forward(self, hidden_states, *args, **kwargs):
        first, _ = super().forward(hidden_states, *args, **kwargs)
        return super().forward(first, *args, **kwargs)


class ByItself(OddAttention):
    """Without transformers' attention functions."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        q = self.q_proj(hidden_states)
        mask = 0.0 if attention_mask is None else attention_mask[:, 0]
        seen = (q @ q.transpose(1, 2) + mask).softmax(-1)
        return self.o_proj(seen @ q), None


class Keeping(OddAttention):
    """Its MLP's activation, of which there is no twin, writes down what it has seen."""

    class Seen(nn.Module):
        def forward(self, x):
            self.last = x
            return x

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.seen = self.Seen()

    def before(self, hidden):
        return self.seen(hidden)


class Kept(OddAttention):
    """Something of it, which has a config and so a twin, is kept by itself: a share of the loss, say."""

    def before(self, hidden):
        self.share = hidden.square().mean()
        return hidden


class KeptByTheLayer(OddDecoderLayer):
    def outer(self, mid, made):
        self.share = made.square().mean()
        return mid + made


class Averaging(OddDecoderLayer):
    """A running mean, in training alone."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.register_buffer("mean", torch.zeros(config.hidden_size))

    def outer(self, mid, made):
        if self.training:
            self.mean.lerp_(made.detach().mean((0, 1)), 0.1)
        return mid + made


class Mixing(OddDecoderLayer):
    """Mixes tokens after attention."""

    def outer(self, mid, made):
        return mid + made - made.mean(1, keepdim=True)


class Noisy(OddDecoderLayer):
    def outer(self, mid, made):
        return mid + made + (0.01 * torch.randn_like(made) if self.training else 0.0)


class Training(OddDecoderLayer):
    """In training alone it mixes tokens."""

    def outer(self, mid, made):
        return mid + (made.cumsum(1) if self.training else made)


class Hiding(OddDecoderLayer):
    """Runs on a weight that is not registered."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.hidden = [nn.Parameter(torch.eye(config.hidden_size))]

    def outer(self, mid, made):
        return mid + made @ self.hidden[0]


class Unused(OddDecoderLayer):
    """Has a part that it does not run: its gradient is None."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.spare = nn.Linear(config.hidden_size, config.hidden_size)


class Detached(OddDecoderLayer):
    """Its gradient is not the slope of its output; it is the layer's own all the same."""

    def outer(self, mid, made):
        return mid.detach() + made


REFUSED = {
    Shifted: "its output is not that of its parts",
    Counting: "it counts tokens by itself before its attention",
    Lasting: "its output is not that of its parts",
    Blind: "its output is not that of its parts",
    Told: "its attention is told of a window of 6, and its mask shows None",
    Biased: "its attention has the option position_bias",
    Bidirectional: "its attention is not causal",
    Steeper: "its output is not that of its parts",
    Learned: "its attention's sinks are not a parameter of its own",
    Twice: "it calls an attention function 2 times",
    ByItself: "its attention does not go through transformers' attention functions",
    Keeping: "its Seen keeps what it has seen",
    Kept: "its Kept keeps what it has seen",
    KeptByTheLayer: "its KeptByTheLayer keeps what it has seen",
    Averaging: "it changes its buffer mean",
    Mixing: "its output is not that of its parts",
    Noisy: "it draws random numbers for something else than dropout",
    Training: "its output is not that of its parts",
    Hiding: "it runs on parameters that are not its own",
    Unused: "it has spare, which it does not run",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_nothing_deceives_the_probe(kind):
    """And it leaves everything as it was: attributes, buffers, modes, gradients and random numbers.

    Such layers run again as a whole, which is exact of all of them, and keep what they keep once.
    """
    model = odd_model(kind)
    model.model.layers[0].mlp.eval()
    state = snapshot(model)
    assert_run_whole(pyckpt.swap(model), REFUSED[kind])
    pyckpt.unswap(model)
    assert_unchanged(state, snapshot(model))
    plain, batch = copy.deepcopy(model), make_batch("padded")
    pyckpt.swap(model, loss=False)
    for _ in range(2):
        torch.manual_seed(1)
        before = step(plain, batch)
        torch.manual_seed(1)
        assert_same_bits(step(model, batch), before)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_run_whole(report: Any, reason: str) -> None:
    """None of the layers is cut, for this reason."""
    layers = [e for e in report.entries if ".layers." in e.name]
    assert layers and all(e.path == "checkpointed" and reason in e.why for e in layers)


def snapshot(model: nn.Module) -> list[Any]:
    tensors = {n: t.clone() for n, t in model.state_dict().items()} | {"generator": torch.get_rng_state()}
    modules = [(m, dict(m.__dict__), dict(m._forward_hooks)) for m in model.modules()]
    return [tensors, modules, [p.grad for p in model.parameters()]]


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    assert_same_bits(before[0], after[0])
    for (_, was, hooks), (_, now, hooks_now) in zip(before[1], after[1], strict=True):
        assert was.keys() == now.keys() and all(was[n] is now[n] for n in was) and hooks == hooks_now
    assert all(g is None for g in after[2])


def test_a_swap_changes_nothing_but_forwards():
    model = odd_model(Weighed)
    state = snapshot(model)
    pyckpt.swap(model)
    pyckpt.unswap(model)
    assert_unchanged(state, snapshot(model))


def test_a_gradient_of_the_classs_own_is_kept():
    check(odd_model(Detached), [make_batch("plain")])


def test_a_layer_that_is_not_as_its_class_was_made_is_tried_out():
    model = make_model("Llama", num_hidden_layers=1)
    del model.model.layers[0].self_attn.attention_dropout
    model.model.layers[0].self_attn.config = copy.deepcopy(model.config)
    entry = pyckpt.swap(model).entries[0]
    assert entry.path == "checkpointed" and "it is not as its class was made: AttributeError" in entry.why


class Narrow(llama.LlamaModel):
    """A window of another name, of which a mask of a few tokens shows nothing."""

    span = 40

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, **kwargs):
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None] if position_ids is None else position_ids
        distance = positions[:, :, None] - positions[:, None]
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            seen = (distance >= 0) & (distance < self.span)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None]
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=self.rotary_emb(hidden, positions),
                position_ids=positions,
                **kwargs,
            )
        return transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def test_a_window_that_shows_in_longer_masks_alone_is_seen():
    model = odd_model(OddDecoderLayer, max_position_embeddings=256)
    model.model.__class__ = Narrow
    assert_run_whole(pyckpt.swap(model), "its mask is not that of causal attention")


@pytest.mark.parametrize("patched", [llama.LlamaModel, llama.LlamaAttention], ids=lambda kind: kind.__name__)
def test_another_forward_than_the_known_classs_own_is_seen(patched, monkeypatch):
    """A model's, that makes other masks, or one put into the class of a part of its layers."""
    own = patched.forward

    def everywhere(self, *args, **kwargs):
        made = own(self, *args, **kwargs)
        return (made[0].flip(1), *made[1:])

    model, batch = make_model("Llama", max_position_embeddings=256), make_batch("plain")
    if patched is llama.LlamaModel:
        monkeypatch.setattr(Narrow, "span", 4)
        model.model.__class__ = Narrow
    else:
        monkeypatch.setattr(patched, "forward", everywhere)
    before = step(model, batch)
    report = pyckpt.swap(model, loss=False)
    assert_run_whole(report, "the forward of ")
    assert_same_bits(step(model, batch), before)


def passing_on(kind: type) -> type:
    """Derived from it, with a forward that names no arguments."""

    class Passing(kind):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    return Passing


@pytest.mark.parametrize("what", ["model", "layer", "head"])
def test_a_forward_that_passes_on_whatever_it_is_given(what):
    """Position_ids cut its masks though it does not name them, and arguments may be given by position."""
    model = make_model("Llama")
    of_kind = {"model": [model.model], "layer": model.model.layers, "head": [model]}
    for module in of_kind[what]:
        module.__class__ = passing_on(type(module))
    plain, batch = copy.deepcopy(model), make_batch("padded")
    check(model, [make_batch(kind) for kind in KINDS])
    for called in (lambda m: m(batch["input_ids"], batch["attention_mask"]), lambda m: m.model(batch["input_ids"])):
        torch.testing.assert_close(called(model)[0], called(plain)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", [{"sliding_windows": [7, 9]}, {"local_span": {"first": 7}}])
def test_windows_that_cannot_be_read_are_not_guessed(option):
    model = odd_model(OddDecoderLayer)
    for name, value in option.items():
        setattr(model.config, name, value)
    assert_run_whole(pyckpt.swap(model), f"its config has options that may be windows: {next(iter(option))}")


# --- heads -----------------------------------------------------------------------------------------------------------


class LlamaForCausalLM(llama.LlamaForCausalLM):
    """Of a name that is known, with places for what is odd."""

    def base(self, **given: Any) -> Tensor:
        return self.model(**given).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_function(logits, labels, self.config.vocab_size)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, labels=None, **kwargs):
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits = self.logits(self.base(**given, **kwargs))
        loss = None if labels is None else self.loss(logits, labels)
        return transformers.modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits)


class Capped(LlamaForCausalLM):
    def logits(self, hidden):
        return 50.0 * torch.tanh(self.lm_head(hidden) / 50.0)


class ScaledHead(LlamaForCausalLM):
    def logits(self, hidden):
        return self.lm_head(hidden * (1.0 if self.training else 0.5))


class ByConfig(LlamaForCausalLM):
    """Scaled and capped by what its config says."""

    def logits(self, hidden):
        cap = self.config.final_logit_softcapping
        logits = self.lm_head(hidden) * self.config.output_multiplier / self.config.logits_scaling
        return logits if cap is None else cap * torch.tanh(logits / cap)


class ByConfigInEval(ByConfig):
    def logits(self, hidden):
        return self.lm_head(hidden) if self.training else super().logits(hidden)


class Penalised(LlamaForCausalLM):
    """In training its loss has a share of the logits' size."""

    def loss(self, logits, labels):
        return super().loss(logits, labels) + (1e-4 * logits.logsumexp(-1).square().mean() if self.training else 0.0)


class Unshifted(LlamaForCausalLM):
    def loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class WithoutPadding(LlamaForCausalLM):
    """Padding has no share of its loss, whatever its labels are."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        if labels is not None and attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


class Shuffling(LlamaForCausalLM):
    """Changes what it was given, before its base model sees it."""

    def base(self, input_ids, **given):
        return super().base(input_ids=input_ids.flip(1), **given)


class ByPosition(LlamaForCausalLM):
    """As GPTBigCode calls its base model."""

    def base(self, input_ids, **given):
        return self.model(input_ids, **given).last_hidden_state


class Twice(LlamaForCausalLM):
    def base(self, **given):
        return super().base(**given) + 0.0 * super().base(**given)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, ByPosition], ids=lambda kind: kind.__name__)
def test_a_head_of_ones_own_makes_no_logits(kind):
    model = make_model("Llama", num_hidden_layers=1)
    model.__class__ = kind
    check(model, [make_batch(kind) for kind in KINDS])


OPTIONS = {
    "multiplied": (0.3, 1.0, None),
    "divided": (1.0, 7.0, None),
    "capped": (1.0, 1.0, 3.0),
    "divided and capped": (1.0, 0.2, 3.0),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_logits_that_are_scaled_and_capped_by_the_config(options):
    model = by_config(ByConfig, OPTIONS[options])
    batch = make_batch("plain")
    check(model, [batch])
    for name in ("output_multiplier", "logits_scaling", "final_logit_softcapping"):
        if getattr(model.config, name) not in (1.0, None):
            setattr(model.config, name, 2.0)  # it is read at each call
    swapped = model(**batch).loss
    pyckpt.unswap(model)
    torch.testing.assert_close(swapped, model(**batch).loss)


def by_config(kind: type, options: tuple[float, float, float | None]) -> Any:
    model = make_model("Llama", num_hidden_layers=1)
    names = "output_multiplier", "logits_scaling", "final_logit_softcapping"
    for name, value in zip(names, options, strict=True):
        setattr(model.config, name, value)
    model.__class__ = kind
    return model


class NearlyPlain(LlamaForCausalLM):
    def logits(self, hidden):
        return self.lm_head(hidden) * 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(ByConfig, (0.3, 7.0, None)), (ByConfigInEval, (0.3, 1.0, None)), (NearlyPlain, (1.0, 1.0, None))],
)
def test_scales_that_are_not_one_option_of_the_config_are_not_guessed(kind, options, dtype):
    (left,) = pyckpt.swap(by_config(kind, options).to(dtype)).left
    assert left.name == "(model)" and "not those of its output embeddings alone" in left.why


class Wordless(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        return transformers.modeling_outputs.BaseModelOutput(
            self.model(input_ids=input_ids, **kwargs).last_hidden_state
        )


def test_a_head_whose_output_has_no_logits_keeps_its_own_loss():
    """As the text-to-unit model of SeamlessM4T v2."""
    (left,) = pyckpt.swap(by_config(Wordless, (1.0, 1.0, None))).left
    assert left.name == "(model)" and "not those of its output embeddings alone" in left.why


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scales_are_found_in_every_dtype(dtype):
    for options in OPTIONS.values():
        assert not pyckpt.swap(by_config(ByConfig, options).to(dtype)).left


SCALED = {
    "Cohere2Moe": EXPERTS | {"logit_scale": 0.3, "num_experts": 2, "num_experts_per_tok": 1, "head_dim": 12},
    "FalconH1": {
        "lm_head_multiplier": 0.04,
        "head_dim": 12,
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_n_groups": 1,
        "mamba_d_state": 4,
        "mamba_d_ssm": 96,
    },
    "HyperCLOVAX": {"logits_scaling": 0.4},
    "Llama4": {},
}


@pytest.mark.parametrize("family", SCALED)
def test_losses_of_classes_that_scale_their_logits_or_name_no_base_model(family):
    check(make_model(family, num_hidden_layers=1, **SCALED[family]), [make_batch("plain")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [Capped, ScaledHead, Penalised, Unshifted, WithoutPadding, Shuffling, Twice], ids=lambda kind: kind.__name__
)
def test_no_head_deceives_the_trial(kind, dtype):
    """Its loss is left as it is, and what was known of its class's name is not believed."""
    model = make_model("Llama", dtype, num_hidden_layers=1)
    model.__class__ = type("LlamaForCausalLM", (kind,), {})
    batch = make_batch("plain")
    before = model(**batch).loss
    state = snapshot(model)
    (left,) = pyckpt.swap(model).left
    whys = ("logits or loss", "other arguments", "calls its base model 2 times")
    assert left.name == "(model)" and any(why in left.why for why in whys), left.why
    # Layers are swapped, so that logits round elsewhere; a loss made of half-precision ones rounds each token's again.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(model(**batch).loss, before, rtol=eps if dtype == torch.float32 else 4 * eps, atol=1e-5)
    pyckpt.unswap(model)
    assert_unchanged(state, snapshot(model))


def test_another_forward_put_into_a_known_heads_class_is_seen(monkeypatch):
    model, batch = make_model("Llama", num_hidden_layers=1), make_batch("plain")
    own = llama.LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        made = own(self, *args, **kwargs)
        made.loss = None if made.loss is None else 2 * made.loss
        return made

    monkeypatch.setattr(llama.LlamaForCausalLM, "forward", doubled)
    before = model(**batch).loss
    (left,) = pyckpt.swap(model).left
    assert "logits or loss" in left.why
    torch.testing.assert_close(model(**batch).loss, before, rtol=torch.finfo().eps, atol=1e-5)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", ["Glm", "Phi", "VaultGemma"])
def test_a_layer_that_is_cut_makes_no_product_more_than_a_checkpointed_one(family):
    """Of a whole sequence in one tile: not q, k, v twice in a backward, nor the MLP's last product again."""
    model, batch = make_model(family).train(), make_batch("plain") | {"use_cache": False}
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    pyckpt.swap(model)
    made = {}
    for name, m in (("ours", model), ("theirs", checkpointed)):
        with FlopCounterMode(display=False) as counter:
            m(**batch).loss.backward()
        ops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        made[name] = sum(n for op, n in ops.items() if "attention" not in op and "bmm" not in op)
    assert 0 < made["ours"] <= made["theirs"]


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("x",)])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_a_linear_layer_that_nobody_reads(autocast, frozen):
    linear, x, dy = nn.Linear(5, 3), torch.randn(2, 7, 5), torch.randn(2, 7, 3)
    results = []
    for module in (linear, Unread(linear)):
        given = x.clone().requires_grad_("x" not in frozen)
        wanted = [given, *linear.parameters()]
        for name, p in linear.named_parameters():
            p.requires_grad_(name not in frozen)
        wanted = [t for t in wanted if t.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(given)
        results.append((y, torch.autograd.grad(y, wanted, dy.to(y.dtype))))
    (y, expected), (zeros, found) = results
    assert zeros.shape == y.shape and zeros.dtype == y.dtype and not zeros.any()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- what is tried out stays as it was ----------------------------------------------------------------------


@pytest.mark.usefixtures("cut")
def test_a_module_in_two_places_keeps_its_weights():
    """`torch.func.functional_call`, by which random ones are tried, puts those of one place back alone."""
    model, batch = make_model("Olmo3"), make_batch("plain")
    attention = model.model.layers[0].self_attn
    attention.k_proj = attention.v_proj
    plain, weight = copy.deepcopy(model), attention.v_proj.weight
    assert pyckpt.swap(model).entries[0].path == "generic"
    assert attention.v_proj.weight is weight
    found = step(model, batch)
    for n, t in step(plain, batch).items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5)


class Merging(nn.Linear):
    """Adapters that are merged where the module is put into eval mode, as loralib's are."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.merged = linear.weight, False
        self.more = nn.Parameter(torch.randn_like(linear.weight))

    def train(self, mode: bool = True) -> Merging:
        if mode == self.merged:
            self.weight.data += -self.more.data if mode else self.more.data
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight if self.merged else self.weight + self.more)


@pytest.mark.parametrize("family", ["Llama", "Glm"])
@pytest.mark.parametrize("training", [False, True])
def test_what_a_module_does_as_it_changes_its_mode_is_not_done(family, training):
    model = make_model(family)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Merging(layer.self_attn.q_proj)
    model.train(training)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    assert pyckpt.swap(model).entries[0].path == "generic"
    assert model.model.layers[0].self_attn.q_proj.merged is not training
    assert_same_bits(dict(model.state_dict()), before)


# --- what a family's own modules would not compute again ----------------------------------------------------


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn_like(x[..., :1])


def draw(layer: nn.Module) -> None:
    layer.mlp.down_proj.__class__ = Noisy


def divide_by_a_norm(layer: nn.Module) -> None:
    """Whose vectors are one step further after each call."""
    torch.nn.utils.parametrizations.spectral_norm(layer.self_attn.q_proj)


@pytest.mark.parametrize(
    ("change", "why"), [(draw, "it draws random numbers"), (divide_by_a_norm, "_SpectralNorm keeps what it has seen")]
)
def test_a_family_with_what_runs_once_alone_runs_again_as_a_whole(change, why):
    model, batch = make_model("Llama"), make_batch("plain")
    change(model.model.layers[0])
    plain = copy.deepcopy(model)
    entries = pyckpt.swap(model, loss=False).entries
    assert [e.path for e in entries] == ["checkpointed", "standard"] and why in entries[0].why
    results = []
    for m in (plain, model):
        torch.manual_seed(3)
        results.append(step(m, batch))
    for n, t in results[0].items():
        torch.testing.assert_close(results[1][n], t, rtol=1e-4, atol=1e-5)


class DropsByFunction(nn.Linear):
    """Beside its product, by no module of its own: NeMo's LoRA does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.dropout(x.sum(-1, keepdim=True), 0.5, training=self.training)


@pytest.mark.parametrize("family", ["Llama", "encoder"])
def test_a_function_drops_the_same_again(family):
    """In training alone a seed is drawn for it; the same values with every save set, and none in eval mode."""
    if family == "Llama":
        model: Any = make_model("Llama")
        layers, batch = [layer.mlp.up_proj for layer in model.model.layers], make_batch("plain")
        run = lambda: step(model, batch)  # noqa: E731
    else:
        model = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
        layers, x = [model.linear1], torch.randn(2, 5, 16)

        def run() -> dict[str, Tensor]:
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            return {"y": y.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}

    for layer in layers:
        layer.__class__ = DropsByFunction
    quiet = {n: t.clone() for n, t in (model.eval(), run())[1].items()}
    results = []
    for save in ("attention", "input"):
        assert pyckpt.swap(model, save=save, tile=4).entries[0].path == "generic"
        torch.manual_seed(7)
        results.append((model.train(), run())[1])
        before = torch.get_rng_state()
        for n, t in (model.eval(), run())[1].items():
            torch.testing.assert_close(t, quiet[n], rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), before)
        pyckpt.unswap(model)
    assert_same_bits(*results)
    assert not torch.equal(next(iter(results[0].values())), next(iter(quiet.values())))


def test_an_encoder_layer_with_what_runs_once_alone_runs_again_as_a_whole():
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, dtype=torch.float64)
    torch.nn.utils.parametrizations.spectral_norm(layer.linear1)
    plain, x = copy.deepcopy(layer), torch.randn(2, 5, 16, dtype=torch.float64)
    (entry,) = pyckpt.swap(layer).entries
    assert entry.path == "checkpointed" and "keeps what it has seen" in entry.why
    for m in (plain, layer):
        m(x).square().sum().backward()
    for p, q in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Wrapped(Tensor):
    """A weight that is no plain tensor, as quantized ones are: no kernel but PyTorch's can have its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, t: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype, requires_grad=False)

    def __init__(self, t: Tensor) -> None:
        self.half = t / 2

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Wrapped(2 * args[0].half)
        if func.namespace != "aten":
            raise NotImplementedError(f"{func} of a wrapped weight")
        return func(*tree_map_only(Wrapped, lambda t: 2 * t.half, args), **(kwargs or {}))


def test_weights_that_are_no_plain_tensors_are_left_to_their_modules():
    model, batch = make_model("Llama"), make_batch("plain")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(Wrapped(layer.mlp.down_proj.weight.detach()), requires_grad=False)
    before = step(model, batch)
    entry = pyckpt.swap(model).entries[0]
    assert entry.path == "generic" and "the weight of mlp.down_proj is a Wrapped" in entry.why
    found = step(model, batch)
    for n, t in before.items():
        torch.testing.assert_close(found[n], t, rtol=1e-4, atol=1e-5)
