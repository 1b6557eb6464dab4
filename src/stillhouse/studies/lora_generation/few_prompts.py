"""The arm that trains a LoRA on the few prompts alone: what the generator is to spare. All cases train together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stillhouse.config.training import TrackingSettings
from stillhouse.runtime.digests import short_digest
from stillhouse.runtime.seeds import derived_seed
from stillhouse.studies.lora_generation.arms import Collection, Entry
from stillhouse.studies.lora_generation.data import Wording
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.results import Subject
from stillhouse.studies.lora_generation.scoring import Scorer
from stillhouse.studies.lora_generation.teacher_settings import Style, TeacherTrainingSettings
from stillhouse.training.adapter_batch import AdapterBatch, AdapterLosses, AdapterSequences, checkpoint_adapter
from stillhouse.training.loop import train


def few_prompt_entries(
    collection: Collection,
    cases: Sequence[AdapterRow],
    styles: Mapping[str, Style],
    scorer: Scorer,
    training: TeacherTrainingSettings,
    loss_tokens: str,
    work: Path,
) -> list[Entry]:
    """Train an adapter on the prompts of each case, in one process; a killed training continues from `work`.

    seconds: a case's share of the training.
    """
    prompts = [collection.solved(case) for case in cases]
    sequences = [
        Wording.of(scorer.model, scorer.tokenizer, styles[case.task]).learnt(own, loss_tokens)
        for case, own in zip(cases, prompts, strict=True)
    ]
    batch = AdapterBatch(scorer.model, training.lora, [derived_seed(0, "start")] * len(cases))
    facts = [training.model_dump(mode="json"), [[s.input_ids, s.answer_start] for own in sequences for s in own]]
    run = work / f"few_prompt_lora-{short_digest(facts)}"
    result = train(
        batch,
        AdapterLosses([f"{case.task}_{case.shard}_{case.seed}" for case in cases]),
        AdapterSequences(sequences),
        training,
        work_dir=run,
        output_dir=run / "trained",
        seed=collection.seed,
        groups=batch.groups(),
        clip_apart=True,
        tracking=TrackingSettings(),
        run_name="few prompts",
    )
    entries = []
    for place, case in enumerate(cases):
        adapter = checkpoint_adapter(run / "trained" / f"checkpoint-{training.steps}", batch.layout, place)
        folder = collection.write(adapter, f"few_prompt_lora/{case.task}/{case.shard}-{case.seed}")
        subject = Subject(case.task, "few_prompt_lora", case.shard, case.seed)
        entries.append(Entry(subject, folder, (), result.seconds / len(cases)))
    return entries
