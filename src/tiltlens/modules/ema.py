"""Averaged weights: the network that validation, samples and exports use.

After step n = 1, 2, ... with weights w the average follows

    w_bar <- d_n w_bar + (1 - d_n) w,   d_1 = 0,   d_n = min(decay, n / (9 + n))

The warm-up lets a short run forget its initialisation: the average spans about the last tenth of the steps
until 1 / (1 - decay) steps are less than that.
"""

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from tiltlens.errors import UserError


def warm_decay(decay: float, n_averaged: int) -> float:
    """d = min(decay, (1 + n) / (10 + n)), n the number of updates already in the average (n >= 1)."""
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class WarmEMA(WeightAveraging):
    """Exponential moving average of the weights with a warm-up; Lightning swaps it in where weights are read.

    Buffers are copied at the start and not averaged: the networks trained here keep only constants there.
    Raises ValueError for a decay outside [0, 1), UserError for a strategy that shards the weights.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay = {decay}: expected 0 <= decay < 1")

        def average(averaged: list[Tensor], current: list[Tensor], n: Tensor | int) -> None:
            torch._foreach_lerp_(averaged, current, 1 - warm_decay(decay, int(n)))  # all weights in one call

        super().__init__(use_buffers=False, multi_avg_fn=average)
        self.decay = decay

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"WarmEMA averages whole weights, and trainer.strategy = {type(trainer.strategy).__name__} shards them: "
                "take the callback out, or train with ddp"
            )
        # In this hook the module still lies in main memory; its average belongs where it will be trained.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
