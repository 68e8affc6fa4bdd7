"""Teaches a reader its gradient: what guidance steers by, and as many numbers a sample as an image has.

By Stein's lemma, for x_0 | x_t about N(x0_hat, C), J = dx0_hat/dx_t = (alpha_t / sigma_t^2) C,

    grad_{x_t} E[a(x_0) | x_t] = J^T E[grad a(x_0) | x_t]

so that the reader r is to have the gradient g = grad a(x_0) at x0_hat on average, as far as J lets it through. The error of a sample is
|J (grad r(x0_hat) - g)|^2, most of it the spread of g around its mean, which no reader can know. (Sobolev training: Czarnecki et al., 2017.)
The mean of g is the best reader under any J; this one only weighs errors about as guidance pays for them, and is that of stationary
images of the same spectrum (Wiener's filter), so that a step costs no derivative of the denoiser.

Below some log-SNR a scene is still open, x_0 | x_t has several modes, and what its samples' gradients tell is how each is varied and not which it
will be: there values alone teach.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiltlens.modules.noise_aware_task import Decode, UnitTask

Read = Callable[[Tensor], Tensor]


class Spectrum:
    """Covariance of states (N, C, H, W), of all channels with each other, frequency by frequency; by batches that are added."""

    def __init__(self) -> None:
        self._count, self._sum, self._square = 0, 0.0, 0.0
        self._law: tuple[Tensor, Tensor] | None = None

    def add(self, x_0: Tensor) -> "Spectrum":
        f = torch.fft.rfft2(x_0.detach().cpu().double(), norm="ortho")
        self._count, self._law = self._count + len(f), None
        self._sum = self._sum + f.sum(0)
        self._square = self._square + torch.einsum("nchw,ndhw->hwcd", f, f.conj())
        return self

    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Variances (C, H, W/2+1) and what they are of (H, W/2+1, C, C), one for all of a training."""
        if self._law is None:
            with torch.inference_mode(False):  # it is differentiated through, in a validation alone too
                mean, square = self._sum.clone() / self._count, self._square.clone() / self._count
                values, vectors = torch.linalg.eigh(square - torch.einsum("chw,dhw->hwcd", mean, mean.conj()))
                self._law = values.clamp_min(0).float().permute(2, 0, 1), vectors.to(torch.complex64)
        return self._law

    def jacobian(self, h: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """J h (B, C, H, W), J = alpha C / (alpha^2 C + sigma^2), alpha and sigma (B,); differentiable in h. In float32."""
        values, vectors = (x.to(h.device) for x in self._eigen())
        alpha, sigma = (v.to(values)[:, None, None, None] for v in (alpha, sigma))
        f = torch.einsum("hwdc,bdhw->bchw", vectors.conj(), torch.fft.rfft2(h.float(), norm="ortho"))
        f = torch.einsum("hwcd,bdhw->bchw", vectors, f * (alpha * values / (alpha**2 * values + sigma**2)))
        return torch.fft.irfft2(f, s=h.shape[-2:], norm="ortho").to(h)


def gradient_error(
    x0_hat: Tensor, x_0: Tensor, encoder: Read, reader: Read, jacobian: Read
) -> tuple[Tensor, Tensor]:
    """|J (grad r(x0_hat) - g)|^2 (B,), differentiable in the reader's weights, and |J g|^2 (B,), without a graph.

    encoder, reader: states (B, *shape) -> one number (B,) a row, differentiable; the reader twice. jacobian: h -> J h.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        clean, sample = x0_hat.detach().requires_grad_(), x_0.detach().requires_grad_()
        (g,) = torch.autograd.grad(encoder(sample).sum(), sample)
        (r,) = torch.autograd.grad(reader(clean).sum(), clean, create_graph=True)
        error, size = jacobian(r - g), jacobian(g)
        return error.square().flatten(1).sum(1), size.square().flatten(1).sum(1).detach()


def reader_errors(
    task: UnitTask, decode: Decode, x0_hat: Tensor, x_0: Tensor, log_snr: Tensor, jacobian: Read,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gradient_error` of a reader, of one of its units a row, drawn at random. x0_hat, x_0 (B, *shape), log_snr (B,).

    In single precision whatever the training's, and outside of validation's inference mode: both networks are differentiated.
    """
    unit = torch.randint(len(task.members), (len(x_0), 1), generator=generator).to(x_0.device)
    with torch.inference_mode(False), torch.autocast(x_0.device.type, enabled=False):
        x0_hat, x_0, unit, log_snr = (x.clone() for x in (x0_hat, x_0, unit, log_snr))

        def encoder(x: Tensor) -> Tensor:
            return task.plainly(decode(x)).gather(1, unit)[:, 0]

        def reader(x: Tensor) -> Tensor:
            return task.reader(decode(x), log_snr).gather(1, unit)[:, 0]

        return gradient_error(x0_hat, x_0, encoder, reader, jacobian)
