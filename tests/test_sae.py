"""Laws of sparse autoencoders: gates, recovery of a planted dictionary, revival, resumption; one normalisation everywhere."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from lightning import Trainer, seed_everything
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tiltlens.errors import UserError
from tiltlens.modules import activation_cache
from tiltlens.modules.activation_data import ActivationData, ActivationStream, ImagesInTurn
from tiltlens.modules.command_line import run
from tiltlens.modules.image_data import BatchStream, ImageFolderData, to_unit_range
from tiltlens.modules.sae_module import BANDWIDTH, SparseAutoencoderModule, Step, moments
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.units import UnitBank, build_unit, load_encoder
from tiltlens.units.sparse_autoencoder import (
    GATES,
    SparseAutoencoder,
    dictionary_folder,
    load_dictionary,
    read_config,
)

TRAIN = Path(__file__).parents[1] / "train.py"
SIZE = 16
VIT = {"img_size": SIZE, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, 24 for training and 6 held out, and a DINOv3-like network with random weights."""
    root, rng = tmp_path_factory.mktemp("sae"), np.random.default_rng(0)
    for split, n in (("train", 24), ("test", 6)):
        (root / split / "one").mkdir(parents=True)
        for k in range(n):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((SIZE, SIZE)).save(root / split / "one" / f"{k:02}.png")
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **VIT)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, std=0.3)
    network.pretrained_cfg.update(input_size=(3, SIZE, SIZE))
    timm.models.save_for_hf(network, str(root / "vit"), model_args=VIT, safe_serialization=True)
    return root


def encoder_of(folder):
    return f"local-dir:{folder / 'vit'}"


SMALL = {"layer": "blocks.0", "latents": 48, "k": 4, "rows": 64, "learning_rate": 1e-2}


def arguments(folder, out, *more, **settings):
    settings = {"encoder": encoder_of(folder), **SMALL, **settings}
    return [
        "fit",
        f"--out={out}",
        "--model=tiltlens.modules.sae_module.SparseAutoencoderModule",
        *(f"--model.{key}={'null' if value is None else value}" for key, value in settings.items()),
        f"--data.train={folder / 'train'}",
        f"--data.val={folder / 'test'}",
        f"--data.cache={folder / 'cache'}",
        f"--data.size={SIZE}",
        "--data.batch_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.logger=false",
        *more,
    ]


@pytest.fixture(scope="module", params=GATES)
def trained(folder, request):
    """A fit of each kind, with averaged weights: what a wrong normalisation would come through."""
    out = folder / request.param
    ema = ("--trainer.callbacks+=tiltlens.modules.ema.WarmEMA", "--trainer.callbacks.decay=0.9")
    cli = TrainingCLI(arguments(folder, out, *ema, "--trainer.max_epochs=8", kind=request.param))
    return SimpleNamespace(cli=cli, out=out, kind=request.param, sae=f"{out / 'sae'}")


def decoded(folder, split="val"):
    """uint8, as training has them."""
    where = {"train": str(folder / "train"), "val": str(folder / "test"), "cache": folder / "cache"}
    data = ImageFolderData(**where, size=SIZE, batch_size=4)
    data.setup()
    return getattr(data, f"{split}_set")[0]


def pixels(folder, split="val"):
    return to_unit_range(decoded(folder, split))


def read(address, images):
    return UnitBank([build_unit(address)]).read(images, torch.zeros(len(images), dtype=torch.long))[:, 0]


