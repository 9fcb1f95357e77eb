"""Opening a base checkpoint: what is in it, whether it is whole, and what it is a checkpoint of.

The base is read and never written. Whatever cannot be grown is refused here, before anything else
happens.
"""

import io
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from megatron_growth.checkpoint.bridge import RUN_CONFIG, described_arguments
from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.directory import check_format
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.keys import (
    Key,
    KeyForm,
    ObjectKey,
    is_optimizer_key,
    parse,
    parse_object,
)
from megatron_growth.planning.pieces import Box, Shape
from megatron_growth.planning.plan import MASTER_STATES, Architecture

COMMON_OBJECT = "common_state/shard_0_1"
COMMON_FILE = "common.pt"  # megatron-core before 0.19
_EMBEDDINGS = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the base: its key as read, its metadata, and its chunks as boxes.

    A large base has hundreds of thousands of chunks, of which a rank needs a few: boxes are made of
    those alone, everything else goes by `offsets` and `sizes`.
    """

    key: Key
    metadata: TensorStorageMetadata

    @cached_property
    def shape(self) -> Shape:
        return tuple(self.metadata.size)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Of each chunk, shape [chunks, axes]."""
        return self._rows(c.offsets for c in self.metadata.chunks)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Of each chunk, shape [chunks, axes]."""
        return self._rows(c.sizes for c in self.metadata.chunks)

    def _rows(self, rows: Iterable[torch.Size]) -> NDArray[np.int64]:
        shape = len(self.metadata.chunks), len(self.shape)
        return np.fromiter(chain.from_iterable(rows), np.int64, shape[0] * shape[1]).reshape(shape)

    @cached_property
    def chunks(self) -> tuple[Box, ...]:
        boxes = zip(self.offsets.tolist(), self.sizes.tolist(), strict=True)
        return tuple(Box(tuple(offsets), tuple(sizes)) for offsets, sizes in boxes)


class SourceCheckpoint:
    """A base checkpoint, opened and checked.

    Args:
        directory: an `iter_*` directory.
        reader: DCP reader to read it through; torch's `FileSystemReader` by default. Its metadata
            may be cached by its owner and is never changed.
        weights_only: leave optimizer state out, of whatever format it is.

    Raises:
        CheckpointError: missing, incomplete, or of a format that cannot be grown.
    """

    def __init__(
        self,
        directory: str | Path,
        reader: StorageReader | None = None,
        *,
        weights_only: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.weights_only = weights_only
        if reader is None:
            check_format(self.directory)
            reader = FileSystemReader(self.directory)
        self.reader = reader
        self.metadata = _read_metadata(self.directory, reader)
        _check_files(self.directory, self.metadata)

    @cached_property
    @collector_off()
    def tensors(self) -> dict[str, SourceTensor]:
        """Every tensor by its checkpoint key, each known to the grammar and whole."""
        found = {}
        for text, entry in self._entries():
            if isinstance(entry, TensorStorageMetadata):
                tensor = SourceTensor(parse(text), entry)
                _check_tiled(text, tensor)
                found[text] = tensor
        if not found:
            raise CheckpointError(
                f"checkpoint {str(self.directory)!r} holds no tensor; nothing can be grown from it"
            )
        return found

    @cached_property
    def objects(self) -> dict[str, ObjectKey]:
        """Every pickled object by its checkpoint key."""
        return {
            text: parse_object(text)
            for text, entry in self._entries()
            if isinstance(entry, BytesStorageMetadata)
        }

    def _entries(self) -> Iterator[tuple[str, TensorStorageMetadata | BytesStorageMetadata]]:
        for text, entry in self.metadata.state_dict_metadata.items():
            if not (self.weights_only and is_optimizer_key(text)):
                yield text, entry

    @property
    def common_state(self) -> dict[str, Any] | None:
        """Megatron's common state (`args`, `iteration`, ...), None for a checkpoint that has none.
        Where Megatron-Bridge saved it, `args` are those that its own description says."""
        return self._described[0]

    @property
    def args(self) -> Any:
        """The Megatron arguments that the base was trained with, None where it has none."""
        return (self.common_state or {}).get("args")

    @property
    def described_in(self) -> str | None:
        """The file that `args` were read from instead of the common state; None where they were
        not."""
        return self._described[1]

    @property
    def undescribed(self) -> str | None:
        """Why such a file does not say the arguments; None where it does, or is not there."""
        return self._described[2]

    def required_args(self) -> Any:
        """The Megatron arguments that the base was trained with.

        Raises:
            CheckpointError: it has none.
        """
        if self.args is None:
            why = self.undescribed or "use a checkpoint that Megatron's training saved"
            raise CheckpointError(
                f"checkpoint {str(self.directory)!r} has no Megatron arguments, so the model is "
                f"not known; {why}"
            )
        return self.args

    @cached_property
    def _described(self) -> tuple[dict[str, Any] | None, str | None, str | None]:
        """The common state, the file that its arguments are from if not its own, and why it has
        none."""
        state = load_common_state(self.directory, self.metadata, self.reader)
        if state is None or "args" in state:
            return state, None, None
        rows = self.metadata.state_dict_metadata.get(_EMBEDDINGS)
        try:
            args = described_arguments(
                self.directory, rows.size[0] if isinstance(rows, TensorStorageMetadata) else None
            )
        except CheckpointError as error:
            return state, None, str(error)
        if args is None:
            return state, None, None
        return {**state, "args": args}, RUN_CONFIG, None

    @cached_property
    def architecture(self) -> Architecture:
        """What the base is a checkpoint of, from its tensors, checked against its arguments."""
        return _architecture(self)

    @cached_property
    def optimizer_states(self) -> tuple[str, ...]:
        """Names of the optimizer states that it holds, `exp_avg` and such; empty for weights
        only."""
        return tuple(sorted({t.key.state for t in self.tensors.values() if t.key.state}))

    @property
    def masters(self) -> str | None:
        """The optimizer state that holds fp32 masters, None where there is none."""
        return next((state for state in MASTER_STATES if state in self.optimizer_states), None)


@collector_off()
def _read_metadata(directory: Path, reader: StorageReader) -> Metadata:
    try:
        return reader.read_metadata()
    except PermissionError as error:
        raise CheckpointError(
            f"the .metadata of checkpoint {str(directory)!r} cannot be read ({error.strerror}); "
            "give this user read access to the checkpoint"
        ) from None
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(
            f"the .metadata of checkpoint {str(directory)!r} cannot be read ({_one_line(error)}); "
            "its save did not finish or it is damaged: use another iteration"
        ) from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Every data file must be there and long enough; a save that was cut short shows here.

    Ranks that open a checkpoint together share the files out: thousands of ranks that each ask
    after all of thousands of files would keep a file system busy for minutes.
    """
    if str(directory).startswith("msc:"):
        return
    ends: dict[str, int] = defaultdict(int)
    for info in (metadata.storage_data or {}).values():
        end = info.offset + info.length
        if end > ends[info.relative_path]:
            ends[info.relative_path] = end
    rank, ranks = _rank()
    for name in sorted(ends)[rank::ranks]:
        path, end = directory / name, ends[name]
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            state = "is missing" if size < 0 else f"has {size} bytes of {end}"
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is incomplete: {name} {state}; use another "
                "iteration or restore the file"
            )


