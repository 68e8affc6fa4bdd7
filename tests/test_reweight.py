"""`--reweight`: other strengths from stored rows, against the closed form; what cannot be re-weighted is refused."""

import json

import numpy as np
import pytest
import torch
from test_estimates_oracle import CONTROLS, V, pilot_of, table_of

from tiltlens import GaussianMixture
from tiltlens.estimates.reweighted import reweight_rows
from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main
from tiltlens.run_folder import RunFolder

SETTINGS = [
    "--config=configs/sample/analytic.yaml", "--model.prior.init_args.points=60", "--model.steps=60",
    "--data.batch_size=512", "--trainer.accelerator=cpu", "--trainer.logger=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py"])
        main([*SETTINGS, "--data.n=512", "--data.strengths=[0,0.5,1]", f"--out={path}"])
    return path


def test_rows_are_the_closed_form_at_any_strength_in_reach():
    rng = np.random.default_rng(1)
    table, pilot = table_of(rng, 256, [0, 0.5, 1.0], control=CONTROLS["stateful"]), pilot_of(rng, 128)
    rows = reweight_rows("u", table, pilot, [0.25, 0.75, 1.2, 9.0]).rows
    for row, s in zip(rows[:3], (0.25, 0.75, 1.2)):
        truth = {
            "activation": s * V,
            "energy": -s * V,
            "z": s * np.sqrt(V),
            "kl": s**2 * V / 2,
            "log_z": s**2 * V / 2,
        }
        for name, true in truth.items():
            value = row[name if name in row else f"{name}_mean"]
            assert abs(value - true) < 4 * row[f"{name}_se"], (s, name, value, true)
    assert rows[3]["kl_method"] == "bounds"
    assert rows[3]["activation_mean"] is rows[3]["kl"] is rows[3]["log_z"] is None
    assert rows[3]["ess"] < 20


def test_the_covariance_knows_the_error_of_a_difference():
    """Over 80 runs the spread of KL(0.75) - KL(0.5) is what the covariance says, a fraction of what independent errors would give."""
    strengths, names = [0.0, 0.5, 0.75, 9.0], ("kl", "log_z", "activation_mean", "energy_mean")
    seen = {name: [] for name in names}
    for seed in range(80):
        rng = np.random.default_rng([seed, 7])
        table, pilot = table_of(rng, 64, [0, 0.5, 1.0], control=CONTROLS["stateful"]), pilot_of(rng, 64)
        found = reweight_rows("u", table, pilot, strengths)
        for name in names:
            c = np.array(found.covariance[name], float)  # None becomes NaN
            se = [row[f"{name.removesuffix('_mean')}_se"] for row in found.rows]
            np.testing.assert_allclose(np.diag(c)[:3], np.square(se[:3]), rtol=1e-9)
            assert np.isnan(c[3]).all()
            assert np.linalg.eigvalsh(c[:3, :3]).min() > -1e-12
            value = [row[name] for row in found.rows]
            apart = value[2] - value[1]
            seen[name].append((apart, c[1, 1] + c[2, 2] - 2 * c[1, 2], c[1, 1] + c[2, 2]))
    for name in names:
        apart, together = np.array(seen[name]).T[:2]
        # the spread of a variance of 80 draws is sqrt(2/79) = 0.16 of it; errors are widened for small samples
        assert 0.5 < together.mean() / apart.var(ddof=1) < 2, name
    assert np.mean([x[1] for x in seen["log_z"]]) < 0.5 * np.mean([x[2] for x in seen["log_z"]])


def test_the_command_writes_its_own_file_and_loads_no_model(folder, capsys, monkeypatch):
    from tiltlens.modules.sampling_module import SamplingModule

    monkeypatch.setattr(SamplingModule, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    before = (folder / "summary.json").read_bytes()
    main([f"--reweight={folder}", "--data.strengths=[0,0.25,0.75,40]"])
    assert (folder / "summary.json").read_bytes() == before
    found = json.loads((folder / "reweighted.json").read_text())
    prior = GaussianMixture([0.7, 0.3], [[-1.0, 0.0], [2.0, 1.0]], [0.5, 0.25])
    direction = torch.tensor([1.0, 0.5])
    for row in found["rows"][1:3]:
        s = row["strength"]
        assert abs(row["log_z"] - float(prior.log_z(direction, s))) < 4 * row["log_z_se"] + 0.01
        assert abs(row["kl"] - prior.kl(direction, s)) < 4 * row["kl_se"] + 0.01
    assert found["rows"][3]["kl"] is None
    assert any("only bounds" in line for line in found["warnings"])
    (matrix,) = (np.array(c["kl"], float) for c in found["covariance"].values())
    assert matrix.shape == (4, 4)
    assert matrix[1, 1] == pytest.approx(found["rows"][1]["kl_se"] ** 2)
    out = capsys.readouterr().out
    assert "projection[1,0.5]" in out
    assert "0.75" in out
    at = lambda: [r["strength"] for r in json.loads((folder / "reweighted.json").read_text())["rows"]]  # noqa: E731
    main([f"--reweight={folder}"])
    assert at() == [0, 0.25, 0.5, 0.75, 1]
    main([f"--reweight={folder}", "--data.strengths=[0,1,2,4]"])  # the default of sampling, asked for here
    assert at() == [0, 1, 2, 4]


def refused(capsys, path, *more):
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([f"--reweight={path}", *more]))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_reweighted_is_one_message_and_status_2(tmp_path, capsys, folder):
    assert "not a run folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "not a run folder" in refused(capsys, tmp_path / "other")
    assert "found -1.0" in refused(capsys, folder, "--data.strengths=[-1]")
    main([*SETTINGS, "--data.n=8", "--data.strengths=[0,1]", "--model.eta=0", f"--out={tmp_path / 'still'}"])
    assert "eta = 0" in refused(capsys, tmp_path / "still")
    empty = RunFolder(tmp_path / "empty")
    empty.claim({})
    assert "no samples" in refused(capsys, empty.path)
    row = {"unit": "u", "strength": 1.0, "seed": 0, "activation": 0.0, "energy": 0.0, "finite": False}
    empty.write_part([row])
    assert "no stored row is finite" in refused(capsys, empty.path)
