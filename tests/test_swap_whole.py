"""Layers that cannot be cut at their attention: they run again as a whole in the backward."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import (
    HYBRIDS,
    VOCAB,
    WHOLE,
    InFloat64,
    assert_copies_are_swapped_on_their_own,
    assert_generates_the_same,
    assert_step_as_good,
    check,
    make_batch,
    make_model,
    step,
)
from torch import nn

import pyckpt
from pyckpt import measure
from pyckpt.swap import again
from pyckpt.swap.whole import CheckpointedLayer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_fallback")


def paths(report: Any) -> list[str]:
    return [e.path for e in report.entries]


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def assert_compiles(model: Any, batch: dict[str, Any]) -> None:
    """Swapped and compiled, it has the gradients of before, whatever warnings there are."""
    before = step(model, batch)
    pyckpt.swap(model, loss=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = step(torch.compile(model, backend="aot_eager"), batch)
    for name, value in before.items():
        torch.testing.assert_close(after[f"_orig_mod.{name}" if name != "loss" else name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", a_few(WHOLE, always=(0, 1, 3)))
def test_the_same_bits_with_the_logits(name):
    """With dropout, of the same random numbers; the loss without logits by the 2x rule."""
    model = make_model(name)
    set_dropout(model, 0.1)
    for kind in ("plain", "padded"):
        batch = make_batch(kind)
        torch.manual_seed(1)
        before = step(model, batch)
        assert paths(pyckpt.swap(model, loss=False)) == ["checkpointed"] * 2
        torch.manual_seed(1)
        assert_same_bits(step(model, batch), before)
        pyckpt.unswap(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", a_few(WHOLE, always=(0, 2, 3)))
def test_the_loss_makes_no_logits(name, dtype):
    model, batch = make_model(name, dtype), make_batch("padded")
    set_dropout(model, 0.0)
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    assert paths(pyckpt.swap(model)) == ["checkpointed", "checkpointed", "standard"]
    with torch.no_grad():
        assert model(**batch).logits is not None
    assert model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, dtype)


@pytest.mark.parametrize("name", a_few(HYBRIDS, always=(1,)))
def test_beside_layers_that_are_cut(name):
    model = make_model(name)
    check(model, [make_batch("plain"), make_batch("padded")])
    assert [type(layer.forward) is CheckpointedLayer for layer in model.model.layers] == [True, False]


def calls_of(model: Any) -> list[str]:
    """The name of each layer's own forward, as it is called from now on."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "forward", None), CheckpointedLayer):
            own = module.forward.original

            def counted(*args: Any, name: str = name, own: Any = own, **kwargs: Any) -> Any:
                calls.append(name)
                return own(*args, **kwargs)

            module.forward.original = counted
    return calls


def test_a_layer_runs_twice_where_gradients_are_enabled():
    model, batch = make_model("Falcon"), make_batch("plain")
    pyckpt.swap(model)
    calls, names = calls_of(model), [f"transformer.h.{i}" for i in range(2)]
    loss = model(**batch).loss
    assert calls == names
    loss.backward()
    assert calls == names + names[::-1]
    calls.clear()
    with torch.no_grad():
        model(**batch)
    assert calls == names


def test_transformers_checkpointing_is_not_doubled():
    model, batch = make_model("Bloom"), make_batch("plain")
    before = step(model, batch)
    pyckpt.swap(model, loss=False)
    model.gradient_checkpointing_enable()
    runs: list[int] = []
    for layer in model.transformer.h:
        layer.self_attention.register_forward_hook(lambda *_: runs.append(1))
    assert_same_bits(step(model, batch), before)
    assert len(runs) == 4


@pytest.mark.parametrize("name", ["Bloom", "Mamba"])
def test_what_is_kept_does_not_grow_with_what_layers_make(name):
    """Of each layer its input; and of the whole model, with the loss, no more than a few tensors of that size."""
    model = make_model(name)
    ids = torch.randint(1, VOCAB, (1, 48))
    kept = []
    for swapped in (False, True):
        if swapped:
            pyckpt.swap(model)
        with measure.memory(model) as m:
            loss = model(input_ids=ids, labels=ids).loss
            m.mark("forward")
        kept.append(m.marks["forward"].live_bytes)
        loss.backward()
    x = 48 * 48 * 4
    assert kept[1] <= 8 * x < kept[0] / 2


