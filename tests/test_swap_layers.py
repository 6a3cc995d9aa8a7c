"""Which decoder layers `pyckpt.swap` takes: sinks, RoPE of any type, and classes that it has no table of."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import (
    KINDS,
    OTHERS,
    ROUTED,
    VOCAB,
    assert_copies_are_swapped_on_their_own,
    assert_generates_the_same,
    assert_same_with_every_save_set,
    check,
    check_under_autocast,
    known,
    make_batch,
    make_model,
    step,
)
from torch import nn

import pyckpt
from pyckpt.swap import rope

transformers = pytest.importorskip("transformers")


pytestmark = pytest.mark.usefixtures("no_fallback")


# --- gpt-oss ---------------------------------------------------------------------------------------------------------


def make_gpt_oss(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """With sinks as large as scores."""
    model = make_model("GptOss", **options)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks += torch.randn(4)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_have_a_gradient(dtype):
    """With all experts at work: which are chosen may change with a rounding."""
    model = make_gpt_oss(dtype, num_experts_per_tok=4)
    check(model, [make_batch(kind) for kind in KINDS])
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_(False)
    assert not [n for n in step(model, make_batch("plain")) if "sinks" in n]


def test_gpt_oss_is_the_same_with_every_save_set():
    assert_same_with_every_save_set(make_gpt_oss())


def test_gpt_oss_generates_the_same_tokens():
    assert_generates_the_same(make_gpt_oss())


def test_gpt_oss_under_autocast_and_partly_frozen():
    """Sinks alone are trained: they have the gradient that they have beside all others."""
    model = make_gpt_oss()
    pyckpt.swap(model, tile=10)
    batch = make_batch("padded")
    with torch.autocast("cpu", torch.bfloat16):
        whole = step(model, batch)
        for name, p in model.named_parameters():
            p.requires_grad_("sinks" in name)
        alone = step(model, batch)
    assert alone.keys() == {"loss", *(n for n in whole if "sinks" in n)}
    assert_same_bits(alone, {n: whole[n] for n in alone})


def test_positions_do_not_cut_where_the_models_masks_are_not_cut():
    """This model does not tell its masks of them; a model on the meta device can't be asked, and is not guessed."""
    model = make_gpt_oss()
    pyckpt.swap(model)
    assert model.model.forward.cuts is False
    model.model.forward.cuts = None
    with pytest.warns(UserWarning, match=r"whether that cuts the model's masks is not known.* original forward"):
        model(**make_batch("packed"))


# --- RoPE whose frequencies depend on the length ----------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 1.4],
    "long_factor": [1.0, 2.5, 4.0, 3.0, 6.0, 9.0],
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
MOVING = {
    "Phi3": {"rope_parameters": LONGROPE, "max_position_embeddings": 64},
    "Llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
}


def short_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCAB, (2, 9))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("path", ["standard", "generic"])
@pytest.mark.parametrize("family", MOVING)
def test_rope_that_depends_on_the_length(family, path):
    """Batches above and below the length at which the frequencies change, in turn.

    The last is a short one: "dynamic" keeps the frequencies of the longest batch until one is short again.
    """
    model = make_model("Qwen3" if (family, path) == ("Phi3", "generic") else family, **moving(family, path))
    if path == "generic":
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Mish()
    check(model, [make_batch("plain"), short_batch(), make_batch("padded"), make_batch("packed"), short_batch()])
    assert {e.path for e in swap_anew(model).entries[:-1]} == {path}


def moving(family: str, path: str) -> dict[str, Any]:
    """Phi-3 has fused projections, of which the generic path knows nothing: there longrope is that of a Qwen 3."""
    return MOVING[family] | ({"head_dim": 12} if (family, path) == ("Phi3", "generic") else {})


def swap_anew(model: Any, **options: Any) -> Any:
    pyckpt.unswap(model)
    return pyckpt.swap(model, tile=10, **options)


def test_the_frequencies_of_a_call_are_read_once(monkeypatch):
    """And not by every layer: each reading waits for a GPU."""
    model, batch, read = make_model("Llama", **MOVING["Llama"], num_hidden_layers=4), make_batch("plain"), []
    pyckpt.swap(model, tile=10)
    real = rope.given
    monkeypatch.setattr(rope, "given", lambda *args: read.append(args) or real(*args))
    model.model.rotary_emb.inv_freq.add_(0.0)  # written to: what was read before counts no more
    step(model, batch)
    assert len(read) == 1


