"""Writes the few lines that a fork needs into its main_tip_finetune.py, and takes them out again.

What to write, and where, is in the folder `patches/`, in terms of the script's structure. The script is read, never run;
it is read as bytes, so that line endings, tabs, encoding and whatever else stands in it stay as they are.
"""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
import shutil
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import escape
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import write_atomic

MARK = "  # added by ezhoi-diffusion patch; --revert removes it"
MODEL = "build_detector"
T = TypeVar("T")
Place = tuple[int, bytes, dict[str, str]]  # index of the line to insert before, its indentation, names found


class PatchError(EzhoiDiffusionError):
    """The script is not understood, or cannot be read or written; the message says what to do by hand."""


@dataclass(frozen=True)
class Insertion:
    """One line of the description: what to write, and the structure that says where."""

    line: str  # with {parser}, {model}, {args}, {engine} for the script's own names
    anchor: str  # a key of ANCHORS
    of: str  # the name that the anchor is about
    where: str  # the same in words

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the line with any names filled in."""
        return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(self.line)))

    def refusal(self, reason: str) -> PatchError:
        """The error for an anchor that cannot be used."""
        line = self.line.format(parser="parser", model="upt", args="args", engine="engine")
        return PatchError(f"{reason}. By hand: add `{line}` {self.where}")


@functools.cache
def description() -> tuple[str, list[Insertion]]:
    """The script's name and the lines to insert, from `patches/` in the installed package or beside it in a checkout."""
    package = resources.files("ezhoi_diffusion")
    for folder in (package / "patches", Path(str(package)).parent / "patches"):
        file = folder / "main_tip_finetune.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            return found["file"], [Insertion(**entry) for entry in found["insert"]]
    raise PatchError(
        "this installation lacks patches/main_tip_finetune.json: install the package again, from its whole checkout"
    )


def read_script(folder: Path) -> tuple[Path, bytes]:
    """The script in an EZ-HOI folder, links resolved, and its content. Raises PatchError.

    What a writing that was killed has left beside it is removed.
    """
    path = folder / description()[0]
    try:
        script, data = path.resolve(), path.read_bytes()
        aside = _aside(script)
        for left in (aside, *aside.parent.glob(f".{escape(aside.name)}.*.tmp")):
            left.unlink(missing_ok=True)
        return script, data
    except OSError as error:
        raise PatchError(f"{path} cannot be read ({error}): give the EZ-HOI folder, which has {path.name}") from error


def write_script(path: Path, data: bytes) -> None:
    """Replace the script in one step, its mode kept. Raises PatchError, and then it is as it was."""
    aside = _aside(path)
    try:
        write_atomic(aside, data)
        shutil.copymode(path, aside)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise PatchError(f"{path} cannot be written ({error}); it is as it was") from error


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.patch")


def diff(path: Path, before: bytes, after: bytes) -> str:
    """A unified diff for the terminal; empty where nothing changes."""
    old, new = (data.decode("utf-8", "replace").splitlines() for data in (before, after))
    return "\n".join(difflib.unified_diff(old, new, str(path), str(path), lineterm=""))


# -- taking out ----------------------------------------------------------------------------------------------


def reverted(data: bytes) -> bytes:
    """The script without our lines, every other byte kept.

    Raises PatchError where one of them was changed, or where taking them out would leave no valid script.
    """
    patterns = [insertion.pattern for insertion in description()[1]]
    kept = []
    for number, line in enumerate(_lines(data), 1):
        text = line.decode("utf-8", "replace").strip()
        if not text.endswith(MARK.strip()):
            kept.append(line)
        elif not any(pattern.fullmatch(text.removesuffix(MARK.strip()).strip()) for pattern in patterns):
            raise PatchError(f"line {number} is marked as ours, but was changed: `{text}`. Take it out by hand")
    without = b"".join(kept)
    if without != data and _parses(data) and not _parses(without):
        raise PatchError("without our lines the script is no valid Python any more: take them out by hand")
    return without


# -- putting in ----------------------------------------------------------------------------------------------


def patched(data: bytes) -> bytes:
    """The script with our lines, whether or not it has them already.

    Raises PatchError where the script is not understood: it says which anchor is missing or ambiguous.
    """
    original = reverted(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fork's own escapes are its own business
            tree = ast.parse(original)
        encoding = tokenize.detect_encoding(BytesIO(original).readline)[0].removesuffix("-sig")
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"it is no valid Python script ({error}): mend that first") from error
    _refuse_own_names(tree)
    lines = _lines(original)
    places: list[tuple[int, bytes]] = []
    for insertion in description()[1]:
        index, indent, names = ANCHORS[insertion.anchor](tree, lines, insertion)
        before = lines[index - 1]
        ending = before[len(before.rstrip(b"\r\n")) :]
        places.append((index, indent + (insertion.line.format(**names) + MARK).encode(encoding) + ending))
    for index, line in sorted(places, reverse=True):
        lines.insert(index, line)
    result = b"".join(lines)
    if not _parses(result) or reverted(result) != original:
        raise PatchError("its layout is not understood. Add the lines by hand: INTEGRATION.md, With a fork")
    return result


