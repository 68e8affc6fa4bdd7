"""How near a prior's samples are to natural images: distances of two samples, copies of training images.

All are functions of features (N, d), one row an image; `EncoderFeatures` makes them by a named encoder.
"""

from tiltlens.metrics.distances import Estimate, frechet_distance, kernel_distance
from tiltlens.metrics.features import EncoderFeatures
from tiltlens.metrics.memorisation import Memorisation, memorisation, nearest_distance
from tiltlens.metrics.quality import quality, sample_images

__all__ = [
    "EncoderFeatures",
    "Estimate",
    "Memorisation",
    "frechet_distance",
    "kernel_distance",
    "memorisation",
    "nearest_distance",
    "quality",
    "sample_images",
]
