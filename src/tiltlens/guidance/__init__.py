"""Energy -> steering of a denoiser; one method a file."""

from tiltlens.guidance.amortised import Amortised
from tiltlens.guidance.calibrated import Calibrated
from tiltlens.guidance.dps import DPS
from tiltlens.guidance.exact import Exact
from tiltlens.guidance.guidance import Guidance
from tiltlens.guidance.learned import Learned
from tiltlens.guidance.lgd import LGD
from tiltlens.guidance.moment_matched import MomentMatched
from tiltlens.guidance.mpgd import MPGD

__all__ = ["DPS", "LGD", "MPGD", "Amortised", "Calibrated", "Exact", "Guidance", "Learned", "MomentMatched"]
