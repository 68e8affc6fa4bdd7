"""The pilot: unguided trajectories, run once, that say what is natural and what a clean estimate is worth.

For every unit it records the activation a(x_0) of its samples and, at each step, u_t = a(x0_hat). From these come the
natural reference (mean, standard deviation, quantiles) and the regression a(x_0) = c_t + rho_t u_t + residual that the
calibrated twist freezes. A pilot is named by prior, units, chain and its own seeds, never by the plan; its noise is
independent of every sample's, so that a slope never knows the noise it will steer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.guidance.guidance import Guided, PilotTables, clean_and_features, clean_estimate
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.units.bank import UnitBank
from tiltlens.units.calibration import Natural
from tiltlens.writing import whole_file

POOLED_STEPS = 2  # a slope is pooled with so many steps on either side: a step's own estimate is noisy
SPREAD = 0.25  # of the slope on what a noise-aware twin reads, about 1
KEPT_ABOVE = 2.0  # standard errors; below, a slope is about zero and the step is not guided


@dataclass(frozen=True)
class UnitPilot:
    """One unit's pilot. members (P, k): raw member activations of the samples. path (steps, P, k): of the clean
    estimates along the way. features (steps, P, F): of the denoiser, the same for all units, where guidance learns
    from them; not saved, for what was learned is."""

    members: Tensor
    path: Tensor
    features: Tensor | None = None

    def save(self, path: Path) -> None:
        with whole_file(path) as part:  # two runs may share a folder of pilots
            save_file({"members": self.members.contiguous(), "path": self.path.contiguous()}, part)

    @classmethod
    def load(cls, path: Path) -> "UnitPilot":
        data = load_file(path)
        return cls(data["members"], data["path"])


def run_pilot(
    chain: Chain, bank: UnitBank, decode: Callable[[Tensor], Tensor], samples: int, batch_size: int,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] | None = None, features: bool = False,
) -> list[UnitPilot]:  # fmt: skip
    """Run `samples` unguided trajectories (pilot seeds 0..samples-1) and read every unit of the bank on each.

    progress(done, total) is called after each step, in units of steps. features: keep the denoiser's, too. Raises ValueError
    where fewer than two of the samples are finite, whatever a unit reads there.
    """
    paths, finals, kept, done, finite = [], [], [], 0, 0
    batches = [range(i, min(i + batch_size, samples)) for i in range(0, samples, batch_size)]
    for seeds in batches:
        noise = Noise(seeds, chain.denoiser.shape, device, dtype, domain="pilot")
        reads, state = [], chain.start(noise)
        for number, t in enumerate(chain.indices):
            with torch.no_grad():
                if features:
                    x0_hat, phi = clean_and_features(chain.denoiser, state.x, t, chain.clip)
                    kept.append(phi.cpu())
                else:
                    x0_hat = clean_estimate(chain.denoiser, state.x, t, chain.clip)
                # the last step returns its clean estimate, so its reading is the sample's activation
                level = float(chain.log_snr[number]) if number + 1 < len(chain) else None
                images = decode(x0_hat)
                reads.append(bank.read_all(images, level).double())
            state, _ = chain.move(state, number, Guided(x0_hat, None), noise)
            done += 1
            if progress:
                progress(done, len(batches) * len(chain))
        paths.append(torch.stack(reads))  # (steps, b, units, K)
        finals.append(reads[-1])
        finite += int(torch.isfinite(images.flatten(1)).all(1).sum())
    if finite < min(2, samples):
        raise ValueError(
            f"the samples of the prior are not finite: expected at least two of the pilot's {samples} to be, found {finite}. Its "
            "weights may hold NaN or infinity, or overflow in this precision: fetch or train them again, or take float32"
        )
    path, final = torch.cat(paths, 1), torch.cat(finals)
    steps = len(chain)
    phi = (
        torch.cat([torch.stack(kept[i : i + steps]) for i in range(0, len(kept), steps)], 1) if kept else None
    )
    return [
        UnitPilot(final[:, i, : u.size].cpu(), path[:, :, i, : u.size].cpu(), phi)
        for i, u in enumerate(bank.units)
    ]


def tables(
    pilots: Sequence[UnitPilot], bank: UnitBank, naturals: Sequence[Natural], chain: Chain, standardise: bool
) -> PilotTables:
    """The regression of each unit at each step, on the energy's argument (z, or a itself)."""
    told = bank.expected(chain.log_snr[:-1].tolist())
    rows = [_regress(p, u, n, standardise, k) for p, u, n, k in zip(pilots, bank.units, naturals, told)]
    slope, intercept, residual = (torch.stack(x) for x in zip(*rows))
    return PilotTables(slope, intercept, residual, chain.log_snr)


