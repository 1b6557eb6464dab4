"""The evaluation of a pair: every arm, checkpoints chosen on validation, real wire files, and work that is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from stillhouse.evaluation.reading_comprehension import score_reading_answer
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.studies.latentwire.config import ARMS
from stillhouse.studies.latentwire.data import read_examples
from stillhouse.studies.latentwire.evaluate import main
from stillhouse.studies.latentwire.laboratory import ChannelRun, Laboratory
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.results import COMBINED, Evaluation, Subject, load_evaluation
from stillhouse.studies.latentwire.wire import WireError, WireFormat, message_bytes, read_message
from tests.latentwire.tiny_readers import FAMILIES, make_families
from tests.latentwire.tiny_study import evaluation_step, load_readers, make_channel, make_data, run_settings


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, data and two channels of different size."""
    folder = tmp_path_factory.mktemp("project")
    paths = make_families(folder)
    make_data(folder / "data")
    for condition, length in (("latent", 3), ("long", 5)):
        run = run_settings(latent={"length": length, "dimension": 8})
        make_channel(folder / "channels" / condition, load_readers(paths, run), run, condition)
    return folder


def evaluate(project: Path, output: Path, **changes: object) -> Evaluation:
    channels = [project / "channels" / name for name in ("latent", "long")]
    main(evaluation_step(project, output, channels, **changes))
    return load_evaluation(output / "results.json")


def of(evaluation: Evaluation, **subject: str) -> pd.DataFrame:
    """The rows in which these columns have these values, by subject and item."""
    rows = evaluation.items.sort_values([*evaluation.subject, "item_id"])
    return rows[np.logical_and.reduce([rows[name] == value for name, value in subject.items()])]


@pytest.fixture(scope="module")
def evaluation(project: Path) -> Evaluation:
    return evaluate(project, project / "evaluation")


def test_every_arm_is_measured_for_every_reader_that_can_take_it(evaluation: Evaluation) -> None:
    measured = {(one.arm, one.reader) for one in evaluation.results.measurements}
    for arm in ARMS:
        for reader in FAMILIES:
            if arm in COMBINED:
                assert ("latent", arm) in measured and ("full_text", arm) in measured
            else:
                # Only one of the two has a chat template that could be cut.
                assert ((arm, reader) in measured) == (arm != "token_budget_chat_full" or reader == "llama")


def test_the_answers_are_scored_against_all_gold_answers(project: Path, evaluation: Evaluation) -> None:
    examples = {one.id: one for one in read_examples(project / "data" / "test.jsonl").examples}
    rows = evaluation.items
    rows = rows[rows["output"].notna() & (rows["split"] == "test") & (rows["reader"] != "agreement")]
    assert len(rows) > 100
    for row in rows.itertuples():
        score = score_reading_answer(row.output, examples[row.item_id].answers)
        assert (row.exact, row.f1) == (score.exact, score.f1)


def test_bytes_are_those_of_the_real_wire_files_and_budgets_keep_to_them(project: Path, evaluation: Evaluation) -> None:
    folder = project / "evaluation" / "wire"
    verify_manifest(folder)
    sizes = set()
    for condition, length in (("latent", 3), ("long", 5)):
        for kind in ("fp16", "int4"):
            files = sorted((folder / condition / "seed_42" / kind).glob("*.lwir"))
            assert len(files) == 4 and all(read_message(file).shape == (length, 8) for file in files)
            expected = message_bytes(length, 8, WireFormat(kind))
            assert {file.stat().st_size for file in files} == {expected}
            rows = of(evaluation, condition=condition, wire=kind).dropna(subset=["gold_nll"])
            assert set(rows["bytes"]) == {expected} and set(rows["prompt_tokens"]) == {length}
            sizes.add(expected)
    budgets = {one.budget for one in evaluation.results.measurements if one.arm == "byte_budget_compressed"}
    assert budgets == sizes
    for arm in ("byte_budget_cut", "byte_budget_compressed"):
        rows = of(evaluation, arm=arm)
        assert (rows["bytes"] <= rows["budget"]).all()


def test_replaying_the_embeddings_of_a_text_gives_what_the_text_gives(evaluation: Evaluation) -> None:
    for reader, text in (("llama", None), ("gemma", "full_text")):
        for replay in ("replay_raw", *(["replay_anchor"] if text else [])):
            one, two = (of(evaluation, arm=arm, reader=reader) for arm in ("full_text", replay))
            assert list(one["output"]) == list(two["output"])
            assert one["gold_nll"].to_numpy() == pytest.approx(two["gold_nll"].to_numpy(), rel=1e-5)


def test_the_checkpoint_is_chosen_on_validation_and_the_test_split_sees_no_other(evaluation: Evaluation) -> None:
    for selection in evaluation.results.selections:
        scores = {}
        for one in evaluation.results.measurements:
            if one.condition == selection.condition and one.split == "validation":
                assert one.gold_nll is not None and one.f1 is None
                scores[one.step] = scores.get(one.step, 0.0) + one.gold_nll.value
        assert set(scores) == {1, 2} and selection.step == min(scores, key=scores.get)  # type: ignore[arg-type]
        test_steps = {
            one.step
            for one in evaluation.results.measurements
            if one.condition == selection.condition and one.split == "test"
        }
        assert test_steps == {selection.step}


