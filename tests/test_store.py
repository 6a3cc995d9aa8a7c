"""Stores: what is put is what is got, whatever the order and however late copies are; limits; nothing left behind."""

from __future__ import annotations

import dataclasses
import errno
import gc
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from lanes import DelayedLanes, MemoryBacking
from processes import in_a_fork
from torch import Tensor

from pyckpt.store import (
    STORES,
    DeviceStore,
    FileStore,
    HostStore,
    Plan,
    Slab,
    Store,
    available,
    host,
    kinds,
    make_store,
    mapped,
    pool,
)
from pyckpt.store.file import ScratchFile
from pyckpt.store.host import HostMemory, LockedMemory
from pyckpt.store.lanes import ThreadLanes
from pyckpt.store.staged import Staged

CPU = torch.device("cpu")
PLAN = Plan(
    tokens=23,
    tile=5,
    slabs=(
        Slab("x", 3, torch.float32, count=2, buffers=2),
        Slab("b", 4, torch.bfloat16, buffers=3),
        Slab("d", 2, torch.float64, buffers=2),
    ),
)


def made(name: str, tmp_path) -> Store:
    return make_store(name, tmp_path if name == "file" else None)


def by_threads(tmp_path, done=lambda: None) -> Staged:
    """A file as a GPU's tiles have it: read and written by threads."""
    return Staged(PLAN, CPU, ScratchFile(PLAN, str(tmp_path), CPU), ThreadLanes(CPU), done)


def random_program(store, seed: int, fill, check) -> None:
    """Puts, gets, sums and prefetches of random tiles. `fill(tensor, value)` and `check(tensor, value)` are compute."""
    chance, truth = random.Random(seed), {}
    keys = [(s.name, i, t) for s in PLAN.slabs for i in range(s.count) for t in range(PLAN.n_tiles)]
    for step in range(60):
        key, kind = chance.choice(keys), chance.random()
        if chance.random() < 0.5:
            store.prefetch(chance.choice(keys))
        if kind < 0.35 or key not in truth:
            truth[key] = step % 100
            fill(store.new(key), truth[key])
            store.put(key)
        elif kind < 0.75:
            check(store.get(key), truth[key])
            store.release(key)
        elif kind < 0.95:
            t = store.accumulate(key)
            check(t, truth[key])
            truth[key] = (truth[key] + 1) % 100
            fill(t, truth[key])
            store.put(key)
        else:
            store.free(*key[:2])
            truth = {k: v for k, v in truth.items() if k[:2] != key[:2]}
    for key, value in truth.items():
        check(store.get(key), value)
        store.release(key)


def pattern(t: Tensor, value: int) -> Tensor:
    return (torch.arange(t.numel()) % 100 + value).view(t.shape).to(t.dtype)


def fill(t: Tensor, value: int) -> None:
    t.copy_(pattern(t, value))


def assert_holds(t: Tensor, value: int) -> None:
    assert torch.equal(t, pattern(t, value))


@pytest.mark.parametrize("name", STORES)
def test_what_is_put_is_got(name, tmp_path, seed):
    with made(name, tmp_path).open(PLAN, CPU) as store:
        random_program(store, seed, lambda t, v: t.copy_(pattern(t, v)), assert_holds)


def test_what_is_put_in_a_file_is_got_by_threads(tmp_path, seed):
    with by_threads(tmp_path) as store:
        random_program(store, seed, lambda t, v: t.copy_(pattern(t, v)), assert_holds)


@pytest.mark.parametrize("way", ["pages leave all the time", "an old kernel"])
def test_what_is_put_in_a_mapped_file_is_got(way, tmp_path, seed, monkeypatch):
    """While its pages come and go, and on kernels that enter them one by one."""
    monkeypatch.setattr(mapped, "_RESIDENT", 0)
    monkeypatch.setattr(mapped, "available_bytes", lambda: 0)
    if way == "an old kernel":
        monkeypatch.setattr(mapped, "_POPULATE_WRITE", 999)
    plan = dataclasses.replace(PLAN, slabs=tuple(dataclasses.replace(s, buffers=0) for s in PLAN.slabs))
    with FileStore(tmp_path).open(plan, CPU) as store:
        random_program(store, seed, lambda t, v: t.copy_(pattern(t, v)), assert_holds)


