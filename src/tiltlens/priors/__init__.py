"""Natural image distributions: diffusers folders (pixel, latent), the bundled one, the analytic mixture."""

from tiltlens.priors.diffusers_prior import DiffusersPrior, load_prior
from tiltlens.priors.mixture import GaussianMixture
from tiltlens.priors.prior import Prior

__all__ = ["DiffusersPrior", "GaussianMixture", "Prior", "load_prior"]
