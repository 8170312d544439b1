"""Worker processes that return items in order.

Each of N workers has its own connection to the main process and makes every N-th item; N items, one of each, are a
round. No item can be lost: it is put into shared memory by the thread that made it, where a failure takes the item's
place, and a worker that dies closes its connection, whatever it was doing. (torch's DataLoader pickles in a thread
whose errors are only printed, and its workers write to one pipe, which stays locked if a worker is killed while it
writes.)
"""

from __future__ import annotations

import ctypes
import errno
import gc
import io
import multiprocessing
import os
import pickle
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from cae2pipe.errors import Cae2pipeError, WorkerError
from cae2pipe.runtime.processes import prepare_worker, refuse_import_of_main, shielded, shorten_sockets, worker_died
from cae2pipe.runtime.shared_memory import (
    PREFETCH,
    RoundMemory,
    check_room,
    explain_sharing,
    in_round,
    mapped,
    use_memory,
)
from cae2pipe.runtime.signals import StoppedWaitingError, stop_asked

PRELOAD = ("cae2pipe.runtime.forkserver_preload", __name__)
POLL = 0.5
"""Seconds between checks for a stop while waiting for the next item."""
PATIENCE = 3.0
"""Seconds to wait for the next item after a stop has been requested."""
GRACE = 2.0
"""Seconds for workers to end on their own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's ``mallopt``."""
LARGEST_KEPT, MOST_KEPT = 2**25, 2**28
"""Bytes of the largest array that a worker makes in freed memory, which is the most that glibc allows, and bytes of
freed memory that it keeps."""


