"""The one contract between priors and everything else: x_t, t -> x0_hat = E[x_0 | x_t].

Whatever a network predicts, it is turned once, here, into the clean estimate; guidance, chains and estimators
never see epsilon, v, EDM preconditioning or flow velocities.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiltlens.batches import in_equal_batches
from tiltlens.schedule import Schedule


class Denoiser(nn.Module):
    """x0_hat(x_t, t) = E[x_0 | x_t].

    schedule: its table of (alpha_t, sigma_t). shape: of one state without the batch, (C, H, W) or (d,).
    """

    schedule: Schedule
    shape: tuple[int, ...]

    def forward(self, x_t: Tensor, t: int) -> Tensor:
        """x_t (B, *shape) float32 or better, t an index into the schedule -> x0_hat, the same shape and dtype."""
        raise NotImplementedError

    def with_features(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """x0_hat, and what else of x_t the same forward lays open: features phi (B, F), differentiable. x_t itself, as a
        vector, unless a denoiser has features of its own."""
        return self(x_t, t), x_t.flatten(1)

    def for_steps(self, weights: dict[int, float]) -> "Denoiser":
        """The denoiser of one chain. weights: the weight of x0_hat in the mean of the step from index t. The same for
        all chains, unless a denoiser knows how to take the error of finite steps out of its estimate."""
        return self


class NetworkDenoiser(Denoiser):
    """x0_hat = skip_t x_t + out_t F(in_t x_t, time_t), the form every published parametrisation takes.

    epsilon: skip = 1/alpha, out = -sigma/alpha. v (Salimans and Ho, Progressive Distillation, 2022): skip = alpha,
    out = -sigma. sample: skip = 0, out = 1. flow (Lipman et al., Flow Matching, 2023; velocity eps - x_0,
    alpha + sigma = 1): skip = 1, out = -sigma. EDM (Karras et al., 2022, table 1): skip = s_d^2/(sigma^2 + s_d^2),
    out = sigma s_d/sqrt(sigma^2 + s_d^2), in = 1/sqrt(sigma^2 + s_d^2).

    network: (x (B, *shape), time (B,)) -> F (B, *shape). autocast: the precision of the network alone, None for
    that of its weights; the arithmetic around it stays in the precision of x_t.
    """

    def __init__(
        self,
        network: nn.Module | Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        shape: tuple[int, ...],
        skip: Tensor,
        out: Tensor,
        scale_in: Tensor | None = None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.shape = tuple(shape)
        self.skip, self.out = skip.double(), out.double()
        self.scale_in = torch.ones_like(self.skip) if scale_in is None else scale_in.double()
        self.autocast = autocast

    def forward(self, x_t: Tensor, t: int) -> Tensor:
        f = in_equal_batches(lambda x: self._call(x, t), x_t * float(self.scale_in[t]))
        return float(self.skip[t]) * x_t + float(self.out[t]) * f

    def with_features(self, x_t: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """phi: the spatial means of the middle block and the first upward block of a UNet, of the last block's tokens of a
        transformer, float32; empty for a network of another kind."""
        blocks = feature_blocks(self.network)
        seen: dict[int, Tensor] = {}

        def call(x: Tensor) -> dict[str, Tensor]:
            hooks = [
                block.register_forward_hook(lambda _, __, out, k=k: seen.__setitem__(k, _mean(out)))
                for k, block in enumerate(blocks)
            ]
            try:
                f = self._call(x, t)
            finally:
                for hook in hooks:
                    hook.remove()
            phi = [seen[k] for k in range(len(blocks))]
            return {"f": f, "phi": torch.cat(phi, 1) if phi else f.new_zeros(len(x), 0)}

        out = in_equal_batches(call, x_t * float(self.scale_in[t]))
        return float(self.skip[t]) * x_t + float(self.out[t]) * out["f"], out["phi"]

    def _call(self, x: Tensor, t: int) -> Tensor:
        time = torch.full((len(x),), float(self.schedule.time[t]), device=x.device)
        enabled = self.autocast is not None
        with torch.autocast(x.device.type, self.autocast or torch.bfloat16, enabled=enabled):
            return self.network(x, time).to(x.dtype)


def feature_blocks(network: nn.Module | Callable) -> list[nn.Module]:
    """The blocks of a diffusers network whose outputs are read as features: in the middle of a UNet, where the scene is
    decided; the last of a transformer."""
    inner = getattr(network, "network", network)
    upward = list(getattr(inner, "up_blocks", []))[:1]
    if upward:
        return [b for b in (getattr(inner, "mid_block", None), *upward) if b is not None]
    return list(getattr(inner, "transformer_blocks", []))[-1:]


def _mean(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """(B, C, H, W) or (B, tokens, C) -> (B, C), over space."""
    h = (out[0] if isinstance(out, tuple) else out).float()
    return h.mean((2, 3)) if h.ndim == 4 else h.mean(1)


def parametrisation(name: str, schedule: Schedule, sigma_data: float = 0.5) -> dict[str, Tensor]:
    """The tables skip, out, scale_in of `NetworkDenoiser` for a parametrisation, each (T,) float64.

    name: epsilon, v_prediction, sample, flow, edm (F an epsilon-like output), edm_v. Raises ValueError otherwise.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    one = torch.ones_like(alpha)
    spread = (sigma**2 + sigma_data**2).sqrt()
    tables = {
        "epsilon": (1 / alpha, -sigma / alpha, one),
        "v_prediction": (alpha, -sigma, one),
        "sample": (0 * one, one, one),
        "flow": (one, -sigma, one),
        "edm": (sigma_data**2 / spread**2, sigma * sigma_data / spread, 1 / spread),
        "edm_v": (sigma_data**2 / spread**2, -sigma * sigma_data / spread, 1 / spread),
    }
    if name not in tables:
        raise ValueError(f"unknown prediction type {name!r}: expected one of {', '.join(tables)}")
    return dict(zip(("skip", "out", "scale_in"), tables[name]))
