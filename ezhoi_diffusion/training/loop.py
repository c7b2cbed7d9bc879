"""One training in one process: its state, a step, and what is written."""

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
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.files import write_json
from ezhoi_diffusion.training.checkpoint import flat, nested, read_newest, require_same_run, write_checkpoint
from ezhoi_diffusion.training.config import TrainConfig, TrainingError
from ezhoi_diffusion.training.data import TrainingData, training_rows
from ezhoi_diffusion.training.loss import Validation, denoising_loss
from ezhoi_diffusion.training.order import batch_indices, levels_and_noise
from ezhoi_diffusion.training.processes import broadcast_from_main, require_same_everywhere

CHECKPOINTS = "checkpoints"
BEST = "best"
FACTS = "training.json"
LOG_EVERY = 50
AGREE_EVERY = 10  # steps after which several processes ask each other whether to stop
TELL_EVERY = 30.0  # seconds
ADAM_BETAS = (0.9, 0.99)  # the reference implementation's


class Run:
    """The state of one training, in one process."""

    def __init__(
        self,
        accelerator: accelerate.Accelerator,
        data: TrainingData,
        config: TrainConfig,
        out: Path,
        registry: Components | None,
    ) -> None:
        self.accelerator, self.data, self.config, self.out = accelerator, data, config, out
        self.device = accelerator.device
        self.rows = training_rows(data, config)
        require_same_everywhere({**config.to_dict(), "features": self.rows.fingerprint})
        self.bridge_config = config.bridge_config(self.rows.source.shape[1])
        self.schedule = self.bridge_config.schedule()
        self.validation = Validation.of(self.rows, self.schedule, config)
        self.resident = self.rows.resident(self.device)
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
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            weight_decay=config.weight_decay,
            fused=True,  # all parameters in one pass: a quarter of a step on a CPU otherwise
        )
        self.model, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.scheduler = LambdaLR(self.optimizer, config.learning_rate_share)

        self.step = 0
        self.saved: int | None = None  # the step of the newest checkpoint
        self.best: dict[str, Any] | None = None  # the record of the lowest validation so far
        self.best_weights: dict[str, Tensor] = {}
        self.bars = self.validation.bar()
        self.bar = fmean(self.bars)
        self.history: list[dict[str, Any]] = []
        self.pending: list[Tensor] = []
        self.stopped: str | None = None
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
        self.scheduler.step()
        self.step += 1
        if self.step % config.ema_update_every == 0:
            self.ema.update_parameters(self.network)
        self.pending.append(total)
        self._tell()

        last = self.step == config.train_steps
        validate = last or self.step % config.val_every == 0
        checkpoint = last or self.step % config.checkpoint_every == 0
        if validate or checkpoint or self.step % LOG_EVERY == 0:
            record = self._log()
            if validate:
                self._validate(record)
                self.stopped = self._why_stop()
            accelerator.log(self._scalars(record), step=self.step)
            if checkpoint or self.stopped:
                self._checkpoint()

    def stops(self, asked: bool) -> bool:
        """Whether to stop after this step: several processes, which may be asked at different ones, stop at the same."""
        if self.stopped:
            return False
        if self.accelerator.num_processes == 1:
            return asked
        if self.step % AGREE_EVERY:
            return False
        votes = self.accelerator.reduce(torch.tensor(float(asked), device=self.device), "sum")
        return bool(votes > 0)

    def stop(self) -> None:
        """See that there is a checkpoint of this very step, in all processes."""
        self._checkpoint()
        self.accelerator.wait_for_everyone()

    def _why_stop(self) -> str | None:
        """Why there is no step left to do, in words; None while there is.

        Patience looks only at validations that every run with this val_every has, so that a run which ended and then
        goes on for longer stops where one that never ended would.
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
        """This process's share of the loss of one global batch."""
        config, accelerator = self.config, self.accelerator
        numbers = batch_indices(len(self.rows.training), config.batch_size, config.seed, batch)
        shape = (config.batch_size, self.bridge_config.dim)
        t, noise = levels_and_noise(shape, config.timesteps, config.seed, batch)
        share = config.batch_size // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        chosen = self.rows.training[numbers[mine]]
        z = self.rows[chosen] if self.resident is None else self.resident[self._moved(chosen)]
        with accelerator.autocast():
            return denoising_loss(
                self.model,
                z.to(self.device),
                t[mine],
                self._moved(self.rows.noise(chosen, noise[mine])),
                self.schedule,
                config.objective,
                config.recipe.scale_factor,
                paired=self.rows.paired,
            )

    def _moved(self, x: Tensor) -> Tensor:
        """On the device; the step does not wait for the copy, which it would without pinned memory."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

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
        record = {"step": self.step, "loss": float(losses.mean()), "lr": self.config.learning_rate_at(self.step - 1)}
        self.history.append(record)
        self.bar_display.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        return record

    def _logged(self) -> bool:
        """Whether the history has this step."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def _validate(self, record: dict[str, Any]) -> None:
        """The main process's figures count for all: another kind of processor may round otherwise."""
        ranges = broadcast_from_main(self.accelerator, lambda: self.validation.losses(self.ema.module, self.device))
        record["val_loss"], record["val_loss_by_range"] = fmean(ranges), ranges
        if not math.isfinite(record["val_loss"]):
            raise TrainingError(
                f"the validation loss is {record['val_loss']} at step {self.step}: lower the learning rate (now "
                f"{self.config.learning_rate:g}) and train into another folder; {self.out} keeps its last checkpoint"
            )
        if self.accelerator.is_main_process:
            self.bar_display.write(
                f"step {self.step}: loss {record['loss']:.5f}, validation {record['val_loss']:.5f} "
                f"(isotropic estimate, the bar: {self.bar:.5f})"
            )
        # A run that never ended has no validation at an early end. So that one which goes on from there gives the same bridge,
        # it is no candidate here; `finish` looks at it for that end.
        regular = record["step"] % self.config.val_every == 0
        if regular and (self.best is None or record["val_loss"] < self.best["val_loss"]):
            self.best = record
            self.best_weights = {name: x.cpu().clone() for name, x in self.ema.module.state_dict().items()}
            self._save(self.out / BEST, record)

    def _scalars(self, record: dict[str, Any]) -> dict[str, float]:
        """A record of the history as trackers take it."""
        scalars = {name: value for name, value in record.items() if name not in ("step", "val_loss_by_range")}
        for (low, high), loss in zip(self.validation.ranges, record.get("val_loss_by_range", ()), strict=False):
            scalars[f"val_loss/levels {low}-{high}"] = loss
        return scalars

    # Files

    def _save(self, folder: Path, record: dict[str, Any], **more: Any) -> None:
        """The averaged weights, those of the step of `record`, as a bridge."""
        facts = {
            "config": self.config.to_dict(),
            "step": record["step"],
            "val_loss": record["val_loss"],
            "isotropic_val_loss": self.bar,
            **self._ranges(record),
            "rows": len(self.rows.training),
            "data_sha256": self.rows.fingerprint,
            **more,
        }
        self.bridge.provenance = {**self.data.provenance, "training": facts}
        broadcast_from_main(self.accelerator, lambda: self.bridge.save_pretrained(folder))

    def _ranges(self, record: dict[str, Any]) -> dict[str, Any]:
        """What is said of the ranges of levels, in the artefact as in training.json."""
        return {
            "ranges": self.validation.ranges,
            "val_loss_by_range": record["val_loss_by_range"],
            "isotropic_val_loss_by_range": self.bars,
        }

    def _checkpoint(self) -> None:
        if self.saved == self.step:
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
            "data_sha256": self.rows.fingerprint,
            "scaler": scaler.state_dict() if scaler else None,
        }
        broadcast_from_main(
            self.accelerator, lambda: write_checkpoint(self.out / CHECKPOINTS, self.step, tensors, state)
        )
        self.saved = self.step

    def restore(self) -> bool:
        """Take up the newest whole checkpoint; False where there is none. Raises TrainingError if it differs."""
        found = broadcast_from_main(self.accelerator, lambda: read_newest(self.out / CHECKPOINTS))
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
            self.step, self.best, self.history = state["step"], state["best"], state["history"]
            self.best_weights = tensors["best"]
            self.saved = self.step
            self.pending = [torch.tensor(loss, device=self.device) for loss in state["pending"]]
            if not self.pending and not self._logged():
                raise ValueError(f"it has no loss of step {self.step}")
            self.seconds = state["seconds"]
            self.scheduler = LambdaLR(self.optimizer, self.config.learning_rate_share, last_epoch=self.step - 1)
            self.stopped = self._why_stop()
            before = state["config"].get("train_steps", TrainConfig.train_steps)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise TrainingError(
                f"the newest checkpoint in {self.out / CHECKPOINTS} is not one of this network ({error}): remove it"
            ) from error
        if before != self.config.train_steps and self.accelerator.is_main_process:
            print(f"note: train_steps was {before}, is now {self.config.train_steps}", file=sys.stderr, flush=True)
        return True

    def finish(self) -> None:
        """Write the results. The artefact comes last: once it is there, everything is.

        It is that of the lowest validation loss, because from there on a network mostly learns its rows by heart.
        """
        # a resumed run that had no step left to do may have been stopped before this step was logged, or validated
        if not self._logged():
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
            "stopped": self.stopped,
            "history": self.history,
            "best_step": best["step"],
            "best_val_loss": best["val_loss"],
            "isotropic_val_loss": self.bar,
            **self._ranges(best),
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
        self._save(self.out, best, stopped=self.stopped)
        broadcast_from_main(self.accelerator, lambda: shutil.rmtree(self.out / BEST, ignore_errors=True))
        if self.accelerator.is_main_process:
            self.bar_display.write(f"stopped at step {self.step}: {self.stopped}")

    def progress(self) -> Any:
        """The progress bar, a context manager; silent in all processes but the first and without a terminal."""
        disable = None if self.accelerator.is_main_process else True
        self.bar_display = tqdm(
            total=self.config.train_steps, initial=self.step, disable=disable, unit="step", desc="training"
        )
        self.first_step, self.began, self.told = self.step, time.monotonic(), time.monotonic()
        return self.bar_display

    def _tell(self) -> None:
        """Advance the bar; in a batch job's log, which shows none, write a line now and then."""
        self.bar_display.update()
        now = time.monotonic()
        if self.bar_display.disable and self.accelerator.is_main_process and now - self.told >= TELL_EVERY:
            self.told = now
            line = tqdm.format_meter(
                self.step,
                self.config.train_steps,
                now - self.began,
                ncols=0,
                prefix="training",
                unit="step",
                postfix=f"loss={self.pending[-1].item():.4f}",
                initial=self.first_step,
            )
            print(line, file=sys.stderr, flush=True)

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.since
