"""The dual: what was asked for is met, what cannot be had is said; closed forms of Gaussians, and the command line."""

import json

import numpy as np
import pytest
import torch
from test_estimates_oracle import CONTROLS, STEPS, V, linear, optimal, pilot_of, run, target

from tiltlens import GaussianMixture, Linear, Projection, tilt
from tiltlens.energies import Target, Threshold
from tiltlens.estimates import estimate_curve
from tiltlens.estimates.dual import _of_sampled, _sampled, certify, tidy
from tiltlens.estimates.importance import KL_ROOT, relative_variance, rows_needed
from tiltlens.estimates.samples import Samples
from tiltlens.guidance import Exact
from tiltlens.modules.command_line import run as run_program
from tiltlens.modules.dual import BUDGET, Asked, ConstraintPlan
from tiltlens.modules.sampling_cli import main
from tiltlens.sampling import NoiseSpace, Particles
from tiltlens.units.calibration import Natural


def columns(noise, strengths, control, energy=linear):
    parts = []
    for s in strengths:
        e, log_w, path_kl, x = run(noise, len(noise), s, energy, control)
        parts.append((np.full(len(e), s), np.arange(len(e)), x[:, 0], e, log_w, path_kl))
    names = ("strength", "seed", "activation", "energy", "log_w", "path_kl")
    return dict(zip(names, map(np.concatenate, zip(*parts))))


def rounds(kind, target, control, seed=0, n=128, most=12):
    """What the driver does, on the Gaussian chain: (certificate, strengths)."""
    rng = np.random.default_rng(seed)
    noise, pilot, strengths = rng.standard_normal((n, STEPS, 2)), pilot_of(rng, 128), [0.0]
    while True:
        table = columns(noise, strengths, control)
        rows, _ = estimate_curve("u", table, pilot)
        found = certify(kind, target, table, pilot, rows)
        if found.status != "open" or len(strengths) >= most:
            return found, strengths
        strengths = sorted({*strengths, *found.propose})


@pytest.mark.parametrize("name", ["uniform", "stateful", "over"])
@pytest.mark.parametrize(
    ("kind", "target", "truth"), [("activation", 1.5, 1.5 / V), ("kl", 1.0, np.sqrt(2 / V))]
)
def test_the_solution_is_the_closed_form(name, kind, target, truth):
    """m(s) = -s V and KL = s^2 V / 2; the least KL of mean c is c^2 / (2 V)."""
    found, strengths = rounds(kind, target, CONTROLS[name])
    assert (found.status, found.law) == ("reached", "q_s")
    assert len(strengths) <= BUDGET
    assert abs(found.value - target) <= max(found.value_se, 0.01 * target)
    true = found.strength * V if kind == "activation" else found.strength**2 * V / 2
    assert abs(found.value - true) < 4 * found.value_se
    assert abs(found.kl - found.strength**2 * V / 2) < 4 * found.kl_se
    slope = V if kind == "activation" else truth * V
    assert abs(found.strength - truth) < 5 * max(found.value_se, 0.01 * target) / slope
    assert found.kl_least == found.kl


def test_what_natural_samples_meet_needs_no_tilt():
    found, strengths = rounds("activation", -0.5, CONTROLS["half"])
    assert (found.status, found.strength, found.kl, strengths) == ("natural", 0.0, 0.0, [0.0])


def test_beyond_trusted_weights_the_sampled_law_answers_with_bounds():
    push = np.random.default_rng(0).standard_normal((STEPS, 2)) * 1.5
    noisy = lambda s, x, k: optimal()(s, x, k) + push[k]  # noqa: E731
    found, _ = rounds("activation", 6.0, noisy, n=64)
    assert (found.status, found.law) == ("reached", "sampled")
    assert abs(found.value - 6.0) <= max(found.value_se, 0.07)
    assert found.kl_least <= 36 / (2 * V) + 1
    assert found.kl_least <= found.kl_most
    assert found.kl is None


