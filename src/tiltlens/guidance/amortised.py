"""Amortised guidance: a control that was trained for one unit, so that sampling it costs no gradient at all.

    x0_hat <- x0_hat + [adapted(x_t) - x0_hat(x_t)]

Two forwards a controlled step, one of the base denoiser and one of the adapted; no backward, no pass of the encoder. The shift is
fixed before the step's noise is drawn, so that path KL, log w, log Z and ESS are exact as for any other guidance, however
well or badly the control was trained; what training decides is the gap. `train.py fit` with
`tiltlens.modules.amortise_module.AmortiseModule` writes the folder:

    adapter/config.json            of which prior, unit, energy, strength and chain; see `AdapterConfig`
    adapter/adapter.safetensors    the control's parameters

There is no twist beside the shift: with `Particles` a group is weighted and resampled once, at the end, which they say.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tiltlens.constraint import Constraint, RowConstraint
from tiltlens.denoiser import Denoiser
from tiltlens.energies import Energy
from tiltlens.errors import UserError
from tiltlens.guidance.control import Adapter, Control, Head
from tiltlens.guidance.guidance import Guidance, Guided, PilotTables, Profile, Step, clean_estimate
from tiltlens.priors import lora
from tiltlens.priors.prior import Prior
from tiltlens.units.unit import Unit

CONFIG, WEIGHTS = "config.json", "adapter.safetensors"
FURTHEST = 2.0  # times the strength of training: a scaled adapter was measured to be of use up to about here


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter was trained for. kind: lora or head. prior, unit: name and fingerprint (sha256). energy: its class and
    settings. strength: s. chain: steps, eta, spacing, clip; of others the weights are exact too, the gap is not the least.
    until: the log-SNR up to which steps are controlled, None for all. trained: how, plain numbers."""

    kind: str
    prior: dict[str, str]
    unit: dict[str, str]
    energy: dict[str, Any]
    strength: float
    chain: dict[str, Any]
    until: float | None = None
    trained: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, control: Control, prior: Prior, constraint: Constraint, strength: float, chain: dict, until: float | None,
        trained: dict,
    ) -> "AdapterConfig":  # fmt: skip
        """Raises ValueError for more than one unit."""
        if len(constraint.bank.units) != 1:
            raise ValueError(f"an adapter is of one unit, found {len(constraint.bank.units)}")
        unit = constraint.bank.units[0]
        return cls(
            control.kind, {"name": prior.name, "fingerprint": prior.fingerprint},
            {"name": unit.name, "fingerprint": unit.fingerprint}, energy_of(constraint.energy), float(strength), chain, until, trained,
        )  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Raises UserError where the folder holds no adapter."""
        if not folder.is_dir() or not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
            found = (
                ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
            )
            raise UserError(
                f"guidance.adapter {folder}: expected a folder with {CONFIG} and {WEIGHTS}, as `train.py fit` of an "
                f"AmortiseModule writes to OUT/adapter; found {found or 'nothing in it'}"
            )
        try:
            return cls(**json.loads((folder / CONFIG).read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"guidance.adapter {folder / CONFIG}: not that of an adapter ({error})"
            ) from error

    def check(self, prior: Prior, units: Sequence[Unit], energy: Energy) -> None:
        """Raises UserError unless it was trained for this prior, unit and energy."""
        expected = {"prior": self.prior, "unit": self.unit}
        if len(units) != 1:
            raise UserError(
                f"an adapter is of one unit ({self.unit['name']}), this run has {len(units)}: sample them apart"
            )
        found = {
            "prior": {"name": prior.name, "fingerprint": prior.fingerprint},
            "unit": {"name": units[0].name, "fingerprint": units[0].fingerprint},
        }
        for what, mine in expected.items():
            if mine["fingerprint"] != found[what]["fingerprint"]:
                raise UserError(
                    f"guidance.adapter was trained for the {what} {mine['name']} ({mine['fingerprint'][:12]}), this run has "
                    f"{found[what]['name']} ({found[what]['fingerprint'][:12]}): train an adapter for it, or take Calibrated"
                )
        if self.energy != (mine := energy_of(energy)):
            raise UserError(
                f"guidance.adapter was trained for the energy {self.energy}, this run has {mine}: train an adapter for it"
            )


def energy_of(energy: Energy) -> dict[str, Any]:
    """Class and settings, as a manifest has them."""
    return {"class": type(energy).__name__, **vars(energy)}


def save_control(control: Control, config: AdapterConfig, folder: Path) -> Path:
    """Writes the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(control, Adapter):
        lora.save_adapter(control.network, folder / WEIGHTS)
    else:
        weights = {k: v.contiguous() for k, v in control.layers.state_dict().items()}
        safetensors.torch.save_file(weights, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    return folder


def load_control(folder: Path, base: Denoiser) -> Control:
    """What `save_control` wrote, for this denoiser. Raises UserError for one of another architecture."""
    config = AdapterConfig.read(folder)
    if config.kind == Adapter.kind:
        made = Adapter(base)
        lora.load_adapter(made.network, folder / WEIGHTS)
        return made
    weights = safetensors.torch.load_file(folder / WEIGHTS)
    made = Head(base, width=len(weights["0.bias"]))
    try:
        made.layers.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"guidance.adapter {folder}: of another architecture ({error})") from error
    return made


