"""Swapped models with PEFT's adapters: the same results as without the swap, as standard blocks where it is LoRA."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import assert_same_bits
from helpers import a_few
from swap_models import (
    FAMILIES,
    VOCAB,
    InFloat64,
    State,
    as_before,
    assert_same_with_every_save_set,
    assert_step_as_good,
    make_adapted,
    make_batch,
    make_model,
    step,
)
from torch.utils.flop_counter import FlopCounterMode

import pyckpt
from pyckpt.swap import lora

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.swap import training_peak

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("no_fallback")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of adapters on the standard path on a CPU too, where other numbers are faster to draw."""
    monkeypatch.setattr(lora, "draws_fast", lambda device: True)


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA on all": {"target_modules": "all-linear"},
    "DoRA": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "DoRA on all": {"target_modules": "all-linear", "use_dora": True},
    "biases too": {"target_modules": ["v_proj"], "bias": "all", "use_rslora": True},
    "LoRA with biases": {"target_modules": ["v_proj", "up_proj"], "lora_bias": True},
    "norms too": {"target_modules": ["down_proj"], "modules_to_save": ["post_attention_layernorm"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind):
    model = make_adapted(make_model("Llama"), **ADAPTERS[kind])
    expected = "standard" if kind in ("LoRA on all", "biases too") else "generic"
    assert as_before(model, make_batch("padded"))[0].path == expected


HOW: list[dict[str, Any]] = [{"tile": 10}, {"stream": pyckpt.Stream(tile=7, store="host")}]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", HOW, ids=["tiles", "stream"])
def test_embeddings_and_head_that_are_trained_as_a_whole(how, tied):
    """PEFT's `modules_to_save`, for new tokens: the loss makes no logits of the copy that is trained either."""
    model = make_model("Llama", tie_word_embeddings=tied)
    model = make_adapted(model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p) if "modules_to_save" in name else 0.0
    batch, exact = make_batch("padded"), copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    with model.disable_adapter():
        without = model(**batch).loss
    report = pyckpt.swap(model, **how)
    assert [e.path for e in report.entries] == ["standard"] * 3
    if "stream" in how:
        assert "streamed from the token ids on" in report.entries[-1].why
    assert model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, without, rtol=1e-5, atol=1e-6)
    assert "modules_to_save" in "".join(plain)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "how", [{"tile": 10}, {"stream": pyckpt.Stream(tile=7, store="host")}], ids=["tiles", "stream"]
)
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_rows_of_embeddings_that_are_trained_by_themselves(family, how, tied):
    """PEFT's `trainable_token_indices`, for new tokens: of tied embeddings the head has the same ones."""
    model = make_model(family, tie_word_embeddings=tied)
    model = make_adapted(model, target_modules=["q_proj"], trainable_token_indices=[3, 5, VOCAB - 1])
    report = check_without_logits(model, how, "trainable_tokens_delta")
    if "stream" in how:
        assert "streamed from the token ids on" in report.entries[-1].why


@pytest.mark.parametrize("family", ["Llama", "Granite", "Cohere"])
def test_a_head_with_lora(family):
    """Several at once too: its logits are one product with the weight and the adapters' B side by side."""
    model = make_adapted(make_model(family, tie_word_embeddings=False), target_modules=["q_proj", "lm_head"])
    model.add_adapter(
        "more", peft.LoraConfig(r=3, target_modules=["lm_head"], use_rslora=True, init_lora_weights=False)
    )
    model.base_model.set_adapter(["default", "more"])
    check_without_logits(model, {"tile": 10}, "lm_head")


