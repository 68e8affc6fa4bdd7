"""Noise schedules and the grid of steps.

A diffusion process is x_t = alpha_t x_0 + sigma_t eps with eps ~ N(0, I). A `Schedule` is a finite table of
(alpha_t, sigma_t), index 0 the cleanest, T - 1 the noisiest, and everything else reads the table by index:
variance preserving (alpha^2 + sigma^2 = 1), variance exploding (alpha = 1) and flow matching
(alpha + sigma = 1) differ only in its numbers.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

SPACINGS = ("log-snr", "index")
LOG_SNR_FLOOR = -9.0  # below, x_t is noise to within 1e-4 of its variance: steps spent there buy nothing


@dataclass(frozen=True)
class Schedule:
    """A table of alpha_t, sigma_t and of the time that the network is given, cleanest first.

    alpha, sigma, time: (T,) float64. init_std: the scheduler's own standard deviation of x_T; a chain begins with that of `start_std`. floor: steps
    uniform in log-SNR begin no lower than this.
    """

    alpha: Tensor
    sigma: Tensor
    time: Tensor
    init_std: float = 1.0
    floor: float = LOG_SNR_FLOOR
    log_snr: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "time"):
            value = torch.as_tensor(getattr(self, name)).to(torch.float64).cpu()
            object.__setattr__(self, name, value)
        if not (self.alpha.shape == self.sigma.shape == self.time.shape and self.alpha.ndim == 1):
            raise ValueError(
                "a schedule needs three tables of one length: expected alpha, sigma, time of shape (T,), found "
                f"{tuple(self.alpha.shape)}, {tuple(self.sigma.shape)}, {tuple(self.time.shape)}"
            )
        if not (torch.isfinite(self.alpha).all() and torch.isfinite(self.sigma).all()):
            raise ValueError("a schedule needs finite alpha and sigma; the table holds NaN or infinity")
        if (self.alpha < 0).any() or (self.sigma <= 0).any():
            raise ValueError("a schedule needs alpha >= 0 and sigma > 0 at every index")
        log_snr = 2 * (self.alpha.log() - self.sigma.log())
        if not (log_snr.diff() < 0).all():  # NaN too: two indices with alpha = 0
            raise ValueError("a schedule runs from clean to noisy: log-SNR must fall from index 0 to T - 1")
        object.__setattr__(self, "log_snr", log_snr)

    def __len__(self) -> int:
        return self.alpha.numel()

    def start_std(self, t: int) -> float:
        """Standard deviation of a chain's first state when it starts at index t: sqrt(alpha_t^2 + sigma_t^2).

        That of x_t for data of unit variance: 1 where variance preserving, sqrt(sigma_t^2 + 1) where alpha = 1 (as in
        diffusers), 1 at the pure noise of a flow. It depends on t, for the steps need not start at T - 1.
        """
        return math.hypot(float(self.alpha[t]), float(self.sigma[t]))

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor, time: Tensor | None = None) -> "Schedule":
        """alpha_t^2 = alphas_cumprod (T,), sigma_t^2 = 1 - alpha_t^2; a zero-SNR end is dropped."""
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64)
        time = torch.arange(bar.numel(), dtype=torch.float64) if time is None else time
        keep = bar > 0
        return cls(bar[keep].sqrt(), (1 - bar[keep]).sqrt(), time[keep])

    @classmethod
    def from_log_snr(cls, log_snr: Tensor) -> "Schedule":
        """The variance-preserving table with these levels (T,), falling: alpha^2 = sigmoid(log-SNR)."""
        log_snr = torch.as_tensor(log_snr, dtype=torch.float64)
        time = torch.arange(len(log_snr), dtype=torch.float64)
        return cls(
            torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt(), time, floor=float(log_snr[-1])
        )


def step_indices(schedule: Schedule, steps: int, spacing: str = "log-snr") -> list[int]:
    """Indices of a chain with `steps` network calls, noisiest first: [t_1 > t_2 > ... > t_steps].

    "log-snr": uniform in log-SNR between max(log_snr_T, schedule.floor) and log_snr_0; "index": uniform in the index of the
    training table. Raises ValueError for an unknown spacing or a number of steps outside [1, T].
    """
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: expected one of {', '.join(SPACINGS)}")
    if not 1 <= steps <= len(schedule):
        raise ValueError(f"steps = {steps}: expected 1 to {len(schedule)}, the length of the training table")
    if spacing == "index":
        wanted = torch.linspace(len(schedule) - 1, 0, steps, dtype=torch.float64).round().long()
        return wanted.tolist()
    start = max(float(schedule.log_snr[-1]), min(schedule.floor, float(schedule.log_snr[0])))
    goals = torch.linspace(start, float(schedule.log_snr[0]), steps, dtype=torch.float64)
    nearest = (schedule.log_snr[None] - goals[:, None]).abs().argmin(1).tolist()
    return _strictly_decreasing(nearest, len(schedule))


def _strictly_decreasing(indices: list[int], length: int) -> list[int]:
    """Where a coarse table answers two goals with one index, move to the next free one."""
    out: list[int] = []
    for k, index in enumerate(indices):
        left = len(indices) - 1 - k  # so many smaller indices are still needed
        ceiling = (out[-1] - 1) if out else length - 1
        out.append(min(max(index, left), ceiling))
    return out


def check_steps(schedule: Schedule, indices: list[int]) -> None:
    """Raises ValueError unless the indices fall strictly and lie within the training table."""
    if not indices:
        raise ValueError("a chain needs at least one step; the list of steps is empty")
    if any(a <= b for a, b in zip(indices, indices[1:])):
        raise ValueError("steps must fall strictly, from the noisiest index to the cleanest")
    if indices[0] >= len(schedule) or indices[-1] < 0:
        raise ValueError(f"steps must lie in 0..{len(schedule) - 1}; found {indices[0]}..{indices[-1]}")


@dataclass(frozen=True)
class StepCoefficients:
    """The base step t -> r is N(x0 * x0_hat + x * x_t, v^2 I). The last step has r = clean, x = v = 0."""

    x0: float
    x: float
    v: float


def step_coefficients(schedule: Schedule, t: int, r: int | None, eta: float) -> StepCoefficients:
    """The DDIM family, in any schedule (Song et al., Denoising Diffusion Implicit Models, 2021, eq. 12 and 16).

    v^2 = eta^2 sigma_r^2 (1 - SNR_t / SNR_r),  mu = alpha_r x0_hat + sqrt(sigma_r^2 - v^2) (x_t - alpha_t x0_hat) / sigma_t

    eta = 0 is deterministic, eta = 1 is ancestral DDPM with the small variance. r = None is the clean end
    (alpha = 1, sigma = 0). 1 - SNR_t / SNR_r is taken by expm1, for it cancels when steps are short.
    """
    if r is None:
        return StepCoefficients(1.0, 0.0, 0.0)
    alpha_t, sigma_t = float(schedule.alpha[t]), float(schedule.sigma[t])
    alpha_r, sigma_r = float(schedule.alpha[r]), float(schedule.sigma[r])
    v = eta * sigma_r * math.sqrt(-math.expm1(float(schedule.log_snr[t] - schedule.log_snr[r])))
    x = math.sqrt(max(sigma_r**2 - v**2, 0.0)) / sigma_t
    return StepCoefficients(alpha_r - alpha_t * x, x, v)
