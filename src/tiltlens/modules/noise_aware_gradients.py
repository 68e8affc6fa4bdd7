"""Teaches a reader its gradient: what guidance steers by, and as many numbers a sample as an image has.

By Stein's lemma, for x_0 | x_t about N(x0_hat, C), J = dx0_hat/dx_t = (alpha_t / sigma_t^2) C,

    grad_{x_t} E[a(x_0) | x_t] = J^T E[grad a(x_0) | x_t]

so that the reader r is to have the gradient g = grad a(x_0) at x0_hat on average, as far as J lets it through. The error of a sample is
|J^T (grad r(x0_hat) - g)|^2, most of it the spread of g around its mean, which no reader can know. (Sobolev training: Czarnecki et al., 2017.)
A denoiser's J is a covariance, and symmetric: J is taken for J^T where the error is differentiated.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltlens.denoiser import Denoiser
from tiltlens.modules.noise_aware_task import UnitTask
from tiltlens.priors.prior import Prior

Read = Callable[[Tensor], Tensor]


def gradient_error(
    denoiser: Denoiser, t: int, x_t: Tensor, x_0: Tensor, encoder: Read, reader: Read
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one noise level: a surrogate (B,) whose derivative in the reader's weights is the error's; the error, and |J^T g|^2,
    both without a graph.

    encoder, reader: states (B, *shape) -> one number (B,) a row, differentiable; the reader twice.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        leaf, sample = x_t.detach().requires_grad_(), x_0.detach().requires_grad_()
        (g,) = torch.autograd.grad(encoder(sample).sum(), sample)
        x0_hat = denoiser(leaf, t)
        clean = x0_hat.detach().to(x_t).requires_grad_()
        (r,) = torch.autograd.grad(reader(clean).sum(), clean, create_graph=True)

        def pull(v: Tensor) -> Tensor:
            return torch.autograd.grad(x0_hat, leaf, v.to(x0_hat.dtype), retain_graph=True)[0]

        off = pull((r - g).detach())
        surrogate = (2 * r * pull(off)).flatten(1).sum(1)
        return surrogate, off.square().flatten(1).sum(1), pull(g).square().flatten(1).sum(1)


def reader_errors(
    prior: Prior, task: UnitTask, x_0: Tensor, levels: Sequence[tuple[int, float]], generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gradient_error` of a reader, of one of its units a row, drawn at random; and log-SNR (B,). levels: steps of the table and
    their log-SNR, each for an equal part of the rows.

    In single precision whatever the training's, and outside of validation's inference mode: both networks are differentiated.
    """
    schedule, units, found = prior.denoiser.schedule, len(task.members), []
    for (t, log_snr), part in zip(levels, x_0.tensor_split(len(levels))):
        noise = torch.randn(part.shape, generator=generator).to(part)
        x_t = float(schedule.alpha[t]) * part + float(schedule.sigma[t]) * noise
        unit = torch.randint(units, (len(part), 1), generator=generator).to(part.device)
        level = torch.full((len(part),), log_snr, device=part.device)
        with torch.inference_mode(False), torch.autocast(part.device.type, enabled=False):
            x_t, part, unit, level = (x.clone() for x in (x_t, part, unit, level))

            def encoder(x: Tensor, unit: Tensor = unit) -> Tensor:
                return task.plainly(prior.decode(x)).gather(1, unit)[:, 0]

            def reader(x: Tensor, unit: Tensor = unit, level: Tensor = level) -> Tensor:
                return task.reader(prior.decode(x), level).gather(1, unit)[:, 0]

            found.append((*gradient_error(prior.denoiser, t, x_t, part, encoder, reader), level))
    return tuple(torch.cat(x) for x in zip(*found))
