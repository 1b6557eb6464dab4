"""Step program: the study's tables, and its section of the results page, which says whether a latent beats its bytes.

Every sentence about an outcome is computed. Links are relative to `results/`, where the page lies.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.evaluation.statistics import holm
from stillhouse.reporting.steps import ReportStep
from stillhouse.reporting.tables import Cell, Column, Table, format_estimate, write_table
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import atomic_write_text, staged_directory
from stillhouse.studies.latentwire.comparisons import (
    ARM_NAMES,
    COMBINED_ARMS,
    COMBINED_NAMES,
    EXACT,
    F1,
    FIRST_AT_1,
    FIRST_AT_5,
    GOLD_NLL,
    Comparison,
    arm_entries,
    combined_entries,
    compare,
    entries,
    estimate,
    headline,
    load_evaluations,
    rival,
    same_bytes,
    top_first_token_share,
)
from stillhouse.studies.latentwire.config import Arm
from stillhouse.studies.latentwire.results import AGREEMENT, Evaluation
from stillhouse.studies.latentwire.sweeps import sweeps

FIGURES = {
    "f1_vs_bytes": "F1 against the bytes that are sent, latents and texts on the same axes",
    "arms": "Every arm at the headline's budget",
    "first_token": "The answer's first token, and collapse",
    "diagnostics": "Z and the prefixes while the channels learn",
    "training": "Training curves",
}
QUESTION = (
    "Can a short sequence of learned vectors Z, made once from a text, replace that text in the prompts of two frozen "
    "language models with different tokenisers, and at how many bytes on the wire? An encoder reads the question and "
    "its passage and writes M vectors of d numbers; these are quantised, packed into a file, read back, and turned "
    "by a small adapter per model into embeddings that stand where the text's tokens would. The bar is the same text, "
    "compressed by a standard compressor into the same number of bytes and read as text."
)
CORRECTIONS = (
    "Compression is counted in bytes of the real wire file (header, scales and checksum included) against UTF-8 bytes "
    "of the text, and in tokens apart from that; the published count mixed the two.",
    "The text arms at the same budget are stronger than a text cut to M tokens: cut, and compressed, to the same "
    "bytes. The question stands before the passage, so that a cut loses passage and not question.",
    "EM and F1 are those of SQuAD's official scripts: all gold answers, overlap as multisets.",
    "Anchor, BOS and the place of the answer's first token are the same in training and evaluation, and asserted.",
    "No property of the gold answer reaches an adapter; padding is never a label and never attended to.",
    "Answers are decoded greedily from the first token on; drawing the first token and forbidding an empty answer are "
    "switches, off by default.",
    "Nothing is cut silently: a text that the encoder cannot take whole is refused, or counted where the settings "
    "allow it.",
)
CHOOSERS = {
    "gold_nll": "Checkpoints are chosen by the gold answer's NLL on the validation split, the mean over readers.",
    "f1": "Checkpoints are chosen by F1 on the validation split, the mean over readers.",
    "last": "The last checkpoint of every channel is reported.",
    "best_on_test": "**As published:** checkpoints are chosen by F1 on the test split, which flatters every channel.",
}
BOUNDS: dict[Arm, str] = {"no_context": "the question alone", "full_text": "the full text"}
VERDICTS = {
    "higher": "**beats** the text of the same bytes",
    "lower": "**does not beat** the text of the same bytes; it is worse",
    "undecided": "**does not beat** the text of the same bytes: the interval includes zero",
}


def main(step: ReportStep) -> None:
    """Write the tables and the section."""
    evaluations = load_evaluations(step.results)
    tables = [
        arms_table(evaluations),
        paired_table(evaluations),
        curve_table(evaluations),
        combined_table(evaluations),
        channels_table(evaluations),
    ]
    with staged_directory(step.tables) as directory:
        for table in [*tables, *sweeps(evaluations).tables()]:
            write_table(table, directory)
    atomic_write_text(step.section, section(evaluations, tables))


def readers(evaluations: Sequence[Evaluation]) -> list[tuple[Evaluation, str]]:
    """Every pair with each of its readers."""
    return [(one, reader) for one in evaluations for reader in one.results.reader_names]


def arms_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every arm at the headline's budget."""
    rows = []
    for one, reader in readers(evaluations):
        for entry in arm_entries(one, reader):
            scores = [estimate(one, entry, measure) for measure in (F1, EXACT, GOLD_NLL, FIRST_AT_1, FIRST_AT_5)]
            share, first = top_first_token_share(entry), entry.first
            sizes = (entry.bytes, first.prompt_tokens, first.seconds)
            rows.append((one.results.pair, reader, entry.label, *scores, share, *sizes, first.items))
    columns = (
        Column("pair"),
        Column("reader"),
        Column("arm"),
        Column("f1", "percent_estimate", 1, "F1, %"),
        Column("exact", "percent_estimate", 1, "EM, %"),
        Column("gold_nll", "estimate", 3, "gold NLL, nats/token"),
        Column("first_at_1", "percent_estimate", 1, "FirstTok@1, %"),
        Column("first_at_5", "percent_estimate", 1, "FirstTok@5, %"),
        Column("commonest_first_token", "percent", 1, "commonest first token, %"),
        Column("bytes", "number", 1, "bytes sent"),
        Column("prompt_tokens", "number", 1, "positions read"),
        Column("seconds", "number", 2, "s per prompt"),
        Column("items", "integer", heading="n"),
    )
    caption = (
        "Test split; in brackets 95 % intervals. Bytes sent: mean per prompt. Positions read: tokens or vectors that "
        "carry the content, without BOS and anchor. Seconds: wall-clock from the text to the answer, in batches: "
        "encoding and packing, or cutting, compressing and tokenising, then scoring and decoding. "
        "Equal prompts are read once."
    )
    return Table("arms", caption, columns, tuple(rows))


