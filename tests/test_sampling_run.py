"""Laws of a run: a sample's name is all it depends on, and what is there is never made again."""

import io
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from prior_folders import write_pixel

from tiltlens import GaussianMixture, Projection
from tiltlens.batches import ROWS_ON_CPU, in_equal_batches, network_rows
from tiltlens.modules.command_line import run
from tiltlens.modules.progress import SamplingProgress
from tiltlens.modules.run_stores import PILOT, PilotStore
from tiltlens.modules.sampling_cli import main
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.run_folder import RunFolder
from tiltlens.sampling.sampler import Sampler

CONFIGS = Path(__file__).parent.parent / "configs" / "sample"
COMMON = ["--trainer.accelerator=cpu", "--trainer.logger=false"]
MIXTURE = [
    f"--config={CONFIGS / 'analytic.yaml'}", *COMMON, "--model.steps=10", "--model.prior.init_args.points=60",
    "--data.strengths=[0,1,2]", "--data.n=4", "--data.batch_size=16",
]  # fmt: skip
UNIT = "--model.unit=tf_efficientnet_lite0,weights=random:1,layer=blocks.1,tokens=patch,channel=3"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    write_pixel(folder)
    return folder


def pixels(prior, out, strengths="[0,1]", *more):
    """Four seeds of a tiny network's images."""
    main([
        *COMMON, f"--model.prior={prior}", UNIT, "--model.steps=4", "--model.pilot=8", f"--data.strengths={strengths}",
        "--data.n=4", f"--out={out}", *more,
    ])  # fmt: skip
    return RunFolder(out)


def rows(folder):
    return {(r["unit"], r["strength"], r["seed"]): r for r in folder.samples().to_pylist()}


def same(one, two, only=None, tolerance=1e-4):
    """The samples of `only` (default: all of both) agree in numbers and pictures."""
    a, b = rows(one), rows(two)
    assert only or a.keys() == b.keys()
    for name in only or a:
        for column in ("activation", "z", "energy", "log_w", "path_kl"):
            assert a[name][column] == pytest.approx(b[name][column], abs=tolerance, rel=tolerance), (
                name,
                column,
            )
        if a[name]["image"]:
            pictures = [
                np.asarray(Image.open(f.path / r[name]["image"]), int) for f, r in ((one, a), (two, b))
            ]
            assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.fixture(scope="module")
def whole(prior, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["sample.py"])
        return pixels(prior, tmp_path_factory.mktemp("run") / "whole")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_does_not_matter(whole, prior, tmp_path, batch_size):
    same(whole, pixels(prior, tmp_path, "[0,1]", f"--data.batch_size={batch_size}"))


def test_how_many_rows_a_network_sees_is_rounding_alone_and_of_the_identity(whole, prior, tmp_path):
    """Strong guidance of a network of random weights makes more of rounding than 1e-4."""
    four = pixels(prior, tmp_path, "[0,1]", "--model.rows=4", "--data.batch_size=8")
    same(whole, four, only=[name for name in rows(four) if name[1] == 0])
    same(whole, four, tolerance=1e-3)
    assert four.read_manifest()["identity"]["rows"] == 4
    assert "rows" not in whole.read_manifest()["identity"]
    with pytest.raises(ValueError, match=r"other settings(.|\n)*rows"):
        pixels(prior, tmp_path)


def test_a_row_is_the_same_to_the_bit_for_any_number_that_a_network_sees():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.Flatten(), torch.nn.Linear(6272, 50))
    x, seen = torch.randn(7, 3, 16, 16), []
    network.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with network_rows(4):
        together = in_equal_batches(network, x)
        for k in range(7):
            assert torch.equal(in_equal_batches(network, x[k : k + 1])[0], together[k])
    assert set(seen) == {4}
    in_equal_batches(network, x)
    assert seen[-1] == ROWS_ON_CPU


def test_a_pilot_in_the_cache_is_of_one_number_of_rows(tmp_path):
    files = set()
    for count in (None, 4, 5):
        prior = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], points=60)
        module = SamplingModule(prior, Projection([1.0, 0.0]), cache=str(tmp_path), rows=count)
        module.load()
        files.add(PilotStore(RunFolder(tmp_path), module)._shared(PILOT, module.units[0]))
    assert len(files) == 3
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=r"model.rows = .*expected a whole number >= 1"):
            SamplingModule(rows=wrong)


def test_alone_or_in_a_sweep(whole, prior, tmp_path):
    alone = pixels(prior, tmp_path, "[1]", "--data.n=2", "--data.batch_size=2")
    same(whole, alone, only=rows(alone).keys())


