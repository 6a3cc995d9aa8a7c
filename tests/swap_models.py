"""Small random models of the families that `pyckpt.swap` knows, and their loss and gradients, also in real float64."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import torch
from blocks import assert_as_good, assert_same_bits
from helpers import PerhapsChanceError, assert_within
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import pyckpt

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it then

VOCAB = 61
KINDS = ("plain", "padded", "packed")
State = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA: dict[str, Any] = {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7}
# By the name of transformers' config without "Config"; what a family has of its own is set, and odd.
FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 0.25},
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx": True},
    "GPTNeoX": {"rotary_pct": 0.5, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "Granite": {
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "Llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "Mistral": {"sliding_window": 7},
    "Olmo2": {},
    "Phi3": {"sliding_window": 7},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "Starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0, "sliding_window": 7},
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
MIXTURES: dict[str, dict[str, Any]] = {
    "GptOss": {
        **EXPERTS,
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 7,
        "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    },
    "Mixtral": {**EXPERTS, "num_local_experts": 4, "sliding_window": 7},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "mlp_only_layers": [0]},
}
MLA: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
ROUTED = {
    **EXPERTS,
    "n_routed_experts": 4,
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "n_group": 2,
    "topk_group": 1,
}
_GPTJ = {
    "n_embd": 48,
    "n_layer": 1,
    "n_head": 4,
    "n_positions": 64,
    "rotary_dim": 8,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# They are cut at their attention, where they are not in a table.
OTHERS: dict[str, dict[str, Any]] = {
    "Apertus": {"num_hidden_layers": 1},
    "Arcee": {"num_hidden_layers": 1},
    "CodeGen": _GPTJ,
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "DeepseekV3": {**MLA, **ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "Ernie4_5": {"num_hidden_layers": 1},
    "GraniteMoe": {
        **EXPERTS,
        "num_hidden_layers": 1,
        "num_local_experts": 4,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "Exaone4": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "GPTJ": _GPTJ,
    "GPTBigCode": {"num_hidden_layers": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Gemma": {"num_hidden_layers": 1, "head_dim": 16},
    "Glm": {"num_hidden_layers": 1, "head_dim": 12},
    "Glm4": {"num_hidden_layers": 1, "head_dim": 12},
    "Helium": {"num_hidden_layers": 1, "head_dim": 12},
    "Ministral": {"head_dim": 16, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "NanoChat": {"num_hidden_layers": 1, "final_logit_softcapping": 2.0},
    "Nemotron": {"num_hidden_layers": 1},
    "OPT": {"num_hidden_layers": 1, "ffn_dim": 72, "word_embed_proj_dim": 48, "dropout": 0.0},
    "Olmo": {"num_hidden_layers": 1, "clip_qkv": 1.5},
    "Olmo3": {"sliding_window": 13, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi": {"num_hidden_layers": 1, "partial_rotary_factor": 0.5},
    "Qwen3Next": {
        **ROUTED,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "head_dim": 16,
    },
    "SeedOss": {"num_hidden_layers": 1, "head_dim": 12, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "StableLm": {"num_hidden_layers": 1, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "VaultGemma": {
        "head_dim": 12,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
    },
}
# Those of them that are in a table after all; the tests that cut them do without it.
TABLED = (
    *("Arcee", "Cohere2", "Ernie4_5", "Exaone4", "Gemma", "Glm", "Glm4", "Helium", "Ministral", "Nemotron", "Olmo3"),
    *("Phi", "SeedOss"),
)
# Those that are standard blocks, which is found out by trying them out.
TRIED = ("GPTBigCode", "VaultGemma")
# Without transformers' attention functions, or without attention: their layers run again as a whole.
WHOLE: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {"new_decoder_architecture": True},
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 7},
    "Mamba": {"state_size": 4},
    "Mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 12, "n_groups": 2},
    "Mpt": {"d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
}
# Some layers of theirs are cut at their attention, the others are not.
HYBRIDS: dict[str, dict[str, Any]] = {
    "Jamba": {
        **EXPERTS,
        "num_experts": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "MiniMax": {
        **EXPERTS,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 8,
    },
}
GPT2_SIZES = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}


def make_model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The family's causal language model, in training mode, with every parameter random."""
    import transformers

    sizes = GPT2_SIZES if family == "GPT2" else SIZES
    options = (FAMILIES | MIXTURES | OTHERS | WHOLE | HYBRIDS).get(family, {}) | options
    names = {
        "GPT2": ("GPT2", "GPT2LMHeadModel"),
        "Gemma3": ("Gemma3Text", "Gemma3ForCausalLM"),
        "Llama4": ("Llama4Text", "Llama4ForCausalLM"),
    }
    config, model = names.get(family, (family, f"{family}ForCausalLM"))
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**{**sizes, **options}))
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made.to(dtype).train()


def make_adapted(model: Any, **options: Any) -> Any:
    """The model with LoRA adapters of which none is zero."""
    import peft

    made = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=4, **options))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p += 0.1 * torch.randn_like(p)
    return made


