"""docs/cluster.md, followed literally from a fresh clone on a real Slurm: each command is typed as it is printed.

Filled in is what the page tells its reader to fill in: NAME, TARGET, `config/mine.yaml`, and in the profile the line
for a Slurm of one's own. The one exception is `ENVIRONMENT=gpu`: no GPU is here, so the page's other word is taken.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from slurm import one_node
from support.checkout import Checkout, clone, interrupt, kill
from support.lora_generation_workflow import CONFIG as LORA_CONFIG
from support.lora_generation_workflow import add_lora_generation
from support.workflow import REPOSITORY, make_workflow, merged

from stillhouse.runtime.files import read_json
from stillhouse.studies.configuration import load_configuration

PAGE = (REPOSITORY / "docs/cluster.md").read_text()
SECTIONS = ("First submission", "Watching", "When something dies", "Several GPUs for one job", "Cost")
# What the page speaks of in a sentence: test_slurm.py does it, and the page's own commands include the last.
SPOKEN_OF = {
    "scontrol requeue",
    "scontrol update NodeName=... State=resume",
    "scontrol release <job>",
    "scontrol show config",
    "snakemake -n",
}
PROGRAMS = ("make", "snakemake", "tensorboard", "tail", "python", "sinfo", "squeue", "sacct", "scancel", "scontrol")

# A small job of each kind that the study below has none of: an export, and what collects adapters.
TARGETS = "results/quantized_distillation/tiny/exported/ptq/seed_0 results/lora_generation/tiny/adapters"
GROUPS = {"inputs", "exports", "collections", "figures", "report"}
STUDY = {
    "conditions": ["base_zero_shot", "baseline"],
    "seeds": [42],
    "defaults": {"training": {"steps": 24, "save_every": 24, "resume_every": 1}},
}
STUDENT = "context_distillation/tiny/students/baseline/seed_42"
SMALL = {"gpus": 1, "threads": 1, "memory_mb": 2000, "runtime_minutes": 10}
ASK_SOONER = "slurm-init-seconds-before-status-checks: 5"


def commands(page: str) -> list[str]:
    """The commands that the page's sections about Slurm print as blocks of their own, in order, without remarks."""
    lines = "\n".join(sections(page)).splitlines()
    return [re.split(r" {2,}#", line.strip())[0] for line in lines if line.startswith("    ")]


def sections(page: str) -> list[str]:
    """The text of the sections about Slurm, without blocks of YAML."""
    texts = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    return [re.sub(r"^ *```yaml\n.*?```$", "", texts[name], flags=re.MULTILINE | re.DOTALL) for name in SECTIONS]


def settings_to_write(page: str) -> dict:
    """The settings that the page shows."""
    [text] = re.findall(r"^ *```yaml\n(.*?)^ *```$", page, flags=re.MULTILINE | re.DOTALL)
    return yaml.safe_load(text)


