"""Learned guidance: the calibrated twist, its multipliers, memory and a head on the denoiser's features learned on the pilot.

Nothing is tuned by hand: some of the pilot's trajectories are run again and the shifts that several candidates would
make are held against the noise of each step (`tiltlens.guidance.learning`), without being applied; a linear head on the
denoiser's features corrects what the clean estimate misreads (`tiltlens.guidance.heads`). All of it is frozen before
the run and shared by all strengths and energies; any shift that is fixed before a step's noise is keeps the weights exact.

Multipliers are those of the least gap to second order in the strength, scale included: the shift of the mean activation is
efficiency x s Var a, the tilt's own s Var a only where the efficiency is 1. So `Learned` moves less than `Calibrated` at
one strength where that one over-tilts: compare them at equal nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.guidance.calibrated import VIEWS, Calibrated, Memory, views_of
from tiltlens.guidance.channel import NaturalLaws
from tiltlens.guidance.guidance import (
    Guidance,
    PilotTables,
    Step,
    clean_and_features,
    clean_estimate,
    finite_step,
    per_row,
    redrawn,
)
from tiltlens.guidance.heads import WIDEST
from tiltlens.guidance.learning import BLOCKS, Found, Multipliers, hats
from tiltlens.writing import whole_file

LEAST_PILOT = 32
TIMES = (0.0, 2.0, 6.0)  # time constants, in log-SNR, of the memories that may be blended
KINDS = ("default", "multipliers", "head")


@dataclass(frozen=True)
class Lesson:
    """What the pilot taught of one unit; tensors alone, float64. wide (steps, F), wide_offset (steps,): the second head, of the
    residual's variance, zero where there is none. theta (knots, C), knots (knots,), kappa (blocks,), found
    (kinds, 4): see `tiltlens.guidance.learning`, NaN where there is no head; kind (): which was taken. weight (steps, F), offset, gain
    (steps,): of the head, zero where it is not used. trajectories (2,): of the pilot, and those among them that were run again."""

    theta: Tensor
    knots: Tensor
    kappa: Tensor
    found: Tensor
    kind: Tensor
    weight: Tensor
    offset: Tensor
    gain: Tensor
    trajectories: Tensor
    wide: Tensor
    wide_offset: Tensor

    @classmethod
    def of(
        cls, m: Multipliers, weight: Tensor, offset: Tensor, gain: Tensor, pilot: int, shadows: int, wide: Tensor,
        wide_offset: Tensor,
    ) -> "Lesson":  # fmt: skip
        used = 1.0 if m.kind == "head" else 0.0
        nothing = Found(*[float("nan")] * 4)
        found = torch.tensor([m.found.get(k, nothing) for k in KINDS], dtype=torch.float64)
        kind, count = torch.tensor(KINDS.index(m.kind)), torch.tensor([pilot, shadows])
        return cls(
            m.theta, m.knots, m.kappa, found, kind, used * weight, used * offset, used * gain, count, wide, wide_offset
        )  # fmt: skip

    @classmethod
    def default(cls, steps: int, columns: int) -> "Lesson":
        """That of Calibrated."""
        zero = torch.zeros(steps, dtype=torch.float64)
        theta = torch.zeros(1, columns, dtype=torch.float64)
        theta[:, 0] = 1.0
        found = torch.full((len(KINDS), 4), float("nan"), dtype=torch.float64)
        nothing = torch.zeros(len(BLOCKS), dtype=torch.float64), found, torch.tensor(0)
        none = torch.zeros(steps, 0).double()
        return cls(theta, zero[:1], *nothing, none, zero, zero, torch.tensor([0, 0]), none, zero)

    def save(self, path: Path) -> None:
        with whole_file(path) as part:  # two runs may share a folder of pilots
            save_file({f.name: getattr(self, f.name).contiguous() for f in fields(self)}, part)

    @classmethod
    def load(cls, path: Path) -> "Lesson":
        return cls(**load_file(path))

    def plain(self) -> dict:
        """For the manifest. Efficiency and gap are those of linear response, each (value, standard error); the gap as a
        share of the tilt's own s^2 Var a / 2."""
        kind, found = KINDS[int(self.kind)], dict(zip(KINDS, self.found.tolist()))
        out = {"learned": kind, "pilot": int(self.trajectories[0]), "shadows": int(self.trajectories[1])}
        for when, name in (("before", "default"), ("after", kind)):
            numbers = found[name] if int(self.trajectories[1]) else [None] * 4
            out |= {f"efficiency_{when}": numbers[:2], f"gap_{when}": numbers[2:]}
        out["kappa"] = dict(zip(BLOCKS, self.kappa.tolist()))
        return out | {
            "theta": self.theta.tolist(), "knots": self.knots.tolist(),
            "headed_steps": int((self.gain > 0).sum()), "spread_steps": int((self.wide != 0).any(1).sum()), "head_gain": float(self.gain.max()) if len(self.gain) else 0.0,
        }  # fmt: skip


