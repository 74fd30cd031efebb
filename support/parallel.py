"""Several processes that train one model: who they are, and what they tell each other.

`torchrun --nproc-per-node 2 script.py` starts them; without it there is one, and nothing to tell.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def ranks() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the processes that torchrun started, if it did; yield `ranks()`."""
    started = "RANK" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks()
    finally:
        if started:
            dist.destroy_process_group()


def all_sum(device: torch.device, *values: float) -> list[float]:
    """Return each value summed over the processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def all_of(value) -> list:
    """Return the values of all processes."""
    values = [value] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


# ---- one model in several processes -------------------------------------------------------------


def data_parallel(model: nn.Module) -> nn.Module:
    """Return the model so that each backward pass averages the gradients over the processes.

    Li et al., PyTorch Distributed: Experiences on Accelerating Data Parallel Training, 2020.
    """
    together = ranks()[1] > 1 and not is_sharded(model)  # a sharded model does it by itself
    return DistributedDataParallel(model) if together else model


def shard(model: nn.Module) -> nn.Module:
    """Leave each process a part of every parameter, and so of its gradient and its averages.

    The model is changed, and returned; make the optimizer afterwards. Each of `model.blocks`
    gathers its parameters when it computes, and drops them again, so from now on all processes must
    call the model equally often. Alone, a process keeps all. Rajbhandari et al., ZeRO, 2020,
    section 5.3; Zhao et al., PyTorch FSDP, 2023, section 3.
    """
    if ranks()[1] == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # here, because it takes a second to load

    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)  # all begin with the first one's weights, as with DDP
    mesh = init_device_mesh(next(model.parameters()).device.type, (ranks()[1],))
    for module in (*getattr(model, "blocks", ()), model):
        # Resharded after every pass: else an evaluation would leave whole weights behind.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    model.no_sync = nullcontext  # kept until the last micro batch, gradients would have to be whole
    return model


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard` has left this process only parts of a model."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the parts of all processes, which must all call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return of a whole tensor what `like`, of the same shape, has here; all must call this."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of a model's parameters, gradients and averages that this process holds."""

    def size(tensors) -> int:
        here = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
        return sum(tensor.nbytes for tensor in here)

    parameters = list(model.parameters())
    averages = [
        tensor
        for parameter in parameters
        for name, tensor in optimizer.state[parameter].items()
        if name != "step"
    ]
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = {"parameters": parameters, "gradients": gradients, "averages": averages}
    return {name: size(tensors) for name, tensors in parts.items()}