@pytest.mark.parametrize("name", a_few(WHOLE, always=(2,)))
def test_generates_the_same_tokens(name):
    assert_generates_the_same(make_model(name))


def test_a_cache_is_written_to_once():
    """In eval mode with gradients: the layers run once. In training nothing is written, as with checkpointing."""
    model, batch = make_model("Falcon"), make_batch("plain")
    ids = batch["input_ids"]
    pyckpt.swap(model)
    for training in (False, True):
        made = model.train(training)(ids, use_cache=True)
        made.logits.sum().backward()
        assert made.past_key_values.get_seq_length() == (0 if training else ids.shape[1])


def test_a_hybrids_cache_is_asked_for():
    """All of its layers write to it then, and none is swapped."""
    model, ids = make_model("Lfm2"), make_batch("plain")["input_ids"]
    pyckpt.swap(model)
    calls = calls_of(model)
    with pytest.warns(UserWarning, match="use_cache=True in training: the original forward runs"):
        made = model(ids, use_cache=True)
    made.logits.sum().backward()
    assert made.past_key_values.get_seq_length() == ids.shape[1]
    assert calls == ["model.layers.0"]


def test_hooks_inside_leave_a_layer_as_it_is():
    model = make_model("Falcon")
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: None)
    report = pyckpt.swap(model)
    assert paths(report) == ["original", "checkpointed", "standard"]
    assert "mlp has forward hooks" in report.left[0].why


TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
}
# Of which transformers' own checkpointing knows no layer, or the model does not say that it has any.
UNKNOWN: dict[str, dict[str, Any]] = {
    "Albert": {"embedding_size": 16, "num_hidden_groups": 2},
    "MPNet": {},
    "LayoutLMv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "SqueezeBert": {"embedding_size": 32},
    "FSMT": {
        "langs": ["en", "de"],
        **{f"{side}_vocab_size": VOCAB for side in ("src", "tgt")},
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        "d_model": 32,
        "hidden_size": None,
    },
}


@pytest.mark.parametrize(("name", "cached"), [*((n, False) for n in UNKNOWN), ("FSMT", True)])
def test_layers_that_transformers_own_checkpointing_does_not_reach(name, cached):
    config = getattr(transformers, f"{name}Config")(
        **{k: v for k, v in (TINY | UNKNOWN[name]).items() if v is not None}
    )
    model = getattr(transformers, f"{name}Model")(config).train()
    set_dropout(model, 0.1)
    ids = torch.randint(2, VOCAB, (2, 9))
    given = {"input_ids": ids, "attention_mask": (torch.arange(9) < torch.tensor([[9], [6]])).long()}
    if name == "FSMT":
        given |= {"decoder_input_ids": ids, "use_cache": cached}

    def results() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        hidden = model(**given).last_hidden_state
        hidden.cos().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"hidden": hidden.detach(), **grads}

    before = results()
    report = pyckpt.swap(model)
    layers = [e.path for e in report.entries if not e.why.startswith("loss")]
    assert layers == ["checkpointed"] * len(layers)
    assert len(layers) >= 2
    assert_same_bits(results(), before)


def test_frozen_layers_and_autocast():
    model, batch = make_model("Falcon"), make_batch("padded")
    for name, p in model.named_parameters():
        p.requires_grad_("h.1.mlp" in name)
    with torch.autocast("cpu", torch.bfloat16):
        before = step(model, batch)
        pyckpt.swap(model, loss=False)
        after = step(model, batch)
    assert_same_bits(after, before)
    assert all("h.1.mlp" in name for name in after.keys() - {"loss"})


def test_copies_are_swapped_on_their_own():
    assert_copies_are_swapped_on_their_own(make_model("Falcon"))


