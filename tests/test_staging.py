"""Staging: how bytes of the host get to a device, with the host in the place of a device."""

import ctypes
import gc
import itertools
import linecache
import random
import signal
import sys
import threading
import time
import types
from functools import partial

import numpy as np
import pytest
from contract import interrupted_after

import mxfp4np
from mxfp4np.backends.cuda import staging


class DeviceError(RuntimeError):
    pass


class HostCupy(types.ModuleType):
    """What staging needs of CuPy, with the host in the place of a device, and streams that do everything at once."""

    class Stream:
        ptr = 0
        id = 0

        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait_event(self, _):
            pass

        record = wait_event

        def synchronize(self):
            pass

    class PinnedMemory:
        def __init__(self, nbytes):
            self.memory = ctypes.create_string_buffer(nbytes)
            self.ptr = ctypes.addressof(self.memory)

    def __init__(self):
        super().__init__("cupy")
        self.cuda = types.ModuleType("cupy.cuda")
        self.cuda.Device = self.cuda.Stream = self.cuda.Event = self.cuda.get_current_stream = self.Stream
        self.cuda.PinnedMemory = self.PinnedMemory
        self.cuda.runtime = types.SimpleNamespace(memcpyAsync=self.copy, eventQuery=self.query)

    def copy(self, target, source, nbytes, kind, _):
        assert kind == 1
        ctypes.memmove(target, source, nbytes)

    def query(self, _):
        return 0


class LateCupy(HostCupy):
    """The same, with streams that do what is queued when it has to be done, and at random before."""

    def __init__(self, seed):
        super().__init__()
        self.random, self.streams, self.events, self.lock = random.Random(seed), [], [], threading.RLock()
        self.cuda.Event = lambda **_: LateEvent(self)
        self.cuda.Stream = lambda **_: LateStream(self)
        self.cuda.PinnedMemory = lambda nbytes: LatePinnedMemory(self, nbytes)
        self.current = threading.local()
        self.cuda.get_current_stream = self.current_stream

    def current_stream(self):
        if not hasattr(self.current, "stream"):
            self.current.stream = LateStream(self)
        return self.current.stream

    def copy(self, target, source, nbytes, kind, stream):
        assert kind == 1
        self.streams[stream].queue.append(lambda: ctypes.memmove(target, source, nbytes))

    def query(self, event):
        for _ in range(self.random.randrange(4)):
            self.proceed()
        return 0 if self.events[event].done else 600

    def proceed(self):
        """Do what one of the streams has to do next; return whether there was anything."""
        with self.lock:
            for stream in self.random.sample(self.streams, len(self.streams)):
                if stream.queue and stream.queue[0]() is not False:
                    stream.queue.pop(0)
                    return True
        return False


class LateStream(HostCupy.Stream):
    def __init__(self, device):
        self.device, self.queue = device, []
        with device.lock:
            self.ptr = len(device.streams)
            device.streams.append(self)

    def wait_event(self, event):
        assert event.recorded
        self.queue.append(lambda: event.done)

    def synchronize(self):
        while self.queue:
            assert self.device.proceed() or not self.queue, "all streams wait for each other"


class LateEvent:
    def __init__(self, device):
        self.device, self.recorded, self.done = device, False, False
        with device.lock:
            self.ptr = len(device.events)
            device.events.append(self)

    def record(self, stream):
        self.recorded = True
        stream.queue.append(lambda: setattr(self, "done", True))

    def synchronize(self):
        while not self.done:
            assert self.device.proceed() or self.done, "all streams wait for each other"


class LatePinnedMemory(HostCupy.PinnedMemory):
    """Pinned memory that overwrites its content when it is freed, after what is queued, as CUDA's driver does."""

    def __init__(self, device, nbytes):
        super().__init__(nbytes)
        self.device = device

    def __del__(self):
        while self.device.proceed():
            pass
        ctypes.memset(self.ptr, 0xA5, len(self.memory))


class OnHost:
    """A contiguous array in the place of one on a device."""

    def __init__(self, shape, dtype):
        self.array = np.empty(shape, dtype)
        self.itemsize, self.dtype = self.array.itemsize, self.array.dtype
        self.data = types.SimpleNamespace(ptr=self.array.ctypes.data)


