"""The training loop of one process: its state, a step, and what it writes."""

from __future__ import annotations

import math
import platform
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.files import write_json
from ezhoi_diffusion.training.batches import batch_indices, timesteps_and_noise
from ezhoi_diffusion.training.checkpoint import (
    flat,
    nested,
    read_newest,
    require_same_run,
    require_tensors,
    write_checkpoint,
)
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData, TrainingSet
from ezhoi_diffusion.training.facts import FACTS
from ezhoi_diffusion.training.loss import denoising_loss, scored_loss
from ezhoi_diffusion.training.processes import broadcast_from_main, require_same_everywhere
from ezhoi_diffusion.training.validation import Validation

CHECKPOINTS = "checkpoints"
BEST = "best"
LOG_EVERY = 50
VOTE_EVERY = 10  # steps between votes of several processes on whether to stop
PROGRESS_SECONDS = 30.0  # between updates of the progress bar in a log
ADAM_BETAS = (0.9, 0.99)  # as in Diffusion Bridge


class TrainingLoop:
    """The state of one training in one process."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        data: TrainingData,
        config: TrainConfig,
        out: Path,
        network: nn.Module,
        registry: Components,
    ) -> None:
        self.accelerator, self.data, self.config, self.out = accelerator, data, config, out
        self.device = accelerator.device
        self.features = TrainingSet.from_data(data, config)
        require_same_everywhere({**config.to_dict(), "features": self.features.fingerprint})
        self.validation = Validation.from_features(self.features, config)
        self.resident = self.features.resident(self.device)
        self.network = network.to(self.device)
        self.ema = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        # Built now, around the averaged network: what it refuses is refused before the first step.
        self.bridge = DiffusionBridge(
            config.bridge_config(self.features.dim),
            self.ema.module,
            data.statistics,
            registry=registry,
            context=data.context,
        )
        self.parameters = list(self.network.parameters())
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=config.weight_decay,
            fused=True,  # all parameters in one pass; without it AdamW takes a quarter of a step on a CPU
        )
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.scheduler = LambdaLR(self.optimizer, config.learning_rate_share)

        self.step = 0
        self.saved_step: int | None = None  # of the newest checkpoint
        self.best: dict[str, Any] | None = None  # the record of the lowest validation so far
        self.best_weights: dict[str, Tensor] = {}
        self.baseline_losses = self.validation.baseline_losses()
        self.baseline_loss = fmean(self.baseline_losses)
        self.history: list[dict[str, Any]] = []
        self.pending: list[Tensor] = []  # losses of the steps since the last record
        self.stop_reason: str | None = None
        self.seconds_before = 0.0
        self.started = time.monotonic()

    def train_step(self) -> None:
        """Take one optimizer step, then log, validate and save where that is due."""
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
        self.scheduler.step()
        self.step += 1
        if self.step % config.ema_update_every == 0:
            self.ema.update_parameters(self.network)
        self.pending.append(total)
        self.progress_bar.update()

        last = self.step == config.train_steps
        validate = last or self.step % config.val_every == 0
        checkpoint = last or self.step % config.checkpoint_every == 0
        if validate or checkpoint or self.step % LOG_EVERY == 0:
            record = self._log()
            if validate:
                self._validate(record)
                self.stop_reason = self._reason_to_stop()
            accelerator.log(self._scalars(record), step=self.step)
            if checkpoint or self.stop_reason:
                self._checkpoint()

    def should_stop(self, asked: bool) -> bool:
        """Whether to stop after this step, because this process or another was `asked` to.

        Several processes may be asked at different steps. They vote, and stop at the same step.
        """
        if self.stop_reason:
            return False
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % VOTE_EVERY:
            return False
        votes = self.accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum")
        return bool(votes > 0)

    def save_and_stop(self) -> None:
        """Write a checkpoint of this very step, and wait for all processes."""
        self._checkpoint()
        self.accelerator.wait_for_everyone()

    def _reason_to_stop(self) -> str | None:
        """Say why no step is left to do; None while one is.

        Patience counts regular validations only. A run that ended early and goes on has an extra one, and stops where a run that
        never ended does.
        """
        if self.config.patience:
            regular = [r for r in self.history if "val_loss" in r and r["step"] % self.config.val_every == 0]
            best = min(regular, key=lambda record: record["val_loss"], default=None)
            if best is not None and len(regular) - 1 - regular.index(best) >= self.config.patience:
                return (
                    f"patience {self.config.patience}: no validation after step {best['step']} went below its "
                    f"{best['val_loss']:.5f}"
                )
        return f"all {self.step} steps are done" if self.step >= self.config.train_steps else None

    def _loss(self, batch: int) -> Tensor:
        """Return this process's share of the loss of one global batch."""
        config, accelerator = self.config, self.accelerator
        indices = batch_indices(len(self.features.training), config.batch_size, config.seed, batch)
        t, noise = timesteps_and_noise(
            (config.batch_size, self.features.dim), self.features.num_timesteps, config.seed, batch
        )
        share = config.batch_size // accelerator.num_processes
        own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        chosen = self.features.training[indices[own]]
        noise = self._to_device(self.features.noise(chosen, noise[own]))
        if self.features.labelled is not None:
            pairs = self.features.labelled[chosen].to(self.device)
            with accelerator.autocast():
                return scored_loss(self.model, pairs, t[own], noise, self.validation.schedule, self.features)
        z = self.features[chosen] if self.resident is None else self.resident[self._to_device(chosen)]
        with accelerator.autocast():
            return denoising_loss(
                self.model,
                z.to(self.device),
                t[own],
                noise,
                self.validation.schedule,
                config.objective,
                config.recipe.scale_factor,
                paired=self.features.paired,
            )

    def _to_device(self, x: Tensor) -> Tensor:
        """Copy from pinned memory to a GPU, so that the step does not wait for the copy."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _log(self) -> dict[str, Any]:
        """Fetch the losses since the last record. At every step the device would have to wait."""
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean").cpu()
        broken = (~torch.isfinite(losses)).nonzero()
        if len(broken):
            step = self.step - len(losses) + int(broken[0]) + 1
            raise self._diverged("the loss", losses[broken[0]].item(), step)
        self.pending.clear()
        record = {"step": self.step, "loss": float(losses.mean()), "lr": self.config.learning_rate_at(self.step - 1)}
        self.history.append(record)
        self.progress_bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        return record

    def _diverged(self, what: str, value: float, step: int) -> TrainingError:
        return TrainingError(
            f"{what} is {value} at step {step}: lower the learning rate (now {self.config.learning_rate:g}) and train into "
            f"another folder; {self.out} keeps its last checkpoint"
        )

    def _is_logged(self) -> bool:
        return bool(self.history) and self.history[-1]["step"] == self.step

    def _validate(self, record: dict[str, Any]) -> None:
        """Add the validation loss to `record`; it comes from the main process, as processors may round differently."""
        losses = broadcast_from_main(self.accelerator, lambda: self.validation.losses(self.ema.module, self.device))
        record["val_loss"], record["val_loss_by_range"] = fmean(losses), losses
        if not math.isfinite(record["val_loss"]):
            raise self._diverged("the validation loss", record["val_loss"], self.step)
        if self.accelerator.is_main_process:
            self.progress_bar.write(
                f"step {self.step}: loss {record['loss']:.5f}, validation {record['val_loss']:.5f} "
                f"(isotropic estimate: {self.baseline_loss:.5f})"
            )
        # The validation at an early end is no candidate here, only in `finish`. A run that never ended does not have it, and one
        # that goes on from there has to give the same bridge.
        regular = record["step"] % self.config.val_every == 0
        if regular and (self.best is None or record["val_loss"] < self.best["val_loss"]):
            self.best = record
            self.best_weights = {name: x.cpu().clone() for name, x in self.ema.module.state_dict().items()}
            self._save(self.out / BEST, record)

    def _scalars(self, record: dict[str, Any]) -> dict[str, float]:
        """Flatten a record of the history for trackers."""
        scalars = {name: value for name, value in record.items() if name not in ("step", "val_loss_by_range")}
        for (low, high), loss in zip(self.validation.ranges, record.get("val_loss_by_range", ()), strict=False):
            scalars[f"val_loss/timesteps {low}-{high}"] = loss
        return scalars

    def _save(self, folder: Path, record: dict[str, Any], **more: Any) -> None:
        """Save the averaged weights, which are those of the step of `record`, as a bridge."""
        facts = {
            "config": self.config.to_dict(),
            "step": record["step"],
            "val_loss": record["val_loss"],
            **self._loss_facts(record),
            "rows": len(self.features.training),
            "data_sha256": self.features.fingerprint,
            **more,
        }
        self.bridge.provenance = {**self.data.provenance, "training": facts}
        broadcast_from_main(self.accelerator, lambda: self.bridge.save_pretrained(folder))

    def _loss_facts(self, record: dict[str, Any]) -> dict[str, Any]:
        """Losses of a record, as the artefact and training.json have them."""
        return {
            "isotropic_val_loss": self.baseline_loss,
            "ranges": self.validation.ranges,
            "val_loss_by_range": record["val_loss_by_range"],
            "isotropic_val_loss_by_range": self.baseline_losses,
        }

    def _checkpoint(self) -> None:
        if self.saved_step == self.step:
            return
        pending = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        tensors = {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "best": self.best_weights,
            "optimizer": flat(self.optimizer.state_dict()["state"]),
        }
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "pending": pending,
            "seconds": self._elapsed(),
            "config": self.config.to_dict(),
            "data_sha256": self.features.fingerprint,
            "scaler": scaler.state_dict() if scaler else None,
        }
        broadcast_from_main(
            self.accelerator, lambda: write_checkpoint(self.out / CHECKPOINTS, self.step, tensors, state)
        )
        self.saved_step = self.step

    def restore(self) -> bool:
        """Load the newest complete checkpoint.

        Returns:
            False where there is none.

        Raises:
            TrainingError: It belongs to another run or another network.
        """
        found = broadcast_from_main(self.accelerator, lambda: read_newest(self.out / CHECKPOINTS))
        if found is None:
            return False
        tensors, state = found
        try:
            require_same_run(state, self.config, self.features.fingerprint)
            require_tensors(tensors, self.network, self.ema, self.optimizer)
            self.network.load_state_dict(tensors["model"])
            self.ema.load_state_dict(tensors["ema"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": nested(tensors["optimizer"]), "param_groups": groups})
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(state["scaler"] or {})
            self.step, self.best, self.history = state["step"], state["best"], state["history"]
            self.best_weights = tensors["best"]
            self.saved_step = self.step
            self.pending = [torch.tensor(loss, device=self.device) for loss in state["pending"]]
            if not self.pending and not self._is_logged():
                raise ValueError(f"it has no loss of step {self.step}")
            self.seconds_before = state["seconds"]
            self.scheduler = LambdaLR(self.optimizer, self.config.learning_rate_share, last_epoch=self.step - 1)
            self.stop_reason = self._reason_to_stop()
            before = state["config"]["train_steps"]
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the newest checkpoint in {self.out / CHECKPOINTS} does not fit this network ({error}): remove it"
            ) from error
        if before != self.config.train_steps and self.accelerator.is_main_process:
            print(f"note: train_steps was {before}, is now {self.config.train_steps}", file=sys.stderr, flush=True)
        return True

    def finish(self) -> None:
        """Write training.json, and last the bridge of the lowest validation loss.

        From the lowest validation loss on, a network mostly memorises.
        """
        # A run may be stopped before a step is logged or validated, and then resumed with no step left to do.
        if not self._is_logged():
            self._log()
        if "val_loss" not in self.history[-1]:
            self._validate(self.history[-1])
        best = self.history[-1]
        if self.best is not None and self.best["val_loss"] <= best["val_loss"]:
            best = self.best
            self.ema.module.load_state_dict(self.best_weights)
        facts = {
            "config": self.config.to_dict(),
            "step": self.step,
            "stopped": self.stop_reason,
            "history": self.history,
            "best_step": best["step"],
            "best_val_loss": best["val_loss"],
            **self._loss_facts(best),
            "seconds": self._elapsed(),
            "device": str(self.device),
            "processes": self.accelerator.num_processes,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        broadcast_from_main(self.accelerator, lambda: write_json(self.out / FACTS, facts))
        self._save(self.out, best, stopped=self.stop_reason)
        broadcast_from_main(self.accelerator, lambda: shutil.rmtree(self.out / BEST, ignore_errors=True))
        if self.accelerator.is_main_process:
            self.progress_bar.write(f"stopped at step {self.step}: {self.stop_reason}")

    def progress(self) -> tqdm[Any]:
        """Return the progress bar, a context manager. It is silent outside the main process, and rare in a log."""
        self.progress_bar = tqdm(
            total=self.config.train_steps,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            unit="step",
            desc="training",
            mininterval=0.1 if sys.stderr.isatty() else PROGRESS_SECONDS,
        )
        return self.progress_bar

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.started
