"""The one training loop. It knows nothing of any study: a model, an objective and data go in, checkpoints
come out.

- One update uses `batch_size` consecutive examples of an endless stream of permutations, whatever the number
  of processes; each process takes a contiguous share. The gradient is the sum over units divided by their
  global count.
- Trained parameters and AdamW's moments are fp32. Under bf16 the forward pass autocasts; frozen weights may
  be bf16.
- A trained parameter that comes frozen may lie in the memory of other frozen weights. The first update of its group
  gives it memory of its own; before that no state or checkpoint holds it, since the study builds it anew.
- Random states are a function of (seed, step, process), set anew for each update. So a resumed run, or an
  update that is redone after memory ran out, draws the same: dropout masks, the Gumbel noise of the consistency
  lens, the latent dropout of LatentWire. Another number of processes or another micro-batch size draws others,
  and changes results by that alone.
"""

from __future__ import annotations

import math
import resource
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast, broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stillhouse.config.training import TrackingSettings, TrainingSettings
from stillhouse.models.loading import enable_gradient_checkpointing
from stillhouse.models.precision import ResolvedPrecision, resolve_precision, torch_dtype
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger
from stillhouse.runtime.scheduler import requeue_interrupted_job
from stillhouse.runtime.seeds import derived_seed, seed_everything
from stillhouse.training.checkpoints import (
    Progress,
    export,
    latest_valid_state,
    load_state,
    save_state,
    save_weights,
)
from stillhouse.training.data_order import examples_of_step, slice_of_process
from stillhouse.training.loading import Loader
from stillhouse.training.objective import Objective, TrainingData
from stillhouse.training.optimizers import (
    ParameterGroup,
    build_optimizer,
    parameter_groups,
    set_learning_rate,
    trained_parameters,
)
from stillhouse.training.processes import (
    StopRequest,
    TrainingInterrupted,
    on_processor,
    sum_gradients,
    sum_statistics,
)
from stillhouse.training.schedules import learning_rate_factor
from stillhouse.training.sharding import scalar, shard
from stillhouse.training.tracking import (
    METRICS_FILE,
    TRACKING_FOLDER,
    MetricsFile,
    ProgressReport,
    Tracking,
    check_trackers,
)

