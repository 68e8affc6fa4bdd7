"""The networks of diffusers as one function F(x_t, time), with their condition fixed once and for all.

The conditional network with its fixed condition *is* the prior: p(x | prompt) or p(x | null class).
Classifier-free guidance is not used: its output is no E[x_0 | x_t] of any law of images.
"""

import torch
from torch import Tensor, nn

from tiltlens.errors import UserError

SUPPORTED = (
    "UNet2DModel (no classes)",
    "UNet2DConditionModel (cross-attention on one text encoder)",
    "DiTTransformer2DModel",
)


class FixedNetwork(nn.Module):
    """(x (B, C, H, W), time (B,)) -> F (B, C, H, W): a diffusers network, its condition a buffer of one row.

    Channels beyond C, the learned variances of some networks, are dropped: the chain has its own variance.
    """

    def __init__(self, network: nn.Module, **condition: Tensor):
        super().__init__()
        # On CPU a tenth to a fifth faster in convolutions than the default layout.
        self.network = network.to(memory_format=torch.channels_last)
        self.channels = network.config.in_channels
        self.names = tuple(condition)
        for name, value in condition.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rows = {
            name: getattr(self, name).expand(len(x), *getattr(self, name).shape[1:]) for name in self.names
        }
        # A chain may hold its state in float64; the weights decide what the network computes in.
        x = x.to(self.network.dtype, memory_format=torch.channels_last)
        return self.network(x, time, return_dict=False, **rows)[0][:, : self.channels]


def fixed_network(pipeline: object, prompt: str) -> FixedNetwork:
    """The denoising network of a diffusers pipeline under `prompt`, a null class, or no condition.

    Raises UserError for a network outside `SUPPORTED`, a prompt that the network cannot read, or channels
    that do not fit.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    kind = type(network).__name__
    condition = {
        "UNet2DModel": _none,
        "UNet2DConditionModel": _text,
        "DiTTransformer2DModel": _null_class,
    }.get(kind)
    if condition is None:
        found = kind if network is not None else f"the components {', '.join(pipeline.components)}"
        raise UserError(f"prior network: expected one of {', '.join(SUPPORTED)}; found {found}")
    if prompt and kind != "UNet2DConditionModel":
        raise UserError(f"prompt = {prompt!r}: {kind} reads no text; leave the prompt empty")
    channels, out = network.config.in_channels, network.config.out_channels or network.config.in_channels
    if out not in (channels, 2 * channels):
        raise UserError(
            "prior network: expected as many output as input channels (twice with learned variances), found "
            f"{channels} in, {out} out: a network for inpainting, upscaling or depth is no prior of images"
        )
    return FixedNetwork(network, **condition(pipeline, network, prompt))


def _none(_: object, network: nn.Module, __: str) -> dict[str, Tensor]:
    config = network.config
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise UserError(
            "prior network: expected a UNet2DModel without classes, found one with "
            f"num_class_embeds = {config.get('num_class_embeds')} and class_embed_type = "
            f"{config.get('class_embed_type')!r}; it has no null class, so no law of all images: "
            "train or take an unconditional one"
        )
    return {}


def _null_class(_: object, network: nn.Module, __: str) -> dict[str, Tensor]:
    # DiT is trained with labels dropped to one more class, the last row of its table.
    return {"class_labels": torch.tensor([network.config.num_embeds_ada_norm])}


@torch.no_grad()
def _text(pipeline: object, network: nn.Module, prompt: str) -> dict[str, Tensor]:
    config = network.config
    extra = [
        k
        for k in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim")
        if config.get(k)
    ]
    if extra:
        raise UserError(
            "prior network: expected a UNet2DConditionModel whose one condition is the prompt (Stable "
            f"Diffusion 1 and 2), found one that also needs {', '.join(extra)} (as SDXL, upscalers)"
        )
    tokenizer, encoder = getattr(pipeline, "tokenizer", None), getattr(pipeline, "text_encoder", None)
    if tokenizer is None or encoder is None:
        raise UserError(
            "prior network: a UNet2DConditionModel needs tokenizer and text_encoder in its folder, found none"
        )
    encoder.eval().float()
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return {"encoder_hidden_states": encoder(tokens.input_ids, attention_mask=mask)[0]}
