"""The command line of sample.py: what may be overridden, and what a user's error says."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.fabric.accelerators import MPSAccelerator as FabricMPS
from lightning.pytorch.accelerators import MPSAccelerator
from prior_folders import edm, flow, write_pixel

from tiltlens import GaussianMixture, Linear, Projection, tilt
from tiltlens.guidance import DPS
from tiltlens.modules import sampling_cli
from tiltlens.modules.accelerator import slow_bfloat16, without_mps
from tiltlens.modules.command_line import plain, run
from tiltlens.modules.sampling_cli import SamplingCLI, main
from tiltlens.run_folder import RunFolder

CONFIGS = Path(__file__).parent.parent / "configs" / "sample"
ANALYTIC = f"--config={CONFIGS / 'analytic.yaml'}"
TINY = [
    "--model.steps=6",
    "--data.n=4",
    "--data.batch_size=8",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
]
MIXTURE = [ANALYTIC, *TINY, "--model.prior.init_args.points=60", "--data.strengths=[0,1]"]
LITE0 = [f"--config={CONFIGS / 'timm-local.yaml'}", *TINY, "--model.unit.weights=random:1"]
VIT = {"encoder": "vit_tiny_patch16_224", "weights": "random:1"}


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch, tmp_path):
    """LightningCLI warns where arguments come from Python while the process (pytest) has its own."""
    monkeypatch.setattr("sys.argv", ["sample.py"])
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # whoever runs the tests may be logged in


def units(*args):
    return [u.name for u in SamplingCLI([*TINY, *args]).model.units]


def test_a_unit_is_given_as_string_keys_list_or_class():
    assert units() == ["bundled,class=horse"]
    assert units("--model.unit=bundled,class=ship") == ["bundled,class=ship"]
    assert units("--model.unit.encoder=bundled", "--model.unit.unit=class=cat") == ["bundled,class=cat"]
    assert units(*LITE0) == ["tf_efficientnet_lite0,weights=random:1,class=sorrel"]
    keys = {**VIT, "layer": "blocks.3", "tokens": "cls", "unit": 5}
    assert units(f"--model.unit={json.dumps(keys)}") == [
        "vit_tiny_patch16_224,weights=random:1,layer=blocks.3,tokens=cls,channel=5"
    ]
    both = ["bundled,class=cat", {"encoder": "bundled", "class": "dog"}]
    assert units(f"--model.unit={json.dumps(both)}") == ["bundled,class=cat", "bundled,class=dog"]
    assert units("--model.unit=bundled,class=cat and not bundled,class=dog") == [
        "bundled,class=cat and not bundled,class=dog"
    ]
    projection = {"class_path": "tiltlens.units.Projection", "init_args": {"direction": [1, 2]}}
    assert units(f"--model.unit={json.dumps(projection)}") == ["projection[1,2]"]
    single = ["layer=blocks.3", "tokens=patch", "reduction=max", "unit=channel=7"]
    expected = "tf_efficientnet_lite0,weights=random:1,layer=blocks.3,tokens=patch,reduction=max,channel=7"
    assert units(*LITE0, *(f"--model.unit.{k}" for k in single)) == [expected]


def test_energy_guidance_and_data_are_overridden():
    cli = SamplingCLI([
        ANALYTIC, *TINY, "--model.energy=Target", "--model.energy.level=q0.999", "--model.guidance=DPS", "--model.pilot=8",
        "--data.strengths=[0,1]", "--data.seed=7", "--model.eta=0.5", "--model.unit.direction=[0,1]",
    ])  # fmt: skip
    assert (type(cli.model.energy).__name__, cli.model.energy.level) == ("Target", "q0.999")
    assert type(cli.model.guidance).__name__ == "DPS"
    assert (cli.datamodule.strengths, cli.datamodule.n, cli.datamodule.seed) == ([0.0, 1.0], 4, 7)
    assert cli.model.eta == 0.5
    assert cli.model.units[0].name == "projection[0,1]"


def test_the_default_folder_is_named_by_the_config(tmp_path):
    assert SamplingCLI([ANALYTIC, *TINY]).out == Path("runs/analytic")
    assert SamplingCLI(TINY).out == Path("runs/sample")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.yaml").write_text((CONFIGS / "analytic.yaml").read_text())
    assert SamplingCLI([f"--config={tmp_path / 'kept' / 'config.yaml'}", *TINY]).out == Path("runs/kept")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model.energy=Linaer"], "unknown class 'Linaer'. Did you mean Linear? Known: Linear, Target, Threshold."),
        (["--model.energy=tiltlens.energies.Linaer"], "Did you mean Linear?"),
        (["--model.energy=Target"], "model.energy: Target needs level: give --model.energy.level"),
        (["--model.energy.standardize=true"], "Did you mean standardise?"),
        (["--model.guidance=Calibratd"], "Did you mean Calibrated?"),
        (["--model.prior.init_args.weigths=[1]"], "GaussianMixture has no argument 'weigths'. Did you mean weights?"),
        (["--model.prior=bundeld"], "Did you mean 'bundled'?"),
        (["--model.guidanc=DPS"], "unknown key --model.guidanc. Did you mean model.guidance"),
        (["--data.batchsize=4"], "Did you mean data.batch_size"),
        (["--trainer.acelerator=cpu"], "Did you mean trainer.accelerator"),
        (["--data.strengths=[-1]"], "found -1.0"),
        (["--data.strengths=[]"], "non-empty list"),
        (["--data.strengths=[.nan]"], "found nan"),
        (["--data.strengths=abc"], "data.strengths"),
        (["--data.n=0"], "data.n = 0"),
        (["--data.batch_size=0"], "data.batch_size = 0"),
        (["--model.eta=1.5"], "model.eta = 1.5"),
        (["--model.eta=.nan"], "model.eta = nan"),
        (["--model.steps=0"], "model.steps = 0"),
        (["--model.steps=61"], "expected 1 to 60"),
        (["--model.spacing=log_snr"], "log-snr, index"),
        (["--model.pilot=3"], "model.pilot = 3"),
        (["--model.guidance=Calibrated"], "needs a pilot"),
        (["--model.natural=nowhere"], "no images"),
        (["--trainer.inference_mode=true"], "--trainer.inference_mode=false"),
        (["--trainer.precision=bf16-mixed"], "--model.precision bfloat16"),
        (["--trainer.devices=100000"], "this machine has"),
        (["--trainer.limit_predict_batches=1"], "found trainer.limit_predict_batches = 1, which leaves some out"),
        (["--trainer.limit_predict_batches=0.5"], "set data.n or data.strengths"),
        (["--trainer.fast_dev_run=true"], "found trainer.fast_dev_run = True, which leaves some out"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--model.unit=bundeld,class=horse"], "near names: bundled"),
        (["--model.unit=bundled,clas=horse"], "near names: class"),
        (["--model.unit=bundled,class=hrse"], "near names: horse"),
        (["--model.unit=bundled,layer=blocks.99,tokens=cls,channel=0"], "near names: blocks."),
        (["--model.unit=bundled,layer=blocks.0,tokens=ptch,channel=0"], "near names: patch"),
        (["--model.unit=bundled,weights=/nowhere.pt,class=cat"], "/nowhere.pt"),
        (["--model.unit=bundled,class=horse"], "take a projection"),
        (["--model.unit.direction=[1,2,3]"], "3 entries"),
        (["--trainer.logger=WandbLogger", "--trainer.logger.offline=false"], "there is no login"),
    ],
)  # fmt: skip
def test_user_errors_end_with_status_2_and_write_nothing(tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([*MIXTURE, f"--out={tmp_path / 'out'}", *change]))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in message
    assert "Traceback" not in message
    assert len(message) < 700
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("variances=[0.5,-1]", "weights and variances must be positive"),
        ("weights=[1]", "found (1,), (2, 2), (2,)"),
        ("means=[[0,0],[1,2,3]]", "means: expected rows of one length d, found lengths [2, 3]"),
        ("points=0", "points = 0: expected a whole number >= 2"),
    ],
)
def test_a_bad_mixture_is_told_in_one_line(tmp_path, capsys, change, words):
    with pytest.raises(SystemExit):
        run(lambda: main([*MIXTURE, f"--out={tmp_path / 'out'}", f"--model.prior.init_args.{change}"]))
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1, message


def test_what_only_a_name_would_have_been_is_still_told():
    told = plain("Does not validate against any of the Union subtypes\nSubtypes: (str, None)\nErrors:\n"
                 "  - Expected a <class 'str'>. Got value: 3\n  - Expected a <class 'NoneType'>\nGiven value type: int")  # fmt: skip
    assert told == "Expected a <class 'str'>. Got value: 3"


class Detached(torch.nn.Module):
    input_size = 8

    def forward(self, x):
        return x.mean((2, 3)).detach()


def test_a_unit_with_no_gradient_is_refused_before_the_pilot_and_sampled_where_none_is_needed(
    tmp_path, capsys, monkeypatch
):
    write_pixel(tmp_path / "prior")
    ask = [*TINY, f"--model.prior={tmp_path / 'prior'}", "--model.unit=test_sampling_cli:Detached,channel=1",
           "--model.pilot=8", "--model.steps=3"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("tiltlens.sampling.sampler.run_pilot", None)
        for asked in ("--data.strengths=[0,1]", "--constraint=z=1"):
            with pytest.raises(SystemExit) as stop:
                run(lambda a=asked: main([*ask, a, f"--out={tmp_path / 'out'}"]))
            assert stop.value.code == 2
            assert "Detached,channel=1 is not differentiable" in capsys.readouterr().err
            assert not (tmp_path / "out" / "manifest.json").exists()  # the folder may be taken by another run
    main([*ask, "--data.strengths=[0]", f"--out={tmp_path / 'out'}"])
    assert len(RunFolder(tmp_path / "out").read_summary()["rows"]) == 1
    walk = ["--model.sampler=NoiseSpace", "--model.sampler.levels=1", "--model.sampler.final=1", "--model.sampler.replicas=4"]  # fmt: skip
    main([*ask, *walk, "--data.strengths=[0,1]", f"--out={tmp_path / 'walked'}"])
    assert len(RunFolder(tmp_path / "walked").read_summary()["rows"]) == 2


def test_bad_prior_folders_end_with_status_2(tmp_path, capsys):
    class Pickled:
        def __reduce__(self):
            return print, ("code ran",)

    for kind, words in (("scheduler", "scheduler"), ("truncated", "truncated"), ("pickle", "safetensors")):
        folder = tmp_path / kind
        write_pixel(folder)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        if kind == "scheduler":
            (folder / "scheduler" / "scheduler_config.json").unlink()
        elif kind == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        else:
            weights.unlink()
            torch.save(Pickled(), weights.with_suffix(".bin"))
        with pytest.raises(SystemExit) as stop:
            run(lambda f=folder: main([*TINY, f"--model.prior={f}", f"--out={tmp_path / 'out'}"]))
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert words in said.err
        assert "code ran" not in said.out
        assert not (tmp_path / "out").exists()


def test_a_folder_with_another_run_or_foreign_files_is_left_as_it_is(tmp_path, capsys):
    def refused(*change):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises(SystemExit) as stop:
            run(lambda: main([*MIXTURE, f"--out={tmp_path}", *change]))
        assert stop.value.code == 2
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        return capsys.readouterr().err

    (tmp_path / "mine.txt").write_text("mine")
    assert "mine.txt" in refused()
    (tmp_path / "mine.txt").unlink()
    main([*MIXTURE, f"--out={tmp_path}"])
    capsys.readouterr()
    message = refused("--model.steps=5", "--model.eta=0.5", "--data.seed=1")
    assert "chain.steps: 6 in the folder, 5 asked for" in message
    assert "chain.eta" in message
    assert "seed: 0 in the folder, 1 asked for" in message
    assert "may grow, not shrink" in refused("--data.n=3")
    assert "may grow, not shrink" in refused("--data.strengths=[0]")
    with_wandb = refused("--model.steps=5", "--trainer.logger=WandbLogger", "--trainer.logger.offline=true")
    assert "chain.steps" in with_wandb


def test_online_without_a_login_is_an_error_and_no_prompt(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a login"))
    args = [a for a in MIXTURE if "logger" not in a]
    with pytest.raises(ValueError, match="there is no login"):
        SamplingCLI([*args, "--trainer.logger.init_args.offline=false"])


def test_ctrl_c_ends_with_130_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    from tiltlens.sampling.sampler import Sampler

    sample, calls, handler = Sampler.sample, [], signal.getsignal(signal.SIGINT)

    def stopped(self, rows, progress=None):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(self, rows, progress)

    monkeypatch.setattr(Sampler, "sample", stopped)
    args = [*MIXTURE, "--data.batch_size=3", f"--out={tmp_path}"]
    try:
        with pytest.raises(SystemExit) as stop:
            run(lambda: main(args))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert stop.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
    folder = RunFolder(tmp_path)
    assert folder.read_manifest()["state"] == "running"
    assert len(folder.done()) == 3
    main(args)
    assert folder.read_manifest()["state"] == "complete"
    timings = folder.read_manifest()["timings"]
    assert (timings["rows_reused"], timings["rows_sampled"]) == (3, 5)


@pytest.mark.parametrize("family", ["edm", "flow"])
def test_priors_of_other_families_sample_through_the_same_command(tmp_path, family):
    write_pixel(tmp_path / "prior", {"edm": edm, "flow": flow}[family]())
    main(
        [
            *LITE0,
            f"--model.prior={tmp_path / 'prior'}",
            "--data.n=2",
            "--model.steps=3",
            "--model.pilot=8",
            "--data.strengths=[0,1]",
            f"--out={tmp_path / 'out'}",
        ]
    )
    folder = RunFolder(tmp_path / "out")
    assert folder.read_manifest()["prior"]["family"] == family
    assert folder.samples()["finite"].to_pylist() == [True] * 4
    assert (tmp_path / "out" / "report.html").exists()


def test_as_a_program_a_user_error_has_no_traceback(tmp_path):
    """One process, for the exit status and the two streams."""
    args = [sys.executable, "sample.py", *MIXTURE, "--model.energy=Linaer", f"--out={tmp_path / 'out'}"]
    ended = subprocess.run(args, cwd=CONFIGS.parent.parent, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: model.energy: unknown class 'Linaer'")
    assert ended.stderr.count("\n") == 1


def test_apples_gpu_has_no_float64(tmp_path, monkeypatch):
    """ "auto" takes the CPU where Lightning would take mps; mps by its name is refused before anything is done."""
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(FabricMPS, "is_available", staticmethod(lambda: True))
    settings = {"logger": False, "enable_checkpointing": False, "inference_mode": False, "devices": 1}
    assert Trainer(**settings, accelerator="auto").strategy.root_device.type == "mps"
    assert Trainer(**settings, accelerator=without_mps("auto")).strategy.root_device.type == "cpu"
    cli = SamplingCLI([*MIXTURE, "--trainer.accelerator=auto"])
    assert cli.trainer.strategy.root_device.type == "cpu"
    prior, unit = GaussianMixture([1.0], [[0.0, 0.0]], [1.0], points=60), Projection([1.0, 0.0])
    ask = {"energy": Linear(False), "guidance": DPS(), "pilot": 0, "steps": 4, "n": 2}
    assert len(tilt(prior, unit, [0.0, 1.0], out=tmp_path / "cpu", **ask).curve) == 2
    with pytest.raises(ValueError, match=r"found mps.*accelerator=cpu"):
        tilt(prior, unit, [0.0, 1.0], out=tmp_path / "mps", accelerator="mps", **ask)
    assert not (tmp_path / "mps" / "manifest.json").exists()


def test_main_says_where_the_report_is(tmp_path, capsys):
    sampling_cli.main([*MIXTURE, f"--out={tmp_path}"])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


def test_what_a_run_cannot_say_is_said_where_it_ends(tmp_path, capsys):
    """DPS far beyond its weights: bounds, and what would help, on the terminal as in summary.json."""
    main(
        [
            *MIXTURE,
            "--model.guidance=DPS",
            "--data.strengths=[0,20]",
            "--data.n=8",
            f"--out={tmp_path / 'run'}",
        ]
    )
    notes = RunFolder(tmp_path / "run").read_summary()["warnings"]
    assert any("only bounds" in note for note in notes)
    assert all(f"note: {note}" in capsys.readouterr().err for note in notes[:1])


def test_bfloat16_that_is_computed_in_software_is_told(monkeypatch):
    """Where the CPU has no instructions for it; never of a GPU, nor of float32."""
    for fast in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda fast=fast: fast)
        said = slow_bfloat16(torch.device("cpu"), trainer="bf16-mixed", model="bfloat16")
        assert (said is None) == fast
    assert "--trainer.precision 32-true --model.precision float32" in said
    assert slow_bfloat16(torch.device("cpu"), trainer="32-true", model="float32") is None
    assert slow_bfloat16(torch.device("cuda"), model="bfloat16") is None
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a build without oneDNN
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "float32" in slow_bfloat16(torch.device("cpu"), model="bfloat16")
