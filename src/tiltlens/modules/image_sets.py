"""Decoded images by number: all of them in memory at once, or a batch at a time.

Both are asked for rows and give uint8 squares. On few cores a set that fits in memory should be decoded once:
the time goes to the network. What does not fit, and random crops, are decoded by a few threads as they come.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_decoding import UNREADABLE, BrokenImages, decode
from tiltlens.modules.image_sources import ImageSource
from tiltlens.writing import whole_file

AT_ONCE = 2 << 30  # bytes of decoded images that are held in memory
THREADS = min(8, os.cpu_count() or 1)


def decode_all(
    source: ImageSource, size: int, resize: int, cache: Path, broken: BrokenImages
) -> tuple[Tensor, Tensor]:
    """Every image of a source that can be read: (images (N, 3, size, size) uint8, their numbers (N,)).

    The decoded set is kept in `cache` under a name that changes with the source's content and with the sizes.
    """
    # The leading number is that of the decoding: what an older one wrote must not be read as today's.
    version = 2 if resize == size else 3  # 3: no image is enlarged to resize
    digest = hashlib.sha256(f"{version} {size} {resize} {source.fingerprint}".encode()).hexdigest()
    cached = cache / f"images-{digest[:24]}.safetensors"
    if cached.is_file():
        with safetensors.safe_open(cached, "pt") as file:
            for name, reason in json.loads(file.metadata()["broken"]):
                broken.add(name, reason)
            return file.get_tensor("images"), file.get_tensor("rows")

    def one(i: int) -> Tensor | None:
        try:
            return decode(source, i, size, resize)
        except UNREADABLE as error:
            broken.add(source.name(i), str(error))
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        try:
            decoded = list(pool.map(one, range(len(source))))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = torch.tensor([i for i, image in enumerate(decoded) if image is not None], dtype=torch.long)
    images = torch.stack([image for image in decoded if image is not None])
    del decoded
    told = json.dumps(list(broken.reasons.items()))
    with whole_file(cached) as part:  # two runs may decode at once
        safetensors.torch.save_file({"images": images, "rows": rows}, part, metadata={"broken": told})
    return images, rows


class LazyImages:
    """Images decoded as they are asked for; `lazy[rows]` is (B, 3, size, size) uint8.

    numbers: of the images in the source. An image that cannot be read is replaced by the next one that can,
    so that a batch stays a function of what is asked for.
    """

    def __init__(
        self, source: ImageSource, numbers: Sequence[int], size: int, resize: int, broken: BrokenImages
    ):
        self.source, self.numbers, self.size, self.resize = source, list(numbers), size, resize
        self.broken = broken
        self.pool = ThreadPoolExecutor(THREADS)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.read(rows)[0]

    def read(self, rows: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(images, the rows that they are in truth). at: (B, 2) in [0, 1], where the crops lie; None: centre."""
        places = [(0.5, 0.5)] * len(rows) if at is None else [tuple(p) for p in at.tolist()]
        read = list(self.pool.map(self._one, rows.tolist(), places))
        return torch.stack([image for image, _ in read]), torch.tensor([row for _, row in read])

    def _one(self, row: int, at: tuple[float, float]) -> tuple[Tensor, int]:
        for _ in range(len(self.numbers)):
            i = self.numbers[row]
            try:
                return decode(self.source, i, self.size, self.resize, at), row
            except UNREADABLE as error:
                self.broken.add(self.source.name(i), str(error))  # ends the search: it raises at the share
            row = (row + 1) % len(self.numbers)
        raise UserError(f"{self.broken.what}: not one of {len(self.numbers)} images can be used")