def paired_table(evaluations: Sequence[Evaluation]) -> Table:
    """The headline's latent minus every other arm."""
    rows: list[tuple[Cell, ...]] = []
    for one, reader in readers(evaluations):
        if not (latent := headline(one, reader)):
            continue
        others = [entry for entry in arm_entries(one, reader) if entry.arm != "latent"]
        found = {m: [compare(one, latent, entry, m) for entry in others] for m in (F1, GOLD_NLL)}
        adjusted = {m: iter(holm([c.p_value for c in found[m] if c])) for m in found}
        for place, entry in enumerate(others):
            cells = [(c.estimate, next(adjusted[m])) if (c := found[m][place]) else (None, None) for m in found]
            rows.append((one.results.pair, reader, entry.label, *cells[0], *cells[1]))
    columns = (
        Column("pair"),
        Column("reader"),
        Column("arm", heading="latent minus"),
        Column("f1", "percent_estimate", 1, "Δ F1, points"),
        Column("f1_p", "p_value", 3, "p"),
        Column("gold_nll", "estimate", 3, "Δ gold NLL, nats/token"),
        Column("gold_nll_p", "p_value", 3, "p (NLL)"),
    )
    caption = (
        "The latent minus each arm on the same questions: 95 % intervals, unadjusted; p by paired bootstrap, "
        "Holm-adjusted over the arms of a reader and measure. A lower NLL is better."
    )
    return Table("paired", caption, columns, tuple(rows))


