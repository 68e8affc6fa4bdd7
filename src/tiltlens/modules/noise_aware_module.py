"""Training of a noise-aware twin of an encoder (`tiltlens.units.noise_aware`): a regression of its layers on clean estimates.

    x_t = alpha_t x_0 + sigma_t eps,    minimise over the twin   sum_columns log E |twin(x0_hat(x_t)) - encoder(x_0)|^2

whose solution is E[encoder(x_0) | x_t]. The columns (`tiltlens.modules.noise_aware_task`): all layers of the encoder, or a few units, and
then the twin is a reader that is told the noise level. The logarithm, by noise level and column: errors are weighted by one over
their running mean, for a step of the chain is worth the share of the variance that it tells, at every level alike.
x_0: natural images, and samples of the prior itself, in the share `own_share`, for these are what guidance meets.
"""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from tiltlens.batches import network_rows
from tiltlens.errors import UserError
from tiltlens.modules.image_data import Batch, BatchStream
from tiltlens.modules.learning_rate import check_rate, warm_hold_decay
from tiltlens.modules.noise_aware_responses import Responses, earned, respond
from tiltlens.modules.noise_aware_start import begin_with, check_asked, members_of
from tiltlens.modules.noise_aware_task import LayerTask, UnitTask
from tiltlens.modules.noise_levels import LevelMeans
from tiltlens.modules.own_samples import Paths, own_paths, own_samples
from tiltlens.priors import load_prior
from tiltlens.units.noise_aware import TwinConfig, place, reader_of, save_twin, twin_of
from tiltlens.units.sources import load_encoder
from tiltlens.writing import whole_folder

OUTPUT = "output"  # the encoder's own output, in `layers`
LEVELS = 4  # noise levels a batch
KEEP = 0.98  # of a running error, a step
HELD_OUT = 16  # one own sample in so many is kept for validation
MOMENTS = 512  # images for means and standard deviations


