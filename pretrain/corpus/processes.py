"""A function over many tasks, on all cores: in order, few tasks in memory, and no process that outlives its parent."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from pretrain.errors import CrashError, UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
_function: Callable[[Any], Any]


class Engine(Protocol):
    """Something that maps a function over tasks, as `in_processes` does: in order, and few tasks at a time."""

    def __call__(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """The results; the function and the tasks can be pickled."""


ENGINES = ("local", "ray")


def choose_engine(name: str = "local", workers: int | None = None) -> Engine:
    """What maps over this machine's processes, or over a Ray cluster.

    Args:
        name: One of `ENGINES`.
        workers: How many tasks at a time; by default one for each core, of this machine or of the cluster.

    Raises:
        UserError: If it is none of these, or cannot be used here.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; give at least 1")
    if name == "ray":
        from pretrain.corpus.on_ray import on_ray

        return on_ray(workers)
    if name != "local":
        raise UserError(f"engine is '{name}'; give one of {', '.join(ENGINES)}")

    def local(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        return in_processes(function, tasks, workers or cores())

    return local


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """``map`` over processes: results in the order of the tasks, which are taken only as fast as they are done.

    A single task is done in this process: small sources are not worth another.

    Raises:
        UserError: If making a task or the function raises it; the first in the tasks' order.
        CrashError: If a worker was killed.
    """
    rest: Iterator[Task | UserError] = to_first_error(tasks)
    first = list(itertools.islice(rest, 2))
    if workers == 1 or len(first) < 2:
        for task in itertools.chain(first, rest):
            if isinstance(task, UserError):
                raise task
            yield function(task)
        return
    # Forked, as PyTorch's loader workers are: the tokenizer is there, and a user's script needs no guard around main.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start, (function,))
    waiting: deque[Future[Result]] = deque()
    try:
        for task in itertools.chain(first, rest):
            waiting.append(pool.submit(_apply, task))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise CrashError(
            "a worker process was killed, probably out of memory; give the same command again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def to_first_error(tasks: Iterable[Task]) -> Iterator[Task | UserError]:
    """The tasks and, where making one fails, the error as the last: so that an error in an earlier task comes first."""
    try:
        yield from tasks
    except UserError as error:
        yield error


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    end_with_parent()
    pa.set_cpu_count(1)


def end_with_parent(worker: int = 0) -> None:
    """Let this process end when the one that started it does or says so, and for nobody else; a ``worker_init_fn``.

    A scheduler, or a launcher such as torchrun, signals all processes of a job, and what the parent makes of it is its
    decision: it may want a few more batches to finish a step. The signals are blocked in this process, and in what it
    starts.

    PyTorch's loader workers look for their parent by themselves, but then wait for ever for somebody to read what they
    have sent.
    """
    if parent := multiprocessing.parent_process():
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # first: threads that begin later have it, too
        for watch in (_end_after, _obey):
            threading.Thread(target=watch, args=(parent,), daemon=True).start()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _obey(parent: BaseProcess) -> None:
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            os._exit(0)


def _apply(task: Any) -> Any:
    if isinstance(task, UserError):
        raise task
    return _function(task)
