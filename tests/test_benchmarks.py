"""The benchmarks at least load with the package as it is; that they run is a slow test."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
NEED_DATA = {
    "bundle_quality", "eye_and_judge", "make_bundle", "new_domain", "prior_quality", "sae_quality",
}  # fmt: skip


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda p: p.stem)
def test_loads(path):
    runpy.run_path(str(path), run_name="loaded")


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in BENCHMARKS if p.stem not in NEED_DATA], ids=lambda p: p.stem)
def test_quick(path, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, path, "--quick"], check=True, cwd=tmp_path, env=environment)
