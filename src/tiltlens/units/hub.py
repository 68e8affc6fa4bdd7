"""Fetching weights: an error says what was looked for, why it failed and what to do, and comes at once."""

import contextlib
import logging
import os
import pickle
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlparse

import torch
from huggingface_hub import constants


@contextlib.contextmanager
def fetching(name: str, weights: str | None) -> Iterator[None]:
    """Around the call that loads an encoder's weights.

    Raises ValueError for weights that do not fit, do not exist, could not be fetched, or are a pickle that would
    run code. With no network only the hub's local cache is asked: the hub itself would retry, and print that it
    does, for 50 seconds.
    """
    logger, offline = logging.getLogger("huggingface_hub"), constants.HF_HUB_OFFLINE
    level = logger.level
    local = not name.startswith("hf-hub:") and (weights or name == "bundled" or name.startswith("local-dir:"))
    try:
        logger.setLevel(logging.ERROR)
        constants.HF_HUB_OFFLINE = offline or bool(local) or not _resolvable(constants.ENDPOINT)
        with _tensors_alone():
            yield
    except Exception as error:  # timm, the hub, torchvision and torch raise a dozen unrelated types here
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if local:
            source = weights or "the folder"
            raise ValueError(f"the weights in {source} do not fit the encoder {name}: {reason}") from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"the stored weights of the encoder {name} are damaged, or a pickle that asks to run code, "
                f"which is never done: remove their file from the cache ({torch.hub.get_dir()}), or give "
                f"weights=PATH. {reason[:150]}"
            ) from error
        raise ValueError(
            f"the pretrained weights of the encoder {name} could not be fetched and are in no local cache: "
            f"{reason}. Give a local file, weights=PATH (safetensors or torch), or go online"
        ) from error
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """Every torch.load reads tensors alone, by torch's own switch: torchvision asks for whole pickles."""
    switches = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in switches}
    os.environ.update(switches)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _resolvable(endpoint: str) -> bool:
    """Whether the hub's host name resolves; a proxy resolves it for us."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlparse(endpoint).hostname, 443))
    except OSError:
        return False
