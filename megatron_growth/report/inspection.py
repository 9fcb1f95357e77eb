"""What a checkpoint holds, and whether it can be grown: the content of `megatron-growth inspect`.

Unlike growth, a look must not fail on what it does not understand: keys that no rule matches are
counted, and the reason for which growth would refuse the checkpoint is its verdict.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_growth.checkpoint.directory import TRACKER, iteration_directory
from megatron_growth.checkpoint.norms import LayerScale
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import (
    COMMON_FILE,
    COMMON_OBJECT,
    SourceCheckpoint,
    SourceTensor,
)
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.config import DepthConfig, GrowthConfig, WidthConfig
from megatron_growth.errors import CheckpointError, GrowthError
from megatron_growth.planning.cost import ParameterCount, StoredTensor, count_parameters
from megatron_growth.planning.keys import KeyForm, parse
from megatron_growth.planning.plan import Architecture

# Megatron argument -> what it is called here.
LAYOUT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
    "data_parallel_size": "DP",
}

# The first pattern that a key matches names the format of the optimizer states.
_OPTIMIZER_FORMATS = (
    # optimizer.distributed.dp_group_idx_0.param_state
    (
        re.compile(r"(chained_\d+\.)?optimizer\.distributed\..*\.param_state(/.*)?"),
        "dp_zero_gather_scatter",
    ),
    # chained_0.optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(...).bucket_idx_0.exp_avg
    (re.compile(r"(chained_\d+\.)?optimizer\.distributed\..+"), "dp_reshardable"),
    (re.compile(r"optimizer\.state\.param\..+"), "fully_reshardable (distributed optimizer)"),
    (re.compile(r"optimizer\.state\.fp32_param\..+"), "mixed precision (not distributed)"),
    (re.compile(r"optimizer\.state\.exp_avg\..+"), "fp32 (not distributed)"),
)


@dataclass(frozen=True)
class Verdict:
    """Whether the checkpoint can be grown in depth and in width; a reason where not, else None."""

    depth: str | None
    width: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything `megatron-growth inspect` says.

    Attributes:
        checkpoint: the `iter_*` directory.
        iteration: None where it does not say.
        written_by: what is known of the Megatron that wrote it.
        architecture: None where neither tensors nor arguments say.
        parameters: of the model.
        tensors: how many of the model, and others: optimizer states and what is not understood.
        objects: pickled objects.
        unknown: entries that no rule of the key grammar matches.
        weight_bytes: of the model's tensors.
        other_bytes: of all other tensors.
        dtypes: tensors of each data type.
        optimizer_states: names of the states by tensor, `exp_avg` and such.
        optimizer_format: how they are keyed; None without them.
        layout: parallel sizes that it was saved with.
        num_ranks: that saved it.
        verdict: whether it can be grown.
        scales: weight scale of each layer.
    """

    checkpoint: str
    iteration: int | None
    written_by: str
    architecture: Architecture | None
    parameters: ParameterCount | None
    tensors: tuple[int, int]
    objects: int
    unknown: int
    weight_bytes: int
    other_bytes: int
    dtypes: Mapping[str, int]
    optimizer_states: tuple[str, ...]
    optimizer_format: str | None
    layout: Mapping[str, int]
    num_ranks: int | None
    verdict: Verdict
    scales: tuple[LayerScale, ...] = ()

    def document(self) -> dict[str, Any]:
        """The inspection as JSON takes it."""
        fields = asdict(self)
        fields["tensors"] = {"model": self.tensors[0], "other": self.tensors[1]}
        fields["parameters"] = counted(self.parameters) if self.parameters else None
        fields["scales"] = [
            {
                "layer": s.layer,
                "rms": _number(s.rms),
                "parts": {p: _number(v) for p, v in s.parts.items()},
            }
            for s in self.scales
        ]
        return fields


def checkpoint_directory(path: Path) -> Path:
    """The `iter_*` directory meant by a Megatron checkpoint directory, or by itself."""
    return iteration_directory(path) if (path / TRACKER).exists() else path


def iteration_of(source: SourceCheckpoint) -> int | None:
    """The base's iteration, by its common state or else by its directory's name, `iter_0001000`."""
    number = source.directory.name.removeprefix("iter_")
    return (source.common_state or {}).get("iteration", int(number) if number.isdigit() else None)


def stored(tensors: Mapping[str, SourceTensor]) -> list[StoredTensor]:
    """Tensors of a checkpoint as cost counts them."""
    return [
        StoredTensor(t.key, t.shape, t.metadata.properties.dtype.itemsize) for t in tensors.values()
    ]


