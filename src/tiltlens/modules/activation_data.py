"""Batches of an encoder's activations, made of a data module of images."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch, BatchStream, ImageFolderData, Images

AT_ONCE = 256  # images
Read = Callable[[Iterable[Batch], Path, torch.device], Tensor]


class ImagesInTurn:
    """Batches of images, the same at each pass: all in their order, or the first `n` of the permutation that is `seed`'s."""

    def __init__(self, images: Images, labels: Tensor, seed: int = 0, n: int | None = None):
        self.images, self.labels, self.seed = images, labels, seed
        self.n = None if n is None or n >= len(labels) else n

    def __iter__(self) -> Iterator[Batch]:
        size = AT_ONCE if self.n is None else min(AT_ONCE, self.n)
        stream = BatchStream(self.images, self.labels, size, self.seed, shuffle=self.n is not None)
        batches = None if self.n is None else self.n // size
        yield from islice(stream, batches)


class ActivationData(LightningDataModule):
    """Batches {activation (rows, C) float32, seed}, in the order of `BatchStream`: resumable, by seed and number alone.

    images: gives the images, the cache folder and the seed. read: images, cache folder, device -> activations. rows: of
    a batch. first: so many training images, drawn by the seed; None for all. Raises UserError for fewer activations than
    a batch has rows.
    """

    def __init__(self, images: ImageFolderData, read: Read, rows: int, first: int | None = None):
        super().__init__()
        self.images, self.read, self.rows, self.first = images, read, rows, first
        self.class_names: list[str] = []
        self.train_set: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        self.images.trainer = self.trainer
        self.images.setup(stage)
        strategy = self.trainer.strategy
        if not self.trainer.is_global_zero:
            strategy.barrier("activations")  # the first process fills the cache, the others read it
        where = self.images.cache, strategy.root_device
        train = self.read(ImagesInTurn(*self.images.train_set, self.images.seed, self.first), *where)
        val = self.read(ImagesInTurn(*self.images.val_set), *where)
        if self.trainer.is_global_zero:
            strategy.barrier("activations")
        if len(train) // self.trainer.world_size < self.rows:
            raise UserError(
                f"the training images give {len(train)} activations, fewer than model.rows = {self.rows}: lower it, or "
                "add images or positions (model.per_image)"
            )
        self.train_set, self.val_set = train, val

    def train_dataloader(self) -> "ActivationStream":
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return ActivationStream(
            self.train_set, self.rows, self.images.seed, shuffle=True, rank=rank, ranks=ranks
        )

    def val_dataloader(self) -> "ActivationStream":
        return ActivationStream(self.val_set, self.rows, self.images.seed, shuffle=False)


class ActivationStream(BatchStream):
    """`BatchStream` over rows of activations (N, C): it names the rows, they are taken here."""

    def __init__(
        self, activations: Tensor, rows: int, seed: int, shuffle: bool, rank: int = 0, ranks: int = 1
    ):
        numbers = torch.arange(len(activations))
        super().__init__(
            torch.empty(len(numbers), 0, dtype=torch.uint8), numbers, rows, seed, shuffle, rank, ranks
        )
        self.activations = activations

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield {"activation": self.activations[batch["label"]].float(), "seed": batch["seed"]}
