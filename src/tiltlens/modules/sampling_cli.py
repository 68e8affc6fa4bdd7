"""`sample.py`: LightningCLI over SamplingModule and PlanData, a run folder out."""

import inspect
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger

from tiltlens.errors import UserError
from tiltlens.modules.command_line import explain
from tiltlens.modules.plan_data import PlanData
from tiltlens.modules.progress import SamplingProgress
from tiltlens.modules.run_writer import RunFolderWriter
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.modules.wandb_curve import WandbCurve

LOGGER = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "tiltlens", "offline": True}}
TRAINER = {
    "inference_mode": False, "logger": LOGGER, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False, "devices": 1,
}  # fmt: skip


class SamplingCLI(LightningCLI):
    """`--out DIR` (default runs/NAME, NAME the stem of the config); every constructor argument is an override."""

    def __init__(self, args: list[str] | None = None):
        super().__init__(
            SamplingModule,
            PlanData,
            run=False,
            save_config_callback=None,
            seed_everything_default=False,
            trainer_defaults=TRAINER,
            parser_kwargs={"exit_on_error": False},
            load_from_checkpoint_support=False,
            auto_configure_optimizers=False,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=Path | None, default=None, help="the run folder; default runs/NAME")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(explain(str(error), self.known_keys(parser))) from error

    @staticmethod
    def known_keys(parser: LightningArgumentParser) -> list[str]:
        keys = list(parser.get_defaults().keys())
        for name, cls in (("model", SamplingModule), ("data", PlanData)):
            keys += [f"{name}.{key}" for key in inspect.signature(cls).parameters]
        return sorted(set(keys))

    @property
    def out(self) -> Path:
        configs = self.config.get("config") or []
        return Path(self.config.get("out") or Path("runs") / (Path(str(configs[0])).stem if configs else "sample"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        text = self.parser.dump(self.config, skip_none=False, skip_link_targets=False)
        config["callbacks"] = [
            *(config["callbacks"] or []), SamplingProgress(), RunFolderWriter(str(self.out), text), WandbCurve()
        ]  # fmt: skip
        if config["default_root_dir"] is None:
            config["default_root_dir"] = str(self.out)
        if isinstance(config["logger"], WandbLogger):
            place_wandb(config["logger"], self.out)
        return super().instantiate_trainer(**kwargs)


def place_wandb(logger: WandbLogger, out: Path) -> None:
    """Its files go under OUT/wandb, quietly; online with no login is an error now and not a prompt later."""
    import wandb

    if not logger._offline and not (os.environ.get("WANDB_API_KEY") or wandb.Api.api_key_configured()):
        raise UserError("W&B is asked for online, but there is no login: set WANDB_API_KEY or run `wandb login`, or stay offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    logger._wandb_init["dir"] = str(out)
    logger._save_dir = str(out)


def main(args: list[str] | None = None) -> None:
    """Sample what is asked; returns only if all of it is in the run folder."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    cli = SamplingCLI(args)
    next(c for c in cli.trainer.callbacks if isinstance(c, RunFolderWriter)).open(cli.model, cli.datamodule)
    cli.trainer.predict(cli.model, datamodule=cli.datamodule, return_predictions=False)
    print(f"{cli.out / 'report.html'}")
