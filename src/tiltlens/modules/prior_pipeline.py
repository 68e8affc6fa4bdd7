"""Where a prior in training begins and ends: a pipeline of diffusers in memory, and a folder of it on disk."""

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, LDMPipeline, SchedulerMixin, UNet2DModel
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from tiltlens.errors import UserError
from tiltlens.priors.folder import check_folder, find_folder
from tiltlens.priors.latent import SUPPORTED as AUTOENCODERS
from tiltlens.priors.pipeline import load_pipeline
from tiltlens.writing import whole_folder

Config = dict[str, Any]
# what torch and diffusers raise for numbers that do not fit together, and for a package that is not installed
CANNOT_RUN = (
    TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, LookupError, AssertionError, ImportError
)  # fmt: skip
CLIPS = ("DDPMScheduler", "DDIMScheduler")  # clip_sample is True by default


def begin(
    init_from: str | None, network: Config | None, scheduler: Config | None, autoencoder: str | Config | None
) -> Any:
    """A diffusers pipeline: that of a prior by name (as in `load_prior`), or a new one.

    network: arguments of UNet2DModel. scheduler: those of DDPMScheduler, or of the class that its key `_class_name`
    names. autoencoder: None for pixels; a prior whose autoencoder is taken, or the config of a new one with its
    `_class_name`. Raises UserError where both ways of starting are given, or a config does not build.
    """
    if init_from is not None:
        if network or scheduler or autoencoder:
            raise UserError(
                "model.init_from brings its own network, scheduler and autoencoder: take them out of the config, or "
                "add --model.network null --model.scheduler null --model.autoencoder null"
            )
        return _load(str(init_from))
    unet = _build(network, "UNet2DModel", (UNet2DModel,), "model.network")
    if autoencoder is not None and (scheduler or {}).get("_class_name", "DDPMScheduler") in CLIPS:
        scheduler = {"clip_sample": False, **(scheduler or {})}  # latents are not confined to [-1, 1]
    noise = _build(scheduler, "DDPMScheduler", (SchedulerMixin,), "model.scheduler")
    if (levels := noise.config.get("num_train_timesteps", 1)) < 1:
        raise UserError(f"model.scheduler: expected num_train_timesteps of at least 1, found {levels}")
    kind = DDPMPipeline if autoencoder is None else LDMPipeline
    if not samples_rightly(kind, noise):
        rank_zero_warn(
            f"model.scheduler: diffusers' own {kind.__name__}, in which this prior will be exported, does not sample a "
            f"{type(noise).__name__} rightly; sample.py does. Both sample a DDPMScheduler and a DDIMScheduler"
        )
    if autoencoder is None:
        return DDPMPipeline(unet, noise)
    if isinstance(autoencoder, dict):
        classes = tuple(getattr(diffusers, name) for name in AUTOENCODERS)
        return LDMPipeline(_build(autoencoder, "AutoencoderKL", classes, "model.autoencoder"), unet, noise)
    other = _load(str(autoencoder))
    codec = codec_of(other)
    if codec is None:
        raise UserError(f"model.autoencoder {autoencoder}: expected a latent prior, found one of pixels")
    return LDMPipeline(codec, unet, noise)


def samples_rightly(kind: type, scheduler: Any) -> bool:
    """Whether diffusers' DDPMPipeline or LDMPipeline calls this scheduler as it must be called.

    DDPMPipeline gives `generator` to its step, starts at a standard deviation of 1 and scales no input; LDMPipeline
    reads init_noise_sigma and scale_model_input, which flow matching has not.
    """
    if kind is LDMPipeline:
        return hasattr(scheduler, "init_noise_sigma") and hasattr(scheduler, "scale_model_input")
    if "generator" not in inspect.signature(scheduler.step).parameters:
        return False
    if float(getattr(scheduler, "init_noise_sigma", 1)) != 1:
        return False
    if not hasattr(scheduler, "scale_model_input"):
        return True
    trial, x = copy.deepcopy(scheduler), torch.ones(1, 1, 1, 1)  # scaling begins a walk through the steps
    return torch.equal(trial.scale_model_input(x, trial.timesteps[0]), x)


def codec_of(pipeline: Any) -> nn.Module | None:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


def end(pipeline: Any, network: nn.Module, folder: Path) -> Path:
    """Writes the pipeline with `network` in the place of its own as a diffusers folder, whole or not at all. Raises UserError where it cannot be written."""
    name = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    before = getattr(pipeline, name)
    setattr(pipeline, name, network)
    try:
        # an export should not tell where on this machine it began
        for component in (pipeline, *pipeline.components.values()):
            if getattr(component, "config", None) is not None and hasattr(component, "register_to_config"):
                component.register_to_config(_name_or_path=None)
        with whole_folder(folder) as part:
            pipeline.save_pretrained(part)
    finally:
        setattr(pipeline, name, before)
    return folder


def _load(name: str) -> Any:
    folder = check_folder(find_folder(name))
    return load_pipeline(folder.path, folder.components, folder.skipped)


def _build(config: Config | None, default: str, bases: tuple[type, ...], key: str) -> Any:
    config = dict(config or {})
    name = config.pop("_class_name", default)
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, bases)):
        kinds = " or ".join(b.__name__ for b in bases)
        raise UserError(f"{key}: expected _class_name to be a {kinds} of diffusers, found {name!r}")
    try:
        return cls(**config)
    except CANNOT_RUN as error:
        raise UserError(
            f"{key}: diffusers cannot build {cls.__name__} from it: {type(error).__name__}: {error}"
        ) from error
