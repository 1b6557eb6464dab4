"""What the study's figures and tables share: measures, seeds taken together, and the latent against its rivals.

Stands above `results`; no torch here. Every number is an estimate from the test split's items, at checkpoints that
evaluation chose, and every comparison is paired on the same items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stillhouse.evaluation.statistics import (
    Estimate,
    bootstrap_ratio_interval,
    paired_difference_over_seeds,
    paired_rate_interval,
    wilson_interval,
)
from stillhouse.studies.latentwire.config import Arm
from stillhouse.studies.latentwire.results import (
    COMBINED,
    Evaluation,
    Floats,
    Measurement,
    load_evaluation,
    numbers,
    share_interval,
)


@dataclass(frozen=True)
class Measure:
    """What is read off the items: a mean, a rate, or nats over gold tokens."""

    column: str
    name: str
    axis: str
    kind: str = "mean"
    limit: int = 0

    @property
    def scale(self) -> float:
        """Factor from values to the axis: shares are drawn in per cent."""
        return 1.0 if self.kind == "per_token" else 100.0

    @property
    def digits(self) -> int:
        """Decimals for people."""
        return 3 if self.kind == "per_token" else 1


F1 = Measure("f1", "F1", "F1 (%)")
EXACT = Measure("exact", "exact match", "Exact match (%)", kind="rate")
GOLD_NLL = Measure("gold_nll", "gold NLL", "Gold answer NLL\n(nats per token, lower is better)", kind="per_token")
FIRST_AT_1 = Measure("first_token_rank", "FirstTok@1", "FirstTok@1 (%)", kind="rate", limit=1)
FIRST_AT_5 = Measure("first_token_rank", "FirstTok@5", "FirstTok@5 (%)", kind="rate", limit=5)

ARM_NAMES: dict[Arm, str] = {
    "full_text": "full text",
    "replay_raw": "replay of its embeddings",
    "replay_anchor": "replay in the latents' place",
    "replay_adapter": "replay, calibrated",
    "latent": "latent",
    "byte_budget_compressed": "text, compressed",
    "byte_budget_cut": "text, cut",
    "token_budget_content_only": "text, cut to tokens",
    "token_budget_chat_full": "chat prompt, cut to tokens",
    "no_context": "question alone",
}
COMBINED_ARMS: tuple[Arm, ...] = ("latent", "full_text")
COMBINED_NAMES = {"joint_rescoring": "joint choice", "oracle": "best of both (oracle)", "agreement": "agreement"}


@dataclass(frozen=True)
class Entry:
    """One thing that was measured, with the measurements of all its seeds at the reported checkpoints."""

    arm: Arm
    reader: str
    measurements: tuple[Measurement, ...]

    @property
    def first(self) -> Measurement:
        """The first seed's; what is the same for all seeds can be read off it."""
        return self.measurements[0]

    @property
    def bytes(self) -> float | None:
        """Mean bytes that are sent for a prompt, None where the arm sends none that count."""
        sizes = [one.bytes for one in self.measurements if one.bytes is not None]
        return float(np.mean(sizes)) if sizes else None

    @property
    def label(self) -> str:
        """How figures and tables call the arm with its budget."""
        name = ARM_NAMES[self.arm]
        if self.arm.startswith("byte_budget"):
            return f"{name} ({self.first.budget:,} B)"
        if self.arm.startswith("token_budget"):
            return f"{name} ({self.first.budget})"
        return name


@dataclass(frozen=True)
class Comparison:
    """One entry minus another on the same items."""

    entry: Entry
    other: Entry
    difference: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def estimate(self) -> Estimate:
        """The difference as an estimate, for tables and error bars."""
        return Estimate(self.difference, self.low, self.high, self.n)

    @property
    def verdict(self) -> str:
        """Which of the two is higher, as far as the interval says."""
        if self.low > 0:
            return "higher"
        return "lower" if self.high < 0 else "undecided"


def load_evaluations(results: Sequence[Path]) -> list[Evaluation]:
    """The evaluation behind each `results.json`; `UserError` names a missing or damaged file."""
    return [load_evaluation(path) for path in results]


def entries(evaluation: Evaluation, arm: Arm, reader: str) -> list[Entry]:
    """An arm as one reader reads it: by channel and format, or by budget; seeds together."""
    groups: dict[tuple[str, str, int], list[Measurement]] = {}
    order = list(dict.fromkeys(channel.condition for channel in evaluation.results.channels))
    found = evaluation.results.of(arm, reader)
    for one in sorted(found, key=lambda m: order.index(m.condition) if m.condition else -1):
        groups.setdefault((one.condition, one.wire, one.budget), []).append(one)
    return [Entry(arm, reader, tuple(group)) for group in groups.values()]


def headline(evaluation: Evaluation, reader: str) -> Entry | None:
    """The latent of the headline's channel and format, None where it was not measured."""
    results = evaluation.results
    wanted = (results.condition, results.wire)
    found = [one for one in entries(evaluation, "latent", reader) if (one.first.condition, one.first.wire) == wanted]
    return found[0] if found else None


