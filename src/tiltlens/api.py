"""The notebook's face: one call that samples a unit's tilted law and hands back curve, images and report.

>>> from tiltlens import tilt
>>> result = tilt("bundled", "bundled,class=horse", strengths=[0, 1, 5, 20], n=16)   # doctest: +SKIP
>>> result.curve[1]["kl"], result.images[20.0].shape, result.report()                # doctest: +SKIP
"""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from tiltlens.energies import Energy
from tiltlens.guidance import Guidance
from tiltlens.modules.accelerator import without_mps
from tiltlens.modules.dual import Asked, ConstraintPlan, solve
from tiltlens.modules.plan_data import PlanData
from tiltlens.modules.progress import SamplingProgress
from tiltlens.modules.run_writer import RunFolderWriter
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.modules.spelled import config_text
from tiltlens.priors.prior import Prior
from tiltlens.report import read_units, write_report
from tiltlens.run_folder import RunFolder
from tiltlens.sampling.natural_images import load_image
from tiltlens.units import Unit


@dataclass(frozen=True)
class Tilt:
    """What `tilt` found. folder: the run folder, with everything that sample.py writes; report.html once `report` is called.

    Its config.yaml repeats the run by sample.py; of an object in memory, which no file can name, a comment says so."""

    folder: RunFolder

    @property
    def curve(self) -> list[dict[str, Any]]:
        """The rows of summary.json: one a (unit, strength)."""
        return self.folder.read_summary()["rows"]

    @property
    def warnings(self) -> list[str]:
        return self.folder.read_summary()["warnings"]

    @property
    def constraint(self) -> dict[str, dict[str, Any]]:
        """By unit, the certificate of what was asked; see `tiltlens.estimates.dual.Certificate`. Empty without a
        constraint."""
        return self.folder.read_summary().get("constraint", {})

    @property
    def images(self) -> dict[float, Tensor]:
        """By strength: (n, 3, H, W) in [-1, 1], from the PNG files; units in the order of `curve`, seeds in order. Particles are
        the equally weighted output: one that died is left out, its group's survivors stand there once a copy. Empty for
        vector priors."""
        out: dict[float, list[Tensor]] = {}
        for run in read_units(self.folder).values():
            columns = (run.samples[name].to_pylist() for name in ("strength", "image"))
            for strength, name, copies in zip(*columns, run.copies):
                if name is not None and copies:
                    out.setdefault(strength, []).extend([load_image(self.folder.path / name)] * copies)
        return {strength: torch.stack(images) for strength, images in out.items()}

    def report(self) -> Path:
        """Write report.html; returns its path."""
        return write_report(self.folder)


def tilt(
    prior: Prior | str,
    unit: Unit | str | dict[str, Any] | list[Unit | str | dict[str, Any]],
    strengths: Sequence[float] = (0.0, 1.0, 5.0, 20.0),
    n: int = 16,
    seed: int = 0,
    *,
    energy: Energy | None = None,
    guidance: Guidance | None = None,
    batch_size: int = 16,
    constraint: str | None = None,
    out: str | Path | None = None,
    accelerator: str = "auto",
    **settings: Any,
) -> Tilt:
    """Sample q_s(x) ~ p(x) exp(-s E(a(x))) at each strength; the same rows as `sample.py` gives.

    constraint: in place of strengths, what is wanted: "q0.999" (mean activation at this natural quantile), "z=4" or
    "kl=3" (nats); strengths are then found in rounds, and `Tilt.constraint` certifies what was reached.
    settings: further arguments of `SamplingModule` (steps, eta, pilot, precision, ...). out: the run folder, a new
    temporary one by default; an existing one is resumed. unit: an address, a `Unit`, or several; one of your own torch network:
    `register_encoder(Encoder(network, ...))`, then its name in the address. Raises ValueError for anything that does not fit.
    """
    for name, value, kind in (("energy", energy, Energy), ("guidance", guidance, Guidance)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} = {value!r}: expected an object of tiltlens.{kind.__module__.split('.')[1]}, such as "
                             f"{'Target(3.0)' if kind is Energy else 'DPS()'}")  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    folder = Path(out) if out is not None else Path(tempfile.mkdtemp(prefix="tiltlens-"))
    module = SamplingModule(prior, unit, energy, guidance, **settings)
    plan = {"n": n, "seed": seed, "batch_size": batch_size}
    if constraint is None:
        data = PlanData(list(strengths), n, seed, batch_size)
        plan = {"strengths": data.strengths, **plan}
    else:
        data = ConstraintPlan(Asked.parse(constraint), n, seed, batch_size)
        data.asked.check(module.pilot, module.natural, module.eta, module.method)
    writer = RunFolderWriter(str(folder), config_text(module, plan, accelerator, constraint), report=False)
    trainer = Trainer(
        inference_mode=False, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, accelerator=without_mps(accelerator), devices=1, default_root_dir=str(folder),
        callbacks=[SamplingProgress(), writer],
    )  # fmt: skip
    module.check_trainer(trainer)
    writer.folder.lock()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            if isinstance(data, ConstraintPlan):
                solve(trainer, module, data, writer)
            else:
                trainer.predict(module, datamodule=data, return_predictions=False)
    finally:
        writer.folder.unlock()
    return Tilt(writer.folder)
