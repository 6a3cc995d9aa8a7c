"""Swapped models whose linear layers have quantized weights (bitsandbytes'), with LoRA beside them: QLoRA."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import needs_gloo
from swap_models import (
    TABLED,
    InFloat64,
    State,
    assert_same_with_every_save_set,
    assert_step_as_good,
    known,
    make_adapted,
    make_batch,
    make_model,
    step,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pyckpt
from pyckpt.swap.block import MappedBlock
from pyckpt.swap.replaced import replaced_in

pytest.importorskip("transformers")
pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.usefixtures("no_fallback")

FAMILIES = ["Llama", "Qwen2", "Phi3", "GPT2", "GPTNeoX", "Gemma2", "Cohere", "Starcoder2"]


def quantized(model: Any, compute: torch.dtype | None = torch.float32, **options: Any) -> Any:
    """The model, whose layers' linear layers are of 4 bits from here on, in their names' places."""
    for path, module in list(model.named_modules()):
        if "layers." not in path and ".h." not in path:
            continue
        if isinstance(module, nn.Linear):
            weight = module.weight
        elif type(module).__name__ == "Conv1D":
            weight = module.weight.t()
        else:
            continue
        made = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], module.bias is not None, compute, quant_type="nf4", **options
        )
        made.weight = bnb.nn.Params4bit(
            weight.detach().contiguous(), requires_grad=False, quant_type="nf4", module=made, **options
        )
        made.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made.to("cpu").train())
    return model


def dense(model: Any) -> Any:
    """A copy in float64 with plain linear layers of what the quantized weights are."""
    made = copy.deepcopy(model)
    for path, module in list(made.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
            plain = nn.Linear(weight.shape[1], weight.shape[0], module.bias is not None)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
            parent, _, name = path.rpartition(".")
            setattr(made.get_submodule(parent), name, plain)
    return made.double()


def with_lora(model: Any) -> Any:
    return make_adapted(model, target_modules="all-linear")


def assert_as_before(model: Any, batch: dict[str, Any], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Swapped, on the standard path, loss and gradients are as good as those before."""
    batch = known(model, batch)
    with InFloat64():
        truth = step(dense(model), batch)
    plain = step(model, batch)
    report = pyckpt.swap(model, **({"tile": 10} | options))
    assert not report.left
    assert report.entries[0].path == "standard"
    assert "weights of 4 bits" in str(report)
    assert_step_as_good(step(model, batch), plain, truth, dtype)


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_standard_block_of_4_bits(family, kind):
    assert_as_before(with_lora(quantized(make_model(family))), make_batch(kind))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("dtype", "compute"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_products_in_the_layers_own_dtype(dtype, compute, nested):
    """Which may be another than the residual stream's, as after PEFT's `prepare_model_for_kbit_training`."""
    model = with_lora(quantized(make_model("Llama", dtype), compute, compress_statistics=nested))
    assert_as_before(model, make_batch("padded"), torch.bfloat16)


def test_lora_beside_some_of_them():
    model = make_adapted(quantized(make_model("Llama")), target_modules=["q_proj", "down_proj"])
    assert_as_before(model, make_batch("plain"))


def test_under_autocast():
    model, batch = with_lora(quantized(make_model("Llama"), torch.bfloat16)), make_batch("padded")
    with torch.autocast("cpu", torch.bfloat16):
        assert_as_before(model, batch, torch.bfloat16)


def test_every_save_set_gives_the_same_bits():
    assert_same_with_every_save_set(with_lora(quantized(make_model("Llama"))))


@pytest.mark.parametrize("how", [{"segments": 2}, {"stream": pyckpt.Stream(tile=7, store="host")}], ids=["seg", "str"])
def test_in_segments_and_streamed(how):
    assert_as_before(with_lora(quantized(make_model("Phi3"))), make_batch("packed"), tile=None, **how)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@needs_gloo
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("how", [{"tile": 10}, {"stream": pyckpt.Stream(tile=7, store="host")}], ids=["tiles", "str"])
@pytest.mark.parametrize("first", ["swap", "shard"])
def test_under_fsdp2(first, how, storage, group):
    """A gathered weight is a tensor of no class of its own, and how it was quantized is known by its module alone."""
    model = with_lora(quantized(make_model("Llama"), quant_storage=storage))
    batch = make_batch("plain")
    before = step(model, batch)
    mesh = init_device_mesh("cpu", (1,))
    if first == "swap":
        pyckpt.swap(model, **how)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        assert pyckpt.swap(model, **how).entries[0].path == "standard"
    after = step(model, batch)
    assert before.keys() == after.keys()
    for name, t in after.items():
        whole = t.full_tensor() if isinstance(t, DTensor) else t
        torch.testing.assert_close(whole, before[name], rtol=1e-3, atol=1e-4 * float(before[name].abs().max()))


def test_compiled_it_runs_uncompiled(monkeypatch):
    model, batch = with_lora(quantized(make_model("Llama"))), make_batch("plain")
    pyckpt.swap(model, tile=10)
    expected = step(model, batch)
    compiled = torch.compile(model, backend="eager")
    compiled(**batch).loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, expected[name])


