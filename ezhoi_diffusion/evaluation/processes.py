"""Independent work, in this process or in several."""

from __future__ import annotations

import traceback
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
    waiting: deque[Future[Any]] = deque()
    try:
        for task in remaining:
            waiting.append(_executor(jobs).submit(_outcome, work, *task))
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


def _outcome(work: Callable[..., T], *task: Any) -> tuple[T | None, Exception | None, str]:
    """The result, or what was raised and its traceback: what a future raises is then the way between the processes."""
    try:
        return work(*task), None, ""
    except Exception as error:  # raised again where the result is wanted
        return None, error, traceback.format_exc()


def _result(future: Future[Any], jobs: int) -> Any:
    from loky.process_executor import TerminatedWorkerError

    try:
        found, error, where = future.result()
    except TerminatedWorkerError as problem:
        raise EzhoiDiffusionError(
            f"one of {jobs} processes was killed ({str(problem).splitlines()[0]}): if memory was short, give fewer --jobs"
        ) from problem
    except Exception as problem:  # pickling may raise anything
        why = str(problem.__cause__ or problem).strip('" \n').splitlines()[-1]  # the last line of a traceback
        raise EzhoiDiffusionError(
            f"a bridge cannot be sent to another process, or back ({why}): give --jobs 1"
        ) from problem
    if error is not None:
        raise error from RuntimeError(f"in another process:\n{where}")
    return found


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
