"""Linear cross entropy of words that are dealt out to processes, over gloo: what one process makes of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import a_few, assert_close_to_truth
from processes import needs_gloo, run_processes
from torch import Tensor

import pyckpt
from pyckpt import measure, vocab_parallel
from pyckpt.ops import linear_cross_entropy as op
from pyckpt.ops import vocab_blocks

WIDTH, TOKENS = 12, 40
# Words: of three processes the last one has fewer, or none.
VOCABS = (61, 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "softcap": 2.0},
    "none": {"reduction": "none", "z_loss": 0.1},
    "weights": {"token_weight": True, "class_weight": True},
    "all": {"reduction": "sum", "token_weight": True, "softcap": 2.0, "z_loss": 0.1, "ignore_index": 1},
}


def make(vocab: int, options: dict[str, Any], dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], Tensor, Any]:
    """x, weight and bias, labels, and the options: the same in each process."""
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(4, TOKENS // 4, WIDTH), "weight": torch.randn(vocab, WIDTH), "bias": torch.randn(vocab)}
    target = torch.randint(0, vocab, (4, TOKENS // 4))
    options = dict(options)
    target[torch.rand(target.shape) < 0.2] = options.get("ignore_index", -100)
    for name, shape in (("token_weight", target.shape), ("class_weight", (vocab,))):
        if name in options:
            options[name] = torch.rand(shape)
    return {n: t.double().to(dtype).requires_grad_() for n, t in inputs.items()}, target, options


def deal_out(inputs: dict[str, Tensor], mesh: Any, how: str) -> dict[str, Any]:
    """The weight by its words; x and bias as they are, or dealt out too."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    places = {"weight": Shard(0)} if how == "weight" else {"x": Shard(1), "weight": Shard(0), "bias": Shard(0)}
    if how == "replicated":
        places["x"] = Replicate()
    with torch.no_grad():
        dealt = {n: distribute_tensor(t, mesh, [places[n]]) if n in places else t.clone() for n, t in inputs.items()}
    return {n: t.detach().requires_grad_() for n, t in dealt.items()}


def step(inputs: dict[str, Any], target: Tensor, options: Any, loss: Any = pyckpt.linear_cross_entropy) -> Any:
    """The loss and the gradients, whole."""
    made = loss(inputs["x"], inputs["weight"], target, bias=inputs["bias"], **options)
    (made * torch.linspace(0.5, 1.5, made.numel(), dtype=made.dtype).view(made.shape)).sum().backward()
    whole = {n: t.grad.full_tensor() if vocab_parallel.is_dealt_out(t) else t.grad for n, t in inputs.items()}
    return {"loss": made.detach(), **whole}


def by_pytorch(x: Any, weight: Any, target: Tensor, bias: Any) -> Tensor:
    """From logits, which are gathered."""
    logits = (
        F.linear(x, weight, bias).full_tensor() if vocab_parallel.is_dealt_out(weight) else F.linear(x, weight, bias)
    )
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, target.flatten(), reduction="none").view(target.shape)