def test_beyond_reach_is_recognised_with_the_reachable_range():
    saturated = lambda s, x, k: optimal()(min(s, 2.0), x, k)  # noqa: E731
    found, strengths = rounds("activation", 50.0, saturated)
    assert found.status == "infeasible"
    assert len(strengths) < BUDGET
    assert found.reach[0] == pytest.approx(0, abs=0.3)
    assert 1.5 < found.reach[1] < 5


def test_the_least_kl_is_that_of_the_mean_activation_for_any_energy():
    """A target energy: no law of mean c is nearer than c^2 / (2 V), and the law that was sampled, N(c, V) here, is that
    near; the least KL for its mean *energy* is another, smaller number."""
    rng = np.random.default_rng(6)
    energy = target(1.5)
    drift = lambda s, x, k: optimal()(1.2 / V, x, k) if s else np.zeros_like(x)  # noqa: E731
    table = columns(rng.standard_normal((2000, STEPS, 2)), [0.0, 50.0], drift, energy)
    draws = rng.standard_normal(2000) * np.sqrt(V)
    pilot = {"energy": energy(draws[:, None]), "activation": draws, "z": draws}
    rows, _ = estimate_curve("u", table, pilot)
    found = certify("activation", 1.2, table, pilot, rows)
    assert (found.status, found.law) == ("reached", "sampled")
    assert found.kl_least == pytest.approx(found.value**2 / (2 * V), rel=0.05)
    assert rows[-1]["kl_lower"] < 0.8 * found.kl_least < found.kl_most


def test_rows_that_are_all_lost_are_no_end_of_reach():
    """Guidance that gives NaN says nothing of what can be reached: the certificate, and the warning, say what to try."""
    rng = np.random.default_rng(7)
    table = columns(rng.standard_normal((64, STEPS, 2)), [0.0, 1.0, 2.0], CONTROLS["half"])
    table["activation"][64:] = table["energy"][64:] = np.nan
    rows, warnings = estimate_curve("u", table, pilot_of(rng, 64))
    found = certify("activation", 3.0, table, pilot_of(rng, 64), rows)
    assert (found.status, found.propose) == ("lost", ())
    assert any("none of 64 samples is finite" in w and "float32" in w for w in warnings)
    natural = Natural(torch.zeros(1), torch.ones(1), 0.0, 1.0, torch.randn(64).sort().values)
    text = Asked.parse("z=3").certify(natural, table, pilot_of(rng, 64), rows)["text"]
    assert "no guided row is finite" in text
    assert "float32" in text


def test_two_strengths_side_by_side_are_no_end_of_reach():
    """Means that differ by little because strengths do say nothing of what harder steering would add."""
    rows = [
        {"strength": s, "activation_mean": s, "activation_se": 0.1, "kl": None, "kl_se": None, "kl_lower": s, "path_kl": 2 * s}
        for s in (0.5, 1.0, 1.5, 2.1, 2.2)
    ]  # fmt: skip
    rows[-2]["activation_mean"] = 2.2
    sampled = [(r["strength"], r["activation_mean"], 0.1) for r in rows]
    by_strength = {r["strength"]: r for r in rows}
    found = _of_sampled("activation", 4.0, 0.0, sampled, by_strength, (0.0, 2.2))
    assert (found.status, len(found.propose)) == ("open", 1)
    assert found.propose[0] > 2.2
    flat = [(s, min(value, 1.1), se) for s, value, se in sampled]
    assert _of_sampled("activation", 4.0, 0.0, flat, by_strength, (0.0, 1.1)).status == "infeasible"