class NoiseAwareModule(LightningModule):
    """A twin of `encoder` under `prior`, trained on {image (B, 3, H, W) in [-1, 1]}.

    encoder, weights: as in a unit's address. prior: any that `load_prior` reads; precision: of its network. units:
    addresses of the encoder's units that it is to read, and them alone, with channel=* and class=* for all of a place, which share half of the
    loss where others are named; null for all, layer by layer. layers: whose
    outputs are learned then, module paths, "output" for the encoder's own, which counts as much as all others together.
    network: the encoder that is to read the units, a smaller one for instance, by heads on `layers` of its own; null for a
    copy of their encoder, which reads each at its place.
    log_snr: the range of noise levels; until: the highest at which the twin is used, for sharper estimates are the
    encoder's own. own: so many samples of the prior are drawn first, by a chain of `steps` and `order` (2: sharper at few steps), and make up the share own_share
    of each batch. responses: the weight of what the reader's gradient earns along the own samples' trajectories
    (`tiltlens.modules.noise_aware_responses`), beside 1 of the values' error; 0 for values alone, and then own samples are noised as images are; of
    readers of single units. init_from: a folder of a reader of the same units to begin with, or "bundled". fused_attention: False where the fused kernel is the slow one (bf16 on a CPU). Raises UserError or
    ValueError for what encoder and prior have not, and for numbers that are no share, range or learning rate.
    """

    def __init__(
        self,
        encoder: str = "bundled",
        weights: str | None = None,
        prior: str = "bundled",
        precision: str = "float32",
        units: list[str] | None = None,
        network: str | None = None,
        layers: tuple[str, ...] = (OUTPUT,),
        log_snr: tuple[float, float] = (-6.0, 6.0),
        until: float | None = None,
        own: int = 2048,
        own_share: float = 0.5,
        steps: int = 40,
        order: int = 1,
        responses: float = 0.0,
        init_from: str | None = None,
        learning_rate: float = 5e-4,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        fused_attention: bool = True,
    ):
        super().__init__()
        check_rate(learning_rate, weight_decay, warmup, 1 - warmup)
        check_asked(units, network, layers, log_snr, until, own, own_share, order, responses, init_from)
        source, self.layers = load_encoder(encoder, weights), [None if x == OUTPUT else x for x in layers]
        if units:
            try:
                named, members = members_of(units, source)
                self.twin = reader_of(source, members, network, self.layers)
            except ValueError as error:
                raise UserError(f"model.units, model.network: {error}") from None
        else:
            for layer in self.layers:  # before the prior is loaded
                source.require_layer(layer)
            self.twin = twin_of(source)
        self.before = {}
        self.units, self.network = list(self.twin.members) if units else [], network
        self.trained = self.twin.trained() if units else list(self.twin.parameters())
        for weight in self.trained:
            weight.requires_grad_(True)
        for part in self.twin.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = fused_attention and part.fused_attn
        loaded = load_prior(prior, precision=precision)
        if not loaded.images:
            raise UserError(f"model.prior {prior} has no images")
        if init_from:
            self.before = begin_with(
                init_from, self.twin, source, loaded.fingerprint, self.network, self.layers
            )
        # In a tuple: they are neither trained nor kept in checkpoints.
        self._parts = (source, loaded)
        self.task = (
            UnitTask(source, self.twin, loaded.decode, named)
            if units
            else LayerTask(source, self.twin, self.layers, loaded.decode)
        )
        self.low, self.high = (float(x) for x in log_snr)
        self.until = self.high if until is None else min(float(until), self.high)
        self.own, self.own_share, self.steps, self.order = own, own_share, steps, order
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        levels = self.low, self.high, len(self.task.weights)
        self.errors = LevelMeans(*levels, 1.0)
        self.response_weight, self.responses = responses, Responses(*levels) if responses else None
        self.own_states: Tensor | None = None
        self.paths: Paths | None = None
        self._prepared = False

    def setup(self, stage: str) -> None:
        self.check_data(self.trainer.datamodule)

    def check_data(self, data: Any) -> None:
        """Raises UserError for images of another size."""
        size, expected = getattr(data, "size", None), self._parts[1].image_size
        if size not in (None, expected):
            raise UserError(
                f"data.size = {size}: the prior's images have {expected} pixels a side; set data.size to it"
            )

    def identity(self) -> dict[str, Any]:
        """What the twin reads, for `CheckResumed`; encoder and prior by their weights, wherever they lie."""
        source, prior = self._parts
        return {
            "encoder_sha256": source.fingerprint, "prior_sha256": prior.fingerprint, "model.units": [place(m) for m in self.units],
            "model.network": self.network, "model.layers": self.layers, "model.log_snr": [self.low, self.high],
            # whose later steps the checkpoint tells
            **({"model.own, model.steps, model.until": [self.own, self.steps, self.until]} if self.responses else {}),
            **({"model.order": self.order} if self.responses and self.order != 1 else {}),
        }  # fmt: skip

    def on_fit_start(self) -> None:
        self.began = time.process_time()
        self._prepare()

    def on_validation_start(self) -> None:
        if not self._prepared:  # validate alone
            self._prepare()

    def _prepare(self) -> None:
        """The prior's own samples, from the run's folder where they lie there, and the columns' moments."""
        source, prior = self._parts
        source.to(self.device), prior.to(self.device)
        if self.responses:
            levels = (self.low, self.until)
            self.paths = own_paths(self.trainer, prior, self.own, self.steps, self.order, levels, self.device)
        elif self.own:
            self.own_states = own_samples(self.trainer, prior, self.own, self.steps, self.order, self.device)
        own = self.paths.x_0 if self.paths else self.own_states
        self.task.know(own, self.trainer, [prior.fingerprint, str(self.trainer.precision)], self.device)
        self._measure()
        self._prepared = True

    @property
    def _apart(self) -> int:
        """Own samples from this one on are held out."""
        return max(self.own - max(self.own // HELD_OUT, 1), 1)

    def states(
        self, images: Tensor, generator: torch.Generator, held_out: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_0 (B, *shape): of the images, the first of them replaced by own samples, half of them mirrored, all shuffled; which
        own sample (B,), -1 for an image; whether mirrored (B,). held_out: of the last own samples, which are not trained on."""
        x_0 = self._parts[1].encode(images)
        own = torch.full((len(images),), -1)
        count = round(self.own_share * len(images)) if self.own_states is not None else 0
        if count:
            first, end = (min(self._apart, self.own - 1), self.own) if held_out else (0, self._apart)
            own[:count] = torch.randint(first, end, (count,), generator=generator)
            x_0 = torch.cat([self.own_states[own[:count]].to(x_0), x_0[count:]])
        mirrored = torch.rand(len(x_0), generator=generator) < 0.5
        x_0 = torch.where(mirrored.to(x_0.device)[:, None, None, None], x_0.flip(3), x_0)
        order = torch.randperm(len(x_0), generator=generator)
        return x_0[order], own[order], mirrored[order]

    @torch.no_grad()
    def estimates(self, x_0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x0_hat (B, *shape) of noised x_0, and the steps of the table (B,): LEVELS levels, stratified over the range of log-SNR;
        of fewer rows than that, one level a row."""
        denoiser = self._parts[1].denoiser
        schedule = denoiser.schedule
        out, steps, levels = [], [], min(LEVELS, len(x_0))  # the last batch that is held out may be short
        for k, part in enumerate(x_0.tensor_split(levels)):
            u = (k + float(torch.rand(1, generator=generator))) / levels
            t = int((schedule.log_snr - (self.low + u * (self.high - self.low))).abs().argmin())
            eps = torch.randn(part.shape, generator=generator).to(part)
            with network_rows(len(part)):  # no row is filled up, for none has to be the same in any company
                out.append(denoiser(float(schedule.alpha[t]) * part + float(schedule.sigma[t]) * eps, t))
            steps.append(torch.full((len(part),), t))
        return torch.cat(out), torch.cat(steps)

    def errors_of(
        self, images: Tensor, generator: torch.Generator, held_out: bool = False
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Squared errors (B, columns) in units of the encoder's variance, log-SNR (B,), and, where responses are taught, `respond` of the last
        rows, which are then those of own trajectories, at the levels of their chains; in training less what their later steps tell."""
        log_snr = self._parts[1].denoiser.schedule.log_snr
        count = min(round(self.own_share * len(images)), len(images) - 1) if self.paths else 0
        x_0, own, mirrored = self.states(images[count:], generator, held_out)
        x0_hat, t = self.estimates(x_0, generator)
        level = log_snr[t].to(images)
        errors = self.task.errors(x0_hat, level, self.task.targets(x_0, own, mirrored))
        if not count:
            return errors, level, None
        bound, rows = self.paths.below(self._apart), len(self.paths.t)
        first, end = (min(bound, rows - 1), rows) if held_out else (0, max(bound, 1))
        which = torch.randint(first, end, (count,), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        x0_hat, moved = self.paths.rows(which, mirrored, images)
        told = log_snr[self.paths.t[which]].to(images)
        targets = self._known(self.paths.sample[which], mirrored)
        residual, d = respond(self.task, x0_hat, moved, told, targets)
        errors, level = torch.cat([errors, residual.square()]), torch.cat([level, told])
        if not held_out:
            residual = residual - self.responses.later[which].to(residual)
        return errors, level, (residual, d)

    def _known(self, own: Tensor, mirrored: Tensor) -> Tensor:
        """What the encoder says of own samples (B, units), raw."""
        return self.task.targets(self.task.reader.mean.new_zeros(len(own), 1), own, mirrored)

    @torch.no_grad()
    def _measure(self) -> None:
        """The task's moments, over the first MOMENTS of what is trained on."""
        data, seen, count = self.trainer.datamodule, [], 0
        for batch in BatchStream(*data.train_set, data.batch_size, data.seed, shuffle=True):
            generator = torch.Generator().manual_seed(batch["seed"])
            images = batch["image"].to(self.device)
            seen.append(self.task.targets(*self.states(images, generator)))
            if self.paths:
                own = torch.randint(self._apart, (round(self.own_share * len(images)),), generator=generator)
                seen[-1] = torch.cat([self._known(own, own % 2 == 0), seen[-1][len(own) :]])
            count += len(batch["image"])
            if count >= MOMENTS:
                break
        self.task.measure(seen)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.responses:
            checkpoint["later"], checkpoint["looked"] = self.responses.later, self.responses.looked

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.responses:
            self.responses.later, self.responses.looked = checkpoint.get("later"), checkpoint.get("looked")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.paths:
            log_snr = self._parts[1].denoiser.schedule.log_snr
            self.responses.look_ahead(self.global_step, self.task, self.paths, self._apart, log_snr)
        generator = torch.Generator().manual_seed(batch["seed"])
        errors, log_snr, told = self.errors_of(batch["image"], generator)
        self.errors.follow(errors, log_snr, (1 - KEEP) if self.global_step > 50 else 0.2)
        weights = self.task.weights.to(errors)
        loss = ((errors / self.errors.at(log_snr)) @ weights).mean()
        self.log("train_loss", (self.errors.mean.log() @ weights).mean(), prog_bar=True)
        self.log("train_error", errors[:, self.task.told].mean(), batch_size=len(errors))
        if told:
            steps = len(self.paths.t) / self.own  # the loss is a sum over those of a trajectory
            error = self.responses.loss(*told, log_snr[-len(told[1]) :]) @ weights * steps
            loss = loss + self.response_weight * error.mean()
            self.log("train_response", -error.detach().mean())
        self.log("learning_rate", self.optimizers().param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """val_error: of units or means, in units of the variance, all noise levels alike, or where responses are taught own trajectories at the
        levels of their chains; val_error_output: of the output. val_response: the share of Var a that the reader's gradient earns along the
        trajectories that are held out, mean over the units, those that are named; val_response_all: with the others."""
        generator = torch.Generator().manual_seed(batch["seed"])
        errors, _, _ = self.errors_of(batch["image"], generator, held_out=True)
        self.log("val_error", errors[:, self.task.told].mean(), prog_bar=True, batch_size=len(errors))
        if self.task.output is not None:
            output = errors[:, self.task.output].mean()
            self.log("val_error_output", output, prog_bar=True, batch_size=len(errors))

    def on_validation_epoch_start(self) -> None:
        """At the start, where the average of the weights is in place, and outside of what sets the precision of a step."""
        if self.paths and self._apart < self.own:
            log_snr = self._parts[1].denoiser.schedule.log_snr
            with self.trainer.precision_plugin.forward_context():
                share = earned(self.task, self.paths, self._apart, log_snr, self.responses.kappa)
            self.log("val_response", share[self.task.told].mean(), prog_bar=True)
            if len(share) > len(share[self.task.told]):
                self.log("val_response_all", share.mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.trained, self.learning_rate, weight_decay=self.weight_decay)
        return warm_hold_decay(optimizer, self.trainer, self.warmup, 1 - self.warmup, shape="cosine")

    def export(self, folder: Path) -> Path:
        """Writes folder/noise-aware, for --model.noise_aware."""
        source, prior = self._parts
        found = {
            k: float(v)
            for k, v in self.trainer.callback_metrics.items()
            if k.startswith(("val_error", "val_response"))
        }
        trained = {
            "steps": self.trainer.global_step, "own": self.own, "own_share": self.own_share,
            "processor_seconds": round(time.process_time() - self.began), **found,
        }  # fmt: skip
        trained |= {"order": self.order} if self.own and self.order != 1 else {}
        trained |= {"responses": self.response_weight} if self.responses else {}
        trained |= {"init_from": self.before} if self.before else {}
        if self.network or not self.units:
            trained["layers"] = [x or OUTPUT for x in self.layers]
        config = TwinConfig(
            {"name": source.name, "sha256": source.fingerprint}, {"name": prior.name, "sha256": prior.fingerprint},
            (self.low, self.until), [place(m) for m in self.units] or None, self.network, self.layers if self.network else None,
            trained,
        )  # fmt: skip
        folder = Path(folder) / "noise-aware"
        with whole_folder(folder) as part:
            save_twin(self.twin, config, part)
        return folder
