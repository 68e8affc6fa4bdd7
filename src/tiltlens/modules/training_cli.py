"""`train.py fit`: LightningCLI with an output folder, resumable checkpoints and an export at the end.

OUT/config.yaml             what was asked, complete
OUT/checkpoints/last.ckpt   every five minutes and at the end of each epoch; resume with --ckpt_path last
OUT/logs/version_N/         metrics.csv, one version a start
OUT/prior or OUT/encoder    the trained network with averaged weights, as the field's libraries read it
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from tiltlens.modules.command_line import CommandLine, check_devices
from tiltlens.modules.encoder_module import EncoderModule
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.prior_module import PriorModule


class SaveAsked(SaveConfigCallback):
    """Writes OUT/config.yaml, over that of an earlier start: a resumed run is asked anew."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        out = Path(trainer.default_root_dir)
        out.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, out / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class TrainingCLI(CommandLine):
    """fit and validate for every module here."""

    modules: ClassVar = {"model": (PriorModule, EncoderModule)}

    def __init__(self, args: list[str] | None = None):
        quiet = {"exit_on_error": False}
        super().__init__(
            LightningModule,
            ImageFolderData,
            subclass_mode_model=True,
            save_config_callback=SaveAsked,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_kwargs={**quiet, **{name: dict(quiet) for name in self.subcommands()}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        names = ("fit", "validate")
        return {name: LightningCLI.subcommands()[name] for name in names}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        out = self.out
        # Both write the one file that `--ckpt_path last` finds. Lightning's save_last would write it at the
        # end of training again, when the average has taken the place of the weights to go on from.
        every = {"dirpath": out / "checkpoints", "filename": "last", "enable_version_counter": False}
        checkpoints = [
            ModelCheckpoint(train_time_interval=timedelta(minutes=5), **every),
            ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, **every),
        ]
        config = self._get(self.config_init, "trainer")
        check_devices(config["devices"])
        config["callbacks"] = [*(config["callbacks"] or []), *checkpoints]
        config["default_root_dir"] = out
        if config["logger"] is None:
            config["logger"] = CSVLogger(out, name="logs")
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """The export: a fit that was cut short by max_time or by the user's signal exports what there is."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            folder = self.model.export(self.trainer.default_root_dir)
            print(f"exported {folder}", file=sys.stderr)
