"""Ranks, what they agree on, and their collectives: on plain tensors, without autograd.

Three collectives of equal sizes, which gloo and NCCL both have: all-reduce, all-gather and
all-to-all. Losses call them in the forward pass alone, in an order that depends on nothing that may
differ between ranks (whether a gradient is wanted, how many samples there are).
"""

import hashlib
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from . import _compat

Group: TypeAlias = dist.ProcessGroup | str | None


class Ranks(NamedTuple):
    """The ranks of one call.

    Attributes:
        group: theirs.
        size: W.
        rank: of this process among them.
        capacity: the most samples of one view on any of them; messages are padded to it.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    capacity: int


def members(process_group: Group) -> tuple[int, str]:
    """World size and name of a group now; (1, "") where nothing is to be communicated.

    Compiled code asks once.

    Args:
        process_group: a group, its name, or ``None`` for the default one.

    Raises:
        RuntimeError: if this process is not a member, or the group is destroyed.
    """
    name = group_name(process_group)
    can_tell = not torch.compiler.is_compiling() and dist.is_available() and dist.is_initialized()
    is_object = process_group is not None and not isinstance(process_group, str)
    if can_tell and is_object and resolve(str(name)) is not process_group:
        raise RuntimeError("process_group: expected a group that exists, got one destroyed since.")
    return _members(name)


def group_name(process_group: Group) -> str | None:
    """The name of a group, by which it is found again in a copy or another process."""
    if process_group is None or isinstance(process_group, str):
        return process_group
    if not isinstance(process_group, dist.ProcessGroup):
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise RuntimeError("process_group: expected a group that this rank is a member of.")
        raise TypeError(
            "process_group: expected a ProcessGroup, its name or None, got "
            f"{type(process_group).__name__}; of a DeviceMesh, pass mesh.get_group(dim)."
        )
    name: str = process_group.group_name
    return name


@_compat.constant_when_compiled
def _members(name: str | None) -> tuple[int, str]:
    if not (dist.is_available() and dist.is_initialized()):
        if name is not None:
            raise RuntimeError(
                "process_group: expected a group that exists, but torch.distributed is not "
                "initialised (any more). Pass None for the default group of the moment."
            )
        return 1, ""
    group = dist.group.WORLD if name is None else resolve(name)
    assert group is not None
    size = dist.get_world_size(group)
    if size < 1:
        raise RuntimeError("process_group: expected a group that this rank is a member of.")
    return (size, group.group_name) if size > 1 else (1, "")


def require_world(name: str, size: int) -> None:
    """Check, for compiled code, that the world is still the one for which it was compiled."""
    is_there = dist.is_available() and dist.is_initialized()
    found = _members(name or None)[0] if is_there else 1
    if found != size:
        raise RuntimeError(
            f"vicreg_losses: expected {size} rank(s), for which this was compiled, got {found}. "
            "Compile after init_process_group, or call torch._dynamo.reset()."
        )


def resolve(name: str) -> dist.ProcessGroup:
    """The group of a name."""
    try:
        return _compat.resolve_group(name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RuntimeError(
            f"process_group: expected a group that exists, got {name!r}, which has been destroyed "
            "or belongs to other ranks."
        ) from error


@_compat.constant_when_compiled
def rank_in(name: str) -> int:
    """The rank of this process in a group."""
    return dist.get_rank(resolve(name)) if name else 0


# What the ranks of a group have agreed on: the capacity of each kind of call; and its limit.
_agreed: "WeakKeyDictionary[dist.ProcessGroup, dict[str, int]]" = WeakKeyDictionary()
_limits: "WeakKeyDictionary[dist.ProcessGroup, int]" = WeakKeyDictionary()


def limit_samples(group: dist.ProcessGroup, samples: int) -> None:
    """Fix the capacity of all calls over a group."""
    _limits[group] = samples


def meet(
    name: str,
    like: Tensor,
    samples: int,
    call: Mapping[str, Any],
    content: Tensor,
    least: int = 2,
    equal: bool = False,
) -> Ranks:
    """Learn the capacity, and that all ranks are in the same call.

    At every call on a CPU, and through the CPU's backend of the group if it has one and no limit of
    samples. Else it would wait for the device: at the first call of a kind, and with
    ``VICREG_LOSSES_DEBUG=1``. A captured graph and tensors without data take what is known.

    Args:
        name: of the group.
        like: gives the device.
        samples: of one view on this rank.
        call: what must be the same on all ranks.
        content: numbers that must be, (D, K) or none, see :func:`looked_at`.
        least: how many samples all ranks must have together.
        equal: whether each must have the same number of them.

    Raises:
        RuntimeError: on all ranks, if they disagree.
        ValueError: on all ranks, for too few samples in all.
    """
    group = resolve(name)
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    agreed, kind = _agreed.setdefault(group, {}), repr(sorted(call.items()))
    limit, first = _limits.get(group), kind not in agreed
    debug = os.environ.get("VICREG_LOSSES_DEBUG", "") not in ("", "0")
    on_cpu = _compat.has_cpu_backend(group)
    device = _CPU if on_cpu else like.device
    if like.is_meta or hasattr(like, "fake_mode"):  # no data
        return Ranks(group, size, rank, limit or samples)
    if like.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if first and limit is None:
            raise RuntimeError(
                "vicreg_losses: expected a call like this one before a CUDA graph captures it, or "
                "distributed.limit_samples, got none; the ranks must tell each other their samples."
            )
        return Ranks(group, size, rank, limit or agreed[kind])
    if not (first or debug or like.device == _CPU or (on_cpu and limit is None)):
        return Ranks(group, size, rank, limit or agreed[kind])
    said = {**call, "limit of samples": limit, "VICREG_LOSSES_DEBUG": debug}
    said["seed, step or directions"] = _digest(looked_at(content, first or debug))
    code = int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=8).digest(), "big") >> 1
    mine = torch.tensor([samples, code], dtype=torch.int64, device=device)
    heard = all_gather(mine, group).tolist()
    counts = [count for count, _ in heard]
    if any(other != code for _, other in heard) or (equal and len(set(counts)) > 1):
        _disagree({**said, "samples": samples} if equal else said, group)
    if sum(counts) < least:
        raise ValueError(
            f"embeddings: expected at least {least} samples in the global batch, got {sum(counts)} "
            f"over {size} ranks; batch statistics need more than one."
        )
    agreed[kind] = max(counts)
    return Ranks(group, size, rank, limit or agreed[kind])


_CPU = torch.device("cpu")


def looked_at(content: Tensor, everything: bool) -> Tensor:
    """What is compared of it: in the first call of a kind, or in debug mode, all.

    Later a few numbers, which tell random ones apart; none off the CPU, where that would wait.
    """
    if everything:
        return content
    return content[:4, :4] if content.device == _CPU else content[:0]


def _digest(content: Tensor) -> str:
    if content.numel() == 0:
        return "none"
    numbers = content.detach().to("cpu", torch.float32).contiguous().numpy()
    return hashlib.blake2b(numbers.tobytes(), digest_size=8).hexdigest()


def _disagree(said: Mapping[str, Any], group: dist.ProcessGroup) -> None:
    """Raise, on all ranks, an error that names what differs."""
    texts: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(texts, {key: repr(value) for key, value in said.items()}, group=group)
    lines = []
    for key in sorted({key for text in texts for key in text}):
        ranks: dict[str, list[int]] = {}
        for rank, text in enumerate(texts):
            ranks.setdefault(text.get(key, "nothing"), []).append(rank)
        if len(ranks) > 1:
            each = "; ".join(f"{value} on rank {_few(who)}" for value, who in ranks.items())
            lines.append(f"{key}: {each}")
    raise RuntimeError(
        "vicreg_losses: expected the same call on all ranks, got different ones (other options or "
        "shapes, another seed, or losses called in another order). " + " | ".join(lines)
    )


def _few(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return shown if len(ranks) <= 4 else f"{shown} and {len(ranks) - 4} more"


def all_reduce_(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(x, group=group)
    return x


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(...) of each rank -> (W, ...), in the order of ranks."""
    out = x.new_empty((dist.get_world_size(group), *x.shape))
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out.view(-1), x.contiguous().view(-1), group=group)
    return out


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(W, ...) -> (W, ...): row w of this rank goes to rank w, and becomes its row of this rank."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out
