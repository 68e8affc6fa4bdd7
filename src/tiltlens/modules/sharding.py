"""Weights in shards: FSDP2 by Lightning's ModelParallelStrategy, for priors whose training fills a device.

Each block of the network is sharded by `torch.distributed.fsdp.fully_shard`, so that one block at a time lies whole on
a device; gradients, the optimizer and the average of the weights stay shards. Everything that needs whole weights
(checkpoints in one file, the export) gathers them, on all ranks together.
"""

from collections.abc import Callable

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from tiltlens.errors import UserError

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
ADVICE = (
    "as --config configs/train/sharded.yaml has it: FSDP2 by ModelParallelStrategy, checkpoints in one file"
)


def is_sharded(trainer: Trainer) -> bool:
    """Raises UserError for strategies that shard in a way that is not supported here, and says which is."""
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise UserError(f"trainer.strategy = fsdp: expected another way to weights in shards, {ADVICE}")
    if not isinstance(strategy, ModelParallelStrategy):
        return False
    if strategy._save_distributed_checkpoint:
        raise UserError(f"save_distributed_checkpoint = true: expected false, {ADVICE}")
    return True


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """In place: every block with weights of its own below the network's lists of blocks, then what is left."""
    if isinstance(network, FSDPModule):
        return
    network.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    for child in network.children():
        blocks = child if isinstance(child, nn.ModuleList) else [child]
        for block in blocks:
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def gathered(network: nn.Module) -> nn.Module | None:
    """A whole copy of a network of diffusers on rank 0, None elsewhere. Called on all ranks."""
    state = get_model_state_dict(network, options=WHOLE)
    if not state:
        return None
    plain = next(c for c in type(network).__mro__ if not issubclass(c, FSDPModule))
    copy = plain.from_config(network.config)
    copy.load_state_dict(state)
    return copy


def whole(tensor: Tensor) -> Tensor:
    """Called on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class ShardedAverage:
    """As `torch.optim.swa_utils.AveragedModel`, of the shards that lie on this rank: an average is elementwise.

    update(averaged, current, n): the rule, in place, on lists of tensors.
    """

    def __init__(self, model: LightningModule, update: Callable[[list[Tensor], list[Tensor], int], None]):
        self.names = [n for n, _ in model.named_parameters()]
        self.values = [p.detach().clone() for p in model.parameters()]
        self.update, self.n = update, 0
        self.module = self  # where Lightning looks for parameters and buffers

    def parameters(self) -> list[Tensor]:
        return self.values

    def buffers(self) -> list[Tensor]:
        """None: they are not averaged."""
        return []

    @torch.no_grad()
    def update_parameters(self, model: LightningModule) -> None:
        mine, current = ([_local(x) for x in xs] for xs in (self.values, model.parameters()))
        if self.n:
            self.update(mine, current, self.n)
        else:
            for average, value in zip(mine, current):
                average.copy_(value)
        self.n += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Whole; called on all ranks."""
        found = {f"module.{n}": whole(v).cpu() for n, v in zip(self.names, self.values)}
        return found | {"n_averaged": torch.tensor(self.n)}

    @torch.no_grad()
    def restore(self, model: LightningModule, n: int, current: dict[str, Tensor]) -> None:
        """From a model that holds the average; it holds the weights to go on from afterwards, `current` (whole)."""
        for average, value in zip(self.values, model.parameters()):
            average.copy_(value)
        self.n = n
        set_model_state_dict(model, current, options=WHOLE)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