def _refuse_own_names(tree: ast.Module) -> None:
    ours = {"add_arguments", "attach"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            if any(module.split(".")[0] == "ezhoi_diffusion" for module in modules):
                raise PatchError(
                    f"line {node.lineno} imports ezhoi_diffusion already: it was joined by hand, which works as well; take "
                    f"those lines out if you want these instead"
                )
        if isinstance(node, ast.keyword):
            continue
        names = {getattr(node, field, None) for field in ("id", "name", "asname", "arg")}
        for name in ours & {name for name in names if isinstance(name, str)}:
            raise PatchError(
                f"line {getattr(node, 'lineno', 0)} has a name `{name}` of its own, which ours would replace: rename it there, "
                f"or join by hand: INTEGRATION.md, With a fork"
            )


def _after_import(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and insertion.of in [alias.name for alias in node.names]
    ]
    statement = _only(found, insertion, f"import of {insertion.of} at the top of the file")
    end = statement.end_lineno or statement.lineno
    for other in tree.body:  # statements may share a line
        if other.lineno <= end:
            end = max(end, other.end_lineno or other.lineno)
    return end, b"", {}


def _before_method_call(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n) == insertion.of]
    call = _only(calls, insertion, f"call of {insertion.of}")
    if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name)):
        raise insertion.refusal(f"line {call.lineno} calls {insertion.of} on something that has no name")
    statement = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and call in ast.walk(n)][-1]  # the innermost
    return *_start(statement, lines, insertion), {"parser": call.func.value.id}


def _before_first_use(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    made = [(function, _assigned(function, insertion.of, tree)) for function in functions]
    scope, engines = _only([(f, a) for f, a in made if a], insertion, f"function that assigns {insertion.of}(...)")
    models = _assigned(scope, MODEL, tree)
    first = {c.args[0].id for _, c in models if c.args and isinstance(c.args[0], ast.Name)}
    engine = _only(sorted({name for name, _ in engines}), insertion, f"variable for the engine in {scope.name}")
    model = _only(sorted({name for name, _ in models}), insertion, f"variable for {MODEL}(...) in {scope.name}")
    args = _only(sorted(first), insertion, f"variable that is the first argument of {MODEL} in {scope.name}")

    binding, using = (
        [i for i, s in enumerate(scope.body) if any(_is_name(n, engine, kind) for n in ast.walk(s))]
        for kind in (ast.Store, ast.Load)
    )
    later = [i for i in using if i > binding[-1]]
    if not later or len(later) < len(using):
        raise insertion.refusal(
            f"in {scope.name} no statement stands between those that make `{engine}` and those that use it"
        )
    for statement in scope.body[later[0] :]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and _called(node) == "load_state_dict" and _receiver(node) == model:
                raise insertion.refusal(f"line {node.lineno} loads weights into `{model}` after `{engine}` is used")
    return *_start(scope.body[later[0]], lines, insertion), {"model": model, "args": args, "engine": engine}


ANCHORS = {"import": _after_import, "method call": _before_method_call, "first use": _before_first_use}


# -- reading the tree ----------------------------------------------------------------------------------------


def _lines(data: bytes) -> list[bytes]:
    """Lines as Python counts them, each with its ending."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", data)


def _parses(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(data)
    except (SyntaxError, ValueError):
        return False
    return True


def _only(found: Sequence[T], insertion: Insertion, what: str) -> T:
    if len(found) != 1:
        raise insertion.refusal(f"exactly one {what} is needed, and there are {len(found)}")
    return found[0]


def _start(statement: ast.stmt, lines: Sequence[bytes], insertion: Insertion) -> tuple[int, bytes]:
    """Index and indentation of the statement's line; PatchError where something else stands before it there."""
    index = statement.lineno - 1
    indent = lines[index][: statement.col_offset]
    if indent.strip() or lines[index - 1].rstrip().endswith(b"\\"):
        raise insertion.refusal(f"the statement in line {statement.lineno} does not begin its line")
    return index, indent


def _own(scope: ast.FunctionDef) -> Iterator[ast.AST]:
    """The nodes of a function without those of functions inside it."""
    waiting: list[ast.AST] = list(scope.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)


def _assigned(scope: ast.FunctionDef, name: str, tree: ast.Module) -> list[tuple[str, ast.Call]]:
    """The variables that a function assigns calls of `name` to, each with the call."""
    assignments = [n for n in _own(scope) if isinstance(n, ast.Assign) and _called(n.value, tree) == name]
    return [
        (target.id, n.value)
        for n in assignments
        for target in n.targets
        if isinstance(target, ast.Name) and isinstance(n.value, ast.Call)
    ]


def _called(node: ast.AST, tree: ast.Module | None = None) -> str | None:
    """The name of what a call calls, as its module has it where `tree` imports it under another."""
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    if not isinstance(node.func, ast.Name):
        return None
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)] if tree else []
    renamed = {alias.asname: alias.name for n in imports for alias in n.names if alias.asname}
    return renamed.get(node.func.id, node.func.id)


def _receiver(call: ast.Call) -> str | None:
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return value.id if isinstance(value, ast.Name) else None


def _is_name(node: ast.AST, name: str, kind: type[Any]) -> bool:
    return isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, kind)
