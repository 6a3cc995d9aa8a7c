"""Blocks and models whose weights tensor parallelism deals out, over gloo: what one process makes of whole weights."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist
from blocks import (
    D_MODEL,
    OPTIONS,
    assert_as_good,
    assert_same_bits,
    make_block,
    plain_twin,
    randomise,
    relative_errors,
    step,
)
from helpers import EXACT
from processes import gradients, needs_gloo, run_processes
from test_context_parallel import PACKED, same
from torch import Tensor

import pyckpt
from pyckpt import measure
from pyckpt.block import waited_for
from pyckpt.tokenwise import tensor_parallel
from pyckpt.vocab_parallel import Words

TOKENS = int(PACKED[-1])
# Key/value heads that three processes share as two do; QK-norm over all heads has a test of its own.
DEALT = {name: made for name, made in OPTIONS.items() if name not in ("mqa", "olmo2-like")}
HEADS = {2: {}, 3: {"n_heads": 6, "n_kv_heads": 3}}
VOCAB = 41  # of three processes the last has fewer


def plan(module: Any) -> dict[str, Any]:
    """Of a block."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    columns = (*(f"self_attn.{n}_proj" for n in "qkv"), "mlp.gate_proj", "mlp.up_proj")
    there = [n for n, _ in module.named_modules()]
    made: dict[str, Any] = {n: ColwiseParallel() for n in columns if n in there}
    return made | {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}


def deal_out(module: Any, mesh: Any) -> Any:
    """A copy of a block, or of a model with all of its parts, dealt out."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module = copy.deepcopy(module)
    if isinstance(module, pyckpt.CkptTransformerBlock):
        return parallelize_module(module, mesh, plan(module))
    for block in module.model.layers:
        parallelize_module(block, mesh, plan(block))
    ends = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    return parallelize_module(module, mesh, ends)


def mesh_of(world: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world,))


def whole(results: dict[str, Any]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in results.items()}


def assert_exact(got: dict[str, Tensor], want: dict[str, Tensor], *what: Any) -> None:
    errors = relative_errors(got, want)
    assert max(errors.values()) < 10 * EXACT, (*what, errors)


def block_of(world: int, seed: int, **options: Any) -> pyckpt.CkptTransformerBlock:
    torch.manual_seed(seed)
    if world == 2:
        return make_block(**options)
    heads = HEADS[world] | {"d_ff": 72} | {n: v for n, v in options.items() if n != "n_kv_heads"}
    block = pyckpt.CkptTransformerBlock(D_MODEL, **heads, dtype=torch.float64)
    randomise(block)
    return block


# --- blocks -----------------------------------------------------------------------------------------------------------


def blocks_worker(rank: int, world: int, seed: int) -> None:
    mesh = mesh_of(world)
    for place, (name, made) in enumerate(DEALT.items()):
        block = block_of(world, seed + place, **made)
        packed = place % 2 == 1
        shape = (TOKENS, D_MODEL) if packed else (2, 25, D_MODEL)
        x, dy, cu = same(seed, *shape), same(seed + 1, *shape), PACKED if packed else None
        truth = step(block, x, dy, cu)
        dealt = deal_out(block, mesh)
        dealt.tile = (None, 11)[place % 2]
        assert_exact(whole(step(dealt, x, dy, cu)), truth, name)
    if world == 2:
        precision_worker(mesh, seed)


def precision_worker(mesh: Any, seed: int) -> None:
    """The 2x rule, against a plain block of one process, and under autocast."""
    x, dy = same(seed, 2, 25, D_MODEL), same(seed + 1, 2, 25, D_MODEL)
    block = block_of(2, seed)
    truth = step(block, x, dy)
    for dtype in (torch.float32, torch.bfloat16):
        plain = plain_twin(block, dtype)
        got = whole(step(deal_out(block.to(dtype), mesh), x.to(dtype), dy.to(dtype)))
        assert_as_good(got, step(plain, x.to(dtype), dy.to(dtype)), truth, dtype)
    plain, dealt = plain_twin(block, torch.float32), deal_out(block.float(), mesh)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (step(module, x.float(), dy.float()) for module in (dealt, plain))
    assert_as_good(whole(got), want, truth, torch.bfloat16)


@needs_gloo
@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.slow)))
def test_blocks_are_those_of_one_process(world, seed):
    run_processes(world, blocks_worker, world, seed)


@pytest.mark.parametrize(
    ("rows", "sizes"), ((0, []), (2047, [2047]), (2049, [1025, 1024]), (9001, [2251] * 3 + [2248]))
)
def test_parts_that_are_summed_by_themselves(rows, sizes):
    on_a_gpu: Any = types.SimpleNamespace(shape=(rows, 64), is_cuda=True)
    parts = list(tensor_parallel._parts(on_a_gpu))
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    assert len(list(tensor_parallel._parts(torch.empty(rows, 1)))) == min(rows, 1)


class Pre(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(D_MODEL)
        self.q, self.k, self.v = (torch.nn.Linear(D_MODEL, D_MODEL) for _ in range(3))

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x)
        return self.q(h), self.k(h), self.v(h)


class Post(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.up = torch.nn.Linear(D_MODEL, D_MODEL), torch.nn.Linear(D_MODEL, 72)
        self.down = torch.nn.Linear(72, D_MODEL)

    def forward(self, x: Tensor, o: Tensor) -> Tensor:
        mid = x + self.out(o)
        return mid + self.down(torch.nn.functional.gelu(self.up(mid)))


def modules_worker(rank: int, seed: int) -> None:
    """Modules of one's own in a generic block: their hooks see to what is dealt out, tile by tile."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, x = mesh_of(2), same(seed, 2, 9, D_MODEL)
    torch.manual_seed(seed)
    parts = Pre().double(), Post().double()
    truth = step(pyckpt.CkptGenericBlock(*copy.deepcopy(parts), D_MODEL, 4, tile=5), x, x)
    mlp: dict[str, Any] = {"post.up": ColwiseParallel(), "post.down": RowwiseParallel()}
    attention: dict[str, Any] = {f"pre.{n}": ColwiseParallel() for n in "qkv"} | {"post.out": RowwiseParallel()}
    for heads, dealt in ((4, mlp), (2, attention | mlp)):
        block = pyckpt.CkptGenericBlock(*copy.deepcopy(parts), D_MODEL, heads, head_dim=12, tile=5)
        assert_exact(whole(step(parallelize_module(block, mesh, dealt), x, x)), truth, heads)


