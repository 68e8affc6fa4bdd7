"""The benchmarks at least load with the package as it is; that they run is a slow test."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from prior_folders import write_pixel

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
NEED_DATA = {
    "bundle_quality", "eye_and_judge", "make_bundle", "new_domain", "prior_quality", "sae_quality",
}  # fmt: skip


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_loads(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as for a script that is run
    runpy.run_path(str(path), run_name="loaded")


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in BENCHMARKS if p.stem not in NEED_DATA], ids=lambda p: p.stem)
def test_quick(path, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, path, "--quick"], check=True, cwd=tmp_path, env=environment)


def test_the_grid_of_the_readme_needs_no_data(tmp_path, monkeypatch, capsys):
    """As its caption says it, with fewer and shorter chains; figures ask for what they need."""
    write_pixel(tmp_path / "prior")
    quality = Path(__file__).parents[1] / "benchmarks" / "prior_quality.py"
    command = ["prior_quality.py", f"--prior={tmp_path / 'prior'}", "--n=4", "--steps=2"]
    monkeypatch.setattr("sys.argv", [*command, f"--grid={tmp_path / 'docs' / 'grid.png'}"])
    runpy.run_path(str(quality), run_name="__main__")
    assert Image.open(tmp_path / "docs" / "grid.png").size == (2 * (4 * (8 + 2) + 2), 2 * (8 + 4))
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit):
        runpy.run_path(str(quality), run_name="__main__")
    assert "figures need --data HELD_OUT" in capsys.readouterr().err