class Learned(Calibrated):
    """`Calibrated`, learned on the pilot. memory, smoothing, redraws: of the default that learning starts from, and keeps
    where the pilot cannot tell better; of a list of smoothings the first is the default's, and each of the others one more
    candidate (and one more backward pass of the encoder a step). shadows: pilot trajectories that are run again; more than there are means all.
    head: learn the head on the denoiser's features too. spread: and one for the variance of what is left over; the shift has its
    gradient, and target and threshold energies its value. law, finite: as of Calibrated; the natural law by default, and Tweedie's
    shifts, for multipliers are fitted to the steps as they are. Needs a pilot of at least 32 trajectories and noise (eta > 0).

    Candidates: the default, then the same gradient with the time constants 0 (the step alone), 2 and 6 of memory, with
    redraws the gradient without them, and that of every other smoothing.
    """

    learns = True

    def __init__(
        self, memory: float = 2.0, smoothing: int | list[int] = 2, redraws: int = 0, shadows: int = 128, head: bool = True,
        spread: bool = False, law: str = "natural", finite: bool = False, profile: Any = None,
    ):  # fmt: skip
        views = list(smoothing) if isinstance(smoothing, (list, tuple)) else [smoothing]
        if not views or len(set(views)) < len(views) or not all(1 <= k <= len(VIEWS) for k in views):
            raise ValueError(f"Learned: expected different smoothings in 1..{len(VIEWS)}, found {smoothing}")
        # averages alone: how they are blended with the step's own gradient is learned
        super().__init__(memory, views[0], redraws, law, finite, profile, blend=1.0)
        self.smoothing, self._views = smoothing, views
        if shadows < LEAST_PILOT:
            raise ValueError(f"Learned: shadows must be at least {LEAST_PILOT}, found {shadows}")
        self.shadows, self.head, self.spread = shadows, head, spread
        self._lessons: list[Lesson] = []

    @property
    def reads_features(self) -> bool:
        return self.head or self.spread

    @property
    def candidates(self) -> list[tuple[int, float]]:
        """(which of `sources`, time constant) of each column but the head's; the default first."""
        others = range(1, 1 + self.own + len(self._views) - 1)
        return [
            (0, self.memory), *((0, t) for t in TIMES if t != self.memory), *((k, self.memory) for k in others)
        ]  # fmt: skip

    @property
    def own(self) -> int:
        """Which of `sources` is the gradient of the default's estimate alone, without redraws."""
        return int(self.redraws > 0)

    def check(self, pilot: int, eta: float) -> None:
        super().check(pilot, eta)
        if pilot < LEAST_PILOT:
            raise ValueError(
                f"Learned guidance needs a pilot of at least {LEAST_PILOT} trajectories to learn from, found {pilot}: set "
                f"model.pilot >= {LEAST_PILOT} (256 tell more), or take Calibrated"
            )
        if eta == 0:
            raise ValueError(
                "Learned guidance holds shifts against the noise of each step, and at eta = 0 there is none: expected eta > 0, "
                "found 0. Set model.eta above 0, or take Calibrated"
            )

    def prepare(self, pilot: PilotTables | None, prior: Any, constraint: Any) -> None:
        super().prepare(pilot, prior, constraint)
        units, steps = pilot.slope.shape
        self.adopt([Lesson.default(steps, len(self.candidates) + 1)] * units)

    def adopt(self, lessons: Sequence[Lesson]) -> None:
        """Freeze what was learned, unit by unit."""
        self._lessons, log_snr = list(lessons), self._tables.log_snr
        self._multipliers = torch.stack(
            [hats(log_snr, s.knots) @ s.theta for s in lessons]
        )  # (units, steps, C)
        width = max(w.shape[1] for s in lessons for w in (s.weight, s.wide))
        pad = lambda w: torch.nn.functional.pad(w, (0, width - w.shape[1]))  # noqa: E731
        self._weight, self._wide = (torch.stack([pad(w) for w in ws]) for ws in ([s.weight for s in lessons], [s.wide for s in lessons]))  # fmt: skip
        self._offset, self._wide_offset = (torch.stack(x) for x in ([s.offset for s in lessons], [s.wide_offset for s in lessons]))  # fmt: skip
        self._residual = self._tables.residual_variance * (1 - torch.stack([s.gain for s in lessons]))
        if self._natural is not None:
            self._natural = NaturalLaws.of(self._known, self._residual)

    def outcome(self) -> list[dict]:
        return [s.plain() for s in self._lessons]

    def start(self, x_t: Tensor) -> Memory:
        """h (B, candidates, *shape), weight (B, candidates)."""
        shape = len(x_t), len(self.candidates)
        return Memory(x_t.new_zeros(*shape, *x_t.shape[1:]), x_t.new_zeros(shape))

    def reads(self, step: Step, rows: RowConstraint) -> Tensor:
        seen = (self._row(self._tables.slope, step, rows) != 0) | self._headed(self._weight, step, rows)
        return Guidance.reads(self, step, rows) & seen

    def _headed(self, weight: Tensor, step: Step, rows: RowConstraint) -> Tensor:
        """(B,) bool: whether a row has a head of these weights (units, steps, F)."""
        return (weight[rows.which.cpu(), step.number] != 0).any(1).to(rows.strength.device)

    def twist(self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Memory):
        leaf = x_t.detach().clone().requires_grad_()
        own = self._headed(self._wide, step, rows)  # rows whose variance is not the step's
        headed, spread = bool(self._headed(self._weight, step, rows).any()), bool(own.any())
        slope, mean, variance = (
            self._row(table, step, rows)
            for table in (self._tables.slope, self._tables.intercept, self._residual)
        )
        if headed or spread:
            x0_hat, phi = clean_and_features(denoiser, leaf, step.t, step.clip)
            weight = self._row(self._weight, step, rows).to(phi)
            mean = mean + self._row(self._offset, step, rows) + (weight * phi.detach()).sum(1).to(mean)
            wide = self._row(self._wide, step, rows).to(phi)
            times = 1 + self._row(self._wide_offset, step, rows) + (wide * phi.detach()).sum(1).to(mean)
            inside = (times > 1 / WIDEST) & (times < WIDEST)
            wide = per_row(inside * variance, wide) * wide
            variance = variance * times.clamp(1 / WIDEST, WIDEST)
        else:
            x0_hat = clean_estimate(denoiser, leaf, step.t, step.clip)
        clean, step = self.leaf(denoiser, x_t, x0_hat, step)
        read = bool((slope != 0).any())  # where a head alone can tell, the encoder need not run
        u = self.read(clean, step, rows) if read else [torch.zeros_like(slope)]
        mean = (mean + slope * u[0].detach()).detach().requires_grad_()
        variance = variance.detach().requires_grad_(spread)
        log_psi = self.log_psi(mean, variance, step, rows, own if spread else None)
        force, *widening = torch.autograd.grad(log_psi.sum(), [mean, variance] if spread else [mean])
        fed, present = self._forces(force)
        shares = self._row(self._multipliers, step, rows)
        cotangent = torch.zeros_like(clean)
        if read:
            averages, memory = self.average(self.sources(clean, u, fed, step, rows), slope, step, memory)
            for k, h in enumerate(averages):
                cotangent = cotangent + per_row(present * slope * shares[:, k], h) * h
        pull = partial(torch.autograd.grad, inputs=leaf)
        clean_part, head_part = cotangent.to(x0_hat.dtype), None
        if headed or spread:
            head_part = per_row(force * shares[:, -1], weight) * weight
            for more in widening:
                head_part = head_part + per_row(more, wide) * wide
        if self.finite and read:
            (g,) = pull(x0_hat, grad_outputs=clean_part, retain_graph=headed or spread)
            g = per_row(finite_step(cotangent, g, step), g) * g
            g = g + pull(phi, grad_outputs=head_part)[0] if headed or spread else g
        elif headed or spread:
            (g,) = pull([x0_hat, phi], grad_outputs=[clean_part, head_part])
        else:
            (g,) = pull(x0_hat, grad_outputs=clean_part)
        return x0_hat, g, log_psi, memory

    def leaf(self, denoiser: Denoiser, x_t: Tensor, x0_hat: Tensor, step: Step) -> tuple[Tensor, Step]:
        """x0_hat as a leaf, and the step with its redraws."""
        found = x0_hat.detach()
        redraw = lambda k, kappa: redrawn(denoiser, x_t.detach(), found, step, k, kappa)  # noqa: E731
        return found.clone().requires_grad_(), replace(step, redraw=redraw)

    def read(self, clean: Tensor, step: Step, rows: RowConstraint) -> list[Tensor]:
        """u (B,) of every smoothing, the mean over so many views; the default's first."""
        views = views_of(rows.decode(clean), max(self._views), step.number)
        u = rows.argument(rows.read(views, step.log_snr)).reshape(-1, len(clean))
        return [u[:k].mean(0) for k in self._views]

    def sources(
        self, clean: Tensor, u: list[Tensor], fed: Tensor, step: Step, rows: RowConstraint
    ) -> list[Tensor]:
        """The gradients d(fed u)/d x0_hat that memories are fed with, (B, *shape) each: with redraws averaged over them,
        then that of the estimate alone, which without redraws is the first; then that of every other smoothing."""
        own, *others = (
            torch.autograd.grad((fed * x).sum(), clean, retain_graph=k < len(u) - 1)[0]
            for k, x in enumerate(u)
        )
        if not self.redraws:
            return [own, *others]
        return [(own + self.redraws * self._redrawn(fed, step, rows)) / (1 + self.redraws), own, *others]

    def average(
        self, sources: list[Tensor], slope: Tensor, step: Step, memory: Memory
    ) -> tuple[list[Tensor], Memory]:
        """The running average of each candidate (B, *shape), and the memory; it begins with the first slope that is not
        about zero."""
        averages, kept = [], []
        for k, (source, time) in enumerate(self.candidates):
            b = self._keep(step.number, time)
            old, h = memory.h[:, k], sources[source]
            weight = torch.where(slope != 0, b * memory.weight[:, k] + (1 - b), memory.weight[:, k])
            h = torch.where(per_row(slope, h) != 0, b * old + (1 - b) * h, old)
            averages.append(h / per_row(weight.clamp_min(1e-12), h))
            kept.append((h, weight))
        h, weight = (torch.stack(x, 1) for x in zip(*kept))
        return averages, Memory(h, weight)

    def _keep(self, number: int, time: float) -> float:
        return math.exp(-self._gap(number) / time) if time > 0 else 0.0