@pytest.fixture
def put_cupy(monkeypatch):
    """Return a function that puts something in the place of CuPy, and nothing in that of pinned memory."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(staging, "MIN_COPY_BYTES", 250)
    monkeypatch.setattr(staging, "CHUNK_BYTES", 96)

    def put(fake):
        monkeypatch.setattr(staging, "pinned", staging._Pinned())
        monkeypatch.setitem(sys.modules, "cupy", fake)
        monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cuda)
        staging._copy_stream.cache_clear()
        return fake

    yield put
    staging._copy_stream.cache_clear()


@pytest.fixture
def host_cupy(put_cupy):
    """Put the host in the place of a device, with small buffers."""
    return put_cupy(HostCupy())


def random_rows(rows=30, length=7000, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, length), np.uint8)


def transfer_all(source, target, threads=1):
    staging.transfer(staging.parts_of(source, target), threads)


def pinned_bytes():
    return sum(pair.nbytes for pair in staging.pinned._all)


def assert_nothing_is_in_use(pairs=1):
    assert len(staging.pinned._free) == len(staging.pinned._all) == pairs


@pytest.mark.usefixtures("host_cupy")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("bound", [0, 1, 1000, 3000, 100_000])
def test_bytes_of_all_strides_and_dtypes_arrive(monkeypatch, threads, bound):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", str(bound))
    big = np.random.default_rng(0).integers(0, 256, (6, 40, 16, 8), np.uint8)
    sources = [
        big,
        big[::2],
        big[:, ::-2],
        big[::2, ::3],
        big[..., ::2],
        big.transpose(2, 0, 3, 1),
        big[0, 0, 0],
        big[0, 0, 0, 0:1],
        big[2, 3, 4, 5],
        big[:0],
        big[:, 3:3],
        np.broadcast_to(big[0, 0, 0], (7, 300, 8)),
        big.reshape(-1)[1:-1].view(np.int16),
    ]
    for dtype in (None, np.float32):
        for source in map(np.asarray, sources):
            target = OnHost(source.shape, dtype or source.dtype)
            transfer_all(source, target, threads)
            assert np.array_equal(target.array, source.astype(target.dtype))
    assert pinned_bytes() <= max(bound, 2 * staging.CHUNK_BYTES)


@pytest.mark.usefixtures("host_cupy")
@pytest.mark.parametrize("threads", [1, 4])
def test_parts_of_several_arrays_of_any_strides_lie_one_after_the_other(threads):
    big = np.random.default_rng(0).integers(0, 256, (40, 30, 16), np.uint8)
    sources = [big[::3, 1:], big[0, 0, :0], big[5, 5, ::-1], big[..., 3], big[1, 2, 3:4], np.arange(5)]
    target = OnHost(sum(source.nbytes for source in sources), np.uint8)
    staging.transfer([staging.Part(target.data.ptr, sources)], threads)
    assert target.array.tobytes() == b"".join(source.tobytes() for source in sources)


@pytest.mark.usefixtures("host_cupy")
@pytest.mark.parametrize("threads", [1, 4])
def test_parts_are_finished_once_they_are_there_and_memory_is_used_again_after(threads):
    source = random_rows()
    targets = [OnHost(7000, np.uint8) for _ in range(2)]
    found = []

    def parts():
        for i, row in enumerate(source):
            target = targets[i % 2]
            then = lambda i=i, target=target: found.append((i, target.array.copy()))  # noqa: E731
            yield staging.Part(target.data.ptr, [row], then)

    staging.transfer(parts(), threads)
    assert [i for i, _ in found] == list(range(30))
    assert all(np.array_equal(array, source[i]) for i, array in found)


def late_parts(source, stream, found, targets=None):
    """Yield parts that use two targets in turn, and are read there when it is their turn on a stream."""
    targets = targets or [OnHost(source.shape[1], np.uint8) for _ in range(2)]
    for row, target in zip(source, itertools.cycle(targets), strict=False):
        read = partial(lambda target: found.append(target.array.copy()), target)
        yield staging.Part(target.data.ptr, [row], partial(stream.queue.append, read))


@pytest.mark.parametrize("seed", range(60))
def test_streams_wait_for_each_other_where_they_have_to(put_cupy, seed):
    fake = put_cupy(LateCupy(seed))
    stream = fake.cuda.get_current_stream()
    source = random_rows(12, 4500, seed)
    targets = [OnHost(4500, np.uint8) for _ in range(2)]
    targets[0].array[:] = 7
    before, found = [], []
    stream.queue.append(lambda: before.append(targets[0].array.copy()))  # what the caller queued, and is not done yet
    staging.transfer(late_parts(source, stream, found, targets), 2)
    source_then, source[:] = source.copy(), 0  # it has been read
    stream.synchronize()
    assert np.all(before[0] == 7)
    assert np.array_equal(found, source_then)
    staging.pinned.release()
    assert not len(staging.pinned._all)


@pytest.mark.parametrize("seed", range(20))
def test_buffers_of_one_transfer_are_used_by_the_next_after_their_copies(put_cupy, seed):
    fake = put_cupy(LateCupy(seed))
    stream, found, expected = fake.cuda.get_current_stream(), [], []
    for i in range(6):
        source = random_rows(3, 600, 10 * seed + i)
        expected += [*source]
        staging.transfer(late_parts(source, stream, found), 1)
    assert_nothing_is_in_use()
    stream.synchronize()
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound", [0, 2000, 4000, 100_000])
def test_threads_at_once_share_a_device_and_pinned_memory_within_its_bound(put_cupy, monkeypatch, seed, bound):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", str(bound))
    fake, failures, most = put_cupy(LateCupy(seed)), [], []

    def run(number):
        stream, found, expected = fake.cuda.get_current_stream(), [], []
        for i in range(4):
            source = random_rows(4, 1500, 100 * seed + 10 * number + i)
            expected += [*source]
            staging.transfer(late_parts(source, stream, found), 2)
            most.append(pinned_bytes())
            if i == number:
                staging.pinned.release()  # while others use theirs
        stream.synchronize()
        failures.append(not np.array_equal(found, expected))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == [False] * 4
    assert max(most) <= max(bound, 2 * staging.CHUNK_BYTES)
    assert_nothing_is_in_use(len(staging.pinned._all))
    staging.pinned.release()
    assert not len(staging.pinned._all)


@pytest.mark.usefixtures("host_cupy")
@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_on_the_way_ends_all_and_gives_back_the_memory(threads):
    source = np.zeros((30, 7000), np.uint8)
    target = OnHost(7000, np.uint8)

    def fail():
        raise MemoryError("enough")

    for _ in range(20):
        parts = (staging.Part(target.data.ptr, [source[0]], fail if i == 3 else lambda: None) for i in range(30))
        with pytest.raises(MemoryError, match="enough"):
            staging.transfer(parts, threads)
    assert_nothing_is_in_use()
    staging.pinned.release()
    assert not len(staging.pinned._all)


def failing(monkeypatch, fake, function, when):
    """Have a function of CUDA fail with error 719, as CuPy does, if ``when`` holds for its arguments."""

    def failed(*_, **__):
        raise DeviceError("719")

    if function == "query":  # whose result CuPy does not look at
        query = fake.cuda.runtime.eventQuery
        monkeypatch.setattr(fake.cuda.runtime, "eventQuery", lambda event: 719 if when(event) else query(event))
        monkeypatch.setattr(HostCupy.Stream, "synchronize", failed)
        return
    place, name = (fake.cuda.runtime, "memcpyAsync") if function == "copy" else (fake.Stream, function)
    before = getattr(place, name)
    monkeypatch.setattr(place, name, lambda *arguments: (failed if when(*arguments) else before)(*arguments))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("function", ["copy", "record", "wait_event"])
def test_an_error_of_the_device_ends_all_with_its_number(host_cupy, monkeypatch, function, threads):
    times = itertools.count()
    failing(monkeypatch, host_cupy, function, lambda *_: next(times) >= 3)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(DeviceError, match="719"):
        transfer_all(source, target, threads)
    assert_nothing_is_in_use()


def test_an_error_of_a_device_that_is_waited_for_ends_all_and_frees_the_memory(host_cupy, monkeypatch):
    times = itertools.count()
    failing(monkeypatch, host_cupy, "query", lambda *_: next(times) >= 3)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(DeviceError, match="719"):
        transfer_all(source, target)
    gc.collect()
    assert_nothing_is_in_use(pairs=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_last_copy_is_not_lost(host_cupy, monkeypatch, threads):
    source, target = np.zeros((30, 700), np.uint8), OnHost((30, 700), np.uint8)
    end = target.data.ptr + target.array.nbytes
    failing(monkeypatch, host_cupy, "copy", lambda to, _, nbytes, *__: to + nbytes == end)
    for _ in range(100):
        with pytest.raises(DeviceError, match="719"):
            transfer_all(source, target, threads)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
@pytest.mark.parametrize("threads", [1, 3])
def test_waiting_for_a_device_that_is_busy_can_be_interrupted(host_cupy, monkeypatch, threads):
    monkeypatch.setattr(host_cupy.cuda.runtime, "eventQuery", lambda _: 600)
    source, target = np.zeros((30, 7000), np.uint8), OnHost((30, 7000), np.uint8)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.05):
        transfer_all(source, target, threads)
    assert_nothing_is_in_use()


@pytest.mark.usefixtures("host_cupy")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no such timer")
def test_waiting_for_pinned_memory_can_be_interrupted(monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "1000")
    pair = staging.pinned.take()
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.05):
        transfer_all(np.zeros(10, np.uint8), OnHost(10, np.uint8))
    staging.pinned.give_back(pair)
    assert_nothing_is_in_use()


def interrupted_at(line, call):
    """Call a function with an interrupt before some line that staging executes; return whether there was one.

    The end of a ``with`` of a lock is left out: Python handles no signal there before the lock is released.
    """
    left = itertools.count(line, -1)

    def trace(frame, event, _):
        if frame.f_code.co_filename != staging.__file__:
            return None
        text = linecache.getline(staging.__file__, frame.f_lineno).strip()
        if event == "line" and not text.startswith("with self._lock") and not next(left):
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_between_any_two_lines_leaves_nothing_running_and_no_memory_taken(put_cupy, monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "2kB")  # a pair
    source = random_rows(3, 400)
    for line in itertools.count():
        fake = put_cupy(LateCupy(line))
        stream, found = fake.cuda.get_current_stream(), []
        staging.transfer(late_parts(source, stream, found), 1)  # whose copies may still be queued
        run = partial(staging.transfer, late_parts(source, stream, found), 1)
        interrupted = interrupted_at(line, run)
        if len(staging.pinned._free) != len(staging.pinned._all):
            gc.collect()
        assert_nothing_is_in_use(len(staging.pinned._all))
        other = threading.Thread(target=staging.pinned.release)
        other.start()  # no lock is held
        other.join(timeout=60)
        assert not other.is_alive()
        assert pinned_bytes() == 0
        stream.synchronize()
        assert np.array_equal(found, np.concatenate([source, source])[: len(found)])
        assert len(found) == 6 or interrupted
        if not interrupted:
            break
    assert line > 100


@pytest.mark.usefixtures("host_cupy")
def test_an_interrupt_loses_no_pinned_memory(monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "2000")
    buffer, made = staging._Buffer, []

    def interrupted(nbytes):
        made.append(nbytes)
        if len(made) == 2:
            raise KeyboardInterrupt
        return buffer(nbytes)

    monkeypatch.setattr(staging, "_Buffer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        staging.pinned.take()
    assert_nothing_is_in_use(pairs=0)
    staging.pinned.give_back(staging.pinned.take())
    assert made == [1000] * 4
    assert_nothing_is_in_use()
    staging.pinned.release()
    assert_nothing_is_in_use(pairs=0)


@pytest.mark.usefixtures("host_cupy")
def test_pinned_memory_that_an_interrupt_has_lost_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "1000")
    staging.pinned.take()  # which nobody keeps
    assert staging.pinned.take().nbytes == 1000


@pytest.mark.usefixtures("host_cupy")
def test_pinned_memory_that_another_uses_is_waited_for(monkeypatch):
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "1000")
    pair, source, target = staging.pinned.take(), random_rows(), OnHost((30, 7000), np.uint8)
    other = threading.Thread(target=transfer_all, args=(source, target))
    other.start()
    time.sleep(0.05)
    assert other.is_alive()
    assert len(staging.pinned._all) == 1
    staging.pinned.give_back(pair)
    other.join(timeout=60)
    assert np.array_equal(target.array, source)
    assert_nothing_is_in_use()


def test_pinned_memory_that_the_system_does_not_grant_is_said(host_cupy, monkeypatch):
    def refuse(_):
        raise DeviceError("out of memory")

    monkeypatch.setattr(host_cupy.cuda, "PinnedMemory", refuse)
    with pytest.raises(mxfp4np.errors.DeviceMemoryError, match=r"no pinned memory \(out of memory\): 2,000 bytes"):
        staging.pinned.take()
    monkeypatch.setenv("MXFP4NP_PINNED_BYTES", "much")
    with pytest.raises(ValueError, match="MXFP4NP_PINNED_BYTES: 'much' is not a size"):
        staging.pinned.take()


@pytest.mark.usefixtures("host_cupy")
def test_bytes_are_not_brought_to_a_device_without_compiled_code(monkeypatch):
    monkeypatch.setattr(staging, "compiled_kernel", lambda *_: None)
    with pytest.raises(mxfp4np.BackendUnavailableError, match="unset NUMBA_DISABLE_JIT"):
        staging.transfer([], 1)