def worker(rank: int, world: int, vocab: int, seed: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    for name, options in OPTIONS.items():
        inputs, target, given = make(vocab, options, torch.float64, seed)
        truth = step(inputs, target, given)
        for how in ("weight", "sequence", "replicated"):
            got = step(deal_out(inputs, mesh, how), target, given)
            for n, t in truth.items():
                torch.testing.assert_close(
                    got[n], t, rtol=1e-10, atol=1e-12, msg=lambda m, at=(name, how, n): f"{at} {m}"
                )
    for dtype in (torch.float32, torch.bfloat16):
        check_precision(vocab, dtype, mesh, seed)
    check_in_chunks(vocab, mesh, seed)


def check_in_chunks(vocab: int, mesh: Any, seed: int) -> None:
    """By our kernels too: labels that are another process's words are outside of theirs, and gradients know it."""
    inputs, target, given = make(vocab, OPTIONS["all"], torch.float32, seed)
    truth = step({n: t.detach().double().requires_grad_() for n, t in inputs.items()}, target, given)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(op, "_CHUNK_ELEMENTS", dict.fromkeys(op._CHUNK_ELEMENTS, 100))
        patched.setattr(op, "_MIN_CHUNK_TOKENS", 5)
        patched.setattr(vocab_blocks, "_MIN_WORDS", 6)
        for backend in ("torch", "triton"):
            patched.setenv("PYCKPT_BACKEND", backend)
            got = step(deal_out(inputs, mesh, "weight"), target, given)
            for n, t in truth.items():
                torch.testing.assert_close(got[n].double(), t, rtol=1e-4, atol=1e-5)  # sums of 40 in float32


def check_precision(vocab: int, dtype: torch.dtype, mesh: Any, seed: int) -> None:
    """The 2x rule, against PyTorch's own of the same dealt-out tensors; of each token, as one number is chance."""
    inputs, target, _ = make(vocab, {}, dtype, seed)
    truth = step({n: t.detach().double().requires_grad_() for n, t in inputs.items()}, target, {}, by_pytorch)
    plain = step(deal_out(inputs, mesh, "replicated"), target, {}, by_pytorch)
    ours = step(deal_out(inputs, mesh, "replicated"), target, {"reduction": "none"})
    for n, t in truth.items():
        assert_close_to_truth(ours[n], plain[n], t, what=f"{dtype} {n}")


@needs_gloo
@pytest.mark.parametrize("sizes", a_few([(2, VOCABS[0]), (3, VOCABS[0]), (3, VOCABS[1])], always=(0,)), ids=str)
def test_words_that_are_dealt_out(sizes, seed):
    world, vocab = sizes
    run_processes(world, worker, world, vocab, seed)


# --- in one process, which is a group of its own ---------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@needs_gloo
def test_bad_input(mesh):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, weight, target = torch.randn(5, 4), torch.randn(6, 4), torch.randint(0, 6, (5,))
    dealt = distribute_tensor(weight, mesh, [Shard(0)])
    for placement in (Shard(1), Replicate()):
        with pytest.raises(ValueError, match=r"expected \(Shard\(0\),\)|expected \(Shard\(dim=0\),\)"):
            pyckpt.linear_cross_entropy(x, distribute_tensor(weight, mesh, [placement]), target)
    with pytest.raises(ValueError, match="x or bias is a DTensor and weight is none"):
        pyckpt.linear_cross_entropy(distribute_tensor(x, mesh, [Replicate()]), weight, target)
    with pytest.raises(ValueError, match="label_smoothing goes with a whole weight alone"):
        pyckpt.linear_cross_entropy(x, dealt, target, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label 6 is out of range: expected 0 to 5"):
        pyckpt.linear_cross_entropy(x, dealt, torch.full((5,), 6))
    other = distribute_tensor(torch.randn(6), init_device_mesh("cpu", (1, 1)), [Replicate(), Replicate()])
    with pytest.raises(ValueError, match="they have to be on one mesh"):
        pyckpt.linear_cross_entropy(x, dealt, target, bias=other)


@needs_gloo
def test_a_single_token(mesh):
    inputs, _, _ = make(7, {}, torch.float64, 0)
    x, dealt = inputs["x"][0, 0], deal_out(inputs, mesh, "weight")
    loss = pyckpt.linear_cross_entropy(x, dealt["weight"], torch.tensor(3))
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, inputs["weight"]), torch.tensor(3)))


@needs_gloo
def test_holds_no_logits(mesh):
    """Neither from forward to backward nor at once: two numbers a token."""
    inputs, target, _ = make(7, {}, torch.float32, 0)
    dealt = deal_out(inputs, mesh, "weight")
    with measure.memory() as m:
        loss = pyckpt.linear_cross_entropy(dealt["x"], dealt["weight"], target, bias=dealt["bias"])
    assert m.saved_bytes <= TOKENS * (4 + 8 + 4 * WIDTH + 16) + 7 * 4 * (WIDTH + 1)
    loss.backward()
