"""Losses of labels that are aligned with the logits, of swapped models: the same as before, and no logits."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from swap_models import InFloat64, assert_step_as_good, step
from torch import Tensor, nn

import pyckpt
from pyckpt.ops import linear_cross_entropy as op

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("no_fallback")

VOCAB, SEQ = 67, 12
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
BERT = ENCODER | NO_DROPOUT
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **SPECIAL,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 64,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}
# The class, that of its config, and its options.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "BERT": ("BertForMaskedLM", "BertConfig", BERT),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", "XLMRobertaConfig", BERT),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", {**ENCODER, **SPECIAL, "sep_token_id": 2}),
    "ELECTRA": ("ElectraForMaskedLM", "ElectraConfig", {**BERT, "embedding_size": 16}),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", BERT),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "mT5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART),
    "M2M100": ("M2M100ForConditionalGeneration", "M2M100Config", BART),
    "Switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {**T5, "num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0},
    ),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", BART | WHISPER),
}
THREE = pytest.mark.parametrize("name", ["BERT", "ModernBERT", "BART"])


def make(name: str, **options: Any) -> Any:
    """The model in training mode, with every parameter random, and BART's bias of the logits, which is a buffer."""
    kind, config, given = MODELS[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**{"vocab_size": VOCAB, **given, **options}))
    with torch.no_grad():
        for t in model.parameters():
            t += 0.1 * torch.randn_like(t)
        if name == "BART":
            model.final_logits_bias += torch.randn(model.final_logits_bias.shape)
    return model.train()


def batch_for(model: Any, vocab: int = VOCAB, seq: int = SEQ) -> dict[str, Tensor]:
    labels = torch.randint(3, vocab, (2, seq))
    labels[0, :5] = -100
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 20), "labels": labels}
    tokens, mask = torch.randint(3, vocab, (2, seq)), torch.ones(2, seq, dtype=torch.long)
    mask[1, -3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_as_before_without_logits(name):
    model = make(name)
    batch, exact = batch_for(model), copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, {n: t.double() if t.is_floating_point() else t for n, t in batch.items()})
    plain = step(model, batch)
    report = pyckpt.swap(model)
    assert not report.left, str(report)
    assert report.entries[-1].why == "loss: linear_cross_entropy, no logits with labels"
    assert model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


@THREE
def test_what_a_call_asks_for(name):
    model = make(name)
    batch = batch_for(model)
    plain = model(**batch, output_hidden_states=True)
    items = {"num_items_in_batch": 5}
    divided = model(**batch, **items).loss if name == "ModernBERT" else None
    pyckpt.swap(model)
    made = model(**batch, output_hidden_states=True)
    assert type(made) is type(plain) and list(made) == [n for n in plain if n != "logits"]
    torch.testing.assert_close(made.loss, plain.loss)
    assert isinstance(model(**batch, return_dict=False), tuple)
    torch.testing.assert_close(model(**batch, return_dict=False)[0], plain.loss)
    torch.testing.assert_close(model(**batch, output_logits=True).logits, plain.logits)
    unlabelled = {n: t for n, t in batch.items() if n != "labels"} | _decoder(model, batch)
    torch.testing.assert_close(model(**unlabelled).logits, plain.logits)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain.logits)
    if divided is not None:
        torch.testing.assert_close(model(**batch, **items).loss, divided)
        with pytest.warns(UserWarning, match="ignore_index is for the model's own loss"):
            assert model(**batch, ignore_index=-100).logits is not None
    pyckpt.unswap(model)
    torch.testing.assert_close(model(**batch).logits, plain.logits)
    assert "forward" not in model.get_output_embeddings().__dict__


def _decoder(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}


@THREE
def test_losses_of_single_tokens_and_their_weights(name):
    model = make(name)
    batch, weights = batch_for(model), torch.rand(2, SEQ)
    with torch.no_grad():
        logits = model(**batch).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none").view(2, SEQ)
    weighted = (losses * weights).sum() / weights.masked_fill(batch["labels"] == -100, 0.0).sum()
    pyckpt.swap(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(**batch, reduction="none").loss, losses, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model(**batch, token_weight=weights).loss, weighted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"reduction can't be had of the model's own forward.*logits are asked for"):
        model(**batch, reduction="none", output_logits=True)
    with pytest.raises(ValueError, match=r"token_weight has shape \(2, 3\), expected \(2, 12\)"):
        model(**batch, token_weight=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"predicts each label in its own place.*call it with"):
        pyckpt.token_losses(model, batch["labels"])


