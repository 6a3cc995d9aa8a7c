"""Models that see: their text layers are swapped, with positions of three axes and what is added between layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from swap_models import SIZES, VOCAB, InFloat64, assert_step_as_good, step

import pyckpt

transformers = pytest.importorskip("transformers")

IMAGE, START, END = VOCAB - 1, VOCAB - 3, VOCAB - 4
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VOCAB - 2,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
PATCHES = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}


def text(section: list[int], **options: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **options.pop("rope", {})}
    return {**SIZES, "rope_parameters": rope, **options}


# By the name of the config: its options, and the path of the text's layers.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "Qwen2VL": (
        {
            **TOKENS,
            "text_config": text([2, 2, 2]),
            "vision_config": {**PATCHES, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
        },
        "standard",
    ),
    "Qwen2_5_VL": (
        {
            **TOKENS,
            "text_config": text([2, 2, 2]),
            "vision_config": {**PATCHES, **WIDTHS, "window_size": 32, "fullatt_block_indexes": [1]},
        },
        "standard",
    ),
    "Qwen3VL": (
        {
            **TOKENS,
            "text_config": text([4, 2, 2], head_dim=16, rope={"mrope_interleaved": True}),
            "vision_config": {**PATCHES, **WIDTHS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        "standard",
    ),
    "Llava": (
        {
            "text_config": {"model_type": "llama", **SIZES},
            "vision_config": {"model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 16, **TOWER},
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        "standard",
    ),
    "Gemma3": (
        {
            "text_config": {**SIZES, "head_dim": 12, "sliding_window": 7},
            "vision_config": {"patch_size": 4, "vision_use_head": False, **TOWER},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
        "standard",
    ),
}


def make(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, without dropout, and a batch with one image in each row, the first row padded."""
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name][0])
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    ids = torch.randint(1, END, (2, 19))
    ids[:, 2:8] = torch.tensor([START, *[IMAGE] * 4, END])
    mask = torch.ones_like(ids)
    mask[0, 15:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if name.startswith("Qwen"):
        pixels = {"pixel_values": torch.randn(2 * 16, 3 * 2 * 8 * 8), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        return model.train(), batch | pixels | {"mm_token_type_ids": (ids == IMAGE).int()}
    types = {"token_type_ids": (ids == IMAGE).long()} if name == "Gemma3" else {}
    return model.train(), batch | {"pixel_values": torch.randn(2, 3, 16, 16)} | types


def in_float64(batch: dict[str, Any]) -> dict[str, Any]:
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "Gemma3"])
def test_gradients_are_those_of_before(name):
    model, batch = make(name)
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), in_float64(batch))
    plain = step(model, batch)
    report = pyckpt.swap(model, tile=10)
    assert {e.path for e in report.entries if "language_model" in e.name} == {CONFIGS[name][1]}
    assert not report.left and model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


HOWS: dict[str, dict[str, Any]] = {
    "alone": {},
    "segments": {"segments": 2},
    "stream": {"stream": pyckpt.Stream(7)},
    "both": {"stream": pyckpt.Stream(7), "segments": 2},
}


@pytest.mark.usefixtures("no_fallback")
def test_labels_that_a_model_hands_on_are_no_reason_to_make_logits():
    """Gemma 3 hands them to its base model, and makes the usual loss: without images here, whose masks are others."""
    model, batch = make("Gemma3")
    batch = {n: t for n, t in batch.items() if n not in ("pixel_values", "token_type_ids")}
    batch["input_ids"] = batch["input_ids"].clamp(max=END - 1)
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), batch)
    plain = step(model, batch)
    report = pyckpt.swap(model, tile=10)
    assert report.entries[-1].path == "standard"
    assert model(**batch).logits is None
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cut_at_attention", [False, True], ids=["standard", "generic"])
def test_positions_of_three_axes(cut_at_attention, how, request):
    """Each layer turns by them, in a run of several too; one that is cut is handed what its model makes of a tile's."""
    if cut_at_attention:
        request.getfixturevalue("cut")
    model, batch = make("Qwen2VL")
    with InFloat64():
        truth = step(copy.deepcopy(model).double(), in_float64(batch))
    plain = step(model, batch)
    report = pyckpt.swap(model, tile=10, **HOWS[how])
    paths = {e.path for e in report.entries if "language_model" in e.name}
    assert paths == {"generic" if cut_at_attention else "standard"}
    assert_step_as_good(step(model, batch), plain, truth, torch.float32)


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("name", ["Qwen2VL", "Qwen3VL"])
@pytest.mark.parametrize("how", HOWS)
def test_a_first_axis_of_text_cuts_packed_sequences(name, how):
    """position_ids (4, B, S): the first says where sequences begin, and layers turn by the other three."""
    model, ids = make(name)[0], torch.randint(1, END, (2, 19))
    first = torch.cat([torch.arange(8), torch.arange(11)]).expand(2, 19)
    positions = torch.randint(0, 50, (3, 2, 19))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}
    apart, whole = ({**batch, "position_ids": p} for p in (torch.cat([first[None], positions]), positions))
    plains = [step(model, b) for b in (apart, whole)]
    assert not torch.allclose(plains[0]["loss"], plains[1]["loss"])
    with InFloat64():
        exact = copy.deepcopy(model).double()
        truths = [step(exact, b) for b in (apart, whole)]
    pyckpt.swap(model, tile=10, **HOWS[how])
    for b, plain, truth in zip((apart, whole), plains, truths, strict=True):
        assert_step_as_good(step(model, b), plain, truth, torch.float32)


