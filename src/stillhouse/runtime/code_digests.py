"""Digests of code over the closure of its first-party imports: what makes a result stale when code changes.

A digest covers a module's syntax tree without docstrings, so comments, formatting and documentation never rerun
anything. Files that are not Python but shape results are listed as `DATA_FILES` in the module that reads them and
count by their bytes. In configuration modules (`config`, `..._settings`) only functions count: their values reach a
step through its params, so that a new default or condition reruns what reads it and nothing else. The rules store
`code_digests(module)` in their params; run records and fingerprints hold the same.

What was found in a file is kept beside the bytecode, by the sha256 of the file, so that a dry run parses what changed.
"""

from __future__ import annotations

import ast
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text

PACKAGE = "stillhouse"
SOURCE_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Source:
    """What counts of a module's file. text: sha256 of its bytes; tree: of its syntax tree; imports: names, resolved."""

    text: str
    tree: str
    imports: list[str]
    data_files: list[str]


@dataclass
class Kept:
    """What was found in the modules' files. changed: by this process, since it was written."""

    sources: dict[str, Source]
    changed: bool = False


def code_digests(module: str) -> dict[str, str]:
    """Map each first-party module that `module` reaches, itself included, to the digest of its syntax tree.

    Digests are shortened to 12 digits. Raises `ModuleNotFoundError` for a module that has no source file.
    """
    digests = {name: _module_digest(name) for name in import_closure(module)}
    _keep(_kept())
    return digests


@cache
def import_closure(module: str) -> tuple[str, ...]:
    """The first-party modules that `module` reaches through imports anywhere in its text, sorted."""
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        waiting.extend(_first_party_imports(name))
    return tuple(sorted(reached))


def module_path(module: str) -> Path | None:
    """The source file of a first-party module, None if there is no such module."""
    base = SOURCE_ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _source(module: str) -> Source:
    """What a module's file holds: as it was kept, where the file is still the same."""
    path = module_path(module)
    if path is None:
        raise ModuleNotFoundError(f"no source file for module {module} below {SOURCE_ROOT}")
    content = path.read_bytes()
    text = hashlib.sha256(content).hexdigest()
    kept = _kept()
    if module in kept.sources and kept.sources[module].text == text:
        return kept.sources[module]
    tree = _without_docstrings(ast.parse(content, filename=str(path)))
    holds_settings = module.startswith(f"{PACKAGE}.config.") or module.endswith((".config", "_settings"))
    canonical = _canonical(tree, with_values=not holds_settings)
    imports = _imported_names(tree, module if path.name == "__init__.py" else module.rpartition(".")[0])
    source = Source(text, hashlib.sha256(canonical.encode()).hexdigest(), sorted(imports), _data_files(tree))
    kept.sources[module], kept.changed = source, True
    return source


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del node.body[0]
    return tree


def _imported_names(tree: ast.Module, package: str) -> set[str]:
    """The names below our package that a module of `package` imports: modules, and what may be one."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] == PACKAGE}


@cache
def _first_party_imports(module: str) -> tuple[str, ...]:
    """The first-party modules that one module names, with the packages around them."""
    modules = {name for name in _source(module).imports if module_path(name)}
    return tuple(modules | {parent for name in (*modules, module) for parent in _parents(name)})


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@cache
def _module_digest(module: str) -> str:
    source, path = _source(module), module_path(module)
    if not source.data_files:
        return source.tree[:12]
    assert path is not None
    hasher = hashlib.sha256(source.tree.encode())
    for name in source.data_files:
        hasher.update((path.parent / name).read_bytes())
    return hasher.hexdigest()[:12]


@cache
def _kept() -> Kept:
    """What earlier processes kept; nothing where this module has changed since, or nothing can be read."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        kept = json.loads(_kept_path().read_bytes())
        if kept["by"] == _own_text():
            return Kept({name: Source(**facts) for name, facts in kept["sources"].items()})
    return Kept({})


def _keep(kept: Kept) -> None:
    if kept.changed:
        facts = {name: asdict(source) for name, source in sorted(kept.sources.items())}
        # Where the folder cannot be written every process parses anew, as Python compiles anew.
        with suppress(OSError, UserError):
            atomic_write_text(_kept_path(), json.dumps({"by": _own_text(), "sources": facts}))
        kept.changed = False


def _kept_path() -> Path:
    return SOURCE_ROOT / PACKAGE / "__pycache__" / "code_digests.json"


@cache
def _own_text() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _data_files(tree: ast.Module) -> list[str]:
    """The literal list of a module's `DATA_FILES`, names relative to its folder."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "DATA_FILES" for target in node.targets
        ):
            return sorted(ast.literal_eval(node.value))
    return []


def _canonical(node: ast.AST, with_values: bool) -> str:
    """Write a tree as text that does not depend on the Python version.

    `ast.dump` does: newer versions add fields and leave out empty ones. Here empty fields never count. Without values
    the assignments of a module and its classes are left out; what remains is its functions.
    """
    fields = []
    for name, value in sorted(ast.iter_fields(node)):
        if name == "body" and not with_values and isinstance(node, (ast.Module, ast.ClassDef)):
            value = [item for item in value if not isinstance(item, (ast.Assign, ast.AnnAssign))]
        text = _canonical_value(value, with_values)
        if text not in ("None", "[]"):
            fields.append(f"{name}={text}")
    return f"{type(node).__name__}({','.join(fields)})"


def _canonical_value(value: object, with_values: bool) -> str:
    if isinstance(value, ast.AST):
        return _canonical(value, with_values)
    if isinstance(value, list):
        return f"[{','.join([_canonical_value(item, with_values) for item in value])}]"
    return repr(value)
