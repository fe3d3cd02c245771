"""Several processes that train one model: what is drawn at random is drawn once, and shards are put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def synchronize(tensors: Sequence[Tensor]) -> None:
    """Give these tensors, in place, the values that they have in the first process; alone in its group, do nothing."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    first = [[tensor.cpu() for tensor in tensors]]
    dist.broadcast_object_list(first)  # a few megabytes once a task, and it asks nothing of the tensors' device
    for tensor, value in zip(tensors, first[0]):
        tensor.copy_(value)


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor (FSDP2) put together, which all processes must ask for; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
