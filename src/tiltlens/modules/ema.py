"""Averaged weights: the network that validation, samples and exports use.

After step n = 1, 2, ... with weights w the average follows

    w_bar <- d_n w_bar + (1 - d_n) w,   d_1 = 0,   d_n = min(decay, n / (9 + n))

The warm-up lets a short run forget its initialisation: the average spans about the last tenth of the steps
until 1 / (1 - decay) steps are less than that.
"""

from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def warm_decay(decay: float, n_averaged: int) -> float:
    """d = min(decay, (1 + n) / (10 + n)), n the number of updates already in the average (n >= 1)."""
    return min(decay, (1 + n_averaged) / (10 + n_averaged))


class WarmEMA(WeightAveraging):
    """Exponential moving average of the weights with a warm-up; Lightning swaps it in where weights are read.

    Buffers are copied at the start and not averaged: the networks trained here keep only constants there.
    Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay = {decay}: expected 0 <= decay < 1")

        def average(averaged: Tensor, current: Tensor, n: Tensor | int) -> Tensor:
            return averaged.lerp(current, 1 - warm_decay(decay, int(n)))

        super().__init__(use_buffers=False, avg_fn=average)
        self.decay = decay
