"""The encoder's training: the faster ways through the network change nothing but the time."""

import json

import pytest
import torch
from torch.testing import assert_close

from tiltlens.errors import UserError
from tiltlens.modules.encoder_module import EncoderModule
from tiltlens.modules.image_data import ImageFolderData

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}


def module(**options) -> EncoderModule:
    torch.manual_seed(0)
    return EncoderModule(model_args=SMALL, **options).train()


def logits_and_gradients(encoder: EncoderModule) -> list[torch.Tensor]:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    readouts = encoder.readouts(images)
    sum(r.square().sum() for r in readouts).backward()
    return [*readouts, *(p.grad for p in encoder.network.parameters() if p.grad is not None)]


def assert_same(one: EncoderModule, other: EncoderModule) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    assert_close(logits_and_gradients(one), logits_and_gradients(other), rtol=1e-4, atol=1e-5)


def test_plain_attention_is_the_fused_one():
    plain = module(fused_attention=False)
    assert not any(getattr(part, "fused_attn", False) for part in plain.network.modules())
    assert_same(plain, module())


@pytest.mark.slow  # half a minute of compiling
def test_the_compiled_step_is_the_plain_one_under_timm_s_own_names():
    assert_same(module(compile=True), module())


def test_a_network_of_any_size_is_exported_with_the_size_it_was_trained_on(tmp_path):
    """A convolutional network has no img_size; read at its architecture's own 176 pixels it would see other images."""
    encoder = EncoderModule(architecture="resnet10t", num_classes=3)
    encoder.class_names, encoder.size = ["a", "b", "c"], 32
    config = json.loads((encoder.export(tmp_path) / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0: expected"),
        ({"degraded": 1.5}, "degraded = 1.5: expected a share"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        module(**settings)


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda: module(), "img_size is 16; set both"),  # of any size: it would be exported with 16 pixels
        (
            lambda: EncoderModule("vit_tiny_patch16_224", {"depth": 1}),
            "does not take images of data.size = 32",
        ),
        (lambda: EncoderModule("resnet10t", {"in_chans": 1}), "with 3 channels .* in_chans"),
    ],
    ids=["any size", "one size", "grey"],
)
def test_images_that_the_network_does_not_take_are_refused(encoder, words):
    with pytest.raises(UserError, match=words):
        encoder().check_data(ImageFolderData("FakeData", size=32))


def test_images_that_it_takes_are_tried_and_change_nothing():
    encoder = EncoderModule("resnet10t")
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    for size in (32, 48):
        encoder.check_data(ImageFolderData("FakeData", size=size))
    module().check_data(ImageFolderData("FakeData", size=16))
    assert encoder.network.training
    assert_close(encoder.state_dict(), before, rtol=0, atol=0)
