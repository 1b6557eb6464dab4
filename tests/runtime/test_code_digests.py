"""What counts as a change of code: the syntax tree of everything a module imports, never its comments."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from stillhouse.runtime import code_digests as subject

FILES = {
    "stillhouse/__init__.py": '"""The package."""\n',
    "stillhouse/a/__init__.py": "",
    "stillhouse/a/step.py": "from stillhouse.a import helper\n\ndef main():\n    return helper.value()\n",
    "stillhouse/a/helper.py": "import os\nfrom ..b.deep import answer\n\ndef value():\n    return answer()\n",
    "stillhouse/b/__init__.py": "",
    "stillhouse/b/deep.py": 'DATA_FILES = ["prompt.txt"]\n\ndef answer():\n    """Doc."""\n    return 42\n',
    "stillhouse/b/prompt.txt": "Answer:",
    "stillhouse/b/stranger.py": "x = 1\n",
    "stillhouse/b/config.py": "class Settings:\n    rate: float = 0.1\n\n    def double(self):\n        return 2\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(subject, "SOURCE_ROOT", tmp_path)
    return tmp_path


def forget() -> None:
    """Be as a process that starts."""
    for function in (
        subject.import_closure,
        subject._source,
        subject._first_party_imports,
        subject._module_digest,
        subject._kept,
    ):
        function.cache_clear()


def digests(module: str = "stillhouse.a.step") -> dict[str, str]:
    forget()
    return subject.code_digests(module)


@pytest.fixture(autouse=True)
def forget_the_test_package():
    forget()
    yield
    forget()


def test_the_closure_follows_absolute_and_relative_imports_and_leaves_strangers_out(package: Path) -> None:
    assert set(digests()) == {
        "stillhouse", "stillhouse.a", "stillhouse.a.step", "stillhouse.a.helper", "stillhouse.b", "stillhouse.b.deep",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 42", "return 42  # why"),
        ('"""Doc."""', '"""Other words."""'),
        ("return 42", "return (\n        42\n    )"),
    ],
)
def test_comments_docstrings_and_formatting_change_nothing(package: Path, old: str, new: str) -> None:
    before = digests()
    path = package / "stillhouse/b/deep.py"
    path.write_text(path.read_text().replace(old, new))
    assert digests() == before


def test_a_change_deep_in_the_closure_is_named(package: Path) -> None:
    before = digests()
    path = package / "stillhouse/b/deep.py"
    path.write_text(path.read_text().replace("42", "43"))
    after = digests()
    assert {name for name in before if before[name] != after[name]} == {"stillhouse.b.deep"}


def test_a_data_file_counts_by_its_bytes(package: Path) -> None:
    before = digests()
    (package / "stillhouse/b/prompt.txt").write_text("Answer: ")
    assert digests()["stillhouse.b.deep"] != before["stillhouse.b.deep"]


def test_values_in_configuration_modules_do_not_count_but_their_functions_do(package: Path) -> None:
    before = digests("stillhouse.b.config")
    path = package / "stillhouse/b/config.py"
    path.write_text(path.read_text().replace("0.1", "0.2"))
    assert digests("stillhouse.b.config") == before
    path.write_text(path.read_text().replace("return 2", "return 3"))
    assert digests("stillhouse.b.config") != before


def test_digests_do_not_depend_on_the_fields_that_a_python_version_adds() -> None:

    tree = ast.parse("def f(x):\n    return x\n")
    before = subject._canonical(tree, with_values=True)
    tree.body[0].type_params = []  # Python 3.12 adds this field
    tree.body[0]._fields = (*tree.body[0]._fields, "type_params")
    assert subject._canonical(tree, with_values=True) == before


def test_only_a_changed_file_is_parsed_again(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digests()
    path = package / "stillhouse/a/helper.py"
    path.write_text(path.read_text().replace("return answer()", "return -answer()"))
    parsed = []
    prepare = subject._without_docstrings
    monkeypatch.setattr(subject, "_without_docstrings", lambda tree: parsed.append(tree) or prepare(tree))
    after = digests()
    assert len(parsed) == 1
    assert {name for name in before if before[name] != after[name]} == {"stillhouse.a.helper"}


@pytest.mark.parametrize("damage", ["", "{}", '{"by": 1}', "[1]", "\xff"])
def test_a_damaged_or_foreign_memory_of_earlier_digests_is_nothing(package: Path, damage: str) -> None:
    before = digests()
    (package / "stillhouse/__pycache__/code_digests.json").write_bytes(damage.encode("latin-1"))
    assert digests() == before


def test_digests_need_no_writable_folder(package: Path) -> None:
    (package / "stillhouse/__pycache__").write_text("no folder")
    assert digests() == digests()


def test_each_source_file_is_parsed_once_however_many_rules_ask(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    prepare = subject._without_docstrings
    monkeypatch.setattr(subject, "_without_docstrings", lambda tree: parsed.append(tree) or prepare(tree))
    for _ in range(100):
        subject.code_digests("stillhouse.a.step")
        subject.code_digests("stillhouse.a.helper")
    assert len(parsed) == len(subject.code_digests("stillhouse.a.step"))
