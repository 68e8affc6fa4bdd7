"""Where a run comes from: versions, fingerprints, device, revision."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tiltlens.schedule import step_indices
from tiltlens.units import Unit

PACKAGES = ("tiltlens", "torch", "torchvision", "lightning", "diffusers", "timm", "wandb", "numpy", "scipy")


def provenance(module: Any) -> dict[str, Any]:
    """For manifest.json, but for the device, which is known when the run starts. module: a loaded SamplingModule."""
    schedule = module.prior.denoiser.schedule
    first = step_indices(schedule, module.steps, module.spacing)[0]
    return {
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_revision": _revision(),
        "prior": {"name": module.prior.name, "sha256": module.prior.fingerprint, **module.prior.describe()},
        "units": {u.name: {"slug": u.slug, "sha256": u.fingerprint, "encoders": _encoders(u)} for u in module.units},
        "energy": module.energy.describe(),
        "guidance": module.describe()["guidance"],
        "schedule": {"length": len(schedule), "log_snr": [float(schedule.log_snr[-1]), float(schedule.log_snr[0])],
                     "start_std": schedule.start_std(first)},
        "chain": module.chain_settings,
        "law": "p is the law of the discrete sampling chain at strength 0: this prior, steps, eta, order, clipping and precision",
    }  # fmt: skip


def _encoders(unit: Unit) -> dict[str, str]:
    """sha256 of the weights of each encoder that the unit reads."""
    return {m.encoder.name: m.encoder.fingerprint for m in unit.members if m.encoder is not None}


def device_name(device: torch.device) -> str:
    """For manifest.json: the kind of device and which one it is."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {platform.machine()}, {torch.get_num_threads()} threads"


def _revision() -> str | None:
    """The revision of the source tree, with "-dirty" where it was changed; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        told = subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
        return told.stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if top not in here.parents or not (top / "pyproject.toml").exists():
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
