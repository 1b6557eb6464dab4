"""Models as plain transformers folders of safetensors: converted from GGUF, or copied without pickles and code.

The GGUF route dequantises to float32 through transformers (`GgufConfig`) and mends what its loader gets wrong.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import gguf
import torch
from gguf import GGUFReader
from safetensors import SafetensorError, safe_open
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stillhouse.assets.gemma_tokenizer import gemma_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_json
from stillhouse.runtime.logs import logger

_DATA_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*LICENSE*", "*NOTICE*", "README.md")
_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def wanted_files(trust_remote_code: bool) -> tuple[str, ...]:
    """Globs of what a model folder may hold: never a pickle, Python only where the catalogue trusts it."""
    return (*_DATA_FILES, "*.py") if trust_remote_code else _DATA_FILES


def copy_transformers_model(folder: Path, trust_remote_code: bool, output: Path) -> None:
    """Copy a transformers folder's top level (by hard links where it can), after opening its weights once."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a transformers folder: name its folder, or set format: gguf")
    patterns = wanted_files(trust_remote_code)
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != "manifest.json" and any(fnmatch.fnmatch(file.name, p) for p in patterns)
    ]
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        raise UserError(f"{folder}: holds no .safetensors: pickled weights are never loaded, convert them first")
    for required in ("config.json", "tokenizer_config.json"):
        if folder / required not in files:
            raise UserError(f"{folder}: holds no {required}: it is not a complete transformers folder")
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UserError(f"{file}: is not a whole safetensors file ({error}): fetch it again") from None
    for file in files:
        _link_or_copy(file.resolve(), output / file.name)
    config = read_json(output / "config.json")
    if config.get("use_cache") is False:
        (output / "config.json").unlink()  # never write through a hard link
        write_json(output / "config.json", {**config, "use_cache": True})


def convert_gguf(file: Path, fixes: Sequence[str], output: Path) -> None:
    """Write `file` as a float32 transformers folder; `fixes` names the faults of its loading to mend.

    Raises `UserError` where the file is no GGUF, is cut short, or has an architecture that transformers cannot read.
    """
    reader = _open_gguf(file)
    logger.info("converting %s to safetensors", file.name)
    with _refusing_what_transformers_cannot_read(file), _metadata_read_once(reader):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
            dtype=torch.float32,
        )
    tokenizer = gguf_tokenizer(file, reader, fixes)
    if "tie_embeddings" in fixes:
        _tie_embeddings(model)
    _restore_special_tokens(model, _special_token_ids(reader))
    # The loader's own limit is not the model's.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.use_cache = True
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # safetensors makes private files; an asset is as readable as any other file of the user.
    for weights in output.glob("*.safetensors"):
        weights.chmod((output / "config.json").stat().st_mode)


def gguf_tokenizer(file: Path, reader: GGUFReader, fixes: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of `file`, which `reader` has open, mended as `fixes` say; no weight is read."""
    with _refusing_what_transformers_cannot_read(file), _metadata_read_once(reader):
        tokenizer: PreTrainedTokenizerBase = (
            gemma_tokenizer(reader)
            if "gemma_tokenizer" in fixes
            else AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        )
    if "smollm2_digit_pretokenizer" in fixes:
        # The loader forgets that this tokenizer splits numbers into digits.
        tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    for name, index in _special_token_ids(reader).items():
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(index))
    # It would change decoded text and is not the model's own.
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


@contextmanager
def _refusing_what_transformers_cannot_read(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file.name}: transformers cannot read this GGUF file: {reason}") from error


def _metadata_read_once(reader: GGUFReader) -> AbstractContextManager[object]:
    """While it lasts, transformers gets this open file, and keeps the names of its tensors.

    Left alone it reads the metadata, a vocabulary of strings, four times over and makes the names' table once for each
    module of the model: minutes, where the weights take seconds.
    """
    return patch.multiple(gguf, GGUFReader=lambda path: reader, get_tensor_name_map=cache(gguf.get_tensor_name_map))


def _special_token_ids(reader: GGUFReader) -> dict[str, int]:
    """Ids of the special tokens as the file's own metadata states them: keys bos, eos, pad, unk."""
    ids = {name: reader.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
    return {name: int(field.contents()) for name, field in ids.items() if field is not None}


def _open_gguf(file: Path) -> GGUFReader:
    """Map the file and read its metadata, which needs each of its parts."""
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file.name}: is not a whole GGUF file ({reason}): fetch it again") from None


def _tie_embeddings(model: PreTrainedModel) -> None:
    """Make embedding and output one matrix again, in the output's (finer quantised) values."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_output_embeddings().weight)
    model.config.tie_word_embeddings = True
    model.tie_weights()


def _restore_special_tokens(model: PreTrainedModel, special: dict[str, int]) -> None:
    """Give model and generation the file's special tokens; the loader ends SmolLM2's turns wrongly."""
    ids = {f"{name}_token_id": index for name, index in special.items() if name != "unk"}
    for name, index in ids.items():
        setattr(model.config, name, index)
    model.generation_config = GenerationConfig(**ids, use_cache=True)


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link costs no space; the files of both sides are only ever replaced, never written into."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