def check_without_logits(model: Any, how: dict[str, Any], trained: str) -> Any:
    """The swapped model's loss makes no logits, with adapters on, off and merged; the report of the swap."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 * torch.randn_like(p) if trained in name else 0.0
    batch, exact = make_batch("padded"), copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    assert trained in "".join(plain)
    with model.disable_adapter():
        without = model(**batch).loss
    report = pyckpt.swap(model, **how)
    assert {e.path for e in report.entries} == {"standard"}
    made = model(**batch)
    assert made.logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)

    def assert_loss(expected: torch.Tensor) -> None:
        made = model(**batch)
        assert made.logits is None
        torch.testing.assert_close(made.loss, expected, rtol=1e-5, atol=1e-6)

    with model.disable_adapter():
        assert_loss(without)
    model.merge_adapter()
    assert_loss(made.loss)
    model.unmerge_adapter()
    assert_loss(made.loss)
    return report


def test_a_head_with_loras_dropout_drops_what_pefts_drops():
    model = make_adapted(make_model("Llama"), target_modules=["lm_head"], lora_dropout=0.4)
    batch = make_batch("padded")
    torch.manual_seed(3)
    plain = step(model, batch)
    pyckpt.swap(model)
    torch.manual_seed(3)
    made = step(model, batch)
    for name, value in plain.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)


def test_a_head_with_another_adapter_has_its_own_loss():
    model = make_adapted(make_model("Llama"), target_modules=["lm_head"], use_dora=True)
    batch = make_batch("padded")
    plain = step(model, batch)
    report = pyckpt.swap(model)
    assert [e.why for e in report.left] == ["loss: its adapter 'default' is a DoraLinearVariant, not plain LoRA"]
    made = step(model, batch)
    for name, value in plain.items():
        torch.testing.assert_close(made[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["DeepseekV3", "Mixtral"])
def test_adapters_of_parameters(family):
    """Which PEFT parametrizes for each call, and puts back as what they were then; a trial leaves nothing of that."""
    model = make_adapted(
        make_model(family), target_modules="all-linear", target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    kinds = [type(m) for m in model.modules()]
    entries = as_before(model, make_batch("padded"))
    assert {e.path for e in entries[:2]} == {"generic"}
    assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize(
    ("family", "options", "path"),
    [("Llama", {}, "generic"), ("Llama", {"use_dora": True}, "generic"), ("GPT2", {}, "standard")],
    ids=["LoRA", "DoRA", "LoRA on the standard path"],
)
def test_what_loras_dropout_drops_it_drops_again(family, options, path, request):
    """The same bits with every save set, and the slope of the seeded loss; in eval mode the gradients as before."""
    if path == "standard":
        request.getfixturevalue("drawn")
    options = {"lora_dropout": 0.3, "target_modules": "all-linear", **options}
    model, batch = make_adapted(make_model(family, torch.float64), **options).double(), make_batch("padded")
    assert_same_with_every_save_set(model, seed=5)

    def seeded() -> State:
        torch.manual_seed(3)
        return step(model, batch)

    assert pyckpt.swap(model, tile=10).entries[0].path == path
    with InFloat64():
        made = seeded()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert made.keys() - {"loss"} == trained.keys()
    assert not torch.equal(step(model, batch)["loss"], made["loss"])  # each step drops others
    # DoRA takes a weight's norm for a constant: of the gradients only its magnitudes' are slopes.
    moved = {n: p for n, p in trained.items() if "magnitude" in n} or trained
    direction, eps = {n: torch.randn_like(p) for n, p in moved.items()}, 1e-6
    ends = []
    for scale in (eps, -2 * eps):
        with torch.no_grad():
            for name, p in moved.items():
                p += scale * direction[name]
        with InFloat64():
            ends.append(seeded()["loss"])
    shares = torch.stack([(made[n] * d).sum() for n, d in direction.items()])
    slope = (ends[0] - ends[1]) / (2 * eps)
    torch.testing.assert_close(shares.sum(), slope, rtol=0.0, atol=1e-5 * shares.abs().max().item())
    pyckpt.unswap(model)
    as_before(model.float().eval(), batch)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "BOFT that drops"])
def test_adapters_that_draw_random_numbers_by_themselves(kind):
    """They draw in every call, by other means than Dropout: the layer runs again as a whole, and draws the same."""
    options = {"boft_dropout": 0.4, "boft_block_size": 4} if "BOFT" in kind else {"r": 4}
    config = getattr(peft, f"{kind.partition(' ')[0]}Config")(target_modules=["q_proj", "up_proj"], **options)
    model = peft.get_peft_model(make_model("Llama"), config).train()
    batch = make_batch("padded")

    def seeded() -> State:
        torch.manual_seed(3)
        return step(model, batch)

    before = seeded()
    assert pyckpt.swap(model, loss=False).entries[0].path == "checkpointed"
    assert_same_bits(seeded(), before)


def test_adapters_put_in_or_merged_after_the_swap():
    """The layers run their original forward, with a warning, until the model is swapped again."""
    model, batch = make_model("Llama"), make_batch("padded")
    pyckpt.swap(model)
    model = make_adapted(model, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"q_proj is now a peft.*, not the .*original forward"):
        step(model, batch)
    pyckpt.unswap(model)
    as_before(model, batch)
    merged = model.merge_and_unload().train().requires_grad_()
    with pytest.warns(UserWarning, match=r"q_proj is now a torch.*, not the peft.*original forward"):
        step(merged, batch)
    pyckpt.unswap(merged)
    assert as_before(merged, batch)[0].path == "standard"


def test_an_adapter_that_is_switched_off_is_seen():
    model, batch = make_adapted(make_model("Llama"), target_modules=["q_proj"]), make_batch("padded")
    with model.disable_adapter():
        without = model(**batch).loss
    pyckpt.swap(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).loss, without)
    assert not torch.allclose(model(**batch).loss, without)


# --- The standard path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", a_few(FAMILIES, always={1, 2, 6, 9}))
def test_lora_of_every_family(family):
    model = make_adapted(make_model(family), target_modules="all-linear")
    entries = as_before(model, make_batch("padded"))
    assert all(e.why.startswith("as a standard block with LoRA adapters") for e in entries[:-1]), entries


@pytest.mark.parametrize("batch", ["plain", "packed"])
@pytest.mark.parametrize("mixed", ["adapters in float32", "autocast", "all"])
def test_lora_in_bfloat16(mixed, batch):
    """With PEFT's default of float32 adapters beside a model in bfloat16, under autocast, and with all in bfloat16."""
    dtype = torch.float32 if mixed == "autocast" else torch.bfloat16
    model = make_adapted(make_model("Qwen3", dtype), target_modules="all-linear")
    if mixed == "all":
        model = model.to(dtype)
    assert {p.dtype for n, p in model.named_parameters() if "lora" in n} == {
        torch.bfloat16 if mixed == "all" else torch.float32
    }
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed == "autocast"):
        as_before(model, make_batch(batch), torch.bfloat16)


