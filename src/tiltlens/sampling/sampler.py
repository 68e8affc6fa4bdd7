"""From rows to samples: prior, units, chain, guidance and pilot put together; no Lightning here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.constraint import Constraint
from tiltlens.energies import Energy
from tiltlens.guidance.guidance import Guidance
from tiltlens.priors.prior import Prior
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.pilot import UnitPilot, run_pilot, tables
from tiltlens.sampling.plan import Row
from tiltlens.schedule import step_indices
from tiltlens.units.bank import UnitBank
from tiltlens.units.calibration import Natural


@dataclass(frozen=True)
class Samples:
    """A batch of finished rows, on the CPU. images (B, 3, H, W) in [-1, 1], or vectors (B, d). activation, z, energy,
    log_w, path_kl, clipped (B,) float64; log_w and path_kl are None at eta = 0. finite (B,) bool. The per-step
    guidance_norm and step_kl are (B, steps)."""

    rows: list[Row]
    images: Tensor
    activation: Tensor
    z: Tensor
    energy: Tensor
    log_w: Tensor | None
    path_kl: Tensor | None
    clipped: Tensor
    finite: Tensor
    guidance_norm: Tensor
    step_kl: Tensor


class Sampler:
    """prior, bank, energy, guidance: as built. steps, eta, spacing, clip: the chain. device: where it runs."""

    def __init__(
        self, prior: Prior, bank: UnitBank, energy: Energy, guidance: Guidance, steps: int = 50, eta: float = 1.0,
        spacing: str = "log-snr", clip: bool = False, device: torch.device | str = "cpu",
    ):  # fmt: skip
        self.prior, self.bank, self.energy, self.guidance = (
            prior.to(device),
            bank.to(device),
            energy,
            guidance,
        )
        self.chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, steps, spacing), eta, clip)
        self.device, self.dtype = device, getattr(prior, "dtype", torch.float32)
        self.pilots: list[UnitPilot] | None = None
        self.constraint: Constraint | None = None

    def run_pilot(
        self, samples: int, batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> list[UnitPilot]:
        """Unguided trajectories for all units of the bank; see `tiltlens.sampling.pilot`."""
        return run_pilot(
            self.chain, self.bank, self.prior.decode, samples, batch_size, self.device, self.dtype, progress
        )

    def calibrate(self, pilots: list[UnitPilot] | None, reference: list[Tensor] | None = None) -> None:
        """Freeze everything that the run learns beforehand. reference: member activations (N, k) of each unit on natural
        images, where an image folder and not the pilot says what is natural. Raises ValueError where guidance or energy
        need what is not there."""
        members = reference or ([p.members for p in pilots] if pilots else None)
        units = self.bank.units
        if members is None and (self.energy.standardise or any(u.size > 1 for u in units)):
            raise ValueError(
                "a standardised energy needs natural activations: set pilot >= 8, or natural to an image folder"
            )
        if self.energy.standardise or any(u.size > 1 for u in units):
            naturals = [Natural.from_members(u, m) for u, m in zip(units, members)]
        elif members is not None:
            naturals = [_lenient(u, m) for u, m in zip(units, members)]
        else:
            naturals = [Natural.identity(u) for u in units]
        self.pilots = pilots
        self.constraint = Constraint(self.bank, self.energy, naturals, self.prior.decode)
        regression = (
            tables(pilots, self.bank, naturals, self.chain, self.energy.standardise) if pilots else None
        )
        self.tables = regression
        self.guidance.prepare(regression, self.prior, self.constraint)

    def sample(self, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None) -> Samples:
        """Run the chain for these rows as one batch; progress(step, steps)."""
        if self.constraint is None:
            raise RuntimeError("calibrate the sampler before sampling")
        which = torch.tensor([r.unit for r in rows], device=self.device)
        strength = torch.tensor([r.strength for r in rows], dtype=self.dtype, device=self.device)
        bound = self.constraint.rows(which, strength)
        noise = Noise([r.seed for r in rows], self.chain.denoiser.shape, self.device, self.dtype)
        guidance = self.guidance if bool((strength > 0).any()) else None
        norms, kls = [], []
        for state, info in self.chain.run(noise, guidance, bound):  # noqa: B007
            norms.append(info.guidance_norm)
            kls.append(info.path_kl)
            if progress:
                progress(info.number + 1, len(self.chain))
        with torch.no_grad():
            images = self.prior.decode(state.x)
            a = bound.read(images)
        return self._finish(list(rows), images, a, bound, state, torch.stack(norms, 1), torch.stack(kls, 1))

    def _finish(self, rows, images, a, bound, state, norms, kls) -> Samples:
        a = a.double()
        energy = bound.energy_of(a.to(bound.strength)).double()
        log_w = -bound.strength.double() * energy + state.log_dpdq
        path_kl: Tensor | None = state.path_kl
        if self.chain.eta == 0:
            log_w = path_kl = None
        flat = images.double().flatten(1)
        finite = torch.isfinite(flat).all(1) & torch.isfinite(a) & torch.isfinite(energy)
        if log_w is not None:
            finite &= torch.isfinite(log_w) & torch.isfinite(path_kl)
        clipped = (flat.abs() > 1.0).double().mean(1) if self.prior.images else torch.zeros_like(a)
        cpu = lambda x: None if x is None else x.detach().cpu()  # noqa: E731
        return Samples(
            rows, cpu(images), cpu(a), cpu(bound.standardise(a.to(bound.strength)).double()), cpu(energy), cpu(log_w),
            cpu(path_kl), cpu(clipped), cpu(finite), cpu(norms), cpu(kls),
        )  # fmt: skip


def _lenient(unit, members: Tensor) -> Natural:
    """A raw energy asks nothing of the natural reference: a unit that does not vary keeps the identity."""
    try:
        return Natural.from_members(unit, members)
    except ValueError:
        return Natural.identity(unit)
