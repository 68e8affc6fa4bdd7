"""A pool of unguided samples, kept on disk with what units say of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.units.bank import UnitBank
from tiltlens.writing import whole_file

BATCH = 64


@dataclass(frozen=True)
class Pool:
    """x_0 (P, *shape): unguided samples of the chain, float32. members (P, units, K): raw activations of the members."""

    x_0: Tensor
    members: Tensor

    def save(self, path: Path) -> None:
        with whole_file(path) as part:
            save_file({"x_0": self.x_0.contiguous(), "members": self.members.contiguous()}, part)

    @classmethod
    def load(cls, path: Path) -> "Pool":
        return cls(**load_file(path))


@torch.no_grad()
def run_pool(
    chain: Chain, bank: UnitBank, decode: Callable[[Tensor], Tensor], size: int, device: torch.device | str,
    dtype: torch.dtype, progress: Callable[[int, int], None] | None = None,
) -> Pool:  # fmt: skip
    """The unguided samples of a pilot of this size, of the same seeds and noise."""
    x_0, members = [], []
    for x in unguided(chain, size, "pilot", device, dtype):
        x_0.append(x.cpu())
        members.append(bank.read_all(decode(x)).double().cpu())
        if progress:
            progress(sum(map(len, x_0)), size)
    return Pool(torch.cat(x_0), torch.cat(members))


@torch.no_grad()
def unguided(
    chain: Chain, size: int, domain: str, device: torch.device | str, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Samples x_0 (B, *shape) of the chain, batch by batch; seeds 0..size-1 of a noise domain."""
    for first in range(0, size, BATCH):
        noise = Noise(
            range(first, min(first + BATCH, size)), chain.denoiser.shape, device, dtype, domain=domain
        )
        for state, _ in chain.run(noise):  # noqa: B007
            pass
        yield state.x