def _regress(
    pilot: UnitPilot, unit, natural: Natural, standardise: bool, told: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    u, a = arguments(pilot, unit, natural, standardise)
    good = torch.isfinite(u).all(0) & torch.isfinite(a)
    return regression(u[:, good], a[good], torch.tensor([*told, False]))


def arguments(pilot: UnitPilot, unit, natural: Natural, standardise: bool) -> tuple[Tensor, Tensor]:
    """What the energy reads along a pilot: u (steps, P) of the clean estimates, a (P,) of the samples."""
    steps, count, k = pilot.path.shape
    z = ((pilot.path - natural.member_mean) / natural.member_std).reshape(steps * count, k)
    u = unit.combine(z).reshape(steps, count)
    a = unit.combine((pilot.members - natural.member_mean) / natural.member_std)
    if standardise:
        u, a = (u - natural.mean) / natural.std, (a - natural.mean) / natural.std
    return u, a


def regression(u: Tensor, a: Tensor, told: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a (P,) on u (steps, P) -> slope, intercept, residual variance, each (steps,).

    Second moments are pooled over neighbouring steps; a slope t = slope / se below 2 is zero, and any other is shrunk
    by its positive part James-Stein factor 1 - 1/t^2. t is that of the least correlation from this step on, so that
    guidance begins once and is not switched off again by chance. Negative slopes are taken for noise: zero. The residual variance
    of a zero slope is that of a: the unit cannot be read there.

    told (steps,): where u is read by a noise-aware twin, E[a | x_t] as it learned it. The slope of that is 1, but for the twin's own error,
    and thousands of images stand behind it: it is taken to be N(1, SPREAD^2) before the pilot is seen, and is zero nowhere that the twin reads.
    """
    count = u.shape[1]
    uc, ac = u - u.mean(1, keepdim=True), a - a.mean()
    cov, var_u, var_a = (uc * ac).mean(1), uc.square().mean(1), ac.square().mean()
    pooled_cov, pooled_var = _pool(cov), _pool(var_u)
    slope = pooled_cov / pooled_var.clamp_min(1e-12)
    r2 = (pooled_cov**2 / (pooled_var * var_a).clamp_min(1e-24)).clamp(0, 1 - 1e-9)
    r2 = torch.where(pooled_cov > 0, r2, 0)
    r2_own, r2 = (
        r2,
        r2.flip(0).cummin(0).values.flip(0),
    )  # what can be read at one level can be read at every cleaner one
    t = (r2 * max(count - 2, 1) / (1 - r2)).sqrt()
    slope = torch.where(
        (t > KEPT_ABOVE) & (slope > 0), slope * (1 - 1 / t.clamp_min(1) ** 2), torch.zeros_like(slope)
    )
    if told is not None and told.any():
        known = pooled_var * count / (var_a * (1 - r2_own)).clamp_min(1e-24)  # 1/se^2
        expected = (known * pooled_cov / pooled_var.clamp_min(1e-24) + SPREAD**-2) / (known + SPREAD**-2)
        slope = torch.where(told, expected.clamp_min(0), slope)
    slope[-1] = 1.0  # the last estimate is the sample
    residual = (ac[None] - slope[:, None] * uc).square().sum(1) / max(count - 2, 1)
    residual[-1] = 0.0
    intercept = a.mean() - slope * u.mean(1)
    return slope, intercept, residual


def _pool(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    for i in range(len(x)):
        out[i] = x[max(0, i - POOLED_STEPS) : i + POOLED_STEPS + 1].mean()
    return out
