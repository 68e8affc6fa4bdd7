"""The notebook's face, on the mixture and on the bundle."""

import math

import torch

import tiltlens
from tiltlens import GaussianMixture, Linear, Projection, Unit, tilt
from tiltlens.guidance import Exact


def test_tilt_gives_curve_images_and_report_and_agrees_with_the_closed_form(tmp_path):
    prior = GaussianMixture([0.6, 0.4], [[-1.0, 0.5], [1.0, 0.0]], [0.4, 0.3])
    direction = [1.0, -0.5]
    result = tilt(
        prior, Projection(direction), [0, 1.0], n=512, energy=Linear(standardise=False), guidance=Exact(),
        steps=150, spacing="index", pilot=0, batch_size=512, out=tmp_path / "run", accelerator="cpu",
    )  # fmt: skip
    zero, one = result.curve
    assert (zero["kl"], zero["path_kl"], zero["log_z"]) == (0, 0, 0)
    truth = float(prior.log_z(torch.tensor(direction), 1.0)), prior.kl(torch.tensor(direction), 1.0)
    for key, value in zip(("log_z", "kl"), truth):
        error = abs(one[key] - value)
        assert error < 4 * one[f"{key}_se"], (
            f"{key}: {one[key]:.4f} ± {one[f'{key}_se']:.4f}, truth {value:.4f}"
        )
    assert one["path_kl"] >= one["kl_lower"]
    assert result.images == {}
    page = result.report().read_text()
    assert "<html" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_unit_by_its_address():
    """And every other name of the face is there; one that is not is an AttributeError, as of any module."""
    unit = Unit("bundled,class=horse")
    assert (unit.name, str(unit.address)) == ("bundled,class=horse", "bundled,class=horse")
    assert isinstance(unit, tiltlens.units.Unit)
    assert all(callable(getattr(tiltlens, name)) for name in tiltlens.__all__)
    assert not hasattr(tiltlens, "Units")


def test_the_bundled_unit_rises_and_its_images_come_back(tmp_path):
    result = tilt(
        "bundled", "bundled,class=horse", [0, 8.0], n=4, steps=16, pilot=24, batch_size=4, out=tmp_path / "run",
        accelerator="cpu",
    )  # fmt: skip
    zero, tilted = result.curve
    assert tilted["z_mean"] > zero["z_mean"] + 1, (zero["z_mean"], tilted["z_mean"])
    assert result.images[8.0].shape == (4, 3, 32, 32)
    assert math.isfinite(tilted["path_kl"])
    assert (tmp_path / "run" / "grid_bundled_class-horse.png").exists() or result.report().exists()
