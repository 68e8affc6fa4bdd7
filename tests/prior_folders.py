"""Writers of tiny diffusers folders with random weights: every kind of prior, a second each, no network.

    write_pixel(folder, scheduler)             UNet2DModel on 3 x 8 x 8
    write_text(folder, scheduler, codec)       UNet2DConditionModel, CLIP text encoder; latent 4 x 4 x 4
    write_dit(folder, scheduler, codec)        DiTTransformer2DModel with 10 classes and learned variances
    write_ldm(folder, scheduler)               UNet2DModel on the latent of a VQModel

Each returns the pipeline that it wrote. Schedulers: any of diffusers; `ddim()`, `ddpm()`, `edm()`, `flow()`
are short ones, 20 points.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

BETAS = {"num_train_timesteps": 20, "beta_start": 0.01, "beta_end": 0.35, "clip_sample": False}


def ddpm(prediction: str = "epsilon", **extra) -> DDPMScheduler:
    return DDPMScheduler(**BETAS, prediction_type=prediction, variance_type="fixed_small", **extra)


def ddim(prediction: str = "epsilon", **extra) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, prediction_type=prediction, set_alpha_to_one=True, **extra)


def edm(prediction: str = "epsilon", **extra) -> EDMEulerScheduler:
    return EDMEulerScheduler(num_train_timesteps=20, prediction_type=prediction, **extra)


def flow(shift: float = 1.0, **extra) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=20, shift=shift, **extra)


def unet(channels: int = 3, size: int = 8, **extra) -> UNet2DModel:
    shape = {"sample_size": size, "in_channels": channels, "out_channels": channels}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**{**shape, **blocks, **extra})


def codec(kind: str):
    """kl, tiny or vq, each with a scale of its own: 8 pixels <-> 4 latents a side, 4 channels (vq: 3)."""
    if kind == "tiny":
        blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        return AutoencoderTiny(
            **blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), scaling_factor=1.3
        )
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
    }
    if kind == "vq":
        return VQModel(**blocks, latent_channels=3, num_vq_embeddings=32, scaling_factor=0.5)
    return AutoencoderKL(**blocks, latent_channels=4, scaling_factor=0.7)


def _save(pipeline, folder: Path):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def write_pixel(folder: Path, scheduler=None, **network) -> DDPMPipeline:
    """`network`: arguments of UNet2DModel that differ from the tiny one."""
    torch.manual_seed(0)
    return _save(DDPMPipeline(unet(**network).eval(), scheduler or ddpm()), folder)


def write_ldm(folder: Path, scheduler=None) -> LDMPipeline:
    torch.manual_seed(0)
    return _save(LDMPipeline(codec("vq").eval(), unet(size=4).eval(), scheduler or ddim()), folder)


def write_dit(folder: Path, scheduler=None, kind: str = "kl") -> DiTPipeline:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return _save(DiTPipeline(network.eval(), codec(kind).eval(), scheduler or ddim()), folder)


def write_text(folder: Path, scheduler=None, kind: str = "tiny") -> StableDiffusionPipeline:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    words = CLIPTextConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=14,
        eos_token_id=15,
        pad_token_id=15,
    )
    pipeline = StableDiffusionPipeline(
        codec(kind).eval(),
        CLIPTextModel(words).eval(),
        _tokenizer(folder / "tokenizer"),
        network.eval(),
        scheduler or ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _save(pipeline, folder)


def _tokenizer(folder: Path):
    """Two letters, their ends of words, and the two marks of CLIP."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    marks = {"<|startoftext|>": 14, "<|endoftext|>": 15}
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, **marks}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=8)
