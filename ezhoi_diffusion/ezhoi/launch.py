"""Run an unmodified EZ-HOI script in this process, with plugins attached."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import io
import os
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ezhoi_diffusion.errors import EzhoiDiffusionError, Interrupted
from ezhoi_diffusion.ezhoi.attach import Attachment, attach
from ezhoi_diffusion.ezhoi.flags import add_missing_arguments
from ezhoi_diffusion.ezhoi.limits import refuse_unsupported
from ezhoi_diffusion.ezhoi.replaced import replaced
from ezhoi_diffusion.ezhoi.single_image import check_flags, single_images
from ezhoi_diffusion.files import read_plain
from ezhoi_diffusion.signals import passed_to_children

FACTORY, ENGINE, DATASET = "build_detector", "CustomisedDLE", "DataFactory"  # EZ-HOI's names
PACKAGE = "ezhoi_diffusion"
REPORTED = (EzhoiDiffusionError.status, Interrupted.status)  # of a process that has printed its error already


class LaunchError(EzhoiDiffusionError):
    """The script cannot be run, or is no EZ-HOI script."""


@dataclass(frozen=True)
class EzHoiScript:
    """An EZ-HOI script, and the modules from which it imports EZ-HOI's parts."""

    path: Path
    factory: str  # module of build_detector
    engine: str | None  # module of CustomisedDLE; None where the script does not use it, as inference.py
    dataset: str | None  # module of DataFactory
    attaches: bool  # the script calls our `attach` by itself

    @classmethod
    def read(cls, path: Path) -> EzHoiScript:
        """Read a script without running it.

        Raises:
            LaunchError: It cannot be read, is not Python, or does not import build_detector.
        """
        try:
            tree = ast.parse(read_plain(path), str(path))  # bytes may have a BOM or a coding cookie, as for python
        except OSError as error:
            raise LaunchError(
                f"{path} cannot be read ({error}): run this from the EZ-HOI folder, as you run the script"
            ) from error
        except (SyntaxError, ValueError) as error:
            raise LaunchError(f"{path} is no Python script ({error})") from error
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        modules: dict[str, str] = {}
        attaches = False
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if alias.name != ENGINE or (alias.asname or alias.name) in names:
                        modules[alias.name] = node.module
                    attaches |= alias.name == "attach" and _is_ours(node.module)
            elif isinstance(node, ast.Import):
                attaches |= "attach" in attributes and any(_is_ours(alias.name) for alias in node.names)
        if FACTORY not in modules:
            raise LaunchError(
                f"{path} does not import {FACTORY}: it is no EZ-HOI script (main_tip_finetune.py, inference.py)"
            )
        return cls(path, modules[FACTORY], modules.get(ENGINE), modules.get(DATASET), attaches)

    def load(self, module: str) -> Any:
        """Import one of its modules. Raises LaunchError."""
        try:
            return importlib.import_module(module)
        except ImportError as error:
            raise LaunchError(
                f"{self.path} imports {module}, and that failed: {error}. Run this from the EZ-HOI folder, in the "
                f"environment in which the script itself runs"
            ) from error


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == PACKAGE


def run_script(path: Path, argv: Sequence[str]) -> None:
    """Run `path` as `python path argv…` would, with our flags on its parser and plugins on its detector.

    A script that calls `attach` by itself keeps its detector to itself. Standard input is closed, because EZ-HOI opens
    a debugger on some errors, where a run without a terminal would wait forever.

    Raises:
        LaunchError: It is no EZ-HOI script, or fails in a known way.
        BaseException: Whatever else the script raises, SystemExit included.
    """
    script = EzHoiScript.read(path)

    def check(flags: argparse.Namespace) -> argparse.Namespace:
        check_flags(flags, script.engine is not None)
        refuse_unsupported(flags)  # now, because EZ-HOI may take an hour to reach the point where it crashes
        return flags

    _close_stdin()
    with _command_line(path, argv), _flags_parsed(check), _spawned_processes(path), _attached(script):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Exception as error:
            explained = _explain(error, path)
            if explained is None:
                raise
            raise explained from error