def curve_table(evaluations: Sequence[Evaluation]) -> Table:
    """Every point of the curve of F1 over bytes, the latent's with what the compressed text has at its bytes."""
    rows = []
    for one, reader in readers(evaluations):
        shapes = {channel.condition: channel for channel in one.results.channels}
        for entry in entries(one, "latent", reader):
            text = rival(one, "byte_budget_compressed", entry)
            difference = compare(one, entry, text, F1) if text else None
            channel = shapes[entry.first.condition]
            rows.append(
                (
                    one.results.pair,
                    reader,
                    entry.first.condition,
                    channel.length,
                    channel.dimension,
                    entry.first.wire,
                    entry.bytes,
                    entry.first.text_bytes / entry.bytes if entry.bytes else None,
                    (entry.first.text_tokens or 0) / (entry.first.prompt_tokens or 1),
                    estimate(one, entry, F1),
                    estimate(one, text, F1) if text else None,
                    difference.estimate if difference else None,
                )
            )
    columns = (
        Column("pair"),
        Column("reader"),
        Column("channel"),
        Column("length", "integer", heading="M"),
        Column("dimension", "integer", heading="d"),
        Column("format"),
        Column("bytes", "number", 0, "bytes sent"),
        Column("byte_ratio", "number", 2, "text bytes / bytes sent"),
        Column("token_ratio", "number", 1, "text tokens / vectors"),
        Column("f1", "percent_estimate", 1, "F1, %"),
        Column("text_f1", "percent_estimate", 1, "F1 of compressed text, %"),
        Column("difference", "percent_estimate", 1, "Δ F1, points"),
    )
    caption = "Every channel in every wire format, beside the text that a compressor fits into the same bytes."
    return Table("curve", caption, columns, tuple(rows))


def combined_table(evaluations: Sequence[Evaluation]) -> Table:
    """Answers of all readers taken together."""
    rows = []
    for one in evaluations:
        for arm in COMBINED_ARMS:
            for entry in combined_entries(one, arm):
                name = "both readers agree" if entry.reader == AGREEMENT else COMBINED_NAMES[entry.reader]
                scores = (estimate(one, entry, F1), estimate(one, entry, EXACT))
                rows.append((one.results.pair, ARM_NAMES[arm], entry.first.condition or None, name, *scores))
    columns = (
        Column("pair"),
        Column("arm"),
        Column("channel"),
        Column("answer"),
        Column("f1", "percent_estimate", 1, "F1, %"),
        Column("exact", "percent_estimate", 1, "EM, %"),
    )
    caption = (
        "Joint choice: of the readers' answers the one that all readers find most likely per token. Oracle: the best "
        "of them. Agreement: F1 and EM of the readers' answers against each other."
    )
    return Table("combined", caption, columns, tuple(rows))


def channels_table(evaluations: Sequence[Evaluation]) -> Table:
    """The trained channels."""
    rows = []
    for one in evaluations:
        for channel in one.results.channels:
            step = one.results.selected_step(channel.condition, channel.seed)
            sizes = (channel.length, channel.dimension, channel.trained_parameters, channel.cut_texts)
            rows.append((one.results.pair, channel.condition, channel.seed, channel.encoder, *sizes, step))
    columns = (
        Column("pair"),
        Column("channel"),
        Column("seed", "integer"),
        Column("encoder"),
        Column("length", "integer", heading="M"),
        Column("dimension", "integer", heading="d"),
        Column("parameters", "integer", heading="trained parameters"),
        Column("cut_texts", "integer", heading="test texts cut"),
        Column("step", "integer", heading="chosen step"),
    )
    return Table("channels", "The channels that were trained.", columns, tuple(rows))