def _rank() -> tuple[int, int]:
    """This process among those of its job, and how many they are; torchrun says so before there is
    a process group."""
    if distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    if distributed.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _check_tiled(text: str, tensor: SourceTensor) -> None:
    """Chunks must cover the tensor: a hole would leave target weights unset, and DCP would not say
    so."""
    offsets, sizes = tensor.offsets, tensor.sizes
    elements, whole = sizes.prod(axis=1), math.prod(tensor.shape)
    covered = int(elements.sum())
    outside = ((offsets < 0) | (offsets + sizes > tensor.shape)).any(axis=1) & (elements > 0)
    if covered != whole or outside.any():
        raise CheckpointError(
            f"the chunks of {text} hold {covered} of its {whole} elements; "
            "the checkpoint is damaged: use another iteration"
        )


def load_common_state(
    directory: Path, metadata: Metadata, reader: StorageReader
) -> dict[str, Any] | None:
    """Read Megatron's common state through `reader`, or from the `common.pt` of older
    checkpoints."""
    legacy = directory / COMMON_FILE
    try:
        if COMMON_OBJECT in metadata.state_dict_metadata:
            # Not through DCP's `load`, which would read all of the metadata once more.
            found: list[Any] = []
            reader.set_up_storage_reader(metadata, True)
            read_objects(
                reader,
                [COMMON_OBJECT],
                lambda _, content: found.append(
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
                ),
            )
            (state,) = found
            return dict(state[0] if isinstance(state, list | tuple) else state)
        if legacy.is_file():
            return dict(torch.load(legacy, map_location="cpu", weights_only=False))
    except Exception as error:  # as above
        raise CheckpointError(
            f"the common state of checkpoint {str(directory)!r} cannot be read "
            f"({_one_line(error)}); it is damaged: use another iteration"
        ) from None
    return None


