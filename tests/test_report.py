"""Laws of the report: one file that needs no other, true to the run folder, whatever the run lacks."""

import math
import re
from base64 import b64encode
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tiltlens import report
from tiltlens.report import answers
from tiltlens.report.digits import plus_minus
from tiltlens.report.findings import certificate, learned
from tiltlens.report.image_grid import dealt
from tiltlens.run_folder import RunFolder, image_name, unit_slug
from tiltlens.run_tables import as_json

UNIT = "timm:tf_efficientnet_lite0 · classifier · cls · class 339 (sorrel)"
STRENGTHS = (0.0, 1.0, 2.0, 4.0)


def smooth_noise(generator, strength, seed):
    coarse = generator.integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))


def make_run(
    path, units=(UNIT,), strengths=STRENGTHS, n=5, steps=8, eta=1.0, draw=smooth_noise, bad=(), z=True
):
    """A run folder as sampling leaves it: Gaussian activations, guidance that spends twice the optimum.

    draw: image of (generator, strength, seed), None for a run without images. bad: (strength, seed) of NaN.
    """
    generator = np.random.default_rng(0)
    folder = RunFolder(path)
    folder.claim(
        {"prior": {"name": "ddpm-cifar10-32", "sha256": "9f" * 32}, "chain": {"steps": steps, "eta": eta}}
    )
    folder.write_config('model:\n  prior: ddpm-cifar10-32\n  unit: <tag> & "quoted"\n')
    curve, pilot, natural = [], [], {}
    for unit in units:
        for s in strengths:
            rows, track = [], []
            for seed in range(n):
                finite = (s, seed) not in bad
                value = generator.normal(0.9 * s**0.8, 1) if finite else math.nan
                name = image_name(unit_slug(unit), s, seed) if draw and finite else None
                if name:
                    folder.save_image(name, draw(generator, s, seed))
                row = {
                    "unit": unit,
                    "strength": s,
                    "seed": seed,
                    "activation": 2 + 3 * value,
                    "energy": -value,
                }
                row |= {"z": value if z else None, "finite": finite, "image": name, "clipped": 0.002}
                rows.append(row | ({"log_w": s * value - s**2, "path_kl": s**2} if eta else {}))
                for k, u in enumerate(np.linspace(-8, 6, steps)):
                    spent = s * (1 + u / 20) * generator.uniform(0.8, 1.2) / (1 + math.exp(-u))
                    step = {"unit": unit, "strength": s, "seed": seed, "step": k, "t": 990 - k, "log_snr": u}
                    track.append(
                        step | {"guidance_norm": spent, "path_kl_step": 0.05 * spent**2 if eta else None}
                    )
            folder.write_part(rows, track)
            values = np.array([r["energy"] for r in rows])
            values = -values[np.isfinite(values)]
            mean, se = (values.mean(), values.std() / len(values) ** 0.5) if len(values) else (None, None)
            row = {"unit": unit, "strength": s, "n": n, "nonfinite": n - len(values), "seconds": 11.3}
            if len(values):
                row |= {"activation_mean": 2 + 3 * mean, "activation_se": 3 * se}
                row |= {"z_mean": mean if z else None, "z_se": se if z else None}
                row |= {"energy_mean": -mean, "energy_se": se}
            least = 0.5 * (0.9 * s**0.8) ** 2
            row |= {"kl_lower": least, "kl_lower_se": 0.1 * least}
            if eta:
                row |= {
                    "path_kl": 2.1 * least,
                    "path_kl_se": 0.07 * least,
                    "kl": 1.2 * least,
                    "kl_se": 0.1 * least,
                }
                row |= {"optimum_energy": -0.9 * s**0.8, "optimum_energy_se": 0.1}
                row |= {"log_z": s**2 / 2, "log_z_se": 0.04 * s, "gap": 0.3 * s, "gap_se": 0.05 * s}
                row |= {"efficiency": 0.476 if s else None, "kl_method": "mbar", "ess": n / (1 + s**2)}
            curve.append(row)
        draws = generator.normal(size=200)
        pilot += [{"unit": unit, "seed": k, "activation": 2 + 3 * v, "z": v} for k, v in enumerate(draws)]
        natural[unit] = {"n": 200, "mean": 2.0, "std": 3.0, "from": "pilot"}
    (folder.path / "pilot").mkdir()
    pq.write_table(pa.Table.from_pylist(pilot), folder.path / "pilot" / "samples.parquet")
    folder.consolidate()
    folder.write_curve(curve, natural)
    folder.write_manifest(
        {
            "state": "complete",
            "prior": {"name": "ddpm-cifar10-32", "sha256": "9f" * 32},
            "encoder": {"name": "tf_efficientnet_lite0", "sha256": "3c" * 32},
            "guidance": "Calibrated, memory 0.8, 4 augmentations",
            "schedule": {"kind": "variance preserving", "T": 1000, "alpha_T": 0.0064},
            "chain": {"steps": steps, "eta": eta, "spacing": "log-snr", "precision": "float32"},
            "device": "NVIDIA H100 80GB HBM3",
            "git_revision": "8ce0055d1f0c4b7a9e21d2a3b4c5d6e7f8091a2b",
            "versions": {"tiltlens": "0.1.0", "torch": "2.13.0", "diffusers": "0.38.0"},
            "timings": {"pilot": 12.4, "sampling": 45.2, "report": 1.1},
        }
    )
    return folder


