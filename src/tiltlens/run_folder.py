"""The run folder: the contract between sampling, dashboards and scripts.

    DIR/config.yaml      what was asked                DIR/samples.parquet  a row a sample
    DIR/manifest.json    what it was asked of          DIR/steps.parquet    a row a step of a sample
    DIR/images/…png      one file a sample             DIR/curve.parquet    a row a (unit, strength)
    DIR/pilot/           unguided calibration runs     DIR/summary.json     the same rows, for scripts
    DIR/parts/…parquet   batches not yet consolidated  DIR/report.html, DIR/grid_….png

Every file is written under a temporary name and renamed, so that a reader sees a whole file or none. A batch
is one part, named by the samples in it: several ranks may write at once, a repeated batch replaces its own
part, and a row that is listed has its image. One process consolidates. One run at a time: it holds DIR/.lock.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from warnings import warn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tiltlens import run_tables
from tiltlens.errors import UserError
from tiltlens.run_lock import LOCK, RunLock, writing
from tiltlens.run_tables import CURVE, KEY, SAMPLES, STEP_KEY, STEPS, as_json, as_table, merge

STATES = ("running", "complete", "incomplete")


def unit_slug(unit: str) -> str:
    """A unit's address as a part of a file name; a short hash keeps apart what the letters no longer do."""
    slug = re.sub(r"[^a-z0-9]+", "-", unit.lower()).strip("-")[:60].strip("-")
    if slug == unit:
        return slug
    return f"{slug}-{hashlib.sha256(unit.encode()).hexdigest()[:6]}".lstrip("-")


def image_name(slug: str, strength: float, seed: int) -> str:
    """images/{slug}_s{strength}_seed{seed}.png; two different strengths never share a name.

    >>> image_name("cat", 8.0, 3), image_name("cat", 0.1234567891, 3)
    ('images/cat_s8_seed3.png', 'images/cat_s0.1234567891_seed3.png')
    """
    strength = float(strength) + 0.0  # -0.0 is 0.0
    short = f"{strength:g}"
    return f"images/{slug}_s{short if float(short) == strength else repr(strength)}_seed{seed}.png"


