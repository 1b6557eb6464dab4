"""Step program: the study's tables, and its section of the results page with what the numbers say.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.reporting.steps import ReportStep
from stillhouse.reporting.sweeps import Sweeps
from stillhouse.reporting.tables import Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.consistency_lens.comparisons import (
    DECISIVE,
    LABELS,
    Comparison,
    Subject,
    comparisons,
    load_evaluations,
    recovered,
    subjects,
    top1,
    variance_explained,
)
from stillhouse.studies.consistency_lens.results import CONTROLS, MEAN
from stillhouse.studies.consistency_lens.sweeps import sweeps
from stillhouse.studies.consistency_lens.tables import best_of_table, checkpoint_table, control_table, lens_table

FIGURES = {
    "controls": "Every baseline and control beside the lens",
    "best_of_k": "The best of K sampled explanations",
    "losses": "The loss and its terms over training",
    "schedules": "Temperature, alpha and learning rates over training",
}
BY_LAYER = {"variance_by_layer": "What is recovered at each layer"}
QUESTION = (
    "Can an activation be put into words that carry what it does? A decoder turns the residual stream at one token of "
    "a document into T tokens of text, an encoder turns the text back into an activation, and the original model goes "
    "on with that in the activation's place. KL is between its next-token predictions with the activation and with the "
    "reconstruction. A reconstruction can be good for reasons that have nothing to do with the words, so the lens "
    "stands beside controls that ignore the activation or take the words apart."
)
CORRECTIONS = (
    "Evaluation is on documents that no lens was trained on, without Gumbel noise; the published tool evaluated with "
    "the noise of training.",
    "The partner of the resample term comes from another document, by one drawing for the whole split; the published "
    "extraction drew it among the few texts of one batch.",
    "A document that is too short for the position limit is left out and counted; the published extraction took an "
    "earlier token instead.",
    "Activations are stored as safetensors with their digests; the published shards were pickles.",
    "Every number has its n and a 95 % interval; controls are paired with the lens on the same documents, p-values "
    "adjusted for their number.",
)
LANGUAGE_MODEL = {
    "aligned": "The language-model term compares the decoder's distribution over a token with the original's over the "
    "same token; the published code compared it with the one after (`loss.language_model_positions: one_late`).",
    "one_late": "**As published:** the language-model term compares the decoder's distribution over a token with the "
    "original's over the token after it.",
}
# Below this share of different texts, the decoder says much the same of everything.
COLLAPSED = 0.5


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    chosen, swept = subjects(evaluations), sweeps(evaluations)
    tables = [lens_table(chosen), control_table(chosen), best_of_table(chosen), checkpoint_table(chosen)]
    with staged_directory(step.tables) as directory:
        for table in [*tables, *swept.tables()]:
            write_table(table, directory)
    atomic_write_text(step.section, section(chosen, tables, swept))


def section(chosen: Sequence[Subject], tables: Sequence[Table], swept: Sweeps) -> str:
    """The study's section in Markdown."""
    lenses, controls, best_of, checkpoints = (table.to_markdown() for table in tables)
    figures = FIGURES | (BY_LAYER if len({subject.facts.layer for subject in chosen}) > 1 else {})
    links = "\n".join(f"![{text}](figures/consistency_lens/{name}.png)\n" for name, text in figures.items())
    models = dict.fromkeys(subject.evaluation.results.model for subject in chosen)
    parts = [
        "## Consistency lens",
        QUESTION,
        "### Does the text carry the activation?",
        "\n".join(f"- {finding(subject)}" for subject in chosen),
        lenses,
        "Single activations with their explanations, predictions and continuations: "
        + ", ".join(f"[{model}](consistency_lens/{model}/samples.html)" for model in models)
        + ".",
        "### Against baselines and controls",
        controls,
        "\n".join(f"- *{LABELS[name]}*: {text}." for name, text in CONTROLS.items()),
        links,
        *(["### Best of K", best_of] if any(subject.sample_counts for subject in chosen) else []),
        *swept.section(),
        "### Checkpoints",
        f"<details><summary>Every checkpoint</summary>\n\n{checkpoints}\n</details>",
        "### Data, models and protocol",
        "\n".join(f"- {note}" for note in [*sources(chosen), *protocol(chosen)]),
        "The same tables as CSV and LaTeX: [tables/consistency_lens](tables/consistency_lens).",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def finding(subject: Subject) -> str:
    """What came out for one condition, in words that its intervals decide."""
    found = {one.variant: one for one, _ in comparisons(subject)}
    share, variance, same = recovered(subject), variance_explained(subject), top1(subject)
    name = f"`{subject.evaluation.results.model}`, `{subject.condition}` (layer {subject.facts.layer})"
    numbers = (
        f"the lens recovers {format_estimate(share, 1, 100)} % of the mean activation's KL and explains "
        f"{format_estimate(variance, 1, 100)} % of the variance; the top prediction stays in "
        f"{format_estimate(same, 1, 100)} % of {same.n} documents"
    )
    return f"{name}: {numbers}. {verdict(found)} {shortfalls(found)} {order(found)} {collapse(subject)}".strip()


def verdict(found: dict[str, Comparison]) -> str:
    """Whether the words matter: the lens against the mean, and against texts that ignore the activation."""
    unbeaten = [LABELS[variant] for variant in DECISIVE if not found[variant].lens_is_better]
    if not found[MEAN].lens_is_better:
        return "**No: the reconstruction is not measurably better than the mean activation, whatever the text says.**"
    if unbeaten:
        return (
            "**Not shown: the reconstruction beats the mean activation, but not texts that ignore the activation "
            f"({', '.join(unbeaten)}), so that the words need not be what carries it.**"
        )
    return (
        "**Yes, in part: the reconstruction beats the mean activation and every text that ignores the activation, so "
        "the words carry something of it.**"
    )


def shortfalls(found: dict[str, Comparison]) -> str:
    """What needs no explanation and does as well or better: the original's own words, and a regression on them."""
    sentences = []
    for variant, better in (
        ("original_tokens", "the document's own last tokens say no more to the encoder than the explanation"),
        ("text_regression", "a regression that reads the input text alone predicts the activation less well"),
        ("untrained", "training made it better"),
    ):
        one = found[variant]
        if one.lens_is_better:
            sentences.append(f"{better} ({LABELS[variant]}: {difference(one)})")
        elif one.lens_is_worse:
            sentences.append(f"{LABELS[variant]} does better than the lens ({difference(one)})")
        else:
            sentences.append(f"{LABELS[variant]} is not told apart from the lens ({difference(one)})")
    text = "; ".join(sentences)
    return f"{text[0].upper()}{text[1:]}."


def order(found: dict[str, Comparison]) -> str:
    """Whether the order of the words matters."""
    one = found["shuffled"]
    if one.lens_is_better:
        return f"The order of the words matters ({difference(one)} when shuffled)."
    if found["other_explanation"].lens_is_better:
        return f"The order of the words does not measurably help ({difference(one)} when shuffled): a bag of words."
    return f"Shuffling the words makes it no worse ({difference(one)})."


def collapse(subject: Subject) -> str:
    """A warning where the decoder says much the same of every activation."""
    texts = [one.diversity for one in subject.measurements if one.diversity]
    distinct = sum(text.distinct_texts for text in texts) / len(texts)
    if distinct >= COLLAPSED:
        return ""
    return f"The decoder has collapsed: only {distinct:.0%} of its texts are different."


def difference(one: Comparison) -> str:
    """A control's KL minus the lens's with its interval."""
    sign = "+" if one.estimate.value >= 0 else ""
    return f"{sign}{format_estimate(one.estimate, 3)} nats"


def sources(chosen: Sequence[Subject]) -> list[str]:
    """Where documents and models come from."""
    results = [subject.evaluation.results for subject in chosen]
    notes = dict.fromkeys(
        note
        for one in results
        for note in (f"Data `{one.dataset}`: {one.dataset_note}", f"Model `{one.model}`: {one.model_note}")
    )
    return [f"{note.rstrip('.')}." for note in notes]


def protocol(chosen: Sequence[Subject]) -> list[str]:
    """What differs from the published protocol, and where a run follows it, mistakes included."""
    results, terms = chosen[0].evaluation.results, {subject.facts.language_model_positions for subject in chosen}
    choices = {
        "validation_kl": "The checkpoint is chosen by KL on validation documents"
        + (" and scored on others." if results.split == "test" else ", which it is scored on too: that flatters it."),
        "last": "The last checkpoint is scored, whatever validation says.",
    }
    return [
        choices[str(results.evaluation["selection"])],
        *(LANGUAGE_MODEL[term] for term in sorted(terms)),
        *CORRECTIONS,
    ]


if __name__ == "__main__":
    run_step(ReportStep, main)
