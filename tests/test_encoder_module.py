"""The encoder's training: the faster ways through the network change nothing but the time."""

import json

import pytest
import torch
from torch.testing import assert_close

from tiltlens.modules.encoder_module import EncoderModule

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
