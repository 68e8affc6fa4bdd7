"""Laws of autoguidance as a teacher: what it says, that it is learned, and that nothing else of the training changes."""

import math

import pytest
import torch
from lightning import Trainer
from prior_folders import ddpm, flow, write_pixel
from test_training_prior import BATCHES, TRAINER, train
from torch.utils.data import DataLoader

from tiltlens.errors import UserError
from tiltlens.modules.autoguidance import Autoguidance, Teacher
from tiltlens.modules.checkpoints import identity_of
from tiltlens.modules.prior_module import PriorModule
from tiltlens.priors import load_prior

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def folders(tmp_path):
    """Two priors of one kind; a weak network may be a smaller one."""
    for name, width in (("strong", 8), ("weak", 4)):
        write_pixel(tmp_path / name, ddpm("v_prediction"), block_out_channels=(width, 16))
    return {name: str(tmp_path / name) for name in ("strong", "weak")}


def module(folders, weight=1.5, **settings):
    asked = Autoguidance(folders["weak"], weight)
    return PriorModule(folders["strong"], autoguidance=asked, flip=False, **settings)


def test_the_teacher_extrapolates_clean_estimates(folders):
    """x0_hat is linear in F, so that the law is the same for both."""
    strong, weak = (load_prior(folders[k]).denoiser for k in ("strong", "weak"))
    teacher, x, t = Teacher(Autoguidance(folders["weak"], 1.5), folders["strong"]), torch.randn(2, 3, 8, 8), 7
    f = teacher(x, torch.full((2,), float(strong.schedule.time[t])))
    found = float(strong.skip[t]) * x + float(strong.out[t]) * f
    with torch.no_grad():
        expected = strong(x, t) + 1.5 * (strong(x, t) - weak(x, t))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not f.requires_grad


def test_the_strong_one_is_the_limit_of_no_weight(folders):
    """... and a student that begins with it has nothing to learn, while its error against the images is that of the prior."""
    plain, student = PriorModule(folders["strong"], flip=False), module(folders, weight=1e-9)
    t, x_0 = torch.arange(4), BATCHES[0]["image"]
    found, usual = (m.loss(m, x_0, t, torch.Generator().manual_seed(0), m.teacher) for m in (student, plain))
    assert float(found.loss.max()) < 1e-12
    torch.testing.assert_close(found.clean, usual.clean)


def test_a_student_learns_what_the_teacher_says(folders, tmp_path):
    student = module(folders, learning_rate=3e-3, warmup=0.0)
    held_out = lambda: float(student.held_out(BATCHES[0]).loss.mean())  # noqa: E731
    before = held_out()
    Trainer(**TRAINER | {"max_steps": 60}).fit(student, DataLoader(BATCHES * 30, batch_size=None))
    assert held_out() < 0.5 * before
    load_prior(str(student.export(tmp_path / "out")))


def test_the_teacher_is_no_part_of_the_student(folders):
    plain, student = PriorModule(folders["strong"]), module(folders)
    assert student.state_dict().keys() == plain.state_dict().keys()
    before = [p.clone() for p in student.teacher.strong.parameters()]
    train(student)
    assert all(torch.equal(p, q) for p, q in zip(before, student.teacher.strong.parameters()))
    told = identity_of(student)["model.autoguidance"]
    assert told["weight"] == 1.5
    assert told["weak"] == load_prior(folders["weak"]).fingerprint
    assert identity_of(plain)["model.autoguidance"] is None


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_extrapolates_nothing_is_refused(folders, weight):
    with pytest.raises(UserError, match=r"autoguidance\.weight"):
        module(folders, weight)


def test_networks_of_other_kinds_are_refused(folders, tmp_path):
    write_pixel(tmp_path / "epsilon", ddpm())
    write_pixel(tmp_path / "flow", flow())
    write_pixel(tmp_path / "table", ddpm("v_prediction", beta_schedule="squaredcos_cap_v2"))
    for name, words in (
        ("epsilon", "prediction: v_prediction"),
        ("flow", r"\(flow\)"),
        ("table", "schedule of noise levels"),
    ):
        with pytest.raises(UserError, match=rf"autoguidance\.weak = .*{name}.*{words}"):
            module(folders | {"weak": str(tmp_path / name)})
    with pytest.raises(UserError, match=r"a trained prior as model\.init_from"):
        PriorModule(network={"sample_size": 8}, autoguidance=Autoguidance(folders["weak"]))
