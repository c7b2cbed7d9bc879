"""Independent work, in this process or in several."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice
from typing import Any, TypeVar

import torch

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
WAITING = 2  # tasks for each process that are made ahead: enough to keep it busy, and little memory
IDLE_SECONDS = 60  # after which a process ends
UNSENT = "a bridge cannot be sent to another process, or back ({}): give --jobs 1"


def check_jobs(jobs: int, device: torch.device) -> None:
    """Raise EzhoiDiffusionError for less than one process, and for several on a GPU."""
    if jobs < 1:
        raise EzhoiDiffusionError(f"--jobs must be at least 1, not {jobs}")
    if jobs > 1 and device.type != "cpu":
        raise EzhoiDiffusionError(
            f"--jobs {jobs} is for the CPU, and the device is {device}: give --device cpu or --jobs 1"
        )


def in_processes(work: Callable[..., T], tasks: Iterable[tuple[Any, ...]], jobs: int, *, here: int = 1) -> Iterator[T]:
    """Yield work(*task) of every task, in order.

    Args:
        work: A function whose result depends on its arguments alone. It, they and the result can be pickled.
        tasks: Made one by one, a few ahead of their results.
        jobs: Number of processes. With one everything is done in this one. Several share its threads.
        here: So many tasks are done in this process first: what they time is not disturbed, and little work starts no process.

    Raises:
        EzhoiDiffusionError: Something cannot be sent to or from a process, or one was killed. What `work` raises passes as it is.
    """
    remaining = iter(tasks)
    for task in remaining if jobs == 1 else islice(remaining, here):
        yield work(*task)
    waiting: deque[Future[bytes]] = deque()
    try:
        for task in remaining:
            waiting.append(_executor(jobs).submit(_pickled, work, *task))
            if len(waiting) > WAITING * jobs:
                yield _result(waiting.popleft(), jobs)
        while waiting:
            yield _result(waiting.popleft(), jobs)
    except (KeyboardInterrupt, SystemExit):
        _executor(jobs).shutdown(wait=False, kill_workers=True)
        raise
    finally:
        for future in waiting:
            future.cancel()


def _pickled(work: Callable[..., object], *task: Any) -> bytes:
    """The result as bytes. That it cannot be pickled is an error of the task, and not of the process."""
    import cloudpickle

    result = work(*task)
    try:
        return bytes(cloudpickle.dumps(result))
    except Exception as error:  # a bridge may hold anything
        raise EzhoiDiffusionError(UNSENT.format(error)) from error


def _result(future: Future[bytes], jobs: int) -> Any:
    from concurrent.futures.process import BrokenProcessPool

    from loky.process_executor import TerminatedWorkerError

    try:
        return pickle.loads(future.result())  # of a process that this one started
    except TerminatedWorkerError as error:
        raise EzhoiDiffusionError(
            f"one of {jobs} processes was killed ({str(error).splitlines()[0]}): if memory was short, give fewer --jobs"
        ) from error
    except (pickle.PicklingError, BrokenProcessPool) as error:
        why = str(error.__cause__ or error).strip('" \n').splitlines()[-1]  # the last line of a traceback
        raise EzhoiDiffusionError(UNSENT.format(why)) from error


def _executor(jobs: int) -> Any:
    """The processes, which stay for the next call."""
    import loky

    threads = str(max(1, torch.get_num_threads() // jobs))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return loky.get_reusable_executor(
        max_workers=jobs, timeout=IDLE_SECONDS, env=dict.fromkeys(names, threads), initializer=_stay
    )


def _stay() -> None:
    """Let this process stay when it needs more memory than for its first task: loky takes that for a leak, and starts another."""
    from loky import process_executor

    process_executor._USE_PSUTIL = False