@dataclass
class Reader:
    """Somebody who types the page's commands, one after another, and what each has said."""

    checkout: Checkout
    said: dict[str, list[str]] = field(default_factory=dict)
    workflow: subprocess.Popen[str] | None = None
    training: str = ""
    cancelled: set[str] = field(default_factory=set)

    def types(self, command: str) -> str:
        """A command that ends, and ends well; NAME and TARGET are filled in."""
        done = self.checkout.type(command.replace("NAME", "tiny").replace("TARGET", TARGETS))
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        self.said.setdefault(command, []).append(done.stdout + done.stderr)
        return done.stdout

    def installs(self, command: str) -> None:
        done = self.checkout.type(command.replace("ENVIRONMENT=gpu", "ENVIRONMENT=cpu"), activated=False)
        assert done.returncode == 0, done.stderr
        self.said[command] = [done.stdout]

    def stops_and_repeats(self, command: str) -> None:
        """Ctrl-C once everything that is ready has been submitted; the same command continues."""
        process = self.checkout.start(command.replace("TARGET", TARGETS), heard=False)
        self.waits(one_node.queue, "a job to be submitted")
        time.sleep(5)  # The signal goes to a submission in flight too, which then fails instead of being cancelled.
        interrupt(process)
        self.waits(lambda: not one_node.queue(), "the jobs to be cancelled")
        self.cancelled = {job for job, state in map(str.split, one_node.queue("all", "%i %T")) if state == "CANCELLED"}
        self.types(command)

    def submits(self, command: str) -> None:
        """The first time, and until the training has saved a state and waits for the reader."""
        self.workflow = self.checkout.start(command, heard=False)
        folder = self.checkout.directory
        self.waits(lambda: list((folder / "work" / STUDENT).glob("*/state-*")), "the training to save a state")
        [log] = self.training_logs()
        self.training = log.stem
        one_node.run("scancel", "--signal=STOP", self.training)

    def reads_a_step(self, command: str) -> None:
        process = self.checkout.start(command)
        assert process.stdout
        try:
            self.said[command] = [next(line for line in process.stdout if "step " in line)]
        finally:
            interrupt(process)

    def looks_at_curves(self, command: str) -> None:
        """Until the server says where it is; then the browser asks it for its runs."""
        process = self.checkout.start(command)
        assert process.stdout
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://\S+:\d+/", line)))
            with urllib.request.urlopen(f"{address}data/runs", timeout=60) as answer:
                self.said[command] = json.load(answer)
        finally:
            interrupt(process)

    def loses_the_workflow(self, command: str) -> None:
        """The login node goes down; the training goes on, and the reader asks Slurm until no job is left."""
        assert self.workflow
        kill(self.workflow)
        one_node.run("scancel", "--signal=CONT", self.training)
        self.waits(lambda: len(self.types(command).splitlines()) == 1, "the jobs to end", pause=2)

    def asks_for_accounts(self, command: str) -> None:
        done = self.checkout.type(command)
        assert done.returncode != 0
        self.said[command] = [done.stderr]

    def waits(self, condition: Callable[[], object], what: str, pause: float = 0.1) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            if self.workflow and self.workflow.poll() not in (None, -signal.SIGKILL):
                said = sorted((self.checkout.directory / ".snakemake/log").iterdir())[-1].read_text()
                raise AssertionError(f"the workflow ended before {what}: {said[-4000:]}")
            assert time.monotonic() < deadline, f"waited in vain for {what}: {one_node.queue('all', '%i %T %r')}"
            time.sleep(pause)

    def training_logs(self) -> list[Path]:
        """One log for each Slurm job that has trained the student."""
        folder = self.checkout.directory / "logs/slurm/rule_context_distillation_train/tiny_baseline_42"
        return sorted(folder.glob("*.log"))


EVERYTHING = "snakemake --workflow-profile profiles/slurm --configfile config/mine.yaml"
QUEUE = 'squeue --me --format "%i %T %M %R %k"'
STATUS = 'make status SNAKEMAKE_ARGUMENTS="--configfile config/mine.yaml"'
TAIL = "tail -f logs/context_distillation/*/students/*/seed_42.log"
CURVES = "tensorboard --logdir work"
COST = "sacct --allocations --duplicates --format JobID,Elapsed,AllocTRES%60,State"
SMALL_FIRST = "snakemake TARGET --workflow-profile profiles/slurm --configfile config/mine.yaml"
# The page's commands, and what its reader does with each.
STEPS: tuple[tuple[str, Callable[[Reader, str], object]], ...] = (
    ("make .venv/installed ENVIRONMENT=gpu", Reader.installs),
    (". .venv/bin/activate", Reader.types),
    ("sinfo", Reader.types),
    ("snakemake --cores 2 data resources/models/NAME --configfile config/mine.yaml", Reader.types),
    (f"{EVERYTHING} -n", Reader.types),
    (SMALL_FIRST, Reader.stops_and_repeats),
    (EVERYTHING, Reader.submits),
    (STATUS, Reader.types),
    (QUEUE, Reader.types),
    (TAIL, Reader.reads_a_step),
    (CURVES, Reader.looks_at_curves),
    (QUEUE, Reader.loses_the_workflow),
    ("snakemake --unlock", Reader.types),
    (EVERYTHING, Reader.types),
    (COST, Reader.asks_for_accounts),
)


