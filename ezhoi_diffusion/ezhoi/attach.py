"""Attach plugins to an EZ-HOI run whose model is built and loaded: injection, a capture pass, or a comparison."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ezhoi_diffusion.bridge import replacement_problem
from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted, printable
from ezhoi_diffusion.evaluation.bootstrap import REPLICATES
from ezhoi_diffusion.evaluation.comparison import REFERENCE
from ezhoi_diffusion.evaluation.variants import Variant, parse_settings, parse_sweep, resolve_variants
from ezhoi_diffusion.ezhoi.capture_pass import capture_pass, default_split, share_context
from ezhoi_diffusion.ezhoi.comparison_pass import comparison_pass
from ezhoi_diffusion.ezhoi.feature_tap import FeatureTap, HookPoint, find_feature_module, location_problem, unwrap
from ezhoi_diffusion.ezhoi.flags import check_options
from ezhoi_diffusion.ezhoi.limits import refuse_unsupported
from ezhoi_diffusion.ezhoi.replaced import replaced
from ezhoi_diffusion.ezhoi.run import EzHoiRun
from ezhoi_diffusion.features.batch import FeatureBatch, Pairs
from ezhoi_diffusion.files import check_writable
from ezhoi_diffusion.plugins import ON_BY_DEFAULT, PluginManager
from ezhoi_diffusion.report.write import write_report
from ezhoi_diffusion.signals import asked_to_stop

EVALUATIONS = ("test_hico", "cache_hico", "cache_vcoco")  # methods of EZ-HOI's engine; after one of them we detach


class Attachment:
    """The attachment to one EZ-HOI run, a context manager."""

    def __init__(self, run: EzHoiRun) -> None:
        self.run = run
        self._tap: FeatureTap | None = None
        self._undo = ExitStack()
        self._attached = False
        self._waits_for_evaluation = False
        self._group: Any = None

    def detach(self, *, failed: bool = False) -> None:
        """Remove every hook and call `on_detach`; does nothing the second time.

        Args:
            failed: The run ended with an error, so nothing else is reported.

        Raises:
            EzhoiDiffusionError: The comparison, or the replacement of adapter_feat, never took place.
        """
        self._undo.close()
        if not self._attached:
            return
        self._attached = False
        run = self.run
        run.failed = failed
        run.plugins.notify_all("on_detach", run=run)
        if self._waits_for_evaluation and not failed:
            raise EzhoiDiffusionError("--compare was given, but EZ-HOI never evaluated: its test_hico was not called")
        if self._tap is not None and not failed:
            self._tap.require_hits()
        if run.rank == 0 and not run.args.compare:  # a comparison prints them with its table
            for message in run.plugins.degraded.values():
                print(f"DEGRADED: {message}", flush=True)

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.detach(failed=error is not None)

    def start(self) -> None:
        """Call `on_attach`, then capture, prepare a comparison, or inject. Raises EzhoiDiffusionError, SystemExit."""
        run, plugins, args = self.run, self.run.plugins, self.run.args
        captures, injects = plugins.implementing("on_train_batch"), plugins.implementing("post_adapter_feat")
        if (captures or args.compare) and run.engine is None:
            raise EzhoiDiffusionError(
                "a capture pass and a comparison need EZ-HOI's data sets: run main_tip_finetune.py, not a script for one image"
            )
        if args.out:
            check_writable(Path(args.out))  # now, not after the pass
        if run.world_size > 1 and (captures or injects or args.compare):
            share_context(run.model, run.device)
        self._attached = True
        plugins.notify("on_attach", run=run)
        if run.finished:
            self.detach()
            raise SystemExit(0)
        if captures:
            self._capture(captures)
        elif args.compare:
            self._prepare_comparison()
        else:
            self._require_settings_applied()
            if injects:
                self._inject(injects[0])
            for name in EVALUATIONS:
                self._wrap_evaluation(name, self._evaluate)

    # -- injection ---------------------------------------------------------------------------------------

    def _require_settings_applied(self) -> None:
        unknown = parse_settings(self.run.args.set, self.run.args.inference_steps).keys() - self.run.applied_settings
        if unknown:
            raise EzhoiDiffusionError(
                f"no enabled bridge has a setting {', '.join(sorted(unknown))}: leave it out, or enable the bridge that has it"
            )

    def _inject(self, plugin: str) -> None:
        run = self.run
        if run.engine is not None and not _evaluates(run.args):
            raise EzhoiDiffusionError(
                f"plugin '{plugin}' replaces adapter_feat at eval time, and this run would train: add --eval"
            )

        def inject(feature: Tensor, pairs: Pairs) -> Tensor:
            return run.plugins.fold("post_adapter_feat", feature, replacement_problem, pairs=pairs)

        self._tap = FeatureTap(run.model, inject=inject, point=run.hook_point)
        self._undo.enter_context(self._tap)

    def _wrap_evaluation(self, name: str, evaluate: Callable[..., Any]) -> None:
        """Let `evaluate(original, *args)` run in place of a method of the engine."""
        original = getattr(self.run.engine, name, None)
        if original is not None:
            self._undo.enter_context(replaced(self.run.engine, name, functools.partial(evaluate, original)))

    def _evaluate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return original(*args, **kwargs)

    # -- comparison --------------------------------------------------------------------------------------

    def _prepare_comparison(self) -> None:
        run, args = self.run, self.run.args
        variants = resolve_variants(
            args.compare,
            run.plugins,
            folder=args.bridge,
            check=run.check_fingerprint,
            device=run.device,
            settings=parse_settings(args.set, args.inference_steps),
            sweep=parse_sweep(args.sweep),
        )
        self._waits_for_evaluation = True
        self._wrap_evaluation("test_hico", functools.partial(self._compare, variants))

    def _compare(
        self, variants: dict[str, Variant], original: Callable[..., Any], loader: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = self.run
        with self:
            self._waits_for_evaluation = False
            comparison = comparison_pass(run, loader, variants, REPLICATES if run.rank == 0 else 0)
            bare = comparison.variants[REFERENCE].ap
            if run.rank == 0:
                print(f"\n{printable(comparison.table())}\n", flush=True)
                if run.args.out:
                    write_report(comparison, Path(run.args.out))
                run.plugins.notify("on_comparison", comparison=comparison)
        return bare  # whatever a plugin has done to the comparison

    # -- capture -----------------------------------------------------------------------------------------

    def _capture(self, plugins: list[str]) -> None:
        """Make the pass and end the process: neither training nor evaluation follows."""
        run, args = self.run, self.run.args

        def emit(batch: FeatureBatch) -> None:
            run.plugins.notify("on_train_batch", batch=batch)

        try:
            first = min(run.images_done.get(name, 0) for name in plugins)
            with asked_to_stop() as should_stop:
                self._wait_for_all(should_stop)  # no process writes before rank 0 has opened the store
                capture_pass(run, args.capture_split or default_split(args), args.max_images, emit, first, should_stop)
                if run.rank == 0:
                    self._wait_for_all(should_stop)
        except Interrupted as stopped:
            self.detach(failed=True)
            sys.stderr.write(f"ezhoi-diffusion: {stopped}: run the same command again to resume\n")
            raise SystemExit(stopped.status) from None  # no traceback where a fork calls this
        except BaseException:
            self.detach(failed=True)
            raise
        # rank 0 detaches last, so that a plugin can merge there what the others have closed
        self.detach()
        if run.rank > 0:
            self._wait_for_all()
        self._wait_for_all()
        raise SystemExit(0)

    def _wait_for_all(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Wait for the other processes, for hours if need be: EZ-HOI's own group may time out after ten minutes.

        Raises:
            Interrupted: `should_stop` returned True meanwhile.
        """
        if self.run.world_size == 1:
            return
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        barrier = dist.barrier(self._group, async_op=True)
        while not barrier.is_completed():
            if should_stop():
                raise Interrupted("stopped while other processes went on")
            time.sleep(0.1)
        barrier.wait()


