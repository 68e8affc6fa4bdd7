"""From rows to samples: prior, units, chain, guidance and pilot put together; no Lightning here."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltlens.constraint import Constraint
from tiltlens.energies import Energy
from tiltlens.guidance.guidance import Guidance
from tiltlens.guidance.learned import Lesson
from tiltlens.priors.prior import Prior
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.chain_sampler import ChainSampler, Independent, Parts, Samples
from tiltlens.sampling.pilot import UnitPilot, run_pilot, tables
from tiltlens.sampling.plan import Row
from tiltlens.sampling.shadow import learn
from tiltlens.schedule import step_indices
from tiltlens.units.bank import UnitBank
from tiltlens.units.calibration import Natural


class Sampler:
    """prior, bank, energy, guidance: as built. steps, eta, spacing, clip, order: the chain. device: where it runs. method: what is
    done with the chain, `Independent` by default."""

    def __init__(
        self, prior: Prior, bank: UnitBank, energy: Energy, guidance: Guidance, steps: int = 50, eta: float = 1.0,
        spacing: str = "log-snr", clip: bool = False, device: torch.device | str = "cpu",
        method: ChainSampler | None = None, order: int = 1,
    ):  # fmt: skip
        self.method = method or Independent()
        self.method.check(eta)
        self.prior, self.bank, self.energy, self.guidance = (
            prior.to(device),
            bank.to(device),
            energy,
            guidance,
        )
        indices = step_indices(prior.denoiser.schedule, steps, spacing)
        self.chain = Chain(prior.denoiser, indices, eta, clip, order)
        self.device, self.dtype = device, getattr(prior, "dtype", torch.float32)
        self.pilots: list[UnitPilot] | None = None
        self.constraint: Constraint | None = None
        self.lessons: list[Lesson] | None = None

    def run_pilot(
        self, samples: int, batch_size: int, progress: Callable[[int, int], None] | None = None
    ) -> list[UnitPilot]:
        """Unguided trajectories for all units of the bank; see `tiltlens.sampling.pilot`."""
        return run_pilot(
            self.chain, self.bank, self.prior.decode, samples, batch_size, self.device, self.dtype, progress,
            self.guidance.reads_features,
        )  # fmt: skip

    def calibrate(
        self, pilots: list[UnitPilot] | None, reference: list[Tensor] | None = None,
        lessons: list[Lesson] | None = None, progress: Callable[[int, int], None] | None = None,
    ) -> None:  # fmt: skip
        """Freeze everything that the run learns beforehand. reference: member activations (N, k) of each unit on natural
        images, where an image folder and not the pilot says what is natural. lessons: what a guidance that learns has
        learned before of this pilot; None for learning it now, with progress(done, total). Raises ValueError where
        guidance or energy need what is not there."""
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
        if self.guidance.learns:
            self.lessons = lessons or learn(
                self.guidance,
                self.chain,
                self.constraint,
                regression,
                pilots,
                self.device,
                self.dtype,
                progress,
            )
            self.guidance.adopt(self.lessons)

    def sample(self, rows: Sequence[Row], progress: Callable[[int, int], None] | None = None) -> Samples:
        """Sample these rows as one batch, in whole groups where the method has groups; progress(step, steps)."""
        return self.method.run(self.parts(), rows, progress)

    def parts(self) -> Parts:
        """What the method works with; calibrated by now."""
        if self.constraint is None:
            raise RuntimeError("calibrate the sampler before sampling")
        return Parts(self.prior, self.chain, self.constraint, self.guidance, self.device, self.dtype)


def _lenient(unit, members: Tensor) -> Natural:
    """A raw energy asks nothing of the natural reference: a unit that does not vary keeps the identity."""
    try:
        return Natural.from_members(unit, members)
    except ValueError:
        return Natural.identity(unit)