@pytest.mark.parametrize("family", MOVING)
def test_the_frequencies_of_a_call_are_those_of_its_backward(family):
    """Of two losses, one after the other, and then their backwards; in segments too."""
    model = make_model(family, **MOVING[family])
    batches, results = [make_batch("plain"), short_batch()], []
    apart = [step(model, batch) for batch in batches]
    truth = {n: sum(part[n] for part in apart) for n in apart[0]}
    for segments in (None, 2):
        pyckpt.swap(model, tile=10, segments=segments)
        losses = [model(**batch).loss for batch in batches]
        sum(losses).backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        model.zero_grad()
        pyckpt.unswap(model)
    assert_same_bits(*results)
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, truth[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MOVING)
def test_generates_beyond_the_length_as_before(family):
    assert_generates_the_same(make_model(family, **MOVING[family]))


def test_rope_that_depends_on_the_length_is_right_when_compiled():
    """Frequencies that a graph has in it would be those of another length."""
    model = make_model("Phi3", attn_implementation="sdpa", num_hidden_layers=1, **MOVING["Phi3"])
    batches = [short_batch(), make_batch("plain")]
    before = [model(**batch).loss for batch in batches]
    pyckpt.swap(model)
    compiled = torch.compile(model, backend="eager")
    for batch, loss in zip(batches, before, strict=True):
        torch.testing.assert_close(compiled(**batch).loss, loss)


# --- classes without a table -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", a_few(OTHERS, always=range(0, len(OTHERS), 2)))
def test_a_class_without_a_table(family):
    """Its layers run by their own forward around our attention; but for linear attention, which runs again whole."""
    # Linear attention makes much of a rounding, and each batch is another chance of a bad one.
    kinds = ("padded",) if family == "Qwen3Next" else KINDS
    check(make_model(family), [make_batch(kind) for kind in kinds])


UNCUT = {
    "Bloom": ({"n_layer": 1, "n_head": 4}, "its model does not hand further arguments on"),  # ALiBi
    "DiffLlama": ({"num_hidden_layers": 1}, "calls an attention function 2 times"),
    "Doge": ({"num_hidden_layers": 1}, "its output is not that of its parts around attention"),
    "Falcon": ({"num_hidden_layers": 1}, "its model does not hand further arguments on"),
    "Llama4": (
        {"num_hidden_layers": 1, "head_dim": 12, **ROUTED},
        "its mask is not that of causal attention",
    ),  # chunks
    "OPT": ({"layerdrop": 0.1}, "its model leaves out layers at random (layerdrop)"),
    "Phimoe": ({"num_hidden_layers": 1, "num_local_experts": 4}, "it draws random numbers for something else"),
    "XGLM": ({"num_layers": 1, "attention_heads": 4}, "does not go through transformers' attention functions"),
}


@pytest.mark.parametrize("family", UNCUT)
def test_a_class_that_cannot_be_cut_runs_again_as_a_whole(family):
    """The report has the reason; with the model's own loss a step's bits, random numbers drawn in it among them."""
    options, why = UNCUT[family]
    model, batch = make_model(family, **options), make_batch("padded")
    torch.manual_seed(1)
    before = step(model, batch)
    entry = pyckpt.swap(model, loss=False).entries[0]
    assert entry.path == "checkpointed" and "this class is not known, and" in entry.why and why in entry.why
    torch.manual_seed(1)
    assert_same_bits(step(model, batch), before)


@pytest.mark.usefixtures("cut")
def test_a_class_without_a_table_in_bfloat16_and_under_autocast():
    check(make_model("Olmo3", torch.bfloat16), [make_batch(kind) for kind in KINDS])
    check_under_autocast(make_model("Phi"), make_batch("padded"))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", ["DeepseekV3", "OPT", "Olmo3"])
def test_a_class_without_a_table_generates_the_same_tokens(family):
    assert_generates_the_same(make_model(family))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("family", ["Phi", "DeepseekV3"])
def test_a_class_without_a_table_is_the_same_with_every_save_set(family):
    assert_same_with_every_save_set(make_model(family, num_hidden_layers=1))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Exaone4", "DeepseekV3"])