def test_order_and_a_constant_in_the_energy_do_not_matter():
    rng = np.random.default_rng(3)
    noise, pilot = rng.standard_normal((64, STEPS, 2)), pilot_of(rng, 64)
    table = columns(noise, [0.0, 0.5, 1.0, 1.5], CONTROLS["uniform"])
    order = rng.permutation(len(table["seed"]))
    moved = {k: v[order] for k, v in table.items()}
    moved["energy"] = moved["energy"] + 9.0
    moved["log_w"] = moved["log_w"] - 9.0 * moved["strength"]
    found = []
    for t, p in ((table, pilot), (moved, pilot | {"energy": pilot["energy"] + 9.0})):
        found.append(certify("activation", 1.0, t, p, estimate_curve("u", t, p)[0]))
    for a, b in zip(*(f._asdict().values() for f in found)):
        assert a == b if isinstance(a, str) or a is None else a == pytest.approx(b, abs=1e-6)


def test_without_natural_samples_there_is_nothing_to_start_from():
    table = columns(np.random.default_rng(4).standard_normal((16, STEPS, 2)), [1.0], CONTROLS["half"])
    with pytest.raises(ValueError, match="natural samples"):
        certify("activation", 1.0, table, None, [])
    with pytest.raises(ValueError, match="kind 'z'"):
        certify("z", 1.0, table, None, [])
    assert tidy(1.2345, {1.23: None}) == 1.234


@pytest.mark.parametrize(
    ("text", "found"),
    [("q0.999", ("q", 0.999)), ("z=4", ("z", 4.0)), (" kl = 3", ("kl", 3.0)), ("kl=0.5", ("kl", 0.5))],
)
def test_constraints_are_read(text, found):
    asked = Asked.parse(text)
    assert (asked.kind, asked.level) == found


@pytest.mark.parametrize(
    "text", ["", "3", "q2", "z", "kl=-1", "kl=0", "kl=inf", "kl", "klz", "q0.9 z=3", "value=2"]
)
def test_other_constraints_are_refused(text):
    with pytest.raises(ValueError, match="constraint"):
        Asked.parse(text)


def test_a_constraint_on_natural_activations_needs_some():
    with pytest.raises(ValueError, match=r"pilot >= 8"):
        Asked.parse("z=2").check(0, None, 1.0)
    Asked.parse("kl=2").check(0, None, 1.0)
    with pytest.raises(ValueError, match=r"eta above 0"):
        Asked.parse("kl=2").check(64, None, 0.0)
    assert Asked.parse("z=2").target(Natural(None, None, 1.0, 3.0, torch.empty(0))) == 7.0


def test_units_have_strengths_of_their_own_and_a_budget():
    data = ConstraintPlan(Asked.parse("kl=1"), 2, 0, 4)
    data.units, data.of = 2, {0: {0.0: 1}, 1: {0.0: 1}}
    met = {"status": "reached", "strength": 0.0, "enlarge": 1.0, "propose": ()}
    assert data.grow([{"status": "open", "propose": (1.0, 2.0)}, met])
    assert [(r.unit, r.strength, r.seed) for r in data.rows()] == [
        (0, 0.0, 0), (0, 0.0, 1), (1, 0.0, 0), (1, 0.0, 1), (0, 1.0, 0), (0, 1.0, 1), (0, 2.0, 0), (0, 2.0, 1),
    ]  # fmt: skip
    data.of[0] = {float(k): 1 for k in range(BUDGET)}
    assert not data.grow([{"status": "open", "propose": (0.5,)}, {"status": "natural"}])


def test_more_rows_at_the_solution_where_they_would_do_and_none_where_not():
    data = ConstraintPlan(Asked.parse("kl=1"), 4, 10, 4)
    data.units, data.of = 1, {0: {0.0: 1, 1.0: 1, 2.0: 1}}
    met = {"status": "reached", "strength": 2.0, "propose": ()}
    assert not data.grow([met | {"enlarge": BUDGET - 2.9}])
    assert data.grow([met | {"enlarge": 2.5}])
    assert [r.seed for r in data.rows() if r.strength == 2] == list(range(10, 22))
    assert [r.seed for r in data.rows() if r.strength == 1] == list(range(10, 14))
    told = data.describe(["u"])["constraint"]
    assert (told["strengths"], told["blocks"]) == ({"u": [0.0, 1.0, 2.0]}, {"u": [1, 1, 3]})


