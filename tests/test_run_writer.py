"""Laws of who writes a run folder: one run at a time, and what is damaged is told apart from what is lost."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tiltlens import GaussianMixture, Linear, Projection, tilt
from tiltlens.errors import UserError
from tiltlens.guidance import DPS, Learned
from tiltlens.modules.run_stores import PilotStore, RecordStore
from tiltlens.modules.run_writer import RunFolderWriter
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import NoiseSpace

PRIOR = ([1.0], [[0.0, 0.0]], [1.0])
ASK = {"n": 4, "energy": Linear(False), "guidance": DPS(), "pilot": 0, "steps": 6, "accelerator": "cpu"}


def sample(out, strengths=(0.0, 1.0), unit=None, **others):
    unit = unit or Projection([1.0, 0.0])
    return tilt(GaussianMixture(*PRIOR, points=60), unit, strengths, out=out, **ASK | others)


def test_the_manifest_names_the_device_that_samples(tmp_path):
    """Which is known when prediction starts, and not before; a run with nothing to sample leaves it."""
    writer = RunFolderWriter(str(tmp_path))
    trainer = SimpleNamespace(
        is_global_zero=True, strategy=SimpleNamespace(root_device=torch.device("meta")),
        datamodule=SimpleNamespace(remaining=lambda: [0]),
    )  # fmt: skip
    writer.on_predict_start(trainer, None)
    assert writer.folder.read_manifest()["device"].startswith("meta")
    sample(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.read_manifest()["device"].startswith("cpu")
    folder.write_manifest({"device": "another"})
    sample(tmp_path / "run")
    assert folder.read_manifest()["device"] == "another"


def test_one_run_at_a_time(tmp_path):
    """A second one is refused and touches nothing; after the first, its folder is free."""
    sample(tmp_path / "run")
    holder, before = RunFolder(tmp_path / "run"), sorted((tmp_path / "run").rglob("*"))
    holder.lock()
    holder.lock()
    holder.unlock()  # the outer lock is still there
    with pytest.raises(UserError, match=r"another run is writing .*run.* choose another --out"):
        sample(tmp_path / "run", [0.0, 1.0, 2.0])
    holder.unlock()
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert len(sample(tmp_path / "run", [0.0, 1.0, 2.0]).curve) == 3


def test_a_lock_ends_with_its_process(tmp_path):
    """However that ends; a lock that came to nothing leaves no folder."""
    code = (
        "import os, sys; from tiltlens.run_folder import RunFolder; RunFolder(sys.argv[1]).lock(); "
        "print('locked', flush=True); sys.stdin.read(); os._exit(9)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "locked\n"
        folder = RunFolder(tmp_path / "run")
        with pytest.raises(UserError, match="another run is writing"):
            folder.lock()
        other.stdin.close()
    assert (tmp_path / "run" / ".lock").exists()
    sample(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").exists()
    folder = RunFolder(tmp_path / "nothing")
    folder.lock()
    folder.unlock()
    assert not (tmp_path / "nothing").exists()


def test_an_error_frees_the_folder(tmp_path):
    dead = Projection([0.0, 0.0])
    with pytest.raises(ValueError, match="dead"):
        sample(tmp_path, unit=dead, energy=Linear(), pilot=8)
    assert not (tmp_path / ".lock").exists()
    sample(tmp_path)


@pytest.mark.parametrize("name", ["pilot", "lesson"])
def test_a_damaged_pilot_or_lesson_is_made_again(tmp_path, name):
    """The same, for it is deterministic; and what was damaged is kept aside."""
    ask = {"energy": Linear(), "guidance": Learned(), "pilot": 32}
    sample(tmp_path, **ASK | ask)
    pilot, lesson = sorted((tmp_path / "pilot").glob("*.safetensors"), key=lambda p: ".learned." in p.name)
    file = {"pilot": pilot, "lesson": lesson}[name]
    whole = {k: v.clone() for k, v in load_file(file).items()}  # not mapped: the file is written over
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"is damaged .* set aside as .*\.damaged, it is made again"):
        sample(tmp_path, [0.0, 1.0, 2.0], **ASK | ask)
    assert file.with_name(f"{file.name}.damaged").exists()
    assert all(torch.equal(whole[k].nan_to_num(), v.nan_to_num()) for k, v in load_file(file).items())


def test_damaged_natural_readings_and_records_are_set_aside(tmp_path):
    folder = RunFolder(tmp_path)
    unit = Projection([1.0, 0.0])
    store = PilotStore(folder, SimpleNamespace(cache=None, describe=dict))
    store.save_natural([unit], [torch.zeros(3, 1)])
    records = RecordStore(folder)
    for seed in (0, 1):
        records.save(
            {"unit": torch.tensor([0]), "strength": torch.tensor([1.0]), "seed": torch.tensor([seed])}
        )
    for file in (tmp_path / "pilot" / "natural.safetensors", next((tmp_path / "records").iterdir())):
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="the natural images are read again"):
        assert store.load_natural([unit]) is None
    with pytest.warns(UserWarning, match="leave its batch out"):
        assert len(records.load()) == 1
    assert len(records.load()) == 1  # with no second warning
    assert len(list(tmp_path.rglob("*.damaged"))) == 2


@pytest.mark.parametrize("name", ["manifest", "summary"])
@pytest.mark.parametrize("data", [b"", b'{"rows": [', b"\xff\xfe", b"[]"])
def test_a_damaged_json_file_is_named_with_its_remedy(tmp_path, name, data):
    (tmp_path / f"{name}.json").write_bytes(data)
    read = getattr(RunFolder(tmp_path), f"read_{name}")
    remedy = {"manifest": "choose another --out", "summary": "Remove it"}[name]
    with pytest.raises(UserError, match=rf"{name}\.json is damaged (.|\n)*{remedy}"):
        read()


def test_damaged_steps_are_lost_and_their_samples_are_not(tmp_path):
    """It is said once, and promises nothing."""
    sample(tmp_path)
    before = RunFolder(tmp_path).samples()
    (tmp_path / "steps.parquet").write_bytes(b"PAR1 not really")
    with pytest.warns(UserWarning, match="damaged") as told:
        again = sample(tmp_path)
    assert not any("sampled again" in str(w.message) for w in told)
    assert again.folder.samples().equals(before)
    assert again.folder.steps().num_rows == 0
    assert again.report().exists()
    assert (tmp_path / "steps.parquet.unreadable").exists()


def test_a_strength_at_which_guidance_did_not_act_is_told(tmp_path):
    """And one at which it did is not, nor a sampler that has no use for guidance."""

    def told(name, **others):
        return [
            w for w in sample(tmp_path / name, [0.0, 1.0, 2.0], **others).warnings if "guidance acted" in w
        ]

    (note,) = told("never", guidance=DPS(profile=[0.0, 1e-6]))
    assert "strengths 1, 2: the guidance acted at 0 of 6 steps" in note
    (note,) = told("one", steps=1)
    assert "acted at" in note
    assert told("always") == told("walk", sampler=NoiseSpace(2, 1, 1, 4)) == []
