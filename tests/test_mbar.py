"""MBAR against closed forms and pymbar; particles as rows. Energies are drawn from q_k itself: no chain is needed."""

import logging

import numpy as np
import pytest
from test_estimates_oracle import CONTROLS, V, pilot_of, table_of

from tiltlens.estimates import estimate_curve, mbar, pool
from tiltlens.estimates.bootstrap import replicate, small_sample
from tiltlens.estimates.importance import KL_ROOT, lineages, relative_variance, tilt
from tiltlens.estimates.pool import pool_draws
from tiltlens.estimates.samples import Samples
from tiltlens.estimates.table import read_groups

BETWEEN = np.array([0.25, 0.5, 0.75, 1.0, 1.25, 1.5])
STRENGTHS = [0.0, 0.5, 1.0, 1.5]


class Mixture:
    """E = -a, a from a mixture of normals: q_s is one again, its weights w exp(s m + s^2 v / 2) / Z."""

    def __init__(self, w=(1.0,), m=(0.0,), v=(1.0,)):
        self.w, self.m, self.v = (np.array(x, float) for x in (w, m, v))

    def parts(self, s):
        return np.log(self.w) + s * self.m + s**2 * self.v / 2

    def log_z(self, s):
        return np.logaddexp.reduce(self.parts(s))

    def energy(self, s):
        return -np.exp(self.parts(s) - self.log_z(s)) @ (self.m + s * self.v)

    def draw(self, rng, n, s):
        k = rng.choice(len(self.w), n, p=np.exp(self.parts(s) - self.log_z(s)))
        return -(self.m[k] + s * self.v[k] + np.sqrt(self.v[k]) * rng.standard_normal(n))

    def truth(self, s):
        return np.array([[self.log_z(x), self.energy(x), -x * self.energy(x) - self.log_z(x)] for x in s]).T


class QuadraticGaussian:
    """E = |x|^2 / 2, x ~ N(0, 1) in R^d: q_s = N(0, 1/(1 + s)), log Z = -d log(1 + s) / 2."""

    def __init__(self, d):
        self.d = d

    def draw(self, rng, n, s):
        return rng.chisquare(self.d, n) / 2 / (1 + s)

    def truth(self, s):
        s = np.asarray(s)
        log_z, m = -self.d * np.log1p(s) / 2, self.d / 2 / (1 + s)
        return np.stack([log_z, m, -s * m - log_z])


LAWS = {
    "gaussian": Mixture(),
    "rare mode": Mixture([0.9, 0.1], [0.0, 2.0], [0.5, 0.25]),
    "1 dimension": QuadraticGaussian(1),
    "8 dimensions": QuadraticGaussian(8),
    "64 dimensions": QuadraticGaussian(64),
}


def exact_runs(law, rng, n=200, strengths=STRENGTHS):
    """Independent draws of each q_k: even weights, whose log Z nobody tells."""
    flat = np.zeros(n)
    return [
        Samples(s, law.draw(rng, n, s), flat, flat, np.arange(n) + 10_000 * k)
        for k, s in enumerate(strengths)
    ]


def weighted_runs(law, rng, n, off=0.2):
    """Natural samples, and guided ones that overshoot: drawn at s + off, weighted back exactly."""
    runs = exact_runs(law, rng, n, [0.0])
    for k, s in enumerate(STRENGTHS[1:], 1):
        energy = law.draw(rng, n, s + off)
        log_w = off * energy + law.truth([s + off])[0, 0]
        runs.append(Samples(s, energy, log_w, np.full(n, 0.1), np.arange(n) + 10_000 * k))
    return runs


def columns(runs, s=BETWEEN):
    draws = pool_draws(runs)

    def smooth(counts):
        found = mbar.evaluate(draws, s, counts)
        return np.stack([found.log_z, found.energy, found.kl(s)], -2).reshape(-1, 3 * len(s))

    found = replicate(smooth, [r.cluster for r in runs], 200)
    return found.values[0].reshape(3, -1), found.se().reshape(3, -1)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("kind", [exact_runs, weighted_runs])