def known_tensors(source: SourceCheckpoint) -> dict[str, SourceTensor]:
    """The tensors that the key grammar knows; `SourceCheckpoint.tensors` refuses any other."""
    found = {}
    for text, entry in _tensor_entries(source).items():
        try:
            found[text] = SourceTensor(parse(text), entry)
        except CheckpointError:
            continue
    return found


def inspect_checkpoint(source: SourceCheckpoint, scales: tuple[LayerScale, ...] = ()) -> Inspection:
    """Look at a checkpoint; no weight is read.

    Args:
        source: the checkpoint.
        scales: its layers' weight scales, see `checkpoint.norms`.
    """
    entries, known = _tensor_entries(source), known_tensors(source)
    architecture, args = _architecture(source, known), source.args
    weights = [t for t in stored(known) if t.key.state is None]
    nbytes = sum(e.size.numel() * e.properties.dtype.itemsize for e in entries.values())
    weight_bytes = sum(t.nbytes for t in weights)
    return Inspection(
        checkpoint=str(source.directory),
        iteration=iteration_of(source),
        written_by=_written_by(source),
        architecture=architecture,
        parameters=count_parameters(weights, architecture) if architecture else None,
        tensors=(len(weights), len(entries) - len(weights)),
        objects=len(source.metadata.state_dict_metadata) - len(entries),
        unknown=len(entries) - len(known),
        weight_bytes=weight_bytes,
        other_bytes=nbytes - weight_bytes,
        dtypes=dict(
            Counter(str(e.properties.dtype).removeprefix("torch.") for e in entries.values())
        ),
        optimizer_states=tuple(sorted({t.key.state for t in known.values() if t.key.state})),
        optimizer_format=_optimizer_format(source.metadata.state_dict_metadata),
        layout={
            short: size for name, short in LAYOUT.items() if (size := getattr(args, name, None))
        },
        num_ranks=getattr(args, "world_size", None),
        verdict=_verdict(source),
        scales=scales,
    )


def _tensor_entries(source: SourceCheckpoint) -> dict[str, TensorStorageMetadata]:
    entries = source.metadata.state_dict_metadata.items()
    return {text: entry for text, entry in entries if isinstance(entry, TensorStorageMetadata)}


def _architecture(
    source: SourceCheckpoint, known: Mapping[str, SourceTensor]
) -> Architecture | None:
    """As growth sees it; where growth refuses the checkpoint, as its arguments say."""
    try:
        return source.architecture
    except GrowthError:
        args = source.args
    if not getattr(args, "num_layers", None):
        return None
    form: KeyForm = "stacked" if any(t.key.is_stacked for t in known.values()) else "per_layer"
    num_experts = getattr(args, "num_experts", None) or 0
    top_k = getattr(args, "moe_router_topk", None) if num_experts else None
    return Architecture(args.num_layers, num_experts, top_k, form)


def _verdict(source: SourceCheckpoint) -> Verdict:
    """Found by trying: the plan, and the names and shapes of all it grows, are made; nothing is
    read."""
    depth = _refusal(source, GrowthConfig(depth=DepthConfig()))
    width = _refusal(source, GrowthConfig(width=WidthConfig()))
    return Verdict(depth, width)


def _refusal(source: SourceCheckpoint, growth: GrowthConfig) -> str | None:
    try:
        view = GrownView(source, plan_for(source, growth))
        _ = view.shapes, view.objects
    except GrowthError as error:
        return str(error)
    return None


def _optimizer_format(keys: Iterable[str]) -> str | None:
    keys = list(keys)
    return next(
        (name for pattern, name in _OPTIMIZER_FORMATS if any(map(pattern.fullmatch, keys))), None
    )


def counted(count: ParameterCount) -> dict[str, Any]:
    """A parameter count as JSON takes it."""
    fields: dict[str, Any] = asdict(count)
    fields["without_embeddings"] = count.without_embeddings
    if count.activated:
        fields["activated"]["chinchilla_flops"] = count.activated.chinchilla_flops
    return fields


def _number(value: float) -> float | None:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else None


def _written_by(source: SourceCheckpoint) -> str:
    """Upstream writes no version of its own; where the common state lies tells the newer from the
    older."""
    if COMMON_OBJECT in source.metadata.state_dict_metadata:
        megatron = "megatron-core 0.19 or later"
    elif (source.directory / COMMON_FILE).is_file():
        megatron = "megatron-core before 0.19"
    else:
        return "unknown (no common state)"
    version = (source.common_state or {}).get("checkpoint_version")
    said = [megatron] if version is None else [megatron, f"checkpoint version {version}"]
    if source.described_in:
        said.append(f"arguments from {source.described_in}")
    return ", ".join(said)