@needs_gloo
def test_modules_of_a_generic_block_are_dealt_out(seed):
    run_processes(2, modules_worker, seed)


class Sums:
    """What the processes sum up, by shape, and how many sums were under way whenever one was waited for."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.under_way: list[int] = []
        self._count = 0

    def __enter__(self) -> Sums:
        self._real = dist.all_reduce
        dist.all_reduce = self._counting  # type: ignore[assignment]
        return self

    def __exit__(self, *_: Any) -> None:
        dist.all_reduce = self._real

    def _counting(self, t: Tensor, *args: Any, **options: Any) -> Any:
        self.shapes.append(tuple(t.shape))
        self._count += 1
        return Work(self, self._real(t, *args, **options))

    def ended(self) -> None:
        self.under_way.append(self._count)
        self._count -= 1


class Work:
    def __init__(self, sums: Sums, real: Any) -> None:
        self._sums, self._real = sums, real

    def wait(self) -> None:
        self._sums.ended()
        self._real.wait()


def details_worker(rank: int, seed: int) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = mesh_of(2)
    block, x = block_of(2, seed), same(seed, 1, TOKENS, D_MODEL)
    dealt = deal_out(block, mesh)

    # Bits do not depend on what is kept; what is made again is made with one sum more, if it is `mid`.
    results = []
    for save, again in (("attention", 1), ("input", 1), ("attention+mid", 0), ("attention+qkv", 0), ("all", 0)):
        dealt.save, dealt.tile = save, TOKENS // 2
        given = x.clone().requires_grad_()
        with Sums() as forward:
            y = dealt(given)
        with Sums() as backward:
            y.backward(x)
        assert forward.shapes == [(TOKENS // 2, D_MODEL)] * 4, save
        assert backward.shapes == [(TOKENS // 2, D_MODEL)] * (4 + 2 * again), save
        assert given.grad is not None
        results.append({"y": y.detach(), "dx": given.grad, **gradients(dealt)})
        dealt.zero_grad()
    for other in results[1:]:
        assert_same_bits(other, results[0])

    # Of what is kept, all but the residual stream is half of what one process keeps.
    block.save = dealt.save = "all"
    kept = []
    for module in (block, dealt):
        with measure.memory() as m:
            module(x.clone().requires_grad_()).sum()
        kept.append(m.saved_bytes)
    stream = 2 * x.nbytes  # x and mid
    assert kept[1] - stream == (kept[0] - stream) // 2

    # The residual stream is shared out too; of an odd number of tokens one process has one less, and as much memory.
    for tokens in (TOKENS, TOKENS - 1):
        given = x[:, :tokens]
        dealt.save = "attention+mid"
        want = whole(step(dealt, given, given))
        dealt.save = pyckpt.Save("attention+mid", {"x": "processes", "mid": "processes"})
        assert_same_bits(whole(step(dealt, given, given)), want)
        with measure.memory() as m:
            dealt(given.clone().requires_grad_()).sum()
        spec = block.spec
        assert m.saved_bytes == -(-tokens // 2) * 2 * D_MODEL * 8 + tokens * (spec.d_q + spec.n_heads) * 8 // 2
    block.save = dealt.save
    with pytest.raises(ValueError, match="places x, mid with processes, and this block's weights are whole"):
        block(x)
    block.save = dealt.save = "attention"

    # In parts, as on a GPU: each is on its way while the next is made, and all are there when the sum is read.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_parallel, "_parts", lambda out: (slice(i, i + 7) for i in range(0, out.shape[0], 7)))
        dealt.save, dealt.tile = "attention", TOKENS // 2
        with Sums() as sums:
            got = whole(step(dealt, x, x))
        assert_exact(got, step(block, x, x))
        assert sums.shapes[:4] == [(7, D_MODEL)] * 3 + [(TOKENS // 2 - 21, D_MODEL)]
        assert sums.under_way == [4, 3, 2, 1] * (len(sums.shapes) // 4)

    # What a module of PyTorch's has just summed is waited for before the block's kernels read its memory.
    summed = DTensor.from_local(given.clone().requires_grad_() / 2, mesh, [Partial()], run_check=False)
    summed = summed.redistribute(placements=[Replicate()], async_op=True).to_local()
    assert type(summed) is not Tensor and type(waited_for(summed)) is Tensor
    y = dealt(summed)
    y.sum().backward()
    assert type(y) is Tensor
    assert_exact({"y": y.detach()}, {"y": block(given).detach()})
    dealt.zero_grad()

    # A frozen block, one that is read alone, a compiled one, and one that is run under no_grad.
    truth = step(block, x, x)
    for p in dealt.parameters():
        p.requires_grad_(False)
    given = x.clone().requires_grad_()
    dealt(given).backward(x)
    assert given.grad is not None
    assert_exact({"dx": given.grad}, {"dx": truth["dx"]})
    with torch.no_grad():
        assert_exact({"y": dealt(x)}, {"y": truth["y"]})
    compiled = torch.compile(deal_out(block, mesh), backend="aot_eager")
    got = {n.removeprefix("_orig_mod."): t for n, t in whole(step(compiled, x, x)).items()}
    assert_exact(got, truth)


def own(module: torch.nn.Module) -> list[Tensor]:
    """This process's parts of the parameters."""
    return [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]