@pytest.mark.parametrize(
    ("options", "note"), [({"segments": 2}, "; not in segments"), ({"stream": pyckpt.Stream(tile=8)}, "; not streamed")]
)
def test_the_report_says_what_takes_no_part(options, note):
    model = make_model("Llama", num_hidden_layers=4)
    model.model.layers[1].self_attn.is_causal = False  # which eager attention does not read
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pyckpt.swap: some of its layers are not streamed")
        check(model, [make_batch("padded")], **options)
    pyckpt.unswap(model)
    report = pyckpt.swap(model, **options)
    assert paths(report) == ["standard", "checkpointed", "standard", "standard", "standard"]
    assert report.entries[1].why.endswith(note)


class Keeping(transformers.models.llama.modeling_llama.LlamaDecoderLayer):
    """Counts its calls."""

    calls = 0

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(hidden_states, **kwargs)


def test_what_classes_of_ones_own_keep_is_kept_once():
    """Nor does a part of such a class keep a layer from running again."""
    model, batch = make_model("Llama"), make_batch("plain")
    model.model.layers[0] = Keeping(model.config, 0)
    model.model.layers[1].mlp.act_fn = type("Activation", (nn.SiLU,), {})()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    before = step(model, batch)
    assert paths(pyckpt.swap(model, loss=False)) == ["checkpointed"] * 2
    assert_same_bits(step(model, batch), before)
    assert model.model.layers[0].calls == 2


def test_streaming_takes_layers_that_are_cut():
    with pytest.raises(ValueError, match="this model has none that can be streamed"):
        pyckpt.swap(make_model("Falcon"), stream=pyckpt.Stream(tile=8))


def test_compiles():
    model, batch = make_model("Falcon", attn_implementation="sdpa"), make_batch("plain")
    assert_compiles(model, batch)


# --- calls that swapped layers do not compute ------------------------------------------------------------------------


def odd_mask() -> torch.Tensor:
    """(2, 1, 19, 19): the first five tokens see each other."""
    seen = torch.ones(19, 19, dtype=torch.bool).tril()
    seen[:5, :5] = True
    return seen.expand(2, 1, 19, 19)


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Olmo"])
def test_another_mask_has_the_layers_run_again_as_a_whole(family):
    """The bits of the model before, with dropout, and of each layer its input is kept."""
    model = make_model(family, attention_dropout=0.1)
    batch = make_batch("plain") | {"attention_mask": odd_mask()}
    torch.manual_seed(1)
    with measure.memory(model) as m:
        before = step(model, batch)
    stored = m.saved_bytes
    pyckpt.swap(model, loss=False)
    torch.manual_seed(1)
    warned = pytest.warns(UserWarning, match="an attention_mask .* original forward, each layer again as a whole")
    with warned, measure.memory(model) as m:
        assert_same_bits(step(model, batch), before)
    assert m.saved_bytes < stored / 2
    with torch.no_grad():
        assert model(**batch).logits is not None
    model.gradient_checkpointing_enable()  # which runs them twice in its own way then
    torch.manual_seed(1)
    assert_same_bits(step(model, batch), before)


def test_another_mask_beside_hooks_that_were_put_in_since():
    """They see each token once."""
    model, batch = make_model("Llama"), make_batch("plain") | {"attention_mask": odd_mask(), "unheard_of": 1}
    pyckpt.swap(model, loss=False)
    runs: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    with pytest.warns(UserWarning, match="mlp has forward hooks.* original forward, which stores everything"):
        step(model, batch)
    assert len(runs) == 1


@pytest.mark.slow
def test_another_mask_in_a_compiled_model():
    model, batch = make_model("Llama", attn_implementation="sdpa"), make_batch("plain") | {"attention_mask": odd_mask()}
    assert_compiles(model, batch)


@pytest.mark.parametrize("activation", ["relu", "own"])
def test_encoder_layers_run_again_as_a_whole_under_another_mask(activation):
    own = {"activation": type("Activation", (nn.Tanh,), {})()} if activation == "own" else {}
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True, **own)
    x, mask = torch.randn(2, 9, 16, requires_grad=True), torch.randn(9, 9)
    results, saved = [], []
    for swapped in (False, True):
        if swapped:
            pyckpt.swap(layer)
        torch.manual_seed(1)
        expected = pytest.warns(UserWarning, match="src_mask .* whole") if swapped else contextlib.nullcontext()
        with expected, measure.memory(layer) as m:
            y = layer(x, mask)
        saved.append(m.saved_bytes)
        results.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved[1] < saved[0] / 2


