"""What a GPU would show of everything around the kernels, on devices that are pretended (see `pretended`).

Without a GPU one test starts a process that has two such devices, and runs the others of this file there. PyTorch's own
kernels serve its ops, and where a test says so Triton's in their interpreter.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyckpt
from bench import common, gpu_memory
from bench.gpu_memory import peak_bytes
from pyckpt.ops import attention_torch
from pyckpt.train.signals import StopRequest

HERE = Path(__file__).parent
PRETENDED = sys.modules.get("pretended")
CURRENT, OTHER = "cuda:0", "cuda:1"
SIZES = {"vocab_size": 61, "n_layers": 3, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48}
there = pytest.mark.skipif(PRETENDED is None, reason="needs the devices that are pretended")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["in_order", "not in_order"])
@pytest.mark.skipif(PRETENDED is not None, reason="starts what this is")
@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="needs PyTorch's CPU build")
@pytest.mark.skipif(sys.platform != "linux", reason="the library is linked as Linux has it")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_on_devices_that_are_pretended(part):
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYCKPT_BACKEND": "torch",
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    options = ["-p", "pretended", "-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-k", part]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__))]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# --- helpers ------------------------------------------------------------------------------------------------


def make(device: str = CURRENT, **options: Any) -> pyckpt.CkptCausalLM:
    return pyckpt.CkptCausalLM(**SIZES, **options, device=device)


def tokens(*shape: int, device: str = CURRENT) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, device=device)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **grads}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Other kernels, in float32: their roundings, and far below what a wrong device's numbers would be."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), value.cpu(), rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved(batch: dict[str, Any], device: str) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@pytest.fixture
def in_order() -> Iterator[None]:
    """No stream does anything beside another that nothing orders."""
    PRETENDED.forget_races()
    yield
    assert sorted(set(PRETENDED.races())) == []


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Nothing is made on the current device, and it stays the current one."""
    torch.cuda.reset_peak_memory_stats(CURRENT)
    before = torch.cuda.max_memory_allocated(CURRENT)
    yield
    assert torch.cuda.max_memory_allocated(CURRENT) == before
    assert torch.cuda.current_device() == 0


# --- the devices themselves ---------------------------------------------------------------------------------


@there
class TestTheDevices:
    def test_tensors_of_several_devices_do_not_mix(self):
        x = torch.randn(3, 4, device=CURRENT)
        for other in (torch.randn(3, 4), torch.randn(3, 4, device=OTHER)):
            with pytest.raises(RuntimeError, match="same device"):
                x + other
            with pytest.raises(RuntimeError, match="same device"):
                torch.mm(x, other.T)
        assert torch.equal((x * torch.tensor(2.0)).cpu(), x.cpu() * 2)
        assert torch.equal(x[torch.tensor([0, 2])].cpu(), x.cpu()[[0, 2]])

    def test_each_draws_by_itself(self):
        host = torch.get_rng_state()
        torch.cuda.manual_seed(3)
        first, state = torch.rand(4, device=CURRENT), torch.cuda.get_rng_state()
        second = nn.functional.dropout(torch.ones(50, device=CURRENT))
        torch.cuda.set_rng_state(state)
        torch.rand(4, device=OTHER)
        assert torch.equal(nn.functional.dropout(torch.ones(50, device=CURRENT)), second)
        torch.cuda.manual_seed(3)
        assert torch.equal(torch.rand(4, device=CURRENT), first)
        assert torch.equal(torch.get_rng_state(), host)

    def test_what_the_host_waits_for_is_counted(self):
        x, locked = torch.ones(4, device=CURRENT), torch.empty(4, pin_memory=True)
        before = PRETENDED.waits()
        locked.copy_(x + 1, non_blocking=True)
        x.copy_(locked, non_blocking=True)
        assert PRETENDED.waits() == before
        for wait in (x.sum().item, x.cpu, x.nonzero, torch.cuda.synchronize, lambda: x.copy_(locked)):
            before = PRETENDED.waits()
            wait()
            assert PRETENDED.waits() == before + 1

    def test_what_nothing_orders_is_told(self):
        x, side = torch.zeros(9, device=CURRENT), torch.cuda.Stream()
        PRETENDED.forget_races()
        with torch.cuda.stream(side):
            y = x + 1
        assert [text.split(" on lane")[0] for text in PRETENDED.races()] == ["read by aten::add"]
        PRETENDED.forget_races()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        torch.cuda.current_stream().wait_stream(side)
        z = y * 2
        assert not PRETENDED.races()
        del y
        assert [text.split(" on lane")[0] for text in PRETENDED.races()] == ["freed"]
        torch.cuda.synchronize()
        del z

    def test_memory_that_nobody_wrote_to_is_nan(self):
        assert bool(torch.empty(100, device=OTHER).isnan().all())