T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Listed(Protocol[T_co]):
    """Items by number; picklable, as a torch ``Dataset`` is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


@runtime_checkable
class Streamed(Protocol[T_co]):
    """Items of which each worker makes its own stream; picklable."""

    def share(self, worker: int, workers: int) -> Iterator[T_co]:
        """The items of worker number ``worker``. Items are yielded in turn, one from each worker."""


def in_order(
    source: Listed[T] | Streamed[T], workers: int, preload: Sequence[str] = (), *, room: int = 0
) -> Generator[T, None, None]:
    """The items of a source, made by ``workers`` processes (0: in this one) and yielded in order.

    Workers are started from a clean server process: fork would copy a CUDA context or a thread pool in a broken
    state. It imports the modules ``preload`` once for all of them. There is one server per process: later calls reuse
    it, and their workers import what it has not preloaded.

    Args:
        room: bytes of memory that all workers share in a round, from which ``round_parts`` takes. It is used again when
            no tensor of a round is left.

    Raises:
        Exception: what the source raised. WorkerError: a worker died; there is too little shared memory, which is
            raised before the first item is yielded; or a stop was requested while waiting for an item.
    """
    if workers == 0:
        yield from _share(source, 0, 1)
        return
    started: list[_Worker] = []
    # If this generator is still open when the interpreter exits. Positive: before multiprocessing ends the workers with
    # a signal, after which its resource tracker warns of what they could not clean up.
    at_exit = Finalize(None, _end, args=(started, GRACE), exitpriority=1)
    grace = GRACE
    items = len(source) if isinstance(source, Sized) else None
    memory = RoundMemory(room) if room else None
    try:
        check_room(-(-room // workers), workers, items)
        _start(source, workers, preload, room=room, started=started)
        for turn in range(PREFETCH):
            for worker in started:
                _admit(worker, turn, memory)
        # A list or stream may end in the middle of a round, which then has no item from some workers.
        turns, first = list(started), True
        for turn in count():
            for worker in list(turns):
                kind, value, shared = _receive(worker, memory.storage(turn) if memory else None)
                _admit(worker, turn + PREFETCH, memory)
                if kind == "end":
                    turns.remove(worker)
                    continue
                if kind == "error":
                    raise value
                if first:
                    check_room(shared + -(-room // workers), workers, items)
                    first = False
                if memory and worker is started[-1]:
                    memory.complete(turn)
                yield value
                # Otherwise it would keep its memory while the next one is made.
                del value
            if not turns:
                break
    except BaseException as error:
        # On an interrupt, do not wait for workers that may be stuck.
        if isinstance(error, StoppedWaitingError) or not isinstance(error, (Exception, GeneratorExit)):
            grace = 0.0
        raise
    finally:
        at_exit.cancel()
        _end(started, grace)
        if memory:
            memory.close()


@dataclass
class _Worker:
    """``memories``: how many of the memories of rounds it has been given."""

    process: BaseProcess
    connection: Connection
    gave: bool = False
    memories: int = 0


def _share(source: Listed[T] | Streamed[T], worker: int, workers: int) -> Iterator[T]:
    if isinstance(source, Streamed):
        return source.share(worker, workers)
    return (source[index] for index in range(worker, len(source), workers))


def _start(
    source: Listed[object] | Streamed[object],
    workers: int,
    preload: Sequence[str],
    *,
    room: int,
    started: list[_Worker],
) -> None:
    refuse_import_of_main()
    shorten_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, *preload])
    with shielded():
        for number in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, source, number, workers, room), daemon=True)
            try:
                process.start()
            except (EOFError, ConnectionError) as error:
                # The worker, or the server, died before it had read its task.
                raise worker_died(process.exitcode if process.pid else None, gave=False) from error
            finally:
                there.close()
            started.append(_Worker(process, here))


def _admit(worker: _Worker, turn: int, memory: RoundMemory | None) -> None:
    """Let a worker make its item of a round, in the memory of that round."""
    number = memory.number(turn) if memory else 0
    with suppress(ConnectionError):  # it has ended or died: its connection will show that
        worker.connection.send_bytes(number.to_bytes(4, "little"))
        if memory and number == worker.memories:
            _send_file(worker.connection, memory.file(number))
            worker.memories += 1


def _send_file(connection: Connection, file: int) -> None:
    """Send a descriptor, which must stay open until it has been received. (On macOS multiprocessing's ``send_handle``
    waits for the receiver, and takes the next byte for its answer: here that may be one of an item.)"""
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as sender:
        socket.send_fds(sender, [b"F"], [file])


def _received_file(connection: Connection) -> int:
    """Receive a descriptor.

    Raises:
        EOFError: the connection was closed. OSError: this process has too many files open.
    """
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as receiver:
        data, files, *_ = socket.recv_fds(receiver, 1, 1)
    if not data:
        raise EOFError
    if not files:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return files[0]


def _use_round(number: int, memories: list[Tensor], connection: Connection) -> None:
    """In a worker: make the next item in the memory of this number, which comes first if it is new."""
    if number == len(memories):
        file = _received_file(connection)
        try:
            memories.append(torch.from_numpy(mapped(file)))
        finally:
            os.close(file)
    use_memory(memories[number])


def _receive(worker: _Worker, storage: torch.UntypedStorage | None) -> tuple[str, Any, int]:
    """A worker's next message: kind, value, and the bytes of shared memory of its own that the value takes.

    Args:
        storage: the memory of the round.
    """
    began = time.monotonic()
    while not wait([worker.connection], POLL):
        _heed_stop(began)
    try:
        message = worker.connection.recv_bytes()
    except (EOFError, OSError):
        raise _died(worker) from None
    shared = int.from_bytes(message[-8:], "little")
    # A new thread starts milliseconds late on busy cores.
    fetched = _fetched(worker, message, storage, began=began) if shared else _content(message, storage)
    worker.gave = True
    return *fetched, shared


def _content(message: bytes, storage: torch.UntypedStorage | None) -> tuple[str, Any]:
    """What a message says. Fetches shared memory, but that of the round, from the worker."""
    _fetching.storage = storage
    try:
        content: tuple[str, Any] = pickle.loads(message)
    finally:
        del _fetching.storage
    return content


def _fetched(worker: _Worker, message: bytes, storage: torch.UntypedStorage | None, *, began: float) -> tuple[str, Any]:
    """The content of a message. A thread fetches its shared memory from the worker, which may be stuck; a stop takes
    effect meanwhile."""
    fetches: queue.SimpleQueue[tuple[str, Any] | BaseException] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            fetches.put(_content(message, storage))
        except BaseException as error:
            fetches.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    while True:
        try:
            fetched = fetches.get(timeout=POLL)
        except queue.Empty:
            _heed_stop(began)
            continue
        if isinstance(fetched, (EOFError, ConnectionError, FileNotFoundError)):
            raise _died(worker)
        if isinstance(fetched, BaseException):
            raise fetched
        return fetched


def _heed_stop(began: float) -> None:
    if stop_asked() and time.monotonic() - began > PATIENCE:
        raise StoppedWaitingError("stopped while waiting for a worker", fix="run the same command again")


def _died(worker: _Worker) -> WorkerError:
    worker.process.join(GRACE)
    return worker_died(worker.process.exitcode, worker.gave)


def _end(started: list[_Worker], grace: float) -> None:
    """Stop the workers. All of them together get ``grace`` seconds to end, and the same again after SIGTERM."""
    for worker in started:
        worker.connection.close()
    _join(started, grace)
    for worker in started if grace else ():
        worker.process.terminate()
    _join(started, grace)
    for worker in started:
        # A suspended process reacts to nothing else.
        worker.process.kill()
        worker.process.join()


def _join(workers: list[_Worker], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))


def _work(
    connection: Connection, source: Listed[object] | Streamed[object], worker: int, workers: int, room: int
) -> None:
    prepare_worker()
    memories: list[Tensor] = []
    torch.set_num_threads(1)
    if room:
        keep_freed_memory()
    # What has been imported stays, and need not be looked through for garbage.
    gc.freeze()
    ready: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_send, args=(connection, ready), daemon=True).start()
    items = _share(source, worker, workers)
    try:
        last = False
        while not last:
            number = int.from_bytes(connection.recv_bytes(), "little")
            message, last = _next_message(items, partial(_use_round, number, memories, connection) if room else None)
            ready.put(message)
        # The main process fetches shared memory from this one, so it must not end before it is told to.
        while True:
            connection.recv_bytes()
    except (EOFError, OSError):
        return  # the main process needs no more


def _send(connection: Connection, ready: queue.SimpleQueue[bytes]) -> None:
    try:
        while True:
            connection.send_bytes(ready.get())
    except OSError:
        return  # the main process needs no more, which the main thread will notice
    except BaseException:  # the main process must be told that this one failed
        os._exit(1)


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back: the system must clear new pages first. Does
    nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def _next_message(items: Iterator[object], prepare: Callable[[], None] | None) -> tuple[bytes, bool]:
    """The next item, the end, or an error in its place; and whether that is the last message."""
    try:
        if prepare:
            prepare()
        try:
            item = next(items)
        except StopIteration:
            return _pack("end", None), True
        return _pack("item", item), False
    except Exception as error:
        return _pack("error", _portable(error)), True


def _portable(error: Exception) -> Exception:
    """An error that survives pickling, with the worker's traceback if it is a defect."""
    if not isinstance(error, (Cae2pipeError, OSError, MemoryError)):
        error.add_note(f"in a worker process: {traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"in a worker process: {traceback.format_exc()}")
    return error


_fetching = threading.local()
"""``storage``: while this thread reads a message, the memory of its round."""


def _round_storage() -> torch.UntypedStorage:
    storage: torch.UntypedStorage = _fetching.storage
    return storage


class _Pickler(ForkingPickler):
    """Puts tensors into shared memory, and counts its bytes, unless they lie in that of the round."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.storages: dict[int, int] = {}

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.UntypedStorage):
            return NotImplemented
        if in_round(value):
            return _round_storage, ()
        self.storages[value.data_ptr()] = value.nbytes()
        return NotImplemented


def _pack(kind: str, value: object) -> bytes:
    """A message, with the bytes of shared memory that it takes at its end, where pickle does not look.

    Raises:
        WorkerError, OSError, MemoryError: its tensors cannot be put into shared memory.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump((kind, value))
    except (RuntimeError, OSError) as error:
        raise explain_sharing(error, sum(pickler.storages.values())) from error
    file.write(sum(pickler.storages.values()).to_bytes(8, "little"))
    return file.getvalue()
