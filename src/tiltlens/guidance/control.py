"""Trained controls: x_t, t -> a shift of the clean estimate, learned for one unit and one strength.

The optimal shift of a step is that of the tilted law itself: with q_s in the place of p,

    shift*_t(x_t) = E_{q_s}[x_0 | x_t] - E_p[x_0 | x_t] = (sigma_t^2 / alpha_t) grad log psi_t(x_t),

so that a control is a second denoiser. For a network prior it is the prior's own network with a low-rank adapter, whose
product is scaled by s / (strength of its training); for an analytic one a small network beside it. A control that was
not trained shifts by exactly nothing.
"""

import copy

import torch
from torch import Tensor, nn

from tiltlens.denoiser import Denoiser, NetworkDenoiser
from tiltlens.priors import lora

WIDTH = 96
LEVEL_SCALE = 5.0  # log-SNR in units in which a chain spans a few


class Control(nn.Module):
    """estimate(x_t, t, x0_hat) -> the adapted clean estimate (B, *shape), unclipped; x0_hat: the base one at x_t.

    trained: the parameters that training moves, all else is frozen.
    """

    kind: str

    def estimate(self, x_t: Tensor, t: int, x0_hat: Tensor) -> Tensor:
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        raise NotImplementedError

    def scaled(self, scale: float) -> "Control":
        """The frozen control of `scale` times the strength, as cheap to call as the base denoiser."""
        raise NotImplementedError


class Adapter(Control):
    """A low-rank adapter (Hu et al., LoRA, 2022) on a copy of the denoiser's network; the base network is not touched."""

    kind = "lora"

    def __init__(self, base: NetworkDenoiser):
        super().__init__()
        self.denoiser = copy.deepcopy(base).requires_grad_(False)

    @property
    def network(self) -> nn.Module:
        """That of diffusers, inside of the wrapper that fixes its condition."""
        return getattr(self.denoiser.network, "network", self.denoiser.network)

    def inject(self, rank: int, targets: list[str]) -> "Adapter":
        lora.inject(self.network, rank, targets=targets)
        return self

    def estimate(self, x_t: Tensor, t: int, x0_hat: Tensor) -> Tensor:
        return self.denoiser(x_t, t)

    def trained(self) -> list[nn.Parameter]:
        return lora.lora_parameters(self.network)

    def scaled(self, scale: float) -> "Adapter":
        made = copy.deepcopy(self)
        for layer in made.network.modules():
            if hasattr(layer, "lora_A") and hasattr(layer, "scaling"):
                layer.scaling = {name: scale * value for name, value in layer.scaling.items()}
        merged = lora.merge(made.network).requires_grad_(False)
        if hasattr(made.denoiser.network, "network"):
            made.denoiser.network.network = merged
        else:
            made.denoiser.network = merged
        return made


class Head(Control):
    """A network of two hidden layers beside an analytic denoiser of vectors:

    x0_hat + scale sigma_t^2 F(x_t, x0_hat, log-SNR_t), F zero at the start of training.
    """

    kind = "head"

    def __init__(self, base: Denoiser, width: int = WIDTH):
        super().__init__()
        self.schedule, self.scale = base.schedule, 1.0
        (d,) = base.shape
        last = nn.Linear(width, d)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(2 * d + 3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last
        ).double()

    def estimate(self, x_t: Tensor, t: int, x0_hat: Tensor) -> Tensor:
        level = float(self.schedule.log_snr[t]) / LEVEL_SCALE
        spread = float(self.schedule.sigma[t]) ** 2
        time = x_t.new_tensor([level, torch.sigmoid(torch.tensor(LEVEL_SCALE * level)), spread])
        f = self.layers(torch.cat([x_t, x0_hat, time.expand(len(x_t), -1)], 1))
        return x0_hat + self.scale * spread * f

    def trained(self) -> list[nn.Parameter]:
        return list(self.layers.parameters())

    def scaled(self, scale: float) -> "Head":
        made = copy.deepcopy(self).requires_grad_(False)
        made.scale = scale
        return made


def new_control(base: Denoiser, rank: int, targets: list[str]) -> Control:
    """An untrained one for this denoiser. Raises ValueError where it is neither a network nor one of vectors."""
    if isinstance(base, NetworkDenoiser):
        return Adapter(base).inject(rank, targets)
    if len(base.shape) != 1:
        raise ValueError(
            f"a control needs a network denoiser or one of vectors, found {type(base).__name__} of states {base.shape}"
        )
    return Head(base)
