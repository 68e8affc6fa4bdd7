"""The plan as a data module: batches of rows, ready for any number of ranks."""

from collections.abc import Iterable
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from tiltlens.estimates.importance import GROUPS_MIN
from tiltlens.sampling.plan import Row, check_strengths, plan

SEEDS = 1 << 53  # a seed is a whole number that a float holds, and those below 0 are the pilot's


class PlanData(LightningDataModule):
    """Rows (unit, strength, seed) to sample.

    strengths: s of q_s ~ p exp(-s E), each finite and >= 0; 0 is the prior. n: samples for each unit and strength.
    seed: the first of n consecutive seeds. batch_size: rows run at once, of any strength and unit; it never changes
    an image. Networks are called with model.rows at once, 16 (32 on an accelerator) by default: multiples of it
    waste nothing. A sampler that works in groups makes batches of whole groups, the first from `seed` on:
    batch_size is rounded up to them.
    """

    def __init__(
        self, strengths: list[float] = (0.0, 1.0, 2.0, 4.0), n: int = 16, seed: int = 0, batch_size: int = 16
    ):  # type: ignore[assignment]
        super().__init__()
        self.strengths = check_strengths(list(strengths))
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"data.{name} = {value}: expected a whole number >= 1")
        if not 0 <= seed < SEEDS - n:
            raise ValueError(
                f"data.seed = {seed}: expected a whole number from 0 on, and seed + n below 2^53"
            )
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self.units, self.group_size = 1, 1
        self.skip: set[Row] = set()

    def set_groups(self, size: int) -> None:
        """Rows of a unit and strength are sampled in groups of `size`. Raises ValueError unless n is a multiple of it."""
        if self.n % size:
            fits = [str(k) for k in (self.n // size * size, -(-self.n // size) * size) if k]
            raise ValueError(
                f"data.n = {self.n}: the sampler takes groups of {size} rows of each unit and strength, expected a multiple "
                f"of {size}; {' or '.join(fits)} fits, and {GROUPS_MIN * size} or more let errors be told"
            )
        self.group_size = size

    def rows(self) -> list[Row]:
        """The whole plan."""
        return plan(self.units, self.strengths, self.n, self.seed)

    def remaining(self) -> list[Row]:
        """What is left to do; a group of which any member is missing is done again as a whole."""
        rows = self.rows()
        groups = {self._group(r) for r in rows if r not in self.skip}
        return [r for r in rows if self._group(r) in groups]

    def _group(self, row: Row) -> tuple[int, float, int]:
        return row.unit, row.strength, (row.seed - self.seed) // self.group_size

    def batches(self) -> list[list[Row]]:
        """What is left to do, unguided rows apart from guided ones: the former need no graph."""
        left, out = self.remaining(), []
        size = -(-self.batch_size // self.group_size) * self.group_size
        for part in ([r for r in left if r.strength == 0], [r for r in left if r.strength > 0]):
            out += [part[i : i + size] for i in range(0, len(part), size)]
        return out

    def transfer_batch_to_device(self, batch: list[Row], device: Any, dataloader_idx: int) -> list[Row]:
        return batch  # names, not tensors

    def predict_dataloader(self) -> Iterable[list[Row]]:
        # an item is a whole batch, so that a distributed sampler deals out batches and never splits one; every rank gets
        # one, be it empty, for with none Lightning leaves out the hooks that finish the run
        batches, ranks = self.batches(), self.trainer.world_size if self.trainer else 1
        batches += [[] for _ in range(ranks - len(batches))]
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)


def _as_it_is(batch: list[Row]) -> list[Row]:
    return batch
