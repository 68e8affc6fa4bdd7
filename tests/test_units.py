"""Laws of units: what is read is what the network computed, for each row alone, with its gradient."""

import importlib
import linecache
import os
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import models as torchvision_models

from tiltlens.units import Encoder, Projection, UnitBank, build_unit, load_encoder, register_encoder
from tiltlens.units import sources as sources_module
from tiltlens.units.bank import check_addresses
from tiltlens.units.weights import fingerprint, read_vector, read_weights

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two timm folders with random weights: a DINOv3-like Eva (1 cls, 4 registers) and a ViT classifier."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    eva = timm.create_model("vit_small_patch16_dinov3", **SMALL)
    for parameter in eva.parameters():  # as initialised, layer scale silences the blocks
        nn.init.normal_(parameter, std=0.3)
    eva.pretrained_cfg.update(input_size=(3, 64, 64))
    timm.models.save_for_hf(eva, str(root / "eva"), model_args=SMALL, safe_serialization=True)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    vit.pretrained_cfg.update(
        input_size=(3, 64, 64), label_names=("cat", "horse, Equus", "ship"), num_classes=3
    )
    timm.models.save_for_hf(
        vit, str(root / "vit"), model_args={**SMALL, "num_classes": 3}, safe_serialization=True
    )
    return SimpleNamespace(root=root, eva=f"local-dir:{root}/eva", vit=f"local-dir:{root}/vit")


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def read(address, images):
    bank = UnitBank([build_unit(address)])
    return bank.read(images, torch.zeros(len(images), dtype=torch.long))[:, 0]


class Blocks(nn.Module):
    """A convolutional net with an in-place activation, a shared module and a channels-last layer."""

    mean, std, input_size = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), 32
    class_names = ("one", "two")

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=4)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(6, 6, 1)
        self.last = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 2)
        self.unused = nn.Linear(2, 2)
        self.ran = []

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.conv(x))
        x = self.last(x.permute(0, 2, 3, 1))
        self.ran.append("last")
        return self.head(self.norm(x.mean((1, 2))))


BLOCKS = "test_units:Blocks"


def test_tokens_are_slices_of_the_full_forward(folders, images):
    """[cls, 4 registers, 4 x 4 patches] of a DINOv3-like network, after block 1 of 3."""
    encoder = load_encoder(folders.eva)
    assert (encoder.num_prefix_tokens, encoder.num_registers, encoder.input_size) == (5, 4, (64, 64))
    with torch.no_grad():
        patches, prefix = encoder.model.forward_intermediates(
            encoder.preprocess(images),
            indices=[1],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )[0]
    every = torch.cat([prefix, patches], 1)
    expected = {
        "tokens=cls": every[:, 0, 7],
        "tokens=register": every[:, 1:5, 7].mean(1),
        "tokens=register,reduction=max": every[:, 1:5, 7].amax(1),
        "tokens=patch": every[:, 5:, 7].mean(1),
        "tokens=patch,reduction=logsumexp": every[:, 5:, 7].logsumexp(1),
        "tokens=map,reduction=max": every[:, 5:, 7].amax(1),
        "tokens=all": every[:, :, 7].mean(1),
        "tokens=cell:2:3": every[:, 5 + 2 * 4 + 3, 7],
    }
    for tokens, value in expected.items():
        torch.testing.assert_close(read(f"{folders.eva},layer=blocks.1,{tokens},channel=7", images), value)
    direction = torch.linspace(-1, 1, 24)
    address = {"encoder": folders.eva, "layer": "blocks.1", "tokens": "cls", "unit": direction.tolist()}
    torch.testing.assert_close(read(address, images), every[:, 0] @ direction)


def test_a_layer_before_the_prefix_tokens_has_patches_only(folders, images):
    encoder = load_encoder(folders.eva)
    h = encoder.activations(images, ["patch_embed"])["patch_embed"]
    torch.testing.assert_close(
        read(f"{folders.eva},layer=patch_embed,channel=3", images), h.flatten(1, -2)[..., 3].mean(1)
    )
    with pytest.raises(ValueError, match="has none of these; it has 4 x 4 patches"):
        UnitBank([build_unit(f"{folders.eva},layer=patch_embed,tokens=cls,channel=3")]).validate(32)


