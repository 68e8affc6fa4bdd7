"""`train.py fit`: LightningCLI with an output folder, resumable checkpoints and an export at the end.

OUT/config.yaml             what was asked, complete
OUT/checkpoints/last.ckpt   every five minutes (--save_minutes) and at the end of each epoch; resume with --ckpt_path last
OUT/logs/version_N/         metrics.csv, and hparams.yaml with what was asked, one version a start
OUT/wandb                   the same for W&B, offline unless --trainer.logger.offline false; --trainer.logger false for none
OUT/prior or OUT/encoder    the trained network with averaged weights, as the field's libraries read it
OUT/sae                     a sparse autoencoder, as a unit's address reads it
OUT/noise-aware             a twin of an encoder that reads clean estimates, for `--model.noise_aware`
OUT/adapter                 a control of one unit, for `--model.guidance Amortised`
"""

import math
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import wandb
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from tiltlens.errors import UserError
from tiltlens.modules.accelerator import slow_bfloat16, without_mps
from tiltlens.modules.amortise_module import AmortiseModule
from tiltlens.modules.checkpoints import CheckResumed, StepCheckpoint, WholeCheckpointIO
from tiltlens.modules.command_line import CommandLine, check_devices
from tiltlens.modules.encoder_module import EncoderModule
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.last_validation import LastValidation
from tiltlens.modules.noise_aware_module import NoiseAwareModule
from tiltlens.modules.prior_module import PriorModule
from tiltlens.modules.sae_module import SparseAutoencoderModule
from tiltlens.modules.sharding import is_sharded
from tiltlens.modules.step_monitor import StepMonitor
from tiltlens.modules.wandb_curve import place_wandb

CONFIG = "config.yaml"
LONGEST = 1e6  # minutes between checkpoints: two years
LOGGER = {
    "class_path": "lightning.pytorch.loggers.WandbLogger",
    "init_args": {"project": "tiltlens", "offline": True},
}


class SaveAsked(SaveConfigCallback):
    """Writes OUT/config.yaml, over that of an earlier start: a resumed run is asked anew. Every logger has it, too. Of a training: a
    validation alone leaves its config as it is."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        out = Path(trainer.default_root_dir)
        out.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, out / CONFIG, skip_none=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(read_config(out))


class TrainingCLI(CommandLine):
    """fit and validate for every module here."""

    modules: ClassVar = {
        "model": (PriorModule, EncoderModule, SparseAutoencoderModule, AmortiseModule, NoiseAwareModule)
    }

    def __init__(self, args: list[str] | None = None):
        quiet = {"exit_on_error": False}
        super().__init__(
            LightningModule,
            ImageFolderData,
            subclass_mode_model=True,
            save_config_callback=SaveAsked,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            trainer_defaults={"logger": LOGGER},
            parser_kwargs={**quiet, **{name: dict(quiet) for name in self.subcommands()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--save_minutes", type=float, default=5.0, help="between checkpoints; 0 for one at every step"
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        names = ("fit", "validate")
        return {name: LightningCLI.subcommands()[name] for name in names}

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI would load the checkpoint to look for settings, and ours are in config.yaml."""

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        network = self._get(self.config, "model").init_args.get("precision", "")
        if said := slow_bfloat16(
            self.trainer.strategy.root_device, trainer=self.trainer.precision, model=network
        ):
            rank_zero_warn(said)
        if hasattr(self.model, "check_data"):  # before a whole set is decoded
            self.model.check_data(self.datamodule)
        if hasattr(self.model, "read_data"):  # a module may train on what it makes of the images
            self.datamodule = self.model.read_data(self.datamodule)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        out = self.out
        # Both write the one file that `--ckpt_path last` finds. Lightning's save_last would write it at the
        # end of training again, when the average has taken the place of the weights to go on from.
        minutes = self._get(self.config, "save_minutes")
        if not 0 <= minutes <= LONGEST:
            raise UserError(f"save_minutes = {minutes}: expected a number from 0 to {LONGEST:g}")
        every = {"dirpath": out / "checkpoints", "filename": "last", "enable_version_counter": False}
        checkpoints = [
            StepCheckpoint(train_time_interval=timedelta(minutes=minutes), **every),
            StepCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **every),
        ]
        config = self._get(self.config_init, "trainer")
        check_devices(config["devices"])
        config["accelerator"] = without_mps(config["accelerator"])  # metrics are float64, too
        check_gradients(config["gradient_clip_val"], config["accumulate_grad_batches"])
        resumed = CheckResumed(self._get(self.config, "ckpt_path"))
        config["callbacks"] = [
            *(config["callbacks"] or []),
            resumed,
            StepMonitor(),
            LastValidation(),
            *checkpoints,
        ]
        config["default_root_dir"] = out
        strategy = str(config["strategy"]).lower().replace("_", "")  # a name, or an object
        if not any(name in strategy for name in ("fsdp", "deepspeed")):  # these have checkpoints of their own
            config["plugins"] = [*_listed(config["plugins"]), WholeCheckpointIO()]
        loggers = [x for x in _listed(config["logger"]) if x is not True]
        # A validation alone adds no point to the curve of the training whose folder it is given.
        loggers = loggers if self.subcommand == "fit" else []
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                place_wandb(logger, out)
                if self._get(self.config, "ckpt_path") and (run := last_run(out)):
                    logger._wandb_init |= {"id": run, "resume": "allow"}  # one run, one curve
        config["logger"] = [CSVLogger(out, name="logs"), *loggers]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if not self.trainer.interrupted:
                raise
            print(
                "interrupted: the same command with --ckpt_path last goes on from the last checkpoint",
                file=sys.stderr,
            )
            raise KeyboardInterrupt from None  # Lightning makes an exit with status 1 of it

    def after_fit(self) -> None:
        """The export: a fit that was cut short by max_time exports what there is."""
        whole = not is_sharded(self.trainer)
        if not self.trainer.fast_dev_run and (
            self.trainer.is_global_zero or not whole
        ):  # shards are gathered from all
            folder = self.model.export(self.trainer.default_root_dir)
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            print(f"exported {folder}", file=sys.stderr)
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    figures = {k: v.item() for k, v in self.trainer.callback_metrics.items()}
                    told = {"config": read_config(self.out), "metrics": figures}
                    artifact = wandb.Artifact(f"{self.out.name}-{folder.name}", type="model", metadata=told)
                    for file in (p for p in folder.rglob("*") if p.is_file()):
                        artifact.add_file(str(file), str(file.relative_to(folder)))
                    logger.experiment.log_artifact(artifact)
                    logger.experiment.finish()


def read_config(out: Path) -> dict[str, Any]:
    """What was asked of a run, with every default, as plain numbers, strings and lists."""
    return yaml.safe_load((out / CONFIG).read_text())


def check_gradients(clip: float | None, accumulate: int) -> None:
    """Raises UserError for settings under which no step could be taken."""
    if clip is not None and not 0 <= clip < math.inf:
        raise UserError(
            f"trainer.gradient_clip_val = {clip}: expected a finite norm above 0, or 0 for no clipping"
        )
    if accumulate < 1:
        raise UserError(f"trainer.accumulate_grad_batches = {accumulate}: expected at least 1 batch a step")


def last_run(out: Path) -> str | None:
    """The id of the newest W&B run below OUT/wandb, whose folders are called [offline-]run-TIME-ID."""
    runs = sorted(out.glob("wandb/*run-*-*"), key=lambda p: p.stat().st_mtime)
    return runs[-1].name.split("-")[-1] if runs else None


def _listed(value: Any) -> list[Any]:
    """What a trainer takes as nothing, one or several, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value] if value else []
