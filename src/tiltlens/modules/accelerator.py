"""Which accelerator can run this, and in what precision: log-weights are float64, which Apple's GPU (mps) does not have; bfloat16 on a CPU
without instructions for it takes several times as long as float32."""

from typing import Any

import torch
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


def cpu_precision() -> str:
    """Of a prior's network, the one that this CPU is faster with: bfloat16 where oneDNN has kernels for it, from AVX-512 on; elsewhere
    convolutions are computed by plain loops."""
    known = torch.backends.mkldnn.is_available()  # some builds have no oneDNN to ask
    return "bfloat16" if known and torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def slow_bfloat16(device: torch.device, **asked: str) -> str | None:
    """What to say of settings (option=precision) that ask for bfloat16 where it is no faster; None where none does."""
    rough = [name for name, precision in asked.items() if str(precision).startswith(("bf16", "bfloat16"))]
    if not rough or device.type != "cpu" or cpu_precision() == "bfloat16":
        return None
    exact = {"trainer": "32-true", "model": "float32"}
    better = " ".join(f"--{name}.precision {exact[name]}" for name in rough)
    return f"this CPU has no instructions for bfloat16, which takes several times as long as float32 here: {better} is faster"
