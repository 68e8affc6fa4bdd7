"""Sampling under Lightning: predict_step turns a batch of rows into samples.

The prior is an ordinary argument and not part of a checkpoint. Prediction needs gradients with respect to the sample,
so the Trainer must not run it in inference mode.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from tiltlens.batches import network_rows
from tiltlens.energies import Energy, Linear, parse_level
from tiltlens.guidance import Calibrated, Guidance
from tiltlens.modules.accelerator import check_float64, slow_bfloat16
from tiltlens.priors import load_prior
from tiltlens.priors.prior import Prior
from tiltlens.sampling import ChainSampler, Independent
from tiltlens.sampling.chain import ORDERS
from tiltlens.sampling.natural_images import natural_files, read_natural_members
from tiltlens.sampling.pilot import SPREAD, UnitPilot
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler, Samples
from tiltlens.schedule import SPACINGS, step_indices
from tiltlens.units import Unit, UnitBank, build_unit
from tiltlens.units.bank import check_addresses
from tiltlens.units.twins import adopt_twins

PILOT_BATCH = 64


class SamplingModule(LightningModule):
    """Samples q_s(x) ~ p(x) exp(-s E(a(x))) for one or several units.

    prior: "bundled", a diffusers folder or hub name, or a Prior. unit: an address, its keys as a mapping, a Unit, or a
    list of these. energy: the soft constraint, Linear by default. guidance: Calibrated by default. sampler: Independent
    rows by default; Particles for weighted groups of rows and an unbiased Z; NoiseSpace for walks with no gradient.
    steps: network calls of a sample. eta: 0 (deterministic; KL with NoiseSpace alone) to 1 (ancestral). spacing: of the
    steps, log-snr or index. order: 1, the DDIM family; 2, its multistep form (DPM-Solver++ 2M), as sharp with half the steps. clip: clamp clean
    estimates to [-1, 1] in base and guided law. pilot: unguided trajectories
    for calibration, 0 for none. natural: an image folder that says what is natural, in place of the pilot's samples.
    precision: of the prior's network, float32 or bfloat16. prompt: for text-conditional priors. noise_aware: a folder of
    `NoiseAwareModule`, or several, of twins that read clean estimates for the guidance; "bundled"; or "auto", the bundled one
    where prior, encoder and unit are those that it was trained for, and the encoder elsewhere. cache: a folder in which pilots,
    and what guidance learned from them, are kept for other runs of this prior, unit and chain. rows: images
    that a network sees at once, filled up where there are fewer; 16 on a CPU and 32 elsewhere by default. Memory
    goes by it and not by batch_size, best a multiple of it; a sample depends on it by rounding alone, which strong
    guidance magnifies.
    """

    def __init__(
        self,
        prior: Prior | str = "bundled",
        unit: Unit | str | dict[str, Any] | list[Unit | str | dict[str, Any]] = "bundled,class=horse",
        energy: Energy | None = None,
        guidance: Guidance | None = None,
        sampler: ChainSampler | None = None,
        steps: int = 50,
        eta: float = 1.0,
        spacing: str = "log-snr",
        clip: bool = False,
        pilot: int = 64,
        natural: str | None = None,
        precision: str = "float32",
        prompt: str = "",
        noise_aware: str | list[str] | None = None,
        cache: str | None = None,
        rows: int | None = None,
        order: int = 1,
    ):
        super().__init__()
        if not (isinstance(eta, (int, float)) and math.isfinite(eta) and 0 <= eta <= 1):
            raise ValueError(f"model.eta = {eta}: expected a number in [0, 1] (0 deterministic, 1 ancestral)")
        if steps < 1:
            raise ValueError(f"model.steps = {steps}: expected a whole number >= 1")
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"model.rows = {rows}: expected a whole number >= 1, or none for the default")
        if spacing not in SPACINGS:
            raise ValueError(f"model.spacing = {spacing!r}: expected one of {', '.join(SPACINGS)}")
        if order not in ORDERS:
            raise ValueError(f"model.order = {order}: expected 1 or 2")
        if pilot != 0 and pilot < 8:
            raise ValueError(
                f"model.pilot = {pilot}: expected 0 (none) or at least 8 trajectories to regress on"
            )
        self.energy, self.guidance = energy or Linear(), guidance or Calibrated()
        self.method = sampler or Independent()
        self.method.check(eta)
        self.guidance.check(pilot, eta)
        if pilot == 0 and self.energy.standardise and natural is None:
            raise ValueError(
                "model.pilot = 0, but the energy is standardised: set pilot >= 8, or model.natural to an image folder"
            )
        if pilot == 0 and natural is None and self.energy.level is not None:
            kind, _ = parse_level(self.energy.level)
            if kind != "value":
                raise ValueError(
                    f"the level {self.energy.level!r} counts natural activations, and there will be none: set model.pilot >= 8, "
                    "model.natural to an image folder, or a raw level"
                )
        if isinstance(prior, Prior) and (prompt or precision != "float32"):
            raise ValueError(
                "model.prompt and model.precision are of a prior that is given by name; this one is loaded: pass them to load_prior"
            )
        self.units = [build_unit(u) for u in (unit if isinstance(unit, (list, tuple)) else [unit])]
        if len({u.name for u in self.units}) < len(self.units):
            raise ValueError(f"a unit stands twice in model.unit: {', '.join(u.name for u in self.units)}")
        self.prior_spec, self.steps, self.eta, self.spacing, self.clip = (
            prior,
            steps,
            float(eta),
            spacing,
            clip,
        )
        self.order = order
        self.pilot, self.natural, self.precision, self.prompt = pilot, natural, precision, prompt
        self.noise_aware = [noise_aware] if isinstance(noise_aware, str) else list(noise_aware or [])
        self.cache, self.rows = cache, rows
        self.prior: Prior | None = None
        self.sampler: Sampler | None = None
        self._steerable = False  # whether the units were seen to have gradients
        self.pilot_store: Any = None  # where a pilot is kept; given by the run-folder writer
        self.progress: Callable[[str, int, int], None] | None = None
        self.pilot_seconds = 0.0
        # what a reader of the results should know of how it was read: of summary.json
        self.notes: list[str] = []

    def load(self) -> None:
        """Load prior and encoders and check that they fit; idempotent. All errors of the user's come from here."""
        if self.prior is None:
            with network_rows(self.rows):
                self._load()

    def _load(self) -> None:
        prior = self.prior_spec
        if self.natural and not isinstance(prior, Prior):
            natural_files(self.natural)
        check_addresses(self.units)
        bank = UnitBank(self.units)
        bank.validate_encoders()
        if isinstance(prior, str):
            prior = load_prior(prior, prompt=self.prompt, precision=self.precision)
        step_indices(prior.denoiser.schedule, self.steps, self.spacing)
        if self.natural and not prior.images:
            raise ValueError(f"model.natural is an image folder, but the prior {prior.name} has no images")
        if self.natural:
            natural_files(self.natural)
        bank.validate(prior.image_size or prior.denoiser.shape)
        self.guidance.check_target(prior, self.units, self.energy, ())
        self.notes = adopt_twins(bank, self.noise_aware, prior.fingerprint)
        self.bank, self.prior = bank, prior

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError(f"SamplingModule samples: use Trainer.predict, not {stage}")
        self.check_trainer(self.trainer)
        if said := slow_bfloat16(self.trainer.strategy.root_device, model=self.precision):
            rank_zero_warn(said)
        self.load()
        self.check_plan(self.trainer.datamodule)

    def check_plan(self, data: Any) -> None:
        """Raises ValueError where the guidance was made for others than the strengths asked for, or a unit to be steered has no
        gradient. After `load`."""
        strengths = getattr(data, "strengths", ())
        self.guidance.check_target(self.prior, self.units, self.energy, strengths)
        # a constraint finds its strengths later
        steered = any(s > 0 for s in strengths) or hasattr(data, "asked")
        if self.method.guides and (steered or self.guidance.learns) and not self._steerable:
            self.bank.validate(self.prior.image_size or self.prior.denoiser.shape, gradient=True)
            self._steerable = True

    @staticmethod
    def check_trainer(trainer: Trainer) -> None:
        """Raises ValueError for trainer settings that cannot sample, or that would change p unseen."""
        if trainer.predict_loop.inference_mode:
            raise ValueError(
                "guided sampling takes gradients with respect to the sample: expected Trainer(inference_mode=False), "
                "found inference_mode=True. Pass --trainer.inference_mode=false"
            )
        check_float64(trainer)
        if trainer.precision != "32-true":
            raise ValueError(
                f"trainer.precision = {trainer.precision}: the chain runs in float32; the precision of the prior's network "
                "is --model.precision bfloat16"
            )
        limit = trainer.limit_predict_batches
        if trainer.fast_dev_run or isinstance(limit, int) or limit != 1.0:
            found = (
                f"fast_dev_run = {trainer.fast_dev_run}"
                if trainer.fast_dev_run
                else f"limit_predict_batches = {limit}"
            )
            raise ValueError(
                f"a run is whole when all its rows are there: expected all batches, found trainer.{found}, which leaves some "
                "out. For a smaller run set data.n or data.strengths; both may grow later"
            )

    def on_predict_start(self) -> None:
        self.sampler = Sampler(
            self.prior,
            self.bank,
            self.energy,
            self.guidance,
            self.steps,
            self.eta,
            self.spacing,
            self.clip,
            self.device,
            self.method,
            self.order,
        )
        start = time.perf_counter()
        with network_rows(self.rows):
            pilots = self._pilots() if self.pilot else None
            reference = self._reference() if self.natural else None
            self._calibrate(pilots, reference)
        self.pilot_seconds = time.perf_counter() - start

    def _pilots(self) -> list[UnitPilot]:
        """From the run folder where it has them; else run once, by rank 0, and kept."""
        store, barrier = self.pilot_store, self.trainer.strategy.barrier
        kept = store.load_pilots(self.units) if store else None
        if self.guidance.learns and store and store.load_lessons(self.units) is None:
            kept = (
                None  # a run that stopped before it had learned: a stored pilot has no features to learn from
            )
        barrier(
            "pilot looked for"
        )  # no rank may find what another has only just written, and pass the next barrier by
        if kept is None and (store is None or self.trainer.is_global_zero):
            report = (lambda done, total: self.progress("pilot", done, total)) if self.progress else None
            kept = self.sampler.run_pilot(self.pilot, min(self.pilot, PILOT_BATCH), report)
            if store:
                store.save_pilots(self.units, kept)
        barrier("pilot kept")
        kept = kept or store.load_pilots(self.units)
        return kept

    def _reference(self) -> list[Tensor]:
        """What the units say of the natural images: from the run folder where it has it, for the images may have changed since."""
        store, barrier = self.pilot_store, self.trainer.strategy.barrier
        kept = store.load_natural(self.units) if store else None
        barrier("natural images looked for")
        if kept is None and (store is None or self.trainer.is_global_zero):
            kept = read_natural_members(self.natural, self.bank, self.prior.image_size, self.device)
            if store:
                store.save_natural(self.units, kept)
        barrier("natural images read")
        return kept or store.load_natural(self.units)

    def _calibrate(self, pilots: list[UnitPilot] | None, reference: list[Any] | None) -> None:
        """With what was learned from the pilot, where guidance learns: as the pilot, from the run folder or by rank 0."""
        if not self.guidance.learns:
            self.sampler.calibrate(pilots, reference)
            return
        store, barrier = self.pilot_store, self.trainer.strategy.barrier
        kept = store.load_lessons(self.units) if store else None
        barrier("lessons looked for")
        mine = store is None or self.trainer.is_global_zero
        if kept is not None or mine:
            report = (lambda done, total: self.progress("learning", done, total)) if self.progress else None
            self.sampler.calibrate(pilots, reference, kept, report)
            if store and kept is None:
                store.save_lessons(self.units, self.sampler.lessons)
        barrier("lessons kept")
        if kept is None and not mine:
            self.sampler.calibrate(pilots, reference, store.load_lessons(self.units))

    def predict_step(self, batch: list[Row], batch_idx: int) -> Samples | None:
        if not batch:  # of a rank, or a run, with nothing left to do
            return None
        report = (lambda done, total: self.progress("step", done, total)) if self.progress else None
        with network_rows(self.rows):
            return self.sampler.sample(batch, report)

    @property
    def chain_settings(self) -> dict:
        """What the chain is, but for the prior; its order where it is not 1."""
        settings = {"steps": self.steps, "eta": self.eta, "spacing": self.spacing, "clip": self.clip}
        return settings | ({"order": self.order} if self.order != 1 else {})

    def describe(self) -> dict:
        """The settings that make this run what it is: a folder that holds others is refused."""
        return {
            "prior": self.prior.identity(),
            "units": [u.name for u in self.units],
            "unit_sha256": {u.name: u.fingerprint for u in self.units},
            "energy": {"class": type(self.energy).__name__, **vars(self.energy)},
            "guidance": self.guidance.describe(),
            "sampler": self.method.describe(),
            "chain": self.chain_settings,
            "pilot": self.pilot, "natural": self.natural,
            **({"noise_aware": {name: t.sha256 for name, t in self.bank.twins.items()}} if self.bank.twins else {}),
            # rows that were steered by the pilot's slopes alone are another run's
            **({"reader_slope_std": SPREAD} if self.bank.has_readers else {}),
            **({"rows": self.rows} if self.rows else {}),
        }  # fmt: skip
