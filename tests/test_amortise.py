"""Laws of amortisation: an untrained control is the base chain, weights are exact whatever the control, matching the adjoint
is the gradient of the objective and its fixed point the optimum, and training ends below every training-free twist."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from prior_folders import unet, write_pixel

from tiltlens.energies import Linear, Target
from tiltlens.errors import UserError
from tiltlens.guidance import DPS, LGD, MPGD, Amortised, Calibrated, Guidance, MomentMatched
from tiltlens.guidance.amortised import AdapterConfig, save_control
from tiltlens.guidance.control import Control, Head, new_control
from tiltlens.modules.amortise_module import AmortiseModule
from tiltlens.modules.command_line import run
from tiltlens.modules.sampling_cli import main
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.priors import GaussianMixture, load_prior
from tiltlens.run_folder import RunFolder
from tiltlens.sampling import Particles
from tiltlens.sampling.adjoint import (
    drawn_steps,
    lean_adjoint,
    matches,
    matching_loss,
    shift_of,
    step_energy,
    walk,
)
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.units import Projection, UnitBank, build_unit

CONFIG = Path(__file__).parent.parent / "configs" / "train" / "amortise-smoke.yaml"
W, S, STEPS = [1.0, 0.5], 1.0, 24  # as in the smoke config
MIXTURE = ([0.7, 0.3], [[-1.0, 0.0], [2.0, 1.0]], [0.5, 0.25])
CHAIN = {"steps": STEPS, "eta": 1.0, "spacing": "log-snr", "clip": False}


def sampler(prior, guidance=None, steps=STEPS, energy=None, unit=None, method=None, clip=False):
    bank = UnitBank([unit or Projection(W)])
    made = Sampler(
        prior, bank, energy or Linear(False), guidance or Guidance(), steps, clip=clip, method=method
    )
    needs = guidance is not None and guidance.needs_pilot
    made.calibrate(made.run_pilot(256, 256) if needs else None)
    return made


def rows(made, n, strength=S):
    return made.constraint.rows(
        torch.zeros(n, dtype=torch.long), torch.full((n,), strength, dtype=made.dtype)
    )


def noise(made, n, seed=0):
    return Noise(range(seed, seed + n), made.chain.denoiser.shape, dtype=made.dtype, domain="amortise")


def stirred(control, scale=0.3):
    """A control that looks trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in control.trained():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return control


def kept(control, made, folder, strength=S, until=None):
    config = AdapterConfig.of(control, made.prior, made.constraint, strength, CHAIN, until, {})
    return str(save_control(control, config, folder / "adapter"))


def pixel_unit():
    return build_unit("tf_efficientnet_lite0,weights=random:1,layer=blocks.1,tokens=patch,channel=3")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    write_pixel(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The smoke config's run."""
    out = tmp_path_factory.mktemp("amortised")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py"])
        TrainingCLI(
            [
                "fit",
                f"--config={CONFIG}",
                f"--out={out}",
                "--trainer.logger=false",
                "--trainer.accelerator=cpu",
            ]
        )
    return out


# --- an untrained control ----------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["head", "lora"])
def test_an_untrained_control_is_the_base_chain_to_the_bit(kind, clip, pixels, tmp_path):
    prior, unit = (
        (GaussianMixture(*MIXTURE), None) if kind == "head" else (load_prior(str(pixels)), pixel_unit())
    )
    plain = sampler(prior, steps=5, unit=unit, clip=clip)
    folder = kept(new_control(prior.denoiser, 2, ["attention", "convolution"]), plain, tmp_path)
    made = sampler(prior, Amortised(folder), steps=5, unit=unit, clip=clip)
    base = plain.sample([Row(0, 0.0, i) for i in range(3)])
    found = made.sample([Row(0, S, i) for i in range(3)])
    assert torch.equal(found.images, base.images)
    assert found.path_kl.abs().max() == 0
    torch.testing.assert_close(found.log_w, -S * base.energy)


@pytest.mark.parametrize("kind", ["head", "lora"])
def test_a_row_is_the_same_in_any_company_and_strength_0_is_the_base_chain(kind, pixels, tmp_path):
    prior, unit = (
        (GaussianMixture(*MIXTURE), None) if kind == "head" else (load_prior(str(pixels)), pixel_unit())
    )
    plain = sampler(prior, steps=5, unit=unit)
    folder = kept(stirred(new_control(prior.denoiser, 2, ["attention"])), plain, tmp_path)
    made = sampler(prior, Amortised(folder), steps=5, unit=unit)
    names = [Row(0, s, i) for s in (0.0, 0.5, S) for i in range(2)]
    together = made.sample(names)
    for i, name in list(enumerate(names))[1::2]:
        alone = made.sample([name])
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-6, rtol=0)
        torch.testing.assert_close(alone.log_w[0], together.log_w[i])
    assert torch.equal(together.images[:2], plain.sample(names[:2]).images)
    kl = together.path_kl.reshape(3, 2).mean(1)
    assert kl[0] == 0
    assert 0 < kl[1] < kl[2]