class Page(HTMLParser):
    """What a browser would fetch, link to, and hold ids for, and the tags that are still open."""

    VOID = ("meta", "img", "br", "path", "use", "rect", "line", "polyline", "link")

    def __init__(self, text):
        super().__init__()
        self.sources, self.links, self.ids, self.tags, self.open, self.words = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                self.sources.append(value)
            elif name == "href":
                self.links.append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


def written(folder):
    text = report.write_report(folder).read_text("utf-8")
    page = Page(text)
    assert page.open == []
    return text, page


def assert_alone(text, page):
    """The page needs no other file and no network, and its inner links arrive."""
    assert "http://" not in text
    assert "https://" not in text
    assert "script" not in page.tags
    assert not re.search(r"@import|url\((?!#)", text)
    assert all(s.startswith(("data:image/", "#")) for s in page.sources)
    assert len(page.ids) == len(set(page.ids))
    inner = [link[1:] for link in page.links + page.sources if link.startswith("#")]
    inner += re.findall(r"url\(#([^)]+)\)", text)
    assert set(inner) <= set(page.ids)
    assert len(page.links) == sum(link.startswith("#") for link in page.links)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), n=10, bad={(4.0, 3)})


@pytest.fixture(scope="module")
def page(folder):
    return written(folder)


def test_the_page_needs_no_other_file(page):
    assert_alone(*page)


def test_every_image_of_the_grid_is_in_the_page(folder, page):
    names = [name for name in folder.samples()["image"].to_pylist() if name]
    assert len(names) == 39
    inside = set(page[1].sources)
    for name in names:
        assert f"data:image/png;base64,{b64encode((folder.path / name).read_bytes()).decode()}" in inside


def test_the_page_begins_with_the_picture_and_then_the_answer(folder, page):
    text = page[0]
    places = [
        text.index(f'class="{name}"')
        for name in ("images", "answer", "warnings", "figures", "curve", "legend")
    ]
    assert places == sorted(places)
    row = folder.read_summary()["rows"][-1]
    z = plus_minus(row["z_mean"], row["z_se"])
    least, most = (plus_minus(row[k], row[f"{k}_se"]) for k in ("kl_lower", "path_kl"))
    assert f"At strength 4 the unit’s mean activation is {z} natural standard deviations above" in text
    assert f"at between {least} and {most} nats from natural images" in text


def test_a_bound_that_its_own_error_leaves_open_is_not_told():
    row = {"kl_lower": 0.3, "kl_lower_se": 2.4, "path_kl": 2.8, "path_kl_se": 14.3}
    assert answers.nats(row) == ""
    assert answers.nats(row | {"path_kl_se": 0.4}) == "≤ 2.8 nats"
    assert answers.nats(row | {"path_kl_se": 0.4, "kl_lower_se": None}) == "0.3–2.8 nats"
    assert answers.nats(row | {"kl_lower": -0.1, "kl_lower_se": None}) == "≥ 0 nats"
    assert answers.bound(2.8, None) == "2.8 (error not known)"
    assert answers.bound(0.0, 0.0) == "0"


def test_the_ideal_law_is_placed_by_its_own_activation_and_only_where_the_energy_tells_it(folder):
    (run,) = report.read_units(folder).values()
    ideal = run.curve[-1] | {"optimum_energy": -0.72, "optimum_energy_se": 0.31}
    told = answers.answer(replace(run, curve=[*run.curve[:-1], ideal]))
    assert f"The ideal law at this strength has z = {plus_minus(0.72, 0.31)}, at" in told
    samples = run.samples.set_column(
        run.samples.column_names.index("energy"), "energy", pa.array(np.square(run.samples["z"]))
    )
    target = replace(run, samples=samples)
    assert run.linear
    assert not target.linear
    assert "has z =" not in answers.answer(target)
    axes = report.figures.frontier(target).axes[0]
    assert not [c for c in axes.containers if c.lines[0] is not None]