def _explain(error: Exception, path: Path) -> LaunchError | None:
    """Explain a known error of an EZ-HOI script, and say what to do."""
    if isinstance(error, FileNotFoundError) and "_clip." in str(error):
        return LaunchError(
            f"a file of CLIP image features is missing ({error}): give the folder of this split as --clip_img_file; "
            f"CLIP_hicodet_extract.py makes it"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return LaunchError(
            f"the checkpoint does not fit the model that these flags build: give the flags of its training, which are in "
            f"args.txt beside it; {path.name} has other defaults. EZ-HOI says: {str(error)[:600]}"
        )
    if type(error).__name__ == "BdbQuit":
        frames = traceback.extract_tb(error.__traceback__)
        stop = [frame for frame in frames if not frame.filename.endswith(("bdb.py", "pdb.py"))][-1]
        return LaunchError(
            f"EZ-HOI stopped in its debugger (pdb.set_trace) at {stop.filename}:{stop.lineno}. It does that on NaN losses "
            f"and on errors in its training loss: run the script without ezhoi-diffusion to look around there"
        )
    return None


class _FlagsRead(BaseException):
    """Ends a script at its parse_args; no `except Exception` of the script catches it."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags


def read_flags(path: Path, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv` with a script's own parser and our flags; the script runs up to there and no further.

    Its output is discarded. argv, sys.path and standard input are restored; modules that it imported stay.

    Raises:
        LaunchError: The script fails before that point, or its parser refuses the flags.
    """
    EzHoiScript.read(path)

    def stop(flags: argparse.Namespace) -> argparse.Namespace:
        raise _FlagsRead(flags)

    printed = io.StringIO()
    try:
        with (
            Path(os.devnull).open() as nothing,
            replaced(sys, "stdin", nothing),
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(printed),
            _command_line(path, argv),
            _flags_parsed(stop),
        ):
            runpy.run_path(str(path), run_name="__main__")
    except _FlagsRead as reached:
        return reached.flags
    except EzhoiDiffusionError:
        raise
    except SystemExit as end:
        lines = printed.getvalue().strip().splitlines()
        reason = lines[-1] if lines else f"it ends with status {end.code} before it reads them"
        raise LaunchError(f"{path} refuses its flags: {reason}") from end
    except Exception as error:
        raise LaunchError(
            f"{path} fails before it reads its flags ({type(error).__name__}: {error}): run this from the EZ-HOI folder, "
            f"in the environment in which the script itself runs"
        ) from error
    raise LaunchError(f"{path} ends without reading its flags: it is no EZ-HOI script")


@contextmanager
def _command_line(path: Path, argv: Sequence[str]) -> Iterator[None]:
    """Set sys.argv and sys.path as for `python path argv…`."""
    search = [str(path.resolve().parent), *sys.path]
    with replaced(sys, "argv", [str(path), *argv]), replaced(sys, "path", search):
        yield


def _close_stdin() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  it stays open until the process ends


@contextmanager
def _flags_parsed(then: Callable[[argparse.Namespace], argparse.Namespace]) -> Iterator[None]:
    """Add our flags to the first parser that parses, which is the script's own, and pass its flags through `then`."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> argparse.Namespace:
        once.close()
        add_missing_arguments(self, args)
        return then(parse(self, args, namespace))

    with ExitStack() as once:
        once.enter_context(replaced(argparse.ArgumentParser, "parse_args", parse_args))
        yield


@contextmanager
def _spawned_processes(path: Path) -> Iterator[None]:
    """Attach in the processes that EZ-HOI spawns, too: they import the script without what this one has replaced."""
    mp: Any = importlib.import_module("torch.multiprocessing")
    original = mp.spawn

    def spawn(fn: Callable[..., Any], args: tuple[Any, ...] = (), *rest: Any, **kwargs: Any) -> Any:
        with passed_to_children():
            try:
                return original(_run_child, (str(path), fn, args), *rest, **kwargs)
            except mp.ProcessExitedException as error:
                if error.exit_code in REPORTED:
                    raise SystemExit(error.exit_code) from error
                raise

    with replaced(mp, "spawn", spawn):
        yield


def _run_child(rank: int, path: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Run `fn(rank, *args)` in a spawned process, which has imported the script and its names already."""
    try:
        with _attached(EzHoiScript.read(Path(path)), fn.__globals__):
            fn(rank, *args)
    except EzhoiDiffusionError as error:
        sys.stderr.write(f"ezhoi-diffusion (process {rank}): {error}\n")
        raise SystemExit(error.status) from error


@contextmanager
def _attached(script: EzHoiScript, namespace: dict[str, Any] | None = None) -> Iterator[None]:
    """Attach to the detector that a script builds, and get it past what upstream fails on.

    A script with an engine is attached to when it makes the engine. One without loads its checkpoint after it builds the
    model, so it is attached to at its first image, when the model is complete.

    Args:
        script: One that attaches by itself gets the help with upstream's failures alone.
        namespace: The script's globals, where it has imported `build_detector` already.
    """
    factory = script.load(script.factory)
    engine_class = getattr(script.load(script.engine), ENGINE, None) if script.engine else None
    dataset_class = getattr(script.load(script.dataset), DATASET, None) if script.dataset else None
    original = getattr(factory, FACTORY)
    waiting: dict[int, tuple[argparse.Namespace, Any]] = {}  # id of a model -> flags, and the hook on its first image
    attachments: list[Attachment] = []

    def attach_to(model: Any, engine: Any = None) -> None:
        if id(model) in waiting:
            args, hook = waiting.pop(id(model))
            hook.remove()
            attachments.append(attach(model, args, engine))

    @functools.wraps(original)
    def build_detector(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> Any:
        model = original(args, *rest, **kwargs)
        if help_model is not None:
            help_model(model)
        if not script.attaches:
            waiting[id(model)] = args, model.register_forward_pre_hook(lambda module, images: attach_to(module))
        return model

    with ExitStack() as undo:
        help_model = undo.enter_context(single_images(dataset_class)) if engine_class is None else None
        undo.enter_context(replaced(factory, FACTORY, build_detector))
        if namespace is not None:  # not put back: the process ends with the run
            namespace.update({name: build_detector for name, value in namespace.items() if value is original})
        if engine_class is not None:
            undo.enter_context(_engines_noticed(engine_class, attach_to))
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
def _engines_noticed(engine_class: Any, then: Callable[[Any, Any], None]) -> Iterator[None]:
    """Call `then(model, engine)` when an engine is made, and let file names through its training step."""
    init, start = engine_class.__init__, getattr(engine_class, "_on_start_iteration", None)

    def __init__(self: Any, net: Any, *args: Any, **kwargs: Any) -> None:
        init(self, net, *args, **kwargs)
        then(net, self)

    def _on_start_iteration(self: Any) -> None:
        # every target has its file name, and pocket's relocate_to_cuda raises TypeError on a string
        names = [target.pop("filename", None) for target in self._state.targets]
        start(self)  # type: ignore[misc]
        for target, name in zip(self._state.targets, names, strict=True):
            if name is not None:
                target["filename"] = name

    with ExitStack() as undo:
        undo.enter_context(replaced(engine_class, "__init__", __init__))
        if start is not None:
            undo.enter_context(replaced(engine_class, "_on_start_iteration", _on_start_iteration))
        yield
