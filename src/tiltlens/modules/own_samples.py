"""Samples of a prior itself, how it came to them, and what an encoder says of them: drawn once a run folder, for trainings that begin with
them."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.priors.prior import Prior
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import stream_seed
from tiltlens.sampling.responses import responses
from tiltlens.sampling.sample_pool import unguided
from tiltlens.schedule import step_indices
from tiltlens.writing import whole_file

BATCH = 64
GRIDS = 4  # chains of `steps`, one more, ...: their levels lie between each other's


class Paths(NamedTuple):
    """Own trajectories, at the levels where a reader reads. x_0 (N, *shape): their samples; sample, t (R,): whose and at which step of
    the table a row is, in order of the samples; x0_hat, moved (R, *shape) float16, as of `tiltlens.sampling.responses`."""

    x_0: Tensor
    sample: Tensor
    t: Tensor
    x0_hat: Tensor
    moved: Tensor

    def below(self, sample: int) -> int:
        """The number of rows of the samples below this one."""
        return int((self.sample < sample).sum())

    def rows(self, which: Tensor, mirrored: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """x0_hat and moved of these rows, mirrored where said, in the type and on the device of `like`."""
        found = (x[which].to(like) for x in (self.x0_hat, self.moved))
        turn = mirrored.to(like.device)[:, None, None, None]
        return tuple(torch.where(turn, x.flip(3), x) for x in found)


def own_samples(
    trainer: Trainer, prior: Prior, count: int, steps: int, order: int, device: torch.device
) -> Tensor:
    """x_0 (count, *shape) float32, of an unguided chain of `steps`, of this order; kept in the run's folder, drawn by one process alone."""

    def draw() -> Iterator[dict[str, Tensor]]:
        chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, steps), order=order)
        for x_0 in unguided(chain, count, "noise-aware", device, torch.float32):
            yield {"x_0": x_0}

    name = stream_seed(f"{prior.law}/{steps}{_of(order)}", count, "start")
    return _kept(trainer, f"own-{name:016x}", count, draw)["x_0"]


def own_paths(
    trainer: Trainer, prior: Prior, count: int, steps: int, order: int, levels: tuple[float, float], device: torch.device
) -> Paths:  # fmt: skip
    """`count` trajectories of unguided chains of `steps` to steps + 3, of this order, at these levels of log-SNR; kept as `own_samples` are, a clean
    estimate in half precision: about 12 kB a row of 32 pixels, a gigabyte for 6,000 trajectories of 12 rows. Raises UserError where a chain has
    no step at these levels."""
    schedule, (low, high) = prior.denoiser.schedule, levels
    grids = [step_indices(schedule, min(steps + k, len(schedule)) if k else steps) for k in range(GRIDS)]
    for grid in grids:
        if not any(low <= float(v) <= high for v in schedule.log_snr[grid[:-1]]):
            raise UserError(
                f"model.steps = {steps}: expected a step, but the last, at a log-SNR of {low:g} to {high:g} in a chain of {len(grid)} steps, found none: "
                "raise model.steps or widen model.log_snr"
            )

    def draw() -> Iterator[dict[str, Tensor]]:
        for k, first in enumerate(range(0, count, BATCH)):
            chain = Chain(prior.denoiser, grids[k % GRIDS], order=order)
            seeds = range(first, min(first + BATCH, count))
            found = responses(chain, seeds, "noise-aware", levels, device)
            yield {n: x.half() if n in ("x0_hat", "moved") else x for n, x in found.items()}

    name = stream_seed(f"{prior.law}/{grids}/{levels}{_of(order)}", count, "start")
    return Paths(**_kept(trainer, f"own-paths-{name:016x}", count, draw))


def _of(order: int) -> str:
    """In names of what is kept; those of order 1 are older than the other."""
    return "" if order == 1 else f"/order {order}"


def read_samples(
    trainer: Trainer, x_0: Tensor, name: str, read: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """read(x) (B, K) of every sample and of its mirror image -> (count, 2, K) float32; kept under `name`, which says by whom."""

    @torch.no_grad()
    def values() -> Iterator[dict[str, Tensor]]:
        for part in x_0.split(BATCH):
            part = part.to(device)
            yield {"activation": torch.stack([read(part), read(part.flip(3))], 1).float()}

    drawn = hashlib.sha256(x_0.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = stream_seed(f"{name}\n{drawn}", len(x_0), "start")
    return _kept(trainer, f"own-read-{key:016x}", len(x_0), values)["activation"]


def _kept(
    trainer: Trainer, stem: str, count: int, make: Callable[[], Iterator[dict[str, Tensor]]]
) -> dict[str, Tensor]:
    """What is made, batch by batch, by the names of its tensors; the first has a row a sample."""
    file = Path(trainer.default_root_dir) / f"{stem}.safetensors"
    if not file.is_file() and trainer.is_global_zero:
        parts: dict[str, list[Tensor]] = {}
        for batch in make():
            for name, x in batch.items():
                parts.setdefault(name, []).append(x.cpu())
            first = next(iter(parts))
            rank_zero_info(f"own samples, {first} {sum(map(len, parts[first]))}/{count}")
        with whole_file(file) as part:
            save_file({name: torch.cat(x).contiguous() for name, x in parts.items()}, part)
    trainer.strategy.barrier(stem)
    return load_file(file)
