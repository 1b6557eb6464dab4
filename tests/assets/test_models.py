"""Models become plain transformers folders of safetensors, or the fault of their files is named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.assets.gemma_tokenizer import gemma_tokenizer
from stillhouse.assets.materialise import ModelStep, main
from stillhouse.assets.models import convert_gguf, copy_transformers_model
from stillhouse.config.assets import ModelEntry, PathSource
from stillhouse.config.catalogue import MODELS
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import sha256_file, verify_manifest
from tests.assets.gguf_files import make_gemma_tokenizer_gguf, make_gguf


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_gguf_file_becomes_a_float32_folder_that_reloads(gguf: Path, tmp_path: Path) -> None:
    entry = ModelEntry(sources=(PathSource(path=str(gguf)),), format="gguf", sha256=sha256_file(gguf))
    main(ModelStep(kind="model", name="tiny", entry=entry, output=tmp_path / "tiny"))
    verify_manifest(tmp_path / "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert json.loads((tmp_path / "tiny/config.json").read_text())["use_cache"] is True
    assert oct((tmp_path / "tiny/model.safetensors").stat().st_mode) == oct(
        (tmp_path / "tiny/config.json").stat().st_mode
    )


def test_special_tokens_are_those_of_the_gguf_file(gguf: Path, tmp_path: Path) -> None:
    convert_gguf(gguf, (), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_the_digit_fix_splits_numbers_into_digits(gguf: Path, tmp_path: Path) -> None:
    convert_gguf(gguf, (), tmp_path / "as_loaded")
    convert_gguf(gguf, ("smollm2_digit_pretokenizer",), tmp_path / "mended")
    as_loaded, mended = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("as_loaded", "mended"))
    assert len(as_loaded("12").input_ids) == 1
    assert len(mended("12").input_ids) == 2


def test_the_tie_fix_makes_embedding_and_output_one_matrix_of_the_output_values(gguf: Path, tmp_path: Path) -> None:
    convert_gguf(gguf, (), tmp_path / "untied")
    convert_gguf(gguf, ("tie_embeddings",), tmp_path / "tied")
    untied, tied = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("untied", "tied"))
    assert tied.config.tie_word_embeddings
    assert tied.num_parameters() < untied.num_parameters()
    assert torch.equal(tied.get_input_embeddings().weight, untied.get_output_embeddings().weight)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight


def test_gemmas_merges_are_rebuilt_from_the_scores_and_survive_a_reload(tmp_path: Path) -> None:
    tokenizer = gemma_tokenizer(GGUFReader(make_gemma_tokenizer_gguf(tmp_path / "gemma.gguf")))
    tokenizer.save_pretrained(tmp_path / "saved")
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert each.tokenize("cap cap") == ["cap", "▁cap"]
        assert each.tokenize("capap") == ["cap", "ap"]
        assert each.tokenize("ca  ca") == ["ca", "▁▁", "ca"]
        assert each("cap").input_ids == [each.bos_token_id, 7]
        assert each.decode(each("cap  cap").input_ids, skip_special_tokens=True) == "cap  cap"


@pytest.mark.parametrize("kept", [0, 3, 2000, -100])
def test_a_gguf_file_cut_short_is_named(gguf: Path, tmp_path: Path, kept: int) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"broken\.gguf: is not a whole GGUF file .*: fetch it again"):
        convert_gguf(broken, (), tmp_path / "out")


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.gguf").write_bytes(b"these are not weights" * 100)
    with pytest.raises(UserError, match=r"notes\.gguf: is not a whole GGUF file"):
        convert_gguf(tmp_path / "notes.gguf", (), tmp_path / "out")


def test_a_transformers_folder_is_copied_without_pickles_and_code(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    for name in ("pytorch_model.bin", "modeling_mine.py", "training_args.pt"):
        (source / name).write_bytes(b"code")
    (source / "config.json").write_text(
        (source / "config.json").read_text().replace('use_cache": true', 'use_cache": false')
    )
    before = (source / "config.json").read_bytes()
    entry = ModelEntry(sources=(PathSource(path=str(source)),))
    main(ModelStep(kind="model", name="mine", entry=entry, output=tmp_path / "mine"))
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not names & {"pytorch_model.bin", "modeling_mine.py", "training_args.pt"}
    assert json.loads((tmp_path / "mine/config.json").read_text())["use_cache"] is True
    assert (source / "config.json").read_bytes() == before


def test_python_files_are_kept_only_where_the_entry_trusts_them(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    (source / "modeling_mine.py").write_text("")
    (tmp_path / "out").mkdir()
    copy_transformers_model(source, True, tmp_path / "out")
    assert (tmp_path / "out/modeling_mine.py").exists()


def test_a_folder_with_pickled_weights_alone_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \.safetensors: pickled weights are never loaded"):
        copy_transformers_model(source, False, tmp_path / "out")


@pytest.mark.fault("model file copied by half", "refused; the line names the file")
def test_a_half_copied_safetensors_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_model, source)
    os.truncate(source / "model.safetensors", 10_000)
    with pytest.raises(UserError, match=r"model\.safetensors: is not a whole safetensors file"):
        copy_transformers_model(source, False, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_converts_from_its_package(tmp_path: Path) -> None:
    from stillhouse.assets.cache import cache_directory

    entry = MODELS["smollm2_135m"]
    wheel = cache_directory() / "packages" / str(entry.sources[0].packages[0].sha256)  # type: ignore[union-attr]
    if not wheel.is_dir():
        pytest.skip("SmolLM2's package is not in the download cache: run the rule that makes the model first")
    main(ModelStep(kind="model", name="smollm2_135m", entry=entry, output=tmp_path / "smollm2"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    assert model.num_parameters() == 134_515_008
    assert tokenizer.eos_token == "<|im_end|>"
    assert [tokenizer.decode([token]) for token in tokenizer("1234").input_ids] == list("1234")
    ids = torch.tensor([tokenizer("The capital of France is").input_ids])
    with torch.no_grad():
        assert tokenizer.decode([int(model(ids).logits[0, -1].argmax())]) == " Paris"
