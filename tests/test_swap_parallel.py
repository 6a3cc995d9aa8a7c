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


PROJECTIONS = tuple(f"self_attn.{n}_proj" for n in "qkv")


def make(family: str = "Llama", **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = make_model(family, torch.float64, **options)
    tokens = torch.randint(1, 61, (2, SEQ))
    # Of dealt-out tokens a model does not know how many there are.
    return model, {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(SEQ)[None]}


def deal_out(model: Any, mesh: Any, layers: slice = slice(None)) -> Any:
    """PyTorch's way: layers by their columns and rows, embedding and head by their words."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for layer in model.model.layers[layers]:
        columns = dict.fromkeys((*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj"), ColwiseParallel())
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
        for name in (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj"):
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
    found = gradients(model) if whole else {n: own(p.grad) for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **found}, m.saved_bytes, out.logits


def own(t: Any) -> torch.Tensor:
    """This process's part."""
    return (t.to_local() if hasattr(t, "to_local") else t).clone()


def check(
    dealt: Any,
    batch: dict[str, Any],
    truth: dict[str, torch.Tensor],
    path: str = "checkpointed",
    message: str | None = None,
    gathered: int = 0,
) -> None:
    """Swapped, it keeps less than half, makes no logits, and has the gradients it had.

    Where layers run again as a whole, the same bits without our loss. message: it is swapped already, and says so; then
    they are the truth's. gathered: bytes of weights that are measured as kept.
    """
    if message is None:
        before, stored, _ = step(dealt, batch, whole=False)
        assert {e.path for e in pyckpt.swap(dealt, loss=False).entries} == {path}
        got, kept, _ = step(dealt, batch, whole=False)
        assert kept - gathered < stored / 2
        if path == "checkpointed":
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
    for way, path in ((deal_out, "standard"), (deal_out_tokens, "checkpointed")):
        print(f"rank {rank}: {way.__name__}", flush=True)
        check(way(copy.deepcopy(model), mesh), batch, truth, path)
        first = copy.deepcopy(model)
        assert pyckpt.swap(first).entries[0].path == "standard"
        told = r"self_attn(\.q_proj)? is dealt out to processes"
        check(way(first, mesh), batch, truth, message=told)
    for family, sizes, path in BY_TRANSFORMERS:
        print(f"rank {rank}: {family} by transformers, {sizes}", flush=True)
        model, batch = make(family)
        check(of_transformers(Path(folder) / family, **sizes), batch, step(model, batch)[0], path)


def of_options_worker(rank: int, world: int) -> None:
    """A model's own gradients, in whatever way its layers run; the same bits where these differ in what they keep."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    model, batch = make(num_hidden_layers=4)
    truth = step(copy.deepcopy(model), batch)[0]
    same: list[dict[str, torch.Tensor]] = []
    for how in OPTIONS:
        dealt = deal_out(copy.deepcopy(model), mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyckpt.swap(dealt, **how)
            got, kept, logits = step(dealt, batch)
        assert logits is None and max(relative_errors(got, truth).values()) < 1e-6, how
        if "stream" in how:
            # Nothing but ids and labels, whose layers' weights it does not make copies of.
            assert kept < batch["input_ids"].nbytes * 8, kept
        elif "tile" not in how:
            same.append(got)
    for got in same[1:]:
        assert_same_bits(got, same[0])

    dealt = deal_out(copy.deepcopy(model), mesh)
    pyckpt.swap(dealt)
    assert set(pyckpt.keep_within(dealt, "1GiB", tokens=2 * SEQ).sets) == {"all"}
    assert_same_bits(step(dealt, batch)[0], same[0])
    # Of 48 tokens: x and mid of the residual stream whole, of all else half.
    spec = model.config
    heads = spec.num_attention_heads // 2 * spec.head_dim, spec.num_key_value_heads // 2 * spec.head_dim
    each = 2 * spec.hidden_size + 2 * heads[0] + 2 * heads[1] + spec.num_attention_heads // 2 + spec.intermediate_size
    assert pyckpt.keep_within(dealt, "1GiB", tokens=2 * SEQ).bytes == 4 * 2 * SEQ * each * 8

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        dealt.config.attention_dropout = 0.1
        for layer in dealt.model.layers:
            layer.self_attn.attention_dropout = 0.1
        step(dealt, batch)
    assert any("its dropout was switched on since it was swapped" in str(w.message) for w in told)


def of_norms_worker(rank: int, world: int, folder: str) -> None:
    """QK-norm, of which each process runs its heads: gradients as the model itself has them."""
    from torch.distributed.device_mesh import init_device_mesh

    model, batch = make("Qwen3")
    truth = step(copy.deepcopy(model), batch)[0]
    # transformers sums them in a hook, which the norm's first own call puts on the parameter: whenever that is.
    for between in ("nothing", "a call of the layers' own", "a step of the layers' own"):
        dealt = of_transformers(Path(folder) / "Qwen3", tp_size=2)
        assert pyckpt.swap(dealt).entries[0].path == "standard"
        loss = dealt(**batch, use_cache=False).loss
        if between != "nothing":
            other = dealt(**batch, output_attentions=True, use_cache=False).loss
            loss = loss if between == "a call of the layers' own" else (loss + other) / 2
        loss.backward()
        assert max(relative_errors({"loss": loss.detach(), **gradients(dealt)}, truth).values()) < 1e-6, between
    # Where nobody sums them, and they are each process's own.
    dealt = deal_out(copy.deepcopy(model), init_device_mesh("cpu", (world,)))
    own_grads = step(dealt, batch)[0]
    assert pyckpt.swap(dealt).entries[0].path == "standard"
    assert max(relative_errors(step(dealt, batch)[0], own_grads).values()) < 1e-6


@pytest.mark.slow
@needs_gloo
def test_norms_of_heads_that_are_dealt_out(tmp_path):
    make("Qwen3")[0].save_pretrained(tmp_path / "Qwen3")
    run_processes(2, of_norms_worker, 2, str(tmp_path))


def of_changes_worker(rank: int, world: int) -> None:
    """What is dealt out otherwise, or watched, runs by itself, and what becomes so later runs again as a whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate

    mesh = init_device_mesh("cpu", (world,))
    model, batch = make()
    truth = step(copy.deepcopy(model), batch)[0]

    def redistribute(model: Any) -> None:
        q = model.model.layers[0].self_attn.q_proj
        q.weight = torch.nn.Parameter(q.weight.detach().redistribute(placements=[Replicate()]))

    def watch(model: Any) -> None:
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)

    some = deal_out(copy.deepcopy(model), mesh, layers=slice(1, None))
    with pytest.raises(ValueError, match=r"the layers of model are dealt out to 1 or 2 processes"):
        pyckpt.swap(some, stream=pyckpt.Stream(8))
    pyckpt.swap(some)
    assert max(relative_errors(step(some, batch)[0], truth).values()) < 1e-6
    for change, path, why in (
        (redistribute, "checkpointed", "not by its columns"),
        (watch, "original", "has forward hooks"),
    ):
        dealt = deal_out(copy.deepcopy(model), mesh)
        change(dealt)
        entry = pyckpt.swap(dealt).entries[0]
        assert entry.path == path and why in entry.why
        assert max(relative_errors(step(dealt, batch)[0], truth).values()) < 1e-6
        dealt = deal_out(copy.deepcopy(model), mesh)
        pyckpt.swap(dealt)
        change(dealt)
        with pytest.warns(UserWarning, match=r"self_attn\.q_proj"):
            assert max(relative_errors(step(dealt, batch)[0], truth).values()) < 1e-6