class RunFolder:
    """Reads and writes DIR. Nothing is created before `claim` or a first write.

    Columns of samples: unit, strength, seed, activation, z, energy, log_w, path_kl, clipped, seconds, finite,
    image; of particles also group, weight, copies, ancestor.
    Columns of steps: unit, strength, seed, step, t, log_snr, guidance_norm, path_kl_step; of particles also ess, ancestors.
    """

    image_name = staticmethod(image_name)

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._lock = RunLock(self.path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # -- whole files --

    @contextmanager
    def _renamed(self, name: str):
        """A path to write to, which becomes DIR/name if the block ends well and nothing if it does not."""
        path = self.path / name
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield temporary
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def write(self, name: str, data: str | bytes) -> Path:
        """DIR/name with this text (UTF-8) or these bytes."""
        with self._renamed(name) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        return self.path / name

    def _write_table(self, name: str, table: pa.Table) -> None:
        with self._renamed(name) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def write_config(self, text: str) -> None:
        """config.yaml, as the caller wrote it."""
        self.write("config.yaml", text)

    def save_image(self, name: str, array: np.ndarray) -> None:
        """DIR/name as PNG. array: (H, W, 3) uint8. Raises ValueError for another shape or type."""
        array = np.asarray(array)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"an image is (H, W, 3) uint8; found {array.shape} {array.dtype} for {name}")
        buffer = BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        self.write(name, buffer.getvalue())

    # -- whose folder it is --

    def lock(self) -> None:
        """Keep every other run out until `unlock`; may be nested. Raises UserError where another run has the folder, or where
        it cannot be written."""
        self._lock.take()

    def unlock(self) -> None:
        """Let other runs in; a folder that was made for the lock alone is taken away."""
        self._lock.give_up()

    def claim(self, identity: dict) -> bool:
        """Take the folder for a run; True if it already holds rows of the same run, to be resumed.

        identity: a JSON dict of the settings that make a sample what it is, without the plan (strengths, n),
        which may grow. An absent or empty folder is created, one that was released is taken. Raises ValueError, and writes
        nothing, if the folder holds a run with other settings (each is listed) or files that are no run.
        """
        identity = json.loads(as_json(identity))
        # Listed before the manifest is read: another rank may be claiming, and that is its first file.
        found = []
        if self.path.exists():
            found = [p.name for p in self.path.iterdir() if p.suffix != ".tmp" and p.name != LOCK]
        manifest = self.read_manifest()
        if not manifest:
            if found:
                raise ValueError(
                    f"{self.path} is not a run folder: expected an empty or absent folder, or one with a "
                    f"manifest.json; found {', '.join(sorted(found)[:5])}. Choose another --out."
                )
            self.write_manifest({"identity": identity, "state": "running"})
            return False
        if not manifest.get("identity"):  # released
            self.write_manifest({"identity": identity, "state": "running"})
            return False
        differing = list(run_tables.differences(manifest.get("identity", {}), identity))
        if differing:
            raise ValueError(
                f"{self.path} holds a run with other settings; nothing was changed. Choose another --out, or "
                "ask for the same:\n" + "\n".join(f"  {line}" for line in differing)
            )
        if manifest.get("state") != "running":
            self.write_manifest({"state": "running"})
        return (self.path / "samples.parquet").exists() or any((self.path / "parts").glob("*.parquet"))

    def release(self) -> bool:
        """Give up a claim that came to nothing, a mistake in the settings say, so that the folder can be taken with others; its
        pilot goes with it. False, and nothing is changed, where rows are there."""
        if (self.path / "samples.parquet").exists() or any((self.path / "parts").glob("*.parquet")):
            return False
        shutil.rmtree(self.path / "pilot", ignore_errors=True)
        self.write("manifest.json", as_json({"state": "incomplete"}))
        return True

    def read_manifest(self) -> dict:
        """manifest.json, or {} if there is none. Raises UserError for a damaged one."""
        told = "it says which run's samples these are. Restore it from a copy, or choose another --out"
        return _read_json(self.path / "manifest.json", told) or {}

    def write_manifest(self, entries: dict) -> None:
        """Set these top-level entries of manifest.json and keep the others. "state" is one of STATES."""
        if entries.get("state", STATES[0]) not in STATES:
            raise ValueError(f"state {entries['state']!r}: expected one of {', '.join(STATES)}")
        self.write("manifest.json", as_json({**self.read_manifest(), **entries}))

    # -- samples and steps --

    def write_part(self, rows: list[dict], steps: Iterable[dict] = ()) -> None:
        """One batch of samples with their steps, in one file. Their images must have been saved before.

        rows, steps: dicts by column name; z, log_w, path_kl, clipped, seconds and image, and the floats of
        steps, may be None or left out. Raises ValueError for unknown or missing columns, for a step of no
        row, and for a row whose image is not there.
        """
        if not rows:
            return
        table = run_tables.join_part(rows, steps)
        for name in table["image"].to_pylist():
            if name is not None and not (self.path / name).is_file():
                raise ValueError(f"the row of {name} was written before its image: call save_image first")
        digest = hashlib.sha256(repr(sorted(run_tables.names_of(table))).encode()).hexdigest()
        self._write_table(f"parts/{digest[:24]}.parquet", table)

    def samples(self) -> pa.Table:
        """All rows so far, sorted by (unit, strength, seed), whether consolidated or not."""
        parts = self._read_parts(SAMPLES.names)
        return self._with_whole("samples.parquet", list(parts.values()), SAMPLES, KEY)

    def steps(self) -> pa.Table:
        """All recorded steps so far, sorted by (unit, strength, seed, step)."""
        parts = self._read_parts([*KEY, "steps"])
        tables = [run_tables.steps_of(part) for part in parts.values()]
        return self._with_whole("steps.parquet", tables, STEPS, STEP_KEY)

    def done(self) -> set[tuple[str, float, int]]:
        """The samples that need not be drawn again: those with a row whose image, if it has one, is there."""
        table = self.samples()
        images = {f"images/{p.name}" for p in (self.path / "images").glob("*.png")}
        listed = zip(run_tables.names_of(table), table["image"].to_pylist())
        return {name for name, image in listed if image is None or image in images}

    def consolidate(self) -> None:
        """Merge all parts into samples.parquet and steps.parquet, then remove them. One process at a time.

        A damaged file is set aside as NAME.unreadable. Rows of samples are not in `done` then; steps are lost.
        """
        parts = self._read_parts(None, set_aside=True)
        if not parts and (self.path / "samples.parquet").exists():
            _read(self.path / "steps.parquet", None, set_aside=True)
            return
        # Steps first: a row that is listed has its steps. Stopped anywhere, the parts are merged once more.
        for name, schema, key, half in (
            ("steps.parquet", STEPS, STEP_KEY, run_tables.steps_of),
            ("samples.parquet", SAMPLES, KEY, lambda part: part.drop_columns("steps")),
        ):
            tables = [half(part) for part in parts.values()]
            self._write_table(name, self._with_whole(name, tables, schema, key, set_aside=True))
        for path in parts:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # not there, or not empty: another rank is writing
            (self.path / "parts").rmdir()

    def _read_parts(self, columns: list[str] | None, set_aside: bool = False) -> dict[Path, pa.Table]:
        paths = sorted((self.path / "parts").glob("*.parquet"))
        tables = {path: _read(path, columns, set_aside) for path in paths}
        return {path: table for path, table in tables.items() if table is not None}

    def _with_whole(self, name: str, parts: list[pa.Table], schema, key, set_aside: bool = False) -> pa.Table:
        # Read after the parts: rows move from there to here, never back, so that none is missed.
        whole = _read(self.path / name, None, set_aside)
        return merge(parts if whole is None else [whole, *parts], schema, key)

    # -- results --

    def write_curve(
        self, rows: list[dict], natural: dict | None = None, warnings: Iterable[str] = ()
    ) -> None:
        """curve.parquet and summary.json from the same rows, one a (unit, strength); NaN and inf are null.

        rows: dicts with the columns of `run_tables.CURVE`, None or left out where undefined; others stay.
        natural: by unit, what is natural: {"mean", "std", "n", "from": "pilot" or an image folder, …}.
        """
        table = as_table([run_tables.finite(row) for row in rows], CURVE, "rows of the curve", extra=True)
        self._write_table("curve.parquet", table)
        summary = {"rows": table.to_pylist(), "natural": natural or {}, "warnings": list(warnings)}
        self.write("summary.json", as_json(summary))

    def read_summary(self) -> dict:
        """summary.json: rows, natural, warnings; each empty if there is none. Raises UserError for a damaged one."""
        told = "it is made from samples.parquet. Remove it and give the run's own command again, which samples nothing twice"
        return _read_json(self.path / "summary.json", told) or {"rows": [], "natural": {}, "warnings": []}


def _read_json(path: Path, remedy: str) -> dict | None:
    """None where there is no such file. Raises UserError with this remedy for one that is not an object of JSON."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where an object was expected")
        return found
    except ValueError as error:  # of JSON, and of UTF-8
        raise UserError(f"{path} is damaged ({error}): {remedy}") from error


def _read(path: Path, columns: list[str] | None, set_aside: bool) -> pa.Table | None:
    """None where the file is gone (another process consolidated) or, with a warning, where it is damaged."""
    try:
        return pq.ParquetFile(path).read(columns)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the disk or a permission, not the file
        lost = "its rows will be sampled again"
        if path.name == "steps.parquet":
            lost = "the samples are whole, what it recorded of their steps is lost; another --out records it again"
        warn(f"{path} is damaged ({error}); {lost}", stacklevel=2)
    if set_aside:
        path.rename(path.with_name(f"{path.name}.unreadable"))
    return None
