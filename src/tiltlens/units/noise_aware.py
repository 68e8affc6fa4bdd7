"""Noise-aware twins: who reads clean estimates in an encoder's place.

What guidance needs of a unit at noise level t is E[a(x_0) | x_t], and above all its gradient; a(x0_hat), the encoder on the
clean estimate, is neither, for it was trained on sharp images and not on blurred ones. A twin has the encoder's
architecture and other weights, trained (`tiltlens.modules.noise_aware_module`) so that every layer's output on x0_hat is
the expected output on x_0 (the noise-aware classifier of Dhariwal and Nichol, 2021, as a regression of all units at once). It
serves guidance alone: the activation of a sample is always the encoder's own, so that all weights stay exact. For a few
units alone the twin is a `UnitReader`, which knows the noise level and may be of another architecture than the encoder.

    FOLDER/config.json          whose twin it is, under which prior, and the range of log-SNR that it was trained for
    FOLDER/model.safetensors    its weights, float16
"""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tiltlens.units.address import Address
from tiltlens.units.encoder import Encoder
from tiltlens.units.reader import UnitReader
from tiltlens.units.sources import load_encoder
from tiltlens.units.unit import EncoderUnit, Unit
from tiltlens.units.weights import fingerprint, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BUNDLED = Path(str(files("tiltlens"))) / "bundled" / "noise-aware"
PRECISE = ("mean", "std")  # of a reader: raw activations may be beyond half precision


@dataclass(frozen=True)
class TwinConfig:
    """encoder, prior: name and sha256. log_snr: (lowest, highest) level at which the twin reads; outside the encoder itself
    does. units: those that it was trained for, by their `place`, None for all. network: of a reader of these units, None for the
    encoder's own architecture; layers: those that its heads read, None for its output. trained: how, and what came of it."""

    encoder: dict[str, str]
    prior: dict[str, str]
    log_snr: tuple[float, float]
    units: list[str] | None = None
    network: str | None = None
    layers: list[str | None] | None = None
    trained: dict[str, Any] = field(default_factory=dict)


class OtherTwinError(ValueError):
    """A twin that is whole, of another encoder or under another prior than the run's. what: in which of the two it differs, and
    its own name."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


class NoiseAware(nn.Module):
    """The twin of one encoder. sha256: of its weights, and of the levels and units that it reads."""

    def __init__(self, twin: Encoder | UnitReader, config: TwinConfig):
        super().__init__()
        self.twin, self.config = twin, config
        read = f"{fingerprint(_state(twin))} {config.log_snr} {config.units}"
        self.sha256 = hashlib.sha256(read.encode()).hexdigest()
        known = [Address.parse(f"bundled,{u}") for u in config.units or []]
        self._columns = {same_unit(a): k for k, a in enumerate(known)}

    def at(self, log_snr: float) -> bool:
        """Whether the twin reads at this noise level."""
        low, high = self.config.log_snr
        return low <= log_snr <= high

    def reads(self, unit: EncoderUnit) -> bool:
        """Whether it was trained for this unit of its encoder."""
        return self.config.units is None or same_unit(unit.address) in self._columns

    def read(self, members: Sequence[Unit], images: Tensor, log_snr: float) -> dict[Unit, Tensor]:
        """Raw activations (B,) of these units, float32 or better. Differentiable."""
        if isinstance(self.twin, UnitReader):
            members = list(dict.fromkeys(members))
            values = self.twin.read(images, log_snr, [self._columns[same_unit(m.address)] for m in members])
            return dict(zip(members, values.unbind(1)))
        outputs = self.twin.activations(images, list(dict.fromkeys(m.address.layer for m in members)))
        return {m: m.read(outputs[m.address.layer]) for m in members}


def place(unit: EncoderUnit) -> str:
    """Its address without the encoder, which sha256 names better than any path: class=horse."""
    return str(replace(unit.address, encoder="bundled", weights=None)).partition(",")[2]


def same_unit(address: Address) -> tuple:
    """Equal for addresses of one unit of one encoder, however much of the default tokens and reduction they spell out."""
    tokens, reduction = address.tokens or "patch", address.reduction
    single = tokens == "cls" or tokens.startswith("cell")
    if single or (tokens != "map" and reduction == "mean"):
        reduction = None
    return address.layer, tokens, reduction, address.kind, address.value


def few(units: Sequence[str], most: int = 6) -> str:
    """Units as an error names them: so many at most."""
    more = f" and {len(units) - most} more" if len(units) > most else ""
    return ", ".join(units[:most]) + more


def twin_folder(name: str | Path) -> Path:
    """A folder, or that of "bundled". Raises FileNotFoundError where no twin lies in it."""
    folder = BUNDLED if str(name) == "bundled" else Path(name)
    if not all((folder / file).is_file() for file in (CONFIG, WEIGHTS)):
        raise FileNotFoundError(
            f"model.noise_aware {name}: expected a folder with {CONFIG} and {WEIGHTS}, as `train.py fit` of a "
            "NoiseAwareModule writes to OUT/noise-aware"
        )
    return folder


def twin_of(encoder: Encoder) -> Encoder:
    """A copy with weights of its own, frozen; it begins as the encoder."""
    return copy.deepcopy(encoder).requires_grad_(False)


def reader_of(
    encoder: Encoder, members: Sequence[EncoderUnit], network: str | None, layers: Sequence[str | None] | None
) -> UnitReader:
    """A reader of these units of the encoder, by a copy of it, or of `network` with heads on `layers` (its output where None).
    Raises ValueError for units of another encoder, and for what `load_encoder` would refuse."""
    strange = [m.name for m in members if m.encoder is not encoder]
    if strange:
        raise ValueError(
            f"{', '.join(strange)}: not of the encoder {encoder.name}; a twin is of one encoder, and reads its units"
        )
    if network is None:
        return UnitReader(twin_of(encoder), members)
    return UnitReader(twin_of(load_encoder(network)), members, list(layers or [None]))


def _state(twin: Encoder | UnitReader) -> dict[str, Tensor]:
    return (twin.model if isinstance(twin, Encoder) else twin).state_dict()


def save_twin(twin: Encoder | UnitReader, config: TwinConfig, folder: Path) -> Path:
    """Writes the folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        k: (v.half() if v.is_floating_point() and k not in PRECISE else v).contiguous().cpu()
        for k, v in _state(twin).items()
    }
    save_file(half, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1) + "\n")
    return folder


