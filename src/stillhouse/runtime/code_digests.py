"""Digests of code over the closure of its first-party imports: what makes a result stale when code changes.

A digest covers a module's syntax tree without docstrings, so comments, formatting and documentation never rerun
anything. Files that are not Python but shape results are listed as `DATA_FILES` in the module that reads them and
count by their bytes. In configuration modules (`config`, `..._settings`) only functions count: their values reach a
step through its params, so that a new default or condition reruns what reads it and nothing else. The rules store
`code_digests(module)` in their params; run records and fingerprints hold the same.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = "stillhouse"
SOURCE_ROOT = Path(__file__).resolve().parents[2]


def code_digests(module: str) -> dict[str, str]:
    """Map each first-party module that `module` reaches, itself included, to the digest of its syntax tree.

    Digests are shortened to 12 digits. Raises `ModuleNotFoundError` for a module that has no source file.
    """
    return {name: _module_digest(name) for name in import_closure(module)}


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
def _syntax_tree(module: str) -> ast.Module:
    """A module's tree without docstrings."""
    path = module_path(module)
    if path is None:
        raise ModuleNotFoundError(f"no source file for module {module} below {SOURCE_ROOT}")
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del node.body[0]
    return tree


@cache
def _first_party_imports(module: str) -> tuple[str, ...]:
    """The first-party modules that one module names, with the packages around them."""
    is_package = module_path(module) == SOURCE_ROOT.joinpath(*module.split("."), "__init__.py")
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(_syntax_tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    modules = {name for name in names if name.split(".")[0] == PACKAGE and module_path(name)}
    return tuple(modules | {parent for name in (*modules, module) for parent in _parents(name)})


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


@cache
def _module_digest(module: str) -> str:
    tree = _syntax_tree(module)
    holds_settings = module.startswith(f"{PACKAGE}.config.") or module.endswith((".config", "_settings"))
    hasher = hashlib.sha256(_canonical(tree, with_values=not holds_settings).encode())
    path = module_path(module)
    assert path is not None
    for name in _data_files(tree):
        hasher.update((path.parent / name).read_bytes())
    return hasher.hexdigest()[:12]


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
