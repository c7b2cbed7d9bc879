"""Write the three lines that a fork needs into its main_tip_finetune.py, and remove them again.

The folder `patches/` describes the lines and their places in terms of the script's structure. The script is parsed, never
run. It is handled as bytes, so that line endings, tabs, encoding and everything else in it stay as they are.
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
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import TypeVar

from ezhoi_diffusion.errors import EzhoiDiffusionError
from ezhoi_diffusion.files import read_plain, write_atomic

MARK = "  # added by ezhoi-diffusion patch; --revert removes it"
FACTORY = "build_detector"
T = TypeVar("T")


class PatchError(EzhoiDiffusionError):
    """The structure of the script is not understood, or the file cannot be read or written."""


@dataclass(frozen=True)
class Insertion:
    """One line to insert, and its place."""

    line: str  # with {parser}, {model}, {args}, {engine} for the script's own names
    anchor: str  # a key of ANCHORS
    of: str  # the name that the anchor looks for
    where: str  # the place in words, for messages

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches the line with any names filled in."""
        return re.compile(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(self.line)))

    def refusal(self, reason: str) -> PatchError:
        """Build the error for a place that cannot be used."""
        line = self.line.format(parser="parser", model="upt", args="args", engine="engine")
        return PatchError(f"{reason}. By hand: add `{line}` {self.where}")

    def only(self, found: Sequence[T], what: str) -> T:
        """Return the one element of `found`. Raises PatchError where there are none or several."""
        if len(found) != 1:
            raise self.refusal(f"exactly one {what} is needed, and there are {len(found)}")
        return found[0]


@functools.cache
def description() -> tuple[str, list[Insertion]]:
    """Read the name of the script and the lines from `patches/`, in the installed package or beside it in a checkout."""
    package = resources.files("ezhoi_diffusion")
    for folder in (package / "patches", Path(str(package)).parent / "patches"):
        file = folder / "main_tip_finetune.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            return found["file"], [Insertion(**entry) for entry in found["insert"]]
    raise PatchError(
        "this installation lacks patches/main_tip_finetune.json: install the package again, from its whole checkout"
    )


# -- the file ------------------------------------------------------------------------------------------------


def read_script(folder: Path) -> tuple[Path, bytes]:
    """Return the path, with links resolved, and the content of the script in an EZ-HOI folder. Raises PatchError.

    Files that a killed write has left beside it are deleted.
    """
    path = folder / description()[0]
    try:
        script, data = path.resolve(), read_plain(path)
        staged = _staged(script)
        for left in (staged, *staged.parent.glob(f".{escape(staged.name)}.*.tmp")):
            left.unlink(missing_ok=True)
        return script, data
    except OSError as error:
        raise PatchError(f"{path} cannot be read ({error}): give the EZ-HOI folder, which has {path.name}") from error