def test_deepstack_is_added_between_layers():
    """Then they run one by one, on the positions of three axes."""
    model, batch = make("Qwen3VL")
    pyckpt.swap(model, tile=10)
    before = step(model, batch)
    pyckpt.unswap(model)
    pyckpt.swap(model, tile=10, segments=2)
    with pytest.warns(
        UserWarning,
        match="deepstack_visual_embeds, visual_pos_masks change what each layer is handed: segments are not used",
    ):
        after = step(model, batch)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_other_sections_than_at_the_swap():
    """Of which axis each pair of dims turns by: the original forwards run."""
    model, batch = make("Qwen2VL")
    twin = copy.deepcopy(model)
    pyckpt.swap(model, loss=False)
    for m in (model, twin):
        m.model.language_model.rotary_emb.mrope_section = [3, 2, 1]
    with pytest.warns(UserWarning, match="RoPE's frequencies are not those of the swap"):
        found = step(model, batch)
    for name, value in step(twin, batch).items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("how", ["alone", "segments", "stream"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_that_trains_without_a_cache_looks_at_positions(training, how):
    """Whatever its config says: in training its masks are cut where positions start anew, in eval mode they are not."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    kinds = ["sliding_attention", "full_attention"]
    options = {"head_dim": 12, "layer_types": kinds, "sliding_window": 7, "rope_parameters": dict.fromkeys(kinds, rope)}
    model = transformers.CohereCompassTextModel(transformers.CohereCompassTextConfig(**SIZES, **options)).train(
        training
    )
    assert model.config.use_cache
    plain, ids = copy.deepcopy(model), torch.randint(1, 40, (1, 19))
    first = torch.cat([torch.arange(8), torch.arange(11)])[None]
    pyckpt.swap(model, tile=10, **HOWS[how])
    for positions in (first, torch.cat([first[None], torch.randint(0, 50, (3, 1, 19))])):
        made = [m(input_ids=ids, position_ids=positions).last_hidden_state for m in (model, plain)]
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "experts_implementation": "eager"}
# By the name of the text model: options, and the paths of its layers.
TEXTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Glm4v": ({}, ["standard", "standard"]),
    "GlmOcr": ({}, ["standard", "standard"]),
    "PaddleOCR": ({}, ["standard", "standard"]),
    "Glm4vMoe": (
        {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        ["standard", "generic"],
    ),
    "Qwen3VLMoe": ({**EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}, ["generic", "generic"]),
}


@pytest.mark.usefixtures("no_fallback")
@pytest.mark.parametrize("name", TEXTS)
def test_other_models_with_three_axes(name):
    options, paths = TEXTS[name]
    kind = getattr(transformers, "PaddleOCRTextModel" if name == "PaddleOCR" else f"{name}TextModel")
    section = [1, 1, 1] if name == "Glm4vMoe" else [2, 2, 2]
    config = kind.config_class(**{**text(section, head_dim=12), "moe_intermediate_size": 24, **options})
    config._attn_implementation = "eager"
    model = kind(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    ids, positions, wanted = torch.randint(1, 40, (2, 17)), torch.randint(0, 60, (3, 2, 17)), torch.randn(2, 17, 48)

    def run(model: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        y = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        loss = (y - wanted.to(y.dtype)).square().mean()
        loss.backward()
        return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}

    with InFloat64():
        truth = run(copy.deepcopy(model).double())
    plain = run(model)
    for how in ({}, {"stream": pyckpt.Stream(7), "segments": 2}):
        report = pyckpt.swap(model, tile=10, **how)
        assert [e.path for e in report.entries] == paths
        assert_step_as_good(run(model), plain, truth, torch.float32)
        pyckpt.unswap(model)


def test_images_that_see_themselves_have_their_layers_run_again_whole():
    """Gemma 3 hands its text model a mask of each kind, with which the tokens of an image see each other."""
    model, batch = make("Gemma3")
    before = step(model, batch)
    pyckpt.swap(model, tile=10, loss=False)
    with pytest.warns(
        UserWarning, match="that is not the causal one: .* original forward, each layer again as a whole"
    ):
        after = step(model, batch)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