@pytest.mark.parametrize("layer", ["stem", "act", "conv", "last", "norm", None])
def test_a_hook_reads_what_a_full_forward_computes(layer, images):
    """In-place activations that follow do not reach what was read, with and without truncation."""
    encoder = load_encoder(BLOCKS)
    x = encoder.preprocess(images)
    m = encoder.model
    with torch.no_grad():
        stem = m.stem(x)
        act = stem.clamp(min=0)
        conv = m.conv(act)
        last = m.last(conv.clamp(min=0).permute(0, 2, 3, 1))
        norm = m.norm(last.mean((1, 2)))
    expected = {"stem": stem, "act": act, "conv": conv, "last": last, "norm": norm, None: m.head(norm)}[layer]
    alone = encoder.activations(images, [layer])[layer]
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(
        encoder.activations(images, [None, layer, "act"])[layer], alone, rtol=0, atol=0
    )


def test_the_forward_ends_at_the_layer_and_leaves_no_hook(images):
    encoder = load_encoder(BLOCKS)
    encoder.model.ran.clear()
    encoder.activations(images, ["conv", "stem"])
    assert not encoder.model.ran
    with pytest.raises(ValueError, match="never calls"):
        encoder.activations(images, ["unused"])
    assert not any(m._forward_hooks for m in encoder.modules())


def test_the_gradient_of_a_truncated_forward_is_the_gradient(folders, images):
    encoder = load_encoder(folders.vit)
    gradients = []
    for layers in (["blocks.1"], ["blocks.1", None]):
        x = images.clone().requires_grad_()
        encoder.activations(x, layers)["blocks.1"][:, 0, 3].sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_the_activation_is_differentiable(images):
    x = images[:2, :, :20, :20].double().requires_grad_()  # also through the resize
    bank = UnitBank(
        [build_unit(f"{BLOCKS},layer=conv,reduction=logsumexp,channel=1"), build_unit(f"{BLOCKS},class=two")]
    )
    which = torch.tensor([0, 1])
    (gradient,) = torch.autograd.grad(bank.read(x, which).sum(), x)
    step = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plus, minus = (bank.read(x + e * step, which).sum() for e in (1e-3, -1e-3))
    assert (plus - minus).item() / 2e-3 == pytest.approx((gradient * step).sum().item(), rel=3e-2)


