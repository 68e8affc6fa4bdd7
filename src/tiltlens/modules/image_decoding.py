"""From a file's pixels to a square of uint8, and what to do where that cannot be done.

EXIF orientation is applied. Grey, palette, CMYK and 16-bit images become 8-bit RGB; alpha is composited on
white. A crop is a square of `size` pixels out of the image, whose shorter side was scaled down to `resize`. No image
is enlarged: one between `size` and `resize` is cropped as it is, one below `size` counts as broken.
"""

import struct
import threading
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_sources import ImageSource
from tiltlens.sampling.natural_images import to_rgb

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
NAMED = 5  # broken images named in the error itself; all of them are in the log


def decode(
    source: ImageSource, i: int, size: int, resize: int, at: tuple[float, float] = (0.5, 0.5)
) -> Tensor:
    """Image i -> (3, size, size) uint8. at: where the crop lies, (0, 0) top left to (1, 1) bottom right.

    Raises one of UNREADABLE where the file is broken or smaller than the crop.
    """
    with source.open(i) as image:
        width, height = image.size
        if min(width, height) < size:
            raise ValueError(f"{width} x {height} pixels, smaller than data.size = {size}")
        # A JPEG much larger than the crop need not be decoded in full: at twice the target nothing is lost.
        image.draft("RGB", (2 * resize, 2 * resize)) if image.format == "JPEG" else None
        image = to_rgb(image)
        side = max(size, min(image.size) * size / resize)
        left, top = (u * (n - side) for u, n in zip(at, image.size))
        if image.size != (size, size):
            box = (left, top, left + side, top + side)
            image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class BrokenImages:
    """Images that could not be used: counted, named in `log`, and too many once they exceed `share` of `total`.

    log: a text file, NAME<tab>REASON a line; None to count only. what: the argument they belong to.
    """

    def __init__(self, what: str, total: int, share: float, log: Path | None = None):
        self.what, self.total, self.share, self.log = what, total, share, log
        self.reasons: dict[str, str] = {}
        self._lock, self._told = threading.Lock(), False

    def add(self, name: str, reason: str) -> None:
        """Raises UserError with the first few when the share is exceeded."""
        with self._lock:
            if name in self.reasons:
                return
            self.reasons[name] = reason
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{name}\t{reason}\n")
            if len(self.reasons) > self.share * self.total:
                some = "; ".join(f"{n} ({r})" for n, r in list(self.reasons.items())[:NAMED])
                raise UserError(
                    f"{self.what}: {len(self.reasons)} of {self.total} images cannot be used by now, more than "
                    f"data.broken_share = {self.share:g} allows: {some}. "
                    + (f"All that were met are in {self.log}. " if self.log else "")
                    + "Repair or remove them, lower data.size, or raise data.broken_share"
                )

    def tell(self) -> None:
        """A warning that says how many were left out, if any."""
        if self.reasons and not self._told:
            self._told = True
            where = f": see {self.log}" if self.log else f": {', '.join(list(self.reasons)[:NAMED])}"
            rank_zero_warn(f"{self.what}: {len(self.reasons)} of {self.total} images left out{where}")