# --- layers of encoders ----------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
BOTH: dict[str, Any] = {
    f"{side}_{n}": v
    for side in ("encoder", "decoder")
    for n, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 72))
}
SOUND: dict[str, Any] = {
    **{f"conv_{n}": v for n, v in (("dim", (16, 16)), ("stride", (4, 4)), ("kernel", (8, 8)))},
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
# The model, options of its config, and how many of its layers run again.
ENCODERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Bert": ("BertForMaskedLM", SMALL, 2),
    # Its layers are in a module that is no model of transformers, and are called like a decoder's.
    "DistilBert": ("DistilBertForMaskedLM", {"dim": 48, "hidden_dim": 72, "n_layers": 2, "n_heads": 4}, 2),
    "T5": ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 12, "d_ff": 72, "num_layers": 2, "num_heads": 4}, 4),
    "Bart": ("BartForConditionalGeneration", {"d_model": 48, **BOTH}, 4),
    "ViT": ("ViTForImageClassification", {"image_size": 16, "patch_size": 4, **SMALL}, 2),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {"d_model": 48, "num_mel_bins": 8, "max_source_positions": 20, **BOTH},
        4,
    ),
    # Layers in layers: the outer ones run again, and all that is in them with those.
    "Swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        2,
    ),
    "Wav2Vec2": ("Wav2Vec2ForCTC", SOUND | SMALL, 4),
}


