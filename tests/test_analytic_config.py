"""configs/sample/analytic.yaml with anyone's own mixture: summary.json holds the closed form, from two to 64 dimensions."""

from pathlib import Path

import pytest
import torch
import yaml

from tiltlens import GaussianMixture
from tiltlens.modules.sampling_cli import main
from tiltlens.run_folder import RunFolder

ANALYTIC = Path(__file__).parent.parent / "configs" / "sample" / "analytic.yaml"


@pytest.mark.parametrize("dimension", [2, *(pytest.param(d, marks=pytest.mark.slow) for d in (16, 64))])
def test_log_z_and_kl_are_the_closed_form_up_to_four_nats(dimension, tmp_path):
    """Within three standard errors and three per cent; path_kl >= kl_lower; every KL is 0 at strength 0."""
    generator = torch.Generator().manual_seed(dimension)
    means = torch.randn(3, dimension, dtype=torch.float64, generator=generator)
    direction = torch.randn(dimension, dtype=torch.float64, generator=generator) / dimension**0.5
    numbers = {"weights": [0.5, 0.3, 0.2], "means": means.tolist(), "variances": [0.5, 0.25, 0.8]}
    prior = GaussianMixture(**numbers)
    top = 1.0
    while prior.kl(direction, top) < 3.5:  # nats
        top *= 1.05
    strengths = [0.0, *(round(top * x, 3) for x in (0.35, 0.7, 1.0))]
    config = {"model": {"prior": {"class_path": "tiltlens.priors.GaussianMixture", "init_args": numbers},
                        "unit": {"class_path": "tiltlens.units.Projection", "init_args": {"direction": direction.tolist()}}},
              "data": {"strengths": strengths}}  # fmt: skip
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    main([
        f"--config={ANALYTIC}", f"--config={tmp_path / 'own.yaml'}", "--trainer.accelerator=cpu", "--trainer.logger=false",
        f"--out={tmp_path / 'out'}",
    ])  # fmt: skip
    zero, *rows = RunFolder(tmp_path / "out").read_summary()["rows"]
    assert [zero[k] for k in ("kl", "path_kl", "kl_lower", "log_z")] == [0, 0, 0, 0]
    assert rows[-1]["kl"] > 3
    for row in rows:
        s = row["strength"]
        for key, truth in (("log_z", float(prior.log_z(direction, s))), ("kl", prior.kl(direction, s))):
            error = abs(row[key] - truth)
            assert error < 3 * row[f"{key}_se"], (s, key, row[key], row[f"{key}_se"], truth)
            assert error < 0.03 * abs(truth), (s, key, row[key], truth)
        assert row["path_kl"] >= row["kl_lower"]