def test_a_scaled_adapter_is_the_adapter_and_scale_0_the_base(pixels):
    prior = load_prior(str(pixels))
    control = stirred(new_control(prior.denoiser, 2, ["attention", "convolution"]))
    x = torch.randn(2, *prior.denoiser.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        base = prior.denoiser(x, 7)
        torch.testing.assert_close(
            control.scaled(1.0).estimate(x, 7, base), control.estimate(x, 7, base), atol=1e-5, rtol=1e-4
        )
        assert torch.equal(control.scaled(0.0).estimate(x, 7, base), base)


# --- the objective -----------------------------------------------------------------------


@pytest.mark.parametrize("energy", [Linear(False), Target(1.0, 0.7, False)], ids=["linear", "target"])
def test_at_a_control_of_zero_matching_is_the_gradient_of_the_objective(energy):
    """s E + path KL, differentiated by autograd through the whole chain, path by path of the same noise."""
    made = sampler(GaussianMixture(*MIXTURE), steps=5, energy=energy)
    torch.manual_seed(0)
    control, chain, bound = Head(made.prior.denoiser, width=8), made.chain, rows(made, 6)
    path = walk(chain, control, bound, noise(made, 6))
    found = matches(chain, path, lean_adjoint(chain, path, bound))
    matching_loss(chain, control, found, torch.arange(6), range(4), [1.0] * 4).backward()
    found = [p.grad.clone() for p in control.trained()]
    control.zero_grad()
    draws = noise(made, 6)
    x, kl = chain.start(draws).x, 0.0
    for number, (t, c) in enumerate(zip(chain.indices, chain.coefficients)):
        x0_hat = chain.denoiser(x, t)
        if number == len(chain) - 1:
            x = x0_hat
            break
        delta = c.x0 * shift_of(control, x, t, x0_hat, False)
        kl = kl + delta.square().sum(1) / (2 * c.v**2)
        x = c.x0 * x0_hat + c.x * x + delta + c.v * draws.draw("step")
    (S * bound.energy_of(bound.read(x)) + kl).mean().backward()
    torch.testing.assert_close(x.detach(), path.x_0)
    assert max(g.abs().max() for g in found) > 1e-3
    for mine, p in zip(found, control.trained()):
        torch.testing.assert_close(mine, p.grad, atol=1e-10, rtol=1e-8)


class Matched(Control):
    """Shifts by given amounts, a step each."""

    kind = "head"

    def __init__(self, shifts):
        super().__init__()
        self.shifts = shifts

    def estimate(self, x_t, t, x0_hat):
        return x0_hat + self.shifts[t]


def test_on_a_gaussian_the_matched_control_has_a_weight_that_its_start_alone_decides():
    """x0_hat is affine there, so the adjoint is the same on all paths; delta = -v^2 a is then the optimum of the discrete
    chain: the loss is zero, s E - log dP/dQ is -log psi(x_T), affine in the start, whatever the noise of the steps, and its
    mean over starts is -log Z up to the little that the start, which is not steered, knows."""
    made = sampler(GaussianMixture([1.0], [[0.4, -0.3]], [0.5]), steps=8)
    bound, chain = rows(made, 16), made.chain
    idle = walk(chain, Head(made.prior.denoiser), bound, noise(made, 16))
    adjoint = lean_adjoint(chain, idle, bound)
    torch.testing.assert_close(adjoint[0], adjoint[0][:1].expand_as(adjoint[0]))
    steps = zip(chain.indices[:-1], chain.coefficients, adjoint)
    control = Matched({t: -(c.v**2) / c.x0 * a[0] for t, c, a in steps})
    path = walk(chain, control, bound, noise(made, 16, seed=50))
    start = torch.cat([path.states[0].detach(), torch.ones(16, 1).double()], 1)
    affine = start @ torch.linalg.lstsq(start, path.objective[:, None]).solution
    torch.testing.assert_close(path.objective[:, None], affine, atol=1e-9, rtol=0)
    found = matches(chain, path, lean_adjoint(chain, path, bound))
    assert float(matching_loss(chain, control, found, torch.arange(16), range(7), [1.0] * 7)) < 1e-18
    w = torch.exp(-walk(chain, Head(made.prior.denoiser), rows(made, 20_000), noise(made, 20_000)).energy)
    z = math.exp(-float(path.objective.mean()))
    assert abs(float(w.mean()) - z) < 4 * float(w.std()) / 20_000**0.5 + 0.01 * z


def test_the_loss_of_drawn_steps_is_on_average_that_of_all():
    made = sampler(GaussianMixture(*MIXTURE), steps=5)
    control, bound, every = stirred(Head(made.prior.denoiser, width=8)), rows(made, 4), torch.arange(4)
    path = walk(made.chain, control, bound, noise(made, 4))
    found = matches(made.chain, path, lean_adjoint(made.chain, path, bound))
    each = [float(matching_loss(made.chain, control, found, every, [k], [1.0]).detach()) for k in range(4)]
    whole = float(matching_loss(made.chain, control, found, every, range(4), [1.0] * 4).detach())
    assert sum(each) == pytest.approx(whole)
    generator, drawn = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        numbers, weights = drawn_steps(step_energy(made.chain, found), 2, generator)
        drawn.append(sum(w * each[k] for k, w in zip(numbers, weights)))
    drawn = torch.tensor(drawn)
    assert abs(float(drawn.mean()) - whole) < 4 * float(drawn.std()) / 4000**0.5


@pytest.mark.parametrize("until", [None, 0.0])
def test_what_is_trained_on_is_what_is_sampled(until, tmp_path):
    """A walk and a sampled row of the same noise are the same path, of the same weight; beyond `until` no step is shifted."""
    prior = GaussianMixture(*MIXTURE)
    plain, control = sampler(prior, steps=8), stirred(Head(prior.denoiser, width=8))
    made = sampler(prior, Amortised(kept(control, plain, tmp_path, until=until)), steps=8)
    found = made.sample([Row(0, S, i) for i in range(4)])
    draws = Noise(range(4), made.chain.denoiser.shape, dtype=made.dtype)
    path = walk(plain.chain, control, rows(plain, 4), draws, until)
    torch.testing.assert_close(found.images, path.x_0)
    torch.testing.assert_close(found.path_kl, path.path_kl)
    torch.testing.assert_close(found.log_w, -path.objective)
    guided = found.step_kl.mean(0) > 0
    expected = made.chain.log_snr <= (math.inf if until is None else until)
    assert guided[:-1].tolist() == expected[:-1].tolist()


def test_particles_without_a_twist_say_that_they_are_weighed_once(tmp_path):
    """No ESS is told of steps at which nothing was weighed."""
    prior = GaussianMixture(*MIXTURE)
    folder = kept(stirred(Head(prior.denoiser), 0.05), sampler(prior), tmp_path)
    made = sampler(prior, Amortised(folder), method=Particles(8))
    with pytest.warns(UserWarning, match="Amortised has no twist"):
        found = made.sample([*(Row(0, 0.0, i) for i in range(8)), *(Row(0, S, i) for i in range(8))])
    assert (found.ess[:8] == 8).all()
    assert found.ess[8:, :-1].isnan().all()
    assert ((found.ess[8:, -1] >= 1) & (found.ess[8:, -1] < 8)).all()


# --- exact weights -----------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, Particles(64)], ids=["independent", "particles"])
@pytest.mark.parametrize("control", ["trained", "stirred"])
def test_weights_are_exact_whatever_the_control(control, method, trained, tmp_path):
    """E_Q[w] = Z within four standard errors, at the strength of training and at half of it, on a finer chain too."""
    prior = GaussianMixture(*MIXTURE)
    folder = str(trained / "adapter")
    if control == "stirred":
        torch.manual_seed(0)
        folder = kept(stirred(Head(prior.denoiser), 0.05), sampler(prior), tmp_path)
    made = sampler(prior, Amortised(folder), steps=60, method=method)
    for s in (S, S / 2):
        log_w = made.sample([Row(0, s, i) for i in range(2048)]).log_w
        w = (
            torch.exp(log_w - float(prior.log_z(W, s))).reshape(-1, 64).mean(1)
        )  # groups are what is independent
        assert abs(float(w.mean()) - 1) < 4 * float(w.std()) / len(w) ** 0.5, f"strength {s}"


def test_training_ends_below_the_training_free_twists(trained):
    """gap = path KL + s E + log Z, the mean of log Z - log w, on the chain of training; three standard errors apart. The natural law is exact but for the
    pilot's 64 activations along a line, and its shifts are for finite steps: training, of a hundred steps, is not behind it."""
    prior, n = GaussianMixture(*MIXTURE), 2048

    def gap(guidance):
        found = (
            float(prior.log_z(W, S)) - sampler(prior, guidance).sample([Row(0, S, i) for i in range(n)]).log_w
        )
        return float(found.mean()), float(found.std()) / n**0.5

    mine, error = gap(Amortised(str(trained / "adapter")))
    assert -4 * error < mine < 0.25
    theirs, other = gap(Calibrated())
    assert mine < theirs + 3 * math.hypot(error, other), f"natural: {theirs:.3f}, amortised {mine:.3f}"
    tweedie = {"law": "gaussian", "finite": False}
    for twist in (
        DPS(),
        LGD(),
        MPGD(),
        MomentMatched(),
        Calibrated(**tweedie),
        Calibrated(memory=0, **tweedie),
    ):
        theirs, other = gap(twist)
        name = type(twist).__name__
        assert mine + 3 * math.hypot(error, other) < theirs, f"{name}: {theirs:.3f}, amortised {mine:.3f}"


# --- command lines -----------------------------------------------------------------------


def test_an_adapter_of_a_network_is_trained_and_sampled_from_the_command_line(pixels, tmp_path, capsys):
    unit = "--model.unit=tf_efficientnet_lite0,weights=random:1,layer=blocks.1,tokens=patch,channel=3"
    common = [
        f"--model.prior={pixels}",
        unit,
        "--model.steps=4",
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
    ]
    module = "tiltlens.modules.amortise_module.AmortiseModule"
    fit = [
        "fit", f"--model={module}", *common, "--model.pool=16", "--model.paths=4",
        "--model.batch_size=4", "--model.round_steps=3", "--model.rank=2", "--trainer.enable_progress_bar=false", "--model.strength=2",
    ]  # fmt: skip
    TrainingCLI([*fit, "--trainer.max_steps=3", f"--out={tmp_path / 'whole'}"])
    TrainingCLI(
        [*fit, "--trainer.max_steps=2", "--model.decay=0", "--model.warmup=0", f"--out={tmp_path / 'cut'}"]
    )
    config = json.loads((tmp_path / "whole" / "adapter" / "config.json").read_text())
    assert config["strength"] == 2.0
    assert config["chain"] == {"steps": 4, "eta": 1.0, "spacing": "log-snr", "clip": False}
    assert config["trained"]["steps"] == 3
    asked = [
        *common, "--model.pilot=8", "--data.n=2", "--model.guidance=tiltlens.guidance.Amortised",
        f"--model.guidance.adapter={tmp_path / 'whole' / 'adapter'}",
    ]  # fmt: skip
    main([*asked, "--data.strengths=[0,2]", f"--out={tmp_path / 'run'}"])
    found = {r["strength"]: r for r in RunFolder(tmp_path / "run").read_summary()["rows"]}
    assert found[2.0]["path_kl"] > 0
    with pytest.raises(SystemExit) as stop:
        run(lambda: main([*asked, "--data.strengths=[9]", f"--out={tmp_path / 'far'}"]))
    assert stop.value.code == 2
    assert "trained at strength 2" in capsys.readouterr().err


def test_a_loss_that_is_no_number_says_where_and_what_is_left(tmp_path, capsys):
    args = [
        "fit",
        f"--config={CONFIG}",
        f"--out={tmp_path}",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
    ]
    args += [
        "--model.steps=4",
        "--model.paths=4",
        "--model.batch_size=4",
        "--model.pool=8",
        "--model.learning_rate=1e200",
    ]
    with pytest.raises(SystemExit) as stop:
        run(lambda: TrainingCLI(args))
    assert stop.value.code == 2
    assert re.search(
        r"loss = (nan|inf) at batch 1 of round 1 \(step 1\): .* no checkpoint was saved before it",
        capsys.readouterr().err,
    )


@pytest.mark.parametrize("killed", [None, 8])
def test_a_resumed_run_is_the_uninterrupted_one(killed, trained, tmp_path, monkeypatch):
    """To the bit: a round's paths are kept, and what a step reads of them is named by the step; also where the checkpoint is of
    an older round than the one that was broken off."""
    fit = ["fit", f"--config={CONFIG}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    fit += [
        "--model.steps=4",
        "--model.paths=4",
        "--model.batch_size=3",
        "--model.round_steps=3",
        "--model.pool=8",
        "--model.decay=0",
    ]
    steps, step = 4 if killed is None else 10, AmortiseModule.training_step

    def broken_off(self, batch, number):
        if self.global_step == killed:
            raise RuntimeError("broken off")
        return step(self, batch, number)

    TrainingCLI([*fit, f"--trainer.max_steps={steps}", f"--out={tmp_path / 'whole'}"])
    TrainingCLI([*fit, "--trainer.max_steps=2", f"--out={tmp_path / 'cut'}"])
    if killed:
        monkeypatch.setattr(AmortiseModule, "training_step", broken_off)
        with pytest.raises(RuntimeError, match="broken off"):
            TrainingCLI(
                [*fit, f"--trainer.max_steps={steps}", f"--out={tmp_path / 'cut'}", "--ckpt_path=last"]
            )
        monkeypatch.setattr(AmortiseModule, "training_step", step)
    TrainingCLI([*fit, f"--trainer.max_steps={steps}", f"--out={tmp_path / 'cut'}", "--ckpt_path=last"])
    one, two = ((tmp_path / k / "adapter" / "adapter.safetensors").read_bytes() for k in ("whole", "cut"))
    assert one == two
    told = [
        json.loads((tmp_path / k / "adapter" / "config.json").read_text())["trained"]
        for k in ("whole", "cut")
    ]
    assert told[0]["rounds"] == told[1]["rounds"] == -(-steps // 3)


def test_paths_of_another_run_in_the_same_folder_are_not_taken(tmp_path, capsys):
    """A folder in which a run at another rate went far: a new one, stopped and resumed, is that in a folder of its own."""
    fit = [
        "fit",
        f"--config={CONFIG}",
        "--trainer.logger=false",
        "--trainer.accelerator=cpu",
        "--model.steps=4",
    ]
    fit += [
        "--model.paths=4",
        "--model.batch_size=3",
        "--model.round_steps=3",
        "--model.pool=8",
        "--model.decay=0",
    ]
    used, fresh = (f"--out={tmp_path / name}" for name in ("used", "fresh"))
    TrainingCLI([*fit, "--trainer.max_steps=8", "--model.learning_rate=0.1", used])
    for out in (used, fresh):
        TrainingCLI([*fit, "--trainer.max_steps=2", out])
        TrainingCLI([*fit, "--trainer.max_steps=8", "--ckpt_path=last", out])
    one, two = ((tmp_path / k / "adapter" / "adapter.safetensors").read_bytes() for k in ("used", "fresh"))
    assert one == two
    assert 1 <= len(list((tmp_path / "used").glob("paths-*"))) <= 2  # the folder does not grow with the runs
    with pytest.raises(SystemExit):
        run(
            lambda: TrainingCLI(
                [*fit, "--model.strength=3", "--trainer.max_steps=9", "--ckpt_path=last", used]
            )
        )
    assert "model.strength: expected 1.0, found 3.0" in capsys.readouterr().err


def test_accumulated_batches_are_different_ones(trained, tmp_path, monkeypatch):
    seen, loss = [], AmortiseModule.adjoint_loss
    monkeypatch.setattr(
        AmortiseModule, "adjoint_loss", lambda self, n, g: seen.append(g.initial_seed()) or loss(self, n, g)
    )
    TrainingCLI([
        "fit", f"--config={CONFIG}", "--trainer.logger=false", "--trainer.accelerator=cpu", "--model.steps=4", "--model.paths=4",
        "--model.batch_size=2", "--model.pool=8", "--trainer.max_steps=2", "--trainer.accumulate_grad_batches=3",
        f"--out={tmp_path}",
    ])  # fmt: skip
    assert len(set(seen)) == len(seen) == 6


# --- refusals ----------------------------------------------------------------------------


def test_an_adapter_is_refused_where_it_was_not_trained_for(tmp_path):
    prior = GaussianMixture(*MIXTURE)
    folder = kept(Head(prior.denoiser), sampler(prior), tmp_path)
    other = GaussianMixture([1.0], [[0.0, 0.0]], [1.0])
    for message, made in [
        ("trained for the prior", lambda: sampler(other, Amortised(folder))),
        ("trained for the unit", lambda: sampler(prior, Amortised(folder), unit=Projection([1.0, 0.0]))),
        ("trained for the energy", lambda: sampler(prior, Amortised(folder), energy=Target(1.0, 0.5, False))),
        ("expected strengths up to", lambda: sampler(prior, Amortised(folder)).sample([Row(0, 3.0, 0)])),
        ("expected a folder with", lambda: Amortised(str(tmp_path / "none"))),
        ("expected a folder with", lambda: Amortised(str(tmp_path))),
    ]:
        with pytest.raises(UserError, match=message):
            made()


@pytest.mark.parametrize(
    "bad",
    [
        {"strength": 0.0},
        {"eta": 0.0},
        {"pool": 3},
        {"steps": 1},
        {"loss_steps": 0},
        {"batch_size": 500},
    ],
)
def test_what_cannot_be_trained_is_refused(bad):
    (name,) = bad
    with pytest.raises(UserError, match=f"model.{name} "):
        AmortiseModule(**bad)


def test_a_target_that_matches_no_layer_is_refused():
    from tiltlens.priors import lora

    with pytest.raises(UserError, match="matches no"):
        lora.inject(unet(), 2, targets=["to_w"])
