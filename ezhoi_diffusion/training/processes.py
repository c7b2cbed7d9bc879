"""Set up accelerate, and check that all processes agree."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
)

from ezhoi_diffusion.training.config import TrainConfig, TrainingError

T = TypeVar("T")
SHARDING = tuple(
    f"ACCELERATE_USE_{kind}" for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")
)
LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")  # torchrun sets them with LOCAL_RANK


def accelerator_for(config: TrainConfig, log_with: Sequence[Any], tracks: Path) -> accelerate.Accelerator:
    """Set up devices, processes, precision, and trackers that write into `tracks`.

    Raises:
        TrainingError: They do not fit the configuration.
    """
    _refuse_environment()
    AcceleratorState._reset_state()  # a singleton, which would keep the precision of an earlier call
    # without a GPU, accelerate overlooks the other processes of torchrun unless cpu is set
    on_cpu = _expected() > 1 and not torch.cuda.is_available()
    try:
        # what is not set here, accelerate reads from the environment
        accelerator = accelerate.Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=on_cpu,
            log_with=list(log_with) or None,
            project_dir=tracks,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dynamo_backend="NO",
        )
    except (ImportError, RuntimeError, ValueError) as error:
        named = ", ".join(f"{name}={os.environ[name]}" for name in sorted(os.environ) if _is_launchers(name))
        raise TrainingError(f"accelerate cannot start with {named or 'what it finds here'}: {error}") from error
    expected = _expected()  # again: under mpirun, accelerate has just set it
    if accelerator.num_processes != expected:
        raise TrainingError(
            f"this is one of {expected} processes, and accelerate found {accelerator.num_processes}: start them with "
            f"torchrun or `accelerate launch`, on devices of one kind"
        )
    if expected == 1 and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys():
        raise TrainingError(
            "`accelerate launch` was asked for several processes and started one, as it does on CPUs: leave out --cpu and "
            "add --multi_gpu, which starts them on CPUs too, or use torchrun. If one is what you want, unset MASTER_ADDR"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("mixed_precision fp16 needs a GPU: use bf16 or no")
    if config.batch_size % accelerator.num_processes:
        raise TrainingError(
            f"batch_size {config.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator


def broadcast_from_main(accelerator: accelerate.Accelerator, decide: Callable[[], T]) -> T:
    """Call `decide` in the main process, and return or raise its outcome in every process. All must call it.

    Only the main process needs the files, and all processes decide alike.
    """
    if accelerator.num_processes == 1:
        return decide()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except Exception as error:  # any error: the others would wait for ever
            outcome[1] = error
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def require_same_everywhere(what: dict[str, Any]) -> None:
    """Raise TrainingError in every process where one of them has another value."""
    for rank, given in enumerate(gather_object([what])):
        for name, value in given.items():
            if value != what[name]:
                raise TrainingError(
                    f"the processes differ in {name}: {what[name]!r} here, {value!r} in process {rank}; give the same flags "
                    f"and the same features on every machine"
                )


def exit_distributed(status: int = 0, last_words: str = "") -> None:
    """End this process where several trained together; otherwise do nothing. All must call it, as the last thing.

    It skips the interpreter's own shutdown, which aborted a process (SIGABRT) in one training of ten to dozens. A training that
    succeeded then counted as failed. Which of torch's threads is at fault is not known.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stderr.write(last_words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _refuse_environment() -> None:
    """Raise TrainingError for environment variables with which the training would be another one, or none."""
    for name in SHARDING:
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise TrainingError(
                f"{name} asks accelerate to share the network out among processes; each process trains all of it here: unset it"
            )
    if os.environ.get("ACCELERATE_TORCH_DEVICE", "").startswith("meta"):
        raise TrainingError("ACCELERATE_TORCH_DEVICE=meta names a device without values: unset it")
    missing = sorted(name for name in LAUNCHED if name not in os.environ)
    if "LOCAL_RANK" in os.environ and missing:
        raise TrainingError(
            f"LOCAL_RANK is set, as by torchrun, and {', '.join(missing)} is not: unset it, or start the processes with torchrun"
        )


def _is_launchers(name: str) -> bool:
    return name.startswith("ACCELERATE_") or name in LAUNCHED


def _expected() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal():
        raise TrainingError(f"WORLD_SIZE is {given!r}, not a number of processes: unset it, or use torchrun")
    return int(given)
