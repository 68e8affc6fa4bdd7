"""The two calls into diffusers: a hub name -> its folder in the cache, and a checked folder -> its pipeline.

Both are silent (a library prints no progress) and answer with one `UserError`. diffusers takes seconds to
import, so that it is imported in the calls: an analytic prior need not wait for it.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from tiltlens.errors import UserError


def fetch(name: str) -> Path:
    """owner/name on the hub -> a folder in the cache of the hub, safetensors only. Raises UserError."""
    from diffusers import DiffusionPipeline

    try:
        with _quiet():
            return Path(DiffusionPipeline.download(name, use_safetensors=True))
    except Exception as error:  # some ten kinds: offline, no such name, gated, no safetensors
        cause = error.__cause__ or error
        reason = str(cause).strip().split("\n")[0]
        raise UserError(
            f"prior {name!r}: there is no such folder here, and it could not be fetched from the hub as "
            f"safetensors ({type(cause).__name__}: {reason}). Give a diffusers folder, or connect and retry."
        ) from error


def load_pipeline(path: Path, components: Iterable[str], skipped: Iterable[str]) -> object:
    """The folder's pipeline without the components `skipped`. Raises UserError where it cannot be loaded."""
    from diffusers import DiffusionPipeline

    absent = dict.fromkeys(skipped)
    if "safety_checker" in absent:
        absent["requires_safety_checker"] = False
    try:
        with _quiet():
            pipeline = DiffusionPipeline.from_pretrained(
                path, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"prior {path}: diffusers could not load it ({type(error).__name__}: {reason})"
        ) from error
    for name in components:
        part = getattr(pipeline, name, None)
        # diffusers only warns of weights that the file lacks, and leaves them without numbers.
        missing = [k for k, v in part.named_parameters() if v.is_meta] if isinstance(part, nn.Module) else []
        if missing:
            raise UserError(
                f"prior {path}: {name} has {len(missing)} weights that its file lacks "
                f"({', '.join(missing[:3])}): config.json and weights do not belong together; export it again"
            )
    return pipeline


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars and warnings of the loaders are off inside."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = (diffusers_logging, transformers_logging)
    verbosity = [logger.get_verbosity() for logger in loggers]
    bars = [logger.is_progress_bar_enabled() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
        logger.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of configs of an older diffusers
            yield
    finally:
        for logger, level, bar in zip(loggers, verbosity, bars):
            logger.set_verbosity(level)
            if bar:
                logger.enable_progress_bar()
