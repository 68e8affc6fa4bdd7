"""Latents of images, encoded once and kept on disk by the content of the image.

    FOLDER/latents-AUTOENCODER/part-KEYS.safetensors     keys (N, 16) uint8, latents (N, C, h, w) float32

A latent's key is the blake2b of its image's numbers, and the folder's name that of the autoencoder's weights: another
crop, a mirrored image or another autoencoder is another entry, whatever the data come from. A part is written whole
and renamed, so that runs and ranks may share a folder. Random crops are new images each time: take centre crops.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tiltlens.batches import in_equal_batches
from tiltlens.priors.latent import Codec
from tiltlens.writing import whole_file

KEY_BYTES = 16
PART_BYTES = 64 << 20


class LatentCache:
    """images (B, 3, H, W) in [-1, 1] -> latents (B, C, H / factor, W / factor), on the images' device.

    folder: where parts lie; by default $XDG_CACHE_HOME/tiltlens. encoded: how many images were encoded by this object.
    """

    def __init__(self, codec: Codec, folder: Path | None = None):
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tiltlens"
        self.codec = codec.eval().requires_grad_(False).float()
        self.folder = Path(folder or base) / f"latents-{fingerprint(codec)}"
        self.encoded = 0
        self._stored: dict[bytes, tuple[Path, int]] = {}
        self._fresh: dict[bytes, Tensor] = {}
        self._seen: set[Path] = set()
        self.refresh()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        rows = images.detach().float().cpu().contiguous()
        keys = [hashlib.blake2b(row.numpy().tobytes(), digest_size=KEY_BYTES).digest() for row in rows]
        missing = {k: i for i, k in enumerate(keys) if k not in self._stored and k not in self._fresh}
        if missing:
            self.codec.to(images.device)
            with torch.autocast(
                images.device.type, enabled=False
            ):  # what is kept should not depend on the run
                latents = in_equal_batches(self.codec.encode, images[list(missing.values())].float()).cpu()
            self._fresh |= dict(zip(missing, latents.unbind()))
            self.encoded += len(missing)
        out = torch.stack([self._fresh[k] if k in self._fresh else self._read(k) for k in keys])
        if len(self._fresh) * out[0].nbytes > PART_BYTES:
            self.flush()
        return out.to(images.device)

    def flush(self) -> None:
        """Writes what is not on disk yet, and takes up what others have written."""
        if self._fresh:
            keys = sorted(self._fresh)
            name = hashlib.blake2b(b"".join(keys), digest_size=KEY_BYTES).hexdigest()
            numbers = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
            with whole_file(self.folder / f"part-{name}.safetensors") as part:
                safetensors.torch.save_file(
                    {"keys": numbers, "latents": torch.stack([self._fresh[k] for k in keys])}, part
                )
        self.refresh()
        self._fresh = {}

    def refresh(self) -> None:
        """Takes up parts that are new in the folder."""
        for file in sorted(set(self.folder.glob("part-*.safetensors")) - self._seen):
            with safetensors.safe_open(file, "pt") as part:
                keys = part.get_tensor("keys").numpy()
            self._stored |= {row.tobytes(): (file, i) for i, row in enumerate(keys)}
            self._seen.add(file)

    def _read(self, key: bytes) -> Tensor:
        file, row = self._stored[key]
        with safetensors.safe_open(file, "pt") as part:  # mapped, not read: memory stays flat
            return part.get_slice("latents")[row]


def fingerprint(codec: Codec) -> str:
    """16 hex digits of the autoencoder's weights, config, scale and shift."""
    config = sorted((k, v) for k, v in dict(codec.autoencoder.config).items() if not k.startswith("_"))
    digest = hashlib.sha256(
        f"{codec.scale} {codec.shift} {type(codec.autoencoder).__name__} {config}".encode()
    )
    for part in _bytes(codec):
        digest.update(part)
    return digest.hexdigest()[:16]


def _bytes(codec: Codec) -> Iterable[bytes]:
    for name, value in sorted(codec.autoencoder.state_dict().items()):
        yield name.encode()
        yield value.detach().float().cpu().contiguous().numpy().tobytes()