def test_rows_needed_make_weights_healthy():
    """As many copies of a run as it says are healthy, and half of them are not; particles likewise, by lineages."""
    rng = np.random.default_rng(0)
    for groups in (None, 4):
        log_w = rng.normal(0, 1.6 if groups is None else 0.3, 64)
        weight = ancestor = None
        if groups:
            weight, ancestor = np.ones(64), np.arange(64) // 16 * 16 + rng.integers(0, 3, 64)

        def copies(k, log_w=log_w, weight=weight, ancestor=ancestor, groups=groups):
            again = lambda x, shift: None if x is None else np.concatenate([x + shift * i for i in range(k)])  # noqa: E731
            cluster = np.arange(64) // 16 if groups else np.arange(64)
            e = -np.repeat(1.0, 64 * k)
            return Samples(
                1.0,
                e,
                again(log_w, 0),
                again(log_w, 0),
                again(cluster, 64),
                again(weight, 0),
                again(ancestor, 64),
            )

        k = rows_needed(copies(1), 1.0, KL_ROOT)
        assert k > 2
        assert np.isfinite(relative_variance(copies(int(np.ceil(k))), 1.0, KL_ROOT))
        assert np.isnan(relative_variance(copies(int(k / 2)), 1.0, KL_ROOT))


def test_collapsed_weights_need_no_number_of_rows_that_can_be_named():
    e = np.linspace(0, 1e4, 32)
    nothing = Samples(1.0, e, -e, e, np.arange(32))
    assert rows_needed(nothing, 1.0, KL_ROOT) == np.inf
    assert rows_needed(Samples(1.0, e, None, None, np.arange(32)), 1.0, KL_ROOT) == np.inf


def test_particles_certify_the_exact_law_with_more_rows_at_the_solution(tmp_path):
    """q0.99 of a mixture, far beyond its natural samples: the weights of one block of rows do not reach it."""
    prior, direction = GaussianMixture(*PRIOR), [1.0, -0.5]
    result = tilt(
        prior, Projection(direction), constraint="q0.99", n=64, energy=Linear(standardise=False), guidance=Exact(),
        sampler=Particles(16), steps=40, spacing="index", pilot=128, batch_size=512, out=tmp_path / "run",
        accelerator="cpu",
    )  # fmt: skip
    (entry,) = result.constraint.values()
    assert (entry["status"], entry["law"]) == ("reached", "q_s")
    assert abs(entry["value"] - entry["target"]) <= max(entry["value_se"], 0.02)
    true = prior.kl(torch.tensor(direction), entry["strength"])
    assert abs(entry["kl"] - true) < 4 * entry["kl_se"]
    assert entry["kl_least"] == entry["kl"]


PRIOR = ([0.6, 0.4], [[-1.0, 0.5], [1.0, 0.0]], [0.4, 0.3])


def test_tilt_solves_for_each_unit_and_goes_on_where_it_stopped(tmp_path):
    prior, units = GaussianMixture(*PRIOR), [[1.0, -0.5], [0.0, 1.0]]
    settings = {
        "n": 128, "energy": Linear(standardise=False), "guidance": Exact(), "steps": 80, "spacing": "index", "pilot": 256,
        "batch_size": 512, "out": tmp_path / "run", "accelerator": "cpu",
    }  # fmt: skip
    result = tilt(prior, [Projection(u) for u in units], constraint="z=2", **settings)
    for direction, entry in zip(units, result.constraint.values()):
        assert (entry["status"], entry["law"], entry["asked"]) == ("reached", "q_s", "z=2")
        assert abs(entry["value"] - entry["target"]) <= max(
            entry["value_se"], 0.01 * abs(entry["target"]) + 0.02
        )
        true = prior.kl(torch.tensor(direction), entry["strength"])
        assert abs(entry["kl"] - true) < 4 * entry["kl_se"]
        assert entry["text"] in result.report().read_text()
    manifest = result.folder.read_manifest()
    assert manifest["state"] == "complete"
    assert manifest["timings"]["rows_sampled"] == (first := len(result.folder.done()))
    again = tilt(prior, [Projection(u) for u in units], constraint="z=2", **settings)
    assert again.constraint == result.constraint
    assert again.folder.read_manifest()["timings"]["rows_sampled"] == 0
    assert len(again.folder.read_manifest()["sessions"]) == 1
    more = tilt(prior, [Projection(u) for u in units], constraint="z=1", **settings)
    sessions = more.folder.read_manifest()["sessions"]
    assert [s["rows"] for s in sessions] == [first, len(more.folder.done())]


