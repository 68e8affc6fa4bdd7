"""Amortisation: a prior fine-tuned to the tilted law of one unit, q_s(x) ~ p(x) exp(-s E(a(x))).

The soft-constraint objective s E_q[E] + path KL over the discrete chain, whose least value is -log Z(s), by adjoint matching
(`tiltlens.sampling.adjoint`) in rounds: `paths` paths of the present control, then `round_steps` steps of regression on
them. A pool of unguided samples says beforehand what is natural.

No images are needed. A round draws its paths from seeds that its number names, and its paths are kept in the run's folder, by the
name of what drew them, so that a resumed run goes on as it was.
"""

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from tiltlens.constraint import RowConstraint
from tiltlens.energies import Energy, Linear
from tiltlens.errors import UserError
from tiltlens.guidance.amortised import AdapterConfig, energy_of, save_control
from tiltlens.guidance.control import Control, new_control
from tiltlens.guidance.guidance import Guidance
from tiltlens.modules.amortise_rounds import Rounds, draw_round
from tiltlens.modules.learning_rate import check_rate, warm_hold_decay
from tiltlens.modules.step_monitor import not_finite
from tiltlens.priors import load_prior
from tiltlens.priors.prior import Prior
from tiltlens.sampling.adjoint import (
    Matches,
    controlled_steps,
    drawn_steps,
    matching_loss,
    step_energy,
)
from tiltlens.sampling.noise import stream_seed
from tiltlens.sampling.sample_pool import Pool, run_pool
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Unit, UnitBank, build_unit
from tiltlens.writing import whole_folder


