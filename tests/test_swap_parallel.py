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


def step(model: Any, batch: dict[str, Any], whole: bool = True) -> tuple[dict[str, torch.Tensor], int, Any]:
    """The loss and the gradients, whole or this process's; the bytes that are kept, and the logits."""
    model.zero_grad()
    with measure.memory() as m:
        out = model(**batch, use_cache=False)
    loss = out.loss.full_tensor() if hasattr(out.loss, "full_tensor") else out.loss
    loss.backward()
    # PyTorch 2.11 can't bring together what lies in strides, as transformers deals out packed experts.
    found = gradients(model) if whole else {n: p.grad.to_local().clone() for n, p in dealt_out(model)}
    return {"loss": loss.detach(), **found}, m.saved_bytes, out.logits


def dealt_out(model: Any) -> list[tuple[str, Any]]:
    return [(n, p) for n, p in model.named_parameters() if hasattr(p.grad, "to_local")]


def check(dealt: Any, batch: dict[str, Any], truth: dict[str, torch.Tensor], message: str | None = None) -> None:
    """Swapped, it keeps less than half, makes no logits, and has the gradients it had; without our loss the same bits.

    message: it is swapped already, and says so; then they are the truth's.
    """
    if message is None:
        before, stored, _ = step(dealt, batch, whole=False)
        assert pyckpt.swap(dealt, loss=False).entries[0].path == "checkpointed"
        got, kept, _ = step(dealt, batch, whole=False)
        assert kept < stored / 2
        assert_same_bits(got, before)
        pyckpt.unswap(dealt)
        assert not pyckpt.swap(dealt).left
        got, _, logits = step(dealt, batch, whole=False)
        truth = before
    else:
        with pytest.warns(UserWarning, match=f"{message}.*each layer again as a whole in the backward"):
            got, _, logits = step(dealt, batch)
    assert logits is None
    errors = relative_errors(got, truth)
    assert max(errors.values()) < 1e-6, errors  # norms of transformers compute in float32


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
    for family, sizes in BY_TRANSFORMERS:
        print(f"rank {rank}: {family} by transformers, {sizes}", flush=True)
        model, batch = make(family)
        check(of_transformers(Path(folder) / family, **sizes), batch, step(model, batch)[0])


# A class that no table knows, whose loss is tried out; experts dealt out beside the rest, by FSDP2 too.
BY_TRANSFORMERS: list[tuple[str, dict[str, int]]] = [
    ("Llama", {"tp_size": 2}),
    ("Mixtral", {"tp_size": 2}),
    ("DeepseekV3", {"tp_size": 2}),
    ("Mixtral", {"fsdp_size": 2, "ep_size": 2}),
]


def of_transformers(path: Path, **sizes: int) -> Any:
    from transformers.distributed.configuration_utils import DistributedConfig

    how = DistributedConfig(**sizes)
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
    for family in {family for family, _ in BY_TRANSFORMERS}:
        make(family)[0].save_pretrained(tmp_path / family)
    run_processes(2, worker, 2, str(tmp_path))


@pytest.mark.slow
@needs_gloo
def test_four_processes_of_two_dims(tmp_path):
    run_processes(4, worker_of_two_dims, 4)


# --- stages of a pipeline --------------------------------------------------------------------------------------------

# By schedule, how many stages a process has, and which: one after the other in turns, or there and back.
SCHEDULES: dict[str, tuple[int, bool]] = {
    "Schedule1F1B": (1, False),
    "ScheduleInterleavedZeroBubble": (2, False),
    "ScheduleZBVZeroBubble": (2, True),
}


class Stage(torch.nn.Module):
    """Some of a model's layers; the embedding is before the first, norm and head are after the last."""

    def __init__(self, model: Any, index: int, count: int) -> None:
        super().__init__()
        layers = list(model.model.layers)
        size = len(layers) // count
        self.model, self.start, self.first, self.last = model, index * size, index == 0, index == count - 1
        model.model.layers = torch.nn.ModuleList(layers[self.start : self.start + size])
        model.config.num_hidden_layers = size
        if not self.first:
            model.model.embed_tokens = None
        if not self.last:
            model.model.norm, model.lm_head = torch.nn.Identity(), None
        pyckpt.swap(model, loss=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(**{"input_ids" if self.first else "inputs_embeds": x}).last_hidden_state
        return self.model.lm_head(hidden) if self.last else hidden

    def grads(self) -> dict[str, torch.Tensor]:
        """By the names of the whole model."""
        found = {}
        for name, grad in gradients(self.model).items():
            before, layers, after = name.partition(".layers.")
            place, _, rest = after.partition(".")
            found[f"{before}{layers}{int(place) + self.start}.{rest}" if layers else name] = grad
        return found


def next_tokens(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def worker_of_stages(rank: int, world: int) -> None:
    from torch.distributed import pipelining

    model, _ = make(num_hidden_layers=4)
    tokens = torch.randint(1, 61, (8, SEQ), generator=torch.Generator().manual_seed(1))
    whole = copy.deepcopy(model)
    next_tokens(whole(input_ids=tokens).logits, tokens).backward()
    for name, (each, back) in SCHEDULES.items():
        if each > 1 and torch.__version__ < "2.13":
            continue  # their backward of weights knows no torch.autograd.Function
        count = world * each
        places = [rank, count - 1 - rank if back else rank + world][:each]
        mine = [Stage(copy.deepcopy(model), i, count) for i in places]
        stages = [pipelining.PipelineStage(m, i, count, torch.device("cpu")) for m, i in zip(mine, places, strict=True)]
        how = {"n_microbatches": 4, "loss_fn": next_tokens}
        schedule = getattr(pipelining, name)(stages if each > 1 else stages[0], **how)
        given = {"target": tokens} if any(m.last for m in mine) else {}
        schedule.step(*([tokens] if any(m.first for m in mine) else []), **given)
        got = {n: g for m in mine for n, g in m.grads().items()}
        truth = {n: p.grad for n, p in whole.named_parameters() if n in got}
        assert max(relative_errors(got, truth).values()) < 1e-6, name


@pytest.mark.slow
@needs_gloo
def test_stages_of_a_pipeline():
    """Schedules that put off the weights' gradients run a block's backward twice, for x and for the weights."""
    run_processes(2, worker_of_stages, 2)
