"""Which units of a bank are read by noise-aware twins: by the twins that are asked for, or by the bundled one where it fits."""

from collections.abc import Iterable
from pathlib import Path

from tiltlens.units.bank import UnitBank
from tiltlens.units.noise_aware import OtherTwinError, few, load_twin

AUTO = "auto"


def adopt_twins(bank: UnitBank, folders: Iterable[str | Path], prior_sha256: str) -> list[str]:
    """Gives a bank the twins of these folders. "auto" is the bundled one, where prior and encoder are those that it was trained
    for, and reads the units that it knows; any other has to fit. Returns what to tell: of "auto", what it does not read, and why.

    Raises as `load_twin` does, and ValueError for units of its encoder that a twin was not trained for.
    """
    notes = []
    for folder in folders:
        auto = str(folder) == AUTO
        try:
            twin = load_twin("bundled" if auto else folder, bank.encoders, prior_sha256)
        except OtherTwinError as other:
            if not auto:
                raise
            if bank.encoders:
                notes.append(
                    f"model.noise_aware = auto: the encoder itself reads clean estimates, for the bundled reader was trained {other.what}"
                )
            continue
        mine = [m for u in bank.units for m in u.members if m.encoder is not None]
        mine = [m for m in mine if m.encoder.fingerprint == twin.config.encoder["sha256"]]
        strange = list(dict.fromkeys(m.name for m in mine if not twin.reads(m)))
        if strange and not auto:
            raise ValueError(
                f"the noise-aware twin of {twin.config.encoder['name']} was trained for {few(twin.config.units)} alone, "
                f"found {', '.join(strange)}: train one for it, or leave it out"
            )
        if strange:
            notes.append(
                f"model.noise_aware = auto: the encoder itself reads clean estimates of {', '.join(strange)}, for the bundled reader "
                "was not trained for it"
            )
        if len(strange) < len({m.name for m in mine}):
            bank.adopt(twin)
    return notes