def make_batch(kind: str) -> dict[str, Tensor]:
    """Tokens and labels: "plain" (2, 19), "padded" at either end, or "packed" (1, 30) by position_ids."""
    if kind == "packed":
        ids = torch.randint(1, VOCAB, (1, 30))
        positions = torch.cat([torch.arange(n) for n in (5, 1, 24)])[None]
        # With a cache, which it makes by default, transformers does not see that positions start anew.
        return {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    ids = torch.randint(1, VOCAB, (2, 19))
    if kind == "plain":
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[0, 14:] = 0
    mask[1, :3] = 0
    # Padding too has something to predict: many a script's labels are the padded input_ids.
    ids, labels = ids * mask, ids * mask
    labels[0, 3:5] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def known(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without labels of what no block gives: padding that sees nothing, under eager attention."""
    mask = batch.get("attention_mask")
    if mask is None or model.config._attn_implementation != "eager":
        return batch
    blind = torch.nn.functional.pad(mask.cumsum(1) == 0, (1, 0))[:, :-1]  # each label belongs to the token before it
    return {**batch, "labels": batch["labels"].masked_fill(blind, -100)}


def make_tokenizer() -> Any:
    """Words "t1", "t2", ..., each its number, for what the models above read."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"[pad]": 0, **{f"t{i}": i for i in range(1, VOCAB)}}
    model = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[pad]", eos_token="t1")


class InFloat64(TorchFunctionMode):
    """Makes transformers compute in float64 where it asks for float32: in its norms, softmax, RoPE and loss.

    A router's near tie is decided by a rounding in float32, and another expert gives another loss: no rule about
    roundings holds for such a draw, so `PerhapsChanceError` has the test draw again.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.topk or func is Tensor.topk:
            assert_clear_choice(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        elif func is Tensor.to or func is nn.functional.softmax:
            wide = {torch.float32: torch.float64}
            args = tuple(wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
            kwargs = {n: wide.get(a, a) if isinstance(a, torch.dtype) else a for n, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def assert_clear_choice(scores: Tensor, k: int, dim: int = -1, **_: Any) -> None:
    """The arguments of `topk`: what it takes is apart from what it leaves by more than float32's roundings."""
    if k < scores.shape[dim]:
        last, first_left = scores.detach().topk(k + 1, dim).values.narrow(dim, k - 1, 2).unbind(dim)
        # A score at the end of some layers is off by some ten roundings of the largest.
        close = last - first_left < 64 * torch.finfo(torch.float32).eps * scores[scores.isfinite()].abs().max()
        if close.any():
            raise PerhapsChanceError("a choice between experts is tied but for roundings")


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **grads}


def as_before(model: Any, batch: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """Swap the model: its loss and gradients are as good as those before. The report's entries."""
    batch, exact = known(model, batch), copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    plain = step(model, batch)
    report = pyckpt.swap(model, tile=10)
    assert not report.left, str(report)
    assert_step_as_good(step(model, batch), plain, truth, dtype)
    return report.entries


def assert_same_with_every_save_set(model: Any, seed: int | None = None) -> None:
    """A step's bits. With a seed: of what is dropped."""
    batch, results = known(model, make_batch("padded")), []
    for save in pyckpt.SAVE_SETS:
        pyckpt.swap(model, save=save, tile=10)
        if seed is not None:
            torch.manual_seed(seed)
        results.append(step(model, batch))
        pyckpt.unswap(model)
    for other in results[1:]:
        assert_same_bits(results[0], other)


def assert_generates_the_same(model: Any) -> None:
    """The tokens, after a swap."""
    ids = torch.randint(1, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    before = model.eval().generate(ids, **options)
    pyckpt.swap(model)
    assert torch.equal(model.generate(ids, **options), before)


def assert_copies_are_swapped_on_their_own(model: Any) -> None:
    """Copies and pickles of a model that this swaps, which stays so."""
    batch = make_batch("plain")
    pyckpt.swap(model, tile=10)
    before = step(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(step(twin, batch), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert_same_bits(step(model, batch), before)
        pyckpt.unswap(twin)
    assert model(**batch).logits is None


def check(model: Any, batches: list[dict[str, Any]], left: tuple[str, ...] = (), **options: Any) -> None:
    """Loss and gradients of the swapped model against those before, and both against float64.

    `left`: names of what the report says is left as it was, "(model)" for the loss.
    """
    batches = [known(model, batch) for batch in batches]
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = [step(exact, batch) for batch in batches]
    plain = [step(model, batch) for batch in batches]
    report = pyckpt.swap(model, tile=10, **options)
    assert tuple(e.name for e in report.left) == left, str(report)
    for batch, p, t in zip(batches, plain, truth, strict=True):
        assert (model(**batch).logits is None) == ("(model)" not in left)
        assert_step_as_good(step(model, batch), p, t, next(model.parameters()).dtype)


def check_under_autocast(model: Any, batch: dict[str, Any]) -> None:
    """A swapped float32 model is as good in bfloat16 by autocast as it was without; it stays swapped."""
    exact = copy.deepcopy(model).double()
    with InFloat64():
        truth = step(exact, batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = step(model, batch)
        pyckpt.swap(model, tile=10)
        assert_step_as_good(step(model, batch), plain, truth, torch.bfloat16)


def assert_step_as_good(ours: State, plain: State, truth: State, dtype: torch.dtype) -> None:
    """`assert_as_good`, but for the loss: a single value's error is chance, and four roundings are allowed."""
    error, reference = ((r["loss"].double() - truth["loss"]).abs() for r in (ours, plain))
    allowed = 2 * reference + 4 * torch.finfo(dtype).eps * truth["loss"]
    assert_within(error, allowed, f"loss: {float(error):.3g}, more than the {float(allowed):.3g} allowed")
    assert_as_good(*({n: t for n, t in r.items() if n != "loss"} for r in (ours, plain, truth)), dtype)
