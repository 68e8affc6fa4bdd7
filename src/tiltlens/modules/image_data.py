"""Images for training and held-out ones, from any source, as resumable streams of batches."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules import image_sets
from tiltlens.modules.batch_stream import Batch, BatchStream, Images, to_unit_range
from tiltlens.modules.image_decoding import BrokenImages
from tiltlens.modules.image_sets import LazyImages, decode_all
from tiltlens.modules.image_sources import ImageSource, open_source

__all__ = ["Batch", "BatchStream", "ImageFolderData", "Images", "read_images", "to_unit_range"]
LOG = "broken_images.txt"
SHARE = 0.05  # held out of data.train where neither data.val nor a number is given


class ImageFolderData(LightningDataModule):
    """Batches {image (B, 3, size, size) in [-1, 1], label (B,), seed: an integer, the batch's randomness, rows (B,) of the set}.

    train, val: folders of images, nested at will; the first folder below the root is the class (label -1
    where images lie in the root itself). Or another source, named as in `image_sources`: FakeData, CIFAR10,
    tar:SHARDS, hf:NAME. val None: images are held out from train, by a hash of (seed, name), so that an image
    stays on its side when others come and go: val_n of them, or the share val_share (by default 0.05), or, where
    both are given, the smaller number of the two.

    size: pixels of a side. resize: of the shorter side before the crop, by default size; no image is enlarged.
    crop: centre, or random in training. Mirroring is the modules' (`model.flip`). val_n beside val: at most so many
    of its images, drawn once by `seed`; None for all.

    broken_share: of unreadable or too small images that is left out; each is named in OUT/broken_images.txt.
    cache: a folder for decoded images, by default $XDG_CACHE_HOME/tiltlens. A set of up to 2 GiB, 3 size^2
    bytes an image, is decoded once and held in memory; a larger one is decoded as it comes.

    Raises UserError for a source that is missing, empty or smaller than a batch, for images that a classifier
    is to learn and that have no class, for classes that differ between train and val, and for too many
    broken images.
    """

    def __init__(
        self,
        train: str = "data/cifar10/train",
        val: str | None = None,
        size: int = 32,
        batch_size: int = 64,
        seed: int = 0,
        val_n: int | None = None,
        val_share: float | None = None,
        resize: int | None = None,
        crop: Literal["centre", "random"] = "centre",
        broken_share: float = 0.01,
        cache: Path | None = None,
    ):
        super().__init__()
        self.train, self.val = str(train), None if val is None else str(val)
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.val_n, self.val_share = val_n, val_share
        self.resize, self.crop, self.broken_share = resize or size, crop, broken_share
        for name, value in (("val_share", val_share), ("broken_share", broken_share)):
            if value is not None and not 0 <= value < 1:
                raise UserError(f"data.{name} = {value}: expected a share, at least 0 and below 1")
        for name, value in (("size", size), ("batch_size", batch_size), ("val_n", val_n)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} = {value}: expected at least 1")
        if self.resize < size:
            raise UserError(f"data.resize = {resize}: the crop of data.size = {size} pixels does not fit")
        self.cache = Path(cache) if cache else default_cache()
        self.class_names: list[str] = []
        self.train_set: tuple[Images, Tensor] | None = None

    def prepare_data(self) -> None:
        """One process of a node decodes; the others then find the set in the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        source = open_source(self.train, False, self.size, self.cache)
        self._check_labels("data.train", self.train, source)
        self.class_names, inside, lazy = source.class_names, range(len(source)), self.crop == "random"
        broken = self._broken("data.train", source)
        if self.val is None:
            held_out = set(hold_out(source, self.seed, self.val_n, self.val_share))
            inside = [i for i in inside if i not in held_out]
        self._check_size(len(inside), len(source) - len(inside))
        self.train_set, numbers = self._read(source, inside, lazy, broken)
        self._trained = source, numbers
        if self.val is None:
            self.val_set, _ = self._read(source, sorted(held_out), False, broken)
        else:
            trained, source = source.fingerprint, open_source(self.val, True, self.size, self.cache)
            if source.fingerprint == trained:  # a folder, or a set that has no part of its own to hold out
                rank_zero_warn(f"data.val is data.train, {self.val}: nothing is held out")
            self._check_labels("data.val", self.val, source)
            both = sorted((self.class_names, source.class_names), key=len)
            if numbered(both[1]) and both[1][: len(both[0])] == both[0]:
                self.class_names = both[1]  # a source of numbers alone knows no class above those it holds
            elif both[0] != both[1] and self._learns_classes():
                raise UserError(
                    f"data.val {self.val} has classes {source.class_names}; expected those of data.train, "
                    f"{self.class_names}"
                )
            n = len(source)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[: self.val_n]
            self.val_set, _ = self._read(source, order.tolist(), False, self._broken("data.val", source))
        self._check_size(len(self.train_set[1]))
        counts = f"{len(self.train_set[1])} images for training, {len(self.val_set[1])} held out"
        rank_zero_info(f"data: {counts}, {len(self.class_names) or 'no'} classes")

    def _check_labels(self, what: str, text: str, source: ImageSource) -> None:
        missing, module = int((source.labels < 0).sum()), getattr(self.trainer, "lightning_module", None)
        if missing and self._learns_classes():
            raise UserError(
                f"{what} {text} has {missing} images without a class, and {type(module).__name__} learns "
                "classes: expected FOLDER/CLASS/*.jpg, .cls files in the shards, or hf:NAME?label=COLUMN"
            )

    def _learns_classes(self) -> bool:
        return bool(getattr(getattr(self.trainer, "lightning_module", None), "num_classes", None))

    def _check_size(self, n: int, held_out: int = 0) -> None:
        if n < self.batch_size:
            beside = f" beside {held_out} held out" if held_out else ""
            raise UserError(
                f"data.train {self.train} holds {n} images{beside}, fewer than data.batch_size = "
                f"{self.batch_size}: lower data.batch_size or add images"
            )

    def _broken(self, what: str, source: ImageSource) -> BrokenImages:
        log = None
        if self.trainer:
            log = Path(self.trainer.default_root_dir) / LOG
            if what == "data.train" and self.trainer.is_global_zero:
                log.unlink(missing_ok=True)
        return BrokenImages(what, len(source), self.broken_share, log)

    def _read(
        self, source: ImageSource, numbers: list[int] | range, lazy: bool, broken: BrokenImages
    ) -> tuple[tuple[Images, Tensor], Sequence[int]]:
        """Images and labels, and the numbers of the rows in their source."""
        if lazy or 3 * self.size**2 * len(source) > image_sets.AT_ONCE:
            images = LazyImages(source, numbers, self.size, self.resize, broken)
            return (images, source.labels[list(numbers)]), numbers
        images, found = decode_all(source, self.size, self.resize, self.cache, broken)
        broken.tell()
        if isinstance(numbers, range) and len(found) == len(numbers):
            return (images, source.labels), numbers
        place = {i: k for k, i in enumerate(found.tolist())}
        rows = torch.tensor([place[i] for i in numbers if i in place], dtype=torch.long)
        return (images[rows], source.labels[found[rows]]), found[rows].tolist()

    def names(self, rows: list[int]) -> list[str]:
        """Of rows of the training set, as their source has them."""
        source, numbers = self._trained
        return [source.name(numbers[row]) for row in rows]

    def train_dataloader(self) -> BatchStream:
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return BatchStream(
            *self.train_set,
            self.batch_size,
            self.seed,
            shuffle=True,
            rank=rank,
            ranks=ranks,
            random_crop=self.crop == "random",
        )

    def val_dataloader(self) -> BatchStream:
        return BatchStream(*self.val_set, self.batch_size, self.seed, shuffle=False)


def numbered(names: list[str]) -> bool:
    """Whether the classes' names are their numbers, 0, 1, ..."""
    return names == [str(k) for k in range(len(names))]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tiltlens"


def read_images(
    text: str, size: int, held_out: bool = False, cache: Path | None = None
) -> tuple[Tensor, Tensor, list[str]]:
    """Every image of a source: images (N, 3, size, size) uint8, labels (N,), class names. Must fit in memory."""
    cache = cache or default_cache()
    source = open_source(text, held_out, size, cache)
    images, found = decode_all(source, size, size, cache, BrokenImages(text, len(source), 0.01))
    return images, source.labels[found], source.class_names


def hold_out(source: ImageSource, seed: int, n: int | None, share: float | None) -> list[int]:
    """The images whose hash of (seed, name) is smallest: n, or round(share N) but at least 1, or the smaller of both.

    Neither: a share of 0.05. Raises UserError where none would be left for training.
    """
    part = max(1, round((SHARE if share is None else share) * len(source)))
    n = part if n is None else n if share is None else min(n, part)
    if n >= len(source):
        raise UserError(
            f"data.val_n = {n} of {len(source)} images: none is left for training; lower it or set data.val"
        )
    names = (f"{seed}/{source.name(i)}".encode(errors="surrogateescape") for i in range(len(source)))
    keys = [hashlib.sha256(name).digest() for name in names]
    return sorted(range(len(source)), key=keys.__getitem__)[:n]
