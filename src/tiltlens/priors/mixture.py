"""The analytic prior: the oracle of everything.

p(x) = sum_k w_k N(x; m_k, v_k I) in R^d. Noised, x_t | k ~ N(alpha_t m_k, (alpha_t^2 v_k + sigma_t^2) I), and

    x_0 | x_t, k ~ N(mu_k, tau_k I),  mu_k = m_k + g_k (x_t - alpha_t m_k),  g_k = alpha_t v_k / (alpha_t^2 v_k + sigma_t^2),
    tau_k = v_k sigma_t^2 / (alpha_t^2 v_k + sigma_t^2),  P(k | x_t) by Bayes.

Along a direction w every component is a Gaussian of one dimension, so that the twist, log Z, the mean energy and the
KL of any energy with a Gaussian tilt are closed forms:

    log Z(s) = logsumexp_k [ log w_k + log_tilt(<w, m_k>, v_k |w|^2, s) ],  m(s) = -d log Z/ds,  KL = -s m(s) - log Z(s).
"""

import hashlib

import torch
from torch import Tensor

from tiltlens.denoiser import Denoiser
from tiltlens.energies import Energy, Linear
from tiltlens.priors.prior import Prior
from tiltlens.schedule import Schedule

Posterior = tuple[Tensor, Tensor, Tensor]