@pytest.mark.parametrize(
    ("asked", "energy"),
    [("z=100", Threshold("z=1")), ("kl=8", Threshold("z=1")), ("z=2", Target(-3.0, 1.0, False))],
    ids=["above a threshold", "more nats than a threshold costs", "away from where the energy pushes"],
)
def test_beyond_what_an_energy_asks_for_is_infeasible_however_healthy_its_weights(asked, energy):
    prior = GaussianMixture([0.7, 0.3], [[-1.0, 0.0], [2.0, 1.0]], [0.5, 0.25])
    settings = {
        "n": 64,
        "guidance": Exact(),
        "steps": 20,
        "spacing": "index",
        "pilot": 64,
        "accelerator": "cpu",
    }
    result = tilt(prior, Projection([1.0, 0.5]), constraint=asked, energy=energy, batch_size=512, **settings)
    (entry,) = result.constraint.values()
    assert entry["status"] == "infeasible", entry["text"]
    low, high = entry["reach"]
    assert low < high < entry["target"]
    assert len(result.curve) < BUDGET


ANALYTIC = [
    "--config=configs/sample/analytic.yaml", "--model.prior.init_args.points=60", "--model.steps=20", "--data.n=64",
    "--data.batch_size=256", "--trainer.accelerator=cpu", "--trainer.logger=false",
]  # fmt: skip


def test_the_command_prints_the_certificate(tmp_path, capsys):
    main([*ANALYTIC, f"--out={tmp_path}", "--constraint=kl=1"])
    out = capsys.readouterr().out.splitlines()
    entry = json.loads((tmp_path / "summary.json").read_text())["constraint"]["projection[1,0.5]"]
    assert out == [entry["text"], str(tmp_path / "report.html")]
    assert entry["status"] == "reached"
    assert "constraint: kl=1" in (tmp_path / "config.yaml").read_text()


def test_a_constraint_that_is_not_met_is_answered_with_the_range_and_status_1(tmp_path, capsys):
    narrow = ["--model.guidance=Calibrated", "--model.guidance.profile=[0.9,1.0]", "--model.pilot=32"]
    with pytest.raises(SystemExit) as stop:
        main([*ANALYTIC, *narrow, "--data.n=16", f"--out={tmp_path}", "--constraint=z=40"])
    entry = json.loads((tmp_path / "summary.json").read_text())["constraint"]["projection[1,0.5]"]
    told = capsys.readouterr()
    assert stop.value.code == 1
    assert entry["status"] in ("infeasible", "open")
    assert entry["text"] in told.out
    assert "the constraint is not met by projection[1,0.5]" in told.err
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("constraint", "words"), [("q1.5", "is not understood"), ("z=3", "pilot >= 8"), ("kl=-2", "above 0")]
)
def test_a_constraint_that_means_nothing_ends_with_status_2(tmp_path, capsys, constraint, words):
    with pytest.raises(SystemExit) as stop:
        run_program(lambda: main([*ANALYTIC, f"--out={tmp_path / 'out'}", f"--constraint={constraint}"]))
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_natural_samples_reach_is_within_reach_however_flat_the_means():
    """A saturated unit: strengths grow fourfold, and no verdict of infeasible, where some natural activation lies above the target."""
    rows = [
        {"strength": s, "activation_mean": m, "activation_se": 0.1, "kl": None, "kl_se": None, "kl_lower": 1.0, "path_kl": 2.0}
        for s, m in ((1.0, 2.0), (2.0, 3.9), (4.0, 4.0), (8.0, 4.0))
    ]  # fmt: skip
    sampled = [(r["strength"], r["activation_mean"], 0.01) for r in rows]
    by_strength = {r["strength"]: r for r in rows}
    flat = _of_sampled("activation", 4.2, 0.0, sampled, by_strength, (0.0, 4.0))
    seen = _of_sampled("activation", 4.2, 0.0, sampled, by_strength, (0.0, 4.0), seen=True)
    assert (flat.status, seen.status, seen.propose) == ("infeasible", "open", (32.0,))


