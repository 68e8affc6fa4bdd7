"""Learning rates as a function of the share u of the run that is done.

u is the larger of steps / max_steps and, where trainer.max_time is set, time / max_time: on a shared machine
the speed is not known beforehand, and a decay that ends in time is worth more than steps that were planned.

    warm-up: u / warmup;  then 1;  over the last share `decay`, with r = (1 - u) / decay:
    r (linear) or (1 - cos(pi r)) / 2 (cosine)

decay = 0 is a constant rate, decay = 1 with cosine the cosine schedule.
"""

import math
from typing import Any

from lightning import Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tiltlens.errors import UserError


def rate(u: float, warmup: float, decay: float, shape: str) -> float:
    """The factor on the peak learning rate when the share u of the run is done, in [0, 1]."""
    r = min(max(1 - u, 0.0) / decay, 1.0) if decay > 0 else 1.0
    return min(u / warmup if warmup > 0 else 1.0, r if shape == "linear" else (1 - math.cos(math.pi * r)) / 2)


def check_rate(learning_rate: float, weight_decay: float, warmup: float, decay: float) -> None:
    """Raises UserError unless learning_rate > 0 and weight_decay >= 0 are finite, warmup and decay shares of the run."""
    if not 0 < learning_rate < math.inf:
        raise UserError(f"model.learning_rate = {learning_rate}: expected a finite number above 0")
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"model.weight_decay = {weight_decay}: expected a finite number of at least 0")
    if not (0 <= warmup <= 1 and 0 <= decay <= 1):
        raise UserError(f"warmup = {warmup}, decay = {decay}: expected shares of the run, between 0 and 1")


def warm_hold_decay(
    optimizer: Optimizer, trainer: Trainer, warmup: float, decay: float, shape: str
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, its rate by `rate` after each of its steps. warmup, decay: by `check_rate`.

    Raises UserError unless the run has an end, in steps or in time.
    """
    total = trainer.estimated_stepping_batches
    timer = next(
        (c for c in trainer.callbacks if isinstance(c, Timer) and c.time_remaining() is not None), None
    )
    if total < 1 or (math.isinf(total) and timer is None):
        raise UserError(
            "the learning rate needs the length of the run: set trainer.max_steps, max_epochs or max_time"
        )

    def factor(step: int) -> float:
        # The first step is not given away to a warm-up that starts at 0.
        u = step / total if step else min(1 / total, warmup)
        if timer is not None:
            elapsed = timer.time_elapsed()
            length = elapsed + timer.time_remaining()
            u = max(u, elapsed / length if length > 0 else 1.0)  # a run of no time is over
            if trainer.world_size > 1:  # each rank has a clock of its own
                u = trainer.strategy.broadcast(u)
        return rate(u, warmup, decay, shape)

    schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": schedule}
