"""The workers that train one model together, each with its share of every batch.

One worker is the rule; then nothing is communicated. Several are a process group of
torch.distributed, which whoever starts the workers has made (Ray Train does).
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rank of this worker among the workers that train one trial together (DDP).

    >>> Ranks(rank=1, world=2).part(5)
    slice(3, 5, None)
    """

    rank: int = 0
    """From 0; rank 0 leases, writes and reports."""
    world: int = 1
    """How many train one model."""

    @classmethod
    def of_process_group(cls) -> Ranks:
        """Those of torch.distributed's default group."""
        return cls(rank=dist.get_rank(), world=dist.get_world_size())

    @property
    def alone(self) -> bool:
        """Does one worker train the model?"""
        return self.world == 1

    def lost_a_peer(self, error: BaseException) -> bool:
        """Is `error` of this worker only that another one did not answer?"""
        if self.alone:
            return False
        place = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
        # DistributedDataParallel exchanges gradients in C++, where only the message tells.
        said = str(error).lower()
        return "/torch/distributed/" in place or any(
            word in said for word in ("gloo", "nccl", "connection closed by peer")
        )

    def part(self, n: int) -> slice:
        """This worker's share of n rows; shares differ by one row at most, larger ones first."""
        each, more = divmod(n, self.world)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over the workers."""
        if self.alone:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def all_gather(self, values: Tensor, n: int) -> Tensor:
        """All n values on every worker, from each worker's share of them, [n of its part, ...]."""
        if self.alone:
            return values
        # A sum with zeros is exact, and keeps booleans and integers what they are.
        whole = torch.zeros((n, *values.shape[1:]), dtype=values.dtype, device=values.device)
        whole = whole.to(torch.int32) if values.dtype == torch.bool else whole
        whole[self.part(n)] = values.to(whole.dtype)
        dist.all_reduce(whole)
        return whole.to(values.dtype)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


ALONE = Ranks()
