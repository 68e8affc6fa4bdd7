"""`sample.py`: LightningCLI over SamplingModule and PlanData, a run folder out."""

import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import WandbLogger

from tiltlens.energies import Energy
from tiltlens.guidance import Guidance
from tiltlens.modules.accelerator import without_mps
from tiltlens.modules.command_line import CommandLine, check_devices
from tiltlens.modules.dual import FORMS, Asked, ConstraintPlan, solve
from tiltlens.modules.plan_data import PlanData
from tiltlens.modules.progress import SamplingProgress
from tiltlens.modules.reweight import reweight_run, show
from tiltlens.modules.run_writer import RunFolderWriter
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.modules.wandb_curve import WandbCurve, place_wandb
from tiltlens.priors import Prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import ChainSampler
from tiltlens.units import Unit

LOGGER = {
    "class_path": "lightning.pytorch.loggers.WandbLogger",
    "init_args": {"project": "tiltlens", "offline": True},
}
TRAINER = {
    "inference_mode": False, "logger": LOGGER, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False, "devices": 1,
}  # fmt: skip


class SamplingCLI(CommandLine):
    """Every constructor argument of SamplingModule, PlanData and Trainer is an override."""

    modules: ClassVar = {"model": (SamplingModule,), "data": (PlanData,)}
    families: ClassVar = {
        "model.prior": Prior,
        "model.unit": Unit,
        "model.energy": Energy,
        "model.guidance": Guidance,
        "model.sampler": ChainSampler,
    }

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
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--constraint",
            type=str | None,
            default=None,
            help=f"what is wanted, in place of strengths: {FORMS}",
        )
        parser.add_argument(
            "--reweight",
            type=Path | None,
            default=None,
            help="a run folder: re-estimate at data.strengths from its rows",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        self.given = parser.parse_args(args, defaults=False) if self.config["reweight"] else None

    @property
    def strengths(self) -> list[float] | None:
        """Those to re-weight at: None unless data.strengths was set, to its default or not."""
        return self.given.get("data", {}).get("strengths")

    def instantiate_classes(self) -> None:
        if self._get(self.config, "reweight") is None:  # stored rows need no model
            super().instantiate_classes()

    def config_text(self) -> str:
        """config.yaml: all that is set, and not where this run was put."""
        config = self.config.clone()
        for key in ("config", "out", "reweight"):
            config.pop(key, None)
        return self.parser.dump(config, skip_none=True, skip_link_targets=False)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        check_devices(config["devices"])
        config["accelerator"] = without_mps(config["accelerator"])
        config["callbacks"] = [
            *(config["callbacks"] or []),
            SamplingProgress(),
            RunFolderWriter(str(self.out), self.config_text()),
            WandbCurve(),
        ]
        if config["default_root_dir"] is None:
            config["default_root_dir"] = str(self.out)
        if isinstance(config["logger"], WandbLogger):
            place_wandb(config["logger"], self.out)
        return super().instantiate_trainer(**kwargs)


def main(args: list[str] | None = None) -> None:
    """Sample what is asked; returns only if all of it is in the run folder. A constraint that is not met ends with status 1,
    its certificate told and kept."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    cli = SamplingCLI(args)
    if (stored := cli.config["reweight"]) is not None:
        show(reweight_run(stored, cli.strengths))
        return
    cli.model.check_trainer(cli.trainer)
    writer = next(c for c in cli.trainer.callbacks if isinstance(c, RunFolderWriter))
    if cli.trainer.is_global_zero:
        writer.folder.lock()
    try:
        unmet = _sample(cli, writer)
    except SystemExit:
        if not cli.trainer.interrupted:
            raise
        print("interrupted: the same command goes on where this one stopped", file=sys.stderr)
        if cli.trainer.received_sigterm:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt from None  # Lightning makes an exit with status 1 of it
    finally:
        if cli.trainer.is_global_zero:
            writer.folder.unlock()
    if cli.trainer.is_global_zero:
        # A number that is missing is not looked for on a page: what the run cannot say is said where it ends.
        for line in RunFolder(cli.out).read_summary()["warnings"]:
            print(f"note: {line}", file=sys.stderr)
        print(cli.out / "report.html")
        if unmet:
            print(f"error: the constraint is not met by {', '.join(unmet)}: see above", file=sys.stderr)
    if unmet:
        sys.exit(1)


def _sample(cli: SamplingCLI, writer: RunFolderWriter) -> list[str]:
    """The units by which a constraint is not met."""
    data, asked = cli.datamodule, cli.config["constraint"]
    if asked is None:
        if cli.trainer.is_global_zero:
            writer.open(cli.model, data)
            if writer.whole:
                cli.trainer.loggers = []  # nothing to do: no second W&B run that says the same
        cli.trainer.predict(cli.model, datamodule=data, return_predictions=False)
        return []
    data = ConstraintPlan(Asked.parse(asked), data.n, data.seed, data.batch_size)
    data.asked.check(cli.model.pilot, cli.model.natural, cli.model.eta, cli.model.method)
    certificates = solve(cli.trainer, cli.model, data, writer)
    if cli.trainer.is_global_zero:
        print(*(entry["text"] for entry in certificates), sep="\n")
    met = ("reached", "natural")
    return [u.name for u, c in zip(cli.model.units, certificates) if c["status"] not in met]