def read_objects(
    reader: StorageReader, keys: Iterable[str], deliver: Callable[[str, bytes], None]
) -> None:
    """Read pickled objects by their keys through `reader`, which is set up, and deliver each one's
    bytes."""
    empty = torch.Size((0,))
    requests = [
        ReadItem(LoadItemType.BYTE_IO, index, empty, index, empty, empty)
        for index in map(MetadataIndex, keys)
    ]
    reader.read_data(LoadPlan(requests), _ObjectPlanner(deliver)).wait()


class _ObjectPlanner(LoadPlanner):
    """Receives objects."""

    def __init__(self, deliver: Callable[[str, bytes], None]) -> None:
        self._deliver = deliver

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self._deliver(read_item.storage_index.fqn, value.getvalue())

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor: ...  # type: ignore[empty-body]
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def _architecture(source: SourceCheckpoint) -> Architecture:
    args = source.args
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern:
        raise CheckpointError(
            f"checkpoint {str(source.directory)!r} is a hybrid model (pattern {pattern!r}), which "
            "cannot be grown yet; grow a GPT model"
        )
    tensors = source.tensors  # a hybrid model has keys that the grammar refuses, hence after
    depths, widths = dict(_layers_in(tensors)), dict(_experts_in(tensors))
    form: KeyForm = "stacked" if any(t.key.is_stacked for t in tensors.values()) else "per_layer"
    if not depths:
        raise CheckpointError(
            f"checkpoint {str(source.directory)!r} has no decoder.layers tensor; it is no GPT "
            "model that can be grown"
        )
    num_layers, num_experts = max(depths), max(widths, default=0)
    _agree(num_layers, args, "num_layers", depths)
    _agree(num_experts or None, args, "num_experts", widths)
    top_k = getattr(args, "moe_router_topk", None) if num_experts else None
    return Architecture(num_layers, num_experts, top_k, form)


def _layers_in(tensors: dict[str, SourceTensor]) -> Iterator[tuple[int, str]]:
    """(layers that the decoder has at least, the key that says so)."""
    for text, tensor in tensors.items():
        if tensor.key.is_stacked:
            yield tensor.shape[0], text
        elif tensor.key.place == "decoder" and tensor.key.layer is not None:
            yield tensor.key.layer + 1, text


def _experts_in(tensors: dict[str, SourceTensor]) -> Iterator[tuple[int, str]]:
    for text, tensor in tensors.items():
        if tensor.key.rule.expert_axis:
            yield tensor.shape[1 if tensor.key.is_stacked else 0], text


def _agree(found: int | None, args: Any, name: str, witnesses: dict[int, str]) -> None:
    said = getattr(args, name, None)
    if said is not None and found is not None and said != found:
        raise CheckpointError(
            f"the checkpoint's arguments say {name} {said} but {witnesses[found]} has {found}; "
            "they disagree: use a checkpoint whose save finished"
        )