def make_encoder(family: str) -> tuple[Any, dict[str, Any]]:
    """A model in training, with dropout, and a batch for it."""
    kind, options, _ = ENCODERS[family]
    words = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**({} if family in ("ViT", "Swin") else words), **options)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # with one keys meet their gradients in another order
    ids, mask = torch.randint(3, VOCAB, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    mask[1, 8:] = 0
    images = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    batches = {
        "ViT": images,
        "Swin": images,
        "Whisper": {"input_features": torch.randn(2, 8, 40), "labels": ids},
        "Wav2Vec2": {"input_values": torch.randn(2, 800), "labels": ids[:, :5]},
    }
    text = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    return getattr(transformers, kind)(config).train(), batches.get(family, text)


def seeded_step(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return step(model, batch)


@pytest.mark.parametrize("family", a_few(ENCODERS, always=(0, 1, 2, 4, 6)))
def test_encoders_and_decoders_that_look_at_them(family):
    """The same bits with dropout, less kept, and the same tokens generated."""
    model, batch = make_encoder(family)
    before = seeded_step(model, batch)
    with measure.memory() as plain:
        model(**batch)
    assert paths(pyckpt.swap(model, loss=False)) == ["checkpointed"] * ENCODERS[family][2]
    assert_same_bits(seeded_step(model, batch), before)
    with measure.memory() as ours:
        model(**batch)
    assert ours.saved_bytes < 0.8 * plain.saved_bytes
    if hasattr(model, "generate") and model.config.is_encoder_decoder:
        model.eval()
        given = {n: batch[n] for n in ("input_ids", "attention_mask", "input_features") if n in batch}
        options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True}
        made = model.generate(**given, **options)
        pyckpt.unswap(model)
        assert torch.equal(made, model.generate(**given, **options))


def test_statistics_of_a_batch_are_not_counted_twice():
    options = {"vocab_size": VOCAB, "pad_token_id": 0, **SOUND, **SMALL}
    model = transformers.Wav2Vec2ConformerForCTC(transformers.Wav2Vec2ConformerConfig(**options)).train()
    plain = copy.deepcopy(model)
    assert paths(pyckpt.swap(model, loss=False))[-2:] == ["checkpointed"] * 2
    batch = {"input_values": torch.randn(2, 800), "labels": torch.randint(3, VOCAB, (2, 5))}
    assert_same_bits(seeded_step(model, batch), seeded_step(plain, batch))
    for (name, ours), (_, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    counts = [m.num_batches_tracked for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
    assert counts and all(int(n) == 1 for n in counts)


# --- caches that hold something --------------------------------------------------------------------------------------


def with_prefix(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a cache of a first call."""
    first = {**batch, "labels": None, "decoder_input_ids": batch["labels"][:, :4], "use_cache": True}
    with torch.no_grad():
        cache = model.eval()(**first).past_key_values
    model.train()
    return {**batch, "labels": batch["labels"][:, 4:].contiguous(), "past_key_values": cache, "use_cache": True}


@pytest.mark.parametrize("family", ["T5", "Bart"])
def test_a_prefix_in_a_cache_is_read_in_training(family):
    """It was left out. As what stands in a cache would be written twice, the layers run once."""
    model, batch = make_encoder(family)
    plain = copy.deepcopy(model)
    before = seeded_step(plain, with_prefix(plain, batch))
    pyckpt.swap(model, loss=False)
    assert_same_bits(seeded_step(model, batch), seeded_step(plain, batch))  # an empty one is no reason
    with pytest.warns(UserWarning, match="is given a cache that is not empty: its original forward runs"):
        after = seeded_step(model, with_prefix(model, batch))
    assert_same_bits(after, before)
    assert not torch.equal(before["loss"], seeded_step(plain, batch)["loss"])


class Reader(nn.Module):
    """Says, as transformers' layers do, that it reads a cache and writes none."""

    _can_checkpoint_with_cache = True
    layer_idx = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        self.calls += 1
        return self.linear(x + past_key_values.layers[0].keys.sum())


def test_a_cache_that_a_layer_only_reads_is_there_twice():
    layer, cache = Reader().train(), transformers.DynamicCache()
    cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    x = torch.randn(3, 4, requires_grad=True)
    expected = layer(x, past_key_values=cache)
    CheckpointedLayer(layer, told=False, save="attention").install()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x, past_key_values=cache)
        before = layer.linear.weight.grad
        y.sum().backward()
    assert before is None and torch.equal(y, expected) and layer.linear.weight.grad is not None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # before transformers 5.24, and since
def test_what_a_cache_holds(name):
    empty, filled = transformers.DynamicCache(), transformers.DynamicCache()
    filled.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    layer = Reader()
    pairs, both = (torch.zeros(1), torch.zeros(1)), transformers.EncoderDecoderCache
    anything = name == "cache"  # may have that name in a class of one's own
    for cache, full in ((None, False), (empty, False), (filled, True), (pairs, not anything)):
        assert again.holds(layer, {name: cache}) is full
        assert again.caches({name: cache}) is (full or cache is empty)
    assert again.holds(layer, {name: both(empty, filled)})
    layer.layer_idx = 1  # another layer's
    assert not again.holds(layer, {name: filled})


class Own(nn.Module):
    """What it is given by the name that transformers has for its caches is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cos, sin = cache
        return self.linear(x * cos + x.roll(1) * sin).tanh()


def test_tables_that_a_layer_calls_its_cache_are_there_twice():
    layer = Own().train()
    x, cache = torch.randn(3, 4, requires_grad=True), (torch.randn(4), torch.randn(4))
    expected = torch.autograd.grad(layer(x, cache).sum(), x)[0]
    CheckpointedLayer(layer, told=False, save="input").install()
    runs: list[int] = []
    layer.linear.register_forward_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (made,) = torch.autograd.grad(layer(x, cache=cache).sum(), x)
    assert torch.equal(made, expected) and len(runs) == 2


@pytest.mark.parametrize("how", ["past_key_values", "cache", "by its place"])
@pytest.mark.parametrize("training", [True, False])
def test_a_cache_by_either_name(training, how):
    """transformers calls caches otherwise since 5.24, and takes the other name too for a time."""
    model = make_model("Llama").train(training)
    names = list(inspect.signature(type(model).forward).parameters)
    if how == "cache" and "cache" not in names:
        pytest.skip("this transformers does not know the name")
    ids = torch.randint(1, VOCAB, (2, 9))

    def run() -> torch.Tensor:
        first = model(input_ids=ids[:, :5], use_cache=True)
        made = first["cache" if "cache" in names else "past_key_values"]
        given = (ids[:, 5:], None, None, made) if how == "by its place" else (ids[:, 5:],)
        return model(*given, **({} if how == "by its place" else {how: made}), use_cache=True).logits

    expected = run()
    pyckpt.swap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if training:  # all is stored
            warnings.simplefilter("ignore", UserWarning)
        assert torch.equal(run(), expected)


@pytest.mark.slow
def test_an_empty_cache_breaks_no_compiled_graph():
    model, batch = make_encoder("T5")
    model.config.use_cache = True
    for module in model.modules():
        rates = [n for n, value in vars(module).items() if "dropout" in n and isinstance(value, float)]
        for name in ("p", *rates) if isinstance(module, nn.Dropout) else rates:
            setattr(module, name, 0.0)
    expected = step(model, batch)
    pyckpt.swap(model, loss=False)
    loss = torch.compile(lambda: model(**batch).loss, backend="aot_eager", fullgraph=True)()
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected["loss"])


# --- devices of their own --------------------------------------------------------------------------------------------


def put_hooks(model: Any, offloaded: tuple[str, ...] = ()) -> Any:
    """Accelerate's, as a `device_map` over several devices has them: of each layer, and of what is inside."""
    hooks = pytest.importorskip("accelerate.hooks")
    names = ["", "model.embed_tokens", *(f"model.layers.{i}" for i in range(len(model.model.layers)))]
    names += ["model.norm", "model.rotary_emb", "lm_head"]
    devices = {n: torch.device("cpu") for n in names}
    hooks.attach_align_device_hook_on_blocks(model, devices, offload={n: n in offloaded for n in names})
    return model


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "Glm"])
def test_layers_with_a_device_of_their_own(family):
    model, batch = make_model(family, attn_implementation="sdpa"), make_batch("plain")
    truth = step(copy.deepcopy(model), batch)
    put_hooks(model)
    with measure.memory() as stored:
        step(model, batch)
    assert {e.path for e in pyckpt.swap(model, loss=False).entries} == {"checkpointed"}
    with measure.memory() as kept:
        assert_same_bits(step(model, batch), truth)
    assert kept.saved_bytes < stored.saved_bytes / 2
    pyckpt.unswap(model)
    assert not pyckpt.swap(model).left
    assert model(**batch).logits is None
    got = step(model, batch)
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-4, atol=1e-6)


