"""Twisted sequential Monte Carlo: the exact law, by groups of interacting particles.

Wu et al., Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Twisted Diffusion Sampler), 2023.
G particles run the guided chain. At every step that guides, with the value psi_t(x_t) of the twist that the guidance
evaluates there anyway,

    log w = (log dP/dQ + log psi_t) now - the same at the last resampling (at the start: 0),

so that the group stands for p(path) psi_t(x_t). Where ESS = 1/sum W^2 falls below `threshold` G, it is resampled
systematically and log mean w goes into log Z^. The end has psi_0 = exp(-s E(x_0)), whatever the twists were: they decide
the variance and nothing else. For any number of particles

    E[Z^] = Z(s),    and    KL(q^||p) <= E[ -s E(x_0) - log Z^ ]

for the law q^ of an output particle (one of the group, drawn by W): KL(q^||q_s) <= log Z - E[log Z^], the KL of the whole
particle system from the one in which Z^ re-weights it (Andrieu et al., Particle Markov Chain Monte Carlo, 2010), and
KL(q^||p) = KL(q^||q_s) + E[-s E] - log Z. With one particle -s E - log Z^ = log dQ/dP of its path.

Every number of a group comes from its own rows and its own noise streams, and in the same order of operations whatever
stands beside it: a group is the same to the bit in any company.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlens.guidance.guidance import Guided
from tiltlens.sampling.chain import State
from tiltlens.sampling.chain_sampler import ChainSampler, Parts, Progress, Samples
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row


@dataclass(frozen=True)
class Cloud:
    """All that belongs to a particle, row by row; what `index` does not move is a fault.

    state, guided: of the chain. level (B,) float64: log dP/dQ + log psi at the last step that guided the row; base: the
    level at its last resampling. root (B,): the row in which its path began.
    """

    state: State
    guided: Guided | None
    level: Tensor
    base: Tensor
    root: Tensor

    def index(self, rows: Tensor) -> "Cloud":
        """Row i becomes row rows[i], with everything that belongs to it."""
        return _taken(self, rows)

    def log_w(self, size: int) -> Tensor:
        """(groups, size): since the last resampling. A particle that is not finite has weight 0."""
        log_w = self.level - self.base
        return torch.where(torch.isfinite(log_w), log_w, -math.inf).reshape(-1, size)


def _taken(value: Any, rows: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[rows]
    if dataclasses.is_dataclass(value):
        parts = {f.name: _taken(getattr(value, f.name), rows) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if isinstance(value, dict):
        return {k: _taken(v, rows) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_taken(v, rows) for v in value])
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"a memory of guidance that particles cannot re-index: expected tensors (B, ...) in dataclasses, dicts, lists or "
        f"tuples, found {type(value).__name__}"
    )


@dataclass(frozen=True)
class Weights:
    """Of groups (K, G). log_mean (K,): log of the mean weight. w (K, G): normalised, all 0 in a group with no finite
    particle. ess (K,): 1/sum w^2, 0 in such a group."""

    log_mean: Tensor
    w: Tensor
    ess: Tensor

    @classmethod
    def of(cls, log_w: Tensor) -> "Weights":
        """log_w (K, G), -inf for weight 0. Sums run along the group in order (cumsum): they do not depend on K."""
        top = log_w.amax(1)
        alive = torch.isfinite(top)
        w = (log_w - torch.where(alive, top, 0.0)[:, None]).exp()
        total = w.cumsum(1)[:, -1]
        ess = total.square() / w.square().cumsum(1)[:, -1]
        log_mean = top + (total / log_w.shape[1]).log()
        return cls(
            torch.where(alive, log_mean, -math.inf),
            torch.where(alive[:, None], w / total[:, None], 0.0),
            torch.where(alive, ess, 0.0),
        )


def systematic(w: Tensor, u: Tensor) -> Tensor:
    """Ancestors (K, G) int64 by systematic resampling: w (K, G) normalised weights, u (K,) one uniform a group.

    Particle i stands floor(G w_i) or one time more, G w_i times on average. Ancestors come in order.
    """
    size = w.shape[1]
    total = w.cumsum(1)
    at = (u[:, None] + torch.arange(size, dtype=w.dtype, device=w.device)) / size
    at = at.clamp_max(1 - 2**-53)  # rounding may not step over the end
    return torch.searchsorted(total / total[:, -1:], at, right=True)


class Particles(ChainSampler):
    """Groups of particles, exact for any number of them.

    particles: G, rows in a group. threshold: resample where ESS < threshold G; 0 never (importance sampling), 1 whenever
    weights differ. Rows are weighted: an estimate is a mean over groups of sums of weight x value, and `copies` gives the
    equally weighted output. Needs a chain with noise (eta > 0). Groups of strength 0 are the base chain.
    """

    def __init__(self, particles: int = 64, threshold: float = 0.5):
        if isinstance(particles, bool) or particles < 1:
            raise ValueError(f"Particles: particles = {particles}, expected a whole number >= 1")
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"Particles: threshold = {threshold}, expected a fraction of the particles in [0, 1]"
            )
        if particles == 1:
            warnings.warn(
                "Particles with one particle resamples nothing: these are independent rows", stacklevel=2
            )
        self.particles, self.threshold = particles, float(threshold)

    @property
    def group_size(self) -> int:
        return self.particles

    def check(self, eta: float) -> None:
        if eta == 0:
            raise ValueError(
                "Particles weighs each step by its noise, and at eta = 0 there is none: expected eta > 0, found 0. "
                "Set model.eta above 0, or take the sampler Independent"
            )

    def run(self, parts: Parts, rows: Sequence[Row], progress: Progress | None = None) -> Samples:
        self._check_groups(rows)
        chain, guidance, noise, bound = (
            parts.chain,
            parts.guidance_for(rows),
            parts.noise(rows),
            parts.bound(rows),
        )
        tilted = (bound.strength > 0)[:: self.particles]
        state = chain.start(noise, guidance)
        zero = torch.zeros_like(state.log_dpdq)
        cloud = Cloud(state, None, zero, zero, torch.arange(len(rows), device=zero.device))
        log_z = zero[:: self.particles]
        norms, kls, ess, ancestors = [], [], [], []
        for number in range(len(chain)):
            guided = chain.estimate(cloud.state, number, noise, guidance, bound)
            cloud = dataclasses.replace(cloud, guided=guided)
            cloud = dataclasses.replace(cloud, level=_level(cloud))
            weights = Weights.of(cloud.log_w(self.particles))
            due = tilted & (weights.ess > 0) & (weights.ess < self.threshold * self.particles)
            if bool(due.any()):
                cloud = self._resample(cloud, weights, due, noise)
                log_z = torch.where(due, log_z + weights.log_mean, log_z)
            ess.append(weights.ess)
            ancestors.append(self._lineages(cloud))
            state, info = chain.move(cloud.state, number, cloud.guided, noise)
            cloud = dataclasses.replace(cloud, state=state, guided=None)
            norms.append(info.guidance_norm)
            kls.append(info.path_kl)
            if progress:
                progress(number + 1, len(chain))
        found = parts.finish(rows, bound, cloud.state, norms, kls)
        ess, ancestors = torch.stack(ess, 1), torch.stack(ancestors, 1)
        return self._weigh(found, cloud, log_z, bound.strength, noise, ess, ancestors)

    def _check_groups(self, rows: Sequence[Row]) -> None:
        g = self.particles
        for k in range(0, len(rows), g):
            first, members = rows[k], list(rows[k : k + g])
            if members != [Row(first.unit, first.strength, first.seed + i) for i in range(g)]:
                raise ValueError(
                    f"Particles: expected whole groups of {g} rows of one unit and strength with consecutive seeds, found "
                    f"another row in the group of unit {first.unit}, strength {first.strength:g}, seed {first.seed}"
                )

    def _resample(self, cloud: Cloud, weights: Weights, due: Tensor, noise: Noise) -> Cloud:
        """The groups that are due, each by its own uniform, from the stream of its first row."""
        first = (due.nonzero()[:, 0] * self.particles).tolist()
        ancestors = systematic(weights.w[due], noise.uniform("resampling", first))
        rows = torch.arange(len(cloud.level), device=due.device).reshape(-1, self.particles)
        rows[due] = ancestors + rows[due][:, :1]
        cloud = cloud.index(rows.flatten())
        base = torch.where(due.repeat_interleave(self.particles), cloud.level, cloud.base)
        return dataclasses.replace(cloud, base=base)

    def _lineages(self, cloud: Cloud) -> Tensor:
        """Unique ancestors at the start, a group each."""
        root = cloud.root.reshape(-1, self.particles).sort(1).values
        return 1 + (root.diff(dim=1) != 0).sum(1)

    def _weigh(
        self, found: Samples, cloud: Cloud, log_z: Tensor, strength: Tensor, noise: Noise, ess: Tensor, ancestors: Tensor
    ) -> Samples:  # fmt: skip
        """The last weights, psi_0 = exp(-s E), and what every row is worth by them."""
        g, strength = self.particles, strength.double().cpu()
        level = torch.where(found.finite, found.log_w, math.nan)  # -s E + log dP/dQ
        last = dataclasses.replace(cloud, level=level, base=cloud.base.cpu())
        weights = Weights.of(last.log_w(g))
        log_w = log_z.cpu()[:, None] + last.log_w(g)
        log_z_hat = torch.where(strength[::g] > 0, log_z.cpu() + weights.log_mean, 0.0)
        some = torch.where(
            (weights.ess > 0)[:, None], weights.w, 1 / g
        )  # a group with none left is put right below
        ancestor = systematic(some, noise.uniform("resampling", range(0, len(level), g)).cpu())
        copies = torch.zeros_like(ancestor).scatter_add(1, ancestor, torch.ones_like(ancestor))
        copies[weights.ess == g] = 1  # equal weights: rounding would leave a row out and take another twice
        copies[weights.ess == 0] = 0
        ess[:, -1] = weights.ess
        per_row = lambda x: x.cpu().repeat_interleave(g, 0)  # noqa: E731
        return dataclasses.replace(
            found,
            log_w=log_w.flatten(),
            path_kl=-strength * found.energy - per_row(log_z_hat),
            finite=found.finite & torch.isfinite(log_w.flatten()),
            group=per_row(torch.tensor([r.seed for r in found.rows[::g]])),
            weight=weights.w.flatten(),
            copies=copies.flatten(),
            ess=per_row(ess),
            ancestors=per_row(ancestors),
        )


def _level(cloud: Cloud) -> Tensor:
    """log dP/dQ + log psi where this step took the twist of a row; as it was elsewhere."""
    guided = cloud.guided
    if guided.log_psi is None:
        return cloud.level
    level = cloud.state.log_dpdq + guided.log_psi
    return level if guided.reads is None else torch.where(guided.reads, level, cloud.level)