@THREE
def test_smoothed_labels_and_a_loss_of_the_normaliser(name):
    model = make(name)
    batch = batch_for(model)
    with torch.no_grad():
        logits, labels = model(**batch).logits.double(), batch["labels"]
    smoothed = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    want = smoothed + 0.01 * logits.logsumexp(-1).square()[labels != -100].mean()
    pyckpt.swap(model)
    got = model(**batch, label_smoothing=0.1, z_loss=0.01).loss
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing can't be had of the model's own forward.*logits are asked"):
        model(**batch, label_smoothing=0.1, output_logits=True)


def test_a_mixture_whose_routers_have_a_share_of_the_loss():
    model = make("Switch")
    batch = batch_for(model) | {"output_router_logits": True}
    plain = step(model, batch)
    pyckpt.swap(model)
    with pytest.warns(UserWarning, match="output_router_logits is for the model's own loss, which runs, with logits"):
        made = step(model, batch)
    for n, t in plain.items():
        torch.testing.assert_close(made[n], t, rtol=1e-4, atol=1e-5)


@THREE
def test_options_of_the_swap(name):
    model = make(name)
    batch = batch_for(model)
    plain = step(model, batch)
    for loss, gradients in (("always", True), ("always", False), ("recompute", True), (False, True)):
        pyckpt.swap(model, loss=loss)
        with torch.set_grad_enabled(gradients):
            assert (model(**batch).logits is None) is bool(loss)
        for n, t in step(model, batch).items():
            torch.testing.assert_close(t, plain[n], rtol=1e-4, atol=1e-5)
        pyckpt.unswap(model)


@pytest.mark.parametrize("name", ["XLM-RoBERTa", "T5"])
def test_memory(name, monkeypatch):
    """Not half of what the logits alone take, once."""
    vocab, seq = 100_000, 60
    monkeypatch.setitem(op._CHUNK_ELEMENTS, "cpu", 2**20)
    monkeypatch.setattr(op, "_MIN_CHUNK_TOKENS", 8)
    model = make(name, vocab_size=vocab)
    for p in model.parameters():
        p.requires_grad_(p.shape[0] != vocab)
    batch = batch_for(model, vocab, seq)
    pyckpt.swap(model)
    with pyckpt.measure.memory() as m:
        model(**batch).loss.backward()
    own = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert m.peak_bytes - own < 2 * seq * vocab * 4 / 2


