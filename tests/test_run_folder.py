"""Laws of the run folder: what was written is read, whenever the writer stopped and whoever else wrote."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiltlens import Tilt, tilt
from tiltlens.run_folder import RunFolder, image_name, unit_slug

IDENTITY = {
    "prior": {"name": "toy", "sha256": "ab"},
    "chain": {"steps": 20, "eta": 1.0},
    "tokens": ["cls", 3],
}
RED = np.full((4, 4, 3), (255, 0, 0), np.uint8)


def row(unit="cat", strength=1.0, seed=0, **others):
    base = {
        "unit": unit,
        "strength": strength,
        "seed": seed,
        "activation": 0.5,
        "z": 1.5,
        "energy": -1.5,
    }
    return {**base, "log_w": 0.25, "path_kl": 0.75, "clipped": 0.0, "finite": True, "image": None, **others}


def steps(unit="cat", strength=1.0, seed=0, n=3):
    name = {"unit": unit, "strength": strength, "seed": seed}
    values = {"log_snr": -2.0, "guidance_norm": 0.1, "path_kl_step": 0.25}
    return [{**name, "step": k, "t": 9 - k, **values} for k in range(n)]


def files(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_rows_and_steps_come_back_the_same_before_and_after_consolidation(tmp_path):
    folder = RunFolder(tmp_path)
    rows = [row(seed=2), row(seed=0, log_w=None, path_kl=None), row("dog", 0.5, 7), row(seed=1, strength=0.0)]
    for one in rows:
        folder.write_part([one], steps(one["unit"], one["strength"], one["seed"]))
    expected = sorted(rows, key=lambda r: (r["unit"], r["strength"], r["seed"]))
    for _ in range(2):
        columns = expected[0].keys()
        assert [{c: r[c] for c in columns} for r in folder.samples().to_pylist()] == expected
        given = [s for r in expected for s in steps(r["unit"], r["strength"], r["seed"])]
        assert [{c: s[c] for c in given[0]} for s in folder.steps().to_pylist()] == given
        assert folder.done() == {(r["unit"], r["strength"], r["seed"]) for r in rows}
        folder.consolidate()
    assert pq.read_table(tmp_path / "samples.parquet").equals(folder.samples())
    assert not (tmp_path / "parts").exists()


def test_a_folder_from_before_a_column_was_added_is_read_with_nulls(tmp_path):
    """Whole and in parts; and it goes on."""
    folder, new = RunFolder(tmp_path), {"group", "weight", "copies", "ancestor", "ess", "ancestors"}
    folder.write_part([row()], steps())
    folder.consolidate()
    folder.write_part([row(seed=1)], steps(seed=1))
    for path in (tmp_path / "samples.parquet", tmp_path / "steps.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([c for c in table.column_names if c in new]), path)
    (part,) = (tmp_path / "parts").iterdir()
    table = pq.read_table(part)
    kept = [[{k: v for k, v in s.items() if k not in new} for s in r] for r in table["steps"].to_pylist()]
    old = table.drop_columns([c for c in table.column_names if c in new or c == "steps"])
    pq.write_table(old.append_column("steps", pa.array(kept)), part)
    for _ in range(2):
        assert [(r["seed"], r["copies"]) for r in folder.samples().to_pylist()] == [(0, None), (1, None)]
        assert [(s["step"], s["ess"]) for s in folder.steps().to_pylist()] == [
            (k, None) for k in range(3)
        ] * 2
        folder.consolidate()


def test_a_folder_of_nothing_is_done_with_nothing(tmp_path):
    folder = RunFolder(tmp_path / "absent")
    assert folder.done() == set()
    assert folder.read_manifest() == {}
    assert folder.samples().num_rows == folder.steps().num_rows == 0
    assert not (tmp_path / "absent").exists()


def test_a_row_sampled_again_replaces_the_old_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_part([row(activation=1.0), row(seed=1)], steps())
    folder.consolidate()
    folder.write_part([row(activation=2.0)], steps())
    for _ in range(2):
        assert folder.samples()["activation"].to_pylist() == [2.0, 0.5]
        assert folder.steps().num_rows == 3
        folder.consolidate()


@pytest.mark.parametrize("keep", [0, 20, 0.5, 0.99])
def test_a_damaged_part_is_done_again_and_costs_no_other_row(tmp_path, keep):
    folder = RunFolder(tmp_path)
    folder.write_part([row(seed=0)], steps())
    good = set((tmp_path / "parts").iterdir())
    folder.write_part([row(seed=1)])
    (part,) = set((tmp_path / "parts").iterdir()) - good
    whole = part.read_bytes()
    part.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.warns(UserWarning, match="damaged"):
        assert folder.done() == {("cat", 1.0, 0)}
    with pytest.warns(UserWarning, match="damaged"):
        folder.consolidate()
    assert folder.done() == {("cat", 1.0, 0)}  # set aside: no second warning
    folder.write_part([row(seed=1)])
    folder.consolidate()
    assert folder.done() == {("cat", 1.0, 0), ("cat", 1.0, 1)}


def test_a_damaged_samples_file_is_set_aside_not_overwritten(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_part([row(seed=0)])
    folder.consolidate()
    (tmp_path / "samples.parquet").write_bytes(b"PAR1 not really")
    folder.write_part([row(seed=1)])
    with pytest.warns(UserWarning, match="damaged"):
        folder.consolidate()
    assert folder.done() == {("cat", 1.0, 1)}
    assert (tmp_path / "samples.parquet.unreadable").exists()


@pytest.mark.parametrize("stop_at", [1, 2])
def test_consolidation_may_be_stopped_anywhere(tmp_path, monkeypatch, stop_at):
    folder = RunFolder(tmp_path)
    folder.write_part([row(seed=0)], steps())
    folder.consolidate()
    folder.write_part([row(seed=1)], steps(seed=1))
    before = folder.samples(), folder.steps()
    calls = iter(range(1, 9))
    write = RunFolder._write_table

    def stopped(self, name, table):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        write(self, name, table)

    monkeypatch.setattr(RunFolder, "_write_table", stopped)
    with pytest.raises(KeyboardInterrupt):
        folder.consolidate()
    monkeypatch.undo()
    for _ in range(2):
        assert (folder.samples(), folder.steps()) == before
        folder.consolidate()


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.write("report.html", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        folder.write("report.html", "new")
    assert files(tmp_path) == {next(iter(files(tmp_path))): b"old"}


def test_two_writers_at_once_lose_nothing(tmp_path):
    def write(rank):
        folder = RunFolder(tmp_path)
        folder.claim(IDENTITY)
        for batch in range(5):
            seeds = [100 * rank + 10 * batch + k for k in range(3)]
            folder.write_part([row(seed=s) for s in seeds], [s for seed in seeds for s in steps(seed=seed)])
            folder.done()
        return folder

    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(write, range(4)))
    assert len(folders[0].done()) == 60
    folders[0].consolidate()
    assert len(folders[1].done()) == 60
    assert folders[2].steps().num_rows == 180
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_row_is_listed_only_with_its_image(tmp_path):
    folder = RunFolder(tmp_path)
    name = image_name("cat", 1.0, 0)
    with pytest.raises(ValueError, match="before its image"):
        folder.write_part([row(image=name)])
    folder.save_image(name, RED)
    folder.write_part([row(image=name)])
    assert folder.done() == {("cat", 1.0, 0)}
    (tmp_path / name).unlink()
    assert folder.done() == set()


@pytest.mark.parametrize("array", [RED / 255, RED[..., 0], np.zeros((3, 4, 4), np.uint8)])
def test_an_image_is_rgb_bytes(tmp_path, array):
    with pytest.raises(ValueError, match="uint8"):
        RunFolder(tmp_path).save_image("images/x.png", array)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row() | {"activaton": 1.0}], "activaton"),
        ([{k: v for k, v in row().items() if k != "energy"}], "energy"),
        ([row(unit=None)], "unit"),
        ([row(seed="three")], "types"),
    ],
)
def test_rows_of_another_form_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        RunFolder(tmp_path).write_part(rows)
    assert not (tmp_path / "parts").exists()


def test_a_step_needs_its_row(tmp_path):
    with pytest.raises(ValueError, match="without its row"):
        RunFolder(tmp_path).write_part([row(seed=1)], steps(seed=2))


def test_no_two_samples_share_an_image_name():
    strengths = [0.0, 1.0, 1 + 1e-9, 0.1, 0.1 + 1e-12, 1e-7, 1e20, 123456.0, 1234567.0, 1234568.0]
    strengths += np.nextafter(strengths, np.inf).tolist()
    units = ["cat", "Cat", "c at", "c/at", "c-at", "é", "è", "", "a" * 80, "a" * 81, "enc:blocks.3/cls:17"]
    names = {image_name(unit_slug(u), s, k) for u in units for s in strengths for k in (0, 1, 11)}
    assert len(names) == len(units) * len(strengths) * 3
    assert len({n.lower() for n in names}) == len(names)  # some disks do not tell A from a
    assert image_name("cat", -0.0, 1) == image_name("cat", 0, 1) == "images/cat_s0_seed1.png"


def test_the_same_settings_resume_and_the_plan_may_grow(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    assert folder.claim(IDENTITY) is False
    assert folder.read_manifest()["state"] == "running"
    assert folder.claim({**IDENTITY, "tokens": ("cls", 3)}) is False  # nothing sampled yet
    folder.write_part([row()])
    folder.write_manifest({"state": "complete", "device": "cpu"})
    assert folder.claim(IDENTITY) is True
    assert folder.read_manifest() == {"identity": IDENTITY, "state": "running", "device": "cpu"}


def test_other_settings_are_refused_one_by_one_and_nothing_is_touched(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim(IDENTITY)
    folder.write_manifest({"state": "complete"})
    before = files(tmp_path)
    asked = {
        "prior": {"name": "toy", "sha256": "cd"},
        "chain": {"steps": 50, "clip": True},
        "tokens": ["cls", 3],
    }
    with pytest.raises(ValueError, match="other settings") as error:
        folder.claim(asked)
    listed = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert listed == [
        "chain.clip: not set in the folder, True asked for",
        "chain.eta: 1.0 in the folder, not set asked for",
        "chain.steps: 20 in the folder, 50 asked for",
        "prior.sha256: 'ab' in the folder, 'cd' asked for",
    ]
    assert files(tmp_path) == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match=r"not a run folder.*thesis\.tex"):
        RunFolder(tmp_path).claim(IDENTITY)
    assert len(files(tmp_path)) == 1


def test_the_state_is_one_of_three(tmp_path):
    with pytest.raises(ValueError, match="running, complete, incomplete"):
        RunFolder(tmp_path).write_manifest({"state": "done"})


def test_curve_and_summary_say_the_same_without_nan(tmp_path):
    folder = RunFolder(tmp_path)
    given = {"unit": "cat", "strength": np.float32(2), "n": np.int64(3), "kl": math.nan, "ess": math.inf}
    folder.write_curve(
        [
            {**given, "log_z": 0.5, "kl_method": "mbar", "target": 0.999},
            {"unit": "cat", "strength": 4.0, "n": 1},
        ],
        natural={"cat": {"n": 9, "activation_std": np.float64("nan")}},
        warnings=["cat: ESS 1.0"],
    )
    text = (tmp_path / "summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
    assert summary == folder.read_summary()
    assert summary["rows"] == pq.read_table(tmp_path / "curve.parquet").to_pylist()
    first, second = summary["rows"]
    assert (first["strength"], first["n"], first["kl"], first["ess"], first["target"]) == (
        2.0,
        3,
        None,
        None,
        0.999,
    )
    wanted = (
        "unit strength n activation_mean activation_se energy_mean energy_se path_kl path_kl_se kl_lower kl "
        "kl_se log_z log_z_se ess gap seconds z_mean z_se kl_method kl_lower_se gap_se efficiency nonfinite"
    )
    assert set(wanted.split()) <= set(first) == set(second)
    assert summary["natural"]["cat"] == {"n": 9, "activation_std": None}
    assert summary["warnings"] == ["cat: ESS 1.0"]


def test_the_run_folder_stands_on_the_ground():
    heavy = {"torch", "lightning", "wandb", "matplotlib"}
    code = f"import sys, tiltlens.run_folder; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_images_are_those_of_the_output_in_the_order_of_the_curve(tmp_path):
    """Units as they were asked for, not by name; a particle once a copy, and one that died not at all."""
    folder, rows = RunFolder(tmp_path), []
    folder.claim({})
    shades = {("b", 0): (10, 2), ("b", 1): (20, 0), ("a", 0): (30, 1), ("a", 1): (40, 1)}
    for (unit, seed), (shade, copies) in shades.items():
        name = image_name(unit_slug(unit), 1.0, seed)
        folder.save_image(name, np.full((2, 2, 3), shade, np.uint8))
        row = {"unit": unit, "strength": 1.0, "seed": seed, "activation": 0.0, "energy": 0.0, "finite": True}
        rows.append(row | {"image": name, "group": 0, "weight": copies / 2, "copies": copies})
    folder.write_part(rows)
    folder.consolidate()
    folder.write_curve([{"unit": unit, "strength": 1.0, "n": 2} for unit in ("b", "a")])
    (images,) = Tilt(folder).images.values()
    assert ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == [10, 10, 30, 40]


@pytest.mark.parametrize("wrong", [{"guidance": "DPS"}, {"energy": "Target"}])
def test_a_name_in_place_of_an_object_is_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .*expected an object of tiltlens"):
        tilt("bundled", "bundled,class=horse", out=tmp_path / "run", **wrong)