def test_the_frontier_names_every_strength_within_its_axes(folder):
    (run,) = report.read_units(folder).values()
    wide = [row | {"path_kl_se": 0.8 * row["path_kl"]} for row in run.curve]
    axes = report.figures.frontier(replace(run, curve=wide)).axes[0]
    assert {t.get_text() for t in axes.texts} == {"s = 0", "s = 1", "s = 2", "s = 4"}
    assert all(t.xy[0] <= axes.get_xlim()[1] for t in axes.texts)


def test_the_page_says_what_it_came_from_and_escapes_it(page):
    text, parsed = page
    assert 'unit: <tag> & "quoted"' in parsed.text
    assert "<tag>" not in text
    assert f'title="{"9f" * 32}">9f9f9f9f9f9f…' in text
    for word in ("NVIDIA H100 80GB HBM3", "8ce0055d1f0c…", "2.13.0", "variance preserving", "45.2"):
        assert word in parsed.text


def test_warnings_name_the_rows_that_are_not_finite_and_the_collapse(folder, page):
    found = report.find_warnings(folder)
    assert len(found) == 2
    assert found[0].startswith("1 of 40 rows are not finite (strength 4)")
    assert found[1].startswith("The effective sample size collapses (2 of 10 at strength 2; 0.59 of 10 at")
    assert all(line in page[1].text for line in found)


def test_a_run_that_is_fine_or_stopped_says_so(tmp_path):
    folder = make_run(tmp_path, strengths=(0.0,), n=4)
    assert report.find_warnings(folder) == []
    assert 'class="warnings"' not in written(folder)[0]
    folder.write_manifest({"state": "incomplete"})
    folder.write_curve(folder.read_summary()["rows"], warnings=["The pilot was short."])
    text = written(folder)[1].text
    assert "not complete (its state: incomplete)" in text
    assert "The pilot was short." in text


def test_what_the_estimators_said_is_not_said_twice(tmp_path):
    folder = make_run(tmp_path, strengths=(0.0, 4.0), bad={(4.0, 1)})
    told = [
        "strength 4: 1 of 5 samples were not finite.",
        "strength 4: no kl, only bounds: the weights are ill.",
    ]
    natural = {UNIT: {"mean": 1.0, "from": "photos/"}}
    folder.write_curve(folder.read_summary()["rows"], natural, [f"{UNIT}: {line}" for line in told])
    assert report.find_warnings(folder) == told
    assert "are those of the images in photos/." in written(folder)[1].text


def test_a_unit_is_filed_under_the_slug_of_the_manifest(tmp_path):
    folder = make_run(tmp_path, strengths=(1.0,), n=1)
    folder.write_manifest({"units": {UNIT: {"slug": "sorrel.1_a-b"}}})
    assert_alone(*written(folder))
    assert [p.name for p in tmp_path.glob("grid_*")] == ["grid_sorrel.1_a-b.png"]


def test_clipped_rows_are_told(tmp_path):
    folder = make_run(tmp_path, strengths=(0.0, 1.0), n=2)
    sample = folder.samples().to_pylist()[-1]
    folder.write_part([sample | {"clipped": 0.2}])
    assert report.find_warnings(folder)[0].startswith("1 of 4 rows had more than 5% of their values clipped")


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ({"strengths": (0.0,)}, "samples of the prior alone"),
        ({"strengths": (2.0,), "n": 1}, "At strength 2"),
        ({"eta": 0.0}, "at no less than 3.7 ± 0.4 nats from natural images."),
        ({"draw": None, "units": ("projection",), "z": False}, "This run has no images"),
        ({"bad": {(s, k) for s in STRENGTHS for k in range(5)}}, "No sample of this unit has a finite"),
        ({"bad": {(4.0, k) for k in range(5)}, "eta": 0.0}, "At strength 2"),
        ({"strengths": tuple(np.linspace(0, 3, 12)), "n": 2}, "At strength 3"),
    ],
    ids=["prior", "one sample", "eta 0", "vectors", "nothing finite", "last strength lost", "12 strengths"],
)
def test_a_run_may_lack_almost_anything(tmp_path, run, sentence):
    folder = make_run(tmp_path, steps=4, **run)
    text, page = written(folder)
    assert_alone(text, page)
    assert sentence in page.text.replace("\xa0", " ")
    assert not re.search(r"\b(nan|inf|None|NaN)\b", page.text)
    images = any(folder.samples()["image"].to_pylist())
    assert ("img" in page.tags) == images == bool(list(tmp_path.glob("grid_*.png")))
    assert (report.grid(folder, run.get("units", (UNIT,))[0]) is not None) == images