def write_script(path: Path, data: bytes) -> None:
    """Replace the script in one step and keep its mode. Raises PatchError, and then it is unchanged."""
    staged = _staged(path)
    try:
        write_atomic(staged, data)
        shutil.copymode(path, staged)
        staged.replace(path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise PatchError(f"{path} cannot be written ({error}); it is unchanged") from error


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.patch")


def diff(path: Path, before: bytes, after: bytes) -> str:
    """Return a unified diff for the terminal; empty where nothing changes."""
    old, new = (data.decode("utf-8", "replace").splitlines() for data in (before, after))
    return "\n".join(difflib.unified_diff(old, new, str(path), str(path), lineterm=""))


# -- removing and inserting ----------------------------------------------------------------------------------


def reverted(data: bytes) -> bytes:
    """Return the script without our lines; every other byte stays.

    Raises:
        PatchError: One of our lines was edited, or the script is no valid Python without them.
    """
    patterns = [insertion.pattern for insertion in description()[1]]
    kept = []
    for number, line in enumerate(_lines(data), 1):
        text = line.decode("utf-8", "replace").strip()
        if not text.endswith(MARK.strip()):
            kept.append(line)
        elif not any(pattern.fullmatch(text.removesuffix(MARK.strip()).strip()) for pattern in patterns):
            raise PatchError(f"line {number} is marked as ours, but was changed: `{text}`. Remove it by hand")
    without = b"".join(kept)
    if without != data and _is_python(data) and not _is_python(without):
        raise PatchError("without our lines the script is no valid Python any more: remove them by hand")
    return without


def patched(data: bytes) -> bytes:
    """Return the script with our lines, whether or not it has them already.

    Raises:
        PatchError: A place is missing or ambiguous, or the script cannot be parsed.
    """
    original = reverted(data)
    try:
        tree = _parse(original)
        encoding = tokenize.detect_encoding(BytesIO(original).readline)[0].removesuffix("-sig")
    except (SyntaxError, ValueError) as error:
        raise PatchError(f"it is no valid Python script ({error}): correct that first") from error
    _refuse_own_names(tree)
    lines = _lines(original)
    inserted = []
    for insertion in description()[1]:
        index, indent, names = ANCHORS[insertion.anchor](tree, lines, insertion)
        before = lines[index - 1]
        ending = before[len(before.rstrip(b"\r\n")) :]
        inserted.append((index, indent + (insertion.line.format(**names) + MARK).encode(encoding) + ending))
    for index, line in sorted(inserted, reverse=True):
        lines.insert(index, line)
    result = b"".join(lines)
    if not _is_python(result) or reverted(result) != original:
        raise PatchError("its layout is not understood. Add the lines by hand: INTEGRATION.md, With a fork")
    return result


def _refuse_own_names(tree: ast.Module) -> None:
    """Raise PatchError where the script imports this package, or uses one of the two names that our lines import."""
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        if any(module.split(".")[0] == "ezhoi_diffusion" for module in modules):
            raise PatchError(
                f"line {getattr(node, 'lineno', 0)} imports ezhoi_diffusion already: it was joined by hand, which works as "
                f"well; remove those lines if you want these instead"
            )
        names = set() if isinstance(node, ast.keyword) else {getattr(node, f, None) for f in NAME_FIELDS}
        for name in names & {"add_arguments", "attach"}:
            raise PatchError(
                f"line {getattr(node, 'lineno', 0)} has a name `{name}` of its own, which ours would replace: rename it there, "
                f"or join by hand: INTEGRATION.md, With a fork"
            )


NAME_FIELDS = ("id", "name", "asname", "arg")  # of syntax nodes


# -- finding the places --------------------------------------------------------------------------------------


Place = tuple[int, bytes, dict[str, str]]  # index of the line to insert before, its indentation, the script's names


def _after_import(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    found = [n for n in tree.body if isinstance(n, ast.ImportFrom) and insertion.of in [a.name for a in n.names]]
    end = _end(insertion.only(found, f"import of {insertion.of} at the top of the file"))
    while later := [_end(n) for n in tree.body if n.lineno <= end < _end(n)]:  # statements may share a line
        end = max(later)
    return end, b"", {}


def _before_method_call(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _called(n) == insertion.of]
    call = insertion.only(calls, f"call of {insertion.of}")
    parser = _receiver(call)
    if parser is None:
        raise insertion.refusal(f"line {call.lineno} calls {insertion.of} on something that has no name")
    statement = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and call in ast.walk(n)][-1]  # the innermost
    return _before(statement, lines, insertion, {"parser": parser})


def _before_first_use(tree: ast.Module, lines: Sequence[bytes], insertion: Insertion) -> Place:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    made = [(function, _assigned(function, insertion.of, tree)) for function in functions]
    scope, engines = insertion.only([(f, a) for f, a in made if a], f"function that assigns {insertion.of}(...)")
    models = _assigned(scope, FACTORY, tree)
    first = {call.args[0].id for _, call in models if call.args and isinstance(call.args[0], ast.Name)}
    engine = insertion.only(sorted({name for name, _ in engines}), f"variable for the engine in {scope.name}")
    model = insertion.only(sorted({name for name, _ in models}), f"variable for {FACTORY}(...) in {scope.name}")
    args = insertion.only(sorted(first), f"variable that is the first argument of {FACTORY} in {scope.name}")

    found = [[n.ctx for n in ast.walk(s) if isinstance(n, ast.Name) and n.id == engine] for s in scope.body]
    last_binding = max(i for i, uses in enumerate(found) if any(isinstance(ctx, ast.Store) for ctx in uses))
    using = [i for i, uses in enumerate(found) if any(isinstance(ctx, ast.Load) for ctx in uses)]
    later = [i for i in using if i > last_binding]
    if not later or len(later) < len(using):
        raise insertion.refusal(
            f"in {scope.name} no statement stands between those that make `{engine}` and those that use it"
        )
    for statement in scope.body[later[0] :]:
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and _called(node) == "load_state_dict" and _receiver(node) == model:
                raise insertion.refusal(f"line {node.lineno} loads weights into `{model}` after `{engine}` is used")
    names = {"model": model, "args": args, "engine": engine}
    return _before(scope.body[later[0]], lines, insertion, names)


ANCHORS = {"import": _after_import, "method call": _before_method_call, "first use": _before_first_use}


def _before(statement: ast.stmt, lines: Sequence[bytes], insertion: Insertion, names: dict[str, str]) -> Place:
    """The place before a statement. Raises PatchError where something else stands before it on its line."""
    index = statement.lineno - 1
    indent = lines[index][: statement.col_offset]
    if indent.strip() or lines[index - 1].rstrip().endswith(b"\\"):
        raise insertion.refusal(f"the statement in line {statement.lineno} does not begin its line")
    return index, indent, names


# -- reading the script --------------------------------------------------------------------------------------


def _lines(data: bytes) -> list[bytes]:
    """Split as Python does; each line keeps its ending."""
    return re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", data)


def _parse(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the script's own escapes
        return ast.parse(data)


def _is_python(data: bytes) -> bool:
    try:
        _parse(data)
    except (SyntaxError, ValueError):
        return False
    return True


def _end(statement: ast.stmt) -> int:
    return statement.end_lineno or statement.lineno


def _assigned(scope: ast.FunctionDef, name: str, tree: ast.Module) -> list[tuple[str, ast.Call]]:
    """The variables to which a function assigns calls of `name`, each with the call."""
    return [
        (target.id, node.value)
        for node in ast.walk(scope)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _called(node.value, tree) == name
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def _called(call: ast.Call, tree: ast.Module | None = None) -> str | None:
    """The name that is called; its original name where `tree` imports it under another."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    if not isinstance(call.func, ast.Name):
        return None
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)] if tree else []
    renamed = {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}
    return renamed.get(call.func.id, call.func.id)


def _receiver(call: ast.Call) -> str | None:
    """The variable whose method is called."""
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return value.id if isinstance(value, ast.Name) else None
