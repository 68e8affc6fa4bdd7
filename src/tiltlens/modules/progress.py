"""A progress bar on steps and rows, with the time left."""

import sys
import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0  # without a terminal, a line this often


class SamplingProgress(Callback):
    """On stderr: the pilot first, then rows and steps. A bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._said = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            pl_module.progress = self.report

    def on_predict_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            mine = trainer.predict_dataloaders.dataset
            self._rows = [len(b) for b in mine]
            self._total = sum(self._rows) * len(pl_module.sampler.chain)
            self._steps, self._done, self._began = len(pl_module.sampler.chain), 0, time.time()

    def report(self, phase: str, done: int, total: int) -> None:
        """phase "pilot" counts steps; phase "step" counts row-steps of the batch at hand."""
        if phase == "pilot":
            self._show("pilot", done, total, "steps")
            return
        self._show("rows x steps", self._done + done, self._total, f"row-steps ({self._steps} a row)")
        if done == total:
            self._done += total

    def _show(self, label: str, done: int, total: int, what: str) -> None:
        if not sys.stderr.isatty():
            now = time.time()
            if now - self._said > QUIET_SECONDS or done == total:
                self._said = now
                left = ""
                if label != "pilot" and done:
                    left = f", about {(now - self._began) * (total - done) / done:.0f} s left"
                print(f"{label}: {done} of {total} {what}{left}", file=sys.stderr, flush=True)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
        if self._task is None or self._bar.tasks[-1].description != label:
            self._task = self._bar.add_task(label, total=total)
        self._bar.update(self._task, completed=done)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