def _evaluates(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "eval", False) or getattr(args, "cache", False))


def attach(model: nn.Module, args: argparse.Namespace, engine: Any = None) -> Attachment:
    """Attach the plugins that `args` enables, and those that are on by default, to a built and loaded detector.

    Call it once the engine is made and the checkpoint is loaded. If a plugin captures, the pass is made here and ends
    the process.

    Args:
        model: The detector, wrapped or not.
        args: EZ-HOI's flags, parsed with ours: see `add_arguments`.
        engine: EZ-HOI's engine; None in a script for one image.

    Raises:
        EzhoiDiffusionError: These flags, this model or a plugin cannot work.
        SystemExit: After a capture pass.
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
    needs_features = bool(set(plugins.enabled) - set(ON_BY_DEFAULT) or args.compare)
    if needs_features or engine is None or _evaluates(args):
        plugins.enable_defaults()
    point = HookPoint("", detector)
    if needs_features:
        found = plugins.first("locate_adapter_feat", location_problem, model=detector)
        point = HookPoint(*found) if found else find_feature_module(detector)
    attachment = Attachment(EzHoiRun(detector, args, engine, plugins, point))
    if needs_features or plugins.enabled:
        try:
            attachment.start()
        except Exception:
            attachment.detach(failed=True)
            raise
    return attachment
