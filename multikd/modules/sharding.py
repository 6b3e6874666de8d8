"""FSDP2: parameters, gradients and optimiser state sharded over the ranks (large students)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard_modules(modules: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard each module over the ``data_parallel`` dimension of Lightning's mesh, in place.

    A module's repeated blocks are units of their own, gathered one at a time; what lies outside
    them is one more unit. Everything is gathered again in the backward pass, so that outside of a
    forward or backward pass a parameter is always its shard. Modules without parameters, and those
    that are sharded already, are left alone.

    Raises:
        ValueError: the mesh asks for tensor parallelism, which students do not have.
    """
    names = mesh.mesh_dim_names or ()
    if "tensor_parallel" in names and mesh["tensor_parallel"].size() > 1:
        raise ValueError(
            "students are sharded by data parallelism only, received tensor_parallel_size="
            f"{mesh['tensor_parallel'].size()}: set trainer.strategy.init_args."
            "tensor_parallel_size=1 and data_parallel_size to the number of processes"
        )
    ranks = mesh["data_parallel"] if "data_parallel" in names else mesh
    for module in modules:
        if isinstance(module, FSDPModule) or next(module.parameters(), None) is None:
            continue
        for block in repeated_blocks(module):
            fully_shard(block, mesh=ranks, reshard_after_forward=True)
        fully_shard(module, mesh=ranks, reshard_after_forward=True)


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that stand in a sequence or dictionary of their like.

    Blocks of a ViT, stages of a Swin or ConvNeXt, residual blocks of a CNN, projectors of a ladder.
    """
    for child in module.children():
        if not isinstance(child, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            yield from repeated_blocks(child)
            continue
        members = list(child.children())
        alike = len({type(member) for member in members}) == 1
        containers = any(
            isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) for m in members
        )
        if alike and not containers:
            yield from (m for m in members if any(True for _ in m.children()))
        else:
            yield from repeated_blocks(child)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor; others unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
