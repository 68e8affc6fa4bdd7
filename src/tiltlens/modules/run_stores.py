"""What a run keeps beside its samples: the pilot of each unit, what guidance learned from it, and a sampler's records.

A pilot is named by prior, unit and chain, a lesson by energy and guidance besides, and neither by the plan: with a cache, a
folder of the user's, other runs take them from there.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from warnings import warn

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiltlens.guidance.learned import Lesson
from tiltlens.run_folder import RunFolder
from tiltlens.sampling.pilot import UnitPilot
from tiltlens.units import Unit
from tiltlens.writing import whole_file

PILOT = ("prior", "chain", "pilot", "noise_aware")  # of a run's identity, what names a pilot
DAMAGED = (KeyError, TypeError, SafetensorError)  # what reading raises of a file that is not whole
LESSON = (*PILOT, "reader_slope_std", "energy", "guidance", "natural")


class PilotStore:
    """The pilot of each unit under DIR/pilot, and what guidance learned from it; both in module.cache too, where there is one.
    module: a SamplingModule that is loaded."""

    def __init__(self, folder: RunFolder, module: Any):
        self.path, self.cache = Path(folder.path) / "pilot", module.cache and Path(module.cache)
        self._identity = module.describe()

    def load_pilots(self, units: list[Unit]) -> list[UnitPilot] | None:
        """None unless every unit has its pilot."""
        return self._load(UnitPilot, [(self._file(u), self._shared(PILOT, u)) for u in units])

    def save_pilots(self, units: list[Unit], pilots: list[UnitPilot]) -> None:
        self._save(pilots, [(self._file(u), self._shared(PILOT, u)) for u in units])

    def load_lessons(self, units: list[Unit]) -> list[Lesson] | None:
        """None unless every unit has its lesson."""
        return self._load(Lesson, [(self._lesson(u), self._shared(LESSON, u)) for u in units])

    def save_lessons(self, units: list[Unit], lessons: list[Lesson]) -> None:
        self._save(lessons, [(self._lesson(u), self._shared(LESSON, u)) for u in units])

    def load_natural(self, units: list[Unit]) -> list[Tensor] | None:
        """Member activations (N, k) of each unit on the images of model.natural; None where they have not been read."""
        file = self.path / "natural.safetensors"
        found = _whole(load_file, file, "the natural images are read again") or {}
        return [found[u.slug] for u in units] if all(u.slug in found for u in units) else None

    def save_natural(self, units: list[Unit], members: list[Tensor]) -> None:
        with whole_file(self.path / "natural.safetensors") as part:
            save_file({u.slug: m.contiguous() for u, m in zip(units, members)}, part)

    def _file(self, unit: Unit) -> Path:
        return self.path / f"{unit.slug}.safetensors"

    def _lesson(self, unit: Unit) -> Path:
        return self.path / f"{unit.slug}.learned.safetensors"

    def _shared(self, names: tuple[str, ...], unit: Unit) -> Path | None:
        """Its place in the cache."""
        if self.cache is None:
            return None
        told = {k: self._identity.get(k) for k in names} | {"unit": self._identity["unit_sha256"][unit.name]}
        told |= {k: v for k, v in self._identity.items() if k == "rows"}  # where they were set
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        kind = "pilot" if names == PILOT else "learned"
        return self.cache / f"{unit.slug}-{digest[:16]}.{kind}.safetensors"

    def _load(self, kind: Any, files: list[tuple[Path, Path | None]]) -> list | None:
        found = []
        for own, shared in files:
            mine = _whole(kind.load, own, "it is made again")
            if mine is not None:
                found.append(mine)
            elif shared is None or not shared.exists():
                return None
            else:
                try:
                    found.append(kind.load(shared))
                except (OSError, ValueError, *DAMAGED):  # made again
                    return None
                _copy(shared, own)
        return found

    def _save(self, things: list, files: list[tuple[Path, Path | None]]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for thing, (own, shared) in zip(things, files):
            thing.save(own)
            if shared is not None:
                _copy(own, shared)


class RecordStore:
    """What a sampler recorded of each batch (`ChainSampler.recorded`), under DIR/records."""

    def __init__(self, folder: RunFolder):
        self.path = Path(folder.path) / "records"

    def save(self, record: dict[str, Tensor] | None) -> None:
        if record is None:
            return
        names = repr([record[k].tolist() for k in ("unit", "strength", "seed") if k in record])
        with whole_file(self.path / f"{hashlib.sha256(names.encode()).hexdigest()[:24]}.safetensors") as part:
            save_file(record, part)

    def load(self) -> list[dict[str, Tensor]]:
        lost = "the sampler's diagnostics leave its batch out"
        found = [_whole(load_file, file, lost) for file in sorted(self.path.glob("*.safetensors"))]
        return [record for record in found if record is not None]


def _whole(load: Callable[[Path], Any], file: Path, remedy: str) -> Any:
    """What is in a file; None where there is none, or where it is damaged: it is set aside then, with a warning."""
    if not file.exists():
        return None
    try:
        return load(file)
    except DAMAGED as error:
        aside = file.with_name(f"{file.name}.damaged")
        with suppress(FileNotFoundError):  # another rank was there first
            file.replace(aside)
        warn(f"{file} is damaged ({error}): set aside as {aside.name}, {remedy}", stacklevel=2)
        return None


def _copy(source: Path, target: Path) -> None:
    """Another run may do the same."""
    with whole_file(target) as part:
        shutil.copyfile(source, part)
