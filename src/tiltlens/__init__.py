"""tiltlens: what a unit of a vision model responds to, as the KL-minimal distribution of natural images."""

from tiltlens.energies import Linear, Target, Threshold
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.units import Address, Combination, Projection, build_unit, load_encoder

Unit = build_unit  # Unit("bundled,class=horse"); the class itself is tiltlens.units.Unit

__all__ = [
    "Address", "Combination", "GaussianMixture", "Linear", "Projection", "Target", "Threshold", "Tilt", "Unit",
    "build_unit", "load_encoder", "load_prior", "tilt",
]  # fmt: skip


def __getattr__(name: str):
    # tilt brings Lightning along; whoever only loads a prior or reads a unit need not wait for it
    if name in ("tilt", "Tilt"):
        from tiltlens import api

        return getattr(api, name)
    raise AttributeError(f"module 'tiltlens' has no attribute {name!r}")
