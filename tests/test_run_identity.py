"""What makes a run the run it is: whatever changes a sample is refused in its folder, and a mistake does not lock one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from prior_folders import ddpm, write_pixel

from tiltlens import GaussianMixture, Linear, Projection, Target, load_prior, tilt
from tiltlens.energies import Threshold
from tiltlens.guidance import DPS, Calibrated, Exact
from tiltlens.guidance.learning import place_knots
from tiltlens.modules.plan_data import PlanData
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.units import build_unit

LINE = ([1.0], [[0.0, 0.0]], [1.0])
ASK = {"n": 4, "energy": Linear(False), "guidance": DPS(), "pilot": 0, "steps": 6, "accelerator": "cpu"}
UNIT = "tf_efficientnet_lite0,weights=random:1,layer=blocks.1,tokens=patch,channel=3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("prior")
    write_pixel(path, ddpm())
    return path


def test_a_loaded_prior_is_known_by_its_precision_and_its_tables(folder, tmp_path):
    """And not by its weights alone: another parametrisation of the same network is another law."""
    one, half = (load_prior(str(folder), precision=p).identity() for p in ("float32", "bfloat16"))
    assert one != half
    write_pixel(tmp_path, ddpm("v_prediction"))
    for name in ("unet/diffusion_pytorch_model.safetensors",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = load_prior(str(tmp_path)).identity()
    assert other["fingerprint"] == one["fingerprint"]
    assert other["tables"] != one["tables"]
    assert GaussianMixture(*LINE, points=60).identity() != GaussianMixture(*LINE, points=80).identity()
    with pytest.raises(ValueError, match="pass them to load_prior"):
        SamplingModule(load_prior(str(folder)), UNIT, precision="bfloat16")


def test_a_run_is_not_resumed_under_another_table(tmp_path):
    unit = Projection([1.0, 0.0])
    tilt(GaussianMixture(*LINE, points=60), unit, [0.0, 1.0], out=tmp_path, **ASK)
    with pytest.raises(ValueError, match=r"other settings(.|\n)*tables"):
        tilt(GaussianMixture(*LINE, points=80), unit, [0.0, 1.0], out=tmp_path, **ASK)


def test_time_profiles_are_told_apart():
    """Pairs however they are written, callables by their values."""
    told = [
        Calibrated(profile=p).describe()["profile"]
        for p in ((0.2, 0.8), (0.0, 0.5), lambda x: x, lambda x: 1 - x, lambda x: x)
    ]
    assert len({str(t) for t in told}) == 4
    assert told[2] == told[4]


def test_a_mistake_does_not_lock_the_folder(tmp_path):
    """A dead unit, once seen, leaves the folder to the next call; one with rows is kept."""
    prior, ask = GaussianMixture(*LINE, points=60), {**ASK, "energy": Linear(), "pilot": 8}
    with pytest.raises(ValueError, match="dead"):
        tilt(prior, Projection([0.0, 0.0]), [0.0, 1.0], out=tmp_path, **ask)
    tilt(prior, Projection([1.0, 0.0]), [0.0, 1.0], out=tmp_path, **ask)
    before = json.loads((tmp_path / "manifest.json").read_text())["identity"]
    with pytest.raises(ValueError, match="other settings"):
        tilt(prior, Projection([0.0, 0.0]), [0.0, 1.0], out=tmp_path, **ask)
    assert json.loads((tmp_path / "manifest.json").read_text())["identity"] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"natural": "/nowhere/at/all"}, "found no folder"), ({"guidance": Exact()}, "Exact guidance needs")],
)
def test_what_cannot_be_is_told_before_the_pilot(settings, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        tilt(
            str(folder),
            UNIT,
            [0.0, 1.0],
            4,
            steps=4,
            pilot=8,
            out=tmp_path / "out",
            accelerator="cpu",
            **settings,
        )
    assert not (tmp_path / "out" / "pilot").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_natural_images_are_read_once(folder, tmp_path):
    """An image that joins the folder later does not move what was sampled before."""
    rng = np.random.default_rng(0)

    def add(first, count):
        for k in range(first, first + count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / "natural" / f"{k}.png"
            )

    (tmp_path / "natural").mkdir()
    add(0, 16)
    ask = {
        "steps": 4,
        "pilot": 8,
        "natural": str(tmp_path / "natural"),
        "out": tmp_path / "out",
        "accelerator": "cpu",
    }
    first = tilt(str(folder), UNIT, [0.0], 4, **ask).folder.samples()
    add(16, 4)
    again = tilt(str(folder), UNIT, [0.0], 6, **ask).folder.samples()
    z = dict(zip(again["seed"].to_pylist(), again["z"].to_pylist()))
    assert all(z[k] == v for k, v in zip(first["seed"].to_pylist(), first["z"].to_pylist()))


@pytest.mark.parametrize("level", ["z=3", "q0.9"])
def test_a_level_that_counts_natural_activations_needs_some(level):
    with pytest.raises(ValueError, match="counts natural activations"):
        SamplingModule(
            GaussianMixture(*LINE), Projection([1.0, 0.0]), Target(level, standardise=False), DPS(), pilot=0
        )
    SamplingModule(
        GaussianMixture(*LINE), Projection([1.0, 0.0]), Target(3.0, standardise=False), DPS(), pilot=0
    )


@pytest.mark.parametrize("seed", [-1, 1 << 53])
def test_a_seed_that_is_the_pilots_or_no_whole_number_of_floats_is_refused(seed):
    with pytest.raises(ValueError, match=r"data\.seed"):
        PlanData([0.0, 1.0], 4, seed)


def test_strengths_are_any_real_numbers():
    """numpy's too, as floats that are written as such; a bool is no number."""
    for strengths in (np.arange(3), np.arange(3, dtype=np.float32), [np.int64(0), 1, np.float64(2)]):
        found = PlanData(strengths).strengths
        assert found == [0.0, 1.0, 2.0]
        assert {type(s) for s in found} == {float}
    for wrong in (True, np.bool_(True), np.float32("nan"), "1", 1j):
        with pytest.raises(ValueError, match="every strength is a finite number >= 0"):
            PlanData([0.0, wrong])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_threshold_has_a_force_however_far_it_is(dtype):
    """s (level - z) below it, none above: with no variance, as DPS reads it."""
    z = torch.tensor([-1e5, -1778.0, 1778.0, 1e5], dtype=dtype, requires_grad=True)
    log_psi = Threshold(0.0, standardise=False).log_tilt(z, torch.zeros_like(z), torch.full_like(z, 2.0))
    (force,) = torch.autograd.grad(log_psi.sum(), z)
    torch.testing.assert_close(force, (-2 * z).clamp_min(0).detach(), rtol=1e-4, atol=1e-6)


def test_a_sum_of_units_is_the_same_in_any_company():
    unit = build_unit("0.3*projection[1,0] + 0.7*projection[0,1]")
    z = torch.randn(37, 2, generator=torch.Generator().manual_seed(0))
    whole = unit.combine(z)
    assert all(torch.equal(unit.combine(z[i : i + k])[0], whole[i]) for i in range(30) for k in (1, 2, 3))


def test_knots_begin_at_the_first_finite_level():
    levels = torch.tensor([-torch.inf, -4.0, 0.0, 4.0])
    assert torch.isfinite(place_knots(levels, torch.ones(4, dtype=torch.bool))).all()