def test_stopped_and_gone_on_with(whole, prior, tmp_path, monkeypatch):
    from tiltlens.modules.run_writer import RunFolderWriter

    write, calls = RunFolderWriter.on_predict_batch_end, []

    def stopped(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise RuntimeError("power cut")  # after sampling, before anything of the batch is on disk
        write(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolderWriter, "on_predict_batch_end", stopped)
        with pytest.raises(RuntimeError, match="power cut"):
            pixels(prior, tmp_path, "[0,1]", "--data.batch_size=3")
    folder = RunFolder(tmp_path)
    assert folder.read_manifest()["state"] == "running"
    assert len(folder.done()) == 3
    same(whole, pixels(prior, tmp_path, "[0,1]", "--data.batch_size=3"))


def test_a_second_call_samples_nothing_and_a_larger_plan_the_rest(whole, prior):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (whole.path / "images").iterdir()}
    curve = whole.read_summary()["rows"]
    again = pixels(prior, whole.path)
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (whole.path / "images").iterdir()} == before
    assert again.read_manifest()["timings"]["rows_sampled"] == 0
    assert again.read_manifest()["state"] == "complete"
    for old, new in zip(curve, again.read_summary()["rows"], strict=True):
        assert {k: v for k, v in old.items() if k != "seconds"} == {
            k: v for k, v in new.items() if k != "seconds"
        }
    grown = pixels(prior, whole.path, "[0,0.5,1]", "--data.n=5")
    assert grown.read_manifest()["timings"]["rows_sampled"] == 15 - 8
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    assert len(grown.read_summary()["rows"]) == 3


def test_the_manifest_goes_on_saying_what_made_the_rows(prior, tmp_path):
    folder = pixels(prior, tmp_path, "[0,1]")
    old = folder.read_manifest()
    assert [s["rows"] for s in old["sessions"]] == [len(folder.done())]
    past = {"versions": old["versions"] | {"torch": "1.0"}, "git_revision": "9f" * 20}
    folder.write_manifest(past | {"started": "then", "sessions": [old["sessions"][0] | past]})
    again = pixels(prior, tmp_path, "[0,1]").read_manifest()  # samples nothing
    assert {k: again[k] for k in (*past, "started")} == past | {"started": "then"}
    assert len(again["sessions"]) == 1
    grown = pixels(prior, tmp_path, "[0,1]", "--data.n=5")
    new = grown.read_manifest()
    assert [s["versions"]["torch"] for s in new["sessions"]] == ["1.0", old["versions"]["torch"]]
    assert new["versions"] == old["versions"]
    (told,) = [line for line in grown.read_summary()["warnings"] if "different versions" in line]
    assert f"torch 1.0 and {old['versions']['torch']}" in told