def test_the_curve_is_the_closed_form_at_and_between_strengths(name, kind):
    law = LAWS[name]
    value, se = columns(kind(law, np.random.default_rng(1), 400))
    off = abs(value - law.truth(BETWEEN))
    assert (off < 4 * se).all(), (off / se).round(1)


def test_f_and_errors_are_those_of_pymbar_for_independent_draws():
    logging.disable(logging.WARNING)
    import pymbar

    runs = exact_runs(LAWS["rare mode"], np.random.default_rng(2))
    draws = pool_draws(runs)
    s = np.array(STRENGTHS)
    theirs = pymbar.MBAR(s[:, None] * np.concatenate([r.energy for r in runs]), [200] * 4)
    difference = theirs.compute_free_energy_differences()
    logging.disable(logging.NOTSET)
    ours = mbar.evaluate(draws, s)
    np.testing.assert_allclose(-ours.log_z, difference["Delta_f"][0], atol=1e-7)
    se = replicate(lambda c: mbar.evaluate(draws, s, c).log_z, [r.cluster for r in runs]).se()
    np.testing.assert_allclose(se[1:], difference["dDelta_f"][0, 1:], rtol=0.15)


def test_a_weight_is_a_number_of_draws():
    """Weights 3 : 1 are the samples three times and once."""
    rng = np.random.default_rng(3)
    natural, energy, times = rng.standard_normal(300), rng.standard_normal(300) - 1, rng.integers(1, 4, 300)
    weighted = Samples(1.0, energy, np.log(times), np.zeros(300), np.arange(300))
    repeated = np.repeat(energy, times)
    zero = np.zeros(len(repeated))
    again = Samples(1.0, repeated, zero, zero, np.arange(len(repeated)))
    base = Samples(0.0, natural, None, None, np.arange(300))
    one, two = pool_draws([base, weighted]), pool_draws([base, again])
    factor = one.sizes[1] / two.sizes[1]
    s = np.array([0.5, 1.0])
    two = pool.Pool(
        two.members, two.strengths, one.sizes, two.centre, two.energy, two.state,
        np.where(two.state == 1, two.weight * factor, two.weight), None, None, None, None,
    )  # fmt: skip
    solved = pool._maximum(two.strengths, two.sizes, two.energy, two.weight)
    two = pool.Pool(*[getattr(two, k) for k in list(two.__dataclass_fields__)[:7]], *solved)
    for a, b in zip(mbar.evaluate(one, s), mbar.evaluate(two, s)):
        np.testing.assert_allclose(a, b, rtol=1e-8)


def test_order_and_a_constant_in_the_energy_change_nothing_else():
    rng = np.random.default_rng(4)
    runs = weighted_runs(LAWS["rare mode"], rng, 100)
    value, se = columns(runs)
    moved, c = [], 50.0
    for r in runs:
        order = rng.permutation(len(r))
        moved.append(
            Samples(
                r.strength,
                r.energy[order] + c,
                (r.log_w - r.strength * c)[order],
                r.path_kl[order],
                r.cluster[order],
            )
        )
    other, other_se = columns(moved)
    np.testing.assert_allclose(other[0], value[0] - c * BETWEEN, atol=1e-7)
    np.testing.assert_allclose(other[1], value[1] + c, atol=1e-7)
    np.testing.assert_allclose(other[2], value[2], atol=1e-6)
    np.testing.assert_allclose(other_se, se, atol=1e-6)


def test_log_z_is_convex_and_the_mean_energy_falls():
    runs = weighted_runs(LAWS["64 dimensions"], np.random.default_rng(5), 100)
    s = np.linspace(0, 2, 41)
    found = mbar.evaluate(pool_draws(runs), s)
    assert (np.diff(found.log_z, 2) > 0).all()
    assert (np.diff(found.energy) < 0).all()
    np.testing.assert_allclose(np.gradient(found.log_z, s)[1:-1], -found.energy[1:-1], atol=0.05)


