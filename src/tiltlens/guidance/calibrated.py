"""Calibrated guidance with memory: the default.

The activation of the clean estimate, u_t = a(x0_hat), says little about a(x_0) at high noise. A pilot of unguided
trajectories regresses a(x_0) on u_t at every step, a(x_0) | u_t ~ N(c_t + rho_t u_t, r_t^2), and the twist is

    psi_t = E[exp(-s E(a))],  a ~ N(c_t + rho_t u_t, r_t^2),      for E = -a:  log psi_t = s rho_t u_t + const,

so that strength means what it says and nothing is spent where the unit cannot be read. Where a noise-aware reader reads the unit, u_t is its
E[a(x_0) | x_t], and rho_t is taken to be about 1 before the pilot is seen (`tiltlens.sampling.pilot.regression`). With law = "natural", the default, a is not
Gaussian but of the unit's own law on natural images, mean and residual variance as before (`tiltlens.guidance.channel`). Memory: single-step
gradients are mostly noise that later steps undo, and KL pays for both; their running average along the trajectory, with time
constant `memory` in units of log-SNR, is pulled back through the denoiser. An average lags: of a gradient g and its average m the mix

    blend m + (1 - blend) g      (quasi-hyperbolic momentum, Ma and Yarats, 2019)

pays less for a shift than either. What is averaged is d(-s E)/d x0_hat; with the natural law,
whose force d log psi / d mean changes along the way, it is du/d x0_hat, and the force is the present one. The shift may
depend on the whole past, so that all weights stay exact. Smoothing: the gradient is averaged over a few shifts and flips of the image.
Redraws: what steers is the mean gradient over the x_0 that x_t may come from, and not the gradient at their mean: by
Stein's lemma, for x_0 | x_t about N(x0_hat, C), grad_{x_t} E[a(x_0) | x_t] = (alpha_t / sigma_t^2) C E[grad a(x_0) | x_t]. So
the gradient is averaged, too, over estimates of x_t with a part of its noise drawn anew.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.guidance.channel import NaturalLaws
from tiltlens.guidance.guidance import Guidance, PilotTables, Step, finite_step, per_row

KAPPA = 0.5  # of the noise that is drawn anew; at 0.8 the images are those of a blurrier prior, and mislead
LAWS = ("gaussian", "natural")
VIEWS = [(dy, dx, flip) for dy, dx in ((0, 0), (1, -1), (-1, 1), (1, 1), (-1, -1)) for flip in (False, True)]


@dataclass(frozen=True)
class Memory:
    """h (B, *shape): the running average, biased towards its zero start; weight (B,): the sum of its weights, 1 - b^k."""

    h: Tensor
    weight: Tensor


class Calibrated(Guidance):
    """The calibrated twist with memory and smoothing.

    memory: time constant of the running average in units of log-SNR; b = exp(-step / memory), 0.8 a step at 40 steps;
    0 switches it off. blend: the share of the average, beside the gradient of the step; 1 is the average alone. smoothing: views of the clean estimate (flips, shifts of a pixel) averaged, each one pass of the
    encoder; 1 is the image as it is. Vectors have one view. redraws: estimates with noise drawn anew that are averaged
    besides, each one more forward of the denoiser, without a graph, and a pass of the encoder. law: of a(x_0) given its
    mean, natural or gaussian; a unit without natural activations has the Gaussian one. finite: shifts for steps of finite length
    (`tiltlens.guidance.guidance.finite_step`), at eta = 1; False for Tweedie's, those of short ones, as at any other eta.
    """

    needs_pilot = True

    def __init__(
        self,
        memory: float = 2.0,
        smoothing: int = 2,
        redraws: int = 0,
        law: str = "natural",
        finite: bool = True,
        profile: Any = None,
        blend: float = 0.5,
    ):
        super().__init__(profile)
        if not (math.isfinite(memory) and memory >= 0):
            raise ValueError(f"Calibrated: memory is a time in log-SNR, a number >= 0; found {memory}")
        if not 0 <= blend <= 1:
            raise ValueError(f"{type(self).__name__}: blend is a share, a number in [0, 1]; found {blend}")
        if not 1 <= smoothing <= len(VIEWS):
            raise ValueError(f"Calibrated: smoothing must lie in 1..{len(VIEWS)}, found {smoothing}")
        if redraws < 0:
            raise ValueError(f"Calibrated: redraws must be a whole number >= 0, found {redraws}")
        if law not in LAWS:
            raise ValueError(f"{type(self).__name__}: law must be one of {', '.join(LAWS)}, found {law!r}")
        self.memory, self.smoothing, self.redraws = memory, smoothing, redraws
        self.law, self.finite, self.blend = law, finite, blend
        self._tables: PilotTables | None = None
        self._known: list[Tensor] = []
        self._natural: NaturalLaws | None = None

    def prepare(self, pilot: PilotTables | None, prior: Any, constraint: Any) -> None:
        super().prepare(pilot, prior, constraint)
        self._tables = pilot
        self._known = constraint.natural_arguments() if self.law == "natural" else []
        told = self._known and all(len(a) for a in self._known)
        self._natural = NaturalLaws.of(self._known, pilot.residual_variance) if told else None

    def start(self, x_t: Tensor) -> Memory:
        return Memory(torch.zeros_like(x_t), torch.zeros(len(x_t), dtype=x_t.dtype, device=x_t.device))

    def _row(self, table: Tensor, step: Step, rows: RowConstraint) -> Tensor:
        return table[rows.which.cpu(), step.number].to(rows.strength)

    def reads(self, step: Step, rows: RowConstraint) -> Tensor:
        return super().reads(step, rows) & (self._row(self._tables.slope, step, rows) != 0)

    def cotangent(self, clean: Tensor, step: Step, rows: RowConstraint, memory: Memory):
        slope = self._row(self._tables.slope, step, rows)
        intercept = self._row(self._tables.intercept, step, rows)
        variance = self._row(self._tables.residual_variance, step, rows)
        images = rows.decode(clean)
        views = views_of(images, self.smoothing, step.number)
        u = rows.argument(rows.read(views, step.log_snr)).reshape(-1, len(clean)).mean(0)
        mean = (intercept + slope * u.detach()).requires_grad_()
        log_psi = self.log_psi(mean, variance, step, rows)
        (force,) = torch.autograd.grad(log_psi.sum(), mean)
        fed, present = self._forces(force)
        (now,) = torch.autograd.grad((fed * u).sum(), clean)
        if self.redraws:
            now = (now + self.redraws * self._redrawn(fed, step, rows)) / (1 + self.redraws)
        h, weight = self._remember(now, slope, step, memory)
        steers = self.blend * h / per_row(weight.clamp_min(1e-12), h) + (1 - self.blend) * now

        def after(g: Tensor, pulled: Tensor) -> tuple[Tensor, Tensor]:
            part = finite_step(pulled, g, step) if self.finite else torch.ones_like(slope)
            return per_row(slope * part.to(slope), g) * g, log_psi

        return per_row(present, h) * steers, Memory(h, weight), after

    def log_psi(
        self, mean: Tensor, variance: Tensor, step: Step, rows: RowConstraint, own: Tensor | None = None
    ) -> Tensor:
        """log E[exp(-s E(a))] (B,) for an argument a of this mean (B,), at this step; differentiable in the mean, and in the
        variance (B,) of rows `own` (B,) bool, whose it is and not the step's."""
        if self._natural is None:
            return rows.log_tilt(mean, variance)
        return self._natural.log_tilt(rows, step.number, mean, variance, own).to(mean)

    def _forces(self, force: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each: what a gradient is multiplied with before it is remembered, and after."""
        ones = torch.ones_like(force)
        return (force, ones) if self._natural is None else (ones, force)

    def _redrawn(self, fed: Tensor, step: Step, rows: RowConstraint) -> Tensor:
        """d(fed u) / d x0_hat (B, *shape), averaged over redrawn estimates."""
        around = step.redraw(self.redraws, KAPPA).requires_grad_()
        u = rows.argument(rows.read(rows.decode(around), step.log_snr))
        (h,) = torch.autograd.grad((fed.repeat(self.redraws) * u).sum(), around)
        return h.unflatten(0, (self.redraws, -1)).mean(0)

    def _remember(self, h: Tensor, slope: Tensor, step: Step, memory: Memory) -> tuple[Tensor, Tensor]:
        """The average begins, for each row, with the first step whose slope is not about zero."""
        b = math.exp(-self._gap(step.number) / self.memory) if self.memory > 0 else 0.0
        reads = slope != 0
        weight = torch.where(reads, b * memory.weight + (1 - b), memory.weight)
        mask = reads.reshape(-1, *[1] * (h.ndim - 1))
        return torch.where(mask, b * memory.h + (1 - b) * h, memory.h), weight

    def _gap(self, number: int) -> float:
        """log-SNR gained since the step before."""
        levels = self._tables.log_snr
        return (
            float(levels[number] - levels[number - 1])
            if number
            else float(levels[1] - levels[0])
            if len(levels) > 1
            else 1.0
        )


def views_of(images: Tensor, count: int, number: int) -> Tensor:
    """(count B, ...): `count` views of every image, taken in turn from step to step, so that memory averages over all."""
    if images.ndim != 4 or count == 1:
        return images
    unit = max(images.shape[-1] // 32, 1)
    out = []
    for k in range(count):
        dy, dx, flip = VIEWS[(number * count + k) % len(VIEWS)]
        view = _shifted(images, dy * unit, dx * unit)
        out.append(view.flip(-1) if flip else view)
    return torch.cat(out)


def _shifted(images: Tensor, dy: int, dx: int) -> Tensor:
    """Shift by whole pixels, the border repeated."""
    if dy == dx == 0:
        return images
    m = max(abs(dy), abs(dx))
    padded = torch.nn.functional.pad(images, (m, m, m, m), mode="replicate")
    h, w = images.shape[-2:]
    return padded[..., m + dy : m + dy + h, m + dx : m + dx + w]
