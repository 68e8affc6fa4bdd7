"""Autoguidance as a teacher: one network learns to denoise as two of them extrapolate.

Where a denoiser errs, a weaker version of it errs in the same direction and further, so that what leads from the weak one
to the strong one leads on (Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024):

    F(x_t) = F_strong + weight (F_strong - F_weak)

Samples of F are nearer to natural images than those of either, at two forwards a step. A student that is taught F at noised
natural images costs one (Meng et al., On Distillation of Guided Diffusion Models, 2023). F is no E[x_0 | x_t] of natural
images, so that the student's denoising error is above that of the strong one: what it is good for are its samples, and p is the law
of these.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.errors import UserError
from tiltlens.priors import load_prior
from tiltlens.priors.diffusers_prior import DiffusersPrior


@dataclass(frozen=True)
class Autoguidance:
    """weak: a prior of the same prediction and schedule, an earlier checkpoint of the strong one, say; as `load_prior` takes it.
    strong: another than `model.init_from`, which the student begins with. weight: of the step beyond the strong one, above 0."""

    weak: str
    weight: float = 2.0
    strong: str | None = None


class Teacher:
    """(in_t x_t (B, C, H, W), time (B,)) -> F (B, C, H, W), without a graph.

    No part of the module that it teaches: not trained, not averaged, in no checkpoint. Raises UserError for a weight that is not above 0, and for
    priors whose networks predict something else than that of init_from, or on another schedule, or are of other states.
    """

    def __init__(self, asked: Autoguidance, init_from: str | None, prompt: str = ""):
        if not asked.weight > 0 or asked.weight == float("inf"):
            raise UserError(f"model.autoguidance.weight = {asked.weight}: expected a finite number above 0")
        strong = asked.strong or init_from
        if strong is None or init_from is None:
            raise UserError(
                "model.autoguidance: expected a trained prior as model.init_from, found none: a student begins with the strong one"
            )
        self.weight = asked.weight
        begun, self.strong, self.weak = (
            load_prior(n, prompt=prompt) for n in (init_from, strong, asked.weak)
        )
        for name, found in (("strong", self.strong), ("weak", self.weak)):
            if differing := _differing(begun, found):
                raise UserError(
                    f"model.autoguidance.{name} = {found.name}: expected a network of the same kind as that of model.init_from "
                    f"{init_from}, found another {differing}"
                )

    def identity(self) -> dict[str, str | float]:
        return {"strong": self.strong.fingerprint, "weak": self.weak.fingerprint, "weight": self.weight}

    @torch.no_grad()
    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        strong, weak = (p.to(x.device).denoiser.network(x, time).float() for p in (self.strong, self.weak))
        return strong + self.weight * (strong - weak)


def _differing(expected: DiffusersPrior, found: DiffusersPrior) -> str:
    """What differs between two priors, of all that must not, in words; '' where nothing does."""
    a, b = expected.denoiser, found.denoiser
    if (expected.family, expected.prediction_type) != (found.family, found.prediction_type):
        kinds = (f"{p.prediction_type} ({p.family})" for p in (expected, found))
        return f"prediction: {' against '.join(kinds)}"
    if a.shape != b.shape:
        return f"state: {tuple(a.shape)} against {tuple(b.shape)}"
    tables = [(d.schedule.log_snr, d.skip, d.out, d.scale_in) for d in (a, b)]
    if len(a.schedule) != len(b.schedule) or not all(torch.allclose(x, y) for x, y in zip(*tables)):
        return "schedule of noise levels"
    return ""
