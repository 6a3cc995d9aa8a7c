"""What waits off the device: the same gradients, the memory that is left, and nothing read before it is there."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import gc
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from helpers import a_few
from lanes import DelayedLanes
from processes import in_a_fork
from torch import Tensor, nn

import pyckpt
from pyckpt.exec import offload
from pyckpt.exec.offload import Queue, Route
from pyckpt.save import bytes_per_token, kept_names, save_set
from pyckpt.spec import BlockSpec
from pyckpt.store.file import Scratch
from pyckpt.store.pool import Pool

CPU = torch.device("cpu")
SIZES = {"n_kv_heads": 2, "d_ff": 72}
# On a CPU a file takes the way that host memory takes on a GPU.
WAYS = [
    ("cpu", "file"),
    pytest.param(
        "cuda",
        "host",
        marks=(
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU"),
        ),
    ),
]


def everything(save: str, place: str) -> dict[str, str]:
    return dict.fromkeys(kept_names(save_set(save)), place)


def stack(n: int = 4, segments=None, device="cpu", **options) -> pyckpt.CkptTransformer:
    blocks = [pyckpt.CkptTransformerBlock(48, 4, **{**SIZES, "tile": 8, **options}, device=device) for _ in range(n)]
    return pyckpt.CkptTransformer(blocks, segments)


def step(model: nn.Module, x: Tensor, dy: Tensor, *args, around=None) -> list[Tensor]:
    """y, and the gradients of x and of the weights; of `around`, which calls the model, if given."""
    x = x.clone().requires_grad_()
    y = (around or model)(x, *args)
    grads = torch.autograd.grad(y, [x, *(p for p in model.parameters() if p.requires_grad)], dy)
    return [y, *grads]


def set_save(model, save) -> None:
    for block in model:
        block.save = save


def assert_same(found: list[Tensor], truth: list[Tensor]) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device, place", WAYS)
@pytest.mark.parametrize("last", [0, 1, 2, 9])
@pytest.mark.parametrize("save", pyckpt.SAVE_SETS)
def test_gradients_are_the_same_bits(save, last, device, place):
    model, shape = stack(save=save, device=device), (2, 21, 48)
    x, dy = torch.randn(shape, device=device), torch.randn(shape, device=device)
    truth = step(model, x, dy)
    set_save(model, pyckpt.Save(save, everything(save, place), last))
    for _ in range(2):  # the second step takes the rooms of the first
        assert_same(step(model, x, dy), truth)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"norm_placement": "sandwich", "norm": "layernorm", "bias": True},
        {"residual": "parallel", "mlp": "gelu"},
        {"dropout": 0.3},
    ],
    ids=["qk_norm", "sandwich", "parallel", "dropout"],
)
def test_every_kind_of_block(options, seed):
    model, x, dy = stack(save="all", **options), torch.randn(23, 48), torch.randn(23, 48)
    cu = torch.tensor([0, 9, 9, 23], dtype=torch.int32)
    results = []
    for save in ("all", pyckpt.Save("all", everything("all", "file"), 1)):
        set_save(model, save)
        torch.manual_seed(seed)
        results.append(step(model, x, dy, None, cu))
    assert_same(*results)


@pytest.mark.parametrize("segments", [2, 3, "sqrt"])
def test_segments_place_their_inputs(segments):
    model, x, dy = stack(5, segments), torch.randn(1, 21, 48), torch.randn(1, 21, 48)
    truth = step(model, x, dy)
    set_save(model, pyckpt.Save("attention", {"x": "file", "o": "file"}))
    assert_same(step(model, x, dy), truth)


def test_x_that_is_no_row_after_row():
    model = stack()
    x, dy = torch.randn(1, 48, 21).transpose(1, 2), torch.randn(1, 48, 21).transpose(1, 2)
    truth = step(model, x.contiguous(), dy)  # as strides go, so go the products' last bits
    set_save(model, pyckpt.Save("attention", everything("attention", "file"), 0))
    assert_same(step(model, x, dy), truth)


def test_frozen_blocks_and_a_model_with_a_loss():
    model = pyckpt.CkptCausalLM(50, 4, 48, 4, **SIZES)
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    tokens = torch.randint(50, (2, 17))
    trained = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(model.loss(tokens), trained)
    model.set_save(pyckpt.Save("attention", {"x": "file", "o": "file"}))
    assert_same(torch.autograd.grad(model.loss(tokens), trained), truth)


def test_generic_blocks_place_what_they_keep():
    class Pre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(48, 144)

        def forward(self, x, positions):
            return self.qkv(x).chunk(3, -1)

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(48, 48)

        def forward(self, x, o):
            return x + torch.tanh(self.out(o))

    blocks = [pyckpt.CkptGenericBlock(Pre(), Post(), 48, 4, save="attention+qkv", tile=8) for _ in range(4)]
    model, x, dy = pyckpt.CkptTransformer(blocks), torch.randn(1, 21, 48), torch.randn(1, 21, 48)
    truth = step(model, x, dy)
    set_save(model, pyckpt.Save("attention+qkv", everything("attention+qkv", "file")))
    assert_same(step(model, x, dy), truth)


def test_several_forwards_before_their_backwards():
    """As in pipelines: two forwards, then the backwards in either order."""
    model, shape = stack(), (1, 21, 48)
    truth, results = [], []
    inputs = [(torch.randn(shape), torch.randn(shape)) for _ in range(2)]
    for x, dy in inputs:
        truth += step(model, x, dy)[1:]
    set_save(model, pyckpt.Save("attention", {"x": "file", "o": "file"}))
    for order in ([0, 1], [1, 0]):
        xs = [x.clone().requires_grad_() for x, _ in inputs]
        ys = [model(x) for x in xs]
        found = {i: torch.autograd.grad(ys[i], [xs[i], *model.parameters()], inputs[i][1]) for i in order}
        results = [g for i in (0, 1) for g in found[i]]
        assert_same(results, truth)


def test_a_kept_graph_goes_backward_again():
    model, x, dy = stack(), torch.randn(1, 21, 48), torch.randn(1, 21, 48)
    set_save(model, pyckpt.Save("attention", {"x": "file", "o": "file"}))
    y = model(x)
    weights = list(model.parameters())
    first = torch.autograd.grad(y, weights, dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, weights, dy, retain_graph=True), first)
    assert_same(torch.autograd.grad(y, weights, dy), first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, weights, dy)


def test_torch_compile_and_checkpoint_around_it():
    model, x, dy = stack(2), torch.randn(1, 21, 48), torch.randn(1, 21, 48)
    truth = step(model, x, dy)
    set_save(model, pyckpt.Save("attention", {"x": "file", "o": "file"}))
    assert_same(step(model, x, dy, around=torch.compile(model, backend="aot_eager")), truth)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
    assert_same(step(model, x, dy, around=checkpointed), truth)


# --- memory ------------------------------------------------------------------------------------------------------


def test_memory_on_the_device_does_not_grow_with_the_depth():
    """After the forward: the last block's save set, and that of the one before, whose copy hides behind the last."""
    tokens, kept = 512, bytes_per_token(BlockSpec.make(48, 4, **SIZES), "attention", torch.float32)
    ends, peaks = {}, {}
    for depth in (6, 12):
        model = stack(depth, tile=64, save=pyckpt.Save("attention", everything("attention", "file")))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        x = torch.randn(1, tokens, 48)
        with pyckpt.measure.memory(model) as m:
            y = model(x)
            m.mark("forward")
            y.sum().backward()
        ends[depth], peaks[depth] = m.marks["forward"].live_bytes, m.peak_bytes
        assert m.live_bytes <= y.nbytes + 4096  # the graph lives, and what it kept does not
    assert ends[6] == ends[12] == pytest.approx(2 * tokens * kept + y.nbytes, rel=0.01)
    assert peaks[6] == peaks[12]


