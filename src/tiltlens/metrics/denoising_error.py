"""How well a prior takes noise out of held-out images, by noise level: the loss it is trained on, laid open.

x_t = alpha_t x_0 + sigma_t eps; the error is |x0_hat(x_t) - x_0|^2, the mean over the numbers of a state in [-1, 1].
"""

import torch
from torch import Tensor

from tiltlens.priors.diffusers_prior import DiffusersPrior

BATCH = 64


@torch.no_grad()
def denoised(prior: DiffusersPrior, x_0: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x0_hat (N, C, H, W), log-SNR (N,)) of states x_0 (N, C, H, W) at times that cover the training table evenly."""
    d = prior.denoiser
    generator = torch.Generator().manual_seed(seed)
    n, length = len(x_0), len(d.schedule)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) * length / n).long().clamp(max=length - 1)
    eps = torch.randn(x_0.shape, generator=generator)
    found = []
    for rows in torch.arange(n).split(BATCH):
        alpha, sigma, skip, out, scale = (
            table[t[rows]].float().view(-1, 1, 1, 1).to(x_0)
            for table in (d.schedule.alpha, d.schedule.sigma, d.skip, d.out, d.scale_in)
        )
        x_t = alpha * x_0[rows] + sigma * eps[rows].to(x_0)
        f = d.network(scale * x_t, d.schedule.time[t[rows]].float().to(x_0.device))
        found.append(skip * x_t + out * f.float())
    return torch.cat(found), d.schedule.log_snr[t].float()
