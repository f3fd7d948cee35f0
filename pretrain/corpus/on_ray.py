"""An engine on a Ray cluster: a task that is lost with its node is done again on another, by Ray itself."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa

from pretrain.corpus.processes import Engine, Result, Task, to_first_error
from pretrain.errors import CrashError, UserError, how_to_install, one_line

RETRIES = 5
"""How often a task is begun again whose process or node is lost."""


def on_ray(workers: int | None = None) -> Engine:
    """An engine on the cluster that ``RAY_ADDRESS`` names, or else the one that runs on this machine.

    This process reads the tasks and hands them out; Ray carries them to the nodes.

    Args:
        workers: Tasks at a time; by default as many as the cluster has cores, however they come and go.

    Raises:
        UserError: If Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise UserError(f"--engine ray needs Ray on every node: {how_to_install('ray')}") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "auto")
        host, _, port = address.rpartition(":")
        try:
            if port.isdecimal():  # Ray itself tries for minutes
                socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
            ray.init(address, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, exceptions.RayError) as error:
            said = one_line(error, 200)
            where = "on this machine" if address == "auto" else f"at {address}"
            raise UserError(
                f"no Ray cluster {where} ({said}); start one with `ray start --head`, or name one in RAY_ADDRESS"
            ) from error
    apply = ray.remote(_apply).options(num_cpus=1, max_retries=RETRIES)

    def run(function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        shared = ray.put(function)
        waiting: deque[Any] = deque()
        try:
            for task in to_first_error(tasks):
                if isinstance(task, UserError):
                    while waiting:  # an error in an earlier task comes first
                        yield result(waiting.popleft())
                    raise task
                waiting.append(apply.remote(shared, task))
                if len(waiting) > (workers or int(ray.cluster_resources().get("CPU", 1))) + 1:
                    yield result(waiting.popleft())
            while waiting:
                yield result(waiting.popleft())
        finally:
            for reference in waiting:
                ray.cancel(reference)

    def result(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError):
                raise UserError(
                    f"a node of the Ray cluster lacks something ({error.cause}); install the same on every node"
                ) from error
            raise error.cause from error
        except exceptions.RayError as error:
            said = one_line(error, 300)
            raise CrashError(
                f"Ray gave a task up after {RETRIES} retries ({said}); give the same command again: it continues where "
                "it stopped"
            ) from error

    return run


def _apply(function: Callable[[Any], Any], task: Any) -> Any:
    pa.set_cpu_count(1)
    return function(task)