def test_save_sets_give_the_same_bits_with_lora():
    assert_same_with_every_save_set(
        make_adapted(make_model("Gemma2"), target_modules=["k_proj", "o_proj", "down_proj"])
    )


@pytest.mark.parametrize(
    "options", [{"stream": pyckpt.Stream(10, "device")}, {"segments": 2}], ids=["stream", "segments"]
)
def test_lora_in_streams_and_segments(options):
    model, batch = make_adapted(make_model("Llama"), target_modules="all-linear"), make_batch("padded")
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    pyckpt.swap(model, tile=10, **options)
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


def test_several_adapters_at_once_and_one_after_the_other():
    """Each by its own scale; chosen, changed and switched off after the swap; without gradients too."""
    model = make_adapted(make_model("Phi3", torch.float64), target_modules=["qkv_proj", "down_proj"])
    model.add_adapter("other", peft.LoraConfig(r=5, lora_alpha=1, target_modules=["gate_up_proj", "qkv_proj"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B.other" in n:
                p += torch.randn_like(p)
    model, batch = model.double(), make_batch("plain")
    layer = model.base_model.model.model.layers[0]

    def choose(state: str) -> None:
        if state == "both":
            model.base_model.set_adapter(["default", "other"])
        elif state == "rescaled":
            layer.self_attn.qkv_proj.set_scale("other", 3.0)
        else:
            model.set_adapter(state)

    def losses() -> State:
        found = {}
        for state in ("default", "other", "both", "rescaled"):
            choose(state)
            found |= {f"{state} {n}": t for n, t in step(model, batch).items()}
            with torch.no_grad():
                found[f"{state} logits"] = model(**batch).logits
        with model.disable_adapter():
            found["off"] = model(**batch).loss
        layer.self_attn.qkv_proj.set_scale("other", 1.0)
        return found

    with InFloat64():
        before = losses()
        pyckpt.swap(model, tile=10)
        after = losses()
    assert after.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-8, atol=1e-10, msg=name)
    assert len({round(float(v), 4) for n, v in before.items() if "loss" in n or n == "off"}) == 5


@pytest.mark.slow
def test_lora_compiles_without_a_break(drawn):
    """And anew where another adapter is chosen, or none."""
    model = make_model("Llama", attn_implementation="sdpa", num_hidden_layers=1)
    model = make_adapted(model, target_modules=["v_proj", "down_proj"], lora_dropout=0.2)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    batch = make_batch("padded")
    pyckpt.swap(model, tile=10)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in ("default", "other"):
        model.set_adapter(name)
        torch.manual_seed(3)
        before = step(model, batch)
        torch.manual_seed(3)
        after = step(compiled, batch)
        assert_same_bits({n.removeprefix("_orig_mod."): t for n, t in after.items()}, before)
    with model.disable_adapter():
        assert torch.equal(compiled(**batch).loss, model(**batch).loss)


def test_merged_in_place_after_the_swap():
    model, batch = make_adapted(make_model("Llama"), target_modules=["q_proj", "up_proj"]).eval(), make_batch("padded")
    pyckpt.swap(model, tile=10)
    before = model(**batch).loss
    model.merge_adapter()
    torch.testing.assert_close(model(**batch).loss, before)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**batch).loss, before)