def test_a_value_with_a_large_error_is_not_met():
    rows = [
        {"strength": 1.0, "activation_mean": 1.1, "activation_se": 0.6, "kl": None, "kl_se": None, "kl_lower": 1.0, "path_kl": 2.0}
    ]  # fmt: skip
    found = _of_sampled("activation", 1.0, 0.0, [(1.0, 1.1, 0.6)], {1.0: rows[0]}, (0.0, 1.1))
    assert (found.status, found.propose) == ("open", ())
    assert found.enlarge == pytest.approx(16.0)
    plan = ConstraintPlan(Asked.parse("z=1"), 8, 0, 8)
    plan.of = {0: {0.0: 1, 1.0: 2}}
    assert plan.grow([found._asdict()])
    assert plan.of[0][1.0] == 4


def _saturation(one, two):
    """b, m of the mean s/(b + m s) through two points."""
    return np.linalg.solve([[1, one[0]], [1, two[0]]], [one[0] / one[1], two[0] / two[1]])


@pytest.mark.parametrize("m", [0.0, 0.2])
@pytest.mark.parametrize("target", [2.0, 3.6])
def test_a_mean_that_saturates_is_met_by_the_strength_that_two_others_point_to(m, target):
    """natural + s/(b + m s), straight where m = 0: between two strengths and beyond both, at most fourfold; where it ends below, fourfold."""
    mean = lambda s: -1.0 + s / (0.25 + m * s)  # noqa: E731
    points = saturated((0.3, mean(0.3)), (0.5, mean(0.5)), (40.0, mean(40.0)))
    solution = 0.25 * (target + 1) / (1 - m * (target + 1)) if m * (target + 1) < 1 else np.inf
    for rows, most in ((points, 40.0), (points[:2], 2.0)):
        sampled = [(r["strength"], r["activation_mean"], 1e-9) for r in rows]
        found = _of_sampled(
            "activation", target, -1.0, sampled, {r["strength"]: r for r in rows}, (-1.0, 4.0), True
        )
        assert found.status == "open"
        assert found.propose == (pytest.approx(min(solution, most), rel=0.01),)


def saturated(*points):
    """Rows of a unit whose mean is known far better than it moves, of (strength, mean)."""
    return [
        {"strength": s, "activation_mean": m, "activation_se": 0.002, "kl": None, "kl_se": None, "kl_lower": 1.0, "path_kl": 2.0}
        for s, m in points
    ]  # fmt: skip


