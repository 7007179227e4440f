"""The training loop: step, validate, show, save, stop."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .checkpoint import capture_rng, save_checkpoint
from .engine import Engine
from .errors import CheckpointError
from .meters import Meter
from .processes import all_reduce, gather_text
from .ranges import Profile, named
from .state import Batch, StepReport, TrainState
from .step import train_step, validation_loss
from .stop import Stop, StopSignal
from .warm_up import is_wanted, warm_up

if TYPE_CHECKING:
    from .config import RunConfig
    from .data.loader import StepLoader
    from .evals.spot_check import SpotCheck
    from .penalty import SpectralPenalty
    from .trackers import Tracker

log = logging.getLogger("flex.loop")

MAX_FAILED_SAVES = 3  # a full disk must not end a long run at once, nor let it work for nothing
MAX_SKIPPED_IN_A_ROW = 3


@dataclass
class Trainer:
    """What the loop works on. All processes hold one; only rank 0 writes."""

    cfg: RunConfig
    engine: Engine
    loader: StepLoader
    validation: list[Batch]
    penalty: SpectralPenalty | None
    checkpoints: Path
    extra: dict[str, object]  # into every checkpoint: config hash, versions
    spot_check: SpotCheck | None = None
    state: TrainState = field(default_factory=TrainState)
    failed_saves: int = 0
    skipped_in_a_row: int = 0

    def fit(
        self, meter: Meter, trackers: Sequence[Tracker], stop: StopSignal, profile: Profile
    ) -> Stop:
        """Train to the last step or until asked to stop; returns why it ended (GO: it is done)."""
        total = self.loader.total_steps
        if self.state.step < total and is_wanted(self.cfg, self.engine.device):
            warm_up(self.cfg, self.engine, self.loader, self.state.step)
        if self.state.step == 0 and self.validation:
            before = validation_loss(self.engine, self.validation)
            self.state.first_validation_loss = before
            meter.validation(0, before)
        while self.state.step < total:
            wish = stop.poll()
            flags = (float(wish == Stop.STOP), float(wish == Stop.SAVE))
            with profile.step(self.state.step + 1):
                report, (stops, saves) = train_step(
                    self.cfg, self.engine, self.loader, self.penalty, self.state.step, total, flags
                )
            self._count(report)
            last = report.step == total
            if self.validation and (last or is_due(report.step, self.cfg.train.eval_every)):
                with named("validation"):
                    report.validation_loss = validation_loss(self.engine, self.validation)
                self.state.last_validation_loss = report.validation_loss
            if self.spot_check and (last or is_due(report.step, self.cfg.eval.every)):
                with named("spot check"):
                    found = self.spot_check.run(self.engine)
                report.passed, report.evaluated = found.passed, found.tasks
            if self.penalty is not None and is_due(report.step, self.cfg.train.log_every):
                self.engine.gather()
                report.high_band = self.penalty.high_band_share()
            with named("log"):
                record = meter.update(report)
                for tracker in trackers:
                    tracker.log(record, report.step)
            if last or stops or saves or is_due(report.step, self.cfg.train.save_every):
                with named("save"):
                    self.save()
            if stops and not last:
                return Stop.STOP
        return Stop.GO

    def _count(self, report: StepReport) -> None:
        state = self.state
        state.step = report.step
        state.tokens += report.tokens
        state.positions += report.positions
        state.seconds += report.seconds
        state.refreshes += report.refreshed
        state.skipped += report.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        if report.skipped:
            log.warning(
                "step %d skipped: the gradient is not finite (%d so far)",
                report.step,
                state.skipped,
            )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise CheckpointError(
                f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite (loss {report.loss})",
                "nothing has been updated since; going on would not change that",
                "lower optim.lr, set model.dtype=float32, or look at the data of these steps",
            )

    def save(self) -> None:
        """Write a checkpoint. Every process must call it. A failure is counted; the third in a row raises."""
        cfg, engine = self.cfg, self.engine
        rng = gather_text(json.dumps(capture_rng(engine.device, engine.rank)))
        self.state.rng = {key: value for one in rng for key, value in json.loads(one).items()}
        optimizer = engine.optimizer_state()
        tensors = {"adapter": engine.full_parameters(), "optimizer": optimizer.tensors}
        start = self.penalty.state_dict() if self.penalty is not None else {}
        if start:
            tensors["penalty"] = start
        failed = 0.0
        if engine.rank == 0:
            extra = {**self.extra, "counters": optimizer.counters}
            try:
                path = save_checkpoint(self.checkpoints, self.state, tensors, extra, cfg.train.keep)
                log.info("checkpoint %s", path)
            except CheckpointError as error:
                failed = 1.0
                problem = error
        if all_reduce(torch.tensor(failed)).item():
            self.failed_saves += 1
            if engine.rank == 0:
                log.error("save %d of %d failed: %s", self.failed_saves, MAX_FAILED_SAVES, problem)
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise CheckpointError(
                    f"{self.failed_saves} saves in a row failed",
                    "work that is never written is lost at the first crash",
                    "free disk space or mend the permissions of the run folder, then start the same command again",
                )
        else:
            self.failed_saves = 0


def is_due(step: int, every: int) -> bool:
    """Whether something done each `every` steps (0: never) is due after `step` updates."""
    return every > 0 and step % every == 0