def on_slurm(test: Callable[..., None]) -> Callable[..., None]:
    """A test that needs the reader to have come to the page's end."""
    for mark in (pytest.mark.slow, pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def reader(slurm: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader who has come to the end of the page."""
    folder = tmp_path_factory.mktemp("page")
    reader = Reader(clone(folder / "stillhouse"))
    write_mine(folder / "lab", tiny_model, reader.checkout.directory / "config/mine.yaml")
    assert f"`{ASK_SOONER}`" in PAGE
    with (reader.checkout.directory / "profiles/slurm/config.yaml").open("a") as profile:
        profile.write(f"{ASK_SOONER}\n")
    try:
        for command, does in STEPS:
            does(reader, command)
        yield reader
    finally:
        if reader.workflow:
            kill(reader.workflow)


def write_mine(lab: Path, model: Path, path: Path) -> None:
    """Write the reader's own file: a tiny model, data of the lab's, and the page's requests with small numbers."""
    workflow = make_workflow(lab, model, STUDY)
    add_lora_generation(workflow)
    mine = merged(*(yaml.safe_load((lab / name).read_text()) for name in ("tiny.yaml", LORA_CONFIG)))
    mine["studies"] = ["context_distillation"]
    mine["context_distillation"]["evaluation"].pop("transfer")
    mine["quantized_distillation"] = {
        "models": ["tiny"],
        "defaults": {"format": {"kind": "int4", "group_size": 16}, "training": {"precision": "fp32"}},
    }
    asked = settings_to_write(PAGE)["resources"]
    mine["resources"] = {job: {name: SMALL[name] for name in request} for job, request in asked.items()}
    path.write_text(yaml.safe_dump(mine, sort_keys=False).replace("path: assets/", f"path: {lab}/assets/"))


def test_each_command_of_the_page_is_typed_in_the_page_s_order() -> None:
    assert commands(PAGE) == [command for command, _ in STEPS]
    spans = {span for text in sections(PAGE) for span in re.findall(r"`([^`\n]+)`", text)}
    assert {span for span in spans if span.split()[0] in PROGRAMS and " " in span} == SPOKEN_OF


def test_the_requests_that_the_page_shows_are_a_configuration() -> None:
    default = REPOSITORY / "config/config.yaml"
    shown = settings_to_write(PAGE)
    load_configuration(merged(yaml.safe_load(default.read_text()), shown), [default], shown)


@on_slurm
def test_the_page_leads_from_a_clone_to_the_results_page(reader: Reader) -> None:
    folder = reader.checkout.directory
    assert "## Context distillation" in (folder / "results/results.md").read_text()
    assert read_json(folder / "results" / STUDENT / "run.json")["scheduler"]["slurm_job_id"] == reader.training
    assert "Nothing to be done" in reader.types(f"{EVERYTHING} -n")


@on_slurm
def test_the_partitions_of_the_profile_are_among_those_that_slurm_lists(reader: Reader) -> None:
    profile = (reader.checkout.directory / "profiles/slurm/config.yaml").read_text()
    for partition in re.findall(r"slurm_partition: (\w+)", profile):
        assert re.search(rf"^{partition}\b", reader.said["sinfo"][0], re.MULTILINE)


@on_slurm
def test_a_workflow_that_is_stopped_cancels_its_jobs_and_continues(reader: Reader) -> None:
    assert reader.cancelled
    assert (reader.checkout.directory / TARGETS.split()[0] / "manifest.json").exists()


@on_slurm
def test_the_dry_run_says_why_each_job_runs_and_what_it_asks_for(reader: Reader) -> None:
    plan = reader.said[f"{EVERYTHING} -n"][0]
    training = plan[plan.index("rule context_distillation_train") :].split("\n\n")[0]
    assert "reason: " in training and "slurm_partition=gpu" in training and "gpu=1" in training


@on_slurm
def test_a_running_job_is_watched(reader: Reader) -> None:
    running = reader.said[STATUS][0].split("running:\n", 1)[1]
    assert running.startswith(f"  results/{STUDENT}")
    assert re.search(
        rf"^{reader.training} \w+ \S+ {one_node.NODE} rule_context_distillation_train",
        reader.said[QUEUE][0],
        re.MULTILINE,
    )
    assert re.search(r"step \d+/24: loss .* tokens/s, .* MiB, ETA ", reader.said[TAIL][0])
    assert any(STUDENT in run for run in reader.said[CURVES])


@on_slurm
def test_what_a_job_finishes_after_its_workflow_has_died_counts(reader: Reader) -> None:
    assert [log.stem for log in reader.training_logs()] == [reader.training]


@on_slurm
def test_every_group_of_small_jobs_goes_through_slurm_and_fits_a_node_of_eight_processors(reader: Reader) -> None:
    logs = (reader.checkout.directory / "logs/slurm").glob("group_*/**/*.log")
    submitted = {log.stem: log.relative_to(reader.checkout.directory / "logs/slurm").parts[0] for log in logs}
    assert {name.split("_")[1] for name in submitted.values()} == GROUPS
    for job in submitted:
        said = one_node.run("scontrol", "show", "job", job)
        assert int(re.findall(r"NumCPUs=(\d+)", said)[0]) <= 8, said


@on_slurm
def test_without_an_accounting_database_sacct_says_what_the_page_says(reader: Reader) -> None:
    [said] = reader.said[COST]
    assert f"`{said.strip()}`" in PAGE
