"""Unguided trajectories, and how the noise of a step would move the clean estimate at its start.

    moved = (c sigma_t^2 / (alpha_t v)) J z,    J = dx0_hat/dx_t at x_t,  z the noise that t -> r draws, x_r = mu + v z,  dmu/dx0_hat = c

For any function f of the clean estimate <grad f(x0_hat), moved> = delta.z/v, delta the shift of the mean that guidance by grad f would make
(Tweedie's, at unit strength of a linear energy): what its importance weight depends on. J z is a central difference, two forwards without a graph.
"""

import torch
from torch import Tensor

from tiltlens.guidance.guidance import clean_estimate
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise

NUDGE = 0.3  # of sigma_t, to either side: right to a cosine of 0.99 where the network runs in bfloat16


@torch.no_grad()
def responses(
    chain: Chain,
    seeds: range,
    domain: str,
    levels: tuple[float, float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Trajectories of these seeds of a noise domain, at their levels of log-SNR (lowest, highest), but the last, deterministic step.

    Returns x_0 (B, *shape); sample, t (R,): seed and step of the table of a row, seed by seed; x0_hat, moved (R, *shape). Raises ValueError for a
    chain without noise.
    """
    if not chain.eta > 0:
        raise ValueError("a chain with eta = 0 draws no noise to respond to: expected eta > 0")
    denoiser, low, high = chain.denoiser, *levels
    noise, ahead = (Noise(seeds, denoiser.shape, device, dtype, domain=domain) for _ in range(2))
    state, found = chain.start(noise), []
    for number, c in enumerate(chain.coefficients):
        t = chain.indices[number]
        guided = chain.estimate(state, number, noise)
        if number < len(chain) - 1:
            z = ahead.draw("step")
            if low <= float(denoiser.schedule.log_snr[t]) <= high:
                alpha, sigma = float(denoiser.schedule.alpha[t]), float(denoiser.schedule.sigma[t])
                up, down = (
                    clean_estimate(denoiser, state.x + k * NUDGE * sigma * z, t, chain.clip) for k in (1, -1)
                )
                moved = (c.x0 * sigma / (2 * NUDGE * alpha * c.v)) * (up - down)
                found.append((torch.full((len(z),), t), guided.x0_hat, moved))
        state, _ = chain.move(state, number, guided, noise)
    rows = {name: torch.stack(x, 1).flatten(0, 1) for name, x in zip(("t", "x0_hat", "moved"), zip(*found))}
    return {"x_0": state.x, "sample": torch.tensor(seeds).repeat_interleave(len(found)), **rows}