@pytest.mark.slow
@needs_gloo
def test_layers_that_are_dealt_out_otherwise():
    run_processes(2, of_changes_worker, 2)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"save": "input"},
    {"save": "attention+mid"},
    {"save": "all"},
    {"save": pyckpt.Save("attention", {"x": "processes"})},
    {"segments": 2},
    {"tile": 5},
    {"stream": pyckpt.Stream(tile=16)},
    {"stream": pyckpt.Stream(tile=7, store="file"), "segments": 2},
]


@pytest.mark.slow
@needs_gloo
def test_layers_that_are_dealt_out_are_blocks():
    run_processes(2, of_options_worker, 2)


# QK-norm whose gradients are summed; biases; q, k and v of each head in turn; one that is brought together after its
# columns; a class that no table knows, whose loss is tried out; experts dealt out beside the rest, by FSDP2 too.
BY_TRANSFORMERS: list[tuple[str, dict[str, int], str]] = [
    ("Llama", {"tp_size": 2}, "standard"),
    ("Qwen3", {"tp_size": 2}, "standard"),
    ("Gemma3", {"tp_size": 2}, "standard"),
    ("Starcoder2", {"tp_size": 2}, "standard"),
    ("GPTNeoX", {"tp_size": 2}, "standard"),
    ("Cohere", {"tp_size": 2}, "standard"),
    ("Cohere2", {"tp_size": 2}, "standard"),
    ("Phi", {"tp_size": 2}, "standard"),
    ("Phi3", {"tp_size": 2}, "checkpointed"),
    ("Mixtral", {"tp_size": 2}, "checkpointed"),
    ("DeepseekV3", {"tp_size": 2}, "checkpointed"),
    ("Mixtral", {"fsdp_size": 2, "ep_size": 2}, "checkpointed"),
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
    # What FSDP2 gathers of parts that PyTorch 2.11 deals out can't be told from what is kept.
    gathered = 2 * sum(own(p).nbytes for p in model.parameters()) if torch.__version__ < "2.13" else 0
    check(fully_shard(model, mesh=mesh["dp"]), batch, truth, "standard", gathered=gathered)
    for how in ({"stream": pyckpt.Stream(tile=16)}, {"stream": pyckpt.Stream(tile=16), "save": "input"}):
        pyckpt.unswap(model)
        pyckpt.swap(model, **how)
        got, kept, logits = step(model, batch)
        assert logits is None and max(relative_errors(got, truth).values()) < 1e-6
        assert kept - gathered < batch["input_ids"].nbytes * 8, kept


@pytest.mark.slow
@needs_gloo
def test_two_processes_give_the_gradients_of_one(tmp_path):
    for family in {family for family, *_ in BY_TRANSFORMERS}:
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