# --- streams ------------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "segments": {"segments": 2},
    "dropout": {"dropout": 0.1},
    "window": {"window": 5},
    "tied": {"tie_embeddings": True},
}


@there
@pytest.mark.parametrize("gradients_come", ["together", "by block"])
@pytest.mark.parametrize("store", ["device", "host", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_run_is_in_order(kind, store, gradients_come, in_order):
    """Run after run, on the default stream and on another; and what it gives is what the resident executor gives."""
    model, ids = make(**KINDS[kind]), tokens(2, 30)
    truth = None if kind == "dropout" else gradients(model, model.loss(ids))
    stream = pyckpt.Stream(tile=8, store=store, gradients=gradients_come)
    side = torch.cuda.Stream()
    for where in (torch.cuda.current_stream(), side, torch.cuda.current_stream()):
        where.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(where):
            found = gradients(model, model.loss(ids, stream=stream))
        torch.cuda.current_stream().wait_stream(where)
        torch.cuda.synchronize()  # gradients of another stream go here
        if truth is not None:
            assert_close(found, truth)


@there
@pytest.mark.parametrize("names", ["x", "x o", "o lse"])
@pytest.mark.parametrize("place", ["host", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_offload_is_in_order(kind, place, names, in_order):
    """Several forwards before their backwards, one of them twice, on two streams."""
    model, ids = make(**KINDS[kind]), tokens(2, 30)
    truth = None if kind == "dropout" else gradients(model, model.loss(ids))
    placed = make(**KINDS[kind], save=pyckpt.Save("attention", place=dict.fromkeys(names.split(), place)))
    placed.load_state_dict(model.state_dict())
    side = torch.cuda.Stream()
    first, short = placed.loss(ids), placed.loss(ids[:, :20])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        second = placed.loss(ids)
    torch.cuda.current_stream().wait_stream(side)
    second.backward(retain_graph=True)
    gradients(placed, second)
    short.backward()
    placed.zero_grad()
    found = gradients(placed, first)
    torch.cuda.synchronize()
    if truth is not None:
        assert_close(found, truth)


@there
@pytest.mark.parametrize("wait", ["hold", "run"])
def test_a_wait_left_out_shows(wait, monkeypatch):
    """Of compute for copies, and of copies for compute: what `in_order` would say."""
    from pyckpt.store import lanes

    if wait == "hold":
        monkeypatch.setattr(lanes.CudaLanes, "hold", lambda self, events: None)
    else:
        run = lanes.CudaLanes.run
        monkeypatch.setattr(lanes.CudaLanes, "run", lambda self, lane, copy, after: run(self, lane, copy, ()))
    PRETENDED.forget_races()
    model, ids = make(), tokens(1, 40)
    model.loss(ids, stream=pyckpt.Stream(tile=8, store="host")).backward()
    torch.cuda.synchronize()
    assert PRETENDED.races()
    PRETENDED.forget_races()


# --- what the allocator counts ------------------------------------------------------------------------------


@there
def test_idle_devices_count_what_working_ones_do():
    with PRETENDED.idle():
        idle = counted()
    assert idle == counted()


def counted() -> list[int]:
    """The peaks of several ways to train, by PyTorch's kernels."""
    ids, ways = tokens(2, 30), [{"save": "all"}, {"save": "attention"}, {"segments": 2}, {"dropout": 0.1}]
    found = []
    for options in ways:
        model = make(**options)
        found.append(peak_bytes(lambda model=model: (model.loss(ids).backward(), model.zero_grad())))
    stream = pyckpt.Stream(tile=16, store="host")
    found.append(peak_bytes(lambda: (model.loss(ids, stream=stream).backward(), model.zero_grad())))
    return found


@there
def test_llama_8bs_block_takes_a_quarter_of_plain_pytorchs_peak(monkeypatch):
    """32K tokens in bfloat16 by Triton's launchers; plain PyTorch's is what an H200 counted."""
    pytest.importorskip("triton")
    monkeypatch.delenv("PYCKPT_BACKEND")
    h200 = common.read("block_h200")
    with PRETENDED.idle():
        found = gpu_memory.block(32768, "attention", gpu_memory.plain_bytes(h200, 32768))
    assert found["over_plain"] <= h200["aims"]["beyond_bytes_over_plain"]


@there
def test_streamed_memory_is_flat(monkeypatch):
    """Llama-8B's layers in tiles of 8,192 tokens, to the byte."""
    pytest.importorskip("triton")
    monkeypatch.delenv("PYCKPT_BACKEND")
    with PRETENDED.idle():
        assert len({gpu_memory.streamed(length)["bytes"] for length in (24576, 32768, 65536)}) == 1


# --- a device that is not the current one -------------------------------------------------------------------


@there
@pytest.mark.parametrize("kind", KINDS)
def test_models_elsewhere(kind, elsewhere):
    model, ids = pyckpt.CkptCausalLM(**SIZES, **KINDS[kind]), torch.randint(0, 61, (2, 30))
    truth = gradients(model, model.loss(ids))
    model, ids = copy.deepcopy(model).to(OTHER), ids.to(OTHER)
    found = [gradients(model, model.loss(ids))]
    found += [
        gradients(model, model.loss(ids, stream=pyckpt.Stream(tile=8, store=store)))
        for store in ("device", "host", "file")
    ]
    with torch.autocast("cuda", torch.bfloat16):
        gradients(model, model.loss(ids))
    assert pyckpt.token_losses(model, ids).device == torch.device(OTHER)
    if kind != "dropout":
        for each in found:
            assert_close(each, truth)


@there
def test_host_memory_is_locked_for_the_device_that_copies(monkeypatch, elsewhere):
    """On the current one it would make a context, which takes some hundred MiB there."""
    runtime, devices = torch.cuda.cudart(), []
    register = runtime.cudaHostRegister

    def watched(at: int, size: int, flags: int) -> int:
        devices.append(torch.cuda.current_device())
        return register(at, size, flags)

    monkeypatch.setattr(runtime, "cudaHostRegister", watched, raising=False)
    model, ids = make(OTHER), tokens(1, 40, device=OTHER)
    model.loss(ids, stream=pyckpt.Stream(tile=8, store="host")).backward()
    streamed = len(devices)
    placed = make(OTHER, save=pyckpt.Save("attention", place={"x": "host", "o": "host"}))
    placed.loss(ids).backward()
    assert 0 < streamed < len(devices) and set(devices) == {1}


@there
@pytest.mark.parametrize("kind", ["plain", "dropout"])
def test_triton_launches_elsewhere(kind, monkeypatch, elsewhere):
    """Its kernels run on the current device, which has to be the tensors' then."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, launched = interpreter.GridExecutor.__call__, set()

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                assert value.device == torch.device("cuda", torch.cuda.current_device()), self.fn.__name__
        launched.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    monkeypatch.delenv("PYCKPT_BACKEND")
    model, ids = pyckpt.CkptCausalLM(**SIZES | {"n_layers": 1}, **KINDS[kind]), torch.randint(0, 61, (1, 18))
    truth = gradients(model, model.loss(ids))
    model, ids = copy.deepcopy(model).to(OTHER), ids.to(OTHER)
    found = gradients(model, model.loss(ids))
    if kind == "plain":
        assert_close(found, truth)
    gradients(model, model.loss(ids, stream=pyckpt.Stream(tile=16, store="host")))
    assert len(launched) > 8


FAMILIES = ["Llama", "Gemma2", "GPT2", "Qwen3Moe", "Exaone4", "Olmo", "Falcon", "Qwen3Next"]
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "resident": lambda: {"tile": 8},
    "segments": lambda: {"segments": 2},
    "streamed": lambda: {"stream": pyckpt.Stream(tile=8, store="host")},
}


@there
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_models_elsewhere(family, kind, elsewhere):
    pytest.importorskip("transformers")
    from swap_models import make_batch, make_model, step

    model, batch = make_model(family), make_batch(kind)
    truth = step(copy.deepcopy(model), batch)
    model, batch = model.to(OTHER), moved(batch, OTHER)
    cut = family not in ("Falcon", "Qwen3Next", "Qwen3Moe")
    for way in WAYS if cut else ["resident"]:
        pyckpt.swap(model, **WAYS[way]())
        assert_close(step(model, batch), truth)
        pyckpt.unswap(model)


def bert() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=61, max_position_embeddings=64))


def t5() -> Any:
    import transformers

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


@there
@pytest.mark.parametrize("device", [CURRENT, OTHER])
@pytest.mark.parametrize("make_one", [bert, t5])
def test_layers_that_run_again_drop_the_same(make_one, device):
    """By the generator of their device, which torch.utils.checkpoint keeps for its own arguments' devices alone."""
    pytest.importorskip("transformers")
    from swap_models import step

    model, ids = make_one().train().to(device), tokens(2, 12, device=device)
    # Keys that have been in a cache lie otherwise in memory, of which some CPUs' products have other bits.
    batch = {"input_ids": ids, "labels": ids} | ({"use_cache": False} if make_one is t5 else {})
    torch.manual_seed(1)
    truth = step(model, batch)
    assert {e.path for e in pyckpt.swap(model, loss=False).entries} == {"checkpointed"}
    torch.manual_seed(1)
    found = step(model, batch)
    for name, value in truth.items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(step(model, batch)["loss"], truth["loss"])  # it does drop


@there
@pytest.mark.parametrize("kind", ["plain", "padded"])
def test_compiled_models_elsewhere(kind):
    """Traced, as Inductor would be given it."""
    pytest.importorskip("transformers")
    from swap_models import make_batch, make_model, step

    model, batch = make_model("Llama").to(OTHER), moved(make_batch(kind), OTHER)
    truth = step(model, batch)
    pyckpt.swap(model)
    found = step(torch.compile(model, backend="aot_eager"), batch)
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, truth)


@there
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Olmo", "Bloom"])
def test_models_over_two_devices(family):
    """As accelerate deals them out (`device_map`)."""
    pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    from swap_models import make_batch, make_model, step

    model, batch = make_model(family), make_batch("padded")
    truth = step(copy.deepcopy(model), batch)
    where, layers = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    places: dict[str, int] = {f"{where}.{i}": int(i >= len(layers) // 2) for i in range(len(layers))}
    places |= {n: 0 for n, m in model.named_modules() if not list(m.children()) and not n.startswith(where)}
    model = accelerate.dispatch_model(model, places)
    batch = moved(batch, CURRENT)
    assert_close(step(model, batch), truth)
    assert {e.path for e in pyckpt.swap(model).entries if e.name.startswith(where)} == {"checkpointed"}
    assert_close(step(model, batch), truth)


# --- what the host waits for --------------------------------------------------------------------------------


@there
@pytest.mark.parametrize(("kind", "allowed"), [("plain", 0), ("padded", 1), ("packed", 1)])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2", "Olmo"])
def test_a_step_of_a_swapped_model_waits_once_where_masks_are_read(family, kind, allowed, monkeypatch):
    """For what the mask or the positions say. PyTorch's attention reads the lengths in every call, Triton's never."""
    pytest.importorskip("transformers")
    from swap_models import make_batch, make_model

    reading, sequences = [0], attention_torch._sequences

    def counted(*args: Any) -> Iterator[Any]:
        before = PRETENDED.waits()
        found = list(sequences(*args))
        reading[0] += PRETENDED.waits() - before
        return iter(found)

    monkeypatch.setattr(attention_torch, "_sequences", counted)
    model, batch = make_model(family).to(CURRENT), moved(make_batch(kind), CURRENT)
    pyckpt.swap(model)
    for _ in range(3):
        before, reading[0] = PRETENDED.waits(), 0
        model(**batch).loss.backward()
        waited = PRETENDED.waits() - before - reading[0]
    assert waited == allowed


@there
@pytest.mark.parametrize("options", [{}, {"segments": 2}, {"dropout": 0.1}, {"save": "all"}], ids=str)
def test_a_step_of_our_own_waits_for_nothing(options):
    model, ids = make(**options), tokens(2, 30)
    for _ in range(3):
        before = PRETENDED.waits()
        model.loss(ids).backward()
        waited = PRETENDED.waits() - before
    assert waited == 0


# --- the thread of a device's backward ----------------------------------------------------------------------


@there
@pytest.mark.parametrize("store", ["device", "host", "file"])
def test_a_signal_ends_a_streamed_backward_between_tiles(store):
    """While Python's handlers wait for the main thread, which waits for the device's in C++: `pyckpt train`'s way."""

    class StoppedError(Exception):
        pass

    model, ids, tiles = make(), tokens(1, 60), []

    def between_tiles(what: str, block: int, tile: int) -> None:
        if what != "backward":
            return
        if stop:
            raise StoppedError
        tiles.append(threading.current_thread())
        if len(tiles) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    stream = pyckpt.Stream(tile=8, store=store, progress=between_tiles)
    with StopRequest() as stop, pytest.raises(StoppedError):
        model.loss(ids, stream=stream).backward()
    assert len(tiles) == 3 and threading.main_thread() not in tiles
    assert all(p.grad is None for p in model.parameters())
    stream.progress = None
    assert_close(gradients(model, model.loss(ids, stream=stream)), gradients(model, model.loss(ids)))