def test_errors_cover_in_200_replications_with_shared_seeds():
    """Pilot and guided weights about equally good, 64 of each: choosing one of them covered KL in 83 %."""
    rng, found = np.random.default_rng(6), []
    for _ in range(200):
        rows, _ = estimate_curve(
            "u", table_of(rng, 64, [0, 0.5], control=CONTROLS["stateful"]), pilot_of(rng, 64)
        )
        found += rows[1:]
    assert "mbar" in {r["kl_method"] for r in found}
    for name in ("log_z", "kl"):
        z = np.array([(r[name] - V / 8) / r[f"{name}_se"] for r in found])
        assert 0.915 <= np.mean(abs(z) < 1.96) <= 0.995, (name, np.mean(abs(z) < 1.96))


def test_mbar_covers_in_200_replications():
    rng, law = np.random.default_rng(7), LAWS["rare mode"]
    s, z = np.array([0.5, 0.75]), []
    for _ in range(200):
        value, se = columns(weighted_runs(law, rng, 64), s)
        z.append((value - law.truth(s)) / se)
    cover = (abs(np.array(z)) < 1.96).mean(0)
    assert (cover > 0.88).all(), cover  # before the factor of `widening`


def test_collapsed_weights_take_no_part():
    rng = np.random.default_rng(8)
    good, bad = weighted_runs(LAWS["gaussian"], rng, 100), np.zeros(100)
    bad[0] = 50
    broken = Samples(2.0, good[-1].energy, bad, good[-1].path_kl, good[-1].cluster)
    assert pool_draws([*good, broken]).members == (0, 1, 2, 3)
    assert pool_draws([broken]) is None
    assert not mbar.healthy(pool_draws(good[:1]), 3.0, KL_ROOT)


# -- particles --


def particle_table(rng, groups, size, s=1.0, law=None, noise=0.2):
    """Each group: draws of q_s with noisy Zhat_g of mean Z, and weights that an extra re-weighting gave."""
    law = law or LAWS["gaussian"]
    rows = {
        k: [] for k in ("strength", "seed", "activation", "energy", "log_w", "path_kl", "group", "weight")
    }
    for g in range(groups):
        off = 0.2
        energy = law.draw(rng, size, s + off)
        raw = off * energy + law.truth([s + off])[0, 0] + noise * rng.standard_normal() - noise**2 / 2
        log_z = np.log(np.mean(np.exp(raw)))
        columns = {
            "strength": np.full(size, s), "seed": g * size + np.arange(size), "activation": -energy, "energy": energy,
            "log_w": raw, "path_kl": -s * energy - log_z, "group": np.full(size, g * size, float),
            "weight": np.exp(raw - log_z) / size,
        }  # fmt: skip
        for k, v in columns.items():
            rows[k].append(v)
    return {k: np.concatenate(v) for k, v in rows.items()}


def test_particles_describe_their_weighted_output_and_cover():
    """log Z = KL = 1/2, mean activation 1; eight groups, each of one Zhat: errors are those of eight."""
    rng, found = np.random.default_rng(9), []
    for _ in range(200):
        rows, _ = estimate_curve("u", particle_table(rng, 8, 32))
        found.append(rows[0])
    assert {r["kl_method"] for r in found} == {"importance"}
    for name, true in (("log_z", 0.5), ("kl", 0.5), ("activation_mean", 1.0)):
        se = name.replace("_mean", "") + "_se"
        z = np.array([(r[name] - true) / r[se] for r in found])
        assert 0.90 <= np.mean(abs(z) < 1.96) <= 0.995, (name, np.mean(abs(z) < 1.96), z.std())
    assert np.mean([r["path_kl"] for r in found]) >= 0.5
    assert np.mean([r["gap"] for r in found]) >= 0