def test_a_row_does_not_depend_on_the_others(folders, images):
    """Different layers, encoders and numbers of members in one batch: each row as if it were alone."""
    specs = [
        f"{folders.eva},layer=blocks.0,tokens=cls,channel=3",
        f"{folders.eva},layer=blocks.2,tokens=patch,reduction=max,channel=5",
        f"{folders.vit},class=horse",
        f"{folders.vit},class=ship versus {folders.eva},layer=blocks.0,tokens=cls,channel=3",
        f"{BLOCKS},layer=conv,channel=2",
        {"encoder": folders.eva, "layer": "blocks.1", "unit": torch.linspace(-1, 1, 24).tolist()},
    ]
    bank = UnitBank([build_unit(s) for s in specs])
    bank.validate(32)
    assert bank.size == 2
    which = torch.tensor([4, 3, 2, 1, 0, 5, 5])
    images = torch.cat([images, images[:2]])
    together = bank.train().read(images, which)
    assert torch.equal(together[:, 1] == 0, which != 3)
    for row in range(7):
        alone = bank.read(images[row : row + 1], which[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=0)
    torch.testing.assert_close(bank.combine(together, which)[1], together[1, 0] - together[1, 1])
    x = images.clone().requires_grad_()
    bank.read(x, which)[3].sum().backward()
    assert x.grad[3].abs().sum() > 0
    assert x.grad[[0, 1, 2, 4, 5, 6]].abs().sum() == 0


def test_projections_go_through_the_bank():
    bank = UnitBank([Projection([1.0, 2.0]), build_unit("projection[0,1] versus projection[1,0]")])
    bank.validate((2,))
    x = torch.tensor([[1.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
    read = bank.read(x, torch.tensor([0, 1]))
    torch.testing.assert_close(read, torch.tensor([[7.0, 0.0], [3.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(
        bank.combine(read, torch.tensor([0, 1])), torch.tensor([7.0, 2.0], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="2 entries, x has 3"):
        bank.validate((3,))


@pytest.mark.parametrize("name", ["resnet10t", "swin_tiny_patch4_window7_224", "mobilenetv3_small_050"])
def test_channels_of_a_feature_map_by_its_layout(name, images):
    """NCHW and NHWC networks: `patch` is the spatial mean of what the network itself calls a channel."""
    encoder = load_encoder(name, "random:3")
    layer = encoder.model.feature_info[2]["module"]
    h = encoder.activations(images[:2], [layer])[layer]
    axis = 3 if encoder.layout == "nhwc" else 1
    assert h.shape[axis] == encoder.model.feature_info[2]["num_chs"]
    expected = h.select(axis, 4)
    torch.testing.assert_close(
        read(f"{name},weights=random:3,layer={layer},channel=4", images[:2]), expected.mean((1, 2))
    )
    cell = read(f"{name},weights=random:3,layer={layer},tokens=cell:1:2,channel=4", images[:2])
    torch.testing.assert_close(cell, expected[:, 1, 2])


@pytest.mark.parametrize("size", [64, 90, 48])
def test_preprocessing_is_the_models_own(folders, size):
    """timm's evaluation transform of the same picture, up to PIL's rounding to 8 bits, twice."""
    encoder = load_encoder(folders.eva)
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(2)), size, mode="bicubic"
    ).clamp(0, 1)[0]
    pixels = (smooth * 180 + 40).round().byte()
    cfg = resolve_model_data_config(encoder.model)
    theirs = create_transform(**{**cfg, "crop_pct": 1.0})(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    ours = encoder.preprocess(pixels[None].float() / 127.5 - 1)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if size == 64 else 0.04)


def test_the_same_name_is_the_same_encoder_and_weights_make_the_fingerprint(folders, tmp_path):
    encoder = load_encoder(folders.vit)
    assert load_encoder(folders.vit) is encoder
    assert not any(p.requires_grad for p in encoder.parameters())
    state = load_file(folders.root / "vit" / "model.safetensors")
    half = {k: v.half() for k, v in state.items()}
    half["head.bias"] = half["head.bias"] + 1
    save_file(half, tmp_path / "other.safetensors")
    torch.save({"state_dict": state}, tmp_path / "same.pt")
    other = load_encoder(folders.vit, str(tmp_path / "other.safetensors"))
    same = load_encoder(folders.vit, str(tmp_path / "same.pt"))
    assert other is not encoder
    assert same.fingerprint == encoder.fingerprint != other.fingerprint
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    torch.testing.assert_close(other.model.head.bias, encoder.model.head.bias + 1, atol=1e-2, rtol=0)
    units = [
        build_unit({"encoder": folders.vit, "weights": w, "unit": "cat"})
        for w in (None, str(tmp_path / "same.pt"))
    ]
    assert units[0].fingerprint == build_unit(units[0].name).fingerprint


def test_a_direction_from_each_kind_of_file(folders, images, tmp_path):
    vector = torch.randn(24)
    np.save(tmp_path / "v.npy", vector.numpy())
    save_file({"v": vector}, tmp_path / "v.safetensors")
    torch.save(vector, tmp_path / "v.pt")
    values = [
        read(f"{folders.eva},layer=blocks.1,direction={tmp_path}/v.{s}", images)
        for s in ("npy", "safetensors", "pt")
    ]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_class_names(folders):
    names = {"horse": 1, "Equus": 1, "horse, Equus": 1, "CAT": 0}
    for name, row in names.items():
        logits = load_encoder(folders.vit).activations(torch.zeros(1, 3, 64, 64), [None])[None]
        unit = build_unit({"encoder": folders.vit, "unit": f"class={name}"})
        assert (
            UnitBank([unit]).read(torch.zeros(1, 3, 64, 64), torch.tensor([0])).item()
            == logits[0, row].item()
        )
    imagenet = load_encoder("mobilenetv3_small_050", "random:3")
    build_unit("mobilenetv3_small_050,weights=random:3,class=sorrel").load()
    assert imagenet.class_names[339] == "sorrel"
    for wrong, message in {"sorel": "sorrel", "crane": "n02012849"}.items():
        with pytest.raises(ValueError, match=message):
            build_unit(f"mobilenetv3_small_050,weights=random:3,class={wrong}").load()
    with pytest.raises(ValueError, match="no class names"):
        build_unit(f"{folders.eva},class=horse").load()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("vit_smal_patch16_dinov3,channel=0", "near names: vit_small_patch16_dinov3"),
        ("vit_small_patch16_dinov3.lvd1689,channel=0", "lvd1689m"),
        ("torchvision:resnet51,channel=0", "resnet50"),
        ("torchvision:fcn_resnet50,channel=0", "no image classifier.*package.module:factory"),
        ("fasterrcnn_resnet50_fpn,channel=0", "no image classifier"),
        ("bundeld,class=horse", "bundled"),
        ("timm.nonsense:factory,class=horse", "unknown encoder"),
        ("resnet18,weights=/nowhere/w.safetensors,channel=0", "does not exist"),
        ("local-dir:/nowhere,channel=0", "config.json"),
        ("test_units:Blocks,layer=stem,direction=/nowhere/v.npy", "does not exist"),
    ],
)
def test_a_wrong_address_is_told_before_anything_is_loaded(address, message, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(timm, "create_model", never)
    monkeypatch.setattr(importlib, "import_module", never)
    monkeypatch.setattr(sources_module, "_loaded", {})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_unit(address)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("layer=blocks.9,channel=0", "near names: blocks"),
        ("layer=block.1,channel=0", "blocks.1"),
        ("layer=blocks.1,channel=24", "24 channels, 0 to 23"),
        ("layer=blocks.1,tokens=cell:4:0,channel=0", "4 x 4 patches"),
        ("layer=blocks.1,reduction=none,channel=0", "one number an image"),
        ("layer=blocks.1,direction=[1,2]", "2 entries, the layer 24"),
        ("tokens=cls,channel=0", "leave tokens out"),
        ("layer=blocks.1.attn.attn_drop,channel=0", "never calls"),
    ],
)
def test_what_the_encoder_does_not_have_is_told_with_what_it_has(folders, rest, message):
    with pytest.raises(ValueError, match=message):
        UnitBank([build_unit(f"{folders.eva},{rest}")]).validate(32)


class RunsCode:
    def __reduce__(self):
        return (print, ("code from a weight file ran",))


def test_weight_files_that_are_of_no_use(folders, tmp_path, capsys):
    torch.save({"w": RunsCode()}, tmp_path / "code.pt")
    np.save(tmp_path / "code.npy", np.array([RunsCode()], dtype=object), allow_pickle=True)
    whole = (folders.root / "vit" / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"head.bias": torch.zeros(3)}, tmp_path / "unfit.safetensors")
    cases = {"code.pt": "run code", "short.safetensors": "damaged", "unfit.safetensors": "do not fit"}
    for file, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_encoder(folders.vit, str(tmp_path / file))
    with pytest.raises(ValueError, match="run code"):
        build_unit(f"{folders.vit},direction={tmp_path}/code.npy").load()
    assert "ran" not in capsys.readouterr().out


class RunsACommand:
    def __reduce__(self):
        return (os.system, ("echo a command from a weight file ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_whatever_runs_code_in_a_pickle_torchs_advice_to_run_it_is_not_passed_on(tmp_path, capfd):
    """torch refuses some modules, and pickles that it did not write, in other words than a function that it does not know."""
    torch.save({"w": RunsACommand()}, tmp_path / "command.pt")
    torch.save({"w": RunsCode()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"w": RunsACommand()}))
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save({"w": torch.zeros(300)}, tmp_path / "short.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "short.pt").read_bytes()[:400])
    cases = {
        "command": "run code",
        "old": "run code",
        "plain": "run code",
        "pointer": "damaged",
        "short": "damaged",
    }
    for file, message in cases.items():
        for reader in (read_vector, read_weights):
            with pytest.raises(ValueError, match=message) as error:
                reader(str(tmp_path / f"{file}.pt"))
            assert "weights_only" not in str(error.value)
            assert "\n" not in str(error.value)
    assert "ran" not in capfd.readouterr().out


def test_a_class_is_held_against_the_architecture_before_a_file_of_weights_is_read(tmp_path, monkeypatch):
    """The file is no file of weights: to read it would fail here, with another error."""
    monkeypatch.setattr(sources_module, "_loaded", {})
    (tmp_path / "w.pt").write_bytes(b"nothing")
    for name in ("resnet18", "torchvision:resnet18"):
        for rest, message in {
            "class=goldfsh": "near names: goldfish",
            "layer=lay,channel=1": "layer1",
        }.items():
            with pytest.raises(ValueError, match=message):
                check_addresses([build_unit(f"{name},weights={tmp_path}/w.pt,{rest}")])


def test_an_architecture_that_needs_numbers_is_not_refused(images):
    """torchvision's RegNets compute their widths with tensors; a forward may look at its values."""
    check_addresses([build_unit("torchvision:regnet_y_400mf,class=goldfish")])
    assert read("torchvision:regnet_y_400mf,weights=random:0,class=goldfish", images[:1]).shape == (1,)

    class Looks(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))

    sketch = Encoder(Looks().to("meta"), 32)
    sketch.model.register_parameter("w", nn.Parameter(torch.empty(1, device="meta")))
    UnitBank([build_unit("torchvision:resnet18,channel=0").load(sketch)]).validate_encoders()


def test_weights_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"resnet18\.a1_in1k could not be fetched.*weights=PATH"):
        load_encoder("resnet18.a1_in1k")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torch looks for torchvision's squeezenet before it would fetch it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources_module, "_loaded", {})
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    url = torchvision_models.get_model_weights("squeezenet1_1").DEFAULT.url
    return tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]


@pytest.mark.parametrize("zipped", [True, False])  # torch's format, and the one of before 2020
def test_torchvisions_stored_weights_run_no_code(zipped, cached, capsys):
    torch.save({"w": RunsCode()}, cached, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="asks to run code, which is never done: remove"):
        load_encoder("torchvision:squeezenet1_1")
    assert "ran" not in capsys.readouterr().out
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("zipped", [True, False])
def test_torchvisions_stored_weights_are_loaded(zipped, cached):
    torch.manual_seed(0)
    state = torchvision_models.squeezenet1_1().state_dict()
    torch.save(state, cached, _use_new_zipfile_serialization=zipped)
    encoder = load_encoder("torchvision:squeezenet1_1")
    assert encoder.fingerprint == fingerprint(state)


def test_torchvision_and_encoders_built_in_python(images):
    encoder = load_encoder("torchvision:squeezenet1_1", "random:0")
    assert encoder.interpolation == "bilinear"
    assert encoder.mean == (0.485, 0.456, 0.406)
    assert read("torchvision:squeezenet1_1,weights=random:0,class=goldfish", images[:1]).shape == (1,)
    register_encoder(Encoder(Blocks(), 16, (0.1, 0.2, 0.3), (1, 1, 1), name="mine", class_names=["a", "b"]))
    assert read("mine,class=b", images).shape == (5,)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("layer=blocks.99,channel=0", "unknown layer 'blocks.99'.*near names: blocks"),
        ("layer=blocks.9,channel=384", "384 channels, 0 to 383"),
        ("layer=blocks.9,tokens=cell:16:0,channel=0", "16 x 16 patches"),
        ("class=horse", "no class names"),
    ],
)
def test_an_address_is_held_against_the_architecture_before_weights_are_fetched(rest, message, monkeypatch):
    """The weights are pretrained ones: to fetch them would fail here, with another error."""
    monkeypatch.setattr(sources_module, "_loaded", {})
    unit = build_unit(f"vit_small_patch16_dinov3.lvd1689m,{rest}")
    with pytest.raises(ValueError, match=message):
        check_addresses([unit])
    check_addresses([build_unit("torchvision:resnet18,class=goldfish"), build_unit("bundled,class=horse")])
    assert not sources_module._loaded


