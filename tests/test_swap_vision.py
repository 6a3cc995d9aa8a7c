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
        "generic",
    ),
    "Qwen2_5_VL": (
        {
            **TOKENS,
            "text_config": text([2, 2, 2]),
            "vision_config": {**PATCHES, **WIDTHS, "window_size": 32, "fullatt_block_indexes": [1]},
        },
        "generic",
    ),
    "Qwen3VL": (
        {
            **TOKENS,
            "text_config": text([4, 2, 2], head_dim=16, rope={"mrope_interleaved": True}),
            "vision_config": {**PATCHES, **WIDTHS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        },
        "generic",
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


@pytest.mark.parametrize("options", [{"segments": 2}, {"stream": pyckpt.Stream(7)}], ids=["segments", "stream"])
def test_positions_of_three_axes_are_handed_to_each_layer_by_its_model(options):
    """What is handed to layers follows from more than positions on the one axis of a tile: they run one by one."""
    model, batch = make("Qwen3VL")
    pyckpt.swap(model, tile=10)
    before = step(model, batch)
    pyckpt.unswap(model)
    report = pyckpt.swap(model, tile=10, **options)
    assert all(e.path == "generic" for e in report.entries if "language_model" in e.name)
    message = "position_ids of three axes change what each layer is handed: (segments are|streaming is) not used"
    with pytest.warns(UserWarning, match=message):
        after = step(model, batch)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_images_that_see_themselves_have_their_layers_run_again_whole():
    """Gemma 3 hands its text model a mask of each kind, with which the tokens of an image see each other."""
    model, batch = make("Gemma3")
    before = step(model, batch)
    pyckpt.swap(model, tile=10, loss=False)
    with pytest.warns(UserWarning, match=r"not \(B, S\): dict: .* original forward, each layer again as a whole"):
        after = step(model, batch)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
