"""What NCCL accepts and gloo does not: shares of unequal length, and their sizes as an array.

Experts get as many tokens as the router sends them, so the collectives around them are uneven.
In ``core/tensor_parallel/mappings.py``, 154 gathers and 197 reduce-scatters shares of unequal
length where experts are tensor parallel, and 450 exchanges them between expert-parallel ranks, with
the lengths in a NumPy array.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from megatron_growth.training.substitutions import Substitutions

_even_all_gather = dist.all_gather
_even_reduce_scatter = dist.reduce_scatter
_all_to_all_single = dist.all_to_all_single


def all_gather(
    outputs: Sequence[torch.Tensor],
    share: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Gather shares padded to the longest one, when they are not all of one length."""
    if _same_shape(outputs):
        return _even_all_gather(list(outputs), share, group=group, async_op=async_op)
    _refuse_async(async_op)
    longest = max(len(output) for output in outputs)
    padded = share.new_zeros((longest, *share.shape[1:]))
    padded[: len(share)] = share
    buffers = [torch.empty_like(padded) for _ in outputs]
    _even_all_gather(buffers, padded, group=group)
    for output, buffer in zip(outputs, buffers, strict=True):
        output.copy_(buffer[: len(output)])
    return None


def reduce_scatter(
    output: torch.Tensor,
    shares: Sequence[torch.Tensor],
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Reduce everything and keep our own share, when they are not all of one length."""
    if _same_shape(shares):
        return _even_reduce_scatter(output, list(shares), op=op, group=group, async_op=async_op)
    _refuse_async(async_op)
    everything = torch.cat(list(shares))
    dist.all_reduce(everything, op=op, group=group)
    lengths = [len(share) for share in shares]
    output.copy_(torch.split(everything, lengths)[dist.get_rank(group)])
    return None


def all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Iterable[int] | None = None,
    input_split_sizes: Iterable[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Exchange with the lengths as plain lists of int."""
    return _all_to_all_single(
        output,
        input,
        _int_list(output_split_sizes),
        _int_list(input_split_sizes),
        group=group,
        async_op=async_op,
    )


def _same_shape(tensors: Sequence[torch.Tensor]) -> bool:
    return len({tensor.shape for tensor in tensors}) == 1


def _int_list(sizes: Iterable[int] | None) -> list[int] | None:
    return None if sizes is None else [int(size) for size in sizes]


def _refuse_async(async_op: bool) -> None:
    if async_op:
        raise NotImplementedError(
            "async_op=True with shares of unequal length: the CPU backend does these collectives "
            "in several steps and cannot return before the last; use async_op=False"
        )


def substitute(substitutions: Substitutions) -> None:
    substitutions.replace(dist, "all_gather", all_gather)
    substitutions.replace(dist, "reduce_scatter", reduce_scatter)
    substitutions.replace(dist, "all_to_all_single", all_to_all_single)
