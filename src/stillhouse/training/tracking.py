"""Where a run can be watched: the metrics file, accelerate's trackers and the progress bar.

`metrics.jsonl` is what figures read; TensorBoard is always written; the other trackers are chosen by
configuration and keep their run's id over a resume. Where standard error is no terminal the bar becomes a
line every half minute.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import ProjectConfiguration
from tqdm import tqdm

from stillhouse.config.training import TrackingSettings
from stillhouse.runtime.device_usage import DeviceMonitor
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text, read_json, write_json
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import placement
from stillhouse.training.processes import on_processor

TRACKING_FOLDER, METRICS_FILE, RUN_IDS = "tracking", "metrics.jsonl", "tracker_runs.json"
SECONDS_BETWEEN_LINES = 30.0
# Where a tracker whose server chooses the id keeps it, from accelerate's wrapped run object.
SERVER_CHOSEN_IDS = {"mlflow": "info.run_id", "aim": "hash", "clearml": "id"}


def check_trackers(settings: TrackingSettings) -> None:
    """Refuse a tracker whose package is missing: accelerate would leave it out with a debug message."""
    available = {str(name) for name in get_available_trackers()}
    for name in ("tensorboard", *settings.trackers):
        if name not in available:
            raise UserError(
                f"tracking.trackers: the package of '{name}' is not installed: pip install {name}, or drop it"
            )


class Tracking:
    """The trackers of one run, started on the main process."""

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrackingSettings,
        work_dir: Path,
        run_name: str,
        configuration: Mapping[str, Any],
        completed_steps: int,
    ) -> None:
        self.accelerator = accelerator
        self._devices = DeviceMonitor()
        if accelerator.is_main_process:
            self._devices.start()
            run_ids_file = work_dir / RUN_IDS
            known: dict[str, str] = read_json(run_ids_file) if run_ids_file.exists() else {}
            run_ids: dict[str, str | None] = {name: known.get(name) or new_run_id(name) for name in settings.trackers}
            arguments: dict[str, dict[str, Any]] = {
                name: tracker_arguments(name, run_id, run_name, work_dir) for name, run_id in run_ids.items()
            }
            arguments["tensorboard"] = {"purge_step": completed_steps + 1}
            accelerator.init_trackers(
                settings.project, config=flat({**configuration, **placement()}), init_kwargs=arguments
            )
            for name in set(run_ids) & set(SERVER_CHOSEN_IDS):
                value: Any = accelerator.get_tracker(name, unwrap=True)
                for attribute in SERVER_CHOSEN_IDS[name].split("."):
                    value = getattr(value, attribute)
                run_ids[name] = value
            # Written before the first step: a run that is killed before its first state still resumes its
            # curves.
            write_json(run_ids_file, run_ids)

    def log(self, row: Mapping[str, float]) -> None:
        """Send one row of metrics, and what the GPUs do meanwhile, to every tracker."""
        metrics = {key: value for key, value in row.items() if key != "step"}
        self.accelerator.log(metrics | self._devices.newest(), step=int(row["step"]))

    def close(self) -> None:
        """Flush and end the trackers; accelerate's `end_training` would end the process group as well."""
        self._devices.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def log_table(
    settings: TrackingSettings,
    folder: Path,
    run_name: str,
    table_name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    """Give every tracker a table, in a run of its own; TensorBoard, below `folder`, shows it as Markdown.

    A tracker that accelerate has no tables for is left out, with a line in the log.
    """
    check_trackers(settings)
    accelerator = Accelerator(
        cpu=on_processor(),
        log_with=["tensorboard", *settings.trackers],
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
    )
    arguments = {name: tracker_arguments(name, new_run_id(name), run_name, folder) for name in settings.trackers}
    accelerator.init_trackers(settings.project, init_kwargs=arguments)
    for tracker in accelerator.trackers:
        if isinstance(tracker, TensorBoardTracker):
            tracker.writer.add_text(table_name, markdown_table(columns, rows))
        elif hasattr(tracker, "log_table"):
            tracker.log_table(table_name, columns=list(columns), data=[list(row) for row in rows])
        else:
            logger.info("%s takes no tables: '%s' is not sent there", tracker.name, table_name)
        tracker.finish()


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as Markdown, one line each."""
    cells = [columns, ["---"] * len(columns), *rows]
    plain = [[cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in plain)


def new_run_id(name: str) -> str | None:
    """A fresh id (SwanLab's have 21 characters), or None for a tracker whose server chooses it."""
    return None if name in SERVER_CHOSEN_IDS else uuid.uuid4().hex[: 21 if name == "swanlab" else 32]


def tracker_arguments(name: str, run_id: str | None, run_name: str, work_dir: Path) -> dict[str, Any]:
    """What the tracker's own start function takes to begin the run `run_id`, or to continue it."""
    arguments: dict[str, dict[str, Any]] = {
        "wandb": {"id": run_id, "name": run_name, "resume": "allow"},
        "swanlab": {"id": run_id, "experiment_name": run_name, "resume": "allow"},
        "trackio": {"name": f"{run_name}-{(run_id or '')[:8]}", "resume": "allow"},
        "comet_ml": {"experiment_key": run_id, "mode": "get_or_create"},
        "mlflow": {"run_id": run_id, "run_name": run_name},
        "aim": {"run_hash": run_id},
        "clearml": {"task_name": run_name, "continue_last_task": run_id or False},
        "dvclive": {"dir": str(work_dir / TRACKING_FOLDER / "dvclive"), "resume": True},
    }
    return arguments[name]


class MetricsFile:
    """`metrics.jsonl`: one JSON object per logged step, in order of steps."""

    def __init__(self, path: Path, completed_steps: int) -> None:
        """Open the file and drop the rows after `completed_steps`, and a last line that a crash cut short."""
        rows = [row for row in read_metrics(path) if row["step"] <= completed_steps] if path.exists() else []
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = path.open("a", encoding="utf-8")

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row and hand it to the operating system."""
        self._stream.write(json.dumps(dict(row)) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file, without a line that a crash cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            logger.warning("%s: dropped an incomplete line", path)
    return rows


class ProgressReport:
    """A progress bar on a terminal; elsewhere a line at the first step, the last, and every half minute."""

    def __init__(self, total_steps: int, completed_steps: int, run_name: str) -> None:
        self.total_steps = total_steps
        self._bar = (
            tqdm(total=total_steps, initial=completed_steps, desc=run_name, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )
        self._next_line = 0.0

    def update(self, row: Mapping[str, float]) -> None:
        """Show the metrics of a step."""
        figures = (
            f"loss {row['loss']:.4f}, {row['tokens_per_second']:.0f} tokens/s, {row['memory_mib']:.0f} MiB, "
            f"ETA {timedelta(seconds=round(row['eta_seconds']))}"
        )
        step = int(row["step"])
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() >= self._next_line or step == self.total_steps:
            logger.info("step %d/%d: %s", step, self.total_steps, figures)
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as dotted keys with plain values, which every tracker accepts."""
    result: dict[str, str | int | float | bool] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return result