def test_training_and_use_are_normalised_alike(trained, folder):
    """From images, through the exported file alone: the metrics that training logged, and the latents of every unit."""
    encoder = load_encoder(encoder_of(folder))
    h = encoder.activations(pixels(folder), ["blocks.0"])["blocks.0"][:, 5:].flatten(0, 1)
    sae = load_dictionary(trained.sae)
    train = encoder.activations(pixels(folder, "train"), ["blocks.0"])["blocks.0"][:, 5:].flatten(0, 1)
    torch.testing.assert_close(sae.mean, train.mean(0), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(sae.scale, (train - train.mean(0)).square().mean().sqrt(), rtol=1e-3, atol=0)
    z = sae.encode(h)
    logged = trained.cli.trainer.callback_metrics
    nmse = (sae.decode(z) - h).square().sum() / (h - sae.mean).square().sum()
    assert float(logged["val_nmse"]) == pytest.approx(float(nmse), rel=1e-2)
    assert float(logged["val_l0"]) == pytest.approx(float((z > 0).sum(1).float().mean()), rel=2e-2)
    assert float(logged["val_alive"]) == pytest.approx(float((z > 0).any(0).float().mean()), abs=0.05)
    assert float(logged["val_rows"]) == len(h) == 96
    for latent in z.sum(0).topk(3).indices.tolist():
        address = f"{encoder_of(folder)},sae={trained.sae}#{latent}"
        torch.testing.assert_close(
            read(f"{address}:gated", pixels(folder)), z[:, latent].view(6, 16).amax(1), atol=1e-4, rtol=1e-4
        )
        pre = sae.preactivations(h)[:, latent].view(6, 16)
        torch.testing.assert_close(read(address, pixels(folder)), pre.amax(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            read(f"{address},tokens=cell:1:2,reduction=mean", pixels(folder)), pre[:, 6], atol=1e-4, rtol=1e-4
        )


def test_the_export_says_where_it_belongs_and_is_the_averaged_network(trained, folder):
    config = json.loads((trained.out / "sae" / "config.json").read_text())
    encoder = load_encoder(encoder_of(folder))
    assert config["encoder_sha256"] == encoder.fingerprint
    assert (config["kind"], config["layer"], config["tokens"]) == (trained.kind, "blocks.0", "patch")
    again, kept = load_dictionary(trained.sae), trained.cli.model.sae
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    last = torch.load(trained.out / "checkpoints" / "last.ckpt", weights_only=True)
    torch.testing.assert_close(last["state_dict"]["sae.mean"], again.mean)
    assert not any(name.startswith("encoder") for name in last["state_dict"])


def test_a_row_is_read_alike_in_any_company(trained, folder):
    """Bit for bit, for the open gates as well: no gate looks at the batch, batchtopk's at use included."""
    images, best = pixels(folder), int(load_dictionary(trained.sae).encoder_bias.argmax())
    for gated in ("", ":gated", ":gated,reduction=mean"):
        value, _, rest = gated.partition(",")
        address = f"{encoder_of(folder)},{rest},sae={trained.sae}#{best}{value}".replace(",,", ",")
        together = read(address, images)
        alone = torch.cat([read(address, images[i : i + 1]) for i in range(6)])
        assert torch.equal(together, alone)


def test_the_unit_has_the_gradient_of_its_value(trained, folder):
    images = pixels(folder).double().requires_grad_()
    address = f"{encoder_of(folder)},sae={trained.sae}#3"
    (gradient,) = torch.autograd.grad(read(address, images).sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()  # for images in which the latent is off, too
    step = gradient / gradient.norm()  # along it: elsewhere the difference is mostly the encoder's rounding
    plus, minus = (read(address, images.detach() + e * step).sum() for e in (1e-3, -1e-3))
    assert float(plus - minus) / 2e-3 == pytest.approx(float((gradient * step).sum()), rel=3e-2)
    gated = read(f"{address}:gated", images)
    (gradient,) = torch.autograd.grad(gated.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).equal(gated > 0)


def test_resumed_is_uninterrupted(trained, folder, tmp_path):
    """Stopped after step 5 of 7: weights, thresholds, average and dead-latent counts go on as if nothing had been."""
    if trained.kind == "topk":
        pytest.skip("batchtopk and jumprelu have more state")
    settings = {"kind": trained.kind, "warmup": 0, "decay": 0, "dead_after": 2}

    def fit(out, steps, *more):
        TrainingCLI(arguments(folder, out, f"--trainer.max_steps={steps}", *more, **settings))
        return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)

    whole = fit(tmp_path / "whole", 7)
    fit(tmp_path / "parts", 5)
    parts = fit(tmp_path / "parts", 7, "--ckpt_path=last")
    assert parts["global_step"] == whole["global_step"] == 7
    for name, value in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][name], value, msg=lambda m, n=name: f"{n}: {m}")
    # of the same shapes, but of something else
    with pytest.raises(UserError, match=r"layer: expected blocks\.0, found blocks\.1"):
        fit(tmp_path / "parts", 9, "--ckpt_path=last", "--model.layer=blocks.1")


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_two_processes_have_one_threshold_and_one_count_of_dead_latents(folder, tmp_path):
    """After a step: the mean of both batches' thresholds, and dead is what was off in both. The weights stand still."""
    more = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    args = arguments(folder, tmp_path, *more, learning_rate=1e-12, rows=32)
    cli = TrainingCLI(args)
    two = [*args, "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run([sys.executable, str(TRAIN), *two], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    activations, module = cli.datamodule.train_set, cli.model
    module.load_state_dict(found)
    pre = [
        module.sae.preactivations(
            next(iter(ActivationStream(activations, 32, 0, True, rank=r, ranks=2)))["activation"]
        )
        for r in (0, 1)
    ]
    lowest = torch.stack([p.flatten().topk(32 * SMALL["k"]).values[-1] for p in pre])
    assert lowest[0] != lowest[1]
    torch.testing.assert_close(found["sae.log_threshold"].exp(), lowest.mean())
    on = [(p >= v).any(0) for p, v in zip(pre, lowest)]
    assert not on[0].equal(on[1])
    assert found["idle"].equal((~(on[0] | on[1])).long())


def test_activations_are_encoded_once(trained, folder, tmp_path, monkeypatch):
    encoder, images = (
        load_encoder(encoder_of(folder)),
        decoded(folder),
    )

    def cached(images=images, layer="blocks.0", tokens="patch", per_image=4):
        stream = BatchStream(images, torch.zeros(6), 4, 0, shuffle=False)
        return activation_cache.cached_activations(encoder, stream, layer, tokens, per_image, tmp_path)

    first = cached()
    assert first.shape == (24, 16)
    every = encoder.activations(to_unit_range(images), ["blocks.0"])["blocks.0"][:, 5:]
    for image in range(6):  # each row is one of its image's patches, none twice
        distance = torch.cdist(first[4 * image : 4 * image + 4].float(), every[image])
        assert distance.min(1).values.max() < 1e-2
        assert len(distance.argmin(1).unique()) == 4
    monkeypatch.setattr(activation_cache, "_encode", None)
    assert torch.equal(cached(), first)
    changed = images.clone()
    changed[5, 0, 0, 0] ^= 1
    for other in (
        {"images": changed}, {"layer": "blocks.1"}, {"tokens": "all"}, {"tokens": "cls"}, {"per_image": None}
    ):  # fmt: skip
        with pytest.raises(TypeError, match="not callable"):
            cached(**other)


def test_the_images_that_are_encoded_are_drawn_once():
    pictures, numbers = torch.zeros(700, 3, 1, 1, dtype=torch.uint8), torch.arange(700)

    def passes(n, times):
        chosen = ImagesInTurn(pictures, numbers, seed=3, n=n)
        return [torch.cat([batch["label"] for batch in chosen]).tolist() for _ in range(times)]

    assert passes(None, 1) == passes(700, 1) == [list(range(700))]
    one, two = passes(600, 2)
    assert one == two
    assert len(set(one)) == len(one) == 512
    assert one != sorted(one)
    assert len(passes(100, 1)[0]) == 100


class Flat(nn.Module):
    """An encoder of one vector an image; of use here for its 24 channels."""

    input_size = 4

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(48, 24)

    def forward(self, x):
        return self.last(x.flatten(1))


def planted(rows, seed=0, latents=32):
    """h = 5 + 3 sum_j z_j d_j with four of 32 latents on: activations (rows, 24) and the directions (32, 24)."""
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(
        torch.randn(latents, 24, generator=torch.Generator().manual_seed(1)), dim=1
    )
    on = torch.rand(rows, latents, generator=generator).argsort(1) < 4
    z = on * (1 + torch.rand(rows, latents, generator=generator))
    return 5 + 3 * z @ directions, directions


def train_on(h, steps, dead=0, **settings):
    """A module trained on activations as they are; the first `dead` latents start far below their gates."""
    seed_everything(0, verbose=False)
    module = SparseAutoencoderModule("test_sae:Flat", layer="last", tokens=None, **settings)
    with torch.no_grad():
        module.sae.encoder_bias[:dead] = -20
    sets = {"train_set": (h, h), "val_set": (h[:1000], h[:1000])}
    images = SimpleNamespace(setup=lambda stage: None, cache=None, seed=0, **sets)
    trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    data = ActivationData(images, lambda chosen, *_: chosen.images, settings["rows"])
    trainer.fit(module, datamodule=data)
    return module, trainer.validate(module, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize(
    ("kind", "steps", "rate"), [("topk", 200, 2e-2), ("batchtopk", 200, 2e-2), ("jumprelu", 300, 1e-2)]
)
def test_a_planted_dictionary_is_found(kind, steps, rate):
    h, directions = planted(8192)
    settings = {"kind": kind, "latents": 48, "k": 4, "rows": 256, "learning_rate": rate, "dead_after": 20}
    module, found = train_on(h, steps, **settings)
    likeness = directions @ nn.functional.normalize(module.sae.decoder, dim=1).detach().T
    assert likeness.amax(1).median() > 0.9
    assert found["val_nmse"] < 0.12
    assert found["val_l0"] == pytest.approx(4, abs=0.6)


def test_dead_latents_are_revived_by_the_auxiliary_loss():
    h, _ = planted(2048)
    settings = {"kind": "topk", "latents": 48, "k": 4, "rows": 256, "learning_rate": 3e-2, "dead_after": 5}
    shares = [train_on(h, 100, dead=24, revival=r, **settings)[1]["val_alive"] for r in (0, 1 / 32)]
    assert shares[0] <= 0.5
    assert shares[1] >= 0.8


def test_the_latents_do_not_depend_on_the_scale_of_the_activations():
    """h -> a h + v: the same latents, and a h_hat + v, for the stored normalisation absorbs it."""
    h, _ = planted(2048)
    torch.manual_seed(0)
    for kind in GATES:
        sae = SparseAutoencoder(kind, 24, 48, 4).requires_grad_(False)
        codes = []
        for a, v in ((1.0, 0.0), (7.0, torch.linspace(-50, 50, 24))):
            mean, scale = moments((a * h + v).half() if a == 1 else a * h.half().float() + v)
            sae.mean.copy_(mean)
            sae.scale.copy_(scale)
            z = sae.encode(a * h + v)
            codes.append((z, (sae.decode(z) - v) / a))
        for one, two in zip(*codes):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)


def test_gates():
    torch.manual_seed(0)
    pre = torch.randn(64, 48)
    top = SparseAutoencoder("topk", 24, 48, 4)
    opened = top.open(pre)
    assert (opened.sum(1) == 4).all()
    assert (pre.masked_fill(~opened, torch.inf).amin(1) >= pre.masked_fill(opened, -torch.inf).amax(1)).all()
    assert not top.open(-pre.abs()).any()  # a negative value is never kept
    module = SparseAutoencoderModule("test_sae:Flat", layer="last", tokens=None, latents=48, k=4, rows=64)
    opened = module.gates(pre).bool()
    assert opened.sum() == 64 * 4
    assert pre[opened].min() > pre[~opened].max()
    assert module.sae.open(pre).sum() == 64 * 4 - 1  # the threshold itself is the smallest that was kept


def test_the_straight_through_gradient_is_the_density_at_the_threshold():
    """d/dtheta E[H(pre - theta)] = -p(theta)."""
    pre = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    theta = torch.tensor([-0.5, 0.0, 1.5], requires_grad=True)
    Step.apply(pre, theta).mean(0).sum().backward()
    density = torch.exp(-(theta.detach() ** 2) / 2) / (2 * torch.pi) ** 0.5
    error = (density / (BANDWIDTH * len(pre))).sqrt()
    assert ((theta.grad + density).abs() < 4 * error + 1e-3).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model.kind=topkk"], "topk"),
        (["--model.k=100"], "expected 1 to latents = 48"),
        (["--model.layer=block.0"], "near names: blocks.0"),
        (["--model.tokens=patches"], "near names: patch"),
        (["--model.encoder=bundeld"], "bundled"),
        (["--model.rows=5000"], "fewer than model.rows = 5000"),
        (["--model.latent=5"], "Did you mean model.latents"),
    ],
)
def test_user_errors_end_with_status_2(folder, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as stop:
        run(lambda: TrainingCLI([*arguments(folder, tmp_path, "--trainer.max_steps=1"), *change]))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


def test_an_address_that_does_not_fit_the_dictionary_is_told_at_once(trained, folder, tmp_path):
    """Before any weights are loaded; another encoder is told by its weights, as soon as these are known."""
    if trained.kind != "topk":
        pytest.skip("the same for every kind")
    here, sae = encoder_of(folder), trained.sae
    for address, words in {
        f"{here},sae={sae}#48": "48 latents, 0 to 47",
        f"{here},sae={sae}": "expected FOLDER#LATENT",
        f"{here},sae={sae}x#3": f"no sparse autoencoder at .*near names: {sae}",
        f"{here},sae=bundeld#3": "near names: bundled",
        f"{here},layer=blocks.1,sae={sae}#3": "was trained on blocks.0",
        f"{here},tokens=cls,sae={sae}#3": "was trained on tokens=patch",
        f"{here},reduction=none,sae={sae}#3": "gives many numbers",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            build_unit(address)
    with pytest.raises(ValueError, match=r"trained on the encoder local-dir.*bundled has"):
        build_unit(f"bundled,sae={sae}#3").load()
    assert (
        build_unit(f"{here},layer=blocks.0,tokens=map,reduction=max,sae={sae}#3").address.reduction == "max"
    )
    broken = tmp_path / "sae"
    broken.mkdir()
    config = json.loads((trained.out / "sae" / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "latents": 64}))
    whole = (trained.out / "sae" / "model.safetensors").read_bytes()
    for content in (whole, whole[: len(whole) // 2]):
        (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="do not fit"):
            build_unit(f"{here},sae={broken}#3").load()
    (broken / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say kind"):
        build_unit(f"{here},sae={broken}#3")
    one, two = (build_unit(f"{here},sae={sae}#{j}").fingerprint for j in (3, 4))
    assert one != two
    assert set(load_file(trained.out / "sae" / "model.safetensors")) >= {"mean", "scale", "decoder"}


def test_the_bundled_dictionary_belongs_to_the_bundled_encoder():
    """It is small, has a card, and every latent that the card names is a unit that answers to images."""
    folder = dictionary_folder("bundled")
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 1.5e6
    card, config = (folder / "README.md").read_text(), read_config("bundled")
    for word in ("CIFAR-10", "configs/train/sae-cifar10.yaml", "benchmarks/sae_quality.py", config["layer"]):
        assert word in card
    named = re.findall(r"^\| ([0-9]+) \|", card, re.MULTILINE)
    assert len(named) >= 8
    bank = UnitBank([build_unit(f"bundled,sae=bundled#{latent}") for latent in named])
    bank.validate(32)
    read = bank.read_all(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert (read.std(0) > 0).all()
