"""What a job looks at once a model is loaded: every parameter against the definition, and the
logits.

These run in the ranks. The definition is computed from the base's plain tensors, read by torch's
own reader, by `tests.checkpoint.definition`, which shares no code with the package.
"""

import os
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.checkpoint.write import Crew, Draft, grow
from megatron_growth.config import GrowthConfig
from tests.checkpoint.definition import Growth, Tensors, appended, grown_tensors, interleaved
from tests.megatron.driver import Probe


def plain_tensors(directory: Path) -> Tensors:
    """Every tensor of a checkpoint, whole, through torch's own reader."""
    reader = dcp.FileSystemReader(directory)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@cache
def defined(
    base: str,
    layers: tuple[int, ...],
    order: str,
    factor: int,
    alpha: float,
    zero: bool,
    rule: str,
    stacked: bool,
    parked: bool,
) -> Tensors:
    """The grown checkpoint by definition; the same for all jobs of a rank that grow alike."""
    tensors = plain_tensors(iteration_directory(base))
    router = next(
        v
        for k, v in sorted(tensors.items())
        if k.endswith("mlp.router.weight") and "optimizer" not in k
    )
    num_experts = router.shape[-2]
    experts = (interleaved if order == "interleave" else appended)(num_experts, factor)
    growth = Growth(
        layers,
        experts,
        (("experts", alpha), ("router", alpha)),
        zero,
        rule,
        stacked=stacked,
        parked=parked,
    )
    return grown_tensors(tensors, growth)


def compare(probe: Probe) -> dict[str, Any]:
    """Compare what this rank holds, parameters and optimizer state, with the definition, bit for
    bit."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    o = probe.options
    wanted = defined(
        o["base"],
        tuple(o["layers"]),
        o.get("order", "interleave"),
        o.get("factor", 2),
        o.get("alpha", 0.01),
        o.get("zero_output", False),
        o.get("optimizer", "reset"),
        o.get("stacked", True),
        o.get("parked", False),
    )
    held, wrong, elements = [], [], 0
    for shard in _shards(probe):
        apply_factories(shard)
        for value in nested_values(shard):
            if not isinstance(value, ShardedTensor) or value.data is None:
                continue
            box = tuple(
                slice(offset, offset + size)
                for offset, size in zip(
                    value.global_offset,
                    (*(1 for _ in range(value.prepend_axis_num)), *value.local_shape),
                    strict=True,
                )
            )
            expected = wanted[value.key][box].reshape(value.local_shape)
            held.append(value.key)
            elements += expected.numel()
            if not torch.equal(value.data.detach().cpu(), expected.to(value.data.dtype)):
                wrong.append(f"{value.key} {value.global_offset}")
    return {"held": sorted(set(held)), "elements": elements, "wrong": wrong}


def _shards(probe: Probe) -> list[dict[str, Any]]:
    """The rank's sharded state dicts: one for each model chunk, and the optimizer's where it was
    loaded."""
    from megatron.core.utils import unwrap_model

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }
    models = [chunk.sharded_state_dict(metadata=metadata) for chunk in unwrap_model(probe.model)]
    if probe.options.get("optimizer", "reset") == "reset":
        return models
    named = (
        models[0] if len(models) == 1 else {f"model{i}": model for i, model in enumerate(models)}
    )
    return [*models, probe.optimizer.sharded_state_dict(named, metadata=metadata)]


def real_tokens(length: int, vocab: int) -> torch.Tensor:
    """Bytes of the standard library's source, shape [1, length]."""
    text = Path(sysconfig.get_path("stdlib"), "argparse.py").read_bytes()[:length]
    return torch.tensor([[byte % vocab for byte in text]])


def logits(probe: Probe) -> None:
    """Save the logits of real text, of a model whole on each pipeline rank, to
    `options["logits"]`."""
    from megatron.training import get_args

    args, (model,) = get_args(), probe.model
    tokens = real_tokens(args.seq_length, args.vocab_size)
    positions = torch.arange(tokens.shape[1])[None]
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    model.eval()
    with torch.no_grad():
        found = model(tokens, positions, mask)
    model.train()
    if probe.rank == 0:
        torch.save(found, probe.options["logits"])


def logits_of_other_rows(probe: Probe) -> None:
    """The logits of a model grown wrongly: each expert has the router row of its neighbour."""
    from megatron.core.transformer.moe.router import TopKRouter

    (model,) = probe.model
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.weight.data.copy_(module.weight.data.roll(2, 0))  # by one original and its clone
    logits(probe)


def compare_and_logits(probe: Probe) -> dict[str, Any]:
    logits(probe)
    return compare(probe)


def iteration(probe: Probe) -> dict[str, Any]:
    """What was loaded, and from where."""
    from megatron.training import get_args

    args = get_args()
    return {"num_layers": args.num_layers, "load": args.load}


def optimizer_steps(probe: Probe) -> dict[str, Any]:
    """The step that Adam is at, in every param group or parameter of every optimizer."""
    steps: set[int] = set()
    for part in getattr(probe.optimizer, "chained_optimizers", [probe.optimizer]):
        inner = part.optimizer
        steps.update(int(group["step"]) for group in inner.param_groups if "step" in group)
        steps.update(int(state["step"]) for state in inner.state.values() if "step" in state)
    return {"steps": sorted(steps), **compare(probe)}


@contextmanager
def written_first(options: Mapping[str, Any]) -> Iterator[None]:
    """Write the grown checkpoint to disk, by all ranks together, before the job loads it."""
    growth = GrowthConfig.model_validate(options["growth"])
    with Crew() as crew:
        draft = Draft(iteration_directory(options["base"]), growth, options["mode"])
        grow(draft, Path(options["written"]), crew=crew)
    yield


@contextmanager
def samples(options: Mapping[str, Any]) -> Iterator[None]:
    """Append the index of every training sample that this rank reads to a file."""
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    original = MockGPTDataset.__getitem__

    def recorded(self: Any, index: int) -> Any:
        if self.index_split.name == "train":
            with Path(f"{options['samples']}.{os.environ['RANK']}").open("a") as file:
                file.write(f"{index}\n")
        return original(self, index)

    MockGPTDataset.__getitem__ = recorded
    try:
        yield
    finally:
        MockGPTDataset.__getitem__ = original