class Fixed(torch.nn.Module):
    """Takes 32 pixels and nothing else."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 32 * 32, 5)

    def forward(self, x):
        return self.head(x.flatten(1))


def preprocessed():
    return Encoder(Fixed(), 32, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "bilinear")


def test_a_model_that_does_not_take_its_input_size_is_an_error_of_the_users():
    with pytest.raises(ValueError, match=r"does not take its own input size, 224 x 224.*input_size"):
        UnitBank([build_unit("test_units:Fixed,channel=1")]).validate_encoders()


def test_a_reading_is_known_by_preprocessing_and_code_besides_the_weights(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sources_module, "_loaded", {})
    monkeypatch.setattr("sys.dont_write_bytecode", True)  # two versions within a second are one to its cache
    written = (
        "import torch\nclass Net(torch.nn.Conv2d):\n    input_size, mean = 16, (0.5, 0.5, 0.5)\n"
        "    def forward(self, x):\n        return super().forward(x).mean((2, 3))\n"
        "def make():\n    return Net(3, 4, 3)\n"
    )
    found = []
    for change in (("", ""), ("16", "24"), ("(0.5, 0.5", "(0.4, 0.5"), (".mean(", ".amax("), ("", "")):
        (tmp_path / "versions.py").write_text(written.replace(*change) if change[0] else written)
        sys.modules.pop("versions", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        sources_module._loaded.clear()
        unit = build_unit("versions:make,channel=1").load()
        found.append((unit.encoder.fingerprint, unit.fingerprint))
    weights, units = zip(*found)
    assert len(set(weights)) == 1  # those of one seed
    assert len(set(units)) == 4
    assert units[0] == units[-1]


def test_a_factory_that_is_on_no_path_is_told_as_such():
    with pytest.raises(ValueError, match=r"expected a module mynets that can be imported.*PYTHONPATH"):
        build_unit("mynets:make,channel=1")


class TwoInputs(torch.nn.Module):
    def forward(self, x, level):
        return x


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("torch.nn:Linear", "no arguments.*found TypeError.*Write a function"),
        ("broken_by_syntax:make", "cannot be imported.*found SyntaxError"),
        ("broken_by_import:make", "cannot be imported.*No module named 'not_there'"),
        ("broken_package.part:make", "cannot be imported.*found ZeroDivisionError"),
        ("test_units:TwoInputs", r"one tensor \(B, 3, 224, 224\), found TypeError.*level"),
    ],
)
def test_a_factory_that_fails_is_an_error_of_the_users(factory, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_by_syntax.py").write_text("def make(:")
    (tmp_path / "broken_by_import.py").write_text("import not_there")
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").write_text("1 / 0")
    with pytest.raises(ValueError, match=message):
        UnitBank([build_unit(f"{factory},channel=1")]).validate_encoders()


def test_a_factory_may_make_an_encoder_with_its_preprocessing():
    unit = build_unit("test_units:preprocessed,channel=1").load()
    assert (unit.encoder.name, unit.encoder.input_size) == ("test_units:preprocessed", (32, 32))
    assert (unit.encoder.mean, unit.encoder.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    UnitBank([unit]).validate_encoders()


class Blind(torch.nn.Module):
    """Takes its numbers from the image, and no gradient with them."""

    input_size = 16

    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "inference":
            with torch.inference_mode():
                return x.mean((2, 3)) * 2
        if self.how == "numpy":
            return torch.from_numpy(x.mean((2, 3)).numpy())
        return x.mean((2, 3)).detach() if self.how == "detached" else x.flatten(2).argmax(2)


def detached():
    return Blind("detached")


def whole_numbers():
    return Blind("integers")


def of_inference():
    return Blind("inference")


def through_numpy():
    return Blind("numpy")


@pytest.mark.parametrize("factory", ["detached", "whole_numbers", "of_inference", "through_numpy"])
def test_a_unit_with_no_gradient_is_refused_where_guidance_needs_one(factory):
    bank = UnitBank([build_unit(f"test_units:{factory},channel=1")])
    bank.validate_encoders()
    bank.validate(8)
    with pytest.raises(
        ValueError, match=rf"test_units:{factory},channel=1 is not differentiable.*NoiseSpace"
    ):
        bank.validate(8, gradient=True)
    UnitBank([Projection([1.0] * 192)]).validate(8, gradient=True)
    UnitBank([build_unit("test_units:preprocessed,channel=1")]).validate(32, gradient=True)