def test_a_class_without_a_table_in_segments_and_in_files(family, kind):
    """The first layer of a segment runs them all, with what the model would hand to each. The same bits."""
    model = make_model(family, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    batch, results = known(model, make_batch(kind)), []
    for options in ({}, {"segments": 3}, {"save": pyckpt.Save("attention", {"x": "file", "o": "file"})}):
        report = pyckpt.swap(model, tile=10, **options)
        assert {e.path for e in report.entries[:-1]} == {"generic"}
        assert len(model.model.forward.segments) == (2 if "segments" in options else 4)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_copies_of_a_class_without_a_table_are_swapped_on_their_own():
    assert_copies_are_swapped_on_their_own(make_model("Olmo"))


@pytest.mark.usefixtures("cut")
def test_frozen_parameters_and_hooks_of_a_class_without_a_table():
    """Its norm is read before and after attention: one gradient, and its hook runs once."""
    model, batch = make_model("Phi"), make_batch("padded")
    pyckpt.swap(model, tile=10)
    whole, calls = step(model, batch), {}
    for name, p in model.named_parameters():
        p.requires_grad_("layernorm" in name or "k_proj" in name)
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda _, n=name: calls.update({n: calls.get(n, 0) + 1}))
    some = step(model, batch)
    assert_same_bits(some, {n: whole[n] for n in some})
    assert set(calls.values()) == {1} and calls.keys() == some.keys() - {"loss"}


@pytest.mark.parametrize(("family", "maskless"), [("Olmo", True), ("OPT", False)])
def test_the_models_own_mask_is_made_only_where_it_reads_it_itself(family, maskless):
    """OPT counts its positions in it."""
    model = make_model(family)
    pyckpt.swap(model)
    seen = []
    layer = (model.model.decoder if family == "OPT" else model.model).layers[0]
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["attention_mask"].shape), with_kwargs=True
    )
    model(**make_batch("padded"))
    assert seen == [(1, 1, 1, 1) if maskless else (2, 1, 19, 19)]


def test_rope_that_depends_on_the_length_in_a_class_without_a_table():
    model = make_model("Olmo", rope_parameters=DYNAMIC, max_position_embeddings=16)
    check(model, [make_batch("plain"), short_batch(), make_batch("padded"), short_batch()])


def test_sinks_of_a_class_without_a_table():
    model = make_gpt_oss(num_experts_per_tok=4, num_hidden_layers=1)
    model.model.layers[0].__class__ = type("OtherDecoderLayer", (type(model.model.layers[0]),), {})
    assert "this class is not known" in pyckpt.swap(model).entries[0].why
    assert model.model.layers[0].forward.block.trace.sinks == "self_attn.sinks"
    pyckpt.unswap(model)
    check(model, [make_batch(kind) for kind in KINDS])


def test_what_changes_after_the_swap_runs_the_original():
    model, batch = make_model("Olmo"), make_batch("plain")
    before = model(**batch).loss
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match="token_type_ids is not known"):
        torch.testing.assert_close(model(**batch, token_type_ids=torch.zeros(2, 19, dtype=torch.long)).loss, before)
    attention = model.model.layers[0].self_attn
    handle = attention.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="self_attn has forward hooks"):
        torch.testing.assert_close(model(**batch).loss, before)
    handle.remove()
    attention.q_proj = nn.Sequential(attention.q_proj)
    with pytest.warns(UserWarning, match=r"self_attn\.q_proj is now a .*Sequential"):
        torch.testing.assert_close(model(**batch).loss, before)


def test_an_argument_that_does_not_go_by_tokens_is_an_error():
    """Such as none was handed when the layer was tried out: its model has no mask left to go on without us."""
    model = make_model("Olmo")
    pyckpt.swap(model)
    own = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda *args, **kwargs: tuple(t[:, :5] for t in own(*args, **kwargs))
    with pytest.raises(RuntimeError, match=r"position_embeddings of shape \(1, 5, 12\), .* call pyckpt\.unswap"):
        model(**make_batch("plain"))


