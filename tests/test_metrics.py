"""Laws of the metrics: closed forms, nothing where there is nothing, copies are found, batches do not matter."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from prior_folders import write_pixel
from torchmetrics.image.kid import KernelInceptionDistance

from tiltlens.denoiser import NetworkDenoiser, parametrisation
from tiltlens.metrics import (
    EncoderFeatures,
    frechet_distance,
    kernel_distance,
    memorisation,
    nearest_distance,
    quality,
    sample_images,
)
from tiltlens.metrics.denoising_error import denoised
from tiltlens.metrics.distances import _Given
from tiltlens.priors import load_prior
from tiltlens.schedule import Schedule


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """x (n, d), moved so that its sample mean and covariance are exactly mean and root root^T."""
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False).T
    return white @ root.T + mean


def test_frechet_is_the_closed_form():
    """|m - m'|^2 + tr(S + S' - 2 (S^1/2 S' S^1/2)^1/2), for samples that have these moments exactly."""
    d, means = 5, normal(2, 5, seed=1)
    a, b = normal(2, d, d, seed=2)
    x, y = with_moments(normal(40, d), means[0], a), with_moments(normal(40, d, seed=3), means[1], b)
    s, t = a @ a.T, b @ b.T
    values, vectors = torch.linalg.eigh(s)
    half = vectors * values.sqrt() @ vectors.T
    expected = (means[0] - means[1]).square().sum() + (s + t).trace()
    expected -= 2 * torch.linalg.eigvalsh(half @ t @ half).clamp(min=0).sqrt().sum()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(x, x[torch.randperm(40)]) == pytest.approx(0, abs=1e-6)


def test_kernel_distance_is_torchmetrics():
    x, y = normal(50, 8), normal(50, 8, seed=1) + 0.3
    theirs = KernelInceptionDistance(feature=_Given(8), subsets=1, subset_size=50).set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    assert kernel_distance(x, y).value == pytest.approx(float(theirs.compute()[0]), rel=1e-9)


def test_kernel_distance_of_one_law_is_nothing():
    """Halves of one Gaussian sample: unbiased, and the standard error is that of the spread over repetitions."""
    found = [kernel_distance(*normal(128, 6, seed=k).chunk(2)) for k in range(200)]
    values, errors = torch.tensor(found).T
    spread = values.std()
    assert abs(values.mean()) < 4 * spread / 200**0.5
    assert (values.abs() < 3 * errors).float().mean() > 0.97
    assert 0.7 < errors.mean() / spread < 1.4


def test_kernel_distance_of_two_laws():
    """N(0, I) and N(mu, I): the standard error is the spread here too, and the value E k of the cubic kernel."""
    d, n, shift = 6, 64, 0.5
    found = [
        kernel_distance(normal(n, d, seed=k), normal(n, d, seed=1000 + k) + shift / d**0.5)
        for k in range(200)
    ]
    values, errors = torch.tensor(found).T
    # E[(x.y/d + 1)^3] = 1 + 3 s + 3 E u^2 + E u^3 for u = x.y/d; of two means a, b and unit covariances
    e = shift**2 / d  # |mu|^2 / d

    def moments(ab: float, a: float, b: float) -> float:  # E k, with a.b/d, |a|^2/d, |b|^2/d
        second = (d + d * a + d * b + (d * ab) ** 2) / d**2
        third = ((d * ab) ** 3 + 3 * d * ab * (d + d * a + d * b) + 6 * d * ab) / d**3
        return 1 + 3 * ab + 3 * second + third

    expected = moments(0, 0, 0) + moments(e, e, e) - 2 * moments(0, 0, e)
    assert abs(values.mean() - expected) < 4 * values.std() / 200**0.5
    assert 0.75 < errors.mean() / values.std() < 1.3


def test_memorisation_flags_copies():
    train, held_out, fresh = normal(400, 16), normal(300, 16, seed=1), normal(300, 16, seed=2)
    honest = memorisation(fresh, held_out, train)
    assert abs(honest.nearer.value - 0.5) < 4 * honest.nearer.se
    assert abs(honest.copied.value - 0.01) < 4 * honest.copied.se
    copies = fresh.clone()
    copies[:30] = train[:30] + 1e-4 * normal(30, 16, seed=3)
    some = memorisation(copies, held_out, train)
    assert some.copied.value > 0.1
    assert some.copied.value - 0.01 > 4 * some.copied.se
    every = memorisation(train[:300], held_out, train)
    assert every.nearer.value == every.copied.value == 1
    assert every.sample == 0
    with pytest.raises(ValueError, match="at least 2 samples"):
        memorisation(fresh[:1], held_out, train)


def test_nearest_distance_is_the_least():
    x, train = normal(300, 3) + 100, normal(70, 3, seed=1) + 100
    expected = (x[:, None] - train).norm(dim=2).amin(1)
    torch.testing.assert_close(nearest_distance(x, train), expected)
    assert nearest_distance(train, train).max() == 0


def test_quality_says_its_n():
    found = quality(normal(20, 4), normal(30, 4, seed=1), normal(50, 4, seed=2))
    assert set(found) >= {
        "kid_n20",
        "kid_floor_n20",
        "frechet_n20",
        "frechet_floor_n20",
        "nearer_n20",
        "copied_n20",
    }
    assert (
        found["kid_floor_n20"]
        == kernel_distance(normal(50, 4, seed=2)[:20], normal(30, 4, seed=1)[:20]).value
    )
    with pytest.raises(ValueError, match="of one shape"):
        kernel_distance(normal(20, 4), normal(21, 4))


def test_copies_of_mirror_images_are_copies():
    train, held_out, turned = normal(50, 4), normal(30, 4, seed=1), normal(50, 4, seed=2)
    assert quality(turned[:20], held_out, train)["copied_n20"] < 0.5
    assert quality(turned[:20], held_out, train, turned)["copied_n20"] == 1


def test_features_do_not_depend_on_the_batch():
    features = EncoderFeatures("bundled")
    images = normal(20, 3, 32, 32).float().tanh()
    whole = features(images)
    assert whole.shape == (20, features.num_features)
    assert torch.equal(whole, features.of(images.split(3)))
    # what the last layer reads is what makes the logits
    model = features.encoder.model
    with torch.no_grad():
        torch.testing.assert_close(model.head(whole), model(features.encoder.preprocess(images)))
    with pytest.raises(ValueError, match="expected one of timm's"):
        EncoderFeatures(f"{__name__}:bare")


def bare() -> torch.nn.Module:
    return torch.nn.Flatten()


def test_samples_are_named_by_seed():
    """An image depends on its seed alone; and the chain of a Gaussian's own denoiser samples that Gaussian."""
    prior = load_prior("bundled")
    whole = sample_images(prior.denoiser, prior.decode, range(3), steps=2, eta=1.0)
    assert torch.equal(whole[2:], sample_images(prior.denoiser, prior.decode, [2], steps=2, eta=1.0))
    assert torch.equal(whole, (whole * 127.5 + 127.5).round() / 127.5 - 1)
    x = sample_images(gaussian(0.3), lambda z: z, range(50), steps=60, eta=0.0)
    assert x.std() == pytest.approx(0.3, rel=0.05)  # 3,200 numbers: four standard errors of their deviation


def gaussian(std: float) -> NetworkDenoiser:
    """E[x_0 | x_t] = alpha std^2 x_t / (alpha^2 std^2 + sigma^2) for x_0 ~ N(0, std^2 I), as a v-prediction."""
    schedule = Schedule.from_log_snr(torch.linspace(9, -9, 200))
    alpha, sigma = (table.float().view(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))

    def velocity(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        a, s = alpha[time.long()], sigma[time.long()]
        return (a * x - a * std**2 * x / (a**2 * std**2 + s**2)) / s

    return NetworkDenoiser(velocity, schedule, (1, 8, 8), **parametrisation("v_prediction", schedule))


def test_denoising_error_is_the_closed_form():
    """E |x0_hat - x_0|^2 = std^2 sigma^2 / (alpha^2 std^2 + sigma^2) for a Gaussian, at every noise level."""
    std, denoiser = 0.3, gaussian(0.3)
    x_0 = std * normal(600, 1, 8, 8).float()
    x0_hat, log_snr = denoised(SimpleNamespace(denoiser=denoiser), x_0)
    assert log_snr.diff().max() <= 0  # the times cover the table evenly
    a2, s2 = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    expected = std**2 * s2 / (a2 * std**2 + s2)
    ratio = (x0_hat - x_0).square().flatten(1).mean(1) / expected  # mean of 64 chi^2 of one degree
    for part in ratio.chunk(6):
        assert abs(part.mean() - 1) < 4 * (2 / 64 / len(part)) ** 0.5


def test_the_command_prints_what_a_card_states(tmp_path, monkeypatch, capsys):
    write_pixel(tmp_path / "prior")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Path(__file__).parents[1] / "benchmarks" / "prior_quality.py"
    data = ["--data", "FakeData?size=16", "--n", "12", "--steps", "2", "--device", "cpu"]
    printed = []
    for more in (["--train", "FakeData?size=30"], ["--train", "FakeData?size=30"], []):
        monkeypatch.setattr("sys.argv", [str(path), "--prior", str(tmp_path / "prior"), *data, *more])
        runpy.run_path(str(path), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        printed.append([line for line in lines if "processor time" not in line])
    assert printed[0] == printed[1]
    names = [line.split(":")[0] for line in printed[0]]
    for name in ("kid_n12", "kid_floor_n12", "frechet_n12", "frechet_floor_n12", "nearer_n12", "copied_n12"):
        assert name in names
    assert any(line.startswith("min-SNR-5 loss (16 images)") for line in printed[0])
    halves = [line.split(":")[0] for line in printed[2]]
    assert "kid_n8" in halves
    assert not any(name.startswith(("nearer", "copied")) for name in halves)
