"""Fetching weights: an error says what was looked for, why it failed and what to do, and comes at once."""

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

from huggingface_hub import constants


@contextlib.contextmanager
def fetching(name: str, weights: str | None) -> Iterator[None]:
    """Around the call that loads an encoder's weights.

    Raises ValueError for weights that do not fit, do not exist, or could not be fetched. With no network only
    the hub's local cache is asked: the hub itself would retry, and print that it does, for 50 seconds.
    """
    logger, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = logger.level
    local = not name.startswith("hf-hub:") and (weights or name == "bundled" or name.startswith("local-dir:"))
    try:
        logger.setLevel(logging.ERROR)
        constants.HF_HUB_OFFLINE = offline or bool(local) or not _resolvable(constants.ENDPOINT)
        yield
    except Exception as error:  # timm, the hub, torchvision and torch raise a dozen unrelated types here
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if local:
            source = weights or "the folder"
            raise ValueError(f"the weights in {source} do not fit the encoder {name}: {reason}") from error
        raise ValueError(
            f"the pretrained weights of the encoder {name} could not be fetched and are in no local cache: "
            f"{reason}. Give a local file, weights=PATH (safetensors or torch), or go online"
        ) from error
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _resolvable(endpoint: str) -> bool:
    """Whether the hub's host name resolves; a proxy resolves it for us."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlparse(endpoint).hostname, 443))
    except OSError:
        return False
