"""Sparse autoencoders of an encoder's activations: a dictionary of directions, few of which make up one activation.

    x     = (h - mean) / scale                           the normalisation, stored in the file
    pre_j = <w_j, x - b> + c_j
    z_j   = pre_j if pre_j > 0 and its gate is open, else 0
    x_hat = sum_j z_j d_j + b,  |d_j| = 1                h_hat = mean + scale x_hat

    topk        open for the k largest pre of a row            Gao et al., Scaling and evaluating sparse autoencoders, 2024
    batchtopk   open above one threshold: in training that     Bussmann, Leask, Nanda, BatchTopK Sparse Autoencoders, 2024
                of the B k largest of a batch, at use their running mean, so that no row depends on its neighbours
    jumprelu    open above a threshold theta_j, learned        Rajamanoharan et al., Jumping Ahead, 2024

`mean`, `scale` and the thresholds are parameters of the module (frozen ones), and every way in takes raw h: what is
trained, averaged, saved and read cannot be normalised in two ways. Own code, for the libraries of the field bring
transformer_lens, nnsight, opencv or triton for these hundred lines.
"""

import json
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tiltlens.units.near import near

GATES = ("topk", "batchtopk", "jumprelu")
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WRITTEN = ("kind", "channels", "latents", "k", "encoder", "encoder_sha256", "layer", "tokens")


class SparseAutoencoder(nn.Module):
    """kind: one of GATES. channels: C of the activations h (..., C). latents: M. k: open gates a row, on average (jumprelu:
    aimed at). Starts with unit directions drawn from torch's generator, w = d, biases 0, and no normalisation.
    Raises ValueError for an unknown kind and for a k that is not within 1..latents."""

    def __init__(self, kind: str, channels: int, latents: int, k: int):
        super().__init__()
        if kind not in GATES:
            raise ValueError(f"unknown kind {kind!r} of sparse autoencoder; {near(str(kind), GATES)}")
        if not 1 <= k <= latents:
            raise ValueError(f"k = {k}: expected 1 to latents = {latents}")
        self.kind, self.channels, self.latents, self.k = kind, channels, latents, k
        directions = functional.normalize(torch.randn(latents, channels), dim=1)
        self.mean = _frozen(torch.zeros(channels))
        self.scale = _frozen(torch.ones(()))
        self.encoder = nn.Parameter(directions.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(latents))
        self.decoder = nn.Parameter(directions)
        self.bias = nn.Parameter(torch.zeros(channels))
        if kind == "jumprelu":
            self.log_threshold = nn.Parameter(torch.zeros(latents))
        elif kind == "batchtopk":
            self.log_threshold = _frozen(torch.zeros(()))

    @property
    def threshold(self) -> Tensor:
        """theta: (M,) of jumprelu, () of batchtopk."""
        return self.log_threshold.exp()

    def normalise(self, h: Tensor) -> Tensor:
        """h -> x, (..., C)."""
        return (h - self.mean) / self.scale

    def preactivations(self, h: Tensor) -> Tensor:
        """h (..., C) -> pre (..., M)."""
        return functional.linear(self.normalise(h) - self.bias, self.encoder, self.encoder_bias)

    def preactivation(self, h: Tensor, latent: int) -> Tensor:
        """Column `latent` of `preactivations`, (...). No matrix product: that would round by the size of the batch."""
        return ((self.normalise(h) - self.bias) * self.encoder[latent]).sum(-1) + self.encoder_bias[latent]

    def open(self, pre: Tensor) -> Tensor:
        """pre (..., M) -> which gates are open, boolean; each row by itself."""
        if self.kind != "topk":
            return pre > self.threshold
        best = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre, dtype=torch.bool).scatter(-1, best.indices, best.values > 0)

    def encode(self, h: Tensor) -> Tensor:
        """h (..., C) -> z (..., M), zero or above."""
        pre = self.preactivations(h)
        return pre * self.open(pre)

    def combine(self, z: Tensor) -> Tensor:
        """z (..., M) -> x_hat (..., C)."""
        return z @ functional.normalize(self.decoder, dim=1) + self.bias

    def decode(self, z: Tensor) -> Tensor:
        """z (..., M) -> h_hat (..., C)."""
        return self.mean + self.scale * self.combine(z)

    def save(self, folder: Path, source: dict[str, object]) -> Path:
        """Writes folder/config.json and folder/model.safetensors. source: encoder, weights, encoder_sha256, layer, tokens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().float().cpu().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, folder / WEIGHTS)
        shape = {"kind": self.kind, "channels": self.channels, "latents": self.latents, "k": self.k}
        (folder / CONFIG).write_text(json.dumps({**shape, **source}, indent=2) + "\n")
        return folder


def dictionary_folder(name: str) -> Path:
    """ "bundled" is the one that ships, trained on the bundled encoder; anything else is a folder."""
    return Path(str(files("tiltlens") / "bundled" / "sae")) if name == "bundled" else Path(name)


def read_config(name: str) -> dict[str, object]:
    """What a dictionary is and where it was trained; reads no weights. Raises ValueError, FileNotFoundError."""
    folder = dictionary_folder(name)
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    if missing:
        beside = folder.parent.glob(f"*/{CONFIG}") if folder.parent.is_dir() else []
        known = near(name, ["bundled", *(str(path.parent) for path in beside)])
        raise FileNotFoundError(
            f"no sparse autoencoder at {folder} (from {Path.cwd()}): it has no {' and no '.join(missing)}; expected "
            f"OUT/sae as train.py exports it, or bundled; {known}"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ValueError(f"cannot read {folder / CONFIG}: {error}") from error
    lacking = [key for key in WRITTEN if key not in config] if isinstance(config, dict) else list(WRITTEN)
    if lacking:
        raise ValueError(
            f"{folder / CONFIG} is no sparse autoencoder's: it does not say {', '.join(lacking)}"
        )
    return config


def load_dictionary(name: str) -> SparseAutoencoder:
    """The frozen autoencoder in a folder, float32; the same object while its file is the same. Raises ValueError for
    weights that do not fit the config, FileNotFoundError for a missing folder. Runs no code from the file."""
    config, path = read_config(name), dictionary_folder(name) / WEIGHTS
    shape = tuple(config[key] for key in ("kind", "channels", "latents", "k"))
    return _load(path, path.stat().st_mtime_ns, shape)


@lru_cache(maxsize=4)
def _load(path: Path, changed: int, shape: tuple[str, int, int, int]) -> SparseAutoencoder:
    with torch.random.fork_rng(devices=[]):
        sae = SparseAutoencoder(*shape)
    try:
        sae.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the weights in {path} do not fit its {CONFIG}: {reason}") from error
    return sae.requires_grad_(False)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
