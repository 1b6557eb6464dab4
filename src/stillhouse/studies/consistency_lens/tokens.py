"""Step program: turn the splits of a corpus into tokens, once per corpus and model.

Stands between the division of the corpus by document and everything that reads text: extraction of activations, and
training that computes them itself. A run may read less of a document than is kept here, never more. The text of one
shard is in memory at a time; repetitions are found by digests.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stillhouse.config.base import StrictModel
from stillhouse.data.record_files import Digests, RecordFile
from stillhouse.data.records import Passage
from stillhouse.models.loading import load_tokenizer
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.studies.consistency_lens.config import TokenSettings
from stillhouse.studies.consistency_lens.data import origin
from stillhouse.studies.consistency_lens.shards import (
    ShardContent,
    ShardPlan,
    build_shards,
    plan_shards,
    publish_shards,
)

MODULE = "stillhouse.studies.consistency_lens.tokens"
SPLITS = ("train", "validation", "test")


class TokensStep(StrictModel):
    """The step's command line."""

    model: Path
    data: Path
    output: Path
    work: Path
    tokens: TokenSettings
    trust_remote_code: bool = False


def main(step: TokensStep) -> None:
    """Tokenise every split, or go on with what an interrupted attempt left."""
    inputs = {"model": step.model, "data": step.data}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        passages = {split: RecordFile(step.data / f"{split}.jsonl", Passage) for split in SPLITS}
        kept = without_duplicates(passages)
        documents = {split: len(kept[split]) for split in SPLITS}

        def tokenise(plan: ShardPlan) -> ShardContent:
            chosen = [passages[plan.split][kept[plan.split][row]] for row in plan.rows]
            texts = [passage.text for passage in chosen]
            encoded = tokenizer(texts, truncation=True, max_length=step.tokens.max_length, return_attention_mask=False)
            token_ids = [torch.tensor(ids, dtype=torch.int32) for ids in encoded["input_ids"]]
            return ShardContent([passage.id for passage in chosen], token_ids, {})

        plans = plan_shards(documents, step.tokens.shard_documents)
        work = step.work / fingerprint(MODULE, step, inputs, exclude={*inputs, "output", "work"})
        build_shards(work, plans, tokenise)
        record.add(documents=documents, duplicates={split: len(passages[split]) - documents[split] for split in SPLITS})
        publish_shards(step.output, work, plans, origin(step.model), record)
        logger.info("tokenised %s documents", " + ".join(f"{count} {split}" for split, count in documents.items()))


def without_duplicates(passages: Mapping[str, Iterable[Passage]]) -> dict[str, NDArray[np.intp]]:
    """The rows of each split whose text did not occur before, the held-out splits first.

    So a lens is never judged on what it has seen, nor paired with the same text under another id.
    """
    texts, ends = Digests(), [0]
    for split in reversed(SPLITS):
        for passage in passages[split]:
            texts.add(passage.text)
        ends.append(len(texts))
    first = texts.first_of_each
    rows = (first[start:end].nonzero()[0] for start, end in itertools.pairwise(ends))
    return dict(zip(reversed(SPLITS), rows, strict=True))


if __name__ == "__main__":
    run_step(TokensStep, main)