def test_what_is_done_to_adapters_after_the_swap_is_seen():
    """Hooks on them, a variant: the original forward, with a warning."""
    model, batch = make_adapted(make_model("Llama"), target_modules=["q_proj"]), make_batch("plain")
    pyckpt.swap(model, tile=10)
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    handle = q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="q_proj: a module of its adapters has forward hooks.*original forward"):
        step(model, batch)
    handle.remove()
    model.add_adapter("dora", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.set_adapter("dora")
    with pytest.warns(UserWarning, match="q_proj: its adapter 'dora' is a DoraLinearVariant.*original forward"):
        step(model, batch)


def test_frozen_weights_cost_no_products():
    """FLOPs of the layers, to the last one: forward, all but the down projection again, dx; low ranks beside them."""
    tokens, rank, sizes = 26, 3, {"head_dim": 16, "attention_bias": False, "mlp_bias": False}
    model = make_adapted(make_model("Llama", **sizes), target_modules="all-linear")
    shapes = (
        dict.fromkeys("qo", (48, 64)) | dict.fromkeys("kv", (48, 32)) | dict.fromkeys(("gate", "up", "down"), (48, 72))
    )
    pyckpt.swap(model, tile=10)
    with FlopCounterMode(display=False) as counter:
        model.base_model.model.model(
            torch.randint(1, VOCAB, (1, tokens)), use_cache=False
        ).last_hidden_state.sum().backward()
    expected = 0
    for layer in range(2):
        for name, (a, b) in shapes.items():
            again, dx = name != "down", layer > 0 or name not in "qkv"
            expected += 2 * tokens * (a * b * (1 + again + dx) + rank * (a + b) * (3 + again + dx))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert sum(n for op, n in counts.items() if "mm" in op or "product" in op) == expected, counts


def test_training_peak_is_below_by_the_frozen_weights_share():
    """Their gradients, alive through a backward where they are accumulated, and the optimiser's two moments."""
    whole = make_model("Llama", hidden_size=96, intermediate_size=160)
    adapted = make_adapted(copy.deepcopy(whole), target_modules=["q_proj", "v_proj"])
    frozen = sum(p.numel() for p in adapted.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    pyckpt.swap(whole, tile=10)
    pyckpt.swap(adapted, tile=10)
    share, own = 3 * 4 * frozen, 3 * 4 * trained
    assert own < share / 20
    ids = torch.randint(1, VOCAB, (1, 26))
    peaks = [training_peak(model, lambda _: nullcontext(), ids) for model in (whole, adapted)]
    # What a backward makes beside them, a weight's new gradient before it is added among it, is not the same for both.
    assert peaks[0] - peaks[1] >= 0.98 * share - own