@needs_gloo
def test_what_is_kept_and_summed(seed):
    run_processes(2, details_worker, seed)


def refusals_worker(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh, x = mesh_of(2), torch.randn(1, 8, D_MODEL, dtype=torch.float64)
    odd = {
        "n_kv_heads 1 can't be dealt out evenly to 2 processes": {"n_kv_heads": 1},
        "QK-norm is over all heads": {"qk_norm": "full", "norm_placement": "output"},
        "each process would draw others": {"dropout": 0.1},
    }
    for message, options in odd.items():
        with pytest.raises(ValueError, match=message):
            deal_out(make_block(**options), mesh)(x)
    with pytest.raises(ValueError, match=r"x is a DTensor, .* x\.to_local\(\) of a replicated one"):
        deal_out(make_block(), mesh)(distribute_tensor(x, mesh, [Replicate()]))
    # Tokens dealt out between the products: what hooks would do about it, a block does not.
    tokens = torch.zeros(1, 8, dtype=torch.long)
    shards = {"self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)), "input_layernorm": SequenceParallel()}
    for name, style in shards.items():
        odd_block = parallelize_module(make_block(), mesh, plan(make_block()) | {name: style})
        with pytest.raises(ValueError, match=f"{name} was dealt out by parallelize_module with layouts of its own"):
            odd_block(x)
    for name, style in {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
    }.items():
        model = parallelize_module(model_of(2, 0), mesh, {name: style})
        for stream in (None, pyckpt.Stream(4)):
            with pytest.raises(ValueError, match=f"{name} was dealt out by parallelize_module with layouts of its own"):
                model.loss(tokens, stream=stream)
    part = parallelize_module(make_block(), mesh, {"mlp.up_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight is dealt out to processes as \(Shard"):
        part(x)
    sharded = make_block()
    for module in sharded.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=r"q_proj\.weight is dealt out .* Where FSDP2 shards it"):
        sharded(x)


@needs_gloo
def test_what_cannot_be_dealt_out(seed):
    run_processes(2, refusals_worker)


# --- models -----------------------------------------------------------------------------------------------------------

LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "softcap": 3.0},
    "none": {"reduction": "none", "z_loss": 0.01},
}


