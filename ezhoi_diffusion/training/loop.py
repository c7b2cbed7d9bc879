"""The training loop of one process: its state, a step, and what it writes."""

from __future__ import annotations

import copy
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from ezhoi_diffusion.diffusion.bridge import DiffusionBridge
from ezhoi_diffusion.diffusion.components import Components
from ezhoi_diffusion.diffusion.schedule import Schedule
from ezhoi_diffusion.files import write_json
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
from ezhoi_diffusion.training.loss import batch_loss
from ezhoi_diffusion.training.processes import broadcast_from_main, require_same_everywhere
from ezhoi_diffusion.training.validation import Validation

CHECKPOINTS = "checkpoints"
BEST = "best"
REFIT = "refit"  # below CHECKPOINTS: the search has to stay resumable, as a longer one may find a later step
LOG_EVERY = 50
VOTE_EVERY = 10  # steps between votes of several processes on whether to stop
PROGRESS_SECONDS = 30.0  # between updates of the progress bar in a log
ADAM_BETAS = (0.9, 0.99)  # as in Diffusion Bridge


def _lowest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The first record of the lowest validation loss."""
    return min(records, key=lambda record: record["val_loss"])


class TrainingLoop:
    """The state of one training in one process, in two phases.

    The search learns without the held-out features, and finds the step with the lowest validation loss. The refit starts over
    from the same weights and takes as many steps on all features. A text that was held out is a class of its own: a network
    that never saw it leads features of that class elsewhere.
    """

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
        self.schedule = Schedule.cosine(config.num_timesteps)
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

        self.search: dict[str, Any] = {}  # what training.json says of the search, once it has ended
        self.best: dict[str, Any] = {}  # the record of its lowest validation loss
        self.step, self.last_step = 0, config.train_steps
        self.saved_step: int | None = None  # of the newest checkpoint
        self.baseline_losses = self.validation.baseline_losses()
        self.baseline_loss = fmean(self.baseline_losses)
        self.history: list[dict[str, Any]] = []
        self.pending: list[Tensor] = []  # losses of the steps since the last record
        self.stop_reason: str | None = None
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.beginning = copy.deepcopy(self._snapshot([]))

    def train_step(self) -> None:
        """Take one optimizer step, then log, validate and save where that is due."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(self.step)
        total = torch.zeros((), device=self.device)
        for micro in range(config.gradient_accumulate):
            with nullcontext() if micro + 1 == config.gradient_accumulate else accelerator.no_sync(self.model):
                batch = self.step * config.gradient_accumulate + micro
                loss = batch_loss(self.model, accelerator, self.features, self.resident, config, self.schedule, batch)
                accelerator.backward(loss / config.gradient_accumulate)
            total += loss.detach() / config.gradient_accumulate
        accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.step % config.ema_update_every == 0:
            self.ema.update_parameters(self.network)
        self.pending.append(total)
        self.progress_bar.update()

        ends = self.step == self.last_step
        validate = not self.search and (ends or self.step % config.val_every == 0)
        checkpoint = ends or self.step % config.checkpoint_every == 0
        if validate or checkpoint or self.step % LOG_EVERY == 0:
            record = self._log()
            if validate:
                self._validate(record)
            self.stop_reason = self._reason_to_stop()
            self._track(record)
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
        """Say why no step is left to do; None while one is."""
        regular = self._regular()
        if self.config.patience and regular:
            best = _lowest(regular)
            if len(regular) - 1 - regular.index(best) >= self.config.patience:
                return (
                    f"patience {self.config.patience}: no validation after step {best['step']} went below its "
                    f"{best['val_loss']:.5f}"
                )
        return f"all {self.step} steps are done" if self.step >= self.last_step else None

    def _log(self) -> dict[str, Any]:
        """Fetch the losses since the last record. At every step the device would have to wait."""
        losses = self.accelerator.reduce(torch.stack(self.pending), "mean").cpu()
        broken = (~torch.isfinite(losses)).nonzero()
        if len(broken):
            raise self._diverged("the loss", losses[broken[0]].item(), self.step - len(losses) + int(broken[0]) + 1)
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

    def _regular(self) -> list[dict[str, Any]]:
        """The records of regular validations. A search that ended early and goes on has an extra one.

        It counts only where the search has ended: the same search without a break has to give the same bridge.
        """
        return [r for r in self.history if "val_loss" in r and r["step"] % self.config.val_every == 0]

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
        regular = self._regular()
        if regular and record is _lowest(regular):
            self._save(self.out / BEST, record)

    def _track(self, record: dict[str, Any]) -> None:
        """Give a record of the history to the trackers. The steps of the refit count on from the search."""
        scalars = {name: value for name, value in record.items() if name not in ("step", "val_loss_by_range")}
        for (low, high), loss in zip(self.validation.ranges, record.get("val_loss_by_range", ()), strict=False):
            scalars[f"val_loss/timesteps {low}-{high}"] = loss
        prefix = f"{REFIT}/" if self.search else ""
        self.accelerator.log({prefix + name: value for name, value in scalars.items()}, step=self.steps_done)

    def _save(self, folder: Path, record: dict[str, Any], **more: Any) -> None:
        """Save the averaged weights, which are those of the step of `record`, as a bridge."""
        facts = {
            "config": self.config.to_dict(),
            "step": record["step"],
            "val_loss": record["val_loss"],
            **self._loss_facts(record),
            "rows": len(self.features.training),
            "val_rows": len(self.features.validation),
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

    @property
    def phase(self) -> str:
        """`search` or `refit`."""
        return REFIT if self.search else "search"

    @property
    def steps_done(self) -> int:
        """Steps of both phases."""
        return self.step + int(self.search.get("step", 0))

    @property
    def _checkpoints(self) -> Path:
        return self.out / CHECKPOINTS / (REFIT if self.search else "")

    def _checkpoint(self) -> None:
        if self.saved_step == self.step:
            return
        pending = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        tensors, state = self._snapshot(pending)
        broadcast_from_main(self.accelerator, lambda: write_checkpoint(self._checkpoints, self.step, tensors, state))
        self.saved_step = self.step

    def _snapshot(self, pending: list[float]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Return the tensors and the state of a checkpoint, with the `pending` losses of all processes."""
        tensors = {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": flat(self.optimizer.state_dict()["state"]),
        }
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "history": self.history,
            "pending": pending,
            "seconds": self._elapsed(),
            "config": self.config.to_dict(),
            "data_sha256": self.features.fingerprint,
            "scaler": scaler.state_dict() if scaler else None,
        }
        return tensors, state

    def _load(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """Take over what `_snapshot` returned."""
        self.network.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": nested(tensors["optimizer"]), "param_groups": groups})
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"] or {})
        self.step, self.history = state["step"], [*state["history"]]
        self.saved_step = self.step
        self.pending = [torch.tensor(loss, device=self.device) for loss in state["pending"]]
        self.seconds_before, self.started = state["seconds"], time.monotonic()

    def restore(self) -> bool:
        """Load the newest complete checkpoint of this phase.

        Returns:
            False where there is none.

        Raises:
            TrainingError: It belongs to another run or another network.
        """
        found = broadcast_from_main(self.accelerator, lambda: read_newest(self._checkpoints))
        if found is None:
            return False
        tensors, state = found
        try:
            require_same_run(state, self.config, self.features.fingerprint)
            require_tensors(tensors, self.network, self.ema, self.optimizer)
            self._load(tensors, state)
            if not self.pending and not self._is_logged():
                raise ValueError(f"it has no loss of step {self.step}")
            self.stop_reason = self._reason_to_stop()
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"the newest checkpoint in {self._checkpoints} does not fit this network ({error}): remove it"
            ) from error
        before = state["config"]["train_steps"]
        if not self.search and before != self.config.train_steps and self.accelerator.is_main_process:
            print(f"note: train_steps was {before}, is now {self.config.train_steps}", file=sys.stderr, flush=True)
        return True

    def begin_refit(self) -> None:
        """End the search, and go back to step 0 with all features, or to the newest checkpoint of the refit.

        From the lowest validation loss on, a network mostly memorises: the refit ends at that step.
        """
        # A run may be stopped before a step is logged or validated, and then resumed with no step left to do.
        last = self.history[-1] if self._is_logged() else self._log()
        if "val_loss" not in last:
            self._validate(last)
        self.best = _lowest([*self._regular(), last])
        self.search = {
            "config": self.config.to_dict(),
            "step": self.step,
            "stopped": self.stop_reason,
            "history": self.history,
            "best_step": self.best["step"],
            "best_val_loss": self.best["val_loss"],
            **self._loss_facts(self.best),
            "rows": len(self.features.training),
            "seconds": self._elapsed(),
        }
        self.features, self.last_step = self.features.whole(), self.best["step"]
        if self.accelerator.is_main_process:
            self.progress_bar.write(
                f"stopped at step {self.step}: {self.stop_reason}. The validation loss was lowest at step {self.last_step}: "
                f"starting over for as many steps, on all {len(self.features.training)} features"
            )
        self._load(*self.beginning)
        self.restore()
        if self.step > self.last_step:  # it was for a step that counted at an early end only
            broadcast_from_main(self.accelerator, lambda: shutil.rmtree(self._checkpoints))
            self._load(*self.beginning)
        self.stop_reason = self._reason_to_stop()

    def finish(self) -> None:
        """Write training.json, and last the bridge."""
        if not self._is_logged():
            self._log()
        rows = len(self.features.training)
        facts = {
            **self.search,
            REFIT: {"step": self.step, "rows": rows, "history": self.history, "seconds": self._elapsed()},
            "device": str(self.device),
            "processes": self.accelerator.num_processes,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        broadcast_from_main(self.accelerator, lambda: write_json(self.out / FACTS, facts))
        self._save(self.out, self.best, stopped=self.search["stopped"])
        broadcast_from_main(self.accelerator, lambda: shutil.rmtree(self.out / BEST, ignore_errors=True))

    def progress(self) -> tqdm[Any]:
        """Return the progress bar, a context manager. It is silent outside the main process, and rare in a log."""
        self.progress_bar = tqdm(
            total=self.last_step,
            initial=self.step,
            disable=not self.accelerator.is_main_process,
            unit="step",
            desc=f"{self.phase}, phase {2 if self.search else 1} of 2",
            mininterval=0.1 if sys.stderr.isatty() else PROGRESS_SECONDS,
        )
        return self.progress_bar

    def _elapsed(self) -> float:
        return self.seconds_before + time.monotonic() - self.started
