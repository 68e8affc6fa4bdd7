"""Laws of writing: what was there before is there until the new is whole, and a full disk is told in one message."""

import errno
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from tiltlens.errors import UserError
from tiltlens.modules import prior_pipeline
from tiltlens.modules.command_line import run
from tiltlens.modules.encoder_module import EncoderModule
from tiltlens.modules.sae_module import SparseAutoencoderModule
from tiltlens.run_folder import RunFolder
from tiltlens.writing import whole_file

VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 1}
UNET = {"sample_size": 8, "block_out_channels": [8], "down_block_types": ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"], "norm_num_groups": 4}  # fmt: skip


@contextmanager
def room_for(size):
    """Files of up to `size` bytes: to those who write, a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def encoder():
    module = EncoderModule(model_args=VIT)
    module.class_names = []
    return module.network, module.export


def autoencoder():
    module = SparseAutoencoderModule("bundled", latents=32, k=4)
    return module.sae, module.export


def prior():
    pipeline = prior_pipeline.begin(None, UNET, None, None)
    return pipeline.unet, lambda out: prior_pipeline.end(pipeline, pipeline.unet, out / "prior")


@pytest.mark.parametrize("make", [encoder, autoencoder, prior])
def test_an_export_that_finds_no_room_leaves_the_one_of_before(make, tmp_path):
    network, export = make()
    folder = export(tmp_path)
    before = files(folder)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    with (
        room_for(5000),
        pytest.raises(UserError, match=r"File too large.*make room; the one of before is whole"),
    ):
        export(tmp_path)
    assert files(tmp_path) == {f"{folder.name}/{name}": data for name, data in before.items()}
    export(tmp_path)
    now = files(folder)
    assert now.keys() == before.keys()
    assert now != before


def test_an_export_that_was_killed_between_its_renames_is_found_again(tmp_path):
    _, export = autoencoder()
    folder = export(tmp_path)
    before = files(folder)
    folder.rename(tmp_path / ".sae.old")
    with room_for(5000), pytest.raises(UserError):
        export(tmp_path)
    assert files(folder) == before


def test_a_full_disk_is_told_without_a_traceback(tmp_path, capsys):
    def main():
        with whole_file(tmp_path / "images.safetensors") as part:
            save_file({"images": torch.zeros(100_000)}, part)

    with room_for(5000), pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert "make room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())  # what was begun does not fill it further
    with pytest.raises(OSError, match="elsewhere"):  # a fault of the program keeps its traceback
        run(lambda: (_ for _ in ()).throw(OSError("elsewhere")))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_a_place_that_takes_no_files_is_told_with_what_to_do(number, tmp_path, capsys):
    """A file system that is mounted read-only cannot be had in a test: its error is."""

    def main():
        raise OSError(number, os.strerror(number), str(tmp_path / "run"))

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(number)}: {tmp_path / 'run'}. ")
    assert "--out" in said


@pytest.mark.parametrize("name", ["x" * 300, "file"])
def test_a_run_folder_that_cannot_be_written_is_told_before_anything_is_sampled(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"the run folder .* cannot be written: .*Choose another --out"):
        RunFolder(tmp_path / name).lock()
    assert (tmp_path / "file").read_text() == "mine"
