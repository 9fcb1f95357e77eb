"""What of a model lies on which pipeline rank, and how many micro-batches wait there.

Layers are cut into pipeline x virtual chunks, and rank r holds chunks r, r + pipeline, ...; a chunk
is written as in Megatron's `--pipeline-model-parallel-layout`:

    Ett   embedding and two layers      m   a multi-token-prediction module
    tt    two layers                    L   output layer and loss

One forward one backward: rank r of P lets P - r micro-batches in before the first one leaves.
Interleaved: 2 (P - r - 1) + (V - 1) P + 1 passes, in groups of P for each chunk; one more with
`--overlap-moe-expert-parallel-comm`. Upstream: `get_pp_rank_microbatches`, pipeline_parallel/
schedules.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

# (tt|)*29
_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
# t*3
_RUN = re.compile(r"(.)\*(\d+)")
_LETTERS = "EtmL"


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one rank.

    Attributes:
        layers: of the decoder.
        modules: of multi-token prediction.
        embedding, output: whether it begins with the one, ends in the other.
        waiting: micro-batches whose activations it holds at the fullest moment.
    """

    layers: tuple[int, ...]
    modules: tuple[int, ...]
    embedding: bool
    output: bool
    waiting: int


def even_layout(num_layers: int, num_modules: int, num_chunks: int) -> tuple[str, ...]:
    """Layers divided as evenly as they go, modules before the output layer."""
    few, more = divmod(num_layers, num_chunks)
    chunks = ["t" * (few + (index < more)) for index in range(num_chunks)]
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * num_modules + "L"
    return tuple(chunks)


def parsed_layout(text: str) -> tuple[str, ...]:
    """Chunks of Megatron's notation: `Et*3|(tt|)*29m|L`.

    Raises:
        ValueError: it is none.
    """
    written = text.replace(",", "")
    for pattern in (_GROUP, _RUN):
        written = pattern.sub(lambda found: found[1] * int(found[2]), written)
    strange = set(written) - {*_LETTERS, "|"}
    if strange:
        raise ValueError(f"{''.join(sorted(strange))!r} is none of {_LETTERS} and |")
    return tuple(written.split("|"))


def chunks_of(
    rank: int, layout: tuple[str, ...], pipeline: int, microbatches: int, *, overlap: bool = False
) -> tuple[Chunk, ...]:
    """The chunks of a pipeline rank.

    Args:
        rank: the rank.
        layout: all chunks.
        pipeline: ranks.
        microbatches: of an optimizer step, on one data-parallel rank.
        overlap: expert-parallel communication runs beside the next micro-batch.
    """
    virtual = max(1, len(layout) // pipeline)
    waiting = _waiting(rank, pipeline, virtual, microbatches, overlap)
    return tuple(
        Chunk(
            layers=tuple(_numbers(layout, index, "t")),
            modules=tuple(_numbers(layout, index, "m")),
            embedding="E" in layout[index],
            output="L" in layout[index],
            waiting=waiting[index // pipeline],
        )
        for index in range(rank, len(layout), pipeline)
    )


def _numbers(layout: tuple[str, ...], index: int, letter: str) -> Iterator[int]:
    first = sum(chunk.count(letter) for chunk in layout[:index])
    yield from range(first, first + layout[index].count(letter))


def _waiting(
    rank: int, pipeline: int, virtual: int, microbatches: int, overlap: bool
) -> tuple[int, ...]:
    if virtual == 1:
        return (min(pipeline - rank, microbatches),)
    passes = 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1 + overlap
    passes = min(passes, microbatches * virtual)
    chunks = [number // pipeline % virtual for number in range(passes)]
    return tuple(chunks.count(chunk) for chunk in range(virtual))
