"""The burn-in of a walk in noise space: how far to step at which strength, learned once and frozen.

A few replicas with noise of their own are annealed from the prior upwards. At each strength the step size beta follows
the acceptance towards its target (Robbins and Monro, 1951), and the spread of the energy gives the thermodynamic
length (Crooks, Measuring thermodynamic length, 2007)

    L(s) = integral_0^s sqrt(Var_{q_r}(E)) dr,

in which the ladder of a run is even: so the work -(s_{k+1} - s_k) E varies alike at every level. The strengths at which
they stop follow from the unit alone, never from what else is asked for; a higher strength only carries the climb on.
"""

import math

import numpy as np
import torch

from tiltlens.sampling.noise_walk import NoiseMap

LENGTH = 0.3  # of a step of the burn-in, in standard deviations of E
GROWTH = 1.15  # and at least so far: where E varies without end, strengths grow in proportion
MOVES = 3  # at each strength
TARGET = 0.3  # acceptance
GAIN = 0.7  # of log beta a move
SMALLEST = 1e-3  # beta


class BurnIn:
    """One unit's burn-in. walk: the map of its replicas, all of one unit. seeds: of the burn-in's own domain.

    beta(s) and ladder(s, levels) climb as far as they need. strengths, betas, deviations (of E), lengths: what was
    learned at each stop, frozen from there on.
    """

    def __init__(self, walk: NoiseMap, seeds, device: torch.device | str, dtype: torch.dtype):
        self.walk, self.passes = walk, 1
        self._noise = walk.noise(seeds, device, dtype, domain="burn-in")
        self._point = walk(self._noise.start())
        self.strengths, self.betas, self.lengths = [0.0], [1.0], [0.0]
        self.deviations = [self._deviation()]

    def beta(self, strength: np.ndarray) -> np.ndarray:
        """Step sizes at these strengths, log-linear between those of the burn-in."""
        self._climb(float(np.max(strength)))
        return np.exp(np.interp(strength, self.strengths, np.log(self.betas)))

    def ladder(self, strength: float, levels: int) -> np.ndarray:
        """(levels + 1,) strengths from 0 to this one, even in thermodynamic length; even in s where E does not vary."""
        self._climb(strength)
        length = np.interp(strength, self.strengths, self.lengths)
        if not length > 0:
            return np.linspace(0, strength, levels + 1)
        even = np.interp(np.linspace(0, length, levels + 1), self.lengths, self.strengths)
        even[0], even[-1] = 0.0, strength
        return even

    def _climb(self, strength: float) -> None:
        while self.strengths[-1] < strength:
            self._rise()

    def _rise(self) -> None:
        low, spread, beta = self.strengths[-1], self.deviations[-1], self.betas[-1]
        high = max(low + LENGTH / max(spread, 1e-9), low * GROWTH)
        at = lambda x: torch.full_like(self._point.energy, x)  # noqa: E731
        for _ in range(MOVES):
            self._point, move = self.walk.move(self._point, at(high), at(beta), self._noise)
            self.passes += 1
            sound = ~self._point.energy.isnan()
            rate = float(move.probability[sound].mean()) if bool(sound.any()) else 0.0
            beta = min(max(beta * math.exp(GAIN * (rate - TARGET)), SMALLEST), 1.0)
        self.deviations.append(self._deviation())
        self.strengths.append(high)
        self.betas.append(beta)
        self.lengths.append(self.lengths[-1] + (high - low) * (spread + self.deviations[-1]) / 2)

    def _deviation(self) -> float:
        energy = self._point.energy[~self._point.energy.isnan()]
        return float(energy.std()) if len(energy) > 1 else 0.0