@pytest.mark.skipif(not mapped.USABLE, reason="files are not mapped here")
def test_a_mapped_file_is_not_resident(tmp_path):
    """128 MiB of it, written and read, of which 16 may be, and as much again while the kernel counts."""
    plan = Plan(32768, 256, (Slab("x", 1024, torch.float32, buffers=4),))

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    before, most = resident(), 0
    with FileStore(tmp_path).open(plan, CPU) as store:
        for kind in ("put", "release"):
            for tile in range(plan.n_tiles):
                t = store.new(("x", 0, tile)).fill_(tile) if kind == "put" else store.get(("x", 0, tile))
                assert t[0, 0] == t[-1, -1] == tile
                getattr(store, kind)(("x", 0, tile))
                most = max(most, resident())
    assert most - before < 2 * 16 * 2**20
    assert resident() - before < 8 * 2**20  # the last 16 of them are not there either


@pytest.mark.parametrize("seed", range(200))
def test_no_copy_races_compute_that_is_queued(seed):
    """As on a GPU: compute, copies in and copies out run whenever the events given let them, in any order else."""
    lanes = DelayedLanes(seed)
    lanes.deferred = True
    with Staged(PLAN, CPU, MemoryBacking(PLAN), lanes, lambda: None) as store:
        random_program(
            store,
            seed,
            lambda t, v: lanes.compute_job(lambda: t.copy_(pattern(t, v))),
            lambda t, v: lanes.compute_job(lambda: assert_holds(t, v)),
        )


def test_a_tile_that_was_never_put_cannot_be_read(tmp_path):
    for name in STORES:
        with made(name, tmp_path).open(PLAN, CPU) as store:
            for call in (store.get, store.change):
                with pytest.raises(KeyError, match="never put"):
                    call(("x", 0, 1))
            store.new(("x", 0, 1)).zero_()
            with pytest.raises(KeyError, match="never put"):
                store.get(("x", 0, 1))
            store.put(("x", 0, 1))
            store.get(("x", 0, 1))
            store.release(("x", 0, 1))
            store.free("x", 0)
            with pytest.raises(KeyError, match="freed"):
                store.get(("x", 0, 1))
            assert torch.equal(store.accumulate(("d", 0, 4)), torch.zeros(3, 2, dtype=torch.float64))


def test_more_loans_than_buffers(tmp_path):
    with by_threads(tmp_path) as store:
        for tile in (0, 1):
            store.new(("x", 0, tile))
        store.prefetch(("x", 0, 3))  # no buffer is free: nothing happens
        with pytest.raises(RuntimeError, match="all 2 buffers of 'x' are on loan"):
            store.new(("x", 1, 0))
        with pytest.raises(RuntimeError, match="on loan already"):
            store.new(("x", 0, 0))
        with pytest.raises(RuntimeError, match="not on loan"):
            store.release(("x", 0, 3))


def test_bytes_are_known_before():
    assert PLAN.n_tiles == 5
    assert PLAN.store_bytes == 23 * (2 * 12 + 8 + 16)
    assert PLAN.buffer_bytes == 5 * (2 * 12 + 3 * 8 + 2 * 16)
    assert [PLAN.rows(t).stop - PLAN.rows(t).start for t in range(5)] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("name", STORES)
def test_a_limit_that_is_too_small_is_refused_with_the_number(name, tmp_path):
    path, need = (tmp_path if name == "file" else None), PLAN.store_bytes
    with pytest.raises(ValueError, match=rf"needs {need:,} bytes of {name} storage, and the limit is {need - 1:,}"):
        make_store(name, path, limit=need - 1).open(PLAN, CPU)
    make_store(name, path, limit=need).open(PLAN, CPU).close()


def test_host_memory_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("pyckpt.store.host.available_bytes", lambda: 1000)
    with pytest.raises(MemoryError, match=f"needs {PLAN.store_bytes:,} bytes of host memory, and 1,000 are available"):
        HostStore().open(PLAN, CPU)


