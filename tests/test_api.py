"""The notebook's face, on the mixture and on the bundle."""

import inspect
import math

import numpy as np
import pytest
import torch
import yaml

import tiltlens
from tiltlens import GaussianMixture, Linear, Projection, Target, Unit, tilt
from tiltlens.guidance import DPS, Exact
from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.modules.spelled import UnspeakableError, spell
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import Particles
from tiltlens.units import Encoder, build_unit, register_encoder


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


def test_config_yaml_repeats_the_run_by_sample_py(tmp_path):
    """The same run, by its identity, and so the same samples."""
    prior = GaussianMixture([3.0, 4.0], [[-1.0, 0.5], [1 / 3, 0.0]], [0.4, 0.3], points=60)
    units = [Projection([1.0, -0.1]), "0.3*projection[1,0] + 0.7*projection[0,1]"]
    one = tilt(
        prior, units, np.array([0.0, 0.5]), np.int64(4), energy=Target("z=1", 0.7), guidance=DPS(profile=(0.1, 1.0)),
        sampler=Particles(2), steps=6, pilot=8, rows=4, out=tmp_path / "one", accelerator="cpu",
    )  # fmt: skip
    told = yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["model"]
    unset = {"natural", "noise_aware", "cache", "prompt"}  # every other argument is told
    assert told.keys() | unset >= inspect.signature(SamplingModule).parameters.keys()
    main([f"--config={tmp_path / 'one' / 'config.yaml'}", f"--out={tmp_path / 'two'}"])
    two = RunFolder(tmp_path / "two")
    assert two.read_manifest()["identity"] == one.folder.read_manifest()["identity"]
    assert two.samples().drop_columns("seconds").equals(one.folder.samples().drop_columns("seconds"))


def test_what_no_file_can_name_is_said_in_config_yaml_and_refused(tmp_path, capsys):

    class Own(GaussianMixture):
        pass

    tilt(
        Own([1.0], [[0.0]], [1.0], points=60), Projection([1.0]), [0.0, 1.0], 4, guidance=DPS(profile=lambda t: t),
        steps=6, pilot=8, out=tmp_path / "one", accelerator="cpu",
    )  # fmt: skip
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert "# model.prior is an object in memory" in text
    assert "# model.guidance is an object in memory" in text
    with pytest.raises(SystemExit):
        run(lambda: main([f"--config={tmp_path / 'one' / 'config.yaml'}", f"--out={tmp_path / 'two'}"]))
    assert "in memory" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_units_are_spelled_so_that_they_read_back(tmp_path):
    """Whatever their form; an encoder that this process alone knows has none."""
    keys = {"encoder": "bundled", "layer": "blocks.3", "tokens": "cls", "unit": 5}
    long = Projection([1 / 3] * 12)
    for asked in (
        keys,
        "bundled,class=cat and not bundled,class=dog",
        long,
        f"-2*{spell(long)} + 1*projection[1]",
    ):
        unit = build_unit(asked)
        assert build_unit(yaml.safe_load(yaml.safe_dump(spell(unit)))).name == unit.name
    register_encoder(Encoder(torch.nn.Flatten(), 8, name="in-this-process"))
    with pytest.raises(UnspeakableError, match="in-this-process was registered in this process"):
        spell(build_unit("in-this-process,channel=0"))


def test_the_bundled_unit_rises_and_its_images_come_back(tmp_path):
    result = tilt(
        "bundled", "bundled,class=horse", [0, 8.0], n=4, steps=12, pilot=16, batch_size=4, out=tmp_path / "run",
        accelerator="cpu",
    )  # fmt: skip
    zero, tilted = result.curve
    assert tilted["z_mean"] > zero["z_mean"] + 1, (zero["z_mean"], tilted["z_mean"])
    assert result.images[8.0].shape == (4, 3, 32, 32)
    assert math.isfinite(tilted["path_kl"])
    assert result.report() == tmp_path / "run" / "report.html"
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "grid_bundled_class-horse.png").exists()