def test_the_folder_is_whole(tmp_path):
    main([*MIXTURE, f"--out={tmp_path}"])
    manifest, summary = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("manifest", "summary"))
    assert {
        "versions",
        "prior",
        "units",
        "device",
        "git_revision",
        "schedule",
        "chain",
        "timings",
        "state",
    } <= manifest.keys()
    assert len(manifest["prior"]["sha256"]) == 64
    assert all(len(u["sha256"]) == 64 for u in manifest["units"].values())
    assert [r["strength"] for r in summary["rows"]] == [0, 1, 2]
    assert {
        "unit",
        "n",
        "activation_mean",
        "path_kl",
        "kl_lower",
        "kl",
        "log_z",
        "ess",
        "gap",
        "seconds",
    } <= summary["rows"][0].keys()
    assert (tmp_path / "report.html").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_config_yaml_repeats_the_run_and_names_no_place(tmp_path):
    main([*MIXTURE, f"--out={tmp_path / 'one'}"])
    text = (tmp_path / "one" / "config.yaml").read_text()
    assert str(tmp_path) not in text
    assert "out" not in yaml.safe_load(text)
    main([f"--config={tmp_path / 'one' / 'config.yaml'}", f"--out={tmp_path / 'two'}"])
    same(RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two"))
    assert (tmp_path / "two" / "config.yaml").read_text() == text


def test_a_unit_by_keys_repeats_from_config_yaml(prior, tmp_path):
    keys = [
        "--model.unit.encoder=tf_efficientnet_lite0",
        "--model.unit.weights=random:1",
        "--model.unit.unit=class=goldfish",
    ]
    common = [
        *COMMON,
        f"--model.prior={prior}",
        "--model.pilot=8",
        "--model.steps=4",
        "--data.n=2",
        "--data.strengths=[0]",
    ]
    main([*common, *keys, f"--out={tmp_path / 'one'}"])
    main([f"--config={tmp_path / 'one' / 'config.yaml'}", f"--out={tmp_path / 'two'}"])
    same(RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two"))


def test_eta_0_samples_and_says_why_there_is_no_path_kl(tmp_path):
    main([*MIXTURE, "--model.eta=0", f"--out={tmp_path}"])
    folder = RunFolder(tmp_path)
    assert folder.samples()["path_kl"].null_count == folder.samples()["log_w"].null_count == 12
    summary = folder.read_summary()
    assert [r["path_kl"] for r in summary["rows"][1:]] == [None, None]
    assert summary["warnings"][0].startswith("eta = 0: the chain is deterministic")


def test_a_row_that_is_not_finite_is_named_and_touches_no_other(tmp_path, monkeypatch):
    from tiltlens.sampling.noise import Noise

    main([*MIXTURE, f"--out={tmp_path / 'good'}"])
    draw, init = Noise.draw, Noise.__init__

    def remember(self, seeds, *args, **kwargs):
        self.named = list(seeds)
        init(self, seeds, *args, **kwargs)

    def broken(self, stream, *args):
        out = draw(self, stream, *args)
        if stream == "step":
            out[[k == 2 for k in self.named]] = float("nan")
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Noise, "__init__", remember)
        patch.setattr(Noise, "draw", broken)
        main([*MIXTURE, f"--out={tmp_path / 'bad'}"])
    good, bad = RunFolder(tmp_path / "good"), RunFolder(tmp_path / "bad")
    named = rows(bad)
    assert {k[2] for k, r in named.items() if not r["finite"]} == {2}
    same(good, bad, only=[k for k, r in named.items() if r["finite"]])
    summary = bad.read_summary()
    assert [(r["n"], r["nonfinite"]) for r in summary["rows"]] == [(3, 1)] * 3
    assert any("strength 1 seed 2" in w for w in summary["warnings"])
    assert bad.read_manifest()["state"] == "complete"


def test_progress_in_a_log_is_a_line_now_and_then(capsys, monkeypatch):
    from types import SimpleNamespace

    from tiltlens.sampling.plan import Row

    clock = iter(np.arange(0, 1e4, 1.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    bar, batches = (
        SamplingProgress(),
        [[Row(0, 0.0, k) for k in range(4)], [Row(0, 1.0, k) for k in range(4)]],
    )
    trainer = SimpleNamespace(
        predict_dataloaders=SimpleNamespace(dataset=batches), global_rank=0, world_size=1
    )
    for k, batch in enumerate(batches):
        bar.on_predict_batch_start(trainer, None, batch, k)
        for step in range(1, 21):
            bar.report("step", step, 20)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "sampling: 8 of 8 rows, step 20 of 20, took 39 s"
    assert len(lines) == 3  # every 15 s and at the end; no estimate from a first step
    assert lines[0] == "sampling: 0 of 8 rows, step 17 of 20, about 78 s left"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    """One line, drawn anew, that ends full; a new phase has its own."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    bar = SamplingProgress()
    for phase, total in (("pilot", 4), ("learning", 2)):
        for step in range(1, total + 1):
            bar.report(phase, step, total)
    bar.teardown(None, None, "predict")
    drawn = terminal.getvalue()
    for phase, said in (("pilot", "step 4 of 4"), ("learning", "step 2 of 2")):
        assert re.search(f"{phase}: {said}.*100%", drawn)
    assert "\x1b[?25h" in drawn  # the cursor is back
    assert "took" not in drawn


@pytest.mark.slow
def test_two_processes_sample_what_one_does(prior, tmp_path):
    import subprocess
    import sys

    args = [*MIXTURE, "--data.batch_size=3"]
    main([*args, f"--out={tmp_path / 'one'}"])
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--out={tmp_path / 'two'}"]
    subprocess.run(
        [sys.executable, "sample.py", *args, *two], cwd=CONFIGS.parent.parent, check=True, timeout=300
    )
    same(RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two"))


def test_sigterm_ends_a_run_between_two_steps_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    """What `kill`, `timeout` and a cluster send. Lightning notes it and lets a prediction go on to its end."""
    sample, calls, handlers = (
        Sampler.sample,
        [],
        {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)},
    )

    def told(self, rows, progress=None):
        calls.append(rows)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, rows, progress)

    args = [*MIXTURE, "--data.batch_size=3", f"--out={tmp_path}"]
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Sampler, "sample", told)
            with pytest.raises(SystemExit) as stop:
                run(lambda: main(args))
    finally:
        for which, handler in handlers.items():
            signal.signal(which, handler)
    assert stop.value.code == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert len(RunFolder(tmp_path).done()) == 3
    main(args)
    assert RunFolder(tmp_path).read_manifest()["state"] == "complete"
