"""The family of samplers: what is done with the chain to turn named rows into samples of q_s.

`Independent` runs the guided chain once a row. `Particles` runs groups of rows that are re-weighted and resampled along
the way. `NoiseSpace` walks over the chain's noise, without guidance. All of them are given the same parts and hand back the same `Samples`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.constraint import Constraint, RowConstraint
from tiltlens.guidance.guidance import Guidance
from tiltlens.priors.prior import Prior
from tiltlens.sampling.chain import Chain, State
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Samples:
    """A batch of finished rows, on the CPU. images (B, 3, H, W) in [-1, 1], or vectors (B, d). activation, z, energy,
    log_w, path_kl, clipped (B,) float64; log_w and path_kl are None at eta = 0. finite (B,) bool. The per-step
    guidance_norm and step_kl are (B, steps), of the particle that stood in this row at that step.

    Rows in groups have besides: group (B,) int64, the first seed of the group; weight (B,), W of the row in its group, and
    copies (B,) int64, how often it stands in the group's equally weighted output; ancestor (B,) int64, the seed in whose
    state the path of the row began; ess and ancestors (B, steps): 1/sum W^2
    of the group, and how many of its first states live on. None for independent rows."""

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
    group: Tensor | None = None
    weight: Tensor | None = None
    copies: Tensor | None = None
    ancestor: Tensor | None = None
    ess: Tensor | None = None
    ancestors: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """What a sampler works with: calibrated, on its device."""

    prior: Prior
    chain: Chain
    constraint: Constraint
    guidance: Guidance
    device: torch.device | str
    dtype: torch.dtype

    def bound(self, rows: Sequence[Row]) -> RowConstraint:
        """Unit and strength of each row."""
        which = torch.tensor([r.unit for r in rows], device=self.device)
        strength = torch.tensor([r.strength for r in rows], dtype=self.dtype, device=self.device)
        return self.constraint.rows(which, strength)

    def noise(self, rows: Sequence[Row]) -> Noise:
        """Each row's own streams, named by its seed."""
        return Noise([r.seed for r in rows], self.chain.denoiser.shape, self.device, self.dtype)

    def guidance_for(self, rows: Sequence[Row]) -> Guidance | None:
        """None where every strength is 0: such a batch needs no graph."""
        return self.guidance if any(r.strength > 0 for r in rows) else None

    def finish(
        self, rows: Sequence[Row], bound: RowConstraint, state: State, norms: Sequence[Tensor], kls: Sequence[Tensor]
    ) -> Samples:  # fmt: skip
        """The samples of final states, with log w = -s E + log dP/dQ. norms, kls: a step's (B,) each."""
        with torch.no_grad():
            images = self.prior.decode(state.x)
            a = bound.read(images).double()
        energy = bound.energy_of(a.to(bound.strength)).double()
        log_w, path_kl = -bound.strength.double() * energy + state.log_dpdq, state.path_kl
        flat = images.double().flatten(1)
        finite = torch.isfinite(flat).all(1) & torch.isfinite(a) & torch.isfinite(energy)
        weighted = self.chain.eta > 0
        if weighted:
            finite &= torch.isfinite(log_w) & torch.isfinite(path_kl)
        clipped = (flat.abs() > 1.0).double().mean(1) if self.prior.images else torch.zeros_like(a)
        cpu = lambda x: x.detach().cpu()  # noqa: E731
        return Samples(
            list(rows), cpu(images), cpu(a), cpu(bound.standardise(a.to(bound.strength)).double()), cpu(energy),
            cpu(log_w) if weighted else None, cpu(path_kl) if weighted else None, cpu(clipped), cpu(finite),
            cpu(torch.stack(list(norms), 1)), cpu(torch.stack(list(kls), 1)),
        )  # fmt: skip


class ChainSampler:
    """A way of sampling. group_size: rows of one unit and strength, of consecutive seeds, that are sampled together and
    must share a batch."""

    group_size: int = 1
    weighs_deterministic = False  # whether weights and path KL are defined at eta = 0
    guides = True  # whether it steers by the guidance

    def check(self, eta: float) -> None:
        """Raises ValueError for a chain that this sampler cannot work with."""

    def run(self, parts: Parts, rows: Sequence[Row], progress: Progress | None = None) -> Samples:
        """Sample these rows, whole groups one after another, as one batch; progress(step, steps)."""
        raise NotImplementedError

    def recorded(self) -> dict[str, torch.Tensor] | None:
        """What the last batch recorded beyond its samples, for `diagnostics` of a run of several calls or processes."""
        return None

    def diagnostics(self, records: Sequence[dict[str, torch.Tensor]] | None = None) -> list[dict]:
        """How the sampling went, where rows do not say it: for each unit (index) and strength a dict of plain numbers.
        records: those of all batches, where others sampled them; else this object's own."""
        return []

    def describe(self) -> dict:
        """Name and settings: part of a run's identity."""
        return {
            "class": type(self).__name__,
            **{k: v for k, v in vars(self).items() if not k.startswith("_")},
        }


class Independent(ChainSampler):
    """The guided chain, once a row: importance weights, no interaction."""

    def run(self, parts: Parts, rows: Sequence[Row], progress: Progress | None = None) -> Samples:
        bound, norms, kls = parts.bound(rows), [], []
        for state, info in parts.chain.run(parts.noise(rows), parts.guidance_for(rows), bound):  # noqa: B007
            norms.append(info.guidance_norm)
            kls.append(info.path_kl)
            if progress:
                progress(info.number + 1, len(parts.chain))
        return parts.finish(rows, bound, state, norms, kls)