class AmortiseModule(LightningModule):
    """A control of the chain (prior, steps, eta, spacing, clip) for one unit, energy and strength.

    prior, unit, energy, precision, prompt: as those of SamplingModule. strength: s > 0. rank, targets: of the low-rank
    adapter (an analytic prior gets a small network instead). pool: unguided samples, at least 8. paths, round_steps: of a round. batch_size: paths whose steps are read in
    a step of training. loss_steps: steps of the chain that are read, drawn anew each time, mostly those at which the unit
    can be moved; None for all. until: the log-SNR up to which steps are controlled, None for all; beyond it a unit has little
    to say, and in bfloat16 the difference of two forwards is rounding that path KL pays for. learning_rate: the
    peak; warm-up and decay as everywhere. ramp: rounds over which the strength rises to s in equal parts, for far targets; 1 for none.

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
        pool: int = 1024,
        paths: int = 128,
        round_steps: int = 100,
        batch_size: int = 16,
        loss_steps: int | None = 2,
        until: float | None = None,
        ramp: int = 1,
        learning_rate: float = 2e-5,
        weight_decay: float = 0.0,
        warmup: float = 0.03,
        decay: float = 0.5,
    ):
        super().__init__()
        check_rate(learning_rate, weight_decay, warmup, decay)
        for name, value, least in (
            ("pool", pool, 8), ("paths", paths, 1), ("round_steps", round_steps, 1), ("batch_size", batch_size, 1),
            ("ramp", ramp, 1), ("steps", steps, 2),
        ):  # fmt: skip
            if value < least:
                raise UserError(f"model.{name} = {value}: expected a whole number of at least {least}")
        if not (math.isfinite(strength) and strength > 0):
            raise UserError(
                f"model.strength = {strength}: expected a finite number above 0; at 0 there is nothing to learn"
            )
        if not 0 < eta <= 1:
            raise UserError(f"model.eta = {eta}: path KL needs noise, expected a number in (0, 1]")
        if loss_steps is not None and loss_steps < 1:
            raise UserError(
                f"model.loss_steps = {loss_steps}: expected a whole number of at least 1, or null for all steps"
            )
        if batch_size > paths:
            raise UserError(f"model.batch_size = {batch_size}: expected at most model.paths = {paths}")
        self.energy, self.strength = energy or Linear(), float(strength)
        self.chain_settings = {"steps": steps, "eta": float(eta), "spacing": spacing, "clip": clip}
        self.pool_size, self.until = pool, until
        self.paths, self.round_steps, self.ramp = paths, round_steps, ramp
        self.batch_size, self.loss_steps = batch_size, loss_steps
        self.learning_rate, self.weight_decay, self.warmup, self.decay = (
            learning_rate,
            weight_decay,
            warmup,
            decay,
        )
        bank = UnitBank([build_unit(unit)])
        if isinstance(prior, str):
            prior = load_prior(prior, prompt=prompt, precision=precision)
        bank.validate(prior.image_size or prior.denoiser.shape, gradient=True)
        control = new_control(prior.denoiser, rank, list(targets))
        # In a tuple, for a checkpoint holds what is trained and not the prior.
        self._parts = (prior, bank, control)
        self.factors = torch.nn.ParameterList(control.trained())
        self.sampler: Sampler | None = None
        self.matches: Matches | None = None
        self.rounds = Rounds()
        self.spent = 0.0  # processor seconds, before a resume

    def setup(self, stage: str) -> None:
        if self.trainer.precision != "32-true":
            raise UserError(
                f"trainer.precision = {self.trainer.precision}: the chain runs in float32; the precision of the prior's "
                "network is --model.precision bfloat16"
            )

    def identity(self) -> dict[str, Any]:
        """What the control is of, for `CheckResumed`; prior and unit by their numbers, wherever they lie."""
        prior, bank, _ = self._parts
        return {
            "prior": prior.law[:12], "unit": f"{bank.units[0].name} {bank.units[0].fingerprint[:12]}", "energy": energy_of(self.energy),
            "model.strength": self.strength, "chain": self.chain_settings, "model.until": self.until,
        }  # fmt: skip

    @property
    def control(self) -> Control:
        """The present one."""
        return self._parts[2]

    def on_fit_start(self) -> None:
        """The pool, from the run's folder where it lies there, and the unit's natural reference from it."""
        prior, bank, control = self._parts
        control.to(self.device)
        sampler = Sampler(prior, bank, self.energy, Guidance(), **self.chain_settings, device=self.device)
        controlled_steps(sampler.chain, self.until)
        self.sampler = sampler
        name = stream_seed(
            f"{prior.law}/{bank.units[0].fingerprint}/{self.chain_settings}", self.pool_size, "start"
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
        self.natural_energy = self._mean_energy(pool)
        self.seconds = time.process_time() - self.spent

    def _mean_energy(self, pool: Pool) -> float:
        rows, n = self.rows(len(pool.x_0), "cpu"), self.sampler.constraint.naturals[0]
        z = (pool.members[:, 0, : n.member_mean.numel()] - n.member_mean) / n.member_std
        activation = self.sampler.bank.units[0].combine(z).to(rows.strength)
        return float(rows.energy_of(activation).double().mean())

    def rows(self, count: int, device: torch.device | str, strength: float | None = None) -> RowConstraint:
        """`count` rows of the unit."""
        s = torch.full((count,), strength or self.strength, dtype=self.sampler.dtype, device=device)
        return self.sampler.constraint.rows(torch.zeros(count, dtype=torch.long, device=device), s)

    def read_data(self, images: Any) -> None:
        """No images are read: what trains is made by the prior."""

    def train_dataloader(self) -> range:
        """Nothing but the count of steps: paths are made as they are needed."""
        steps = self.trainer.max_steps if self.trainer.max_steps > 0 else 1_000_000
        return range(steps * self.trainer.accumulate_grad_batches)

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        step, seen = (
            self.global_step,
            self.trainer.fit_loop.epoch_loop.total_batch_idx,
        )  # a step may accumulate batches
        generator = torch.Generator().manual_seed(stream_seed("amortise", seen, "step", self.global_rank))
        loss = self.adjoint_loss(step // self.round_steps, generator)
        self.log("matching_loss", loss.detach(), prog_bar=True)
        if not bool(torch.isfinite(loss)):
            # at once: paths of a control that is none would end a round in an error of their own
            where = f"batch {batch_idx} of round {self.rounds.number} (step {step})"
            raise not_finite(self.trainer, "loss", float(loss.detach()), where)
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])
        return loss

    def work_of(self, batch: int) -> tuple[str, int]:
        """For `StepMonitor`."""
        return "paths", self.batch_size

    def adjoint_loss(self, number: int, generator: torch.Generator) -> Tensor:
        if self.rounds.number != number or self.matches is None:
            self.matches = self.begin(number)
            self.energies = step_energy(self.sampler.chain, self.matches)
        steps = len(self.matches.x_t)
        numbers, weights = list(range(steps)), [1.0] * steps
        if self.loss_steps is not None:
            numbers, weights = drawn_steps(self.energies, self.loss_steps, generator)
        paths = torch.randperm(len(self.matches), generator=generator)[: self.batch_size].to(self.device)
        return matching_loss(self.sampler.chain, self.control, self.matches, paths, numbers, weights)

    def begin(self, number: int) -> Matches:
        """The paths of a round: those that `Rounds` has, or new ones."""
        rank, folder = self.global_rank, Path(self.trainer.default_root_dir)
        kept = self.round_steps > 1
        found = self.rounds.begin(number, self._drawer(number), folder, rank, self.device, kept)
        if found is not None:
            return found
        strength = self.strength * min(1.0, (number + 1) / self.ramp)
        first = (number * self.trainer.world_size + rank) * self.paths
        found, figures = draw_round(
            self.sampler.chain, self.control, lambda count: self.rows(count, self.device, strength),
            range(first, first + self.paths), strength, self.until, self.device, self.sampler.dtype,
        )  # fmt: skip
        self.log_dict(figures, batch_size=self.paths)
        if kept:
            rank_zero_info(f"round {number}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        self.rounds.drawn(number, found, figures, folder, rank, kept)
        return found

    def _drawer(self, number: int) -> str:
        """Names all that a round's paths depend on, but for its number and the rank: a folder may hold those of other runs."""
        told = [self.identity(), self.paths, min(1.0, (number + 1) / self.ramp), self.trainer.world_size]
        digest = hashlib.sha256(json.dumps(told).encode())
        for factor in self.control.trained():
            digest.update(factor.detach().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Figures and cost so far, and which paths are in use."""
        told = self.rounds.state(Path(self.trainer.default_root_dir), self.global_rank)
        checkpoint["amortise"] = {**told, "seconds": time.process_time() - self.seconds}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        told = checkpoint.get("amortise", {})
        self.rounds.load(told)
        self.spent = float(told.get("seconds", 0.0))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.factors.parameters(), self.learning_rate, weight_decay=self.weight_decay
        )
        return warm_hold_decay(optimizer, self.trainer, self.warmup, self.decay, shape="linear")

    def export(self, folder: Path) -> Path:
        """Writes folder/adapter, for `--model.guidance Amortised --model.guidance.adapter`."""
        trained = {
            "steps": self.global_step, "rounds": len(self.rounds.figures), "paths": self.paths, "batch_size": self.batch_size, "pool": self.pool_size,
            "processor_seconds": round(time.process_time() - self.seconds, 1), "natural_energy": self.natural_energy,
        }  # fmt: skip
        if self.rounds.figures:  # of the paths that the last round began with
            trained |= {f"last_{key}": value for key, value in self.rounds.figures[-1].items()}
        config = AdapterConfig.of(
            self.control,
            self._parts[0],
            self.sampler.constraint,
            self.strength,
            self.chain_settings,
            self.until,
            trained,
        )
        folder = Path(folder) / "adapter"
        with whole_folder(folder) as part:
            save_control(self.control, config, part)
        return folder
