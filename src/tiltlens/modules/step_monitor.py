"""What is watched at every step: the gradient's norm, images a second, and that both loss and gradient are numbers."""

import time
from collections import deque
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from tiltlens.errors import UserError
from tiltlens.modules.sharding import whole

LAG = 2  # steps: reading a number waits for an accelerator to reach it, and two steps later it has


class StepMonitor(Callback):
    """Logs gradient_norm (before clipping) and images_per_second (all ranks; validation and saving not counted).

    Stops at a loss or gradient that is not finite with the batch named, before anything more is saved: UserError.
    With fp16 the scaler skips such gradients: there only the loss counts.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watched: deque[tuple[str, str, Tensor]] = deque()
        self._batch, self._images, self._since = "", 0, time.perf_counter()
        self._told, self._scaled = trainer.global_step, trainer.precision == "16-mixed"

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer, keep=LAG)
        seed = batch.get("seed") if isinstance(batch, dict) else None
        rank = f" of rank {trainer.global_rank}" if trainer.world_size > 1 else ""
        self._batch = f"batch {batch_idx}{rank} of epoch {trainer.current_epoch}, seed {seed} (step {trainer.global_step})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._watched.append(("loss", self._batch, loss.detach()))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        if not self._scaled:
            self._watched.append(("gradient norm", self._batch, norm))
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            pl_module.log("gradient_norm", norm)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._images += _rows(batch) * trainer.world_size
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step > self._told:
            self._told = trainer.global_step
            now = time.perf_counter()
            pl_module.log("images_per_second", self._images / max(now - self._since, 1e-9))
            self._images, self._since = 0, now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._since += time.perf_counter() - self._paused

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer, keep: int = 0) -> None:
        """Reads all but the newest `keep` steps (of a loss and a norm each)."""
        while len(self._watched) > 2 * keep:
            what, batch, value = self._watched.popleft()
            if not torch.isfinite(value):
                saved = next(
                    (c.best_model_path for c in trainer.checkpoint_callbacks if c.best_model_path), None
                )
                kept = (
                    f"{saved} is the last good checkpoint" if saved else "no checkpoint was saved before it"
                )
                raise UserError(
                    f"{what} = {value.item()} at {batch}: training stopped, {kept}. Look at that batch, lower "
                    "model.learning_rate, or set trainer.gradient_clip_val"
                )


def _rows(batch: Any) -> int:
    values = (
        batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else [batch]
    )
    return next((len(v) for v in values if isinstance(v, Tensor)), 0)
