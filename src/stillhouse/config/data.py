"""Settings of a study's data: the data set, and its division into train, validation and test by seed."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class SplitSettings(StrictModel):
    """Where one of our splits comes from: a published split, and how many of its examples."""

    source: Annotated[str, Field(description="Name of the data set's own split.")]
    size: Annotated[int | None, Field(ge=1, description="Examples; null takes what the other splits leave.")] = None


class DataSettings(StrictModel):
    """A data set of the catalogue and its division, where one published split may feed several of ours."""

    dataset: str
    split_seed: int = 42
    group_by: Annotated[
        str | None,
        Field(description="Field whose values stay on one side, such as title; a split is then filled up to its size."),
    ] = None
    train: SplitSettings
    validation: SplitSettings
    test: SplitSettings
