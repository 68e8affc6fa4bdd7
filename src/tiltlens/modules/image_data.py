"""Folders of images as batches of tensors.

A small image set is decoded once, kept as one uint8 tensor and cut into batches by index: on few cores the
time goes to the network and not to decoding. Batch k of a run is a function of (seed, k) alone, so that a
resumed run sees what the uninterrupted one would have seen.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from lightning import LightningDataModule
from PIL import Image, ImageOps
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_sources import ImageSource, open_source

Batch = dict[str, Tensor | int]


class ImageFolderData(LightningDataModule):
    """Batches {image (B, 3, size, size) in [-1, 1], label (B,), seed: an integer, the batch's randomness}.

    train, val: folders of images, nested at will; the first folder below the root is the class (label -1
    where images lie in the root itself). Or another source, named as in `image_sources`: FakeData, CIFAR10. size: pixels of a side; images are scaled by their shorter side and
    cropped at the centre. val_n: so many held-out images, drawn once by `seed`; None for all. cache: a folder
    for decoded images, by default $XDG_CACHE_HOME/tiltlens. The sets must fit in memory: 3 size^2 bytes an
    image. Raises UserError for a missing or empty folder and for classes that differ between train and val.
    """

    def __init__(
        self,
        train: str = "data/cifar10/train",
        val: str = "data/cifar10/test",
        size: int = 32,
        batch_size: int = 64,
        seed: int = 0,
        val_n: int | None = None,
        cache: Path | None = None,
    ):
        super().__init__()
        self.train, self.val = str(train), str(val)
        self.size, self.batch_size, self.seed, self.val_n = size, batch_size, seed, val_n
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        self.cache = Path(cache) if cache else base / "tiltlens"
        self.class_names: list[str] = []

    def setup(self, stage: str | None = None) -> None:
        if self.class_names:
            return
        images, labels, self.class_names = read_images(self.train, self.size, self.cache)
        if len(labels) < self.batch_size:
            raise UserError(
                f"data.train {self.train} holds {len(labels)} images, fewer than data.batch_size = "
                f"{self.batch_size}: lower data.batch_size or add images"
            )
        self.train_set = images, labels
        images, labels, names = read_images(self.val, self.size, self.cache, held_out=True)
        if names != self.class_names:
            raise UserError(
                f"data.val {self.val} has classes {names}; expected those of data.train, {self.class_names}"
            )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))[: self.val_n]
        self.val_set = images[order], labels[order]

    def train_dataloader(self) -> "BatchStream":
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchStream(*self.train_set, self.batch_size, self.seed, shuffle=True, rank=rank, ranks=ranks)

    def val_dataloader(self) -> "BatchStream":
        return BatchStream(*self.val_set, self.batch_size, self.seed, shuffle=False)


class BatchStream:
    """An endless, resumable stream cut into epochs: batch k of a run depends on (seed, k, rank) alone.

    With `shuffle` each epoch is a new permutation and its incomplete last batch is dropped; without, the
    order is kept, the last batch may be short, and every pass is the same. `state_dict` is what Lightning
    stores.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.shuffle, self.rank, self.ranks = (
            batch_size,
            seed,
            shuffle,
            rank,
            ranks,
        )
        self.position = 0

    def __len__(self) -> int:
        each = len(self.labels) // self.ranks
        return each // self.batch_size if self.shuffle else -(-each // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        if not self.shuffle:
            self.position = 0
        epoch, start = divmod(self.position, len(self))
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(self._name(epoch, 0)))
            order = order[self.rank :: self.ranks]
        for k in range(start, len(self)):
            rows = order[k * self.batch_size : (k + 1) * self.batch_size]
            seed = self._name(self.position, 1 + self.rank)
            self.position += 1
            yield {"image": to_unit_range(self.images[rows]), "label": self.labels[rows], "seed": seed}

    def _name(self, *parts: int) -> int:
        """Seeds of different epochs, batches and ranks must not coincide; a hash keeps them apart."""
        return int.from_bytes(hashlib.sha256(repr((self.seed, *parts)).encode()).digest()[:7], "big")

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def read_images(
    source: str | Path, size: int, cache: Path, held_out: bool = False
) -> tuple[Tensor, Tensor, list[str]]:
    """Every image of a source (`image_sources`): images (N, 3, size, size) uint8, labels (N,), class names.

    The decoded set is kept in `cache` under a name that changes with any file's path, length or date.
    """
    found = open_source(str(source), held_out, size, cache)
    digest = hashlib.sha256(f"2 {size} {found.fingerprint}".encode()).hexdigest()
    cached = cache / f"images-{digest[:24]}.safetensors"
    if cached.is_file():
        return safetensors.torch.load_file(cached)["images"], found.labels, found.class_names
    images = torch.stack([decode(found, i, size) for i in range(len(found))])
    cache.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}.part")
    safetensors.torch.save_file({"images": images}, part)
    part.replace(cached)  # two runs may decode at once: the name appears only when the file is whole
    return images, found.labels, found.class_names


def decode(source: ImageSource, i: int, size: int) -> Tensor:
    """One image -> (3, size, size) uint8; raises UserError where it cannot be read."""
    try:
        with source.open(i) as image:
            image = image.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except OSError as error:
        raise UserError(f"cannot read the image {source.name(i)}: {error}") from error
