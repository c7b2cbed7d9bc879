"""Joins plugins to a host whose model is built and loaded: injection, a capture pass, or a comparison."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ezhoi_diffusion.bridge import replacement_problem
from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.variants import Variant, parse_settings, parse_sweep, resolve_variants
from ezhoi_diffusion.ezhoi.capture_pass import capture_pass, default_split, share_context
from ezhoi_diffusion.ezhoi.comparison_pass import comparison_pass
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap, HookPoint, find_feature_module, unwrap
from ezhoi_diffusion.ezhoi.flags import check_options
from ezhoi_diffusion.ezhoi.limits import refuse_unsupported
from ezhoi_diffusion.ezhoi.run import EzHoiRun
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.plugins import ON_BY_DEFAULT, PluginManager
from ezhoi_diffusion.report.write import report_folder, write_report
from ezhoi_diffusion.signals import asked_to_stop

EVALUATIONS = ("test_hico", "cache_hico", "cache_vcoco")  # methods of the host's engine, which end what is attached


class Attachment:
    """What is attached to one host; a context manager. `detach` is idempotent and undoes everything."""

    def __init__(self, run: EzHoiRun) -> None:
        self.run = run
        self._tap: FeatureTap | None = None
        self._undo: list[Callable[[], None]] = []
        self._attached = False
        self._group: Any = None
        self._compared = True

    def detach(self, *, failed: bool = False) -> None:
        """Remove every hook and tell the plugins. Raises TapError if something was to be injected and never was."""
        while self._undo:
            self._undo.pop()()
        if not self._attached:
            return
        self._attached = False
        self.run.failed = failed
        self.run.plugins.notify_all("on_detach", run=self.run)
        if not self._compared and not failed:
            raise EzhoiDiffusionError("--compare was given, and the host never evaluated: its test_hico was not called")
        if self._tap is not None and not failed:
            self._tap.require_hits()
        if self.run.plugins.degraded and self.run.rank == 0 and not self.run.args.compare:  # else the table says it
            for message in self.run.plugins.degraded.values():
                print(f"DEGRADED: {message}", flush=True)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach(failed=error is not None)

    # -- the three things an attachment may do -------------------------------------------------------------

    def _start(self) -> None:
        run, plugins, args = self.run, self.run.plugins, self.run.args
        captures, injects = plugins.implementing("on_train_batch"), plugins.implementing("post_adapter_feat")
        compares = bool(args.compare)
        if (captures or compares) and run.engine is None:
            raise EzhoiDiffusionError(
                "a capture pass and a comparison need the host's data sets: run main_tip_finetune.py, not a script for one image"
            )
        if args.out:
            with report_folder(Path(args.out)):
                pass  # refused now, not after the pass
        if run.world_size > 1 and (captures or injects or compares):
            share_context(run.model, run.device)
        self._attached = True
        plugins.notify("on_attach", run=run)
        variants = (
            resolve_variants(
                args.compare,
                plugins,
                folder=args.bridge,
                check=run.check_fingerprint,
                device=run.device,
                settings=parse_settings(args.set, args.inference_steps),
                sweep=parse_sweep(args.sweep),
            )
            if compares
            else {}
        )
        if captures:
            self._capture()
        if compares:
            self._compared = False
            self._replace("test_hico", functools.partial(self._compare, variants))
            return
        if injects:
            if run.engine is not None and not _evaluates(args):
                raise EzhoiDiffusionError(
                    f"plugin '{injects[0]}' replaces adapter_feat at eval time, and this run would train: add --eval"
                )
            self._tap = FeatureTap(run.model, inject=self._inject, point=run.hook_point).attach()
            self._undo.append(self._tap.remove)
        for name in EVALUATIONS if run.engine is not None else ():
            self._replace(name, self._evaluate)

    def _inject(self, feature: Tensor, pairs: Pairs) -> Tensor:
        return self.run.plugins.fold("post_adapter_feat", feature, replacement_problem, pairs=pairs)

    def _capture(self) -> None:
        run, args = self.run, self.run.args
        split = args.capture_split or default_split(args)

        def emit(batch: FeatureBatch) -> None:
            run.plugins.notify("on_train_batch", batch=batch)

        try:
            first = min(run.images_done.get(name, 0) for name in run.plugins.implementing("on_train_batch"))
            with asked_to_stop() as asked:
                self._wait_for_all(asked)  # what rank 0 opens is there before another process writes into it
                capture_pass(run, split, args.max_images, emit, first, asked)
                if run.rank == 0:
                    self._wait_for_all(asked)
        except Interrupted as stopped:
            self.detach(failed=True)
            sys.stderr.write(f"ezhoi-diffusion: {stopped}: give the same command again to go on\n")
            raise SystemExit(stopped.status) from None  # no traceback where a fork calls this
        except BaseException:
            self.detach(failed=True)
            raise
        # rank 0 is the last to detach, so that a plugin may merge there what the others have closed
        self.detach()
        if run.rank > 0:
            self._wait_for_all()
        self._wait_for_all()
        raise SystemExit(0)  # the pass is the run: neither training nor evaluation follows

    def _wait_for_all(self, asked: Callable[[], bool] = lambda: False) -> None:
        """A barrier that lets processes be hours apart: the host's own group may give up after ten minutes.

        Raises Interrupted where this one is asked to stop meanwhile.
        """
        if self.run.world_size > 1:
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
            barrier = dist.barrier(self._group, async_op=True)
            while not barrier.is_completed():
                if asked():
                    raise Interrupted("stopped while other processes went on")
                time.sleep(0.1)
            barrier.wait()

    def _replace(self, name: str, evaluate: Callable[..., Any]) -> None:
        engine = self.run.engine
        original = getattr(engine, name, None)
        if original is not None:
            setattr(engine, name, functools.partial(evaluate, original))
            self._undo.append(lambda: vars(engine).pop(name, None))

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return original(*args, **kwargs)

    def _compare(
        self, variants: dict[str, Variant], original: Callable[..., Any], loader: Any, *args: Any, **kw: Any
    ) -> Any:
        run = self.run
        with self:
            self._compared = True
            comparison = comparison_pass(run, loader, variants, REPLICATES if run.rank == 0 else 0)
            if run.rank == 0:
                print(f"\n{comparison.table()}\n", flush=True)
                if run.args.out:
                    write_report(comparison, Path(run.args.out))
                run.plugins.notify("on_comparison", comparison=comparison)
        return comparison.ap[REFERENCE]


def _evaluates(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "eval", False) or getattr(args, "cache", False))


def attach(model: nn.Module, args: argparse.Namespace, engine: Any = None) -> Attachment:
    """Join the plugins that `args` enables, and those that are on by default, to a built and loaded host.

    Call it once the engine is made and the checkpoint is loaded. Where a plugin captures, the pass is made here and ends
    the process with SystemExit(0). Raises EzhoiDiffusionError for flags, models and plugins that cannot work.
    """
    if not hasattr(args, "no_plugin"):
        raise EzhoiDiffusionError(
            "attach needs our flags in `args`: call add_arguments(parser) before parser.parse_args()"
        )
    refuse_unsupported(args)
    plugins = PluginManager(args.no_plugin)
    plugins.enable(args.plugin, raise_errors=args.plugin_errors == "raise")
    check_options(plugins, args)
    detector = unwrap(model)
    needed = bool(set(plugins.enabled) - set(ON_BY_DEFAULT) or args.compare)
    if needed or engine is None or _evaluates(args):
        plugins.enable_defaults()
    found = plugins.first("locate_adapter_feat", model=detector) if needed else None
    point = HookPoint(*found) if found else find_feature_module(detector) if needed else HookPoint("", detector)
    attachment = Attachment(EzHoiRun(detector, args, engine, plugins, point))
    if needed or plugins.enabled:
        try:
            attachment._start()
        except Exception:
            attachment.detach(failed=True)
            raise
    return attachment
