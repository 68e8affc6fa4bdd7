"""The discrete sampling chain: the law p of every number that tiltlens reports, and its guided version q'.

A step t -> r draws x_r = mu(x0_hat + shift) + v z. In a chain of order 2 the base step takes, in place of x0_hat, what it and the
estimate of the step before, q -> t, point to in the middle of the step,

    x0_hat + (l_r - l_t) / (2 (l_t - l_q)) (x0_hat - x0_hat_q),    l: log-SNR

as the multistep solvers do (Lu et al., DPM-Solver++, 2022: eta = 0 is its 2M, eta = 1 its stochastic form). The path is a Markov chain no longer, but
each step is Gaussian given the path, so that weights are as exact as before. With delta the change of the mean that the shift makes,

    log dP/dQ = - sum_t [ delta.z / v + |delta|^2 / (2 v^2) ],   path KL = sum_t |delta|^2 / (2 v^2)

are summed from the deltas themselves, never as a difference of two log-densities. The last step (r = clean) is
deterministic and not guided. With eta = 0 no step has noise: sampling works, the weights are not defined.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.guidance.guidance import Guidance, Guided, Step, clean_estimate
from tiltlens.sampling.noise import Noise
from tiltlens.schedule import check_steps, step_coefficients

ORDERS = (1, 2)


@dataclass(frozen=True)
class State:
    """x (B, *shape); log_dpdq, path_kl (B,) float64; memory: what the guidance carries along; before: the clean estimate of the last
    step (B, *shape), where the chain looks back at it."""

    x: Tensor
    log_dpdq: Tensor
    path_kl: Tensor
    memory: Any = None
    before: Tensor | None = None


@dataclass(frozen=True)
class Info:
    """What one step tells. number, t, log_snr: where. x0_hat (B, *shape): the unguided clean estimate. guided: whether
    a shift was computed. path_kl: this step's |delta|^2/(2 v^2), (B,). guidance_norm: |shift of x0_hat|, (B,)."""

    number: int
    t: int
    log_snr: float
    x0_hat: Tensor
    guided: bool
    path_kl: Tensor
    guidance_norm: Tensor


class Chain:
    """indices: the steps, noisiest first. eta: 0 deterministic (DDIM) to 1 ancestral (DDPM). clip: clamp the clean
    estimate to [-1, 1] in base and guided law alike. order: 1, or 2 for the multistep chain, sharper at few steps for the same network
    calls; the first step and the last, to the clean end, are of order 1 in either. Raises ValueError for eta outside [0, 1], another order or bad indices."""

    def __init__(
        self, denoiser: Denoiser, indices: Sequence[int], eta: float = 1.0, clip: bool = False, order: int = 1
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta}: expected a number in [0, 1] (0 deterministic, 1 ancestral)")
        if order not in ORDERS:
            raise ValueError(f"order = {order}: expected 1 or 2")
        check_steps(denoiser.schedule, list(indices))
        self.indices, self.eta, self.clip, self.order = list(indices), float(eta), clip, order
        ends = [*self.indices[1:], None]
        self.coefficients = [
            step_coefficients(denoiser.schedule, t, r, eta) for t, r in zip(self.indices, ends)
        ]
        self.ahead = [0.0] * len(self.indices)
        if order == 2:
            gains = denoiser.schedule.log_snr[self.indices].diff().tolist()
            # a step to no noise at all is of order 1 wherever it stands
            self.ahead[1:-1] = [
                new / (2 * old) if new < math.inf else 0.0 for old, new in zip(gains, gains[1:])
            ]
        # an error of finite steps that one of the two takes out is not to be taken out twice
        weights = {t: c.x0 for t, c in zip(self.indices[:-1], self.coefficients)} if order == 1 else {}
        self.denoiser = denoiser.for_steps(weights)

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def log_snr(self) -> Tensor:
        """(steps,) at the start of each step."""
        return self.denoiser.schedule.log_snr[self.indices]

    def start(self, noise: Noise, guidance: Guidance | None = None) -> State:
        """x_T ~ N(0, (alpha^2 + sigma^2) I) at the level of the first step."""
        x = noise.draw("start") * self.denoiser.schedule.start_std(self.indices[0])
        zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        return State(x, zero, zero, guidance.start(x) if guidance else None)

    def step(
        self, state: State, number: int, noise: Noise,
        guidance: Guidance | None = None, rows: RowConstraint | None = None,
    ) -> tuple[State, Info]:  # fmt: skip
        """One step; guidance and rows come together or not at all."""
        return self.move(state, number, self.estimate(state, number, noise, guidance, rows), noise)

    def estimate(
        self, state: State, number: int, noise: Noise,
        guidance: Guidance | None = None, rows: RowConstraint | None = None,
    ) -> Guided:  # fmt: skip
        """The first half of a step, all of its network calls: the clean estimate at x_t, its shift and the twist there.
        The last step is not guided."""
        t = self.indices[number]
        if guidance is None or number == len(self) - 1:
            with torch.no_grad():
                return Guided(clean_estimate(self.denoiser, state.x, t, self.clip), None, state.memory)
        where = self.where(number, lambda k: noise.at("twist", number, k))
        return guidance(self.denoiser, state.x, where, rows, state.memory)

    def where(self, number: int, twist_noise: Callable[[int], Tensor]) -> Step:
        """Step `number`, but the last, as guidance sees it."""
        # what finite length takes from Tweedie's shift is known of ancestral steps alone
        gain = float(self.log_snr[number + 1] - self.log_snr[number]) if self.eta == 1 else 0.0
        return Step(number, self.indices[number], self.denoiser.schedule, self.clip, twist_noise, gain=gain)

    def move(self, state: State, number: int, guided: Guided, noise: Noise) -> tuple[State, Info]:
        """The second half: draw x_r. state and guided may be re-indexed in between, both alike."""
        t, c = self.indices[number], self.coefficients[number]
        base, before = guided.x0_hat, guided.x0_hat if self.order == 2 else None
        if self.ahead[number]:
            base = base + self.ahead[number] * (base - state.before)
        x = c.x0 * base + c.x * state.x
        zero = torch.zeros_like(state.path_kl)
        path_kl, norm, log_dpdq = zero, zero, state.log_dpdq
        z = noise.draw("step") if c.v > 0 else None
        if guided.shift is not None:
            delta = c.x0 * guided.shift
            x = x + delta
            norm = guided.shift.double().flatten(1).norm(dim=1)
            if z is not None:
                scaled = delta.double().flatten(1) / c.v
                path_kl = scaled.square().sum(1) / 2
                log_dpdq = log_dpdq - (scaled * z.double().flatten(1)).sum(1) - path_kl
        if z is not None:
            x = x + c.v * z
        info = Info(
            number,
            t,
            float(self.denoiser.schedule.log_snr[t]),
            guided.x0_hat,
            guided.shift is not None,
            path_kl,
            norm,
        )
        return State(x, log_dpdq, state.path_kl + path_kl, guided.memory, before), info

    def run(
        self, noise: Noise, guidance: Guidance | None = None, rows: RowConstraint | None = None
    ) -> Iterator[tuple[State, Info]]:
        """A generator of (state, info), a step each: progress and logging stay outside."""
        state = self.start(noise, guidance)
        for number in range(len(self)):
            state, info = self.step(state, number, noise, guidance, rows)
            yield state, info
