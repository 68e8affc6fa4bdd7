"""A pool of unguided samples, and the warm start of a control on it.

Re-weighted by w = exp(-s' E), samples of p are samples of q_s', and denoising score matching on them,

    loss = E_t E_{x_0 ~ q_s'} [ lambda_t |adapted(alpha_t x_0 + sigma_t eps) - x_0|^2 ],   lambda_t = c_x0^2 / (2 v^2),

is KL(q_s' || q) along the chain, up to a constant (cross-entropy): it needs no gradient of the unit, and it knows of modes
that local gradients never see. It is used at high noise alone, where the scene is decided and few samples go far; and at
the largest s' <= s at which the weights still stand for enough samples. Adjoint matching does the rest.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.guidance.control import Control
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.units.bank import UnitBank

BATCH = 64


@dataclass(frozen=True)
class Pool:
    """x_0 (P, *shape): unguided samples of the chain, float32. members (P, units, K): raw activations of the members."""

    x_0: Tensor
    members: Tensor

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({"x_0": self.x_0.contiguous(), "members": self.members.contiguous()}, part)
        part.replace(path)

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


def trusted_weights(energy: Tensor, strength: float, least_ess: float) -> tuple[Tensor, float]:
    """Normalised weights exp(-s' E) (P,) and s', the largest one in (0, strength] of ESS >= least_ess, by bisection. A sample whose
    energy is not finite has weight 0."""
    finite, energy = torch.isfinite(energy), energy.double().nan_to_num(0.0, 0.0, 0.0)

    def weights(s: float) -> Tensor:
        return torch.where(finite, -s * energy, -torch.inf).softmax(0)

    def ess(s: float) -> float:
        return float(1 / weights(s).square().sum())

    low, high = 0.0, strength
    if ess(high) < least_ess:
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if ess(middle) >= least_ess else (low, middle)
        high = low
    return weights(high), high


def score_matching_loss(
    chain: Chain, control: Control, x_0: Tensor, steps: Tensor, noise: Tensor, size: int = 16
) -> Tensor:  # fmt: skip
    """x_0, noise (B, *shape); steps: one a part of `size` rows, so that each part is one call of the network."""
    terms = []
    for number, x, eps in zip(steps.tolist(), x_0.split(size), noise.split(size)):
        t, c, schedule = chain.indices[number], chain.coefficients[number], chain.denoiser.schedule
        x_t = float(schedule.alpha[t]) * x + float(schedule.sigma[t]) * eps
        with torch.no_grad():
            x0_hat = chain.denoiser(x_t, t) if control.kind == "head" else x_t
        error = (control.estimate(x_t, t, x0_hat) - x).square().flatten(1).sum(1)
        terms.append(error.mean() * c.x0**2 / (2 * c.v**2))
    return torch.stack(terms).mean()
