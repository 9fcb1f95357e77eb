"""Opening a base checkpoint: what is in it, whether it is whole, and what it is a checkpoint of.

The base is read and never written. Whatever cannot be grown is refused here, before anything else
happens.
"""

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.keys import (
    Key,
    KeyForm,
    ObjectKey,
    is_optimizer_key,
    parse,
    parse_object,
)
from megatron_growth.planning.plan import MASTER_STATES, Architecture, Box, Shape

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_OBJECT = "common_state/shard_0_1"
COMMON_FILE = "common.pt"  # megatron-core before 0.19

# What a directory of another format holds, and what to do about it.
_FOREIGN = (
    ("mp_rank_*", "the legacy `torch` format", "save it with --ckpt-format torch_dist"),
    ("modelopt_run_config.yaml", "a ModelOpt checkpoint", "save it with --ckpt-format torch_dist"),
)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the base: its key as read, its metadata, and its chunks as boxes."""

    key: Key
    metadata: TensorStorageMetadata

    @cached_property
    def shape(self) -> Shape:
        return tuple(self.metadata.size)

    @cached_property
    def chunks(self) -> tuple[Box, ...]:
        return tuple(Box(tuple(c.offsets), tuple(c.sizes)) for c in self.metadata.chunks)


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

    @cached_property
    def common_state(self) -> dict[str, Any] | None:
        """Megatron's common state (`args`, `iteration`, ...), None for a checkpoint that has
        none."""
        return load_common_state(self.directory, self.metadata, self.reader)

    @property
    def args(self) -> Any:
        """The Megatron arguments that the base was trained with, None where it has none."""
        return (self.common_state or {}).get("args")

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


def iteration_directory(load: str | Path, iteration: int | str = "latest") -> Path:
    """The `iter_*` directory of one iteration of a Megatron checkpoint directory.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    load = Path(load)
    if not load.is_dir():
        raise CheckpointError(
            f"checkpoint directory {str(load)!r} does not exist; give the one that holds {TRACKER}"
        )
    if iteration == "latest":
        tracker = load / TRACKER
        if not tracker.is_file():
            inside = (load / ".metadata").exists()
            hint = "give its parent directory" if inside else "training has saved nothing there yet"
            raise CheckpointError(f"checkpoint directory {str(load)!r} has no {TRACKER}; {hint}")
        word = tracker.read_text().strip()
        name = "release" if word == "release" else _iteration_name(word, tracker)
    elif iteration == "release":
        name = "release"
    else:
        name = f"iter_{int(iteration):07d}"
    directory = load / name
    if not directory.is_dir():
        found = [*sorted(load.glob("iter_*")), *load.glob("release")]
        have = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"checkpoint {str(directory)!r} does not exist; iterations there: {have}"
        )
    return directory


def _iteration_name(word: str, tracker: Path) -> str:
    if not word.isdigit():
        raise CheckpointError(
            f"{str(tracker)!r} holds {word!r}, not an iteration; write the iteration's number in it"
        )
    return f"iter_{int(word):07d}"


def check_format(directory: Path) -> None:
    """Refuse what is no whole `torch_dist` checkpoint, by name and with the remedy."""
    if not directory.is_dir():
        raise CheckpointError(
            f"checkpoint {str(directory)!r} does not exist; give an iter_* directory"
        )
    for pattern, what, remedy in _FOREIGN:
        if any(directory.glob(pattern)):
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is {what}, which cannot be grown; {remedy}"
            )
    config = directory / "metadata.json"
    if config.is_file():
        backend = _backend(config)
        if backend != "torch_dist":
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is of format {backend!r}, which cannot be grown; "
                "save it with --ckpt-format torch_dist"
            )
    if not (directory / ".metadata").is_file():
        hint = (
            f"; give one of its iter_* directories, named in {TRACKER}"
            if (directory / TRACKER).exists()
            else ""
        )
        raise CheckpointError(
            f"checkpoint {str(directory)!r} has no .metadata: it is no torch_dist checkpoint, or "
            "its save did not finish"
            + (hint or "; use another iteration, or save it with --ckpt-format torch_dist")
        )


def _backend(config: Path) -> str:
    try:
        return str(json.loads(config.read_text())["sharded_backend"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{str(config)!r} is damaged; restore it from another copy of the checkpoint"
        ) from None


def _read_metadata(directory: Path, reader: StorageReader) -> Metadata:
    try:
        return reader.read_metadata()
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(
            f"the .metadata of checkpoint {str(directory)!r} cannot be read ({_one_line(error)}); "
            "its save did not finish or it is damaged: use another iteration"
        ) from None


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_files(directory: Path, metadata: Metadata) -> None:
    """Every data file must be there and long enough; a save that was cut short shows here."""
    ends: dict[str, int] = defaultdict(int)
    for info in (metadata.storage_data or {}).values():
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    for name, end in sorted(ends.items()):
        path = directory / name
        size = path.stat().st_size if path.is_file() else -1
        if size < end and not str(directory).startswith("msc:"):
            state = "is missing" if size < 0 else f"has {size} bytes of {end}"
            raise CheckpointError(
                f"checkpoint {str(directory)!r} is incomplete: {name} {state}; use another "
                "iteration or restore the file"
            )


def _check_tiled(text: str, tensor: SourceTensor) -> None:
    """Chunks must cover the tensor: a hole would leave target weights unset, and DCP would not say
    so."""
    whole = Box((0,) * len(tensor.shape), tensor.shape)
    covered = sum(chunk.numel for chunk in tensor.chunks)
    if covered != whole.numel or any(whole.intersect(c) != c for c in tensor.chunks if c.numel):
        raise CheckpointError(
            f"the chunks of {text} hold {covered} of its {whole.numel} elements; "
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
            loaded: dict[str, Any] = {COMMON_OBJECT: io.BytesIO()}
            torch.distributed.checkpoint.load(loaded, storage_reader=reader, no_dist=True)
            state = loaded[COMMON_OBJECT]
            return dict(state[0] if isinstance(state, list | tuple) else state)
        if legacy.is_file():
            return dict(torch.load(legacy, map_location="cpu", weights_only=False))
    except (
        Exception,
        CheckpointException,
    ) as error:  # as above; torch's own is a BaseException of many lines
        cause = next((e for e, _ in getattr(error, "failures", {}).values()), error)
        raise CheckpointError(
            f"the common state of checkpoint {str(directory)!r} cannot be read "
            f"({_one_line(cause)}); it is damaged: use another iteration"
        ) from None
    return None


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