def test_oracle_is_never_below_a_reader_and_joint_takes_one_of_their_answers(evaluation: Evaluation) -> None:
    rows = evaluation.items
    rows = rows[(rows["arm"] == "full_text")].set_index("item_id")
    by_reader = {reader: rows[rows["reader"] == reader] for reader in (*FAMILIES, *COMBINED)}
    for item in by_reader["llama"].index:
        answers = [by_reader[reader].loc[item] for reader in FAMILIES]
        assert by_reader["oracle"].loc[item, "f1"] == max(answer["f1"] for answer in answers)
        assert by_reader["joint_rescoring"].loc[item, "output"] in {answer["output"] for answer in answers}


def nats_per_token(reader: Reader, text: str, answer: str) -> float:
    """The plain way: one sequence of token ids without batch, cache or embeddings."""
    prompt, ids = reader.text_prompt(text), reader.answer_ids(answer)
    with torch.no_grad():
        logits = reader.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return functional.cross_entropy(logits, torch.tensor(ids)).item()


def test_the_joint_choice_is_the_answer_that_all_readers_together_find_likeliest_per_token(
    project: Path, evaluation: Evaluation
) -> None:
    readers = load_readers({name: project / name for name in FAMILIES}, run_settings())
    written = {
        name: of(evaluation, arm="full_text", reader=name).set_index("item_id")["output"]
        for name in (*FAMILIES, "joint_rescoring")
    }
    differ = 0
    for example in read_examples(project / "data" / "test.jsonl").examples:
        answers = {written[name][example.id] for name in FAMILIES}
        totals = {one: sum(nats_per_token(reader, example.text, one) for reader in readers.values()) for one in answers}
        assert written["joint_rescoring"][example.id] == min(totals, key=lambda one: totals[one])
        differ += len(answers) > 1
    assert differ


def test_a_finished_evaluation_computes_nothing_again_and_leaves_the_same_bytes(
    project: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    evaluate(project, tmp_path)
    record = read_json(tmp_path / "run.json")
    assert record["parts_computed"] == 0 and record["parts_kept"] > 50
    for name in ("results.json", "items.parquet", "wire/manifest.json"):
        assert (tmp_path / name).read_bytes() == (project / "evaluation" / name).read_bytes()


def test_a_new_budget_computes_the_byte_arms_of_that_budget_alone(
    project: Path, evaluation: Evaluation, tmp_path: Path
) -> None:
    sizes = sorted({one.budget for one in evaluation.results.measurements if one.arm == "byte_budget_cut"})
    evaluate(project, tmp_path, byte_budgets=[*sizes, 41])
    assert read_json(tmp_path / "run.json")["parts_computed"] == 4  # two arms, two readers


def test_a_wire_file_that_the_disk_damages_is_named_and_nothing_is_left(
    project: Path, evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_bytes

    def losing_a_byte(path: Path, data: bytes) -> int:
        return whole(path, data[:-1] if path.name.startswith("00002-") else data)

    monkeypatch.setattr(Path, "write_bytes", losing_a_byte)
    with pytest.raises(WireError, match=r"fp16/00002-q_42\.lwir: wire message: has \d+ bytes"):
        evaluate(project, tmp_path)
    assert not (tmp_path / "wire").exists()


def test_the_seconds_of_a_latent_include_its_encoding_and_packing(project: Path) -> None:
    run = ChannelRun.read(project / "channels" / "latent")
    lab = Laboratory({name: (project / name, False) for name in FAMILIES}, run.run.reader, 3, "1.1")
    examples = read_examples(project / "data" / "test.jsonl").examples
    sent = lab.messages(run, 1, WireFormat("int4"), examples)
    assert (sent["seconds"] > 0).all()
    subject = Subject("latent", "llama", *run.key, step=1, wire="int4")
    slow = lab.latent_rows(subject, run, sent.assign(seconds=sent["seconds"] + 1000), examples, None)
    assert slow["seconds"].between(1000, 1100).all()
    text = lab.text_rows(Subject("full_text", "llama"), examples, None)
    assert (text["seconds"] > 0).all()


@pytest.mark.parametrize("selection", ["f1", "last", "best_on_test"])
def test_each_way_of_choosing_a_checkpoint_works(project: Path, tmp_path: Path, selection: str) -> None:
    found = evaluate(project, tmp_path, selection=selection, arms=["latent", "full_text"])
    split = "test" if selection == "best_on_test" else "validation"
    candidates = [one for one in found.results.measurements if one.split == split and one.arm == "latent"]
    assert {one.step for one in candidates} == {1, 2}
    if selection == "last":
        assert {one.step for one in found.results.selections} == {2}
    else:
        assert all(one.f1 is not None for one in candidates)
    assert not found.items.duplicated([*found.subject, "item_id"]).any()
