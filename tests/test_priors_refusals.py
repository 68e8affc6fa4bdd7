"""Refusals of priors: each says what was expected, what was found, and what to do, in one line."""

import json
import shutil

import pytest
import torch
from prior_folders import flow, unet, write_ldm, write_pixel
from safetensors.torch import load_file, save_file

from tiltlens.errors import UserError
from tiltlens.priors import load_prior
from tiltlens.priors.families import read_family

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pixel(tmp_path):
    """A pixel folder, to be spoilt."""
    write_pixel(tmp_path / "spoilt")
    return tmp_path / "spoilt"


def refusal(path, **options):
    with pytest.raises(UserError) as error:
        load_prior(path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


def test_no_pipeline_folder(pixel):
    (pixel / "model_index.json").unlink()
    assert "expected model_index.json" in refusal(pixel)


def test_no_scheduler(pixel, tmp_path):
    shutil.rmtree(pixel / "scheduler")
    assert "expected scheduler/scheduler_config.json" in refusal(pixel)
    index = json.loads((pixel / "model_index.json").read_text())
    del index["scheduler"]
    (pixel / "model_index.json").write_text(json.dumps(index))
    assert "names no scheduler (found unet)" in refusal(pixel)


def test_missing_weights(pixel):
    (pixel / "unet" / WEIGHTS).unlink()
    assert f"expected unet/{WEIGHTS}" in refusal(pixel)
    assert "found no weights" in refusal(pixel)
    shutil.rmtree(pixel / "unet")
    assert "expected unet/config.json" in refusal(pixel)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_truncated_weights(pixel, kept):
    file = pixel / "unet" / WEIGHTS
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    message = refusal(pixel)
    assert "truncated" in message
    assert "fetch it again" in message
    if kept == -1:
        assert f"promises {len(whole)} bytes, found {len(whole) - 1}" in message


def test_weights_that_lack_a_tensor(pixel):
    weights = load_file(pixel / "unet" / WEIGHTS)
    weights.pop("conv_out.bias")
    save_file(weights, pixel / "unet" / WEIGHTS)
    assert "lacks (conv_out.bias" in refusal(pixel)


@pytest.mark.parametrize(
    "index",
    [{"weight_map": []}, {"weight_map": {}}, {"weight_map": {"conv_out.bias": 1}}, {"weight_map": None}, {}],
)
def test_an_index_of_shards_that_names_no_files(pixel, index):
    (pixel / "unet" / WEIGHTS).unlink()
    (pixel / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    message = refusal(pixel)
    assert f"expected in unet/{WEIGHTS}.index.json a weight_map" in message
    assert f"found {str(index.get('weight_map'))!r}" in message


def test_an_index_of_shards_is_read_and_one_without_metadata_is_refused(pixel):
    state = load_file(pixel / "unet" / WEIGHTS)
    (pixel / "unet" / WEIGHTS).rename(pixel / "unet" / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "part.safetensors")}
    (pixel / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    load_prior(pixel)
    del index["metadata"]
    (pixel / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "an object metadata, {} will do, found 'None'" in refusal(pixel)


def test_pickled_weights(pixel):
    state = load_file(pixel / "unet" / WEIGHTS)
    (pixel / "unet" / WEIGHTS).unlink()
    torch.save(state, pixel / "unet" / "diffusion_pytorch_model.bin")
    message = refusal(pixel)
    assert "no code may execute from a weight file" in message
    assert "convert to safetensors" in message


def test_code_in_the_folder(pixel):
    index = json.loads((pixel / "model_index.json").read_text())
    (pixel / "pipeline.py").write_text("raise SystemExit('ran')")
    (pixel / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    assert "no code may execute" in refusal(pixel)
    (pixel / "unet" / "mine.py").write_text("raise SystemExit('ran')")
    (pixel / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "Mine"]}))
    assert "no code may execute" in refusal(pixel)


@pytest.mark.parametrize(
    ("name", "near"), [("bundeld", "'bundled'"), ("no-such-thing-at-all", "expected 'bundled'")]
)
def test_unknown_name(name, near):
    message = refusal(name)
    assert near in message
    assert "hub name owner/name" in message


def test_near_folder(pixel):
    assert f"Did you mean '{pixel}'" in refusal(pixel.parent / "spoild")


def test_hub_out_of_reach(monkeypatch):
    from diffusers import DiffusionPipeline

    def no_network(*_, **__):
        raise OSError("Name or service not known\nand a long story")

    monkeypatch.setattr(DiffusionPipeline, "download", no_network)
    message = refusal("somebody/some-prior")
    assert "could not be fetched from the hub" in message
    assert "Name or service not known" in message


def test_networks_that_are_no_prior_of_images(tmp_path, pixel):
    write_pixel(tmp_path / "classes", num_class_embeds=5)
    assert "no null class" in refusal(tmp_path / "classes")
    write_pixel(tmp_path / "inpainting", in_channels=5)
    assert "found 5 in, 3 out" in refusal(tmp_path / "inpainting")
    write_pixel(tmp_path / "grey", in_channels=1, out_channels=1)
    assert "3 channels, found 1" in refusal(tmp_path / "grey")
    wide = tmp_path / "wide"
    write_ldm(wide)
    shutil.rmtree(wide / "unet")
    unet(channels=4, size=4).save_pretrained(wide / "unet")
    assert "latents of its autoencoder with 3 channels, found 4" in refusal(wide)
    assert "reads no text" in refusal(pixel, prompt="a horse")
    assert "float32, bfloat16" in refusal(pixel, precision="float16")


def test_transformers_with_flow_are_named(tmp_path):
    """Stable Diffusion 3, Flux and their like: refused, with what is supported."""
    from types import SimpleNamespace

    from tiltlens.priors.networks import fixed_network

    network = type("FluxTransformer2DModel", (), {})()
    with pytest.raises(UserError, match=r"expected one of UNet2DModel.*found FluxTransformer2DModel"):
        fixed_network(SimpleNamespace(unet=None, transformer=network), "")


def test_other_schedulers_are_named():
    from diffusers import CMStochasticIterativeScheduler, DPMSolverMultistepScheduler, ScoreSdeVeScheduler

    for scheduler in (CMStochasticIterativeScheduler(), ScoreSdeVeScheduler()):
        with pytest.raises(UserError, match="expected a table of betas"):
            read_family(scheduler)
    with pytest.raises(UserError, match="found 'flow_prediction'"):
        read_family(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))
    with pytest.raises(UserError, match="invert_sigmas"):
        read_family(flow(invert_sigmas=True))
