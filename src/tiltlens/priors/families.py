"""Three families of diffusion, read from a scheduler's numbers and not from its class.

- variance-preserving: a table alphas_cumprod, as the scheduler computes it from its betas; time is the index;
  the network predicts epsilon, x_0 ("sample") or v.
- edm (Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022): alpha = 1, a
  table of sigma from sigma_min to sigma_max, preconditioning by sigma_data, time = 0.25 log sigma.
- flow (Lipman et al., Flow Matching for Generative Modeling, 2023): alpha = 1 - sigma, sigma from 1/T to 1
  with the scheduler's static shift, time = T sigma (T = 1000 as a rule). A dynamic shift moves only the
  points of the table, which is then taken unshifted.

How a scheduler would step (its solver, spacing, clip_sample, thresholding, set_alpha_to_one) is not the law
it was trained for, and is ignored; clipping is an option of the chain. Where log-SNR ends at minus infinity
(alpha = 0), that end is kept for predictions that define x0_hat there (v, sample, flow); for epsilon it is
dropped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlens.denoiser import parametrisation
from tiltlens.errors import UserError
from tiltlens.schedule import Schedule


@dataclass(frozen=True)
class Family:
    """name: variance-preserving, edm or flow. prediction: what the network predicts, in diffusers' words.

    tables: skip, out, scale_in of `NetworkDenoiser`, each (T,) float64.
    """

    name: str
    prediction: str
    schedule: Schedule
    tables: dict[str, Tensor]


def read_family(scheduler: object) -> Family:
    """A scheduler of diffusers -> its family. Raises UserError where it belongs to none of the three."""
    config = scheduler.config
    if hasattr(scheduler, "alphas_cumprod"):
        return _variance_preserving(scheduler)
    if config.get("sigma_data") is not None and hasattr(scheduler, "precondition_noise"):
        return _edm(scheduler)
    if config.get("shift") is not None and hasattr(scheduler, "sigmas"):
        return _flow(scheduler)
    raise UserError(
        f"prior scheduler {type(scheduler).__name__}: expected a table of betas (DDPM, DDIM, ...), EDM "
        "preconditioning (sigma_data, EDMEulerScheduler) or flow matching (shift, "
        "FlowMatchEulerDiscreteScheduler); found the keys "
        f"{', '.join(k for k in config if not k.startswith('_'))}"
    )


def _variance_preserving(scheduler: object) -> Family:
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "sample", "v_prediction"):
        raise UserError(
            f"prior scheduler {type(scheduler).__name__}: expected prediction_type epsilon, sample or "
            f"v_prediction beside betas, found {prediction!r}"
        )
    if scheduler.config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"prior scheduler {type(scheduler).__name__}: expected the index as time, found timestep_type = "
            f"{scheduler.config.timestep_type!r}"
        )
    bar = scheduler.alphas_cumprod.double()
    if prediction == "epsilon":
        schedule = Schedule.variance_preserving(bar)
    else:
        schedule = Schedule(bar.sqrt(), (1 - bar).sqrt(), torch.arange(len(bar)))
    return Family("variance-preserving", prediction, schedule, parametrisation(prediction, schedule))


def _edm(scheduler: object) -> Family:
    config = scheduler.config
    kinds = {"epsilon": "edm", "v_prediction": "edm_v"}
    if config.prediction_type not in kinds:
        raise UserError(
            "prior scheduler (EDM): expected prediction_type epsilon or v_prediction, found "
            f"{config.prediction_type!r}"
        )
    sigma = scheduler.sigmas[: len(scheduler.timesteps)].flip(0)  # without the last value, the clean end
    time = scheduler.timesteps.flip(0)
    schedule = Schedule(torch.ones_like(sigma), sigma, time, init_std=float(scheduler.init_noise_sigma))
    return Family(
        "edm",
        config.prediction_type,
        schedule,
        parametrisation(kinds[config.prediction_type], schedule, config.sigma_data),
    )


def _flow(scheduler: object) -> Family:
    if scheduler.config.get("invert_sigmas"):
        raise UserError("prior scheduler (flow): expected sigma = 1 to be noise, found invert_sigmas = true")
    time = scheduler.timesteps.double().flip(0)
    sigma = scheduler.sigmas[: len(time)].double().flip(0)
    schedule = Schedule(1 - sigma, sigma, time)
    return Family("flow", "flow", schedule, parametrisation("flow", schedule))
