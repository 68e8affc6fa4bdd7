"""Amortisation: a prior fine-tuned to the tilted law of one unit, q_s(x) ~ p(x) exp(-s E(a(x))).

The soft-constraint objective s E_q[E] + path KL over the discrete chain, whose least value is -log Z(s), in two stages:

1. a pool of unguided samples; denoising score matching on it, re-weighted (`tiltlens.sampling.warm_start`): `warm_steps`;
2. adjoint matching on paths of the present control (`tiltlens.sampling.adjoint`): all other steps.

No images are needed. Step k of a run draws its paths from seeds that k names, so that a resumed run goes on as it was.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tiltlens.energies import Energy, Linear
from tiltlens.errors import UserError
from tiltlens.guidance.amortised import AdapterConfig, load_control, save_control
from tiltlens.guidance.control import new_control
from tiltlens.guidance.guidance import Guidance
from tiltlens.modules.learning_rate import warm_hold_decay
from tiltlens.priors import load_prior
from tiltlens.priors.prior import Prior
from tiltlens.sampling.adjoint import lean_adjoint, matching_loss, walk
from tiltlens.sampling.noise import Noise, stream_seed
from tiltlens.sampling.sampler import Sampler
from tiltlens.sampling.warm_start import (
    Pool,
    matched_steps,
    run_pool,
    score_matching_loss,
    trusted_weights,
)
from tiltlens.units import Unit, UnitBank, build_unit

WINDOW = 50  # steps that the figures in the adapter's config are a mean of


class AmortiseModule(LightningModule):
    """A control of the chain (prior, steps, eta, spacing, clip) for one unit, energy and strength.

    prior, unit, energy, precision, prompt: as those of SamplingModule. strength: s > 0. rank, targets: of the low-rank
    adapter (an analytic prior gets a small network instead). init_from: an adapter folder to go on from, of the same
    architecture. pool: unguided samples, at least 8; they say what is natural and feed the warm start. warm_steps: steps of
    it; 0 for adjoint matching alone. warm_share: the ESS, as a share of the pool, that its weights keep. warm_log_snr: up to
    which level it goes. batch_size: paths, or samples of the warm start, a step. loss_steps: steps of a path that enter the
    loss, drawn anew each time; None for all. learning_rate: the peak; warm-up and decay as everywhere.

    Raises UserError for values out of range and ValueError for a unit that the prior's images do not fit.
    """

    def __init__(
        self,
        prior: Prior | str = "bundled",
        unit: Unit | str | dict[str, Any] = "bundled,class=horse",
        energy: Energy | None = None,
        strength: float = 2.0,
        steps: int = 16,
        eta: float = 1.0,
        spacing: str = "log-snr",
        clip: bool = False,
        precision: str = "float32",
        prompt: str = "",
        rank: int = 8,
        targets: list[str] = ("attention", "convolution"),  # type: ignore[assignment]
        init_from: Path | None = None,
        pool: int = 1024,
        warm_steps: int = 100,
        warm_share: float = 0.03,
        warm_log_snr: float = 1.0,
        batch_size: int = 16,
        loss_steps: int | None = 6,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        decay: float = 0.5,
    ):
        super().__init__()
        for name, value, least in (
            ("pool", pool, 8),
            ("batch_size", batch_size, 1),
            ("warm_steps", warm_steps, 0),
        ):
            if value < least:
                raise UserError(f"model.{name} = {value}: expected a whole number of at least {least}")
        if not (math.isfinite(strength) and strength > 0):
            raise UserError(
                f"model.strength = {strength}: expected a finite number above 0; at 0 there is nothing to learn"
            )
        if not 0 < eta <= 1:
            raise UserError(f"model.eta = {eta}: path KL needs noise, expected a number in (0, 1]")
        if not 0 < warm_share < 1:
            raise UserError(f"model.warm_share = {warm_share}: expected a share of the pool, between 0 and 1")
        if steps < 2 or not 1 <= (loss_steps or 1) < steps:
            raise UserError(
                f"model.steps = {steps}, loss_steps = {loss_steps}: expected 1 <= loss_steps < steps"
            )
        self.asked = {"prior": prior, "precision": precision, "prompt": prompt}
        self.unit, self.energy, self.strength = build_unit(unit), energy or Linear(), float(strength)
        self.chain_settings = {"steps": steps, "eta": float(eta), "spacing": spacing, "clip": clip}
        self.rank, self.targets = rank, list(targets)
        self.init_from, self.pool_size = init_from, pool
        self.warm_steps, self.warm_share, self.warm_log_snr = warm_steps, warm_share, warm_log_snr
        self.batch_size, self.loss_steps = batch_size, loss_steps or steps - 1
        self.learning_rate, self.weight_decay, self.warmup, self.decay = (
            learning_rate,
            weight_decay,
            warmup,
            decay,
        )
        self.sampler: Sampler | None = None
        self.figures: list[dict[str, float]] = []

    def setup(self, stage: str) -> None:
        if self.sampler is not None:
            return
        if self.trainer.precision != "32-true":
            raise UserError(
                f"trainer.precision = {self.trainer.precision}: the chain runs in float32; the precision of the prior's "
                "network is --model.precision bfloat16"
            )
        prior = self.asked["prior"]
        if isinstance(prior, str):
            prior = load_prior(prior, prompt=self.asked["prompt"], precision=self.asked["precision"])
        bank = UnitBank([self.unit])
        bank.validate(prior.image_size or prior.denoiser.shape)
        sampler = Sampler(prior, bank, self.energy, Guidance(), **self.chain_settings, device=self.device)
        if self.init_from is not None:
            control = load_control(Path(self.init_from), prior.denoiser)
        else:
            control = new_control(prior.denoiser, self.rank, self.targets)
        # In a tuple, for a checkpoint holds what is trained and not the prior.
        self._parts = (prior, control)
        self.factors = torch.nn.ParameterList(control.trained())
        self.sampler = sampler

    @property
    def control(self):
        """The present control; known after `setup`."""
        return self._parts[1]

    def on_fit_start(self) -> None:
        """The pool, from the run's folder where it lies there, and the unit's natural reference from it."""
        prior, control = self._parts
        control.to(self.device)
        sampler, bank = self.sampler, self.sampler.bank
        sampler.device = self.device
        prior.to(self.device), bank.to(self.device)
        name = stream_seed(
            f"{prior.fingerprint}/{bank.units[0].fingerprint}/{self.chain_settings}", self.pool_size, "start"
        )
        file = Path(self.trainer.default_root_dir) / f"pool-{name:016x}.safetensors"
        if not file.is_file() and self.trainer.is_global_zero:
            said = [0.0]

            def progress(done: int, total: int) -> None:
                if time.monotonic() - said[0] > 20 or done == total:
                    said[0] = time.monotonic()
                    rank_zero_info(f"pool {done}/{total}")

            run_pool(
                sampler.chain, bank, prior.decode, self.pool_size, self.device, sampler.dtype, progress
            ).save(file)
        self.trainer.strategy.barrier("pool")
        pool = Pool.load(file)
        sampler.calibrate(None, [pool.members[:, 0, : bank.units[0].size]])
        self.read_pool(pool)
        self.seconds = time.process_time()

    def read_pool(self, pool: Pool) -> None:
        """Weights of the warm start."""
        rows = self.rows(len(pool.x_0), "cpu")
        n = self.sampler.constraint.naturals[0]
        z = (pool.members[:, 0, : n.member_mean.numel()] - n.member_mean) / n.member_std
        energy = rows.energy_of(self.sampler.bank.units[0].combine(z).to(rows.strength)).double()
        self.pool, self.pool_energy = pool, float(energy.mean())
        self.weights, self.warm_strength = trusted_weights(
            energy, self.strength, min(max(self.warm_share * len(energy), 32.0), len(energy) / 2)
        )
        if self.warm_steps:
            rank_zero_info(f"warm start at strength {self.warm_strength:.3g} of {self.strength:g}")

    def rows(self, count: int, device: torch.device | str):
        """`count` rows of the unit at the strength."""
        strength = torch.full((count,), self.strength, dtype=self.sampler.dtype, device=device)
        return self.sampler.constraint.rows(torch.zeros(count, dtype=torch.long, device=device), strength)

    def read_data(self, images: Any) -> None:
        """No images are read: what trains is made by the prior."""

    def train_dataloader(self) -> range:
        """Nothing but the count of steps: paths are made as they are needed."""
        return range(self.trainer.max_steps if self.trainer.max_steps > 0 else 1_000_000)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        step = self.global_step
        generator = torch.Generator().manual_seed(stream_seed("amortise", step, "step", self.global_rank))
        if step < self.warm_steps:
            loss = self.warm_loss(generator)
            self.log("warm_loss", loss.detach(), prog_bar=True)
        else:
            loss = self.adjoint_loss(step * self.trainer.world_size + self.global_rank, generator)
        if not bool(torch.isfinite(loss)):
            raise UserError(
                f"step {step}: the loss is {float(loss)}: lower model.learning_rate; OUT/checkpoints/last.ckpt is intact"
            )
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])
        return loss

    def warm_loss(self, generator: torch.Generator) -> Tensor:
        chain, size = self.sampler.chain, self.batch_size
        where = matched_steps(chain, self.warm_log_snr)
        part = min(16, size)
        steps = torch.tensor(where)[torch.randint(len(where), (-(-size // part),), generator=generator)]
        drawn = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        x_0 = self.pool.x_0[drawn].to(self.device)
        eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(self.device)
        return score_matching_loss(chain, self.control, x_0, steps, eps, part)

    def adjoint_loss(self, batch: int, generator: torch.Generator) -> Tensor:
        chain, size = self.sampler.chain, self.batch_size
        seeds = range(batch * size, (batch + 1) * size)
        noise = Noise(seeds, chain.denoiser.shape, self.device, self.sampler.dtype, domain="amortise")
        kept = torch.randperm(len(chain) - 1, generator=generator)[: self.loss_steps].tolist()
        rows = self.rows(size, self.device)
        path = walk(chain, self.control, rows, noise, kept)
        loss = matching_loss(chain, path, lean_adjoint(chain, path, rows))
        found = {
            "matching_loss": float(loss.detach()),
            "objective": float(path.objective.mean()),
            "path_kl": float(path.path_kl.mean()),
            "mean_energy": float(path.energy.mean()) / self.strength,
        }
        self.figures = [*self.figures[1 - WINDOW :], found]
        self.log_dict(found, batch_size=size)
        self.log(
            "objective_mean", sum(f["objective"] for f in self.figures) / len(self.figures), prog_bar=True
        )
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.factors.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = warm_hold_decay(optimizer, self.trainer, self.warmup, self.decay, shape="linear")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def export(self, folder: Path) -> Path:
        """Writes folder/adapter, for `--model.guidance Amortised --model.guidance.adapter`."""
        trained = {
            "steps": self.global_step, "warm_steps": min(self.warm_steps, self.global_step),
            "batch_size": self.batch_size, "pool": self.pool_size, "warm_strength": self.warm_strength,
            "processor_seconds": round(time.process_time() - self.seconds, 1), "natural_energy": self.pool_energy,
        }  # fmt: skip
        for key in self.figures[-1] if self.figures else ():
            trained[f"last_{key}"] = sum(f[key] for f in self.figures) / len(self.figures)
        config = AdapterConfig.of(
            self.control, self._parts[0], self.sampler.constraint, self.strength, self.chain_settings, trained
        )
        return save_control(self.control, config, Path(folder) / "adapter")
