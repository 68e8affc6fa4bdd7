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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.sampling.chain_sampler import ChainSampler, Parts, Progress, Samples
from tiltlens.sampling.cloud import Cloud, Weights, systematic
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row
from tiltlens.sampling.tempering import exponent


class Particles(ChainSampler):
    """Groups of particles, exact for any number of them.

    particles: G, rows in a group. threshold: resample where ESS < threshold G; 0 never (importance sampling), 1 whenever
    weights differ. Rows are weighted: an estimate is a mean over groups of sums of weight x value, and `copies` gives the
    equally weighted output. temper: None, or the share of the particles that every step must keep, see
    `tiltlens.sampling.tempering`; it costs one more group for each unit and strength. Needs a chain with noise (eta > 0).
    Groups of strength 0 are the base chain.
    """

    def __init__(self, particles: int = 64, threshold: float = 0.5, temper: float | None = None):
        if isinstance(particles, bool) or particles < 1:
            raise ValueError(f"Particles: particles = {particles}, expected a whole number >= 1")
        if not 0 <= threshold <= 1:
            raise ValueError(
                f"Particles: threshold = {threshold}, expected a fraction of the particles in [0, 1]"
            )
        if temper is not None and not 0 < temper < 1:
            raise ValueError(
                f"Particles: temper = {temper}, expected None or a share of the particles in (0, 1)"
            )
        if particles == 1:
            warnings.warn(
                "Particles: particles = 1, expected 2 or more: a group of one particle resamples nothing. Set "
                "particles, or take the sampler Independent",
                stacklevel=2,
            )
        self.particles, self.threshold, self.temper = particles, float(threshold), temper
        self._found: dict[tuple, list[float]] = {}

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
        bound, noise = parts.bound(rows), parts.noise(rows)
        beta = None if self.temper is None else self._exponents(parts, rows)
        chosen = (lambda number, cloud: 1.0) if beta is None else (lambda number, cloud: beta[:, number])
        steps = []
        for step in self._steps(parts, rows, noise, chosen):
            steps.append((step.guidance_norm, step.path_kl, step.ess, step.ancestors))
            if progress:
                progress(len(steps), len(parts.chain))
        norms, kls, ess, ancestors = zip(*steps)
        found = parts.finish(rows, bound, step.cloud.state, norms, kls)
        ess, ancestors = torch.stack(ess, 1), torch.stack(ancestors, 1)
        if not parts.guidance.has_twist and bool((bound.strength > 0).any()):
            ess[(bound.strength > 0)[:: self.particles], :-1] = math.nan  # nothing was weighed there
            warnings.warn(
                f"{type(parts.guidance).__name__} has no twist: groups are weighed and resampled at the end alone, as importance "
                "sampling is. Exact, but no better than independent rows; Calibrated or Learned have one",
                stacklevel=2,
            )
        return self._weigh(found, step.cloud, step.log_z, bound.strength, noise, ess, ancestors)

    def _steps(self, parts: Parts, rows: Sequence[Row], noise: Noise, beta: Callable) -> Iterator["_Step"]:
        """Step by step: estimate, weigh, resample where it is due, move. beta(number, cloud): exponents of the twist."""
        chain, guidance, bound = parts.chain, parts.guidance_for(rows), parts.bound(rows)
        tilted = (bound.strength > 0)[:: self.particles]
        state = chain.start(noise, guidance)
        zero = torch.zeros_like(state.log_dpdq)
        cloud = Cloud(state, None, zero, zero, torch.arange(len(rows), device=zero.device))
        log_z = zero[:: self.particles]
        for number in range(len(chain)):
            guided = chain.estimate(cloud.state, number, noise, guidance, bound)
            cloud = dataclasses.replace(cloud, guided=guided)
            cloud = cloud.weighed(beta(number, cloud))
            weights = Weights.of(cloud.log_w(self.particles))
            due = tilted & (weights.ess > 0) & (weights.ess < self.threshold * self.particles)
            if bool(due.any()):
                cloud = self._resample(cloud, weights, due, noise)
                log_z = torch.where(due, log_z + weights.log_mean, log_z)
            lineages = self._lineages(cloud)
            state, info = chain.move(cloud.state, number, cloud.guided, noise)
            cloud = dataclasses.replace(cloud, state=state, guided=None)
            yield _Step(cloud, log_z, info.guidance_norm, info.path_kl, weights.ess, lineages)

    def _exponents(self, parts: Parts, rows: Sequence[Row]) -> Tensor:
        """beta (B, steps): of each unit and strength from a pilot group of its own, run once."""
        for unit, s in sorted({(r.unit, r.strength) for r in rows if r.strength > 0}):
            if (parts.constraint, unit, s) in self._found:
                continue
            pilot = [Row(unit, s, i) for i in range(self.particles)]
            noise = Noise(
                range(self.particles), parts.chain.denoiser.shape, parts.device, parts.dtype, "tempering"
            )
            found: list[float] = []

            def choose(number: int, cloud: Cloud, found: list[float] = found) -> float:
                log_psi = cloud.guided.log_psi
                if log_psi is None:
                    found.append(1.0)
                else:
                    rest = cloud.state.log_dpdq - cloud.level
                    found.append(exponent(cloud.log_w(self.particles)[0], rest, log_psi, self.temper))
                return found[-1]

            for _ in self._steps(parts, pilot, noise, choose):
                pass
            self._found[parts.constraint, unit, s] = found
        one = [1.0] * len(parts.chain)
        beta = [self._found[parts.constraint, r.unit, r.strength] if r.strength > 0 else one for r in rows]
        return torch.tensor(beta, dtype=torch.float64, device=parts.device)

    def recorded(self) -> dict[str, Tensor] | None:
        """The exponents of the twist that tempering found so far: unit (index), strength (K,); exponents (K, steps)."""
        if not self._found:
            return None
        keys = [(unit, s) for _, unit, s in self._found]
        unit, strength = (torch.tensor(x) for x in zip(*keys))
        return {"unit": unit, "strength": strength.double(), "exponents": torch.tensor(list(self._found.values()))}  # fmt: skip

    def diagnostics(self, records: Sequence[dict[str, Tensor]] | None = None) -> list[dict]:
        """For each (unit, strength > 0) that was tempered: unit (index), strength, exponents of the twist (steps,)."""
        own = self.recorded()
        found: dict[tuple[int, float], list[float]] = {}
        for record in records if records is not None else [own] if own else []:
            keys = zip(record["unit"].tolist(), record["strength"].tolist())
            found |= dict(zip(keys, record["exponents"].tolist()))
        return [{"unit": unit, "strength": s, "exponents": x} for (unit, s), x in sorted(found.items())]

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
        some = torch.where((weights.ess > 0)[:, None], weights.w, 1 / g)  # no particle left: put right below
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
            ancestor=torch.tensor([found.rows[i].seed for i in cloud.root.tolist()]),
            ess=per_row(ess),
            ancestors=per_row(ancestors),
        )


@dataclass(frozen=True)
class _Step:
    """What one step left: the cloud after it, log Z^ so far (groups,), and the step's diagnostics."""

    cloud: Cloud
    log_z: Tensor
    guidance_norm: Tensor
    path_kl: Tensor
    ess: Tensor
    ancestors: Tensor