def test_layers_whose_weights_are_brought_for_each_call_are_left():
    """They are elsewhere in a backward."""
    model = put_hooks(make_model("Llama"), ("model.layers.1",))
    report = pyckpt.swap(model)
    assert [e.path for e in report.entries] == ["checkpointed", "original", "standard"]
    assert "self_attn.q_proj has forward hooks" in report.entries[1].why


@pytest.mark.parametrize("wanted", [False, True], ids=["frozen", "unfrozen"])
def test_what_is_frozen_between_forward_and_backward(wanted):
    """As nets that are trained in turns have it: the second run saves what the first one did."""
    model, batch = make_model("Falcon"), make_batch("plain")

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        layer = model.transformer.h[0]
        layer.requires_grad_(not wanted)
        loss = model(**batch).loss
        layer.requires_grad_(wanted)
        loss.backward()
        assert all(p.requires_grad is wanted for p in layer.parameters())
        model.requires_grad_(True)
        return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    before = run()
    pyckpt.swap(model, loss=False)
    assert_same_bits(run(), before)


@pytest.mark.parametrize("family", ["OPT", "Falcon", "Olmo"])
def test_no_hook_runs_while_a_model_is_swapped(family):
    model, seen = make_model(family, num_hidden_layers=2), []
    layers = [m for m in model.modules() if "DecoderLayer" in type(m).__name__]
    for inner in layers[-1].modules():
        if isinstance(inner, nn.Linear):
            inner.register_forward_hook(lambda *_: seen.append(1))
            inner.register_forward_pre_hook(lambda *_: seen.append(2))
    pyckpt.swap(model)
    assert not seen
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**make_batch("plain"))
    assert {*seen} == {1, 2}
