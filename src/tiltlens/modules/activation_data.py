"""Batches of an encoder's activations, made of a data module of images."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch, BatchStream, ImageFolderData

AT_ONCE = 256  # images
Read = Callable[[BatchStream, Path, torch.device], Tensor]


class ActivationData(LightningDataModule):
    """Batches {activation (rows, C) float32, seed}, in the order of `BatchStream`: resumable, by seed and number alone.

    images: gives the images, the cache folder and the seed. read: uint8 images (N, 3, H, W), cache folder, device ->
    activations. rows: of a batch. Raises UserError for fewer activations than a batch has rows.
    """

    def __init__(
        self, images: ImageFolderData, read: Callable[[Tensor, Path, torch.device], Tensor], rows: int
    ):
        super().__init__()
        self.images, self.read, self.rows = images, read, rows
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
        train, val = (
            self.read(
                BatchStream(*images, AT_ONCE, 0, shuffle=False), self.images.cache, strategy.root_device
            )
            for images in (self.images.train_set, self.images.val_set)
        )
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