def test_a_value_that_is_near_but_off_by_more_than_its_error_is_refined_while_there_is_budget():
    """A saturated unit: 1 % of the way is as good as met, and the error is smaller still."""
    rows = saturated((4.0, 3.5), (8.0, 4.008))
    sampled = [(r["strength"], r["activation_mean"], r["activation_se"]) for r in rows]
    found = _of_sampled("activation", 4.0, 0.0, sampled, {r["strength"]: r for r in rows}, (0.0, 4.008))
    assert found.status == "reached"
    b, m = _saturation((4.0, 3.5), (8.0, 4.008))
    assert found.propose == (pytest.approx(4 * b / (1 - 4 * m), abs=0.01),)
    plan = ConstraintPlan(Asked.parse("z=1"), 8, 0, 8)
    plan.of = {0: {0.0: 1, 4.0: 1, 8.0: 1}}
    assert plan.grow([found._asdict()])
    assert set(plan.of[0]) == {0.0, 4.0, 8.0, *found.propose}
    plan.of[0] = {float(k): 1 for k in range(BUDGET)}
    assert not plan.grow([found._asdict()])
    near = [(s, m, 0.1) for s, m, _ in sampled]
    assert (
        _of_sampled("activation", 4.0, 0.0, near, {r["strength"]: r for r in rows}, (0.0, 4.008)).propose
        == ()
    )


def test_a_value_that_is_near_from_below_at_every_strength_asks_for_a_greater_one():
    """No two strengths bracket the target of a unit that saturates: the last two say how far on."""
    rows = saturated((4.0, 3.93), (8.0, 3.97))
    sampled = [(r["strength"], r["activation_mean"], r["activation_se"]) for r in rows]
    found = _of_sampled("activation", 4.0, 0.0, sampled, {r["strength"]: r for r in rows}, (0.0, 3.97))
    b, m = _saturation((4.0, 3.93), (8.0, 3.97))
    assert (found.status, found.propose) == ("reached", (pytest.approx(4 * b / (1 - 4 * m), rel=0.01),))


def test_a_value_without_an_error_is_not_met_until_there_are_more_groups():
    """One group of particles a strength: its spread is unknown, and not zero."""
    rows = [
        {"strength": s, "activation_mean": m, "activation_se": None, "kl": None, "kl_se": None, "kl_lower": 1.0, "path_kl": 2.0}
        for s, m in ((1.0, 0.5), (2.0, 1.02))
    ]  # fmt: skip
    found = _of_sampled(
        "activation", 1.0, 0.0, _sampled("activation", rows), {r["strength"]: r for r in rows}, (0.0, 1.02)
    )
    assert (found.status, found.value_se, found.propose, found.enlarge) == ("open", None, (), 4.0)
    far = _of_sampled(
        "activation", 1.5, 0.0, _sampled("activation", rows), {r["strength"]: r for r in rows}, (0.0, 1.02)
    )
    assert (far.status, far.enlarge) == ("open", 1.0)
    assert len(far.propose) == 1
    plan = ConstraintPlan(Asked.parse("z=1"), 8, 0, 8)
    plan.of = {0: {0.0: 1, 1.0: 1, 2.0: 1}}
    assert plan.grow([found._asdict()])
    assert plan.of[0] == {0.0: 1, 1.0: 1, 2.0: 2}
    assert not plan.grow([far._asdict()], lambda s: s <= 2)


def test_a_plain_run_in_between_is_no_larger_plan(tmp_path):
    """Strengths that a plain run has added are kept, and count."""
    ask = {
        "n": 16,
        "energy": Linear(False),
        "guidance": Exact(),
        "steps": 12,
        "out": tmp_path,
        "accelerator": "cpu",
        "pilot": 32,
    }
    prior, unit = GaussianMixture([1.0], [[0.0]], [1.0]), Projection([1.0])
    first = tilt(prior, unit, constraint="z=1", **ask)
    strengths = first.folder.read_manifest()["plan"]["strengths"]
    tilt(prior, unit, [*strengths, 3.5], **ask)
    again = tilt(prior, unit, constraint="z=1", **ask)
    assert {3.5, *strengths} <= set(again.folder.read_manifest()["plan"]["strengths"])


def test_nats_at_eta_0_are_for_a_sampler_that_has_them():
    Asked.parse("kl=1").check(64, None, 0.0, NoiseSpace())
    with pytest.raises(ValueError, match="eta = 0"):
        Asked.parse("kl=1").check(64, None, 0.0, Particles(8))
