"""Verbose samples: what the lens says of single activations, as records and as a table for the trackers.

`evaluate` collects them; `samples_page` turns them into a page. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.config.base import StrictModel

TABLE_COLUMNS = (
    "condition",
    "document",
    "input",
    "explanation",
    "KL (nats)",
    "KL of the mean (nats)",
    "original predicts",
    "reconstruction predicts",
    "original continues",
    "reconstruction continues",
)


class Prediction(StrictModel):
    """A next token and its probability."""

    token: str
    probability: float


class Sample(StrictModel):
    """One activation: the text around it, its explanation, and what original and reconstruction do with it."""

    document_id: str
    before: str
    token: str
    after: str
    explanation: str
    kl: float
    kl_of_mean: float
    original: tuple[Prediction, ...]
    reconstruction: tuple[Prediction, ...]
    original_continuation: str
    reconstruction_continuation: str


class LensSamples(StrictModel):
    """The samples of one lens at its scored checkpoint."""

    condition: str
    seed: int
    step: int
    layer: int
    samples: tuple[Sample, ...]


class SamplesFile(StrictModel):
    """`samples.json` of a model."""

    model: str
    dataset: str
    split: str
    lenses: tuple[LensSamples, ...]


def table_rows(lenses: Sequence[LensSamples]) -> list[tuple[str, ...]]:
    """The samples as rows of `TABLE_COLUMNS`, for trackers."""
    return [
        (
            lens.condition,
            sample.document_id,
            f"{sample.before}\N{RIGHTWARDS ARROW}{sample.token}\N{LEFTWARDS ARROW}{sample.after}",
            sample.explanation,
            f"{sample.kl:.3f}",
            f"{sample.kl_of_mean:.3f}",
            listed(sample.original),
            listed(sample.reconstruction),
            sample.original_continuation,
            sample.reconstruction_continuation,
        )
        for lens in lenses
        for sample in lens.samples
    ]


def listed(tokens: Sequence[Prediction]) -> str:
    """Predictions in one cell."""
    return ", ".join(f"{one.token!r} {one.probability:.1%}" for one in tokens)
