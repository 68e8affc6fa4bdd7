"""An encoder: image -> activations of the layers that are asked for.

Preprocessing is part of the encoder and differentiable: images (B, 3, H, W) in [-1, 1] are resized, whole and
with antialiasing, to the model's input size (not at all where they have it), mapped to [0, 1], and normalised
as the model was trained, (x - mean) / std. No centre crop: a prior's image is already the view. Bicubic
overshoot is not clamped: a clamp would cut the gradient.

Layers are read by forward hooks, and the forward ends as soon as the last one asked for has been reached:
what lies behind it costs nothing, in any architecture.
"""

import hashlib
import inspect
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tiltlens.batches import in_equal_batches
from tiltlens.units.near import near
from tiltlens.units.weights import fingerprint

LIBRARIES = ("torch", "torchvision", "timm")  # whose code is known by its version
NEUTRAL = (0.5, 0.5, 0.5)  # mean and std of an encoder that says nothing of its own: the model sees [-1, 1]


class _ReachedError(BaseException):
    """Ends a forward pass. Not an Exception, so that no `except Exception` within a model can swallow it."""


class Encoder(nn.Module):
    """A frozen network with the preprocessing that belongs to it.

    model: nn.Module, put in eval mode, its parameters frozen, half precision widened to float32. input_size:
    side of its input in pixels, or (H, W). mean, std: of its input, on the scale [0, 1]. interpolation:
    bicubic or bilinear (anything else becomes bicubic). class_names: of the rows of its output; class_ids:
    other names of the same rows. num_prefix_tokens, num_registers: of a token sequence [cls, registers,
    patches], read off the model where None. layout: "nchw" or "nhwc", that of the model's feature maps where
    their shape leaves it open.
    """

    def __init__(
        self,
        model: nn.Module,
        input_size: int | tuple[int, int] = 224,
        mean: Sequence[float] = NEUTRAL,
        std: Sequence[float] = NEUTRAL,
        interpolation: str = "bicubic",
        name: str = "encoder",
        class_names: list[str] | None = None,
        class_ids: list[str] | None = None,
        num_prefix_tokens: int | None = None,
        num_registers: int | None = None,
        layout: str | None = None,
    ):
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        self.name = name
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.mean, self.std = tuple(mean), tuple(std)
        self.interpolation = interpolation if interpolation in ("bicubic", "bilinear") else "bicubic"
        self.class_names, self.class_ids = class_names, class_ids
        self.num_registers = _registers(model) if num_registers is None else num_registers
        self.num_prefix_tokens = _prefix_tokens(model) if num_prefix_tokens is None else num_prefix_tokens
        self.layout = layout or ("nhwc" if getattr(model, "output_fmt", None) == "NHWC" else "nchw")
        if not len(self.mean) == len(self.std) == 3 or min(self.std) <= 0:
            raise ValueError(f"{name}: expected three means and three stds above 0, found {mean} and {std}")

    def train(self, mode: bool = True) -> "Encoder":
        """Always in eval mode, whatever module it is a part of: a batch norm must not mix the rows of a
        batch."""
        return super().train(False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the state dict."""
        return fingerprint(self.model.state_dict())

    @cached_property
    def identity(self) -> str:
        """sha256 (hex) of all that an activation depends on: the weights, the preprocessing, the layout of tokens and
        channels, and the source of the model's own classes, where it can be had (not that of torch, torchvision, timm)."""
        told = (self.fingerprint, self.input_size, self.mean, self.std, self.interpolation,
                self.num_prefix_tokens, self.num_registers, self.layout, _own_code(self.model))  # fmt: skip
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the patch tokens at this input size; None where the model does not say its patch
        size."""
        patch = getattr(getattr(self.model, "patch_embed", None), "patch_size", None)
        patch = getattr(self.model, "patch_size", None) if patch is None else patch
        if patch is None:
            return None
        patch = (patch, patch) if isinstance(patch, int) else patch
        return self.input_size[0] // patch[0], self.input_size[1] // patch[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> the model's input (B, 3, *input_size). Differentiable."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{self.name} expects images (B, 3, H, W), found {tuple(images.shape)}")
        x = images if images.dtype == torch.float64 else images.float()
        if x.shape[-2:] != self.input_size:
            x = interpolate(x, self.input_size, mode=self.interpolation, align_corners=False, antialias=True)
        # ((x + 1)/2 - mean)/std, as one multiplication and one addition
        scale = x.new_tensor([0.5 / s for s in self.std]).view(3, 1, 1)
        shift = x.new_tensor([(0.5 - m) / s for m, s in zip(self.mean, self.std)]).view(3, 1, 1)
        return x * scale + shift

    def require_layer(self, layer: str | None) -> None:
        """Raises ValueError, with near names, if the model has no module of this path."""
        if layer is None:
            return
        try:
            found = self.model.get_submodule(layer) if layer else None
        except AttributeError:
            found = None
        if found is None:
            paths = [p for p, _ in self.model.named_modules(remove_duplicate=False)]
            raise ValueError(f"unknown layer {layer!r} of the encoder {self.name}; {near(layer, paths)}")

    def activations(self, images: Tensor, layers: Sequence[str | None]) -> dict[str | None, Tensor]:
        """One forward -> the output of every module in `layers`, None being the model's own output.

        A module that is called several times in a forward is read at its first call; of a tuple, the first
        tensor is read. Raises ValueError for an unknown layer, a module that the forward never calls, and one
        whose output has not a row an image.
        """
        for layer in layers:
            self.require_layer(layer)
        return in_equal_batches(lambda part: self.outputs(part, layers), images)

    def outputs(self, images: Tensor, layers: Sequence[str | None]) -> dict[str | None, Tensor]:
        """`activations` in one batch of whatever size, for training; the layers are known to be there."""
        found: dict[str | None, Tensor] = {}
        inner = {layer for layer in layers if layer is not None}

        def hook(layer: str):
            def read(module: nn.Module, args: tuple, output: object) -> None:
                if layer not in found:
                    # a copy: in-place activations and residual sums that follow would write into it
                    found[layer] = _tensor(output, layer, len(images)).clone()
                if len(found) == len(inner) and None not in layers:
                    raise _ReachedError

            return read

        handles = []
        try:
            for layer in inner:
                handles.append(self.model.get_submodule(layer).register_forward_hook(hook(layer)))
            x = self.preprocess(images)
            reference = next(self.model.parameters(), x)
            output = self.model(x.to(reference.dtype))
        except _ReachedError:
            return found
        finally:
            for handle in handles:
                handle.remove()
        silent = [layer for layer in inner if layer not in found]
        if silent:
            raise ValueError(
                f"{', '.join(silent)}: the forward of {self.name} never calls this module (fused attention, "
                "unused heads are such): address a module around it"
            )
        return {**found, None: _tensor(output, None, len(images))}


def _tensor(output: object, layer: str | None, batch: int) -> Tensor:
    if isinstance(output, list | tuple) and output:
        output = output[0]
    where = "the model" if layer is None else f"the layer {layer}"
    if not isinstance(output, Tensor):
        raise ValueError(
            f"{where} puts out {type(output).__name__}, expected a tensor: address another layer"
        )
    if output.shape[:1] != (batch,):
        raise ValueError(
            f"{where} puts out {tuple(output.shape)} for {batch} images, expected a row an image (windows of "
            "attention are not): address the block around it"
        )
    return output


def _own_code(model: nn.Module) -> list[str]:
    code = []
    for kind in {type(part) for part in model.modules()}:
        if kind.__module__.partition(".")[0] not in LIBRARIES:
            try:
                code.append(inspect.getsource(kind))
            except (OSError, TypeError):  # a class that was typed in, or is no file's
                code.append(kind.__qualname__)
    return sorted(code)


def _registers(model: nn.Module) -> int:
    """timm's ViT says num_reg_tokens; its Eva, which DINOv3 is, only has the tokens themselves (1, R, C)."""
    said = getattr(model, "num_reg_tokens", None)
    tokens = getattr(model, "reg_token", None)
    return said if isinstance(said, int) else tokens.shape[1] if isinstance(tokens, Tensor) else 0


def _prefix_tokens(model: nn.Module) -> int:
    """timm's transformers say it; torchvision's have one class token."""
    said = getattr(model, "num_prefix_tokens", None)
    return said if isinstance(said, int) else int(isinstance(getattr(model, "class_token", None), Tensor))
