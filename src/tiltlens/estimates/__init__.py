"""log Z, KL, bounds, ESS: pure functions of what sampling recorded."""

from tiltlens.estimates.curve import estimate_curve

__all__ = ["estimate_curve"]
