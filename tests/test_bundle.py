"""What the bundle promises: small, safe, natural enough, and DINOv3's architecture."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiltlens import Linear, build_unit, load_encoder, load_prior
from tiltlens.batches import ROWS_ON_CPU
from tiltlens.guidance import Calibrated
from tiltlens.sampling.chain import Chain
from tiltlens.sampling.noise import Noise
from tiltlens.sampling.plan import Row
from tiltlens.sampling.sampler import Sampler
from tiltlens.schedule import step_indices
from tiltlens.units import UnitBank
from tiltlens.units.noise_aware import load_twin
from tiltlens.units.twins import adopt_twins

BUNDLE = Path(str(files("tiltlens"))) / "bundled"
LARGEST = (
    "bundled,layer=blocks.3,tokens=patch,reduction=max,channel=17"  # that the bundled reader does not read
)


def test_it_is_small_and_holds_no_pickle():
    weights = [p for p in BUNDLE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in weights) <= 45e6
    assert {p.suffix for p in weights} <= {".safetensors", ".json", ".md", ".py", ".txt"}


def test_each_has_a_card():
    for name in ("prior", "encoder", "sae", "noise-aware"):
        card = (BUNDLE / name / "README.md").read_text()
        for word in ("CIFAR-10", "2026", "steps"):
            assert word in card, f"the card of the bundled {name} does not say {word!r}"


def test_the_prior_costs_at_most_one_and_a_half_gflop():
    prior = load_prior("bundled")
    x = torch.zeros(ROWS_ON_CPU, *prior.denoiser.shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x0_hat = prior.denoiser(x, 500)
    assert counter.get_total_flops() <= 1.5e9 * len(x)
    assert x0_hat.shape == x.shape
    assert prior.image_size == 32


def test_the_encoder_is_dinov3_in_miniature():
    encoder = load_encoder("bundled")
    assert type(encoder.model).__name__ == "Eva"
    assert (encoder.num_prefix_tokens, encoder.num_registers) == (5, 4)
    assert encoder.input_size == (32, 32)
    assert len(encoder.class_names) == 10
    assert encoder.model.patch_embed.patch_size == (4, 4)


def test_the_noise_aware_reader_is_of_this_encoder_and_prior_and_tells_more_than_the_encoder_at_high_noise():
    """Of its five named units' activation, and of others, on the prior's own samples, on seeds that it was not trained on: R^2 on average, at
    log-SNR -3..0."""
    prior = load_prior("bundled")
    units = json.loads((BUNDLE / "noise-aware" / "config.json").read_text())["units"]
    assert len(units) == 10 + 2 * 6 * 128
    units = units[:5] + units[7::250]
    plain, aware = (UnitBank([build_unit(f"bundled,{u}") for u in units]) for _ in range(2))
    aware.adopt(load_twin("bundled", aware.encoders, prior.fingerprint))
    chain = Chain(prior.denoiser, step_indices(prior.denoiser.schedule, 12))
    seen = {plain: [], aware: []}
    with torch.no_grad():
        trajectory = list(chain.run(Noise(range(48), prior.denoiser.shape, "cpu", torch.float32)))
        for _, info in trajectory:
            if -3 < info.log_snr < 0:
                for bank, values in seen.items():
                    values.append(bank.read_all(info.x0_hat, info.log_snr)[..., 0])
        known = plain.read_all(trajectory[-1][0].x)[..., 0]
    told = {
        bank: torch.tensor([
            [torch.corrcoef(torch.stack([u, a]))[0, 1] ** 2 for u, a in zip(value.T, known.T)]
            for value in values
        ])
        for bank, values in seen.items()
    }  # fmt: skip
    assert told[aware][:, :5].mean() > told[plain][:, :5].mean()
    assert told[aware][:, 5:].mean() > told[plain][:, 5:].mean()


def test_auto_takes_the_reader_where_it_fits_and_the_encoder_elsewhere():
    prior = load_prior("bundled")
    bank = UnitBank([build_unit(u) for u in ("bundled,class=horse", LARGEST)])
    (note,) = adopt_twins(bank, ["auto"], prior.fingerprint)
    assert f"the encoder itself reads clean estimates of {LARGEST}" in note
    assert len(bank.twins) == 1
    x, each = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    told, own = bank.read(x, each, 0.0), bank.read(x, each)
    assert told[0] != own[0]
    assert told[1] == own[1]
    for unit, other in (
        (LARGEST, prior.fingerprint),
        ("projection[1,0]", prior.fingerprint),
        ("bundled,class=horse", "another"),
    ):
        without = UnitBank([build_unit(unit)])
        adopt_twins(without, ["auto"], other)
        assert not without.twins
    with pytest.raises(ValueError, match=f"and 1540 more alone, found {LARGEST}: train one for it"):
        adopt_twins(UnitBank([build_unit(LARGEST)]), ["bundled"], prior.fingerprint)


def test_a_name_is_one_image_in_any_company():
    """(unit, strength, seed) alone, by three, and among sixteen of other strengths and units: equal to 1e-4."""
    prior = load_prior("bundled")
    bank = UnitBank(
        [build_unit("bundled,class=horse"), build_unit("bundled,layer=blocks.3,tokens=cls,channel=5")]
    )
    sampler = Sampler(prior, bank, Linear(), Calibrated(), steps=8)
    sampler.calibrate(sampler.run_pilot(16, 16))
    rows = [Row(i % 2, [0.0, 2.0, 8.0][i % 3], i) for i in range(16)]
    together = sampler.sample(rows).images
    alone = torch.cat([sampler.sample([r]).images for r in rows[:3]])
    by_three = sampler.sample(rows[2::-1]).images.flip(0)
    for name, other in (("alone", alone), ("by three, in reverse", by_three)):
        worst = float((together[:3] - other).abs().max())
        assert worst < 1e-4, f"{name}: images differ by {worst:.2g}"
