"""A progress bar on rows and steps, with the time left; and between two steps the place where a run can be ended."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 15.0  # without a terminal, a line this often
GUIDED_COST = 4  # a guided step in unguided ones: two backward passes and the encoder


class SamplingProgress(Callback):
    """On stderr: pilot and learning first, then rows and steps of this rank. A bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._trainer: Trainer | None = None
        self._phase = ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if trainer.is_global_zero:
            pl_module.progress = self.report

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            batches = list(trainer.predict_dataloaders.dataset)[trainer.global_rank :: trainer.world_size]
            # once, not at every step: a batch may have thousands of rows
            self._rows = [len(b) for b in batches]
            self._costs = [sum(GUIDED_COST if r.strength > 0 else 1 for r in b) for b in batches]
        self._batch = batch_idx

    def report(self, phase: str, done: int, total: int) -> None:
        """done of total steps: of the pilot, of what is learned from it, or of the batch at hand."""
        # Lightning notes the signal, and its predict loop never looks
        if self._trainer and self._trainer.received_sigterm:
            raise KeyboardInterrupt
        if phase in ("pilot", "learning"):
            self._show(phase, f"step {done} of {total}", done, total)
            return
        rows, costs, k = self._rows, self._costs, self._batch
        finished = sum(rows[: k + (done == total)])
        what = f"{finished} of {sum(rows)} rows, step {done} of {total}"
        self._show("sampling", what, sum(costs[:k]) * total + costs[k] * done, sum(costs) * total)

    def _show(self, phase: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._said, self._task = phase, now, now, None
        if sys.stderr.isatty():
            self._draw(f"{phase}: {what}", done, total)
        elif now - self._said > QUIET_SECONDS or done == total:
            self._said, elapsed = now, now - self._began
            time_ = (
                f"took {elapsed:.0f} s"
                if done == total
                else f"about {elapsed * (total - done) / done:.0f} s left"
            )
            print(f"{phase}: {what}, {time_}", file=sys.stderr, flush=True)

    def _draw(self, text: str, done: int, total: int) -> None:
        if self._bar is None:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
            self._bar = Progress(
                *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True)
            )
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(text, total=total)
        self._bar.update(self._task, completed=done, description=text)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._phase = ""
