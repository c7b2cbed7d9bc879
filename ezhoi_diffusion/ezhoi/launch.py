"""Runs a host's script, unmodified, in this process, with plugins attached."""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import io
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.ezhoi.flags import add_missing_arguments
from ezhoi_diffusion.ezhoi.limits import refuse_unsupported
from ezhoi_diffusion.ezhoi.single_image import check_flags, single_images
from ezhoi_diffusion.signals import passed_to_children

FACTORY = "build_detector"
ENGINE = "CustomisedDLE"
DATASET = "DataFactory"
OURS, JOINING = "ezhoi_diffusion", "attach"
SPOKEN = (EzhoiDiffusionError.status, Interrupted.status)  # of a process that ended with a message for the user


class LaunchError(EzhoiDiffusionError):
    """The script cannot be run, or is no EZ-HOI script; the message says what to do."""


def run_script(script: Path, argv: Sequence[str]) -> None:
    """Run `script` as `python script argv…` would, our flags added to its parser and its detector observed.

    A script that joins by itself, patched or by hand, has our flags already, and its detector is left to it.
    Standard input is closed: the host opens a debugger on some errors, and would wait there for ever. Raises whatever
    the script raises, SystemExit included, and LaunchError.
    """
    modules = _imported_modules(script)
    _close_stdin()
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    with _our_flags(ENGINE in modules), _our_spawn(script), _observed(script, modules, None):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as error:
            if isinstance(error, FileNotFoundError) and "_clip." in str(error):
                raise LaunchError(
                    f"a file of CLIP image features is missing ({error}): give the folder that has this split's as "
                    f"--clip_img_file; CLIP_hicodet_extract.py makes it"
                ) from error
            if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
                raise LaunchError(
                    f"the checkpoint does not fit the model that these flags build. Give those it was trained with (they are in "
                    f"args.txt beside it); {script.name} has defaults of its own. The host says: {str(error)[:600]}"
                ) from error
            if type(error).__name__ == "BdbQuit":
                raise LaunchError(
                    f"the host stopped in its debugger (pdb.set_trace) at {_where(error)}, which it does on NaN losses and on "
                    f"errors in its training loss; run the script without ezhoi-diffusion to look around there"
                ) from error
            raise


class _FlagsRead(BaseException):
    """Ends a script at its parse_args; no `except Exception` of the script's own stops it."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags


def read_flags(script: Path, argv: Sequence[str]) -> argparse.Namespace:
    """What the script's own parser, ours added to it, makes of `argv`: the script runs up to there and no further.

    What it prints is lost, and the interpreter's argv, path and standard input are as before; modules that it imported
    stay. Raises LaunchError where it does not come so far, its imports fail, or its parser refuses the flags; the
    cause is the script's own exception.
    """
    _imported_modules(script)
    original, before = argparse.ArgumentParser.parse_args, (sys.argv, list(sys.path), sys.stdin)

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        add_missing_arguments(self, args)
        raise _FlagsRead(original(self, args, namespace))

    said = io.StringIO()
    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        with (
            Path(os.devnull).open() as nothing,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(said),
        ):
            sys.stdin = nothing
            runpy.run_path(str(script), run_name="__main__")
    except _FlagsRead as reached:
        return reached.flags
    except EzhoiDiffusionError:
        raise
    except SystemExit as end:
        words = said.getvalue().strip().splitlines()
        raise LaunchError(
            f"{script} refuses its flags: {words[-1] if words else f'it ends with status {end.code} before it reads them'}"
        ) from end
    except Exception as error:
        raise LaunchError(
            f"{script} fails before it reads its flags ({type(error).__name__}: {error}): run this from the EZ-HOI folder, in "
            f"the environment in which the script itself runs"
        ) from error
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        sys.argv, sys.path[:], sys.stdin = before
    raise LaunchError(f"{script} ends without reading its flags: it is no EZ-HOI script")


def _imported_modules(script: Path) -> dict[str, str]:
    """Which modules a script imports factory, engine and data set from: name -> module, read without running it.

    The engine only where the script uses it: inference.py imports it, and leaves it at that. Our `attach` is among them
    where the script joins by itself.
    """
    try:
        tree = ast.parse(script.read_text(encoding="utf-8"), str(script))
    except OSError as error:
        raise LaunchError(
            f"{script} cannot be read ({error}): run this from the EZ-HOI folder, as you run the script"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise LaunchError(f"{script} is no Python script ({error})") from error
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if alias.name in (FACTORY, DATASET) or (alias.name == ENGINE and (alias.asname or alias.name) in used)
    }
    if FACTORY not in found:
        raise LaunchError(
            f"{script} does not import {FACTORY}: it is no EZ-HOI script (main_tip_finetune.py, inference.py)"
        )
    if _joins_itself(tree):
        found[JOINING] = OURS
    return found


def _joins_itself(tree: ast.Module) -> bool:
    """Whether a script imports our `attach`, or this package and calls an `attach` of something."""
    of_ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == OURS:
            of_ours |= {alias.name for alias in node.names}
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == OURS for alias in node.names):
            of_ours |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    return JOINING in of_ours


def _close_stdin() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  it stays open as long as the process


@contextmanager
def _our_flags(has_engine: bool) -> Iterator[None]:
    """Let the first parser that reads the command line, the script's own, know our flags, if it does not yet."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
        add_missing_arguments(self, args)
        parsed = original(self, args, namespace)
        check_flags(parsed, has_engine)
        refuse_unsupported(parsed)  # now, because the host may take an hour to where it crashes
        return parsed

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]