def load_twin(folder: str | Path, encoders: Iterable[Encoder], prior_sha256: str) -> NoiseAware:
    """The twin in a folder, or the "bundled" one, of one of these encoders and under this prior. Raises
    FileNotFoundError where there is none, OtherTwinError for one of another encoder or prior, and ValueError with weights that do
    not fit."""
    folder = twin_folder(folder)
    try:
        told = json.loads((folder / CONFIG).read_text())
        config = TwinConfig(**told | {"log_snr": tuple(float(x) for x in told["log_snr"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"model.noise_aware {folder / CONFIG}: not that of a noise-aware twin ({error})"
        ) from error
    encoders = list(encoders)
    mine = next((e for e in encoders if e.fingerprint == config.encoder["sha256"]), None)
    if mine is None:
        found = ", ".join(f"{e.name} ({e.fingerprint[:12]})" for e in encoders) or "none"
        raise OtherTwinError(
            f"model.noise_aware {folder}: expected the encoder it was trained for, {config.encoder['name']} "
            f"({config.encoder['sha256'][:12]}), found {found}: train one for this encoder, or leave it out",
            f"for the encoder {config.encoder['name']}",
        )
    if prior_sha256 != config.prior["sha256"]:
        raise OtherTwinError(
            f"model.noise_aware {folder} was trained under the prior {config.prior['name']} "
            f"({config.prior['sha256'][:12]}), this run has {prior_sha256[:12]}: train one under this prior, or leave it out",
            f"under the prior {config.prior['name']}",
        )
    weights = read_weights(str(folder / WEIGHTS))
    twin = twin_of(mine)
    if config.units:
        units = [EncoderUnit(Address.parse(f"bundled,{u}")).load(mine) for u in config.units]
        twin = reader_of(mine, units, config.network, config.layers)
    try:
        (twin if config.units else twin.model).load_state_dict(
            {k: v.to(torch.float32) if v.is_floating_point() else v for k, v in weights.items()}
        )
    except RuntimeError as error:
        raise ValueError(f"model.noise_aware {folder}: of another architecture ({error})") from error
    return NoiseAware(twin.requires_grad_(False), config)