def test_named_tensors_alone_leave():
    tokens, spec = 512, BlockSpec.make(48, 4, **SIZES)
    x, live = torch.randn(1, tokens, 48), {}
    for name in ("none", "x", "o"):
        place = {} if name == "none" else {name: "file"}
        model = stack(10, tile=64, save=pyckpt.Save("attention", place))
        with pyckpt.measure.memory(model) as m:
            y = model(x)
        live[name] = m.live_bytes
        del y
    assert live["none"] - live["x"] == pytest.approx(7 * tokens * 4 * spec.d_model, rel=0.02)  # of 10, not the first x
    assert live["none"] - live["o"] == pytest.approx(8 * tokens * 4 * spec.d_q, rel=0.02)


def test_rooms_are_given_back_at_the_backward_and_taken_again(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr(offload, "Scratch", lambda *args: made.append(args[0]) or Scratch(*args))
    model, x = stack(), torch.randn(1, 21, 48)
    set_save(model, pyckpt.Save("attention", {"x": "file", "o": "file"}, path=tmp_path))
    losses = []
    for _ in range(3):
        losses.append(model(x).sum())  # as a training loop that keeps its losses
        losses[-1].backward()
    assert len(made) == 2 * 3  # of four blocks the last stays
    model(x)  # a forward whose backward never comes
    gc.collect()
    model(x).sum().backward()
    assert len(made) == 2 * 3
    assert os.listdir(tmp_path) == []


def test_a_single_block_and_no_gradient_copy_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(offload, "Scratch", lambda *args: pytest.fail("nothing was to leave"))
    model = stack(1, save=pyckpt.Save("attention", {"x": "file"}, path=tmp_path))
    model(torch.randn(1, 21, 48)).sum().backward()
    deep = stack(4, save=pyckpt.Save("attention", {"x": "file"}, path=tmp_path))
    with torch.no_grad():
        deep(torch.randn(1, 21, 48))
    if not torch.cuda.is_available():
        set_save(deep, pyckpt.Save("attention", {"x": "host", "o": "host"}))
        deep(torch.randn(1, 21, 48)).sum().backward()  # a CPU's host memory is where it is


class _Heap:
    """Memory of a pool, in plain tensors."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.bytes = nbytes, torch.empty(nbytes, dtype=torch.uint8)

    def _like(self, t: Tensor) -> Tensor:
        return self.bytes[: t.nbytes].view(t.dtype).view(t.shape)

    def read(self, into: Tensor) -> None:
        into.copy_(self._like(into))

    def write(self, source: Tensor) -> None:
        self._like(source).copy_(source)


def test_a_pool_holds_no_more_than_was_taken_at_once():
    pool = Pool(_Heap)
    for size in (100, 200, 50, 300, 120):
        rooms = [pool.take(size), pool.take(size // 10)]
        assert all(r.memory.nbytes >= wanted for r, wanted in zip(rooms, (size, size // 10), strict=True))
        for room in rooms:
            pool.give(room)
        assert len(pool._idle) == 2
    assert pool.idle_bytes <= 2 * 300


# --- races -------------------------------------------------------------------------------------------------------


@pytest.fixture
def way(monkeypatch, seed) -> Iterator[DelayedLanes]:
    """Everything placed in files takes lanes that delay every copy by chance, into plain memory."""
    lanes = DelayedLanes(seed)
    route, queue = Route(lanes, Pool(_Heap)), Queue()
    monkeypatch.setattr(offload, "route_of", lambda *_: route)
    monkeypatch.setattr(offload, "queue_of", lambda _: queue)
    yield lanes


@pytest.mark.parametrize("orders", a_few([50, 200], always=(0,)))
def test_no_order_of_copies_changes_a_gradient(orders, way):
    model, x, dy = stack(), torch.randn(1, 11, 48), torch.randn(1, 11, 48)
    truth = step(model, x, dy)
    for n in range(orders):
        way.random.seed(n)
        set_save(model, pyckpt.Save("attention+mid", everything("attention+mid", "file"), n % 4))
        assert_same(step(model, x, dy), truth)


class _Log:
    """`Lanes` that copy at once and write down what happens."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self._count = 0

    def compute(self):
        self._count += 1
        self.events.append(("compute", self._count))
        return self._count

    def run(self, lane, copy, after):
        copy()
        self._count += 1
        self.events += [("after", e) for e in after] + [(lane, self._count)]
        return self._count

    def hold(self, events):
        self.events += [("hold", e) for e in events]

    wait = hold


def test_memory_is_given_up_after_its_copy_only(seed):
    """On a GPU, memory that is freed while a copy still reads it would be written to by the next kernel."""
    log, queue = _Log(), Queue()
    route = Route(log, Pool(_Heap))
    parcels, copies = [], {}
    for i in range(6):
        t = torch.randn(10)
        weakref.finalize(t.untyped_storage(), lambda i=i: log.events.append(("freed", i)))
        parcels.append(queue.add({"x": t}, {"x": route}, last=1))
        del t
    outs = [e for kind, e in log.events if kind == "out"]
    copies = dict(enumerate(outs))
    for i in range(4):
        freed, held = log.events.index(("freed", i)), log.events.index(("hold", copies[i]))
        assert held < freed
    assert ("freed", 4) not in log.events  # its copy was begun, and is given the next block's time
    # A copy in waits for the copy out of the same tensor, and what reads it for the copy in.
    got = parcels[2].fetch()["x"]
    read = next(e for kind, e in log.events if kind == "in")
    where = log.events.index(("in", read))
    assert ("after", copies[2]) in log.events[:where]
    assert ("hold", read) in log.events[where:]
    assert got.shape == (10,)


def test_so_is_the_copy_of_a_tensor_that_is_no_row_after_row():
    """What leaves is then another tensor, which the allocator must not take back sooner either."""
    log, queue = _Log(), Queue()

    class Watched(_Heap):
        def write(self, source: Tensor) -> None:
            weakref.finalize(source.untyped_storage(), lambda: log.events.append(("freed", 0)))
            super().write(source)

    route = Route(log, Pool(Watched))
    parcels = [queue.add({"x": torch.randn(4, 6).t()}, {"x": route}, last=0) for _ in range(2)]
    (copy, *_) = [e for kind, e in log.events if kind == "out"]
    assert log.events.index(("hold", copy)) < log.events.index(("freed", 0))
    assert log.events.count(("freed", 0)) == 1 and parcels[1].state == "leaving"


def test_the_parcel_before_is_sent_for_while_one_is_used():
    log, queue = _Log(), Queue()
    route = Route(log, Pool(_Heap))
    values = [torch.randn(10) for _ in range(5)]
    parcels = [queue.add({"x": t.clone()}, {"x": route}, last=1) for t in values]
    for i in reversed(range(5)):
        before = sum(kind == "in" for kind, _ in log.events)
        assert torch.equal(parcels[i].fetch()["x"], values[i])
        came = sum(kind == "in" for kind, _ in log.events) - before
        # The last stays, the one before is leaving; from there on each is followed by the copy of the one before it.
        assert came == (0 if i in (4, 0) else 1)
        parcels[i].release()


@pytest.mark.parametrize("last", range(6))
def test_the_last_parcels_stay_and_no_others(last):
    queue, route = Queue(), Route(_Log(), Pool(_Heap))
    parcels = []
    for n in range(1, 8):
        parcels.append(queue.add({"x": torch.randn(10)}, {"x": route}, last))
        assert [p.state for p in parcels].count("here") == min(n, last)
        assert all(p.state == "here" for p in parcels[max(0, n - last) :])


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, 1, 4])
def test_what_was_changed_in_place_is_an_error(last):
    model = stack(3, save=pyckpt.Save("attention", {"x": "file"}, last))
    first = model[0](torch.randn(1, 21, 48)) * 1.0
    y = model[2](model[1](first))
    with torch.no_grad():
        first.add_(1.0)
    if last == 0:
        # Its copy was over: what is written now harms nothing, as the copy is what the backward reads.
        y.sum().backward()
        return
    with pytest.raises(RuntimeError, match="x of a block was modified by an inplace operation"):
        y.sum().backward()