@THREE
def test_a_swap_leaves_the_model_as_it_is(name):
    """Its forward is tried out: random numbers, buffers and modes are as they were."""
    model = make(name)
    model.eval()
    next(iter(model.children())).train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    pyckpt.swap(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_a_swap_leaves_sparse_attention_as_it_is():
    """BigBird takes dense attention for good where a sequence is short, as those are of a trial."""
    model = transformers.BigBirdForMaskedLM(transformers.BigBirdConfig(vocab_size=VOCAB, **BERT)).train()
    pyckpt.swap(model)
    assert model.bert.attention_type == "block_sparse"
    assert {type(m.attention.self).__name__ for m in model.bert.encoder.layer} == {"BigBirdBlockSparseAttention"}


class Changed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


@pytest.mark.parametrize("change", ["another", "hooks", "hooks around"])
def test_a_head_that_is_changed_after_the_swap_is_the_models_own(change):
    model = make("BERT" if change == "hooks around" else "mT5")
    batch, twin = batch_for(model), copy.deepcopy(model)
    pyckpt.swap(model)
    for one in (twin, model):
        if change == "another":
            weight = one.lm_head.weight
            one.lm_head = Changed(32, VOCAB, bias=False)
            one.lm_head.weight = weight
        elif change == "hooks around":
            one.cls.predictions.register_forward_hook(lambda module, args, out: out * 2.0)
        else:
            one.lm_head.register_forward_hook(lambda module, args, out: out * 2.0)
    with pytest.warns(UserWarning, match="the loss is the model's own, from logits"):
        made = step(model, batch)
    for n, t in step(twin, batch).items():
        torch.testing.assert_close(made[n], t, rtol=1e-4, atol=1e-5)


class Penalized(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
    """Its loss has another part too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = super().forward(*args, **kwargs)
        if made.loss is not None:
            made["loss"] = made.loss + made.logits.square().mean()
        return made


class Capped(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
    """Its logits are capped, which small ones do not show."""

    def forward(self, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        made = super().forward(input_ids, **kwargs)
        made["logits"] = 30.0 * torch.tanh(made.logits / 30.0)
        if labels is not None:
            made["loss"] = nn.functional.cross_entropy(made.logits.flatten(0, 1), labels.flatten())
        return made


class Placed(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
    """To its logits something is added that places have."""

    def forward(self, input_ids: Tensor, labels: Any = None, **kwargs: Any) -> Any:
        made = super().forward(input_ids, **kwargs)
        made["logits"] = made.logits + torch.arange(input_ids.shape[1]).view(-1, 1) * torch.linspace(0, 1, VOCAB)
        if labels is not None:
            made["loss"] = nn.functional.cross_entropy(made.logits.flatten(0, 1), labels.flatten())
        return made


class Hooked(transformers.BertForMaskedLM):  # type: ignore[misc, name-defined]
    """Somebody looks at its logits, and changes them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.cls.register_forward_hook(lambda module, args, logits: logits * 2.0)


@pytest.mark.parametrize("kind", [Penalized, Capped, Placed, Hooked])
def test_another_loss_is_the_models_own(kind):
    model = kind(transformers.BertConfig(vocab_size=VOCAB, **BERT)).train()
    batch = batch_for(model)
    plain = step(model, batch)
    report = pyckpt.swap(model)
    assert [e.kind for e in report.left] == [kind.__name__]
    reasons = {Hooked: "BertOnlyMLMHead has forward hooks", Placed: "it adds to its logits what is not the same"}
    assert report.left[0].why.startswith(f"loss: {reasons.get(kind, 'its lo')}")
    assert model(**batch).logits is not None
    for n, t in step(model, batch).items():
        torch.testing.assert_close(t, plain[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ModernBERT", "BART"])
def test_compiles_without_a_break(name):
    model = make(name)
    batch = batch_for(model)
    pyckpt.swap(model)
    plain = step(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        loss = compiled(**batch).loss
    torch.testing.assert_close(loss.detach(), plain["loss"])


@pytest.mark.parametrize("name", ["BERT", "T5"])
def test_under_autocast_and_in_half_precision(name):
    model = make(name)
    batch, half = batch_for(model), copy.deepcopy(model).bfloat16()
    for one in (model, half):
        with torch.autocast("cpu", torch.bfloat16, enabled=one is model):
            plain = one(**batch).loss
            pyckpt.swap(one)
            made = one(**batch)
        assert made.logits is None and made.loss.dtype == torch.float32
        torch.testing.assert_close(made.loss, plain.float(), rtol=2e-2, atol=0.0)  # two of bfloat16's roundings
        made.loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in one.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("T5", {"target_modules": ["q", "v"]}),
        ("T5", {"target_modules": ["q"], "trainable_token_indices": [3, 5]}),
        ("BART", {"target_modules": ["q_proj", "lm_head"]}),
        ("BERT", {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    ],
    ids=["LoRA", "rows", "LoRA on the head", "a head that is trained as a whole"],
)
def test_with_adapters(name, options):
    peft = pytest.importorskip("peft")
    model = make(name)
    batch = batch_for(model)
    model = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options)).train()
    plain = step(model, batch)
    with model.disable_adapter():
        without = model(**batch).loss
    pyckpt.swap(model)
    assert model(**batch).logits is None
    for n, t in step(model, batch).items():
        torch.testing.assert_close(t, plain[n], rtol=1e-4, atol=1e-5)
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the head is another module then
        torch.testing.assert_close(model(**batch).loss, without)


@THREE
def test_a_copy_is_swapped_on_its_own(name):
    model = make(name)
    batch = batch_for(model)
    plain = step(model, batch)
    pyckpt.swap(model)
    other = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert other(**batch).logits is None
    for n, t in step(other, batch).items():
        torch.testing.assert_close(t, plain[n], rtol=1e-4, atol=1e-5)
    pyckpt.unswap(other)
    assert other(**batch).logits is not None and model(**batch).logits is None


def test_a_swap_leaves_the_generators_of_other_devices_alone(monkeypatch):
    """`torch.manual_seed` seeds those of GPUs that are not started yet too: each process would drop the same then."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    pyckpt.swap(make("T5"))
    assert not seeded
    made = torch.get_rng_state()
    torch.set_rng_state(before)
    make("T5")
    assert torch.equal(torch.get_rng_state(), made)
