"""Low-rank adapters on a denoising network: W -> W + (alpha / rank) B A (Hu et al., LoRA, 2022), by peft.

B starts at zero, so that an injected network is the network it was, to the bit. A convolution's A has the kernel
of its layer and its B one pixel (as in peft and diffusers). No Lightning in here: a sampler may use it.

    names = inject(network, rank=8)          in place; only lora_parameters(network) are trainable then
    plain = merge(network)                   its own class, its own key names, the product folded in
    save_adapter(network, file); load_adapter(network, file)
"""

import copy
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from tiltlens.errors import UserError

METADATA = "lora_adapter_metadata"  # the header entry that diffusers uses for the same
KINDS = {
    "attention": "the linear layers of every attention",
    "convolution": "every Conv2d",
    "linear": "every Linear outside of attention",
}


def inject(
    network: nn.Module,
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("attention", "convolution"),
) -> list[str]:
    """Puts an adapter on every layer that `targets` name, in place, and freezes all else; the names of those layers.

    alpha: None for that of the rank (a factor of 1). targets: the kinds of `KINDS`, or ends of module names
    ("to_q", "mid_block.resnets.0.conv1"). The start of A is drawn from the global generator. Raises UserError for a
    target that matches nothing (with near names), for a rank below 1 and for a network that has adapters already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1 or not float(rank).is_integer():
        raise UserError(f"lora rank = {rank}: expected a whole number of at least 1")
    if alpha is not None and not alpha > 0:
        raise UserError(f"lora alpha = {alpha}: expected a number above 0, or none for that of the rank")
    if _adapted(network):
        raise UserError("this network has adapters already: merge them before others are injected")
    names = match(network, targets)
    grouped = {n: m.groups for n, m in network.named_modules() if n in set(names) and _groups(m) > 1}
    if any(rank % g for g in grouped.values()):
        raise UserError(f"lora rank = {rank}: expected a multiple of the groups of {', '.join(grouped)}")
    config = LoraConfig(r=int(rank), lora_alpha=alpha or rank, target_modules=names, init_lora_weights=True)
    inject_adapter_in_model(config, network)
    return names


def match(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the Linear and Conv2d layers that targets name, in the network's order."""
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    attention = tuple(f"{n}." for n, m in network.named_modules() if _is_attention(m))
    kinds = {
        "attention": {n for n, m in layers.items() if isinstance(m, nn.Linear) and n.startswith(attention)},
        "convolution": {n for n, m in layers.items() if isinstance(m, nn.Conv2d)},
        "linear": {n for n, m in layers.items() if isinstance(m, nn.Linear) and not n.startswith(attention)},
    }
    if isinstance(targets, str) or not targets:
        raise UserError(
            f"lora targets = {targets!r}: expected a list: {', '.join(KINDS)}, or ends of module names"
        )
    here = [kind for kind in KINDS if kinds[kind]]
    found: set[str] = set()
    for target in targets:
        hits = kinds.get(target) or {n for n in layers if n == target or n.endswith(f".{target}")}
        if not hits:
            raise UserError(
                f"lora target {target!r} matches no linear or convolution layer of {type(network).__name__}: "
                f"{_near(target, layers, here)}Expected {', '.join(here)}, or the end of a module's name"
            )
        found |= hits
    return [n for n in layers if n in found]


def merge(network: nn.Module) -> nn.Module:
    """A copy with its own class and key names, every adapter folded into its layer; `network` is left as it is."""
    merged = copy.deepcopy(network)
    for name in _adapted(merged):
        parent, _, leaf = name.rpartition(".")
        layer = merged.get_submodule(name)
        layer.merge(safe_merge=True)  # raises where the product is not finite
        setattr(merged.get_submodule(parent), leaf, layer.get_base_layer())
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The factors A and B, in the network's order; empty without adapters."""
    return [p for _, p in _factors(network)]


def save_adapter(network: nn.Module, file: Path) -> Path:
    """The factors as safetensors; the header says rank, alpha and layers, so that `load_adapter` needs nothing else."""
    names = _adapted(network)
    if not names:
        raise UserError(f"{type(network).__name__} has no adapters to save: inject them first")
    layer = network.get_submodule(names[0])
    settings = {"r": layer.r["default"], "lora_alpha": layer.lora_alpha["default"], "target_modules": names}
    weights = {n: p.detach().contiguous().cpu() for n, p in _factors(network)}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(weights, file, {"format": "pt", METADATA: json.dumps(settings)})
    return file


def load_adapter(network: nn.Module, file: Path) -> list[str]:
    """Injects and fills what `save_adapter` wrote; the names of the layers. Raises UserError where the file is no such
    file, or of another architecture (with the layers that differ)."""
    try:
        with safetensors.safe_open(file, "pt") as stored:
            settings = json.loads((stored.metadata() or {})[METADATA])
        weights = safetensors.torch.load_file(file)
        rank, alpha, names = (settings[k] for k in ("r", "lora_alpha", "target_modules"))
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: expected an adapter that save_adapter wrote ({error})") from error
    shapes = {
        n: tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    foreign = [n for n in names if n not in shapes]
    for n in set(names) - set(foreign):
        a, b = (weights.get(f"{n}.{k}.weight") for k in ("lora_A", "lora_B"))
        if a is None or b is None or (len(b), *a.shape[1:]) != shapes[n]:
            foreign.append(n)
    if foreign:
        raise UserError(
            f"{file}: an adapter of another architecture than this {type(network).__name__}: {len(foreign)} of its "
            f"{len(names)} layers are missing or of other shapes here ({', '.join(sorted(foreign)[:3])})"
        )
    names = inject(network, rank, alpha, names)
    with torch.no_grad():
        for n, p in _factors(network):
            p.copy_(weights[n])
    return names


def _factors(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name without that of peft's adapter, parameter) of every A and B."""
    return [(n.replace(".default.", "."), p) for n, p in network.named_parameters() if ".lora_" in n]


def _adapted(network: nn.Module) -> list[str]:
    return [n for n, m in network.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")]


def _is_attention(module: nn.Module) -> bool:
    """diffusers' Attention and what is built like it, without its import (seconds)."""
    return all(isinstance(getattr(module, k, None), nn.Linear) for k in ("to_q", "to_k", "to_v"))


def _groups(module: nn.Module) -> int:
    return getattr(module, "groups", 1)


def _near(target: str, layers: dict[str, nn.Module], kinds: Sequence[str]) -> str:
    ends = {".".join(n.split(".")[-k:]) for n in layers for k in (1, 2, 3)} | set(layers) | set(kinds)
    near = difflib.get_close_matches(target, sorted(ends), n=4, cutoff=0.5)
    known = sorted({e for e in ends if "." not in e and not e.isdigit()})
    return f"did you mean {' or '.join(near)}? " if near else f"layers here end in {', '.join(known[:12])}. "
