"""Laws of the data: a batch is a function of its number, whatever the source; what cannot be used is said."""

import importlib.util
import io
import os
import struct
import tarfile
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageOps
from torchvision import datasets

from tiltlens.errors import UserError
from tiltlens.modules import image_sets
from tiltlens.modules.command_line import run
from tiltlens.modules.hugging_face_source import as_image
from tiltlens.modules.image_data import BatchStream, ImageFolderData
from tiltlens.modules.image_decoding import decode, to_rgb
from tiltlens.modules.image_shards import expand_braces
from tiltlens.modules.image_sources import open_source
from tiltlens.modules.training_cli import TrainingCLI
from tiltlens.sampling.natural_images import load_image

SIZE = 8
CONFIGS = Path(__file__).parents[1] / "configs" / "train"


def pixels(k: int, side: int = SIZE) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 images, nested, in three formats."""
    root = tmp_path / "images"
    for c, name in enumerate(("cat", "dog")):
        (root / name / "deep" / "er").mkdir(parents=True)
        for k in range(12):
            path = root / name / ("deep/er" if k % 2 else ".") / f"{k}.{('png', 'bmp', 'webp')[k % 3]}"
            Image.fromarray(pixels(100 * c + k)).save(path, **({"lossless": True} if k % 3 == 2 else {}))
    return root


@pytest.fixture
def data(folder, tmp_path):
    def make(train=folder, val=None, **settings):
        settings = {"size": SIZE, "batch_size": 4, "cache": tmp_path / "cache", **settings}
        made = ImageFolderData(train, val, **settings)
        made.setup()
        return made

    return make


def files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_colours_and_orientation():
    """Every kind of image becomes upright 8-bit RGB; alpha lies on white."""
    colour = Image.fromarray(pixels(0))
    grey = colour.convert("L")
    assert np.array_equal(np.asarray(to_rgb(grey)), np.asarray(grey)[..., None].repeat(3, 2))
    palette = colour.quantize(16)
    assert np.array_equal(np.asarray(to_rgb(palette)), np.asarray(palette.convert("RGB")))
    alpha = np.dstack([pixels(0), np.full((SIZE, SIZE), 51, np.uint8)])  # a fifth
    expected = 0.2 * pixels(0) + 0.8 * 255
    assert np.abs(np.asarray(to_rgb(Image.fromarray(alpha))) - expected).max() <= 1
    clear = palette.copy()
    clear.info["transparency"] = int(np.asarray(palette)[0, 0])
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 1000
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(deep)))[..., 0], (deep / 257).round())
    turned = Image.fromarray(pixels(0)[:, :4])
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees clockwise to see it upright"
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=exif)
    upright = np.rot90(pixels(0)[:, :4], -1)
    assert np.array_equal(np.asarray(to_rgb(Image.open(stream))), upright)
    with pytest.raises(ValueError, match=r"unknown range"):
        to_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(ValueError, match=r"1, 3 or 4 channels"):
        as_image(np.zeros((4, 4, 5), np.uint8))


def test_a_large_photograph_is_turned_though_it_is_decoded_at_a_part_of_its_size(tmp_path):
    """EXIF orientation 6 of a JPEG that `draft` reads at an eighth: the crop of the upright image, the sky on top."""
    sky = np.repeat(np.linspace(255, 0, 96)[:, None, None], 160, 1).repeat(3, 2).astype(np.uint8)  # 96 x 160
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(sky)).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    found = decode(open_source(str(tmp_path), False, 6, tmp_path), 0, 6, 6).float()
    assert Image.open(tmp_path / "turned.jpg").size == (96, 160)
    expected = torch.from_numpy(sky.reshape(6, 16, 160, 3).mean((1, 2))).T[:, :, None].expand(3, 6, 6)
    assert (found - expected).abs().max() < 10


def test_linked_folders_are_classes_like_others(data, folder, tmp_path):
    """... and a link to a folder above is not followed round and round."""
    plain = data().train_set
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(folder / name)
    (folder / "dog" / "deep" / "up").symlink_to(folder)
    source = open_source(str(tmp_path / "linked"), False, SIZE, tmp_path)
    assert source.class_names == ["cat", "dog"]
    whole = [source.name(i) for i in range(len(source))]
    assert [n for n in whole if "/up/" not in n] == [p.relative_to(folder).as_posix() for p in files(folder)]
    assert len(whole) == 24 + 12  # below the link lie the cats; the dogs are where it was met
    (folder / "dog" / "deep" / "up").unlink()
    assert torch.equal(data(tmp_path / "linked").train_set[0], plain[0])


def test_folder_is_read_as_it_lies(data, folder):
    made = data(val=folder)
    images, labels = made.train_set
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    assert made.class_names == ["cat", "dog"]
    for path, image, label in zip(files, images, labels):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path).convert("RGB")))
        assert made.class_names[label] == path.relative_to(folder).parts[0]


def test_crops_are_squares_of_the_scaled_image(data, tmp_path):
    """A wide image whose columns tell their place: centre and random crops are where they say."""
    wide = np.repeat(np.arange(0, 240, 6, dtype=np.uint8)[None, :, None], SIZE, 0).repeat(3, 2)  # 8 x 40
    (tmp_path / "wide").mkdir()
    for k in range(8):
        Image.fromarray(wide).save(tmp_path / "wide" / f"{k}.png")
    centre = data(tmp_path / "wide", tmp_path / "wide").train_set[0][0]
    assert np.array_equal(centre[0, 0], wide[0, 16:24, 0])
    small = data(tmp_path / "wide", tmp_path / "wide", size=4, resize=8).train_set[0][0]
    assert np.array_equal(small[0, 0], wide[0, 18:22, 0])
    large = data(tmp_path / "wide", tmp_path / "wide", size=4, resize=16).train_set[0][0]
    assert np.array_equal(large[0, 0], wide[0, 18:22, 0])  # 8 pixels are not enlarged to 16
    loader = data(tmp_path / "wide", tmp_path / "wide", crop="random").train_dataloader()
    lefts = torch.cat([b["image"][:, 0, 0, 0] for b in loader])
    assert lefts.std() > 0.1
    assert torch.equal(lefts, torch.cat([b["image"][:, 0, 0, 0] for b in _again(loader)]))


def _again(loader: BatchStream) -> BatchStream:
    loader.load_state_dict({"position": 0})
    return loader


def test_held_out_by_hash(data, folder):
    """A split without a val folder: disjoint, whole, by seed; a new image moves no other."""

    def names(made):
        held = {tuple(x.flatten().tolist()) for x in made.val_set[0]}
        return held, {tuple(x.flatten().tolist()) for x in made.train_set[0]}

    held, kept = names(data(val_n=5))
    assert len(held) == 5
    assert len(kept) == 19
    assert not held & kept
    assert names(data(val_n=5))[0] == held
    assert names(data(val_n=5, seed=1))[0] != held
    assert len(data(val_share=0.25).val_set[1]) == 6
    Image.fromarray(pixels(999)).save(folder / "cat" / "new.png")
    assert len(names(data(val_n=5))[0] & held) >= 4
    with pytest.raises(UserError, match=r"val_n = 25 of 25 images"):
        data(val_n=25)


@pytest.mark.parametrize("name", ["prior-finetune", "prior-lora", "prior-latent"])
def test_a_small_folder_of_one_s_own_is_trained_on(data, name):
    """The fine-tuning configs hold out a twentieth of 600 images, and of many no more than their val_n; who asks for
    100 has 100."""
    asked = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"] | {"size": SIZE}

    def sizes(n, **more):
        made = data(**asked | {"train": f"FakeData?size={n}"} | more)
        return len(made.train_set[1]), len(made.val_set[1])

    assert sizes(600) == (570, 30)
    assert sizes(100, val_n=4) == (96, 4)
    assert sizes(300, val_n=100, val_share=None) == (200, 100)


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_lazy_is_eager_and_resumes(data, folder, monkeypatch, crop):
    """A set too large for memory gives the same batches, and batch k whether or not k - 1 was read."""
    eager = list(data(val=folder).train_dataloader())
    monkeypatch.setattr(image_sets, "AT_ONCE", 0)
    loader = data(val=folder, crop=crop, resize=SIZE if crop == "centre" else 10).train_dataloader()
    whole = list(loader) + list(islice(loader, 2))
    if crop == "centre":
        for a, b in zip(eager, whole):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])
            assert a["seed"] == b["seed"]
    later = data(val=folder, crop=crop, resize=loader.images.resize).train_dataloader()
    later.load_state_dict({"position": 4})
    for a, b in zip(whole[4:], [*later, *islice(later, 2)]):
        assert torch.equal(a["image"], b["image"])
        assert a["seed"] == b["seed"]


def test_a_resume_with_other_data_says_so(data):
    kept, same = data().train_dataloader().state_dict(), data().train_dataloader()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_state_dict(kept)
        same.load_state_dict({"position": 4})  # of an older version
    for change, words in (({"batch_size": 3}, "data.batch_size 4 -> 3"), ({"seed": 9}, "data.seed 0 -> 9")):
        with pytest.warns(UserWarning, match=words):
            data(**change).train_dataloader().load_state_dict(kept)


@pytest.mark.parametrize("lazy", [False, True])
def test_broken_files(data, folder, tmp_path, monkeypatch, lazy):
    """Left out, named and counted up to the share; beyond it an error. A cached set tells it again."""
    monkeypatch.setattr(image_sets, "AT_ONCE", 0 if lazy else 1 << 30)
    (folder / "dog" / "text.png").write_text("no image")
    whole = (folder / "dog" / "deep/er" / "3.png").read_bytes()
    (folder / "dog" / "deep/er" / "3.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(pixels(0, SIZE - 1)).save(folder / "cat" / "small.png")

    def read(share):
        made = ImageFolderData(
            folder, folder, size=SIZE, batch_size=4, broken_share=share, cache=tmp_path / "cache"
        )
        made.trainer = SimpleNamespace(
            default_root_dir=tmp_path, is_global_zero=True, lightning_module=None, global_rank=0, world_size=1
        )
        made.setup()
        return made, list(made.train_dataloader())

    for _ in range(2):
        made, batches = read(0.2)
        assert len(made.train_set[1]) == (26 if lazy else 23)
        assert len(batches) == (6 if lazy else 5)
        log = (tmp_path / "broken_images.txt").read_text()
        assert "text.png\tcannot identify" in log
        assert "3.png\t" in log
        assert "small.png\t7 x 7 pixels, smaller than data.size = 8" in log
    with pytest.raises(
        UserError, match=r"cannot be used by now, more than data.broken_share = 0.05 allows"
    ) as e:
        read(0.05)
    assert "broken_images.txt" in str(e.value)
    assert "lower data.size" in str(e.value)


def test_names_of_any_kind_and_links_to_nowhere(folder, tmp_path):
    """A link to nowhere or to itself is a broken image; a name need not be UTF-8; one with a dot before it is none."""
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "cat" / "loop.png").symlink_to("loop.png")
    for name, content in ((b"\xff\xfe.png", png(7)), (b"\xff\xfd.png", b"no image")):
        Path(os.fsdecode(os.fsencode(folder / "dog") + b"/" + name)).write_bytes(content)
    (folder / "cat" / "._0.png").write_bytes(b"Mac OS X")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "0.png").write_bytes(png(8))
    made = ImageFolderData(
        folder, size=SIZE, batch_size=4, val_n=4, broken_share=0.2, cache=tmp_path / "cache"
    )
    made.trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, lightning_module=None)
    made.setup()
    assert made.class_names == ["cat", "dog"]
    assert len(made.train_set[1]) + len(made.val_set[1]) == 25
    told = sorted(line.split("\t")[0] for line in (tmp_path / "broken_images.txt").read_text().splitlines())
    assert told == ["cat/gone.png", "cat/loop.png", "dog/\\udcff\\udcfd.png"]


def test_a_broken_image_is_replaced_with_its_own_label(data, folder, monkeypatch):
    monkeypatch.setattr(image_sets, "AT_ONCE", 0)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    files[11].write_bytes(b"")  # the last cat; the next is a dog
    made = data(val=folder, broken_share=0.1)
    images, rows = made.train_set[0].read(torch.tensor([10, 11]))
    assert rows.tolist() == [10, 12]
    assert torch.equal(images[1], made.train_set[0][torch.tensor([12])][0])


def test_torchvision_by_name(data):
    made = data("FakeData", "torchvision:FakeData?size=8&num_classes=10")
    again = data("FakeData", "FakeData")
    assert len(made.train_set[1]) == 512
    assert len(made.val_set[1]) == 8
    assert len(made.class_names) == 10
    assert torch.equal(made.train_set[0], again.train_set[0])
    flat = {tuple(x.flatten().tolist()) for x in made.train_set[0]}
    assert not any(tuple(x.flatten().tolist()) in flat for x in again.val_set[0])
    theirs = datasets.FakeData(4, (3, SIZE, SIZE), 10)
    for k, (image, label) in enumerate(theirs):
        assert made.train_set[1][k] == label
        assert np.array_equal(made.train_set[0][k].permute(1, 2, 0), np.asarray(image))
    with pytest.raises(UserError, match=r"CIFAR10\?download=true"):
        data("CIFAR10", "CIFAR10")  # no download unless asked
    with pytest.raises(UserError, match=r"has no sise: it has size"):
        data("FakeData?sise=8")
    for size in ("0", "-3", "x"):
        with pytest.raises(UserError, match=r"FakeData (holds no images|refuses)"):
            data(f"FakeData?size={size}")
    with pytest.raises(UserError, match=r"VisionDataset refuses"):
        data("VisionDataset")
    if importlib.util.find_spec("lmdb") is None:
        with pytest.raises(UserError, match=r"LSUN needs a package that is not here .*lmdb"):
            data("LSUN?root=/tmp")
    with pytest.raises(UserError, match=r"torchvision.datasets has no 'CIFAR11'"):
        data("torchvision:CIFAR11")


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png(k: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels(k)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("lazy", [False, True])
def test_shards_are_the_folder(data, tmp_path, monkeypatch, lazy):
    """Images and classes in tar shards come out as they went in, shuffled over all shards."""
    monkeypatch.setattr(image_sets, "AT_ONCE", 0 if lazy else 1 << 30)
    for s in range(3):
        rows = range(8 * s, 8 * s + 8)
        write_shard(
            tmp_path / f"part-{s:03d}.tar",
            [x for k in rows for x in ((f"./{k:04d}.jpg.txt", b"-"), (f"./{k:04d}.png", png(k)), (f"./{k:04d}.cls", b"%d" % (k % 3)))],
        )  # fmt: skip
    made = data(f"tar:{tmp_path}/part-{{000..001}}.tar", f"tar:{tmp_path}/part-002.t*r")
    images, labels = made.train_set
    assert labels.tolist() == [k % 3 for k in range(16)]
    for k in range(16):
        assert np.array_equal(images[torch.tensor([k])][0].permute(1, 2, 0), pixels(k))
    first = next(iter(made.train_dataloader()))
    flat = [(pixels(k) / 127.5 - 1).astype(np.float32) for k in range(16)]
    for image, label in zip(first["image"], first["label"]):
        k = next(k for k, f in enumerate(flat) if np.allclose(f, image.permute(1, 2, 0), atol=1e-6))
        assert label == k % 3
    assert open_source(f"tar:{tmp_path}/part-000.tar", False, 8, tmp_path).name(3) == "part-000.tar/0003"
    assert expand_braces("a{,b}-{08..10}") == [x + y for x in ("a-", "ab-") for y in ("08", "09", "10")]
    with pytest.raises(UserError, match=r"no shard at .*part-003.tar"):
        data(f"tar:{tmp_path}/part-{{000..003}}.tar")
    whole = (tmp_path / "part-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2 - 100])
    with pytest.raises(UserError, match=r"no whole, uncompressed tar"):
        data(f"tar:{tmp_path}/cut.tar")


def test_shards_that_cannot_be_are_said(tmp_path):
    write_shard(tmp_path / "big.tar", [("0.png", png(0)), ("0.cls", b"99999999999999999999")])
    with pytest.raises(UserError, match=r"a .cls member is no integer .*beyond 64 bits"):
        open_source(f"tar:{tmp_path}/big.tar", False, SIZE, tmp_path)
    with pytest.raises(UserError, match=r"names no shard: expected \{FIRST..LAST\}"):
        open_source(f"tar:{tmp_path}/part-{{5..1}}.tar", False, SIZE, tmp_path)


def test_shards_held_out_need_not_hold_the_last_class(tmp_path):
    """Three classes in train, two in val, or the other way round: a classifier learns three."""
    for name, classes in (("three", 3), ("two", 2)):
        members = [
            (f"{k}.{e}", c) for k in range(6) for e, c in (("png", png(k)), ("cls", b"%d" % (k % classes)))
        ]
        write_shard(tmp_path / f"{name}.tar", members)
    for train, val in (("three", "two"), ("two", "three")):
        made = ImageFolderData(
            f"tar:{tmp_path}/{train}.tar", f"tar:{tmp_path}/{val}.tar", SIZE, batch_size=2, cache=tmp_path
        )
        classifier = SimpleNamespace(num_classes=3)
        made.trainer = SimpleNamespace(
            default_root_dir=tmp_path, is_global_zero=True, lightning_module=classifier
        )
        made.setup()
        assert made.class_names == ["0", "1", "2"]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_hugging_face_names_its_package(data):
    with pytest.raises(UserError, match=r"pip install datasets"):
        data("hf:owner/name")


def test_hugging_face(data, tmp_path):
    """A table on disk comes out as it went in; splits and columns are found by name or by type."""
    hub = pytest.importorskip("datasets")
    features = hub.Features({"pic": hub.Image(), "kind": hub.ClassLabel(names=["a", "b"])})

    def table(n):
        rows = {"pic": [Image.fromarray(pixels(k)) for k in range(n)], "kind": [k % 2 for k in range(n)]}
        return hub.Dataset.from_dict(rows, features=features)

    hub.DatasetDict(train=table(8), test=table(4)).save_to_disk(tmp_path / "table")
    made = data(f"hf:{tmp_path / 'table'}", f"hf:{tmp_path / 'table'}")
    assert made.class_names == ["a", "b"]
    assert made.train_set[1].tolist() == [k % 2 for k in range(8)]
    assert len(made.val_set[1]) == 4
    assert np.array_equal(made.train_set[0][5].permute(1, 2, 0), pixels(5))
    with pytest.raises(UserError, match=r"has the splits train, test"):
        data(f"hf:{tmp_path / 'table'}?split=dev")
    with pytest.raises(UserError, match=r"no image column 'picture'"):
        data(f"hf:{tmp_path / 'table'}?image=picture")
    with pytest.raises(UserError, match=r"hf:owner/name cannot be read"):
        data("hf:owner/name")  # no download unless asked


def test_odd_rows_of_hugging_face_tables(tmp_path):
    """An EXIF that datasets cannot rewrite costs nothing; null is no label; what is not read is refused."""
    hub = pytest.importorskip("datasets")
    kinds = {"pic": hub.Image(), "kind": hub.ClassLabel(names=["a", "b"]), "word": hub.Value("string")}

    def saved(name, n):
        rows = {
            "pic": [{"bytes": odd_png() if k == 1 else png(k), "path": None} for k in range(n)],
            "kind": [0, None, 1, 0][:n],
            "word": ["x", None, "y", "x"][:n],
        }
        hub.Dataset.from_dict(rows, features=hub.Features(kinds)).save_to_disk(tmp_path / name)
        return f"hf:{tmp_path / name}"

    def opened(text):
        return open_source(text, False, SIZE, tmp_path)

    name = saved("rows", 4)
    source = opened(name)
    assert np.array_equal(decode(source, 1, SIZE, SIZE).permute(1, 2, 0), np.rot90(pixels(0), -1))
    assert np.array_equal(decode(source, 2, SIZE, SIZE).permute(1, 2, 0), pixels(2))
    assert source.labels.tolist() == [0, -1, 1, 0]
    words = opened(f"{name}?label=word")
    assert words.labels.tolist() == [0, -1, 1, 0]
    assert words.class_names == ["x", "y"]
    with pytest.raises(UserError, match=r"has no rows"):
        opened(saved("empty", 0))
    with pytest.raises(UserError, match=r"found one table that was saved alone"):
        opened(f"{name}?split=train[:4]")


def odd_png() -> bytes:
    """Orientation 6 beside a resolution that is text, over which Pillow's exif_transpose stumbles."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 3, b"72")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    stream = io.BytesIO()
    Image.fromarray(pixels(0)).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def test_what_is_no_data_is_said(data, folder, tmp_path):
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images below .*found no file at all"):
        data(tmp_path / "empty")
    (tmp_path / "empty" / "cat" / "a.tif").write_text("")
    with pytest.raises(UserError, match=r"found .tif"):
        data(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no image folder at nowhere"):
        data("nowhere")
    with pytest.raises(UserError, match=r"holds 24 images, fewer than data.batch_size = 25"):
        data(val=folder, batch_size=25)
    with pytest.raises(UserError, match=r"24 training images on 4 devices: fewer than data.batch_size = 8"):
        BatchStream(*data(val=folder).train_set, 8, 0, shuffle=True, ranks=4)
    with pytest.raises(UserError, match=r"crop of data.size = 8 pixels does not fit"):
        data(resize=7)
    with pytest.raises(UserError, match=r"8 x 8 pixels, smaller than data.size = 9"):
        data(size=9)
    with pytest.raises(UserError, match=r"data.val_share = 1.0: expected a share"):
        data(val_share=1.0)


def test_a_classifier_refuses_images_without_a_class(folder, tmp_path, capsys):
    for c in ("cat", "dog"):
        for path in [p for p in (folder / c).rglob("*") if p.is_file()]:
            path.rename(folder / f"{c}-{path.name}")
    args = [
        "fit", f"--out={tmp_path / 'out'}", "--model=tiltlens.modules.encoder_module.EncoderModule",
        '--model.model_args={"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}',
        f"--data.train={folder}", f"--data.cache={tmp_path}", "--data.size=8", "--data.batch_size=4",
        "--trainer.accelerator=cpu", "--trainer.max_steps=1",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        run(lambda: TrainingCLI(args))
    said = capsys.readouterr().err
    assert "has 24 images without a class, and EncoderModule learns classes" in said
    assert "label=COLUMN" in said


def test_an_exif_that_cannot_be_rewritten_is_no_broken_image(tmp_path):
    """Orientation 6 beside a resolution that is text, as some cameras write it: the pixels are whole."""
    orientation, resolution = (
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
        struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),
    )
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + resolution + struct.pack("<I", 0)
    Image.fromarray(pixels(0, 16)).save(tmp_path / "a.png", exif=exif)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    upright = np.asarray(to_rgb(Image.open(tmp_path / "a.png")))
    assert np.array_equal(upright, np.rot90(pixels(0, 16), -1))


def test_a_set_without_a_part_to_hold_out_is_not_validated_in_silence(data, folder):
    """torchvision's ImageFolder has no test part: what is trained on would be what is held out."""
    with pytest.warns(UserWarning, match="nothing is held out"):
        data(f"torchvision:ImageFolder?root={folder}", f"torchvision:ImageFolder?root={folder}")


def test_a_torchvision_set_of_files_is_known_by_its_files(data, folder):
    source = lambda: open_source(f"torchvision:ImageFolder?root={folder}", False, SIZE, folder)  # noqa: E731
    before = source().fingerprint
    assert source().fingerprint == before
    Image.fromarray(pixels(999)).save(folder / "cat" / "0.png")
    assert source().fingerprint != before


def test_a_torchvision_set_of_files_has_the_pixels_of_the_folder(tmp_path):
    """torchvision's own loader puts alpha on black and clips 16 bits; names are those of the files."""
    (tmp_path / "a").mkdir()
    clear = np.dstack([pixels(0), np.zeros((*pixels(0).shape[:2], 1), np.uint8)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "a" / "0.png")
    Image.fromarray(np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)).save(
        tmp_path / "a" / "1.png"
    )
    theirs = open_source(f"torchvision:ImageFolder?root={tmp_path}", False, 16, tmp_path)
    ours = open_source(str(tmp_path), False, 16, tmp_path)
    for i in range(2):
        assert torch.equal(decode(theirs, i, 8, 8), decode(ours, i, 8, 8))
        assert theirs.name(i) == ours.name(i)
        with ours.open(i) as image:  # as model.natural reads it
            pixel = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)
        assert torch.equal(load_image(tmp_path / ours.name(i)), pixel / 127.5 - 1)


@pytest.mark.parametrize("wrong", ["image_size=5", "num_classes=0"])
def test_images_that_cannot_be_made_up_are_refused(wrong, tmp_path):
    with pytest.raises(UserError, match=f"FakeData refuses .*{wrong.partition('=')[0]}"):
        open_source(f"FakeData?{wrong}", False, 8, tmp_path)


def test_a_prior_needs_no_classes_in_common(data, folder, tmp_path):
    Image.fromarray(pixels(1)).save((tmp_path / "other").mkdir() or tmp_path / "other" / "0.png")
    assert len(data(folder, tmp_path / "other").val_set[1]) == 1
