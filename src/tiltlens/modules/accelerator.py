"""Which accelerator can run this: log-weights are float64, which Apple's GPU (mps) does not have."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.accelerators import MPSAccelerator


def without_mps(accelerator: Any) -> Any:
    """trainer.accelerator, with cpu for "auto" where Lightning would take mps; mps by its name stays."""
    return "cpu" if accelerator in ("auto", None) and MPSAccelerator.is_available() else accelerator


def check_float64(trainer: Trainer) -> None:
    """Raises ValueError for a device without float64."""
    if trainer.strategy.root_device.type == "mps":
        raise ValueError(
            "trainer.accelerator: sampling keeps log-weights in float64, expected a device that has it, found mps "
            "(Apple's GPU), which has not. Pass --trainer.accelerator=cpu (accelerator='cpu' in Python)"
        )
