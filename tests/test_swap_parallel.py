"""Models whose weights tensor parallelism deals out, over gloo, swapped before or after: one process's gradients."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import assert_same_bits, relative_errors
from processes import gradients, needs_gloo, run_processes
from swap_models import make_model

import pyckpt
from pyckpt import measure

transformers = pytest.importorskip("transformers")
SEQ = 24


def make(family: str = "Llama", **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = make_model(family, torch.float64, **options)
    tokens = torch.randint(1, 61, (2, SEQ))
    # Of dealt-out tokens a model does not know how many there are.
    return model, {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(SEQ)[None]}


def deal_out(model: Any, mesh: Any) -> Any:
    """PyTorch's way: layers by their columns and rows, embedding and head by their words."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.model.layers:
        columns = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ColwiseParallel())
        columns |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
        rows = dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
        parallelize_module(layer, mesh, columns | rows)
    embedding, head = RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())
    return parallelize_module(model, mesh, {"model.embed_tokens": embedding, "lm_head": head})


def deal_out_tokens(model: Any, mesh: Any) -> Any:
    """The same with the tokens dealt out between the products (Korthikanti et al. 2022), as torchtitan has it."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    tokens, whole = Shard(1), Replicate()
    for layer in model.model.layers:
        plan: dict[str, Any] = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), SequenceParallel())
        plan["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": tokens}, desired_input_kwarg_layouts={"hidden_states": whole}
        )
        plan["mlp"] = PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(whole,))
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            plan[name] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[name] = RowwiseParallel(output_layouts=tokens)
        parallelize_module(layer, mesh, plan)
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=tokens),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=tokens, output_layouts=whole),
    }
    return parallelize_module(model, mesh, plan)


def step(model: Any, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int, Any]:
    """The loss and the gradients, whole; the bytes that are kept, and the logits."""
    model.zero_grad()
    with measure.memory() as m:
        out = model(**batch, use_cache=False)
    loss = out.loss.full_tensor() if hasattr(out.loss, "full_tensor") else out.loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}, m.saved_bytes, out.logits


def check(dealt: Any, batch: dict[str, Any], truth: dict[str, torch.Tensor], message: str | None = None) -> None:
    """Swapped, it keeps less than half, makes no logits, and has the truth's gradients; without our loss the same bits.

    message: it is swapped already, and says so.
    """
    if message is None:
        before, stored, _ = step(dealt, batch)
        assert pyckpt.swap(dealt, loss=False).entries[0].path == "checkpointed"
        got, kept, _ = step(dealt, batch)
        assert kept < stored / 2
        assert_same_bits(got, before)
        pyckpt.unswap(dealt)
        assert not pyckpt.swap(dealt).left
        got, _, logits = step(dealt, batch)
    else:
        with pytest.warns(UserWarning, match=f"{message}.*each layer again as a whole in the backward"):
            got, _, logits = step(dealt, batch)
    assert logits is None
    assert max(relative_errors(got, truth).values()) < 1e-6  # norms of transformers compute in float32


def worker(rank: int, world: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad=True to a scalar")
    mesh = init_device_mesh("cpu", (world,))
    model, batch = make()
    truth = step(copy.deepcopy(model), batch)[0]
    for way in (deal_out, deal_out_tokens):
        print(f"rank {rank}: {way.__name__}", flush=True)
        check(way(copy.deepcopy(model), mesh), batch, truth)
        first = copy.deepcopy(model)
        assert pyckpt.swap(first).entries[0].path == "standard"
        told = r"self_attn(\.q_proj)? is dealt out to processes"
        check(way(first, mesh), batch, truth, told)
    for family in ("Llama", "Mixtral"):
        print(f"rank {rank}: {family} by transformers", flush=True)
        model, batch = make(family)
        check(of_transformers(Path(folder) / family, tp_size=world), batch, step(model, batch)[0])


def of_transformers(path: Path, **sizes: Any) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    how = DistributedConfig(tp_plan="auto", **sizes)
    # Grouped products know no float64.
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=how, **options).train()


def worker_of_two_dims(rank: int, world: int) -> None:
    """Weights dealt out by tensor parallelism to pairs of processes, and by FSDP2 over the pairs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model, batch = make()
    truth = step(copy.deepcopy(model), batch)[0]
    model = deal_out(model, mesh["tp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    check(fully_shard(model, mesh=mesh["dp"]), batch, truth)


@pytest.mark.slow
@needs_gloo
def test_two_processes_give_the_gradients_of_one(tmp_path):
    for family in ("Llama", "Mixtral"):
        make(family)[0].save_pretrained(tmp_path / family)
    run_processes(2, worker, 2, str(tmp_path))


@pytest.mark.slow
@needs_gloo
def test_four_processes_of_two_dims(tmp_path):
    run_processes(4, worker_of_two_dims, 4)
