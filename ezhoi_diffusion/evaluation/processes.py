"""Independent work, in this process or in several."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from ezhoi_diffusion.errors import EzhoiDiffusionError

T = TypeVar("T")
WAITING = 2  # tasks for each process that are made ahead: enough to keep it busy, and little memory
IDLE_SECONDS = 60  # after which a process ends


def check_jobs(jobs: int, device: torch.device) -> None:
    """Raise EzhoiDiffusionError for less than one process, and for several on a GPU."""
    if jobs < 1:
        raise EzhoiDiffusionError(f"--jobs must be at least 1, not {jobs}")
    if jobs > 1 and device.type != "cpu":
        raise EzhoiDiffusionError(
            f"--jobs {jobs} is for the CPU, and the device is {device}: give --device cpu or --jobs 1"
        )


def in_processes(work: Callable[..., T], tasks: Iterable[tuple[Any, ...]], jobs: int) -> Iterator[T]:
    """Yield work(*task) of every task, in order.

    The first task is done here: what it times is not disturbed by others, and little work starts no process.

    Args:
        work: A function whose result depends on its arguments alone. It, they and the result can be pickled.
        tasks: Made one by one, a few ahead of their results.
        jobs: Number of processes. With one everything is done here. Several share this machine's threads.

    Raises:
        EzhoiDiffusionError: Something cannot be pickled, or a process was killed. What `work` raises passes as it is.
    """
    remaining = iter(tasks)
    for task in remaining:
        yield work(*task)
        if jobs > 1:
            break
    waiting: deque[Future[T]] = deque()
    try:
        for task in remaining:
            waiting.append(_executor(jobs).submit(work, *task))
            if len(waiting) > WAITING * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except pickle.PicklingError as error:
        why = str(error.__cause__ or error).strip('" \n').splitlines()[-1]  # the last line of a traceback
        raise EzhoiDiffusionError(f"a bridge cannot be sent to another process ({why}): give --jobs 1") from error
    except _killed() as error:
        raise EzhoiDiffusionError(
            f"one of {jobs} processes was killed ({str(error).splitlines()[0]}): if memory was short, give fewer --jobs"
        ) from error
    finally:
        for future in waiting:
            future.cancel()


def _executor(jobs: int) -> Any:
    """The processes, which stay for the next call."""
    import loky

    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return loky.get_reusable_executor(
        max_workers=jobs, timeout=IDLE_SECONDS, env=dict.fromkeys(names, threads), initializer=_stay
    )


def _stay() -> None:
    """Let this process stay when it needs more memory than for its first task: loky takes that for a leak, and starts another."""
    from loky import process_executor

    process_executor._USE_PSUTIL = False


def _killed() -> type[Exception]:
    from concurrent.futures.process import BrokenProcessPool

    return BrokenProcessPool
