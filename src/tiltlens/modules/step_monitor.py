"""What is watched at every step: the gradient's norm, the speed, and that both loss and gradient are numbers."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from tiltlens.errors import UserError
from tiltlens.modules.sharding import whole

NAMES = 16  # images that are named in a message
LAG = 2  # steps: reading a number waits for an accelerator to reach it, and two steps later it has


class StepMonitor(Callback):
    """Logs gradient_norm (before clipping) and images_per_second, of all ranks, or what else `module.work_of(batch)` says that it
    works through: (name, count). From a validation or a saving to the next batch no time is counted.

    Stops at a loss or gradient that is not finite with the batch named, before anything more is saved: UserError.
    With fp16 the scaler skips such gradients: there only the loss counts.
    """

    def __init__(self) -> None:
        # here and not in on_fit_start, for a validation alone looks at them too
        self._watched: deque[tuple[str, str, Tensor | None, Tensor]] = deque()
        self._paused: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watched.clear()
        self._batch, self._rows, self._done, self._since = "", None, 0, time.perf_counter()
        self._paused = None
        self._told, self._scaled = trainer.global_step, trainer.precision == "16-mixed"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer, keep=LAG)
        now = time.perf_counter()
        self._since, self._paused = self._since + now - (self._paused or now), None
        told = batch if isinstance(batch, dict) else {}
        seed = f", seed {told['seed']}" if "seed" in told else ""
        rank = f" of rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        self._batch = (
            f"batch {batch_idx}{rank} of epoch {trainer.current_epoch}{seed} (step {trainer.global_step})"
        )
        self._rows = told.get("rows")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._paused = time.perf_counter(), None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._watched.append(("loss", self._batch, self._rows, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not self._scaled:
            self._watched.append(("gradient norm", self._batch, self._rows, norm))
        if _is_told(trainer, trainer.global_step + 1):
            pl_module.log("gradient_norm", norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        name, count = pl_module.work_of(batch) if hasattr(pl_module, "work_of") else ("images", _rows(batch))
        self._done += count * trainer.world_size
        if _is_told(trainer, trainer.global_step) and trainer.global_step > self._told:
            self._told = trainer.global_step
            now = time.perf_counter()
            pl_module.log(f"{name}_per_second", self._done / max(now - self._since, 1e-9))
            self._done, self._since = 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)
        self._pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        self._check(trainer)
        self._pause()

    def _pause(self) -> None:
        """Until the next batch. What comes after a saving has no hook of its own."""
        self._paused = self._paused or time.perf_counter()

    def _check(self, trainer: Trainer, keep: int = 0) -> None:
        """Reads all but the newest `keep` steps (of a loss and a norm each)."""
        while len(self._watched) > 2 * keep:
            what, batch, rows, value = self._watched.popleft()
            if not torch.isfinite(value):
                raise not_finite(trainer, what, float(value), batch + _images(trainer, rows))


def _is_told(trainer: Trainer, step: int) -> bool:
    """Whether a step's figures are logged; with trainer.log_every_n_steps = 0 none are."""
    return trainer.log_every_n_steps > 0 and step % trainer.log_every_n_steps == 0


def not_finite(trainer: Trainer, what: str, value: float, batch: str) -> UserError:
    """The error that stops a training at a loss or gradient that is no number; batch: which, in words."""
    paths = [*(c.best_model_path for c in trainer.checkpoint_callbacks), trainer.ckpt_path]
    saved = next((p for p in paths if p and Path(p).is_file()), None)
    kept = f"{saved} is the last good checkpoint" if saved else "no checkpoint was saved before it"
    return UserError(
        f"{what} = {value} at {batch}: training stopped, {kept}. Look at that batch, lower "
        "model.learning_rate, or set trainer.gradient_clip_val"
    )


def _images(trainer: Trainer, rows: Tensor | None) -> str:
    """Which images these rows of the training set are, in words, where the data know."""
    names = getattr(trainer.datamodule, "names", None)
    if rows is None or names is None:
        return ""
    found = names(rows.tolist())
    return f", images {', '.join(found[:NAMES])}" + (
        f" and {len(found) - NAMES} more" if len(found) > NAMES else ""
    )


def _rows(batch: Any) -> int:
    values = (
        batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    )
    return next((len(v) for v in values if isinstance(v, Tensor)), 0)