def test_bad_places_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="'q' names nothing that save='attention' keeps; expected some of x, o, lse"):
        pyckpt.Save("attention", {"q": "host"})
    with pytest.raises(
        ValueError, match=r"place\['x'\]='disk' does not exist; expected one of 'device', 'host', 'file'"
    ):
        pyckpt.Save("attention", {"x": "disk"})
    with pytest.raises(ValueError, match="save='most' does not exist"):
        pyckpt.Save("most")
    with pytest.raises(ValueError, match="last must be"):
        pyckpt.Save("attention", last=-1)
    with pytest.raises(TypeError, match="place must be a dict"):
        pyckpt.Save("attention", "host")
    with pytest.raises(ValueError, match="no tensor has the place 'file'"):
        pyckpt.Save("attention", {"x": "host"}, path=tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        pyckpt.Save("attention", {"x": "file"}, path=tmp_path / "nowhere")


def test_bad_paths_are_refused_at_once(tmp_path):
    for path in (5, b"/tmp"):
        with pytest.raises(TypeError, match=r"path must be None or the path of a folder, got a (int|bytes)"):
            pyckpt.Save("attention", {"x": "file"}, path=path)
    (tmp_path / "text").write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        pyckpt.Save("attention", {"x": "file"}, path=tmp_path / "text")


def test_places_are_fixed(tmp_path):
    given = {"x": "file", "o": "host"}
    save = pyckpt.Save("attention", given, last=2, path=tmp_path)
    given["q"] = "moon"
    assert save.place == {"x": "file", "o": "host"}
    for change in (
        lambda: save.place.__setitem__("q", "moon"),
        lambda: save.place.__delitem__("x"),
        lambda: save.place.update(q="moon"),
        lambda: save.place.pop("x"),
        lambda: save.place.setdefault("q", "moon"),
        save.place.popitem,
        save.place.clear,
    ):
        with pytest.raises(TypeError, match=r"the places of a pyckpt\.Save can't be changed: make another Save"):
            change()
    with pytest.raises(TypeError, match="can't be changed"):
        save.place |= {"q": "moon"}
    for again in (copy.copy(save), copy.deepcopy(save), pickle.loads(pickle.dumps(save)), dataclasses.replace(save)):
        assert again == save and hash(again) == hash(save) and type(again.place) is type(save.place)
    assert dataclasses.asdict(save)["place"] == save.place and "'x': 'file'" in repr(save)


def test_a_full_disk_is_an_error_of_the_forward(monkeypatch, tmp_path):
    def full(*_args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = stack(3, save=pyckpt.Save("attention", {"x": "file"}, path=tmp_path))
    with pytest.raises(OSError, match=r"scratch file of .* bytes in"):
        model(torch.randn(1, 21, 48))
    monkeypatch.undo()
    model(torch.randn(1, 21, 48)).sum().backward()


def test_a_block_says_what_was_given():
    save = pyckpt.Save("attention+mid", {"mid": "host"})
    block = pyckpt.CkptTransformerBlock(48, 4, save=save)
    assert block.save == save
    block.save = "input"
    assert block.save == "input"


def test_equal_saves_are_one_key(tmp_path):
    """As in a set of configurations, or a dict."""
    saves = [pyckpt.Save("attention", {"x": "file"}, 2, path) for path in (tmp_path, tmp_path, None)]
    assert len(set(saves)) == 2 and hash(saves[0]) == hash(saves[1])


@pytest.mark.parametrize("name", [save_set("input"), pyckpt.Save("input")])
def test_the_name_of_a_save_is_a_name(name):
    with pytest.raises(TypeError, match="name must be that of a save set, as 'attention' is, got a Save"):
        pyckpt.Save(name)


class _Queued:
    """Lanes that only queue, as a GPU's: a copy is over when the host waits for it. Rooms know which use them."""

    def __init__(self) -> None:
        self.jobs, self.freed_early = 0, []
        self.pending: dict[int, int] = {}  # job -> room
        self.after: dict[int, list[int]] = {}  # what is over before a job is
        self.last: dict[str, int] = {}  # of each lane
        self.now = self.rooms = 0

    def compute(self) -> None:
        return None

    def run(self, lane, copy, after) -> int:
        self.jobs += 1
        self.now = self.jobs
        self.after[self.now] = [*after, *([self.last[lane]] if lane in self.last else [])]
        self.last[lane] = self.now
        copy()
        return self.jobs

    def hold(self, events) -> None:
        pass

    def wait(self, events) -> None:
        for event in events:
            self.pending.pop(event, None)
            self.wait(self.after.pop(event, []))

    def room(self, nbytes: int):
        self.rooms += 1
        return _Room(self, self.rooms, nbytes)


class _Room:
    def __init__(self, lanes: _Queued, number: int, nbytes: int) -> None:
        self.lanes, self.number, self.nbytes = lanes, number, nbytes
        weakref.finalize(self, lambda: lanes.freed_early.extend(j for j, n in lanes.pending.items() if n == number))

    def read(self, into: Tensor) -> None:
        self.lanes.pending[self.lanes.now] = self.number

    def write(self, source: Tensor) -> None:
        self.lanes.pending[self.lanes.now] = self.number


def test_a_room_is_freed_after_the_copies_that_use_it():
    """Longer sequences come, and the device is behind the host."""
    lanes = _Queued()
    order, route = Queue(), Route(lanes, Pool(lanes.room, lanes.wait))
    for n in (8, 16, 12, 32):
        parcels = [order.add({"x": torch.randn(n)}, {"x": route}, 1) for _ in range(3)]
        for parcel in reversed(parcels):
            parcel.fetch()
            parcel.release()
    assert lanes.rooms > 2 and not lanes.freed_early


def test_a_parcel_that_found_no_room_leaves_once():
    """The next forward goes on where the error was: what had left holds its room, whose copy may be under way."""
    lanes, refused = _Queued(), []

    def room(nbytes: int) -> _Room:
        if nbytes == 400 and not refused:
            refused.append(nbytes)
            raise MemoryError("no room")
        return lanes.room(nbytes)

    order, route = Queue(), Route(lanes, Pool(room))
    first = order.add({"x": torch.randn(10), "o": torch.randn(100)}, dict.fromkeys("xo", route), 1)
    with pytest.raises(MemoryError, match="no room"):
        order.add({"x": torch.randn(10)}, {"x": route}, 1)
    second = order.add({"x": torch.randn(10)}, {"x": route}, 1)
    assert lanes.rooms == 2 and not lanes.freed_early
    del first, second


def test_a_collector_in_a_thread_that_copies_ends_no_run():
    """It may find a parcel there, while the main thread waits for that thread under the queue's lock."""
    code = """
import faulthandler, gc, threading, torch, pyckpt
from pyckpt.store.file import Scratch
faulthandler.dump_traceback_later(60, exit=True)
gc.disable()  # here a test says when
save = pyckpt.Save("attention", {"x": "file", "o": "file"})
stack = pyckpt.CkptTransformer([pyckpt.CkptTransformerBlock(32, 4, d_ff=64, save=save) for _ in range(4)])
x = torch.randn(1, 37, 32)
class Holder: pass
held = Holder()
held.itself, held.y = held, stack(x)  # a graph in a circle, whose backward never comes
real, where = Scratch.write, []
def write(self, source, offset=0):
    if threading.current_thread().name.startswith("pyckpt-store") and not where:
        where.append(threading.current_thread().name)
        gc.collect()
    real(self, source, offset)
Scratch.write = write
del held
stack(x).sum().backward()
assert where
print("over")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "over\n", done.stderr


def test_a_forked_process_copies_by_itself(monkeypatch):
    """It has none of its parent's threads, and neither waits for their copies nor for those of a graph it has too."""
    model, x, go = stack(3, save=pyckpt.Save("attention", {"x": "file"}, last=0)), torch.randn(1, 21, 48), []
    real, over = Scratch.write, threading.Event()

    def write(self, source, offset=0) -> None:
        if not go:
            over.wait()
        real(self, source, offset)

    monkeypatch.setattr(Scratch, "write", write)
    graphs = [model[0](x)]  # whose copy is under way

    def forward() -> bool:
        go.append(True)
        graphs.clear()
        gc.collect()
        torch.set_num_threads(1)
        model(x)
        return True

    try:
        assert in_a_fork(forward)
    finally:
        over.set()
    graphs.pop().sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_forward_on_another_stream_takes_nothing_before_its_copy():
    """One queue for both: the second stream's forward is what gives up the first one's tensors."""
    place = dict.fromkeys(("x", "o", "lse"), "host")
    first, second = (
        [
            pyckpt.CkptTransformerBlock(
                256, 4, save=pyckpt.Save("attention", place), device="cuda", dtype=torch.bfloat16
            )
            for _ in range(3)
        ]
        for _ in range(2)
    )
    x = torch.randn(1, 4096, 256, device="cuda", dtype=torch.bfloat16)
    dy, weights = torch.randn_like(x), [p for block in first for p in block.parameters()]
    out = offload.route_of(x.device, "host", None).lanes._streams["out"]
    a, b = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()

    def run(disturbed: bool) -> tuple[Tensor, ...]:
        with torch.cuda.stream(a):
            y = first[1](first[0](x))
            if disturbed:
                torch.cuda.synchronize()
                with torch.cuda.stream(out):
                    torch.cuda._sleep(1_000_000_000)
            y = first[2](y)
        if disturbed:
            with torch.cuda.stream(b):
                second[0](x)
            with torch.cuda.stream(a):
                [torch.full_like(x, float("nan")) for _ in range(64)]
        torch.cuda.synchronize()
        with torch.cuda.stream(a):
            return torch.autograd.grad(y, weights, dy)

    assert all(map(torch.equal, run(False), run(True)))


def test_x_of_another_layout_has_the_same_bits_wherever_it_waits():
    """No norm stands before the projections, whose products read x as it lies."""
    options = {"d_ff": 24, "norm_placement": "output", "rope_theta": None, "tile": 5}
    block, results = pyckpt.CkptTransformerBlock(8, 4, **options), []
    x, cu = torch.randn(8, 40).T.requires_grad_(), torch.tensor([0, 40], dtype=torch.int32)
    assert not x.is_contiguous()
    for save in ("attention", "all", pyckpt.Save("attention", {"x": "file"})):
        block.save = save
        y = block(x, cu_seqlens=cu)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_an_interrupt_while_a_parcel_is_made(monkeypatch):
    """Leaves nothing that could not be thrown away."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    block = pyckpt.CkptTransformerBlock(16, 4, d_ff=24, save=pyckpt.Save("attention", {"x": "file"}))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(offload._Item, "__init__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            block(torch.randn(1, 9, 16))
        gc.collect()
    assert not unraisable
    block(torch.randn(1, 9, 16)).sum().backward()