# Metrics of a model at a step, on data that it does not learn from.
Validation = Callable[[nn.Module, int], Mapping[str, float]]


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run cost, over all of its attempts; for the run record."""

    steps: int
    resumed_from: int
    precision: ResolvedPrecision
    processes: int
    seconds: float
    units: int
    tokens: int
    tokens_per_second: float
    peak_memory_mib: float
    micro_batch_tokens: int


def train(
    model: nn.Module,
    objective: Objective[Any],
    data: TrainingData[Any],
    settings: TrainingSettings,
    *,
    work_dir: Path,
    output_dir: Path,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    groups: Sequence[ParameterGroup] | None = None,
    tracking: TrackingSettings | None = None,
    run_name: str = "training",
    validate: Validation | None = None,
    clip_apart: bool = False,
) -> TrainingResult:
    """Train the parameters of `model` that require a gradient, from the newest valid state of `work_dir`.

    `work_dir` keeps what a killed run needs to continue; `output_dir` gets `checkpoint-<step>/` for each of
    `settings.saved_steps`, `metrics.jsonl` and `tensorboard/` at the end. `tokenizer` goes with full
    checkpoints; `groups` replaces the groups that `settings.learning_rate_multipliers` describes. `validate` gives
    metrics of the model at each saved step, on the main process; they join that step's row. `clip_apart` bounds the
    gradient of each group by itself: groups that have nothing in common train as if each were alone.

    Raises `UserError` for what the user can mend (missing tracker, one example that does not fit in memory, a
    loss that is not finite) and `TrainingInterrupted` after SIGTERM.
    """
    tracking = tracking or TrackingSettings()
    check_trackers(tracking)
    work_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        cpu=on_processor(),
        mixed_precision="no",  # autocast is entered below, around the whole objective
        log_with=["tensorboard", *tracking.trackers],
        project_config=ProjectConfiguration(str(work_dir), logging_dir=str(work_dir / TRACKING_FOLDER)),
    )
    if settings.batch_size < accelerator.num_processes:
        raise UserError(f"training.batch_size ({settings.batch_size}) is below {accelerator.num_processes} processes")
    if len(data) == 0:
        raise UserError("there are no training examples: check the data split and train_examples")
    trainer = Trainer(model, objective, data, settings, accelerator, seed, work_dir, groups, clip_apart)
    completed = trainer.resume()
    configuration = {**settings.model_dump(mode="json"), "seed": seed}
    watch = Tracking(accelerator, tracking, work_dir, run_name, configuration, completed)
    try:
        trainer.run(watch, run_name, tokenizer, validate)
    finally:
        watch.close()
    if accelerator.is_main_process:
        export(work_dir, output_dir, settings.saved_steps)
        shutil.copyfile(work_dir / METRICS_FILE, output_dir / METRICS_FILE)
        curves = work_dir / TRACKING_FOLDER / tracking.project
        shutil.copytree(curves, output_dir / "tensorboard", dirs_exist_ok=True)
    accelerator.wait_for_everyone()
    return trainer.result(completed)


class Trainer:
    """One run: its model, optimiser and progress on this process."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective[Any],
        data: TrainingData[Any],
        settings: TrainingSettings,
        accelerator: Accelerator,
        seed: int,
        work_dir: Path,
        groups: Sequence[ParameterGroup] | None,
        clip_apart: bool = False,
    ) -> None:
        self.objective, self.data, self.settings = objective, data, settings
        self.accelerator, self.seed, self.work_dir = accelerator, seed, work_dir
        self.device = accelerator.device
        self.precision = resolve_precision(settings.precision, self.device)
        self.model = model.to(self.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if settings.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        self.sharded = settings.sharding != "none" and accelerator.num_processes > 1
        if self.sharded:
            if groups:
                raise UserError("training.sharding: this study has parameter groups of its own: set it to none")
            for parameter in model.parameters():
                parameter.data = broadcast(parameter.data)
            shard(model, self.device, keep_weights_gathered=settings.sharding == "zero2")
        groups = groups or parameter_groups(model, settings.learning_rate_multipliers)
        self.parameters = trained_parameters(groups)
        self.lent = {name for name, parameter in self.parameters.items() if not parameter.requires_grad}
        self.clipped = [trained_parameters([group]) for group in groups] if clip_apart else [self.parameters]
        self.optimizer = build_optimizer(groups, settings.learning_rate, settings.weight_decay)
        self.progress = Progress(micro_batch_tokens=settings.micro_batch_tokens)
        self.loader = Loader(self._micro_batches, settings.steps, self.device, ahead=self.device.type != "cpu")

    def resume(self) -> int:
        """Load the newest valid state; returns the number of completed steps."""
        states: list[Path | None] = [None]
        if self.accelerator.is_main_process:
            states = [latest_valid_state(self.work_dir, self.settings.saved_steps)]
        [state] = broadcast_object_list(states)
        if state is not None:
            self.progress = load_state(state, self.parameters, self.optimizer)
            if self.accelerator.is_main_process:
                logger.info("continuing from step %d of %d", self.progress.step, self.settings.steps)
        elif not self.sharded:
            # Every process starts from the same weights, also where a study forgot to seed its own modules.
            for parameter in self.owned.values():
                parameter.data = broadcast(parameter.data)
        return self.progress.step

    @property
    def owned(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, without those that are still lent."""
        updated = self.optimizer.state
        return {name: own for name, own in self.parameters.items() if name not in self.lent or updated.get(own)}

    def run(
        self,
        watch: Tracking,
        run_name: str,
        tokenizer: PreTrainedTokenizerBase | None,
        validate: Validation | None = None,
    ) -> None:
        """Make the remaining updates; log and save on the way."""
        settings, main = self.settings, self.accelerator.is_main_process
        completed = self.progress.step
        metrics = MetricsFile(self.work_dir / METRICS_FILE, completed) if main else None
        report = ProgressReport(settings.steps, completed, run_name) if main else None
        self.model.train()
        with StopRequest() as stop, closing(self.loader):
            for step in range(completed + 1, settings.steps + 1):
                try:
                    row, stopped = self.update(step, stop)
                except torch.AcceleratorError as error:
                    raise UserError(
                        f"step {step}: the device failed ({str(error).strip().splitlines()[0]}): see nvidia-smi and "
                        "the kernel's log, then run the same command again: it continues from the last state"
                    ) from error
                validated = validate is not None and step in settings.saved_steps
                if main and validate and validated:
                    row |= validate(self.model, step)
                if metrics and report and (step % settings.log_every == 0 or step == settings.steps or validated):
                    metrics.append(row)
                    watch.log(row)
                    report.update(row)
                if step in settings.saved_steps:
                    save_weights(self.work_dir, step, self.model, torch_dtype(self.precision), tokenizer, self.owned)
                if step % settings.resume_every == 0 or step == settings.steps or stopped:
                    save_state(
                        self.work_dir,
                        self.progress,
                        self.owned,
                        self.optimizer,
                        settings.keep_resume_states,
                    )
                if stopped and step < settings.steps:
                    self.accelerator.wait_for_everyone()
                    if main:
                        requeue_interrupted_job()
                    self.accelerator.wait_for_everyone()
                    raise TrainingInterrupted
        if metrics and report:
            metrics.close()
            report.close()

    def update(self, step: int, stop: StopRequest) -> tuple[dict[str, float], bool]:
        """Make one optimiser update; returns its row of metrics, and whether any process wants to stop."""
        started = time.monotonic()
        rate = self.settings.learning_rate * learning_rate_factor(step - 1, self.settings.schedule, self.settings.steps)
        rates = set_learning_rate(self.optimizer, rate, step)
        own = self._accumulate_within_memory(step) | {"stop": float(stop.received)}
        sums = sum_statistics(own, self.device)
        learning = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        if not self.sharded:
            sum_gradients(learning)
        count, tokens = sums.pop("count"), sums.pop("tokens")
        stopped = sums.pop("stop") > 0
        if count == 0:
            raise UserError(f"step {step}: the batch has nothing to learn (no counted unit): check the data")
        for parameter in learning:
            assert parameter.grad is not None
            # FSDP leaves the mean over processes where `sum_gradients` leaves the sum.
            parameter.grad /= count / self.accelerator.num_processes if self.sharded else count
        norm = self._clip_gradients()
        if not math.isfinite(norm):
            raise UserError(
                f"step {step}: the gradient is not finite (loss {sums['loss'] / count}): lower learning_rate "
                "or use precision=fp32; the states of earlier steps are kept"
            )
        self.optimizer.step()
        seconds = time.monotonic() - started
        self._advance(step, seconds, int(count), int(tokens))
        mean_seconds = self.progress.seconds / step
        return {
            "step": step,
            **{name: value / count for name, value in sums.items()},
            "learning_rate": rate,
            **{f"learning_rate/{name}": value for name, value in rates.items() if len(rates) > 1},
            "gradient_norm": norm,
            "units": count,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": self.progress.seconds,
            "memory_mib": self.progress.peak_memory_mib,
            "eta_seconds": mean_seconds * (self.settings.steps - step),
        }, stopped

    def _clip_gradients(self) -> float:
        """Bound the norm of the gradient, of all parameters or group by group; returns the largest norm before."""
        norms = []
        for members in self.clipped:
            learning = [parameter for parameter in members.values() if parameter.requires_grad]
            norms.append(scalar(nn.utils.clip_grad_norm_(learning, self.settings.max_gradient_norm)))
        return max(norms, key=lambda norm: (not math.isfinite(norm), norm))

    def result(self, resumed_from: int) -> TrainingResult:
        """The summary of the run so far."""
        facts = asdict(self.progress)
        return TrainingResult(
            steps=facts.pop("step"),
            resumed_from=resumed_from,
            precision=self.precision,
            processes=self.accelerator.num_processes,
            tokens_per_second=self.progress.tokens / max(self.progress.seconds, 1e-9),
            **facts,
        )

    def _accumulate_within_memory(self, step: int) -> dict[str, Tensor | float]:
        """`_accumulate`, again with half the token budget as long as memory runs out."""
        while True:
            try:
                return self._accumulate(step)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.sharded:
                    raise UserError(
                        f"step {step}: out of memory, and one process alone cannot redo a sharded step: lower "
                        "training.micro_batch_tokens, or use more GPUs"
                    ) from error
            # Outside the handler: the traceback held the tensors of the failed pass.
            clear_device_cache(garbage_collection=True)
            budget = self.progress.micro_batch_tokens
            if sum(1 for _ in self._micro_batches(step, budget)) == len(self._examples(step)):
                raise UserError(
                    f"step {step}: a single example does not fit in memory: switch on gradient_checkpointing, "
                    "lower max_length, or use a larger device"
                )
            self.progress = replace(self.progress, micro_batch_tokens=max(1, budget // 2))
            logger.warning("step %d: out of memory: micro_batch_tokens is now %d", step, max(1, budget // 2))

    def _accumulate(self, step: int) -> dict[str, Tensor | float]:
        """Leave the sum of this process's gradients in `.grad`; returns sums of loss, terms, counts."""
        # Of the process too, lest its examples get the draws of another one's: dropout masks, Gumbel noise of the
        # consistency lens, latent dropout of LatentWire.
        seed_everything(derived_seed(self.seed, "step", step, self.accelerator.process_index))
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor | float] = defaultdict(float)
        autocast = torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.precision == "bf16",
            # A cast that a teacher's pass without gradients left in the cache would cut the student's graph.
            cache_enabled=False,
        )
        micro_batches = self.loader.micro_batches(step, self.progress.micro_batch_tokens)
        for (micro_batch, tokens), counted in self._in_step(micro_batches):
            with autocast:
                terms = self.objective(self.model, micro_batch, step)
            (terms.total if counted else 0 * terms.total).backward()
            if not counted:
                continue
            fixed = {"loss": terms.total.detach(), "count": terms.count, "tokens": tokens}
            named = {**terms.terms, **fixed}
            for name, value in named.items():
                sums[name] = sums[name] + (value.double() if isinstance(value, Tensor) else value)
        return dict(sums)

    def _in_step(self, micro_batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Each micro-batch, and whether it counts: sharded processes make equally many passes, the last ones idle."""
        if not self.sharded:
            yield from ((micro_batch, True) for micro_batch in micro_batches)
            return
        own = list(micro_batches)
        passes = torch.tensor(len(own), device=self.device)
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX)
        for number in range(int(passes)):
            yield own[min(number, len(own) - 1)], number < len(own)

    def _micro_batches(self, step: int, token_budget: int) -> Iterable[Any]:
        return self.data.micro_batches(self._examples(step), token_budget)

    def _examples(self, step: int) -> Sequence[int]:
        indices = examples_of_step(step, self.settings.batch_size, len(self.data), self.seed)
        return slice_of_process(indices, self.accelerator.process_index, self.accelerator.num_processes)

    def _advance(self, step: int, seconds: float, units: int, tokens: int) -> None:
        memory = (
            torch.cuda.max_memory_allocated(self.device) / 2**20
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        )
        self.progress = replace(
            self.progress,
            step=step,
            seconds=self.progress.seconds + seconds,
            units=self.progress.units + units,
            tokens=self.progress.tokens + tokens,
            peak_memory_mib=max(self.progress.peak_memory_mib, memory),
        )
