"""Processes that are killed: each fresh, with the imports paid once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver

import pytest

from helpers import TESTS

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    [
        "torch._dynamo",  # the first optimizer of a process imports it, and that takes seconds
        "matplotlib.pyplot",
        "ezhoi_diffusion.training.trainer",
        "ezhoi_diffusion.evaluation.tune",
        "ezhoi_diffusion.report.figures",
    ]
)


def serve() -> Iterator[None]:
    """Start the server of processes where it finds the test files: it does not look along sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS), *sys.path)))
        forkserver.ensure_running()
        yield


def ended(process) -> int:
    """Wait for a process and return its exit code."""
    process.join(300)
    assert process.exitcode is not None, "a run hangs"
    return process.exitcode
