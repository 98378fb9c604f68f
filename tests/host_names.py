"""Whether names that another package does not promise are there; if not, which, and what version of it that is."""

import ast
import importlib
import inspect
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft_pcgrow

PACKAGE = Path(peft_pcgrow.__file__).parent
HOSTS = sorted(PACKAGE.glob("*/host.py"))


def missing(package: str, signatures: Mapping[str, tuple[str, ...] | None], held: Mapping[str, Any]) -> list[str]:
    """What is not as this library needs it, one line each.

    Args:
        package: that the names are of.
        signatures: by a name's whole path, the parameters that it is called with, in order; None: it is not called, or
            does not tell.
        held: by the path of an attribute, whose last part is its name, an object that should have it.
    """
    said = f"{package} {version(package)}"
    found = []
    for path, parameters in signatures.items():
        try:
            thing = resolve(path)
        except (ImportError, AttributeError):
            found.append(f"{said} has no {path}, which peft_pcgrow needs: see {where(path)}")
            continue
        if parameters is not None and (why := misfit(thing, parameters)) is not None:
            found.append(f"{path} of {said} {why}, and peft_pcgrow calls it with {parameters}: see {where(path)}")
    for path, thing in held.items():
        if not hasattr(thing, path.rpartition(".")[2]):
            found.append(f"{said} has no {path} any more, which peft_pcgrow needs: see {where(path)}")
    return found


def resolve(path: str) -> Any:
    """What a dotted path stands for, the longest part of it that is a module imported."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


def misfit(thing: Any, parameters: tuple[str, ...]) -> str | None:
    """Why something cannot be called with these parameters."""
    taken = inspect.signature(thing).parameters
    some = [name for name in taken if name in parameters]
    if some != list(parameters):
        return f"takes ({', '.join(taken)})"
    other = [p for p in taken.values() if p.name not in parameters and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    wanted = [p.name for p in other if p.default is p.empty]
    return f"wants {', '.join(wanted)} too" if wanted else None


def where(path: str) -> str:
    """The files that name the last part of a path."""
    name = path.rpartition(".")[2]
    found = [file for file in HOSTS if name in listed(file)]
    return ", ".join(file.relative_to(PACKAGE.parent).as_posix() for file in found) or "no file called host.py"


def listed(file: Path) -> set[str]:
    """The names that a file imports, reads or has as strings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def unlisted(package: Path) -> Iterator[str]:
    """Names behind an underscore that the files of a package take of others and that none called host lists."""
    files = sorted(package.rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    known = set().union(*(listed(path) for path in files if path.name == "host.py"))
    own = {name for tree in trees.values() for name in defined(tree)}
    for path, tree in trees.items():
        if path.name == "host.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("peft_pcgrow"):
                parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                found = [name for name in parts if private(name)]
            elif isinstance(node, ast.Attribute):
                found = [node.attr] if private(node.attr) and node.attr not in own | known else []
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
                name = getattr(node.args[1], "value", "")
                found = [name] if private(str(name)) and name not in own | known else []
            else:
                continue
            yield from (f"{path.name}:{node.lineno} {name}" for name in found)


def defined(tree: ast.Module) -> Iterator[str]:
    """What a file defines: functions, classes, variables, attributes of its objects' own."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and (node.ctx.__class__, ast.unparse(node.value)) == (ast.Store, "self"):
            yield node.attr


def private(name: str) -> bool:
    """`_fields` of named tuples is documented."""
    return name.startswith("_") and not name.startswith("__") and name != "_fields"
