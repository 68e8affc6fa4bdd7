"""Noise-aware twins serve guidance alone: they change the shift, never the sample's activation, nor strength 0."""

import json
from dataclasses import replace
from shutil import copytree

import pytest
import torch
from lightning import Trainer
from prior_folders import ddpm, write_pixel
from safetensors.torch import load_file
from torch import nn

from tiltlens.energies import Linear
from tiltlens.errors import UserError
from tiltlens.guidance import DPS, LGD, MPGD, Calibrated, Learned, MomentMatched
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.noise_aware_module import OUTPUT, NoiseAwareModule
from tiltlens.modules.own_samples import read_samples
from tiltlens.modules.sampling_cli import main
from tiltlens.modules.sampling_module import SamplingModule
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import load_prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling.pilot import SPREAD
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Encoder, UnitBank, build_unit, load_encoder, register_encoder
from tiltlens.units.noise_aware import NoiseAware, TwinConfig, load_twin, place, save_twin, twin_of
from tiltlens.units.twins import adopt_twins

UNITS = ["small-net,channel=1", "small-net,layer=0,channel=2"]
GUIDANCES = [Calibrated(), Learned(shadows=32), DPS(), LGD(), MPGD(), MomentMatched()]
WINDOW = (-3.0, 3.0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A prior folder, an encoder of two layers, and folders of twins: `same` with its weights, `other` with random ones."""
    folder = tmp_path_factory.mktemp("noise-aware")
    torch.manual_seed(0)
    write_pixel(folder / "prior", ddpm())
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 3))
    # weights that half precision holds, so that a saved twin is the encoder to the bit
    net.load_state_dict({k: (4 * v).half().float() for k, v in net.state_dict().items()})
    register_encoder(Encoder(net, 8, name="small-net"))
    student = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 8, 3))
    register_encoder(Encoder(student, 8, name="small-student"))
    encoder, prior = load_encoder("small-net"), load_prior(str(folder / "prior"))
    whose = {"name": encoder.name, "sha256": encoder.fingerprint}
    config = TwinConfig(whose, {"name": prior.name, "sha256": prior.fingerprint}, WINDOW)
    save_twin(encoder, config, folder / "same")
    torch.manual_seed(1)
    other = twin_of(encoder)
    for p in other.model.parameters():
        p.normal_(0, 0.3)
    save_twin(other, config, folder / "other")
    return folder, prior, encoder, config


def sample(parts, guidance, twin=None, strength=2.0):
    folder, prior, _encoder, _ = parts
    bank = UnitBank([build_unit(u) for u in UNITS])
    if twin:
        bank.adopt(load_twin(folder / twin, bank.encoders, prior.fingerprint))
    sampler = Sampler(prior, bank, Linear(), guidance, steps=6)
    pilots = sampler.run_pilot(64, 32)
    sampler.calibrate(pilots)
    return sampler, sampler.sample([Row(u, strength, seed) for u in (0, 1) for seed in range(3)])


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda g: type(g).__name__)
def test_a_twin_with_the_encoders_weights_changes_nothing_and_another_changes_the_shift(parts, guidance):
    _, plain = sample(parts, guidance)
    _, same = sample(parts, guidance, "same")
    assert torch.equal(same.images, plain.images)
    assert torch.equal(same.log_w, plain.log_w)
    _, other = sample(parts, guidance, "other")
    assert not torch.allclose(other.images, plain.images, atol=1e-4)


@pytest.mark.parametrize("guidance", [Calibrated(), DPS()], ids=lambda g: type(g).__name__)
def test_activations_are_the_encoders_own_and_strength_0_is_the_base_chain(parts, guidance):
    sampler, found = sample(parts, guidance, "other")
    bank = UnitBank([build_unit(u) for u in UNITS])
    own = bank.read(found.images, torch.tensor([0, 0, 0, 1, 1, 1]))[:, 0].double()
    torch.testing.assert_close(found.activation.double(), own, rtol=1e-5, atol=1e-5)
    assert torch.equal(sampler.pilots[0].path[-1], sampler.pilots[0].members)
    _, free = sample(parts, guidance, "other", 0.0)
    _, base = sample(parts, guidance, None, 0.0)
    assert torch.equal(free.images, base.images)
    assert torch.equal(free.path_kl, torch.zeros_like(free.path_kl))


def test_it_reads_within_its_levels_and_the_encoder_without(parts):
    folder, prior, _encoder, _ = parts
    bank, x = UnitBank([build_unit(UNITS[0])]), torch.rand(2, 3, 8, 8) * 2 - 1
    bank.adopt(load_twin(folder / "other", bank.encoders, prior.fingerprint))
    which = torch.zeros(2, dtype=torch.long)
    own, twin = bank.read(x, which), bank.read(x, which, 0.0)
    assert not torch.allclose(own, twin)
    for level, expected in ((None, own), (-3.1, own), (-3.0, twin), (3.0, twin), (3.1, own)):
        assert torch.equal(bank.read(x, which, level), expected)
        assert torch.equal(bank.read_all(x, level)[:, 0], expected)


def test_auto_passes_over_another_prior_and_says_so_but_not_over_damage(parts, tmp_path, monkeypatch):
    folder, prior = parts[:2]
    copytree(folder / "same", tmp_path / "twin")
    monkeypatch.setattr("tiltlens.units.noise_aware.BUNDLED", tmp_path / "twin")
    bank = UnitBank([build_unit(UNITS[0])])
    (note,) = adopt_twins(bank, ["auto"], "0" * 64)
    assert (
        "the encoder itself reads clean estimates, for the bundled reader was trained under the prior" in note
    )
    assert not bank.twins
    assert adopt_twins(bank, ["auto"], prior.fingerprint) == []
    assert bank.twins
    weights = tmp_path / "twin" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        adopt_twins(bank, ["auto"], prior.fingerprint)


def test_who_reads_in_place_of_the_bundled_reader_is_said(parts, tmp_path, capsys):
    """Of an encoder that it was not trained for: on the terminal, in summary.json, and so in the report."""
    main([
        f"--model.prior={parts[0] / 'prior'}", f"--model.unit={UNITS[0]}", "--model.noise_aware=auto", "--model.steps=2",
        "--model.pilot=8", "--data.n=1", "--data.strengths=[0]", "--trainer.accelerator=cpu", "--trainer.logger=false",
        f"--out={tmp_path}",
    ])  # fmt: skip
    note = RunFolder(tmp_path).read_summary()["warnings"][0]
    assert (
        "the encoder itself reads clean estimates, for the bundled reader was trained for the encoder" in note
    )
    assert "/" not in note  # no machine's path
    assert note in capsys.readouterr().err


def test_a_run_is_named_by_its_twin(parts):
    folder = parts[0]
    module = SamplingModule(str(folder / "prior"), UNITS[0], steps=4, noise_aware=str(folder / "other"))
    module.load()
    (sha256,) = module.describe()["noise_aware"].values()
    assert len(sha256) == 64
    twin, config = module.bank.twins[parts[2].fingerprint], parts[3]
    assert NoiseAware(twin.twin, config).sha256 == sha256
    assert NoiseAware(twin.twin, replace(config, log_snr=(-1.0, 3.0))).sha256 != sha256
    plain = SamplingModule(str(folder / "prior"), UNITS[0], steps=4)
    plain.load()
    assert "noise_aware" not in plain.describe()


def test_what_does_not_fit_is_refused(parts, tmp_path):
    folder, prior, encoder, config = parts
    with pytest.raises(FileNotFoundError, match=r"config.json and model.safetensors.*NoiseAwareModule"):
        load_twin(tmp_path, [encoder], prior.fingerprint)
    with pytest.raises(ValueError, match=r"trained under the prior .* train one under this prior"):
        load_twin(folder / "same", [encoder], "0" * 64)
    with pytest.raises(ValueError, match=r"expected the encoder it was trained for, small-net .* found none"):
        load_twin(folder / "same", [], prior.fingerprint)
    save_twin(Encoder(nn.Linear(2, 2), 8), config, tmp_path / "wrong")
    with pytest.raises(ValueError, match="of another architecture"):
        load_twin(tmp_path / "wrong", [encoder], prior.fingerprint)
    save_twin(encoder, replace(config, log_snr=(0, 1)), tmp_path / "torn")
    (tmp_path / "torn" / "config.json").write_text(json.dumps({"encoder": {}}))
    with pytest.raises(ValueError, match="not that of a noise-aware twin"):
        load_twin(tmp_path / "torn", [encoder], prior.fingerprint)
    for wrong in ({"layers": ()}, {"until": -7.0}, {"own": 0}, {"own_share": 1.5}, {"log_snr": (2, 1)}):
        with pytest.raises(UserError, match=f"model.{next(iter(wrong))}"):
            NoiseAwareModule("small-net", prior=str(folder / "prior"), **wrong)
    with pytest.raises(ValueError, match="unknown layer 'nope'"):
        NoiseAwareModule("small-net", prior=str(folder / "prior"), layers=("nope",))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "what",
    [
        {"layers": (OUTPUT, "0")},
        {"units": UNITS},
        {"units": UNITS, "network": "small-student", "layers": ("0", "2")},
    ],
    ids=["layers", "units", "another network"],
)
def test_training_brings_the_twin_nearer_to_what_the_encoder_says_of_the_sample(what, parts, tmp_path):
    """Held out, and more than the best affine map of the plain reading could."""
    folder, prior, encoder, _ = parts
    module = NoiseAwareModule(
        "small-net", prior=str(folder / "prior"), **what, log_snr=WINDOW, own=64, steps=4,
        learning_rate=3e-3, weight_decay=0.0,
    )  # fmt: skip
    data = ImageFolderData("FakeData", "FakeData", size=8, batch_size=64, cache=tmp_path, val_n=64)
    trainer = Trainer(
        max_steps=150, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=None, limit_val_batches=0,
    )  # fmt: skip

    def error():
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            return float(module.errors_of(torch.rand(256, 3, 8, 8, generator=generator) * 2 - 1, generator)[0][:, module.task.told].mean())  # fmt: skip

    before = []
    module.on_train_start = lambda: before.append(error())
    trainer.fit(module, data)
    assert error() < 0.9 * before[0]
    twin = load_twin(module.export(tmp_path), [encoder], prior.fingerprint)
    assert twin.config.trained["steps"] == 150
    x, level = torch.rand(2, 3, 8, 8), torch.zeros(2)
    found, kept = (
        t(x, level) if "units" in what else t.outputs(x, [None])[None] for t in (twin.twin, module.twin)
    )
    torch.testing.assert_close(found, kept, rtol=1e-2, atol=1e-2)  # half precision
    assert (tmp_path / next(p.name for p in tmp_path.glob("own-*.safetensors"))).is_file()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(parts, tmp_path, monkeypatch):
    folder, step = parts[0], NoiseAwareModule.training_step

    def fit(out, *more):
        return TrainingCLI([
            "fit", f"--out={out}", "--model=tiltlens.modules.noise_aware_module.NoiseAwareModule",
            "--model.encoder=small-net", f"--model.prior={folder / 'prior'}", "--model.own=8", "--model.steps=3",
            "--data.train=FakeData", "--data.val=FakeData", f"--data.cache={tmp_path}", "--data.size=8",
            "--data.batch_size=32", "--trainer.callbacks+=tiltlens.modules.ema.WarmEMA", "--trainer.accelerator=cpu",
            "--trainer.logger=false", "--trainer.limit_val_batches=0", "--trainer.limit_train_batches=4",
            "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.max_steps=10", *more,
        ])  # fmt: skip

    def break_off(self, batch, number):
        if self.global_step == 6:
            raise RuntimeError("broken off")
        return step(self, batch, number)

    fit(tmp_path / "whole")
    monkeypatch.setattr(NoiseAwareModule, "training_step", break_off)
    with pytest.raises(RuntimeError, match="broken off"):
        fit(tmp_path / "halved")
    kept = torch.load(tmp_path / "halved" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    monkeypatch.setattr(NoiseAwareModule, "training_step", step)
    fit(tmp_path / "halved", "--ckpt_path=last")
    one, two = (load_file(tmp_path / x / "noise-aware" / "model.safetensors") for x in ("whole", "halved"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_twin_of_some_units_reads_these_and_no_others(parts, tmp_path):
    """And begins as the encoder, at every noise level; its image of a unit is the row's alone."""
    folder, prior, encoder, config = parts
    module = NoiseAwareModule("small-net", prior=str(folder / "prior"), units=[UNITS[1]], own=0, own_share=0)
    x, which = torch.rand(4, 3, 8, 8) * 2 - 1, torch.zeros(4, dtype=torch.long)
    module.twin.mean.fill_(0.7), module.twin.std.fill_(1e6)  # beyond half precision
    assert place(module.units[0]) == "layer=0,channel=2"
    assert place(build_unit("torchvision:squeezenet1_1,weights=random:1,class=goldfish")) == "class=goldfish"
    save_twin(module.twin, replace(config, units=["layer=0,channel=2"]), tmp_path)
    bank = UnitBank([build_unit(UNITS[1])])
    own = bank.read(x, which)
    bank.adopt(load_twin(tmp_path, [encoder], prior.fingerprint))
    for level in (-2.0, 0.0, 3.0):
        torch.testing.assert_close(bank.read(x, which, level), own, rtol=1e-5, atol=1e-4)
        assert torch.equal(bank.read(x, which, level)[2:3], bank.read(x[2:3], which[:1], level))
    both = UnitBank([build_unit(u) for u in UNITS])
    with pytest.raises(
        ValueError, match=r"was trained for layer=0,channel=2 alone, found small-net,channel=1"
    ):
        adopt_twins(both, [tmp_path], prior.fingerprint)
    torch.nn.init.normal_(module.twin.level[-1].weight)
    save_twin(module.twin, replace(config, units=["layer=0,channel=2"]), tmp_path)
    both.adopt(load_twin(tmp_path, [encoder], prior.fingerprint))
    mixed = both.read(x, torch.tensor([0, 1, 0, 1]), 0.0)
    assert torch.equal(mixed[::2], UnitBank([build_unit(UNITS[0])]).read(x[::2], which[:2]))
    bank.adopt(both.twins[encoder.fingerprint])
    assert torch.equal(mixed[1::2], bank.read(x[1::2], which[:2], 0.0))
    assert torch.equal(both.read_all(x, 0.0)[1::2, 1], mixed[1::2])
    for wrong, why in (
        ({"units": ["bundled,class=horse"]}, "not of the encoder small-net"),
        ({"network": "small-student"}, "expected model.units"),
        ({"units": UNITS, "network": "small-student", "layers": ("nope",)}, "unknown layer 'nope'"),
    ):
        with pytest.raises(UserError, match=why):
            NoiseAwareModule("small-net", prior=str(folder / "prior"), **wrong)


def test_a_conditional_mean_is_expected_of_a_reader_of_the_unit_alone(parts, tmp_path):
    """Within its levels; of sums too, and not of a soft minimum, nor of a twin of the whole encoder."""
    folder, prior, encoder, config = parts
    module = NoiseAwareModule("small-net", prior=str(folder / "prior"), units=UNITS, own=0, own_share=0)
    save_twin(module.twin, replace(config, units=[place(build_unit(u)) for u in UNITS]), tmp_path)
    reader = load_twin(tmp_path, [encoder], prior.fingerprint)
    a, b = UNITS
    bank = UnitBank(
        [
            build_unit(u)
            for u in (a, f"{a} versus {b}", f"0.5*{a} + 2*{b}", f"{a} and not {b}", "small-net,channel=0")
        ]
    )
    levels = [-3.1, -3.0, 0.0, 3.0, 3.1]
    assert bank.expected(levels) == [[False] * 5] * 5
    assert not bank.has_readers
    bank.adopt(reader)
    assert bank.has_readers
    within = [False, True, True, True, False]
    assert bank.expected(levels) == [within, within, within, [False] * 5, [False] * 5]
    run = SamplingModule(str(folder / "prior"), a, steps=4, noise_aware=str(tmp_path))
    run.load()
    assert run.describe()["reader_slope_std"] == SPREAD  # steered otherwise than by the pilot's slopes alone
    bank.adopt(load_twin(folder / "same", [encoder], prior.fingerprint))
    assert bank.expected(levels) == [[False] * 5] * 5
    assert not bank.has_readers


def test_the_level_reaches_a_reader_by_its_tile_and_its_gain(parts):
    module = NoiseAwareModule("small-net", prior=str(parts[0] / "prior"), units=UNITS, own=0, own_share=0)
    reader, x = module.twin, torch.rand(3, 3, 7, 9)
    assert torch.equal(reader(x, torch.full((3,), -1.0)), reader(x, torch.full((3,), 2.0)))
    torch.nn.init.normal_(reader.level[-1].weight, 0, 0.1)
    low, mixed = reader(x, torch.full((3,), -1.0)), reader(x, torch.tensor([-1.0, 2.0, -1.0]))
    torch.testing.assert_close(mixed[::2], low[::2])
    assert not torch.allclose(mixed[1], low[1], atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_validate_alone_says_how_far_the_encoder_itself_is(parts, tmp_path):
    module = NoiseAwareModule("small-net", prior=str(parts[0] / "prior"), own=8, steps=3, log_snr=WINDOW)
    data = ImageFolderData("FakeData", "FakeData", size=8, batch_size=32, cache=tmp_path, val_n=32)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path
    )  # fmt: skip
    (found,) = trainer.validate(module, data, verbose=False)
    assert 0 < found["val_error_output"] < float("inf")


def test_readings_are_of_the_samples_that_were_read(tmp_path):
    """Other samples of the same number, in the same folder, are read anew."""
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, enable_checkpointing=False)
    read = lambda x: read_samples(trainer, x, "who", lambda images: images.mean((1, 2, 3))[:, None], "cpu")  # noqa: E731
    ones = torch.ones(4, 3, 8, 8)
    assert read(ones).mean() == 1
    assert read(0 * ones).mean() == 0


@pytest.mark.parametrize("batch", [5, 6, 9, 16])
def test_every_batch_meets_every_quarter_of_the_levels(batch, parts):
    module = NoiseAwareModule("small-net", prior=str(parts[0] / "prior"), own=0, own_share=0, log_snr=WINDOW)
    found = module.estimates(torch.zeros(batch, 3, 8, 8), torch.Generator().manual_seed(0))[1]
    found = module._parts[1].denoiser.schedule.log_snr[found]
    assert len(found) == batch
    assert len(set(found.tolist())) == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_the_last_held_out_batch_may_be_short(rows, parts):
    module = NoiseAwareModule(encoder="small-net", prior=str(parts[0] / "prior"), own=0, own_share=0)
    found, steps = module.estimates(torch.zeros(rows, 3, 8, 8), torch.Generator().manual_seed(0))
    assert found.shape == (rows, 3, 8, 8)
    assert len(steps.unique()) == len(steps) == rows