class MixtureDenoiser(Denoiser):
    """E[x_0 | x_t], exact. States (B, d), float64."""

    def __init__(self, weights: Tensor, means: Tensor, variances: Tensor, schedule: Schedule):
        super().__init__()
        self.register_buffer("log_weights", weights.log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.schedule, self.shape = schedule, (means.shape[1],)

    def posterior(self, x_t: Tensor, t: int) -> Posterior:
        """log P(k | x_t) (B, K), mu_k (B, K, d), tau_k (K,)."""
        alpha, sigma = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        total = alpha**2 * self.variances + sigma**2
        offset = x_t[:, None] - alpha * self.means
        d = self.shape[0]
        log_r = self.log_weights - offset.square().sum(-1) / (2 * total) - d / 2 * total.log()
        mu = self.means + (alpha * self.variances / total)[:, None] * offset
        return log_r.log_softmax(1), mu, self.variances * sigma**2 / total

    def forward(self, x_t: Tensor, t: int) -> Tensor:
        return posterior_mean(self.posterior(x_t, t))

    def for_steps(self, weights: dict[int, float]) -> "ChainMixtureDenoiser":
        return ChainMixtureDenoiser(self, weights)


class ChainMixtureDenoiser(MixtureDenoiser):
    """E[x_0 | x_t], corrected so that a chain of finite steps samples the mixture to second order in the step.

    A step t -> r with the point x0_hat leaves out c^2 C, C = Cov(x_0 | x_t), c the weight of x0_hat in the mean. By the
    Fokker-Planck equation a missing covariance c^2 C is, to first order, a missing drift, which goes into the estimate:

        x0_hat = E[x_0 | x_t] - (c / 2) (C grad log p_t + div C),   div C = (sigma^2 / alpha) Laplacian E[x_0 | x_t].

    Without it a Gaussian of any variance comes out narrower by half a step of log-SNR. weights: c by index.
    """

    def __init__(self, exact: MixtureDenoiser, weights: dict[int, float]):
        super().__init__(exact.log_weights.exp(), exact.means, exact.variances, exact.schedule)
        self.c = weights

    def corrected(self, x_t: Tensor, t: int, posterior: Posterior) -> Tensor:
        """x0_hat (B, d) from the posterior at x_t."""
        mean = posterior_mean(posterior)
        if t not in self.c:
            return mean
        log_r, mu, tau = posterior
        r = log_r.exp()
        alpha, sigma = float(self.schedule.alpha[t]), float(self.schedule.sigma[t])
        total = alpha**2 * self.variances + sigma**2
        score = (alpha * mean - x_t) / sigma**2
        # C score, with C = sum_k r_k (tau_k I + mu_k mu_k^T) - mean mean^T, centred against cancellation
        centred = mu - mean[:, None]
        along = (centred * score[:, None]).sum(-1)
        c_score = (r[..., None] * (tau[:, None] * score[:, None] + centred * along[..., None])).sum(1)
        # Laplacian of sum_k r_k mu_k, from grad r_k = r_k (q_k - score), q_k the score of component k
        q = -(x_t[:, None] - alpha * self.means) / total[:, None]
        pull = q - score[:, None]
        divergence = -self.shape[0] / total
        centred_divergence = divergence - (r * (divergence + pull.square().sum(-1))).sum(1, keepdim=True)
        laplacian_r = r * (pull.square().sum(-1) + centred_divergence)
        gain = alpha * self.variances / total
        laplacian = (laplacian_r[..., None] * centred + 2 * (r * gain)[..., None] * pull).sum(1)
        return mean - self.c[t] / 2 * (c_score + sigma**2 / alpha * laplacian)

    def forward(self, x_t: Tensor, t: int) -> Tensor:
        return self.corrected(x_t, t, self.posterior(x_t, t))


def posterior_mean(posterior: Posterior) -> Tensor:
    """E[x_0 | x_t] = sum_k P(k | x_t) mu_k, (B, d)."""
    log_r, mu, _ = posterior
    return (log_r.exp()[..., None] * mu).sum(1)


class GaussianMixture(Prior):
    """weights (K,), means (K, d), variances (K,): isotropic components in R^d; the weights are normalised.

    points: length of its table of noise levels, at least 2, see `levels`. Raises ValueError for shapes that do not fit, weights or
    variances that are not positive, or anything that is not finite.
    """

    images = False
    dtype = torch.float64

    def __init__(
        self, weights: list[float], means: list[list[float]], variances: list[float], points: int = 4000
    ):
        super().__init__()
        w, v = (torch.as_tensor(x, dtype=torch.float64) for x in (weights, variances))
        rows = means if isinstance(means, list | tuple) else []  # of an array they are of one length
        lengths = [len(row) for row in rows if isinstance(row, list | tuple)]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"GaussianMixture: means: expected rows of one length d, found lengths {lengths}"
            )
        m = torch.as_tensor(means, dtype=torch.float64)
        if points < 2:
            raise ValueError(
                f"GaussianMixture: points = {points}: expected a whole number >= 2, the noise levels of its table"
            )
        if w.ndim != 1 or v.shape != w.shape or m.ndim != 2 or len(m) != len(w) or not m.numel():
            raise ValueError(
                "GaussianMixture needs weights (K,), means (K, d), variances (K,): found "
                f"{tuple(w.shape)}, {tuple(m.shape)}, {tuple(v.shape)}"
            )
        if not all(bool(torch.isfinite(x).all()) for x in (w, m, v)):
            raise ValueError("GaussianMixture: weights, means and variances must be finite")
        if bool((w <= 0).any()) or bool((v <= 0).any()):
            raise ValueError("GaussianMixture: weights and variances must be positive")
        self.asked = {"weights": w.tolist(), "means": m.tolist(), "variances": v.tolist(), "points": points}
        w = w / w.sum()
        self.name = f"GaussianMixture({len(w)} components, dimension {m.shape[1]})"
        self.denoiser = MixtureDenoiser(w, m, v, Schedule.from_log_snr(levels(m, v, points)))
        numbers = torch.cat([w, m.flatten(), v]).numpy().tobytes()
        self.fingerprint = hashlib.sha256(numbers).hexdigest()

    @property
    def image_size(self) -> None:
        return None

    def describe(self) -> dict:
        k, d = self.denoiser.means.shape
        return {"family": "analytic", "components": k, "dimension": d, "table": len(self.denoiser.schedule)}

    @property
    def weights(self) -> Tensor:
        return self.denoiser.log_weights.exp()

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n exact draws, (n, d), with no chain."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.denoiser.shape[0], dtype=torch.float64, generator=generator)
        return self.denoiser.means[k] + self.denoiser.variances[k].sqrt()[:, None] * z

    @staticmethod
    def log_psi(
        posterior: Posterior, direction: Tensor, energy: Energy, strength: Tensor, level: Tensor
    ) -> Tensor:
        """The exact twist log E[exp(-s E(<w, x_0>)) | x_t], (B,), from the denoiser's posterior at x_t; direction
        (B, d), strength and level (B,)."""
        log_r, mu, tau = posterior
        mean = (mu * direction[:, None]).sum(-1)
        variance = tau * direction.square().sum(-1, keepdim=True)
        tilt = energy.log_tilt(mean, variance, strength[:, None], level[:, None])
        return torch.logsumexp(log_r + tilt, 1)

    def log_z(
        self, direction: Tensor, strength: float | Tensor, energy: Energy | None = None, level: float = 0.0
    ) -> Tensor:
        """log Z(s) of E(<w, x>), a float64 scalar, differentiable in s. energy: Linear by default."""
        energy = energy or Linear()
        w = torch.as_tensor(direction, dtype=torch.float64)
        s = torch.as_tensor(strength, dtype=torch.float64)
        tilt = energy.log_tilt(
            self.denoiser.means @ w,
            self.denoiser.variances * (w @ w),
            s,
            torch.tensor(level, dtype=torch.float64),
        )
        return torch.logsumexp(self.denoiser.log_weights + tilt, 0)

    def mean_energy(
        self, direction: Tensor, strength: float, energy: Energy | None = None, level: float = 0.0
    ) -> float:
        """m(s) = E_{q_s}[E] = -d log Z/ds."""
        with torch.inference_mode(False), torch.enable_grad():
            s = torch.tensor(float(strength), dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(self.log_z(direction, s, energy, level), s)
        return -float(slope)

    def kl(
        self, direction: Tensor, strength: float, energy: Energy | None = None, level: float = 0.0
    ) -> float:
        """KL(q_s || p) = -s m(s) - log Z(s), nats."""
        log_z = float(self.log_z(direction, strength, energy, level))
        return -strength * self.mean_energy(direction, strength, energy, level) - log_z

    def tilt(self, direction: Tensor, strength: float) -> "GaussianMixture":
        """q_s for the linear energy E = -<w, x>: m_k + s v_k w, weights re-weighted by Z_k = exp(s <w, m_k> + s^2 v_k |w|^2 / 2)."""
        w = torch.as_tensor(direction, dtype=torch.float64)
        m, v = self.denoiser.means, self.denoiser.variances
        log_w = self.denoiser.log_weights + strength * (m @ w) + strength**2 * v * (w @ w) / 2
        weights, means = log_w.softmax(0), m + strength * v[:, None] * w
        left = weights > 0  # a component whose weight underflows is absent
        points = len(self.denoiser.schedule)
        return GaussianMixture(weights[left].tolist(), means[left].tolist(), v[left].tolist(), points)


def levels(means: Tensor, variances: Tensor, points: int) -> Tensor:
    """Log-SNR levels (points,), falling, dense where a chain of few steps would err.

    A Gaussian step of the chain has the spread of x_0 | x_t left out. For N(., v I) that costs a relative variance of
    sum_i d_i^2 f(l_i), d_i the steps in log-SNR and f(l) = sech^2((l + log v)/2)/4, least for steps in proportion to
    1/sqrt(f), that is uniform in G(l) = 2 atan(exp((l + log v)/2)). G is summed over the scales of the mixture, its
    components and the spread between them, with a tenth of uniform steps mixed in.
    """
    between = (means - means.mean(0)).square().sum(1).max()
    scales = torch.cat([variances, (between + variances.max())[None]]).log()
    low = -10.0 - float(torch.log1p(means.square().sum(1).max() + variances.max()))
    high = 8.0 - float(scales.min())
    fine = torch.linspace(low, high, 100_001, dtype=torch.float64)
    cumulative = 2 * torch.atan(torch.exp((fine[:, None] + scales) / 2)).mean(1)
    cumulative = (cumulative - cumulative[0]) / (cumulative[-1] - cumulative[0])
    cumulative = 0.9 * cumulative + 0.1 * torch.linspace(0, 1, len(fine), dtype=torch.float64)
    at = torch.searchsorted(cumulative, torch.linspace(0, 1, points, dtype=torch.float64)).clamp_max(
        len(fine) - 1
    )
    return fine[at].flip(0)
