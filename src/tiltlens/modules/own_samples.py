"""Samples of a prior itself, and what an encoder says of them: drawn once a run folder, for trainings that begin with them."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.priors.prior import Prior
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import stream_seed
from tiltlens.sampling.sample_pool import unguided
from tiltlens.schedule import step_indices
from tiltlens.writing import whole_file

BATCH = 64


def own_samples(trainer: Trainer, prior: Prior, count: int, steps: int, device: torch.device) -> Tensor:
    """x_0 (count, *shape) float32, of an unguided chain of `steps`; kept in the run's folder, drawn by one process alone."""

    def draw() -> Iterator[Tensor]:
        chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, steps))
        return unguided(chain, count, "noise-aware", device, torch.float32)

    name = stream_seed(f"{prior.law}/{steps}", count, "start")
    return _kept(trainer, f"own-{name:016x}", count, "x_0", draw)


def read_samples(
    trainer: Trainer, x_0: Tensor, name: str, read: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """read(x) (B, K) of every sample and of its mirror image -> (count, 2, K) float32; kept under `name`, which says by whom."""

    @torch.no_grad()
    def values() -> Iterator[Tensor]:
        for part in x_0.split(BATCH):
            part = part.to(device)
            yield torch.stack([read(part), read(part.flip(3))], 1).float()

    drawn = hashlib.sha256(x_0.cpu().contiguous().numpy().tobytes()).hexdigest()
    key = stream_seed(f"{name}\n{drawn}", len(x_0), "start")
    return _kept(trainer, f"own-read-{key:016x}", len(x_0), "activation", values)


def _kept(trainer: Trainer, stem: str, count: int, name: str, make: Callable[[], Iterator[Tensor]]) -> Tensor:
    file = Path(trainer.default_root_dir) / f"{stem}.safetensors"
    if not file.is_file() and trainer.is_global_zero:
        rows = []
        for row in make():
            rows.append(row.cpu())
            rank_zero_info(f"own samples, {name} {sum(map(len, rows))}/{count}")
        with whole_file(file) as part:
            save_file({name: torch.cat(rows).contiguous()}, part)
    trainer.strategy.barrier(stem)
    return load_file(file)[name]
