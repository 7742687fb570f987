"""What the processes of a run say to each other. In a run of one process all of it costs nothing.

Every rank computes the same plan; only sweeps over tokens are divided. So a few things are
exchanged: what a rank has found of its own part, which all need, and the sums of gradients. Each
function is called by all ranks, in the same order.

The group is torch.distributed's default one: `launch` joins it, or whoever started the process has.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from amenable.errors import NumericsError
from amenable.ranks.sharding import is_sharded

T = TypeVar("T")

BUCKET_BYTES = 32 * 2**20
"""Of gradients that are summed in one go."""

traffic: Counter[str] = Counter()
"""Bytes that this rank has handed over so far, by what they were: `gradients`, `results`,
`objects`; FSDP2's own exchange of parameters is not among them."""


def size() -> int:
    """How many processes there are; 1 where no group has been joined."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def turns(
    items: Sequence[T], owners: Sequence[int] | None = None, *, in_step: bool = False
) -> Iterator[tuple[T, bool]]:
    """This rank's items, each with whether it counts.

    Args:
        items: the same list on every rank.
        owners: whose each is; default: they are dealt out one by one.
        in_step: every rank must make as many passes (a sharded model): where a rank has fewer items
            than another, the last of the list comes again, and does not count.
    """
    ranks = size()
    owners = [n % ranks for n in range(len(items))] if owners is None else owners
    own = [item for item, owner in zip(items, owners, strict=True) if owner == rank()]
    for item in own:
        yield item, True
    if in_step and items:
        for _ in range(max(Counter(owners).values()) - len(own)):
            yield items[-1], False


def own_slice(count: int) -> slice:
    """Of so many things in a row: this rank's, as many as any other's but for one."""
    return slice(*(count * n // size() for n in (rank(), rank() + 1)))


def add_up(tensors: Sequence[Tensor], kind: str = "results") -> None:
    """Replace each tensor by its sum over the ranks, in place; same shapes everywhere.

    Where all ranks but one hold zeros this hands that one's numbers to all, to the last bit.
    """
    if size() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        summed = flat.to(_device())
        dist.all_reduce(summed)
        traffic[kind] += flat.numel() * flat.element_size()
        parts = summed.to(flat.device).split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind, so many at a time that copies stay small."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for own in kinds.values():
        bucket: list[Tensor] = []
        held = 0
        for tensor in own:
            bytes_ = tensor.numel() * tensor.element_size()
            if bucket and held + bytes_ > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += bytes_
        yield bucket


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients.

    A parameter that no rank has a gradient of is left without; one that some have counts as 0 on
    the others. Sharded parameters have been summed by their shards' own hooks.
    """
    if size() == 1:
        return
    whole = [p for p in parameters if not is_sharded(p)]
    if not whole:
        return
    known = torch.tensor([p.grad is not None for p in whole], dtype=torch.int32)
    add_up([known], "gradients")
    with torch.no_grad():
        grads = []
        for parameter, count in zip(whole, known.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        add_up(grads, "gradients")


def gathered(value: T) -> list[T]:
    """Every rank's value, by rank; anything that can be pickled, meant to be small."""
    if size() == 1:
        return [value]
    traffic["objects"] += len(pickle.dumps(value))
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def summed(*figures: float) -> tuple[float, ...]:
    """The sum of each figure over the ranks, added in the order of the ranks."""
    if size() == 1:
        return figures
    return tuple(sum(own) for own in zip(*gathered(figures), strict=True))


def joined(rows: Tensor, dim: int = 0) -> Tensor:
    """Every rank's rows, one behind the other; other dimensions are the same everywhere."""
    if size() == 1:
        return rows
    return torch.cat([part.to(rows.device) for part in gathered(rows.cpu())], dim)


def told(value: T) -> T:
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    if rank() == 0:
        traffic["objects"] += len(pickle.dumps(value))
    dist.broadcast_object_list(box, src=0)
    return box[0]


def led(work: Callable[[], T]) -> T:
    """What rank 0 gets from a piece of work that it alone does."""
    return told(work() if rank() == 0 else cast(T, None))


def check_replicas(parameters: Sequence[nn.Parameter], what: str) -> None:
    """Every rank holds the same bits.

    Args:
        parameters: whole ones; of sharded ones there is but one copy.
        what: they are of, for the message.

    Raises:
        NumericsError: a rank's differ from rank 0's; names it.
    """
    whole = [p for p in parameters if not is_sharded(p)]
    if size() == 1 or not whole:
        return
    digest = hashlib.sha256()
    for parameter in whole:
        bits = parameter.detach().cpu().contiguous().view(torch.uint8)
        digest.update(bits.numpy().data)
    hashes = gathered(digest.hexdigest())
    apart = [str(n) for n, own in enumerate(hashes) if own != hashes[0]]
    if apart:
        raise NumericsError(
            f"{what}: the weights of rank {', '.join(apart)} are no longer those of rank 0. All "
            "ranks must compute the same bits: use the same kind of processor or GPU and the same "
            "versions on every host"
        )


def _device() -> torch.device:
    """Where tensors must be to be exchanged."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
