"""tiltlens: what a unit of a vision model responds to, as the KL-minimal distribution of natural images.

Names are imported on first use, so that reading a run folder does not wait for torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "tiltlens.api": ("Tilt", "tilt"),
    "tiltlens.energies": ("Linear", "Target", "Threshold"),
    "tiltlens.priors": ("GaussianMixture", "load_prior"),
    "tiltlens.units": (
        "Address",
        "Combination",
        "Encoder",
        "Projection",
        "build_unit",
        "load_encoder",
        "register_encoder",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_OTHER_NAMES = {"Unit": "build_unit"}  # Unit("bundled,class=horse"); the class itself is tiltlens.units.Unit

__all__ = sorted([*_HOME, *_OTHER_NAMES])


def __getattr__(name: str) -> Any:
    known = _OTHER_NAMES.get(name, name)
    if known not in _HOME:
        raise AttributeError(f"module 'tiltlens' has no attribute {name!r}")
    return getattr(import_module(_HOME[known]), known)


def __dir__() -> list[str]:
    return __all__
