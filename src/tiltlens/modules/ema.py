"""Averaged weights: the network that validation, samples and exports use.

After step n = 1, 2, ... with weights w the average follows

    w_bar <- d_n w_bar + (1 - d_n) w,   d_1 = 0,   d_n = min(decay, n / (9 + n))

The warm-up lets a short run forget its initialisation: the average spans about the last tenth of the steps
until 1 / (1 - decay) steps are less than that.
"""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from tiltlens.modules.sharding import ShardedAverage, is_sharded


def warm_decay(decay: float, n_averaged: int) -> float:
    """d = min(decay, (1 + n) / (10 + n)), n the number of updates already in the average (n >= 1)."""
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class WarmEMA(WeightAveraging):
    """Exponential moving average of the weights with a warm-up; Lightning swaps it in where weights are read.

    Buffers are copied at the start and not averaged: the networks trained here keep only constants there. Of weights in
    shards (`tiltlens.modules.sharding`) the average is in shards, too; a checkpoint holds either one whole.
    Raises ValueError for a decay outside [0, 1), UserError for a strategy that shards in another way.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay = {decay}: expected 0 <= decay < 1")

        def average(averaged: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
            torch._foreach_lerp_(averaged, current, 1 - warm_decay(decay, int(n)))  # all weights in one call

        super().__init__(use_buffers=False, multi_avg_fn=average)
        self.decay, self._rule = decay, average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._sharded, self._handed = is_sharded(trainer), False
        if stage == "fit" and not self._sharded:
            # In this hook the module still lies in main memory; its average belongs where it will be trained.
            device = trainer.strategy.root_device
            self._average_model = AveragedModel(pl_module, device, use_buffers=False, multi_avg_fn=self._rule)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sharded:  # the weights have become shards since setup
            self._average_model = ShardedAverage(pl_module, self._rule)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._handed = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that is resumed at its end trains no step, and `on_train_end` is not called: the weights to go on from,
        # which a checkpoint puts into the module, would be exported.
        if not self._handed:
            self.on_train_end(trainer, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if not self._sharded or self._average_model is None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        elif "current_model_state" in checkpoint:
            n = int(checkpoint["averaging_state"]["n_averaged"])
            self._average_model.restore(pl_module, n, checkpoint["current_model_state"])
