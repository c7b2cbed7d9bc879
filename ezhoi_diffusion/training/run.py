"""One training in one process: its state, a step, and what is written."""

from __future__ import annotations

import os
import platform
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ezhoi_diffusion.diffusion.bridge import BridgeConfig, Components, DiffusionBridge, build_denoiser
from ezhoi_diffusion.files import write_json
from ezhoi_diffusion.training.checkpoint import flat, nested, read_newest, require_same_run, write_checkpoint
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData, training_rows
from ezhoi_diffusion.training.loss import Validation, denoising_loss
from ezhoi_diffusion.training.order import batch_indices, levels_and_noise

CHECKPOINTS = "checkpoints"
BEST = "best"
FACTS = "training.json"
LOG_EVERY = 50
AGREE_EVERY = 10  # steps after which several processes ask each other whether to stop
ADAM_BETAS = (0.9, 0.99)  # the reference implementation's


class Run:
    """The state of one training, in one process."""

    def __init__(self, data: TrainingData, config: TrainConfig, out: Path, registry: Components | None) -> None:
        self.data, self.config, self.out = data, config, out
        self.accelerator = accelerator_for(config)
        self.device = self.accelerator.device
        self.rows = training_rows(data, config)
        self.bridge_config = BridgeConfig(
            dim=self.rows.source.shape[1],
            recipe=config.recipe,
            denoiser=config.denoiser,
            denoiser_options=config.denoiser_options,
            objective=config.objective,
            timesteps=config.timesteps,
        )
        self.schedule = self.bridge_config.schedule()
        self.validation = Validation.of(self.rows, self.schedule, config)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.network = build_denoiser(self.bridge_config, registry).to(self.device)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        # Made now, around the averaged network, so that whatever it refuses is refused before the first step.
        self.bridge = DiffusionBridge(
            self.bridge_config,
            self.ema.module,
            data.statistics,
            sampler=(registry or Components()).samplers[config.recipe.sampler],
            context=data.context,
        )
        self.parameters = list(self.network.parameters())
        optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate, betas=ADAM_BETAS)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)

        self.step = 0
        self.best = float("inf")
        self.bar = self.validation.bar()
        self.history: list[dict[str, float]] = []
        self.pending: list[Tensor] = []
        self.seconds = 0.0
        self.since = time.monotonic()

    # One step and what hangs on it

    def advance(self) -> None:
        """One optimizer step, and whatever is due after it."""
        config, accelerator = self.config, self.accelerator
        total = torch.zeros((), device=self.device)
        for micro in range(config.gradient_accumulate):
            last = micro == config.gradient_accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._loss(self.step * config.gradient_accumulate + micro) / config.gradient_accumulate
                accelerator.backward(loss)
            total += loss.detach()
        accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.network)
        self.pending.append(total)
        self.step += 1
        self.bar_display.update()

        done = self.step == config.train_steps
        validate = done or self.step % config.val_every == 0
        checkpoint = done or self.step % config.checkpoint_every == 0
        if validate or checkpoint or self.step % LOG_EVERY == 0:
            record = self._log()
            if validate:
                self._validate(record)
            if checkpoint:
                self._checkpoint()

    def stops(self, asked: bool) -> bool:
        """Whether to stop after this step: several processes, which may be asked at different ones, stop at the same."""
        if self.step == self.config.train_steps:
            return False
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % AGREE_EVERY:
            return False
        votes = self.accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum")
        return bool(votes > 0)

    def stop(self) -> None:
        """Write a checkpoint of this very step, in all processes."""
        self._checkpoint()
        self.accelerator.wait_for_everyone()

    def _loss(self, batch: int) -> Tensor:
        """This process's share of the loss of one global batch."""
        config, accelerator = self.config, self.accelerator
        numbers = batch_indices(len(self.rows.training), config.batch_size, config.seed, batch)
        shape = (config.batch_size, self.bridge_config.dim)
        t, noise = levels_and_noise(shape, config.timesteps, config.seed, batch)
        share = config.batch_size // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        z = self.rows[self.rows.training[numbers[mine]]]
        with accelerator.autocast():
            return denoising_loss(
                self.model,
                z.to(self.device),
                t[mine],
                noise[mine].to(self.device),
                self.schedule,
                config.objective,
                config.recipe.scale,
            )

    def _log(self) -> dict[str, float]:
        """Fetch the losses since the last time. Not at every step: that would make the device wait."""
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean").cpu()
        broken = (~torch.isfinite(losses)).nonzero()
        if len(broken):
            step = self.step - len(losses) + int(broken[0]) + 1
            raise TrainingError(
                f"the loss is {losses[broken[0]].item()} at step {step}: lower the learning rate (now "
                f"{self.config.learning_rate:g}) and train into another folder; {self.out} keeps its last checkpoint"
            )
        self.pending.clear()
        record = {"step": self.step, "loss": float(losses.mean())}
        self.history.append(record)
        self.bar_display.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        return record

    def _validate(self, record: dict[str, float]) -> None:
        """All processes hold the same average and get the same number: nothing to communicate."""
        record["val_loss"] = self.validation.loss(self.ema.module, self.device)
        if self.accelerator.is_main_process:
            self.bar_display.write(
                f"step {self.step}: loss {record['loss']:.5f}, validation {record['val_loss']:.5f} "
                f"(isotropic estimate, the bar: {self.bar:.5f})"
            )
        if record["val_loss"] < self.best:
            self.best = record["val_loss"]
            self._save(self.out / BEST, self.best)

    # Files

    def _save(self, folder: Path, val_loss: float) -> None:
        if self.accelerator.is_main_process:
            facts = {
                "config": self.config.to_dict(),
                "step": self.step,
                "val_loss": val_loss,
                "isotropic_val_loss": self.bar,
                "rows": len(self.rows.training),
                "data_sha256": self.rows.fingerprint,
            }
            provenance = {**self.data.provenance, "training": facts}
            self.bridge.config = replace(self.bridge_config, provenance=provenance)
            self.bridge.save_pretrained(folder)

    def _checkpoint(self) -> None:
        pending = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": flat(self.optimizer.state_dict()["state"]),
            }
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "best_val_loss": self.best,
                "history": self.history,
                "pending": pending,
                "seconds": self._elapsed(),
                "config": self.config.to_dict(),
                "data_sha256": self.rows.fingerprint,
                "scaler": scaler.state_dict() if scaler else None,
            }
            write_checkpoint(self.out / CHECKPOINTS, self.step, tensors, state)

    def restore(self) -> bool:
        """Take up the newest whole checkpoint; False where there is none. Raises TrainingError if it differs."""
        found = read_newest(self.out / CHECKPOINTS)
        if found is None:
            return False
        tensors, state = found
        try:
            require_same_run(state, self.config, self.rows.fingerprint)
            self.network.load_state_dict(tensors["model"])
            self.ema.load_state_dict(tensors["ema"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": nested(tensors["optimizer"]), "param_groups": groups})
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, self.best, self.history = state["step"], state["best_val_loss"], state["history"]
            self.pending = [torch.tensor(loss, device=self.device) for loss in state["pending"]]
            self.seconds = state["seconds"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"the newest checkpoint in {self.out / CHECKPOINTS} is not one of this network ({error}): remove it"
            ) from error
        return True

    def finish(self) -> None:
        """Write the results. The artefact comes last: once it is there, everything is."""
        if "val_loss" not in self.history[-1]:  # a resumed run that had no step left to do
            self._validate(self.history[-1])
        if self.accelerator.is_main_process:
            facts = {
                "config": self.config.to_dict(),
                "history": self.history,
                "best_val_loss": self.best,
                "isotropic_val_loss": self.bar,
                "seconds": self._elapsed(),
                "device": str(self.device),
                "processes": self.accelerator.num_processes,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "accelerate": accelerate.__version__,
                },
            }
            write_json(self.out / FACTS, facts)
            self._save(self.out, self.history[-1]["val_loss"])
        self.accelerator.wait_for_everyone()

    def progress(self) -> Any:
        """The progress bar, a context manager; silent in all processes but the first and without a terminal."""
        disable = None if self.accelerator.is_main_process else True
        self.bar_display = tqdm(
            total=self.config.train_steps, initial=self.step, disable=disable, unit="step", desc="training"
        )
        return self.bar_display

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.since


def accelerator_for(config: TrainConfig) -> accelerate.Accelerator:
    """Devices, processes and precision. Raises TrainingError where they do not fit the configuration."""
    AcceleratorState._reset_state()  # a process-wide singleton, which would keep an earlier call's precision
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    # unless told that it is to use the CPU, accelerate overlooks the other processes of torchrun where there is no GPU
    on_cpu = expected > 1 and not torch.cuda.is_available()
    accelerator = accelerate.Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu)
    if accelerator.num_processes != expected:
        raise TrainingError(
            f"this is one of {expected} processes, and accelerate found {accelerator.num_processes}: start them with "
            f"torchrun or `accelerate launch`, on devices of one kind"
        )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("mixed_precision fp16 needs a GPU: use bf16 or no")
    if config.batch_size % accelerator.num_processes:
        raise TrainingError(
            f"batch_size {config.batch_size} is not a multiple of the {accelerator.num_processes} processes"
        )
    return accelerator