@contextmanager
def _our_spawn(script: Path) -> Iterator[None]:
    """Reach the processes that the host spawns: they import the script afresh, without any of this."""
    mp: Any = importlib.import_module("torch.multiprocessing")
    original = mp.spawn

    def spawn(fn: Callable[..., Any], args: tuple[Any, ...] = (), *rest: Any, **kwargs: Any) -> Any:
        with passed_to_children():
            try:
                return original(_child, (str(script), fn, args), *rest, **kwargs)
            except mp.ProcessExitedException as error:
                if error.exit_code in SPOKEN:
                    raise SystemExit(error.exit_code) from error
                raise

    mp.spawn = spawn
    try:
        yield
    finally:
        mp.spawn = original


def _child(rank: int, script: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """What a spawned process runs: it has imported the script already, so its names are replaced there too."""
    path = Path(script)
    try:
        with _observed(path, _imported_modules(path), fn.__globals__):
            fn(rank, *args)
    except EzhoiDiffusionError as error:
        sys.stderr.write(f"ezhoi-diffusion (process {rank}): {error}\n")
        raise SystemExit(error.status) from error


@contextmanager
def _observed(script: Path, modules: dict[str, str], namespace: dict[str, Any] | None) -> Iterator[None]:
    """Attach to the detector the host builds: when its engine is made, or without one at its first image.

    A script that joins by itself is helped over what upstream stumbles on, as any other, and attaches to it alone.
    namespace: globals of a script that has imported the names already.
    """
    from ezhoi_diffusion.ezhoi.attach import Attachment, attach

    factory_module = _import(script, modules[FACTORY])
    engine_class = getattr(_import(script, modules[ENGINE]), ENGINE, None) if ENGINE in modules else None
    dataset_class = getattr(_import(script, modules[DATASET]), DATASET, None) if DATASET in modules else None
    original_factory = getattr(factory_module, FACTORY)
    attachments: list[Attachment] = []
    waits: dict[int, tuple[argparse.Namespace, Any]] = {}

    def join(model: Any, engine: Any = None) -> None:
        waiting = waits.pop(id(model), None)
        if waiting is not None:  # once a model
            args, handle = waiting
            handle.remove()
            attachments.append(attach(model, args, engine))

    @functools.wraps(original_factory)
    def build_detector(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        model = original_factory(args, *rest, **kwargs)
        help_model(model)
        if JOINING in modules:
            return model
        # a script without an engine loads its checkpoint later, so the first image is when the model is complete
        waits[id(model)] = args, model.register_forward_pre_hook(lambda module, images: join(module))
        return model

    with contextlib.ExitStack() as undo:
        help_model = undo.enter_context(single_images(dataset_class)) if engine_class is None else lambda model: None
        for where in filter(None, (vars(factory_module), namespace)):
            for name in [name for name, value in where.items() if value is original_factory]:
                where[name] = build_detector
                undo.callback(where.__setitem__, name, original_factory)
        if engine_class is not None:
            undo.enter_context(_engine_observed(engine_class, join))
        failed = True
        try:
            yield
            failed = False
        except SystemExit as end:
            failed = end.code not in (None, 0)
            raise
        finally:
            for attachment in attachments:
                attachment.detach(failed=failed)


@contextmanager
def _engine_observed(engine_class: type, join: Callable[[Any, Any], None]) -> Iterator[None]:
    """Learn of an engine once it is made, and let file names through to its training step."""
    own = {name: vars(engine_class).get(name) for name in ("__init__", "_on_start_iteration")}
    init, start = engine_class.__init__, getattr(engine_class, "_on_start_iteration", None)  # type: ignore[misc]

    def __init__(self: Any, net: Any, *args: Any, **kwargs: Any) -> None:
        init(self, net, *args, **kwargs)
        join(net, self)

    def _on_start_iteration(self: Any) -> None:
        # pocket's relocate_to_cuda raises TypeError on a string, and every target has its file name
        names = [target.pop("filename", None) for target in self._state.targets]
        start(self)  # type: ignore[misc]
        for target, name in zip(self._state.targets, names, strict=True):
            if name is not None:
                target["filename"] = name

    engine_class.__init__ = __init__  # type: ignore[misc]
    if start is not None:
        engine_class._on_start_iteration = _on_start_iteration  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name, value in own.items():
            if value is not None:
                setattr(engine_class, name, value)
            elif name in vars(engine_class):
                delattr(engine_class, name)


def _import(script: Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LaunchError(
            f"{script} imports {module}, and that failed: {error}. Run this from the EZ-HOI folder, in the environment in "
            f"which the script itself runs"
        ) from error


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    place = "an unknown place"
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.endswith(("bdb.py", "pdb.py")):
            place = f"{code.co_filename}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place