def test_a_stopped_run_without_a_curve_is_still_reported(tmp_path):
    folder = make_run(tmp_path, strengths=(0.0, 1.0))
    for name in ("summary.json", "curve.parquet"):
        (tmp_path / name).unlink()
    assert "At strength 1 the unit’s mean activation is" in written(folder)[1].text


def test_an_empty_folder_has_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="nothing to report"):
        report.write_report(tmp_path)


def test_many_units_have_an_index_and_a_section_each(tmp_path):
    units = ("enc/layer3:cls:17", "enc/layer3:cls-17")
    text, page = written(make_run(tmp_path, units=units, strengths=(0.0, 1.0), n=2, steps=4))
    assert_alone(text, page)
    assert {unit_slug(u) for u in units} <= {link[1:] for link in page.links} & set(page.ids)
    assert len(list(tmp_path.glob("grid_*.png"))) == 2
    assert list(report.read_units(RunFolder(tmp_path))) == list(units)


def test_the_grid_shows_seeds_as_columns_and_strengths_as_rows(folder):
    picture = np.asarray(report.grid(folder, UNIT))
    cell, gap = 128, 4
    left, top = 14 + 76, 14 + 16 + 10
    assert picture.shape[:2] == (top + 4 * (cell + gap) - gap + 14, left + 10 * (cell + gap) - gap + 14)
    for j, strength in enumerate(STRENGTHS):
        for seed in range(10):
            y, x = top + j * (cell + gap), left + seed * (cell + gap)
            shown = picture[y : y + cell, x : x + cell].reshape(32, 4, 32, 4, 3).mean((1, 3))
            path = folder.path / image_name(unit_slug(UNIT), strength, seed)
            expected = np.asarray(Image.open(path)) if path.exists() else (0xEC, 0xEE, 0xF0)
            assert np.abs(shown - expected).max() < 12
    with pytest.raises(ValueError, match=f"no unit 'dog'; it holds {re.escape(repr(UNIT))}"):
        report.grid(folder.path, "dog")


def test_large_images_are_embedded_small(tmp_path):
    folder = make_run(
        tmp_path, strengths=(1.0,), n=2, draw=lambda g, *_: g.integers(0, 255, (256, 300, 3)).astype(np.uint8)
    )
    sources = written(folder)[1].sources
    assert sum(s.startswith("data:image/jpeg") for s in sources) == 2


def test_the_figures_show_the_numbers_of_the_curve(folder):
    (run,) = report.read_units(folder).values()
    axes = report.figures.frontier(run).axes[0]
    dots = [c.lines[0].get_xydata()[0] for c in axes.containers if c.lines[0] is not None]
    np.testing.assert_allclose(dots, [(r["kl"], -r["optimum_energy"]) for r in run.curve])
    bars = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(bars, [(r["kl_lower"], r["path_kl"]) for r in run.curve])
    labels = [t.get_text() for t in report.figures.histogram(run).axes[0].get_yticklabels()]
    assert labels == ["s = 4", "s = 2", "s = 1", "s = 0"]
    upper, lower = report.figures.guidance_norm(run).axes
    assert [line.get_label() for line in upper.lines] == ["s = 1", "s = 2", "s = 4"]
    assert len(lower.lines[0].get_xdata()) == 8


def test_a_histogram_of_many_samples_draws_few_of_them(folder):
    (run,) = report.read_units(folder).values()
    rng = np.random.default_rng(0)
    many = {"strength": np.repeat([0.0, 1.0], [5000, 3]), "z": rng.normal(size=5003)}
    run = replace(run, samples=pa.table(many))
    axes = report.figures.histogram(run).axes[0]
    few, all_ = sorted((line.get_xdata() for line in axes.lines if line.get_marker() == "|"), key=len)
    np.testing.assert_array_equal(few, many["z"][5000:])
    assert len(all_) == report.figures.TICKS
    many = np.sort(many["z"][:5000])
    assert (all_[0], all_[-1]) == (many[0], many[-1])
    assert np.median(all_) == pytest.approx(np.median(many), abs=0.02)


@pytest.mark.parametrize(
    ("value", "se", "expected"),
    [
        (3.14159, 0.0213, "3.14 ± 0.02"),
        (3.14159, 0.0163, "3.142 ± 0.016"),
        (-0.0004, 0.03, "0.00 ± 0.03"),
        (1234.5, 87.0, "1230 ± 90"),
        (2.5, None, "2.5"),
        (0.0, 0.0, "0"),
        (math.nan, 1.0, "–"),
        (None, None, "–"),
        (5.0, 0.0999, "5.00 ± 0.10"),
    ],
)
def test_a_number_has_the_digits_of_its_error(value, se, expected):
    assert plus_minus(value, se).replace("\xa0", " ") == expected