def test_a_full_disk_is_a_clear_error_before_the_start(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"scratch file of {PLAN.store_bytes:,} bytes in .* has [\d,]+ free"):
        by_threads(tmp_path)
    with pytest.raises(OSError, match=r"scratch file of [\d,]+ bytes in .* has [\d,]+ free"):
        FileStore(tmp_path).open(PLAN, CPU)
    assert os.listdir(tmp_path) == []


def test_bad_choices():
    with pytest.raises(ValueError, match="store='disk' does not exist; expected one of 'device', 'host', 'file'"):
        make_store("disk")
    with pytest.raises(ValueError, match="only store='file' has one"):
        make_store("host", path="/tmp")
    with pytest.raises(ValueError, match="is no folder"):
        make_store("file", path="/nowhere/at/all")
    with pytest.raises(ValueError, match="limit must be"):
        make_store("host", limit=-1)
    with pytest.raises(ValueError, match="belong to the Store"):
        make_store(DeviceStore(), limit=5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written to"):
        FileStore(tmp_path)


@pytest.mark.parametrize("has_tmpfile", [True, False])
def test_the_scratch_file_has_no_name(tmp_path, has_tmpfile, monkeypatch):
    if not has_tmpfile:
        monkeypatch.delattr(os, "O_TMPFILE")
    with FileStore(tmp_path).open(PLAN, CPU) as store:
        store.new(("x", 0, 0)).zero_()
        store.put(("x", 0, 0))
        assert os.listdir(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_a_killed_process_leaves_nothing(tmp_path):
    script = (
        "import os, sys, torch; from pyckpt.store import *\n"
        "s = FileStore(sys.argv[1]).open(Plan(1000, 10, (Slab('x', 64, torch.float32),)), torch.device('cpu'))\n"
        "s.new(('x', 0, 3)).zero_(); s.put(('x', 0, 3)); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=os.getcwd(), check=False)
    assert ended.returncode == -9
    assert os.listdir(tmp_path) == []


def test_memory_is_kept_for_the_next_run_of_the_same_plan(tmp_path):
    store = FileStore(tmp_path)
    store.open(PLAN, CPU).close()
    first = store._idle[1]
    opened = store.open(PLAN, CPU)
    assert opened._file is first
    second = store.open(PLAN, CPU)  # two runs at a time
    assert second._file is not first
    opened.close()
    second.close()
    store.open(Plan(9, 3, PLAN.slabs), CPU).close()
    assert store._idle[1] is not first


@pytest.mark.parametrize("name", STORES)
def test_a_forked_process_writes_to_nothing_of_its_parents(name, tmp_path):
    """Each has a store that has run before, and with it the memory that was kept."""
    store, key = made(name, tmp_path), ("x", 0, 0)
    store.open(PLAN, CPU).close()

    def other() -> bool:
        with store.open(PLAN, CPU) as opened:
            opened.new(key).fill_(2.0)
            opened.put(key)
            return bool((opened.get(key) == 2.0).all())

    with store.open(PLAN, CPU) as opened:
        opened.new(key).fill_(1.0)
        opened.put(key)
        opened.close()
        assert in_a_fork(other)
        with store.open(PLAN, CPU) as again:
            assert store._idle is None  # it has that memory
            assert bool((again.new(key) == 1.0).all())


def test_a_forked_process_waits_for_no_copy_of_its_parents(tmp_path):
    """Nobody makes it there, and CUDA's events are not to be asked."""

    class Lanes(ThreadLanes):
        def close(self, then):
            closed.append(True)
            super().close(then)

    closed: list[bool] = []
    opened = [Staged(PLAN, CPU, MemoryBacking(PLAN), Lanes(CPU), lambda: None)]

    def dropped() -> bool:
        opened.clear()
        gc.collect()
        return not closed

    assert in_a_fork(dropped)
    opened.clear()
    gc.collect()
    assert closed


def test_a_file_is_closed_by_no_exit_while_threads_copy(tmp_path):
    """A file that is opened next, as by a handler that saves the model, would have its number."""
    script = (
        "import atexit, os, sys, threading\n"
        "folder, copying = sys.argv[1], threading.Event()\n"
        "def save():\n"
        "    files = [open(f'{folder}/{i}', 'w+b') for i in range(9)]\n"
        "    copying.set(); lane.join()\n"
        "    print([os.path.getsize(file.name) for file in files])\n"
        "atexit.register(save)\n"  # first, so that it runs last
        "import torch\n"
        "from pyckpt.store.file import Scratch\n"
        "scratch = Scratch(64, folder, None)\n"
        "def copy():\n"
        "    copying.wait(); scratch.write(torch.zeros(16))\n"
        "lane = threading.Thread(target=copy, daemon=True); lane.start()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ended.stdout == f"{[0] * 9}\n" and not ended.stderr


def test_a_relative_path_is_that_of_the_working_directory_it_was_given_in(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    store = FileStore("scratch")
    monkeypatch.chdir("/")
    store.open(PLAN, CPU).close()
    assert store.path == str(tmp_path / "scratch")


def test_a_dropped_store_ends_its_threads(tmp_path):
    before = threading.active_count()
    opened = by_threads(tmp_path)
    assert threading.active_count() == before + 2
    del opened
    gc.collect()
    assert threading.active_count() == before


def test_a_copy_that_fails_is_raised_where_it_is_waited_for():
    class Broken(MemoryBacking):
        def write(self, key, source):
            raise OSError(errno.EIO, "the disk is gone")

    with Staged(PLAN, CPU, Broken(PLAN), ThreadLanes(CPU), lambda: None) as store:
        store.new(("x", 0, 0)).zero_()
        store.put(("x", 0, 0))
        store.new(("x", 0, 1)).zero_()
        store.put(("x", 0, 1))
        with pytest.raises(OSError, match="the disk is gone"):
            store.new(("x", 0, 2))


def test_a_run_that_is_dropped_while_it_copies_is_closed_by_its_last_copy(tmp_path):
    """Which runs in a thread of the store's own: that one can't wait for itself."""
    before, slow, go, done = set(threading.enumerate()), threading.Event(), threading.Event(), []
    opened = by_threads(tmp_path, lambda: done.append(True))
    name = PLAN.slabs[0].name
    opened.new((name, 0, 0))
    opened.put((name, 0, 0))

    def last(held=opened) -> None:  # as a copy holds what it copies for
        slow.set()
        go.wait()

    opened._lanes.run("out", last, [])
    slow.wait()
    del opened, last
    gc.collect()
    assert not done
    go.set()
    while ours := set(threading.enumerate()) - before:  # the last of them is started by another one
        for thread in ours:
            thread.join()
    assert done


@pytest.mark.parametrize("name", STORES)
def test_memory_of_a_run_in_inference_mode_serves_others(name, tmp_path):
    """It is kept, and written to outside of that mode."""
    store = made(name, tmp_path)
    with torch.inference_mode(), store.open(PLAN, CPU) as opened:
        opened.new(("x", 0, 0)).zero_()
        opened.put(("x", 0, 0))
    with torch.no_grad(), store.open(PLAN, CPU) as opened:
        random_program(opened, 3, fill, assert_holds)


def test_threads_copy_in_inference_mode(tmp_path):
    """They are not in it themselves."""
    with torch.inference_mode(), by_threads(tmp_path) as opened:
        random_program(opened, 3, fill, assert_holds)


@pytest.mark.parametrize("name", STORES)
def test_host_memory_is_on_the_host_whatever_the_default_device(name, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(host, "lock", lambda t: seen.append(t.device))
    torch.set_default_device("meta")
    try:
        with made(name, tmp_path).open(PLAN, CPU) as opened:
            opened.new(("x", 0, 0)).fill_(7)
            opened.put(("x", 0, 0))
            assert opened.get(("x", 0, 0)).tolist() == [[7.0] * 3] * 5
        pool.HostRoom(16)
    finally:
        torch.set_default_device(
            None
        )  # a device would leave a mode on, under which all that follows takes twice the time
    assert seen == [CPU]


def test_rings_that_do_not_fit_leave_no_threads(tmp_path):
    before = threading.active_count()
    large = Plan(23, 1 << 40, (Slab("x", 1 << 10, torch.float32, buffers=2),))
    with pytest.raises(RuntimeError, match=r"allocate|memory"):
        Staged(large, CPU, MemoryBacking(PLAN), ThreadLanes(CPU), lambda: None)
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_stores_memory_is_of_the_stream_that_had_it():
    store, streams = DeviceStore(), [torch.cuda.Stream(), torch.cuda.Stream()]
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    for stream in (*streams, streams[0]):
        with torch.cuda.stream(stream), store.open(PLAN, device) as opened:
            found.append(opened.new(("x", 0, 0)).data_ptr())
    assert found[0] != found[1]


# --- host memory --------------------------------------------------------------------------------------------------


def test_what_is_put_in_host_memory_is_got(seed, monkeypatch):
    """As a GPU's tiles have it, in memory that an earlier run of more tokens had."""
    monkeypatch.setattr(host, "lock", lambda t: None)
    memory = LockedMemory(HostMemory.bytes_of(PLAN) + 1000)
    for _ in range(2):
        with Staged(PLAN, CPU, HostMemory(PLAN, memory), ThreadLanes(CPU), lambda: None) as store:
            random_program(store, seed, fill, assert_holds)


def test_memory_is_locked_anew_for_longer_sequences_alone(monkeypatch):
    locked = []
    monkeypatch.setattr(host, "lock", lambda t: locked.append(t.nbytes))
    store = HostStore()
    for tokens in (23, 7, 15, 23, 40, 23):
        plan = dataclasses.replace(PLAN, tokens=tokens)
        memory = store._locked(plan)
        assert memory.nbytes >= HostMemory.bytes_of(plan) >= plan.store_bytes
        store._keep(kinds._LOCKED, memory)
    assert locked == [HostMemory.bytes_of(dataclasses.replace(PLAN, tokens=n)) for n in (23, 40)]


def test_two_runs_never_get_one_memory(monkeypatch):
    """Threads may open them at any moment: here the second does while the first looks at what is idle."""
    monkeypatch.setattr(host, "lock", lambda t: None)
    store, others = HostStore(), []

    class Idle:
        @property
        def nbytes(self) -> int:
            if not others:
                others.append(None)
                others.append(store._locked(PLAN))
            return PLAN.store_bytes * 2

    idle = Idle()
    store._keep(kinds._LOCKED, idle)
    assert store._locked(PLAN) is idle
    assert others[1] is not idle


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    """Of either version, and of the groups around it."""
    groups = tmp_path / "groups"
    own = groups / "a" / "b"
    old = groups / "memory" / "c"
    for folder in (own, old):
        folder.mkdir(parents=True)
    (tmp_path / "own").write_text("3:cpu:/x\n2:memory:/c\n0::/a/b\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(available, "_GROUPS", groups)
    monkeypatch.setattr(available, "_OWN_GROUPS", str(tmp_path / "own"))
    monkeypatch.setattr(available, "_MEMINFO", str(tmp_path / "meminfo"))
    assert available.available_bytes() == 5_120_000
    for folder, limit, used in ((own, "max", 300), (own.parent, "3000000", 1000000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 5\ninactive_file 400000\n")
    assert available.available_bytes() == 2_400_000
    (old / "memory.limit_in_bytes").write_text("2000000\n")
    (old / "memory.usage_in_bytes").write_text("1500000\n")
    (old / "memory.stat").write_text("total_inactive_file 1000\n")
    assert available.available_bytes() == 501_000


def test_a_scratch_file_in_memory_is_refused_where_there_is_none(tmp_path, monkeypatch):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"disk / ext4 rw 0 0\nx {tmp_path} tmpfs rw 0 0\ny {tmp_path}/disk ext4 rw 0 0\n")
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(available, "_MOUNTS", str(mounts))
    monkeypatch.setattr(host, "available_bytes", lambda: 10)
    with pytest.raises(MemoryError, match="is in memory: give a path on a disk"):
        FileStore(tmp_path).open(PLAN, CPU)
    FileStore(tmp_path / "disk").open(PLAN, CPU).close()
