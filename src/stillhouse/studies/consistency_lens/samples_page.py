"""Step program: the verbose samples of a model as one browsable, self-contained HTML file.

Without script or anything from the network. Stands after `evaluate`, which collects the samples: a new layout reruns
no evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pydantic import ValidationError

from stillhouse.config.base import StrictModel
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text, read_sealed_json
from stillhouse.studies.consistency_lens.samples import LensSamples, Prediction, Sample, SamplesFile

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fafafa; margin: 2rem auto; max-width: 68rem;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
article { background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: 1rem 1.25rem; margin: 1rem 0; }
article h3 { font-size: .85rem; font-weight: 600; color: #666; margin: 0 0 .5rem; }
.input { white-space: pre-wrap; margin: 0 0 .75rem; } .after { color: #999; }
mark { background: #ffd24d; padding: 0 .1em; border-radius: 2px; white-space: pre-wrap; }
.explanation { font-size: 1.1rem; margin: 0 0 .75rem; }
.explanation q { background: #e7f0fa; padding: .1em .3em; border-radius: 3px; white-space: pre-wrap; }
.columns { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; } @media (max-width: 45rem) { .columns {
  grid-template-columns: 1fr; } }
table { border-collapse: collapse; width: 100%; font-size: .9rem; } td { padding: .1rem .3rem; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
td.number { text-align: right; width: 3.5rem; font-variant-numeric: tabular-nums; }
td.bar { width: 40%; } td.bar i { display: block; height: .7em; background: #0072b2; border-radius: 2px; }
.columns > :nth-child(2) td.bar i { background: #d55e00; }
code { white-space: pre-wrap; background: #f1f1f1; padding: 0 .2em; border-radius: 2px; }
p.continuation { margin: .4rem 0 0; font-size: .9rem; }
""".strip()


class SamplesStep(StrictModel):
    """The step's command line."""

    samples: Path
    output: Path


def main(step: SamplesStep) -> None:
    """Write the page."""
    try:
        samples = SamplesFile.model_validate(read_sealed_json(step.samples))
    except ValidationError as error:
        raise UserError(f"{step.samples}: is not a result of this version ({error.error_count()} faults)") from None
    atomic_write_text(step.output, page(samples))


def page(file: SamplesFile) -> str:
    """The page: one section a lens, one article a sample, in the order of the split."""
    title = f"Consistency lens of {file.model}"
    sections = "\n".join(lens_section(lens) for lens in file.lenses)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{STYLE}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>The first documents of the {escape(file.split)} split of {escape(file.dataset)}, none chosen by hand. The decoder
saw the marked token's activation and nothing else; neither the original nor the lens has read the grey text after it.
KL is between the original's next-token distributions with the activation and with its reconstruction: 0 where the text
carried everything that matters there.</p>
{sections}
</body>
</html>
"""


def lens_section(lens: LensSamples) -> str:
    """The samples of one lens."""
    heading = f"{lens.condition}, seed {lens.seed}, step {lens.step}, layer {lens.layer}"
    articles = "\n".join(article(number, sample) for number, sample in enumerate(lens.samples, start=1))
    return f"<section>\n<h2>{escape(heading)}</h2>\n{articles or '<p>No samples were asked for.</p>'}\n</section>"


def article(number: int, sample: Sample) -> str:
    """One sample."""
    facts = f"{number}. {sample.document_id}: KL {sample.kl:.3f} nats (of the mean activation: {sample.kl_of_mean:.3f})"
    after = f'<span class="after">{escape(sample.after)}</span>'
    return f"""<article>
<h3>{escape(facts)}</h3>
<p class="input">{escape(sample.before)}<mark>{escape(sample.token)}</mark>{after}</p>
<p class="explanation">Explanation: <q>{escape(sample.explanation)}</q></p>
<div class="columns">
{predictions("Original predicts", sample.original, sample.original_continuation)}
{predictions("With the reconstruction", sample.reconstruction, sample.reconstruction_continuation)}
</div>
</article>"""


def predictions(caption: str, tokens: Sequence[Prediction], continuation: str) -> str:
    """Next tokens with their probabilities, and the greedy continuation."""
    rows = "\n".join(
        f'<tr><td><code>{escape(one.token)}</code></td><td class="number">{one.probability:.1%}</td>'
        f'<td class="bar"><i style="width: {one.probability:.1%}"></i></td></tr>'
        for one in tokens
    )
    return (
        f"<div>\n<table>\n<caption>{caption}</caption>\n{rows}\n</table>\n"
        f'<p class="continuation">continues: <code>{escape(continuation)}</code></p>\n</div>'
    )


if __name__ == "__main__":
    run_step(SamplesStep, main)