def test_particles_are_shown_as_their_equally_weighted_output(tmp_path):
    """Copies 0 are not there, copies 3 count three times in a histogram and once as a picture."""
    folder = RunFolder(tmp_path)
    folder.claim({})
    rows = []
    for seed, copies in enumerate((3, 0, 1, 0)):
        name = image_name(unit_slug("u"), 1.0, seed)
        folder.save_image(name, smooth_noise(np.random.default_rng(seed), 1.0, seed))
        row = {
            "unit": "u",
            "strength": 1.0,
            "seed": seed,
            "activation": float(seed),
            "z": float(seed),
            "energy": 0.0,
        }
        rows.append(row | {"finite": True, "image": name, "group": 0, "weight": copies / 4, "copies": copies})
    folder.write_part(rows)
    folder.consolidate()
    entry = {"status": "open", "text": "Asked for <z=3>: not met."}
    folder.write_curve([{"unit": "u", "strength": 1.0, "n": 4, "z_mean": 0.5}])
    folder.write("summary.json", as_json({**folder.read_summary(), "constraint": {"u": entry}}))
    (run,) = report.read_units(folder).values()
    assert run.values("z")[1.0].tolist() == [0, 0, 0, 2]
    page = report.write_report(folder).read_text()
    assert "<dt>status</dt><dd>open</dd>" in page
    assert page.count("<img") == 2
    assert "3 copies" in page
    assert "Asked for &lt;z=3&gt;: not met." in page
    assert 'class="constraint unmet"' in page


def test_the_certificate_is_on_the_page_in_numbers():
    entry = {
        "kind": "activation", "status": "reached", "law": "q_s", "target": 3.0, "strength": 1.25, "value": 3.04,
        "value_se": 0.06, "kl": 4.61, "kl_se": 0.2, "kl_least": 4.5, "kl_most": None, "reach": (0.1, 3.9),
    }  # fmt: skip
    told = dict(certificate(entry))
    assert told["reached, mean activation"] == plus_minus(3.04, 0.06)
    assert told["KL(q_s‖p), nats"] == plus_minus(4.61, 0.2)
    assert told["least KL of any law with that mean"] == "4.5"
    assert told["reachable, mean activation"] == "0.1 to 3.9"
    assert told["certified"] == "the ideal law q_s"
    assert "KL at most" not in told
    assert certificate(None) == []


def test_what_was_learned_is_told_with_the_gap_before_and_after(tmp_path):
    lesson = {
        "learned": "head", "pilot": 64, "shadows": 48, "efficiency_before": (0.36, 0.04), "gap_before": (0.81, 0.07),
        "efficiency_after": (0.5, 0.05), "gap_after": (0.55, 0.06),
    }  # fmt: skip
    folder = RunFolder(tmp_path)
    folder.claim({})
    folder.write_manifest({"learned": {"u": lesson}})
    folder.write_curve([{"unit": "u", "strength": 1.0, "n": 4, "z_mean": 0.5}])
    page = report.write_report(folder).read_text()
    assert f"before → after: {plus_minus(0.81, 0.07)} → {plus_minus(0.55, 0.06)}" in page
    assert "learned" not in (learned(None) or "")
    assert "it is the default" in learned(lesson | {"gap_before": [None, None]})


def test_the_page_says_what_a_control_was_trained_for():
    told = learned({"adapter": {"kind": "lora", "strength": 2.0, "chain": {"steps": 16}}})
    assert "trained at strength 2" in told
    assert "16 steps" in told


@pytest.mark.parametrize("sizes", [(16, 16, 16, 16), (1, 1), (5,), (3, 7, 2)])
def test_particles_are_dealt_from_all_groups_alike_and_from_far_apart_in_each(sizes):
    """Every particle once; of the first k no group has two more than another that is not used up; of a group of 16 the
    first four are four apart."""
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    order = dealt(groups)
    assert sorted(order) == list(range(len(groups)))
    for k in range(len(order)):
        taken = [sum(groups[i] == g for i in order[:k]) for g in range(len(sizes))]
        left = [t for t, size in zip(taken, sizes) if t < size]
        assert max(taken, default=0) - min(left, default=max(taken, default=0)) <= 1
    if sizes[0] == 16:
        assert sorted(i for i in order if groups[i] == 0)[:4] == [0, 1, 2, 3]
        assert sorted([i for i in order if groups[i] == 0][:4]) == [0, 4, 8, 12]
