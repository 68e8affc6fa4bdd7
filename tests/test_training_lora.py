"""Laws of low-rank adapters: nothing changes at the start, merging changes nothing, files return what was trained."""

import pytest
import torch
from prior_folders import unet

from tiltlens.priors.lora import (
    inject,
    load_adapter,
    lora_parameters,
    match,
    merge,
    save_adapter,
)


def perturbed(rank=2, **kwargs):
    """A network with trained-looking adapters, and the plain one it came from."""
    torch.manual_seed(0)
    plain = unet().eval()
    network = unet().eval()
    network.load_state_dict(plain.state_dict())
    names = inject(network, rank, **kwargs)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 15])
    torch.testing.assert_close(network(x, t).sample, plain(x, t).sample, rtol=0, atol=0)
    with torch.no_grad():
        for p in lora_parameters(network):
            p.add_(0.1 * torch.randn_like(p))
    return plain, network, names, (x, t)


@torch.no_grad()
def test_merged_is_the_adapted_network():
    plain, network, names, x = perturbed(alpha=3.0)
    assert any(n.endswith("to_q") for n in names)
    assert "conv_in" in names
    adapted, merged = network(*x).sample, merge(network)
    assert (adapted - plain(*x).sample).abs().max() > 0.01
    torch.testing.assert_close(merged(*x).sample, adapted, atol=1e-5, rtol=1e-4)
    assert type(merged) is type(plain)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert "peft_config" not in vars(merged)
    torch.testing.assert_close(network(*x).sample, adapted)  # the adapted one is left as it is


def test_only_the_factors_learn():
    _, network, _, x = perturbed()
    network(*x).sample.square().mean().backward()
    factors = {id(p) for p in lora_parameters(network)}
    assert factors
    for p in network.parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in factors)


def test_saved_adapters_come_back(tmp_path):
    plain, network, names, x = perturbed()
    file = save_adapter(network, tmp_path / "deep" / "lora.safetensors")
    assert load_adapter(plain, file) == names
    torch.testing.assert_close(plain(*x).sample, network(*x).sample)
    with pytest.raises(ValueError, match="another architecture"):
        load_adapter(unet(block_out_channels=(8, 8)), file)
    with pytest.raises(ValueError, match="has adapters already"):
        inject(network)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": ["to_qq"]}, "'to_qq' matches no .* did you mean to_q"),
        ({"targets": ["convolutions"]}, "did you mean convolution"),
        ({"targets": []}, "expected a list"),
        ({"rank": 0}, "expected a whole number of at least 1"),
        ({"alpha": 0.0}, "expected a number above 0"),
    ],
)
def test_settings_that_mean_nothing(change, words):
    with pytest.raises(ValueError, match=words):
        inject(unet(), **change)


def test_a_kind_that_is_not_there_is_not_advised():
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    with pytest.raises(ValueError, match="'attention' matches no") as said:
        inject(unet(**plain, add_attention=False))
    assert "mean attention" not in str(said.value)
    assert "Expected convolution, linear, or" in str(said.value)


def test_targets_are_kinds_or_ends_of_names():
    network = unet()
    kinds = {k: set(match(network, [k])) for k in ("attention", "convolution", "linear")}
    assert not kinds["attention"] & kinds["linear"]
    assert "time_embedding.linear_1" in kinds["linear"]
    assert match(network, ["mid_block.resnets.0.conv1"]) == ["mid_block.resnets.0.conv1"]
    assert set(match(network, ["to_q", "to_k", "to_v", "to_out.0"])) == kinds["attention"]
