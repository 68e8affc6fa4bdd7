"""What W&B holds is what summary.json holds: the offline run, read back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from prior_folders import write_pixel

from tiltlens.modules.sampling_cli import main
from tiltlens.modules.wandb_curve import CURVE, IMAGES_A_KEY, _rows_of_table
from tiltlens.run_folder import RunFolder


class Offline:
    """An offline run of a run folder, as W&B's own viewer reads it: history, config, step metric of each metric,
    metadata of each artifact."""

    def __init__(self, out: Path, number: int = 0):
        path = sorted(out.glob("wandb/offline-run-*"), key=lambda p: p.stat().st_ctime)[number]
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        records = [json.loads(line) for line in said.splitlines()]
        self.text = said
        self.history = [r["history"]["item"] for r in records if r["type"] == "history"]
        metrics = [r["metric"] for r in records if r["type"] == "metric"]
        self.metrics = {m["name"]: m.get("step_metric") for m in metrics if "name" in m}
        configs = [r["config"]["update"] for r in records if r["type"] == "config"]
        self.config = {k: v for c in configs for k, v in c.items()}
        artifacts = [r["artifact"] for r in records if r["type"] == "artifact"]
        self.artifacts = {a["name"]: json.loads(a.get("metadata") or "{}") for a in artifacts}
        said = [r["summary"].get("update", {}) for r in records if r["type"] == "summary"]
        self.summary = {k: v for s in said for k, v in s.items()}


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Eight strengths of sixteen seeds are more pictures than W&B takes under one key."""
    root = tmp_path_factory.mktemp("wandb")
    write_pixel(root / "prior")
    args = [
        f"--model.prior={root / 'prior'}", "--model.steps=3", "--model.pilot=8", "--data.n=16", "--data.batch_size=64",
        "--data.strengths=[0,4,0.5,1,2,3,5,6]", "--trainer.accelerator=cpu", f"--out={root / 'out'}",
        f"--model.unit=projection[{','.join(['1', '0', '-1', '0.5'] * 48)}]",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py"])
        main(args)
        first = Offline(root / "out")
        main(args)
    return RunFolder(root / "out"), first


def test_the_curve_is_that_of_the_summary_in_order_of_strength(sampled):
    folder, run = sampled
    summary = folder.read_summary()["rows"]
    (x,) = [name for name in run.metrics if name.endswith("/strength")]
    prefix = x.removesuffix("/strength")
    assert prefix.endswith("/calibrated-3-eta1")
    curve = [h for h in run.history if x in h]
    assert [h[x] for h in curve] == [r["strength"] for r in summary] == sorted(r["strength"] for r in summary)
    for logged, row in zip(curve, summary, strict=True):
        for name in CURVE:
            if name != "seconds":  # of the second call's summary
                assert logged.get(f"{prefix}/{name}") == pytest.approx(row[name]), name
        assert {f"{prefix}/activation_q0.5", f"{prefix}/activation._type"} <= logged.keys()
    for name in CURVE:
        assert run.metrics[f"{prefix}/{name}"] == x
    steps = [h for h in run.history if f"{prefix}/log_snr" in h]
    assert len(steps) == 3
    assert run.metrics[f"{prefix}/guidance_norm/strength 4"] == f"{prefix}/log_snr"
    assert run.metrics[f"{prefix}/guidance_norm_by_t/strength 4"] == f"{prefix}/t"
    norms = [
        [h[f"{prefix}/{name}/strength 4"] for h in steps[:-1]]
        for name in ("guidance_norm", "guidance_norm_by_t")
    ]
    assert norms[0] == norms[1]
    assert all(f"{prefix}/t" in h for h in steps)


def test_strength_0_is_pooled_with_the_pilot_throughout(sampled):
    """n, mean, quantiles and histogram of one row are of one set of samples."""
    folder, run = sampled
    samples = folder.samples().to_pydict()
    own = [a for a, s in zip(samples["activation"], samples["strength"]) if s == 0]
    pilot = pq.read_table(folder.path / "pilot" / "samples.parquet")["activation"].to_pylist()
    pooled = np.concatenate([own, pilot])
    (prefix,) = [name.removesuffix("/strength") for name in run.metrics if name.endswith("/strength")]
    (row,) = [h for h in run.history if h.get(f"{prefix}/strength") == 0]
    assert row[f"{prefix}/n"] == len(pooled) == 24
    assert row[f"{prefix}/activation_mean"] == pytest.approx(pooled.mean())
    for q in (0.05, 0.5, 0.95):
        assert row[f"{prefix}/activation_q{q:g}"] == pytest.approx(np.quantile(pooled, q))
    bins = [v for k, v in row.items() if k.startswith(f"{prefix}/activation.") and isinstance(v, list)]
    assert 24 in [sum(counts) for counts in bins], row


def test_pictures_and_table(sampled):
    _, run = sampled
    entries = {k: v for h in run.history for k, v in h.items()}
    images = {k.rpartition("/")[2]: v for k, v in entries.items() if "/images." in k}
    assert 0 < images["images.count"] <= IMAGES_A_KEY
    assert images["images.format"] == "png"
    assert images["images.captions"][0] == "strength 0, seed 0"
    assert any("strength 6" in c for c in images["images.captions"])  # no strength is cut off
    assert len([k for k in entries if k.endswith("/grid.path")]) == 1
    assert entries["samples.nrows"] == 128


def test_a_long_table_has_rows_of_every_strength():
    rng = np.random.default_rng(0)
    unit, strength, seed = (x.ravel() for x in np.meshgrid(["a", "b"], [0.0, 1.0, 2.0], np.arange(50)))
    order = rng.permutation(len(seed))
    samples = {"unit": unit[order], "strength": strength[order], "seed": seed[order]}
    assert (_rows_of_table(samples, 300) == np.arange(300)).all()
    rows = _rows_of_table(samples, 100)
    assert len(rows) == 6 * 16
    for u in ("a", "b"):
        for s in (0.0, 1.0, 2.0):
            mine = rows[(samples["unit"][rows] == u) & (samples["strength"][rows] == s)]
            assert sorted(samples["seed"][mine]) == list(range(16))


def test_the_configuration_has_fingerprints(sampled):
    folder, run = sampled
    said, manifest = run.config["tiltlens"], folder.read_manifest()
    assert said["prior"]["sha256"] == manifest["prior"]["sha256"]
    assert said["units"] == manifest["units"]
    assert said["state"] == "complete"


def test_a_second_call_with_nothing_to_do_writes_no_second_run(sampled):
    folder, _ = sampled
    assert folder.read_manifest()["timings"]["rows_sampled"] == 0
    assert len(list(folder.path.glob("wandb/offline-run-*"))) == 1


def test_the_certificate_is_in_the_summary(tmp_path):
    args = ["--config=configs/sample/analytic.yaml", "--model.steps=20", "--model.prior.init_args.points=60", "--data.n=64",
            "--data.batch_size=256", "--trainer.accelerator=cpu", f"--out={tmp_path}", "--constraint=kl=1"]  # fmt: skip
    main(args)
    found = RunFolder(tmp_path).read_summary()["constraint"]["projection[1,0.5]"]
    said = {
        k.partition("/constraint/")[2]: v for k, v in Offline(tmp_path).summary.items() if "/constraint/" in k
    }
    for name in (
        "asked",
        "status",
        "law",
        "target",
        "strength",
        "value",
        "value_se",
        "kl",
        "kl_se",
        "kl_least",
    ):
        assert said[name] == (found[name] if isinstance(found[name], str) else pytest.approx(found[name])), (
            name
        )
    assert (said["reach_low"], said["reach_high"]) == pytest.approx(tuple(found["reach"]))