def test_a_class_without_a_table_is_refused_where_it_cannot_be_tried_out():
    with torch.device("meta"):
        model = make_model("Olmo")
    with pytest.raises(ValueError, match="is on the meta device; swap the model when it has its weights"):
        pyckpt.swap(model)
    hooked = make_model("Olmo")
    hooked.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="mlp has forward hooks"):
        pyckpt.swap(hooked)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Olmo", {}),
        ("Llama", {}),
        ("Llama", {"save": pyckpt.Save("attention", {"o": "host"})}),
        ("Llama", {"segments": 2}),
    ],
)
def test_what_breaks_a_compiled_graph_is_not_compiled_but_right(family, options):
    """Layers by their own forward, or by modules in order, and standard ones with other saves or in segments."""
    model, batch = make_model(family, num_hidden_layers=2, attn_implementation="sdpa"), make_batch("plain")
    if not options:
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Mish()
    pyckpt.swap(model, tile=10, **options)
    before = step(model, batch)
    for name, value in step(torch.compile(model, backend="eager"), batch).items():
        torch.testing.assert_close(value, before[name.removeprefix("_orig_mod.")])


# --- adapters on fused projections -----------------------------------------------------------------------------------

FUSED = {"GPT2": ["c_attn", "c_fc"], "GPTNeoX": ["query_key_value"], "Phi3": ["qkv_proj", "down_proj"]}


def with_adapters(family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=FUSED[family], lora_dropout=dropout)
    model = peft.get_peft_model(make_model(family, num_hidden_layers=1), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p) if "lora_B" in name else 0.0
    return model.to(dtype).train()


@pytest.mark.parametrize("family", FUSED)
def test_adapters_on_fused_projections(family):
    """Whose parts the table's generic path does not know: the layer's own forward is cut."""
    model = with_adapters(family)
    check(model, [make_batch(kind) for kind in KINDS])
    assert all("lora" in n for n in step(model, make_batch("plain")).keys() - {"loss"})


def test_what_adapters_on_fused_projections_drop_is_dropped_again():
    model, batch, results = with_adapters("Phi3", dropout=0.4), make_batch("padded"), []
    for save in pyckpt.SAVE_SETS:
        pyckpt.swap(model, save=save, tile=10)
        torch.manual_seed(3)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    for other in results[1:]:
        assert_same_bits(results[0], other)
    pyckpt.swap(model, tile=10)
    assert step(model, batch)["loss"] != results[0]["loss"]


# --- changes after the swap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name", "said"),
    [
        ("input_layernorm", "variance_epsilon", "input_layernorm now has variance_epsilon 0.5, not the 1e-06 it was"),
        ("self_attn", "scaling", "self_attn now has scaling 0.5, not the "),
    ],
)
@pytest.mark.parametrize("kind", ["standard", "generic"])
def test_numbers_that_are_changed_after_the_swap(kind, path, name, said):
    """A standard block has them from the swap; what runs the layer's own modules has its norms' from those."""
    model, batch = make_model("Llama"), make_batch("plain")
    if kind == "generic":
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Mish()
    twin = copy.deepcopy(model)
    assert {e.path for e in pyckpt.swap(model, loss=False).entries} == {kind}
    for changed in (model, twin):
        for layer in changed.model.layers:
            setattr(layer.get_submodule(path), name, 0.5)
    if kind == "generic" and name != "scaling":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(model(**batch).loss, twin(**batch).loss)
        return
    with pytest.warns(UserWarning, match=said):
        assert_same_bits(step(model, batch), step(twin, batch))


@pytest.mark.parametrize("path", ["mlp", "self_attn.q_proj", "input_layernorm"])
def test_a_module_of_the_same_class_in_the_place_of_another_runs(path):
    """On the generic path, which holds modules."""
    model, batch = make_model("Llama"), make_batch("plain")
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Mish()
    pyckpt.swap(model, tile=10)
    step(model, batch)
    parent, _, name = path.rpartition(".")
    layer = model.model.layers[0]
    setattr(layer.get_submodule(parent), name, copy.deepcopy(layer.get_submodule(path)))
    with torch.no_grad():
        for p in layer.get_submodule(path).parameters():
            p *= 1.5
    ours = step(model, batch)
    pyckpt.unswap(model)
    for n, t in step(model, batch).items():
        torch.testing.assert_close(ours[n], t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "StableLm", "Glm"])
def test_whatever_device_tensors_are_made_on_by_default(family):
    """As under torch.set_default_device("cuda"), for which a device that is not the model's stands in."""
    model, other = make_model(family), make_model(family)
    with torch.device("meta"):
        report = pyckpt.swap(model)
    assert report.entries == pyckpt.swap(other).entries