def model_of(world: int, seed: int, **options: Any) -> pyckpt.CkptCausalLM:
    torch.manual_seed(seed)
    heads = {"n_heads": 4, "n_kv_heads": 2} | HEADS[world]
    model = pyckpt.CkptCausalLM(VOCAB, 3, d_model=D_MODEL, d_ff=72, dtype=torch.float64, **heads, **options)
    for block in model.model.layers:
        randomise(block)
    torch.nn.init.normal_(model.model.norm.weight, mean=1.0)
    return model


def loss_of(model: Any, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model.loss(tokens, **options)
    (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
    return {"loss": loss.detach(), **gradients(model)}


def models_worker(rank: int, world: int, seed: int) -> None:
    mesh = mesh_of(world)
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator("cpu").manual_seed(seed))
    for place, (name, options) in enumerate(LOSSES.items()):
        model = model_of(world, seed, segments=(None, 2)[place % 2])
        truth = loss_of(model, tokens, **options)
        for how in ({}, {"stream": pyckpt.Stream(7)}, {"stream": pyckpt.Stream(7, store="file", gradients="by block")}):
            dealt = deal_out(model, mesh)
            dealt.set_save(pyckpt.Save("attention", {"x": "processes"}))
            assert_exact(loss_of(dealt, tokens, **options, **how), truth, name, how)
    dealt, stream = deal_out(model, mesh), pyckpt.Stream(8)
    with pytest.raises(ValueError, match="label_smoothing goes with a whole weight alone"):
        dealt.loss(tokens, stream=stream, label_smoothing=0.1)
    with measure.memory() as m:
        dealt.loss(tokens, stream=stream)
    assert m.saved_bytes <= sum(t.nbytes for t in own(dealt)) + tokens.nbytes * 4


@needs_gloo
@pytest.mark.parametrize("world", (2, pytest.param(3, marks=pytest.mark.slow)))
def test_models_are_those_of_one_process(world, seed):
    run_processes(world, models_worker, world, seed)


def shared_worker(rank: int, seed: int) -> None:
    """Weights dealt out to pairs of processes, and tokens over the pairs."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator("cpu").manual_seed(seed))
    model = model_of(2, seed)
    truth = loss_of(model, tokens)
    for method in ("ring", "all-to-all"):
        for stream in (None, pyckpt.Stream(5)):
            dealt = deal_out(model, mesh["tp"])
            context = pyckpt.ContextParallel(mesh["cp"], method=method)
            got = loss_of(dealt, tokens, context=context, stream=stream)
            for name, t in got.items():
                if name != "loss":
                    dist.all_reduce(t, group=mesh["cp"].get_group())
                    t /= 2
            assert_exact(got, truth, method, stream)


@pytest.mark.slow
@needs_gloo
def test_tokens_and_weights_are_dealt_out(seed):
    run_processes(4, shared_worker, seed)


def sharded_worker(rank: int, seed: int) -> None:
    """Weights dealt out to pairs of processes, and by FSDP2 over the pairs, which have other sequences."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator("cpu").manual_seed(seed))
    model = model_of(2, seed)
    truth = loss_of(model, tokens)
    for stream in (None, pyckpt.Stream(5)):
        dealt = deal_out(model, mesh["tp"])
        for block in dealt.model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(dealt, mesh=mesh["dp"])
        register_fsdp_forward_method(dealt, "loss")
        own_rows = tokens[mesh["dp"].get_local_rank() :][:1]
        got = loss_of(dealt, own_rows, stream=stream)
        dist.all_reduce(got["loss"], group=mesh["dp"].get_group())
        got["loss"] /= 2
        assert_exact(got, truth, stream)


@pytest.mark.slow
@needs_gloo
def test_weights_are_dealt_out_and_sharded(seed):
    run_processes(4, sharded_worker, seed)


def words_worker(rank: int, seed: int) -> None:
    mesh = mesh_of(3)
    for vocab in (7, 4, 3):  # of the second the last process has none
        table, ids = same(seed, vocab, 5), torch.arange(vocab)
        words = Words.of(mesh, vocab)
        part = table[words.first : words.first + -(-vocab // 3)]
        out = torch.full((vocab, 5), float("nan"), dtype=torch.float64)
        words.look_up(part, ids, out)
        assert torch.equal(out, table)
        rows, own_words = words.rows(ids, part)
        assert torch.equal(part[rows[own_words]], table[own_words])
        assert int(own_words.sum()) == part.shape[0]


@needs_gloo
def test_words_of_others_are_looked_up(seed):
    run_processes(3, words_worker, seed)


# --- on GPUs ----------------------------------------------------------------------------------------------------------


def gpu_worker(rank: int, seed: int) -> None:
    """By NCCL: a block in bfloat16, its sums in parts, by the 2x rule, and the same bits whatever it keeps."""
    from torch.distributed.device_mesh import DeviceMesh

    torch.cuda.set_device(rank)
    mesh = DeviceMesh.from_group(dist.new_group(backend="nccl"), "cuda")
    block = block_of(2, seed)
    rows = 2 * tensor_parallel._ROWS + 77
    x, dy = same(seed, 1, rows, D_MODEL), same(seed + 1, 1, rows, D_MODEL)
    truth, plain = step(block, x, dy), plain_twin(block, torch.bfloat16).cuda()
    low = [t.to("cuda", torch.bfloat16) for t in (x, dy)]
    reference = {n: t.cpu() for n, t in step(plain, *low).items()}
    dealt = deal_out(block.to("cuda", torch.bfloat16), mesh)
    results = []
    for save in ("attention", "all", "input", pyckpt.Save("attention", {"x": "processes"})):
        dealt.save = save
        results.append({n: t.cpu() for n, t in whole(step(dealt, *low)).items()})
        assert_same_bits(results[-1], results[0])
    assert_as_good(results[0], reference, truth, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(seed):
    run_processes(2, gpu_worker, seed)