@pytest.mark.parametrize("save", ["attention", "input"])
def test_a_matrix_is_made_once_ahead_and_once_back(save, monkeypatch):
    """Whatever the number of tiles; and none of them lives on to the backward."""
    model, batch = with_lora(quantized(make_model("Llama"))), make_batch("plain")
    pyckpt.swap(model, save=save, tile=4)
    made, original = [], bnb.functional.dequantize_4bit

    def noted(*args: Any) -> torch.Tensor:
        matrix = original(*args)
        made.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", noted)
    loss = model(**batch).loss
    assert len(made) == 14
    assert not any(matrix() is not None for matrix in made)
    loss.backward()
    assert len(made) == 28
    assert not any(matrix() is not None for matrix in made)


def test_estimates_count_the_matrices():
    """Not the bytes in which they are packed."""
    model = quantized(make_model("Llama"))
    plain = make_model("Llama")
    stream = pyckpt.Stream(tile=7)
    flops = []
    for m in (model, plain):
        for p in m.parameters():
            p.requires_grad_(False)
        pyckpt.swap(m, tile=10)
        flops.append(stream.estimate(m, tokens=19).flops)
    assert flops[0] == flops[1]
    sets = pyckpt.keep_within(model, "1GiB", tokens=38)
    assert sets == pyckpt.keep_within(plain, "1GiB", tokens=38)


def test_weights_packed_for_inference_run_as_they_did(recwarn):
    model, batch = quantized(make_model("Llama")), make_batch("plain")
    pyckpt.swap(model)
    expected = step(model, batch)["loss"]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.quant_state.packing_format_for_cpu = True
    blocks = [r.block for _, r in replaced_in(model) if isinstance(getattr(r, "block", None), MappedBlock)]
    assert "packed for inference" in str(blocks[0].mapping.change(model.model.layers[0]))
    assert expected.isfinite()


def test_weights_that_are_not_quantized_yet_are_left_alone():
    model = make_model("Llama")
    layer = model.model.layers[0].mlp
    layer.up_proj = bnb.nn.Linear4bit(48, 72, True, torch.float32)
    report = pyckpt.swap(model)
    assert [e.path for e in report.entries[:2]] == ["generic", "standard"]
    assert "not quantized yet" in str(report)


# --- of 8 bits: rows of x are quantized too: no product with a matrix, so that the modules run themselves -------------


def in_8_bits(model: Any) -> Any:
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers." in path:
            made = bnb.nn.Linear8bitLt(
                module.in_features, module.out_features, module.bias is not None, has_fp16_weights=False, threshold=0.0
            )
            made.weight = bnb.nn.Int8Params(module.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
            made.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made.to("cpu").train())
    return model


@pytest.mark.parametrize("how", [{}, {"stream": pyckpt.Stream(tile=7, store="host")}], ids=["resident", "streamed"])
def test_weights_of_8_bits_take_the_generic_path(how):
    model, batch = with_lora(in_8_bits(make_model("Llama"))), make_batch("padded")
    before: State = step(model, batch)
    report = pyckpt.swap(model, tile=None if how else 10, **how)
    assert report.entries[0].path == "generic"
    after = step(model, batch)
    assert before.keys() == after.keys()
    for name, grad in before.items():
        # The same products of the same integers, so that what differs is float32's rounding around them.
        torch.testing.assert_close(after[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


# --- layers that no table knows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["Gemma", "DeepseekV3", "Olmo3"])
def test_a_class_without_a_table_is_tried_out(family, bits):
    """Plain linear layers stand in for its own. A block makes matrices of 4 bits; what is of 8 runs by itself."""
    model = make_model(family)
    model, batch = with_lora(quantized(model) if bits == 4 else in_8_bits(model)), make_batch("padded")
    before = step(model, batch)
    entry = pyckpt.swap(model, tile=10).entries[0]
    if family in TABLED and bits == 4:
        assert "as a standard block with LoRA adapters and weights of 4 bits" in entry.why
    else:
        assert entry.path == "generic"
    after = step(model, batch)
    assert before.keys() == after.keys()
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


@pytest.mark.parametrize("family", ["Llama", "Gemma"])
def test_no_weight_is_packed_for_inference(family):
    """As bitsandbytes does on some CPUs, in place, at the first call without gradients in eval mode."""
    model, batch = with_lora(quantized(make_model(family, hidden_size=64, intermediate_size=96))), make_batch("plain")
    modules = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for m in modules:
        m.support_avx512bf16_for_cpu = True
    truth = step(model, batch)
    model.eval()
    pyckpt.swap(model, tile=10)
    with torch.no_grad():
        model(**batch)
    assert not any(m.support_avx512bf16_for_cpu for m in modules)
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in modules)
    after = step(model, batch)
    for name, grad in truth.items():
        torch.testing.assert_close(after[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)
    pyckpt.unswap(model)
    assert {m.support_avx512bf16_for_cpu for m in modules} == {bnb.nn.modules.has_avx512bf16()}