class Amortised(Guidance):
    """The control of an adapter folder. adapter: the folder. A row of another strength than that of training gets the
    adapter's product scaled by the ratio, up to twice; more is refused. Strength 0 is the base chain, to the bit."""

    has_twist = False

    def __init__(self, adapter: str, profile: list[float] | Profile | None = None):
        super().__init__(profile)
        self.adapter = str(adapter)
        self._config = AdapterConfig.read(Path(adapter))
        self.fingerprint = hashlib.sha256((Path(adapter) / WEIGHTS).read_bytes()).hexdigest()
        self.trained_at = self._config.strength
        self._control: Control | None = None
        self._scaled: dict[float, Control] = {}

    def check_target(
        self, prior: Prior, units: Sequence[Unit], energy: Energy, strengths: Sequence[float]
    ) -> None:
        self._config.check(prior, units, energy)
        for s in strengths:
            self._scale(s)

    def prepare(self, pilot: PilotTables | None, prior: Prior, constraint: Constraint) -> None:
        self._config.check(prior, constraint.bank.units, constraint.energy)
        self._control, self._scaled = load_control(Path(self.adapter), prior.denoiser), {}

    def outcome(self) -> list[dict]:
        return [{"adapter": dataclasses.asdict(self._config)}]

    def reads(self, step: Step, rows: RowConstraint) -> Tensor:
        until = self._config.until
        return super().reads(step, rows) & (until is None or float(step.schedule.log_snr[step.t]) <= until)

    def __call__(
        self, denoiser: Denoiser, x_t: Tensor, step: Step, rows: RowConstraint, memory: Any
    ) -> Guided:
        reads = self.reads(step, rows)
        with torch.no_grad():
            x0_hat = clean_estimate(denoiser, x_t, step.t, step.clip)
            if not bool(reads.any()):
                return Guided(x0_hat, None, memory)
            shift = torch.zeros_like(x0_hat)
            for s in rows.strength[reads].unique().tolist():
                mine = reads & (rows.strength == s)
                adapted = self._at(s).estimate(x_t[mine], step.t, x0_hat[mine])
                shift[mine] = (adapted.clamp(-1, 1) if step.clip else adapted) - x0_hat[mine]
        return Guided(x0_hat, self.weight(step) * shift, memory)

    def _scale(self, strength: float) -> float:
        scale = strength / self._config.strength
        if scale > FURTHEST * (1 + 1e-6):
            raise UserError(
                f"guidance.adapter was trained at strength {self._config.strength:g}: expected strengths up to "
                f"{FURTHEST:g} times that, found {strength:g}. Train an adapter at it, or take Calibrated"
            )
        return scale

    def _at(self, strength: float) -> Control:
        scale = self._scale(strength)
        if scale not in self._scaled:
            self._scaled[scale] = self._control.scaled(scale)
        return self._scaled[scale]
