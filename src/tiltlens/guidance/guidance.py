"""Energy -> steering of a denoiser.

With a positive twist psi_t(x_t) ~ E_p[exp(-s E(x_0)) | x_t] and g = grad_{x_t} log psi_t, a guided step shifts the
clean estimate, x0_hat <- x0_hat + (sigma_t^2 / alpha_t) g (Tweedie; Wu et al., Twisted Diffusion Sampler, 2023), and
leaves the variance of the base step alone. Any shift that is fixed before the step's noise is drawn keeps the weights
exact, so that methods differ only in how good their shift is.

The common frame: one forward of the denoiser, whose graph serves the value and the vector-Jacobian product; a method
says what cotangent d log psi / d x0_hat is pulled back, and hands over log psi itself, which particles weigh by.
Nothing is ever normalised over the batch.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.schedule import Schedule

Profile = Callable[[float], float]
After = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Step:
    """Where a chain stands: step `number` of the chain, index t of the table; `twist_noise(k)` draws (B, k, *shape)
    from each row's own twist stream. redraw(k, kappa): see `redrawn`; there once x0_hat is. gain: log-SNR that the step
    gains; 0 stands for a step of no length, and for one that is not ancestral (eta < 1)."""

    number: int
    t: int
    schedule: Schedule
    clip: bool
    twist_noise: Callable[[int], Tensor]
    redraw: Callable[[int, float], Tensor] | None = None
    gain: float = 0.0

    @property
    def alpha(self) -> float:
        return float(self.schedule.alpha[self.t])

    @property
    def sigma(self) -> float:
        return float(self.schedule.sigma[self.t])

    @property
    def log_snr(self) -> float:
        """log(alpha^2 / sigma^2)."""
        return float(self.schedule.log_snr[self.t])

    @property
    def fraction(self) -> float:
        """t / T: 0 at the clean end of the table, 1 at the noisy one."""
        return self.t / max(len(self.schedule) - 1, 1)


@dataclass(frozen=True)
class Guided:
    """x0_hat (B, *shape): the *unguided* clean estimate. shift: what guidance adds to it, None for an unguided step.
    memory: what the method carries to the next step, part of the state of the chain. log_psi (B,) float64: the method's
    own twist at x_t, None for an unguided step; reads (B,) bool: the rows that it was taken for (None: all), the others
    keep the twist of their last guided step. Any positive function is a valid twist, of the past path too."""

    x0_hat: Tensor
    shift: Tensor | None
    memory: Any = None
    log_psi: Tensor | None = None
    reads: Tensor | None = None


@dataclass
class PilotTables:
    """What calibration knows of a unit at each step of the chain: a(x_0) regressed on u_t = a(x0_hat), both as the
    energy's argument. slope, intercept, residual_variance: (units, steps); slope 0 where it is not about zero."""

    slope: Tensor
    intercept: Tensor
    residual_variance: Tensor
    log_snr: Tensor = field(default_factory=lambda: torch.empty(0))


def clean_estimate(denoiser: Denoiser, x_t: Tensor, t: int, clip: bool) -> Tensor:
    """x0_hat, clipped to [-1, 1] where the chain says so: in base law and guided law alike."""
    x0_hat = denoiser(x_t, t)
    return x0_hat.clamp(-1, 1) if clip else x0_hat


def clean_and_features(denoiser: Denoiser, x_t: Tensor, t: int, clip: bool) -> tuple[Tensor, Tensor]:
    """The same, and the features (B, F) that the same forward of the denoiser made."""
    x0_hat, phi = denoiser.with_features(x_t, t)
    return (x0_hat.clamp(-1, 1) if clip else x0_hat), phi


@torch.no_grad()
def redrawn(denoiser: Denoiser, x_t: Tensor, x0_hat: Tensor, step: Step, count: int, kappa: float) -> Tensor:
    """Clean estimates (count B, *shape) of x_t with a part of its noise drawn anew from each row's twist stream,

        alpha x0_hat + sigma (sqrt(1 - kappa^2) eps_hat + kappa xi),   eps_hat = (x_t - alpha x0_hat) / sigma,

    at the same noise level: images about as far from x0_hat as x_0 may be, and like x0_hat on the manifold."""
    eps_hat = (x_t - step.alpha * x0_hat) / step.sigma
    xi = step.twist_noise(count).transpose(0, 1).to(x_t)
    x = step.alpha * x0_hat + step.sigma * (math.sqrt(1 - kappa**2) * eps_hat + kappa * xi)
    return clean_estimate(denoiser, x.flatten(0, 1), step.t, step.clip)