def section(evaluations: Sequence[Evaluation], tables: Sequence[Table]) -> str:
    """The study's section in Markdown."""
    arms, paired, curve, combined, channels = (table.to_markdown() for table in tables)
    links = "\n".join(f"![{text}](figures/latentwire/{name}.png)\n" for name, text in FIGURES.items())
    parts = [
        "## LatentWire",
        QUESTION,
        "### Does a latent beat a text of the same bytes?",
        "\n".join(f"- {finding(one, reader)}" for one, reader in readers(evaluations)),
        links,
        "### Every arm",
        arms,
        f"<details><summary>The latent minus every other arm</summary>\n\n{paired}\n</details>",
        "### Bytes, vectors and formats",
        curve,
        "### Both readers together",
        combined,
        "### Channels",
        channels,
        *sweeps(evaluations).section(),
        "### Data, models and protocol",
        "\n".join(f"- {note}" for note in notes(evaluations)),
        "The same tables as CSV and LaTeX: [tables/latentwire](tables/latentwire).",
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def finding(evaluation: Evaluation, reader: str) -> str:
    """What the latent is worth to one reader, in bytes of text."""
    latent, name = headline(evaluation, reader), f"`{reader}`"
    if latent is None:
        return f"{name}: the latent arm was not run."
    first = latent.first
    size = (
        f"{name}: `{first.condition}` in {first.wire} sends {latent.bytes:,.0f} bytes per prompt "
        f"({first.prompt_tokens:.0f} vectors) for a text of {first.text_bytes:,.0f} bytes "
        f"({first.text_tokens:.0f} tokens)"
    )
    comparison = same_bytes(evaluation, reader)
    if comparison is None:
        return f"{size}. The compressed text was not run, so the latent is not compared with its bytes."
    sentences = [f"{size}. The latent {VERDICTS[comparison.verdict]}: {difference(comparison)}."]
    if nll := same_bytes(evaluation, reader, GOLD_NLL):
        sentences.append(
            f"Its gold NLL differs by {format_estimate(nll.estimate, 3)} nats per token (lower is better)."
        )
    if latent.bytes and latent.bytes >= first.text_bytes:
        sentences.append("It is no compression at all: the text itself takes fewer bytes.")
    arms = {one.arm: one for one in arm_entries(evaluation, reader)}
    for arm, words in BOUNDS.items():
        if (other := arms.get(arm)) and (found := compare(evaluation, latent, other, F1)):
            sentences.append(f"Against {words}: {difference(found)}.")
    return " ".join([*sentences, best_point(evaluation, reader)])


def difference(comparison: Comparison) -> str:
    """A difference in F1 with its interval and n."""
    return f"F1 {format_estimate(comparison.estimate, 1, 100)} points (paired, n = {comparison.n})"


def best_point(evaluation: Evaluation, reader: str) -> str:
    """How many points of the whole curve lie above the compressed text of the same bytes."""
    pairs = [(one, rival(evaluation, "byte_budget_compressed", one)) for one in entries(evaluation, "latent", reader)]
    found = [compare(evaluation, one, text, F1) for one, text in pairs if text]
    better = sum(one is not None and one.verdict == "higher" for one in found)
    return f"Of all {len(found)} channels and formats, {better} beat the compressed text of their bytes."


def notes(evaluations: Sequence[Evaluation]) -> list[str]:
    """Where data and models come from, what was left out, and what differs from the published protocol."""
    found = []
    for one in evaluations:
        results = one.results
        left_out = ", ".join(f"{count} of {split}" for split, count in results.left_out.items() if count)
        found.append(
            f"Data `{results.dataset}`: {results.dataset_note.rstrip('.')}. Scored as SQuAD {results.squad_version}. "
            f"Questions left out because their text is too long: {left_out or 'none'}."
        )
        found += [
            f"Reader `{reader.name}`: {reader.note.rstrip('.') or 'as published'}. Full text as {reader.text_prompt}."
            for reader in results.readers
        ]
    settings = evaluations[0].results.evaluation
    found.append(CHOOSERS[str(settings["selection"])])
    generation = settings["generation"]
    assert isinstance(generation, dict)
    if generation["first_token_temperature"] or generation["ban_first_eos"]:
        found.append("**As published:** the first token is drawn or an empty answer forbidden.")
    return [*dict.fromkeys(found), *CORRECTIONS, "Every number has its n and a 95 % interval; comparisons are paired."]


if __name__ == "__main__":
    run_step(ReportStep, main)
