"""Laws of who writes a run folder: one run at a time, and what is damaged is told apart from what is lost."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tiltlens import GaussianMixture, Linear, Projection, tilt
from tiltlens.errors import UserError
from tiltlens.guidance import DPS
from tiltlens.modules.run_writer import RunFolderWriter
from tiltlens.run_folder import RunFolder

PRIOR = ([1.0], [[0.0, 0.0]], [1.0])
ASK = {"n": 4, "energy": Linear(False), "guidance": DPS(), "pilot": 0, "steps": 6, "accelerator": "cpu"}


def sample(out, strengths=(0.0, 1.0), **others):
    return tilt(
        GaussianMixture(*PRIOR, points=60), Projection([1.0, 0.0]), strengths, out=out, **ASK | others
    )


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
