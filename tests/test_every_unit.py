"""Readers of all units of a place: what a star stands for, and what such a reader shares with one of few units."""

import pytest
import torch
from lightning import Trainer
from prior_folders import ddpm, write_pixel
from small_nets import register_small_net
from torch import nn

from tiltlens.errors import UserError
from tiltlens.modules.image_data import ImageFolderData
from tiltlens.modules.noise_aware_module import NoiseAwareModule
from tiltlens.modules.noise_aware_start import members_of
from tiltlens.modules.noise_aware_task import UnitTask
from tiltlens.priors import load_prior
from tiltlens.units import UnitBank, build_unit, load_encoder
from tiltlens.units.every import is_every, spread
from tiltlens.units.noise_aware import NoiseAware, TwinConfig, few, load_twin, place, reader_of, save_twin
from tiltlens.units.unit import read_together

PLACE = "bundled,layer=blocks.3,tokens=patch,reduction=mean"
FEW = ["star-net,channel=1", "star-net,layer=0,channel=2"]
EVERY = ["star-net,channel=*", *FEW, "star-net,layer=0,reduction=max,channel=*"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a prior; with it an encoder of 3 outputs and a layer of 6 channels."""
    path = tmp_path_factory.mktemp("every")
    torch.manual_seed(0)
    write_pixel(path, ddpm())
    register_small_net("star-net")
    return path


def units(addresses):
    return [build_unit(u).load() for u in addresses]


def test_a_star_is_every_channel_or_class_of_its_place():
    encoder = load_encoder("bundled")
    found = spread([f"{PLACE},channel=*", f"{PLACE},channel=17", "bundled,class=*"], encoder)
    assert found[:128] == [f"{PLACE},channel={k}" for k in range(128)]
    assert found[128:] == [f"bundled,class={name}" for name in encoder.class_names]
    assert spread(["bundled,channel=*"], encoder) == [f"bundled,channel={k}" for k in range(10)]
    assert not is_every(f"{PLACE},channel=17")


def test_named_units_come_first_and_each_unit_once(folder):
    named, members = members_of(EVERY, load_encoder("star-net"))
    assert named == 2
    places = [place(m) for m in members]
    assert places[:2] == ["channel=1", "layer=0,channel=2"]
    assert places[2:4] == ["channel=0", "channel=2"]
    assert places[4:] == [f"layer=0,reduction=max,channel={k}" for k in range(6)]
    weights = UnitTask(None, reader_of(load_encoder("star-net"), members, None, None), None, named).weights
    torch.testing.assert_close(weights, torch.tensor([0.25] * 2 + [0.125] * 2 + [0.25 / 6] * 6))


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("star-net,class=*", "has no class names"),
        ("star-net,layer=nope,channel=*", "unknown layer 'nope'"),
        ("twin-net,channel=*", "not of the encoder star-net"),
    ],
)
def test_a_star_that_stands_for_nothing_is_refused(folder, address, why):
    register_small_net("twin-net")  # which has as many channels
    with pytest.raises(UserError, match=why):
        NoiseAwareModule("star-net", prior=str(folder), units=[address], own=0, own_share=0)


def test_units_are_read_together_as_alone():
    encoder = load_encoder("bundled")
    found = units(
        [f"{PLACE},channel=17", f"{PLACE},channel=3", "bundled,class=horse", "bundled,layer=blocks.2,tokens=cls,channel=5",
         "bundled,layer=blocks.2,tokens=patch,reduction=max,channel=5", "bundled,layer=blocks.2,tokens=patch,reduction=logsumexp,channel=6",
         "bundled,layer=blocks.1,tokens=cell:2:3,channel=9",
         f"bundled,layer=blocks.2,tokens=patch,reduction=max,direction={[1.0, -2.0] * 64}"]
    )  # fmt: skip
    outputs = encoder.outputs(torch.rand(3, 3, 32, 32) * 2 - 1, [f"blocks.{k}" for k in (1, 2, 3)] + [None])
    alone = torch.stack([u.read(outputs[u.address.layer]) for u in found], 1)
    torch.testing.assert_close(read_together(found, outputs), alone, rtol=1e-5, atol=1e-5)
    beyond = units([f"{PLACE},channel=17", f"{PLACE},channel=128"])
    with pytest.raises(ValueError, match=r"channel=128: channel = 128: the layer has 128 channels, 0 to 127"):
        read_together(beyond, outputs)


def test_a_reader_reads_the_units_that_are_wanted_and_no_layer_beyond_them():
    encoder = load_encoder("bundled")
    reader = reader_of(
        encoder, units([f"{PLACE},channel=17", "bundled,class=horse", f"{PLACE},channel=3"]), None, None
    )
    nn.init.normal_(reader.level[-1].weight, 0, 0.1)
    reader.mean.copy_(torch.tensor([1.0, 2.0, 3.0])), reader.std.copy_(torch.tensor([4.0, 5.0, 6.0]))
    x, called = torch.rand(3, 3, 32, 32) * 2 - 1, []
    for k in (3, 4):
        reader.network.model.get_submodule(f"blocks.{k}").register_forward_hook(
            lambda *_, k=k: called.append(k)
        )
    whole = reader(x, torch.full((3,), -1.0)) * reader.std + reader.mean
    assert called == [3, 4]
    torch.testing.assert_close(reader.read(x, -1.0, [2, 0]), whole[:, [2, 0]])
    assert called == [3, 4, 3]
    torch.testing.assert_close(reader.read(x, -1.0, [1]), whole[:, [1]])


def test_a_unit_is_known_however_it_is_spelt(folder):
    encoder = load_encoder("bundled")
    given = [
        "layer=blocks.3,tokens=patch,reduction=mean,channel=17",
        "layer=blocks.2,tokens=cls,channel=4",
        "class=horse",
    ]
    whose = {"name": "bundled", "sha256": encoder.fingerprint}
    members = units([f"bundled,{u}" for u in given])
    twin = NoiseAware(reader_of(encoder, members, None, None), TwinConfig(whose, whose, (-3.0, 3.0), given))
    same = units(
        [
            "bundled,layer=blocks.3,channel=17",
            "bundled,layer=blocks.2,tokens=cls,reduction=max,channel=4",
            "bundled,layer=blocks.3,tokens=patch,channel=17",
        ]
    )
    other = [
        "layer=blocks.3,reduction=max,channel=17",
        "layer=blocks.3,tokens=all,channel=17",
        "layer=blocks.2,channel=4",
        "channel=7",
    ]
    assert all(map(twin.reads, [*same, *members]))
    assert not any(map(twin.reads, units([f"bundled,{u}" for u in other])))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    found = twin.read([*members, *same], x, 0.0)
    for m, twice in ((members[0], same[0]), (members[1], same[1]), (members[0], same[2])):
        assert torch.equal(found[m], found[twice])


def test_a_reader_of_more_units_begins_as_one_of_some_of_them(folder, tmp_path):
    """And the others begin as its network reads them."""
    prior, encoder = load_prior(str(folder)), load_encoder("star-net")
    whose = (
        {"name": "star-net", "sha256": encoder.fingerprint},
        {"name": prior.name, "sha256": prior.fingerprint},
    )
    known = reader_of(encoder, units(FEW), None, None)
    for weight in known.parameters():
        weight.data = weight.data + 0.1 * torch.rand_like(weight)
    save_twin(known, TwinConfig(*whose, (-3.0, 3.0), [place(m) for m in known.members]), tmp_path)
    asked = {"prior": str(folder), "own": 0, "own_share": 0, "init_from": str(tmp_path)}
    reader = NoiseAwareModule("star-net", units=EVERY, **asked).twin
    x, level = torch.rand(4, 3, 8, 8) * 2 - 1, torch.linspace(-2, 2, 4)
    close = {"rtol": 1e-2, "atol": 1e-2}  # half precision
    torch.testing.assert_close(reader(x, level)[:, :2], known(x, level), **close)
    torch.testing.assert_close(reader.mean[:2], known.mean)
    plain = read_together(reader.members, reader.network.outputs(seen(reader, x, level), ["0", None]))
    torch.testing.assert_close(reader(x, level)[:, 2:], plain[:, 2:], **close)
    with pytest.raises(
        UserError,
        match=r"expected a reader of channel=1, or of some of them, .* found one of channel=1, layer=0",
    ):
        NoiseAwareModule("star-net", units=FEW[:1], **asked)
    assert few([str(k) for k in range(9)]) == "0, 1, 2, 3, 4, 5 and 3 more"


def seen(reader, x, level):
    """The images with the level's tile, as the network sees them."""
    kept = []
    outputs = reader.network.outputs
    try:
        reader.network.outputs = lambda images, layers: kept.append(images) or outputs(images, layers)
        reader(x, level)
    finally:
        del reader.network.outputs
    return kept[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_of_every_unit_says_what_the_named_ones_earn(folder, tmp_path):
    data = ImageFolderData("FakeData", "FakeData", size=8, batch_size=32, cache=tmp_path, val_n=32)
    module = NoiseAwareModule(
        "star-net", units=EVERY, prior=str(folder), log_snr=(-3.0, 3.0), own=64, steps=5, responses=1.0
    )
    trainer = Trainer(
        max_steps=2, val_check_interval=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    assert {"val_response", "val_response_all"} <= set(trainer.callback_metrics)
    prior, encoder = load_prior(str(folder)), load_encoder("star-net")
    bank = UnitBank([build_unit("star-net,layer=0,reduction=max,channel=4")])
    bank.adopt(load_twin(module.export(tmp_path), [encoder], prior.fingerprint))
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    column = [place(m) for m in module.units].index("layer=0,reduction=max,channel=4")
    expected = module.twin.read(x, 0.5, [column])[:, 0]
    torch.testing.assert_close(
        bank.read(x, torch.zeros(2, dtype=torch.long), 0.5)[:, 0], expected, rtol=1e-2, atol=1e-2
    )