GRID = 64  # of the training table, for the values of a callable profile


class Guidance:
    """A method of guidance. profile: weight of the shift in time: None for constant 1, [t_lo, t_hi] as fractions of the
    training table (0 clean, 1 noisy), or a callable fraction -> weight >= 0."""

    needs_pilot = False
    learns = False  # whether lessons are learned on the pilot, and handed to `adopt`, before the run
    reads_features = False  # whether the pilot keeps the denoiser's features for them
    has_twist = (
        True  # whether log_psi comes with the shift: without it particles are weighed at the end alone
    )

    def __init__(self, profile: list[float] | Profile | None = None):
        if isinstance(profile, (list, tuple)):
            if len(profile) != 2 or not 0 <= profile[0] < profile[1] <= 1:
                raise ValueError(
                    f"{type(self).__name__}: profile [t_lo, t_hi] needs 0 <= t_lo < t_hi <= 1, found {profile}"
                )
        elif profile is not None and not callable(profile):
            raise ValueError(
                f"{type(self).__name__}: profile must be None, [t_lo, t_hi] or a callable, found {profile!r}"
            )
        self.profile = profile
        if callable(profile):
            self._grid()

    def weight(self, step: Step) -> float:
        """The time profile at this step."""
        if self.profile is None:
            return 1.0
        if callable(self.profile):
            return float(self.profile(step.fraction))
        return 1.0 if self.profile[0] <= step.fraction <= self.profile[1] else 0.0

    def _grid(self) -> list[float]:
        """The values of a callable profile. Raises ValueError for one that is no finite number >= 0."""
        found = []
        for k in range(GRID + 1):
            value = self.profile(k / GRID)
            if not isinstance(value, Real | Tensor) or not 0 <= float(value) < math.inf:
                raise ValueError(
                    f"{type(self).__name__}: profile gives {value!r} at t = {k / GRID:.3g} of the training table "
                    "(0 clean, 1 noisy), expected a finite weight >= 0 everywhere in [0, 1]"
                )
            found.append(float(value))
        return found

    def prepare(self, pilot: PilotTables | None, prior: Any, constraint: Any) -> None:
        """Freeze what the method learns of the run before it; called once. Raises ValueError where it cannot work."""
        if self.needs_pilot and pilot is None:
            raise ValueError(f"{type(self).__name__} needs a pilot of unguided trajectories: set pilot >= 8")

    def check(self, pilot: int, eta: float) -> None:
        """Raises ValueError for a run with so many pilot trajectories, and this eta, that cannot be guided."""
        if self.needs_pilot and pilot == 0:
            raise ValueError(
                f"model.pilot = 0, but {type(self).__name__} guidance needs a pilot: set pilot >= 8"
            )

    def check_target(self, prior: Any, units: Sequence[Any], energy: Any, strengths: Sequence[float]) -> None:
        """Raises ValueError, before anything is sampled, for a target that the method was not made for."""

    def outcome(self) -> list[dict]:
        """What was learned, unit by unit, in plain numbers; part of the manifest."""
        return []

    def start(self, x_t: Tensor) -> Any:
        """The memory of new trajectories."""
        return None

    def reads(self, step: Step, rows: RowConstraint) -> Tensor:
        """(B,) bool: the rows that this step guides. Where there is none, it costs one forward, with no graph."""
        on = step.alpha > 1e-6 and self.weight(step) != 0
        return (rows.strength > 0) & on

    def __call__(
        self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Any
    ) -> Guided:
        """One guided estimate; a single forward of the denoiser with a graph, and where a method asks for them others without."""
        reads = self.reads(step, rows)
        if not bool(reads.any()):
            with torch.no_grad():
                return Guided(clean_estimate(denoiser, x_t, step.t, step.clip), None, memory)
        with torch.inference_mode(False), torch.enable_grad():
            x0_hat, g, log_psi, memory = self.twist(denoiser, x_t, step, rows, memory)
        shift = self.shift(g, step, rows)
        return Guided(x0_hat.detach(), shift, memory, log_psi.detach().double(), reads)

    def twist(
        self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """x0_hat, g = grad log psi (B, *shape), log psi (B,), memory; called with gradients on."""
        leaf = x_t.detach().clone().requires_grad_()
        x0_hat = clean_estimate(denoiser, leaf, step.t, step.clip)
        clean = x0_hat.detach().clone().requires_grad_()
        found = clean.detach()
        step = replace(step, redraw=lambda k, kappa: redrawn(denoiser, x_t.detach(), found, step, k, kappa))
        cotangent, memory, after = self.cotangent(clean, step, rows, memory)
        (g,) = torch.autograd.grad(x0_hat, leaf, cotangent.to(x0_hat.dtype))
        return x0_hat, *after(g, cotangent), memory

    def shift(self, g: Tensor, step: Step, rows: RowConstraint) -> Tensor:
        """(sigma_t^2 / alpha_t) g, times the profile; exactly zero where the strength is."""
        scaled = g * (self.weight(step) * step.sigma**2 / step.alpha)
        return torch.where(_expand(rows.strength > 0, g), scaled, torch.zeros_like(scaled)).detach()

    def cotangent(
        self, clean: Tensor, step: Step, rows: RowConstraint, memory: Any
    ) -> tuple[Tensor, Any, After]:
        """clean: x0_hat as a leaf -> (d log psi / d x0_hat, memory, after), where after(pulled-back cotangent, cotangent)
        is (g, log psi)."""
        raise NotImplementedError

    def describe(self) -> dict:
        """Name and settings, for the manifest."""
        kept = (int, float, str, list, tuple, type(None))
        plain = {k: v for k, v in vars(self).items() if not k.startswith("_") and isinstance(v, kept)}
        if callable(self.profile):
            # two lambdas have one name: what it is, is its values
            digest = hashlib.sha256(repr(self._grid()).encode()).hexdigest()[:8]
            plain["profile"] = (
                f"{getattr(self.profile, '__qualname__', type(self.profile).__name__)} #{digest}"
            )
        return {"class": type(self).__name__, **plain}


def finite_step(cotangent: Tensor, g: Tensor, step: Step) -> Tensor:
    """What of Tweedie's shift a step of finite length wants, (B,) in [exp(-gain), 1]. cotangent h, g = J^T h (B, *shape), with
    J = d x0_hat/d x_t.

    Twisted by psi_r at its end, a step t -> r of the chain moves its mean by v^2 grad log psi_r, and psi_t = E[psi_r | x_t] makes that,
    where log psi_r is linear, v^2 (d mu/d x_t)^-T g. On a direction of which a share l = alpha_t lambda is settled, lambda being J's
    eigenvalue there, this is Tweedie's (sigma_t^2/alpha_t) g, carried through the step, over

        1 + l (SNR_r/SNR_t - 1)          (eta = 1)

    so that Tweedie's shift is right for short steps and for directions still open, and too long by SNR_r/SNR_t for settled ones. l is taken
    to be one number for each row, alpha_t |J^T h|^2 / <h, J^T h>, between 0 and 1.
    """
    h, pulled = cotangent.double().flatten(1), g.double().flatten(1)
    settled = step.alpha * pulled.square().sum(1) / (h * pulled).sum(1).clamp_min(1e-300)
    return 1 / (1 + settled.nan_to_num(0.0).clamp(0, 1) * math.expm1(step.gain))


def unchanged(log_psi: Tensor) -> After:
    """The pulled-back cotangent is g already."""
    return lambda g, _: (g, log_psi)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """values (B,) -> (B, 1, ...) to multiply a tensor (B, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def clean_spread(step: Step, sigma_data: float) -> float:
    """Standard deviation of x_0 given x_t if x_0 were N(., sigma_data^2 I): sigma s_d / sqrt(alpha^2 s_d^2 + sigma^2)."""
    return step.sigma * sigma_data / (step.alpha**2 * sigma_data**2 + step.sigma**2) ** 0.5