def rival(evaluation: Evaluation, arm: Arm, latent: Entry) -> Entry | None:
    """A budget arm at what the latent takes: its bytes, or its vectors as tokens."""
    wanted = latent.bytes if arm.startswith("byte_budget") else latent.first.prompt_tokens
    found = [one for one in entries(evaluation, arm, latent.reader) if one.first.budget == wanted]
    return found[0] if found else None


def arm_entries(evaluation: Evaluation, reader: str) -> list[Entry]:
    """One entry per arm for a reader, budgets at what the headline's latent takes, best bound first."""
    latent, found = headline(evaluation, reader), []
    for arm in ARM_NAMES:
        if arm == "latent":
            found.append(latent)
        elif "_budget_" in arm:
            found.append(rival(evaluation, arm, latent) if latent else None)
        else:
            found.append(next(iter(entries(evaluation, arm, reader)), None))
    return [one for one in found if one is not None]


def combined_entries(evaluation: Evaluation, arm: Arm) -> list[Entry]:
    """Joint choice, oracle and agreement over an arm's answers."""
    found = []
    for kind in COMBINED:
        for one in entries(evaluation, arm, kind):
            if not one.first.wire or one.first.wire == evaluation.results.wire:
                found.append(one)
    return found


def estimate(evaluation: Evaluation, entry: Entry, measure: Measure) -> Estimate | None:
    """A measure with its 95 % interval over items, and over seeds where there are several; None where not measured."""
    found = _values(evaluation, entry, measure)
    if found is None:
        return None
    values, units = found
    if len(values) > 1:
        both = paired_difference_over_seeds(values, np.zeros_like(values), units)
        return Estimate(both.difference, both.low, both.high, both.n)
    if measure.kind == "rate":
        return wilson_interval(round(values[0].sum()), len(units))
    if measure.kind == "per_token":
        return bootstrap_ratio_interval(values[0], units)
    return share_interval(values[0])


def top_first_token_share(entry: Entry) -> float | None:
    """The share of the most frequent first token, the mean over seeds; None where it was not measured."""
    shares = [one.top_first_token_share for one in entry.measurements if one.top_first_token_share is not None]
    return float(np.mean(shares)) if shares else None


def compare(evaluation: Evaluation, entry: Entry, other: Entry, measure: Measure) -> Comparison | None:
    """`entry` minus `other` by paired bootstrap over items, and over seeds where there are several.

    The interval of a share is never narrower than Bonett and Price's of as many whole items: the bootstrap's is a
    point where no item tells the two apart.
    """
    ours, theirs = _values(evaluation, entry, measure), _values(evaluation, other, measure)
    if ours is None or theirs is None:
        return None
    seeds = max(len(ours[0]), len(theirs[0]))
    # A text arm has no seed: it meets every seed of the channel.
    first, second = (np.tile(values, (seeds // len(values), 1)) for values, _ in (ours, theirs))
    paired = paired_difference_over_seeds(first, second, ours[1])
    low, high = paired.low, paired.high
    if measure.kind != "per_token":
        apart = (first - second).mean(axis=0)
        whole = paired_rate_interval(apart.clip(min=0).sum(), -apart.clip(max=0).sum(), paired.n)
        low, high = min(low, whole.low), max(high, whole.high)
    return Comparison(entry, other, paired.difference, low, high, paired.p_value, paired.n)


def same_bytes(evaluation: Evaluation, reader: str, measure: Measure = F1) -> Comparison | None:
    """The headline's latent minus the text that a compressor fits into the same bytes: the question of this study."""
    latent = headline(evaluation, reader)
    text = rival(evaluation, "byte_budget_compressed", latent) if latent else None
    return compare(evaluation, latent, text, measure) if latent and text else None


def sample_note(evaluations: Sequence[Evaluation]) -> str:
    """The n and the meaning of the intervals, for a figure's last line."""
    notes = []
    for one in evaluations:
        items = max((m.items for m in one.results.measurements if m.split == "test"), default=0)
        notes.append(f"{one.results.pair}: n = {items} test questions" if len(evaluations) > 1 else f"n = {items}")
    seeds = max(len({s.seed for s in one.results.selections}) for one in evaluations)
    over = f"{seeds} seeds and items" if seeds > 1 else "items; one seed"
    return f"{'. '.join(notes)}. 95 % intervals over {over}."


def _values(evaluation: Evaluation, entry: Entry, measure: Measure) -> tuple[Floats, Floats] | None:
    """Per-item values, [seeds, items] in the order of item ids, and each item's units (tokens or one), [items]."""
    frames = [evaluation.rows[*one.subject.key, one.split] for one in entry.measurements]
    columns = [numbers(frame[measure.column]) for frame in frames]
    known = [~np.isnan(column) for column in columns]
    if not all(there.any() for there in known):
        return None
    values = np.stack([column[there] for column, there in zip(columns, known, strict=True)])
    if measure.limit:
        values = (values <= measure.limit).astype(float)
    units = numbers(frames[0]["gold_tokens"])[known[0]] if measure.kind == "per_token" else np.ones(values.shape[1])
    return values, units