def test_groups_and_not_rows_are_what_is_independent():
    rng = np.random.default_rng(10)
    table = particle_table(rng, 3, 64)
    (row,), warnings = estimate_curve("u", table)
    assert row["kl"] is None  # three cannot certify an error
    assert any("3 groups of particles tell no error, 4 at least do" in w for w in warnings), warnings
    wild = estimate_curve("u", particle_table(rng, 8, 64, noise=5.0))[0][0]
    assert (wild["kl"], wild["kl_method"]) == (None, "bounds")
    assert wild["ess"] < 0.5 * 8 * 64
    one = estimate_curve("u", particle_table(rng, 1, 64))[0][0]
    assert one["activation_mean"] is not None
    assert one["activation_se"] is one["kl"] is None


def test_particles_of_few_beginnings_give_no_number_however_well_groups_agree():
    """8 groups of 32, weights level, Zhat alike: 256 beginnings carry a number; 2 a group, 16 in all, do not (floor 40)."""
    table = particle_table(np.random.default_rng(15), 8, 32, noise=0.05)
    group, slot = table["group"], table["seed"] % 32
    for ancestor, given in ((group + slot, True), (group + slot % 16, True), (group + slot % 2, False)):
        row, warnings = (
            x[0] if i == 0 else x for i, x in enumerate(estimate_curve("u", {**table, "ancestor": ancestor}))
        )
        assert (row["kl"] is not None) == (row["log_z"] is not None) == given, (
            f"{len(set(ancestor))} beginnings: {row}"
        )
        assert given or any("More groups" in w for w in warnings), warnings
    level = np.zeros(256)
    assert lineages(level, group + slot % 2) == pytest.approx(16)
    assert lineages(level, None) == np.inf


def test_the_order_of_particles_and_of_groups_does_not_matter():
    rng = np.random.default_rng(16)
    table = particle_table(rng, 8, 32)
    table["ancestor"] = table["group"] + table["seed"] % 16
    group, slot = np.meshgrid(rng.permutation(8), np.arange(32), indexing="ij")
    order = (32 * group + rng.permuted(slot, axis=1)).ravel()
    (told,), (again,) = (estimate_curve("u", x)[0] for x in (table, {k: v[order] for k, v in table.items()}))
    assert told["kl"] is not None
    assert all(again[k] == (v if isinstance(v, str) else pytest.approx(v, abs=1e-9)) for k, v in told.items())


def test_groups_of_one_particle_are_weighted_samples():
    rng = np.random.default_rng(11)
    table = particle_table(rng, 64, 1, noise=0.0)
    plain = {k: v for k, v in table.items() if k not in ("group", "weight")}
    for a, b in zip(estimate_curve("u", table)[0], estimate_curve("u", plain)[0]):
        assert a == b


def test_a_lost_particle_has_weight_zero_and_zhat_stays_a_mean_over_all():
    table = particle_table(np.random.default_rng(12), 8, 16)
    table["finite"] = np.ones(128, bool)
    table["finite"][5] = False
    run = read_groups(table, None)[0].samples
    assert np.bincount(run.groups, run.weight) == pytest.approx(np.bincount(run.groups))
    mine = np.exp(table["log_w"][:16])
    assert np.exp(run.log_w[:15]).mean() == pytest.approx(np.delete(mine, 5).sum() / 16)
    assert run.martingale is None


def test_rows_without_a_martingale_are_estimated_without_control_variate():
    """Annealing in noise space records path_kl = -s E - log w: M is rounding, and no regressor."""
    rng, n = np.random.default_rng(13), 400
    runs = weighted_runs(LAWS["gaussian"], rng, n)
    r = runs[2]
    ais = Samples(r.strength, r.energy, r.log_w, -r.strength * r.energy - r.log_w, r.cluster)
    assert ais.martingale is None
    w = np.exp(r.log_w)
    assert tilt(ais, 1.0).log_z == pytest.approx(np.log(w.mean()), abs=1e-12)


def test_small_numbers_of_groups_widen_errors():
    assert small_sample(4) == pytest.approx(3.182 / 1.96, rel=1e-3)
    assert small_sample(100) == 1
    run = read_groups(particle_table(np.random.default_rng(14), 4, 32, noise=0.01), None)[0].samples
    assert np.isfinite(relative_variance(run, 1.0, KL_ROOT))
