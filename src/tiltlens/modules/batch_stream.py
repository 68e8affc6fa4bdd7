"""Images as batches of tensors.

Batch k of a run is a function of (seed, k, rank) alone, whatever the source, so that a resumed run sees what
the uninterrupted one would have seen.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.modules.image_sets import LazyImages

Batch = dict[str, Tensor | int]
Images = Tensor | LazyImages


class BatchStream:
    """An endless, resumable stream cut into epochs: batch k of a run depends on (seed, k, rank) alone.

    With `shuffle` each epoch is a new permutation and its incomplete last batch is dropped; without, the
    order is kept, the last batch may be short, and every pass is the same. `state_dict` is what Lightning
    stores: the next batch's number and what it is a number of; another such stream goes on there, and warns.
    Raises UserError where a rank has fewer images than a batch.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        ranks: int = 1,
        random_crop: bool = False,
    ):
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.shuffle, self.rank, self.ranks = (
            batch_size,
            seed,
            shuffle,
            rank,
            ranks,
        )
        self.random_crop = random_crop
        self.position = 0
        if shuffle and len(labels) // ranks < batch_size:
            raise UserError(
                f"{len(labels)} training images on {ranks} devices: fewer than data.batch_size = {batch_size} on "
                "each; lower data.batch_size or add images"
            )

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
        parts = [order[k * self.batch_size : (k + 1) * self.batch_size] for k in range(start, len(self))]
        if isinstance(self.images, Tensor):
            for rows in parts:
                yield self._batch(self.images[rows], rows)
            return
        with ThreadPoolExecutor(1) as ahead:  # the next batch is decoded while the network has this one
            waiting = [ahead.submit(self._decode, parts[0], self.position)]
            for k in range(len(parts)):
                images, rows = waiting.pop().result()
                if k + 1 < len(parts):
                    waiting.append(ahead.submit(self._decode, parts[k + 1], self.position + 1))
                yield self._batch(images, rows)

    def _batch(self, images: Tensor, rows: Tensor) -> Batch:
        seed = self._name(self.position, 1 + self.rank)
        self.position += 1
        return {"image": to_unit_range(images), "label": self.labels[rows], "seed": seed, "rows": rows}

    def _decode(self, rows: Tensor, position: int) -> tuple[Tensor, Tensor]:
        at = None
        if self.random_crop:
            # a seed of its own: the batch's is used by the module, whose flips would follow the crops
            generator = torch.Generator().manual_seed(self._name(position, 1 + self.rank, "crop"))
            at = torch.rand((len(rows), 2), generator=generator)
        return self.images.read(rows, at)

    def _name(self, *parts: int | str) -> int:
        """Seeds of different epochs, batches and ranks must not coincide; a hash keeps them apart."""
        return int.from_bytes(hashlib.sha256(repr((self.seed, *parts)).encode()).digest()[:7], "big")

    def _settings(self) -> dict[str, int]:
        """What batch k is a function of, besides k and the rank."""
        return {
            "data.batch_size": self.batch_size, "data.seed": self.seed, "training images": len(self.labels),
            "devices": self.ranks,
        }  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, **self._settings()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
        mine = self._settings()
        if told := [f"{k} {state[k]} -> {v}" for k, v in mine.items() if state.get(k, v) != v]:
            rank_zero_warn(
                f"the data are not those of the checkpoint ({', '.join(told)}): training goes on at batch {self.position} of "
                "these, and equals no uninterrupted run"
            )


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)
