"""The grown checkpoint as a torch DCP storage reader: growth happens while a loader reads.

    state = {"decoder.layers.mlp.router.weight": torch.empty(8, 8, 64)}
    torch.distributed.checkpoint.load(state, storage_reader=GrowthStorageReader("base/iter_0001000",
    growth))

Any DCP loader works, Megatron's above all: it sees the metadata of the grown model, plans its reads
for whatever layout it runs, and hands them to `read_data`. There each read is resolved to boxes of
the base, and the base's chunks are read through the base's own reader, each once, however many
target slices it feeds.
"""

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_growth.checkpoint.collector import collector_off
from megatron_growth.checkpoint.common_state import grown_common_state
from megatron_growth.checkpoint.fanout import read_tensors
from megatron_growth.checkpoint.source import COMMON_OBJECT, SourceCheckpoint, read_objects
from megatron_growth.checkpoint.view import GrownView
from megatron_growth.config import GrowthConfig
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.keys import KeyForm
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.planning.router import read_router


class GrowthStorageReader(StorageReader):
    """Presents the grown model of a base checkpoint.

    Args:
        checkpoint_dir: the base, an `iter_*` directory; opened read-only.
        growth: what to grow, or a plan already made for this base.
        base: DCP reader to read the base through; torch's `FileSystemReader` by default.
        adjust: changes the grown model's common state further before it is delivered; the run's own
            settings.

    Raises:
        CheckpointError: the base is missing, incomplete or of a format that cannot be grown.
        PlanError: it cannot grow that way.
    """

    @collector_off()
    def __init__(
        self,
        checkpoint_dir: str | os.PathLike[str],
        growth: GrowthConfig | GrowthPlan,
        base: StorageReader | None = None,
        adjust: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        super().__init__()
        self.source = SourceCheckpoint(
            Path(checkpoint_dir), base, weights_only=growth.optimizer == "reset"
        )
        self.plan = growth if isinstance(growth, GrowthPlan) else plan_for(self.source, growth)
        self.view = GrownView(self.source, self.plan)
        self.view.shapes, self.view.objects  # noqa: B018  what cannot be grown is refused here, not while reading
        self._adjust = adjust

    # -- StorageReader

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None and Path(checkpoint_id) != self.source.directory:
            raise CheckpointError(
                f"this reader is of {str(self.source.directory)!r}, not {str(checkpoint_id)!r}; "
                "make another one"
            )

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self.source.directory

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return Path(checkpoint_id, ".metadata").exists()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Metadata of the grown model, made anew each time, for the planner may change entries."""
        return self.view.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The base's reader needs the base's metadata, not the grown one that the planner saw."""
        self.source.reader.set_up_storage_reader(self.source.metadata, is_coordinator)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what the planner asks for."""
        read_tensors(
            self.view, [item for item in plan.items if item.type == LoadItemType.TENSOR], planner
        )
        self._read_objects(
            [item for item in plan.items if item.type == LoadItemType.BYTE_IO], planner
        )
        done: Future[None] = Future()
        done.set_result(None)
        return done

    # -- objects

    def _read_objects(self, items: Iterable[ReadItem], planner: LoadPlanner) -> None:
        wanted: dict[str, list[ReadItem]] = {}
        for item in items:
            wanted.setdefault(self.view.objects[item.storage_index.fqn], []).append(item)
        if not wanted:
            return

        def deliver(source: str, content: bytes) -> None:
            if source == COMMON_OBJECT:
                content = self._common_state()
            for item in wanted[source]:
                planner.load_bytes(item, io.BytesIO(content))

        read_objects(self.source.reader, wanted, deliver)

    def _common_state(self) -> bytes:
        """The common state of the grown model, as the base's saver wrote it: one in a list."""
        buffer = io.BytesIO()
        torch.save(
            [self._adjust(grown_common_state(self.source.common_state or {}, self.plan))], buffer
        )
        return buffer.getvalue()


def plan_for(
    source: SourceCheckpoint, growth: GrowthConfig, target_form: KeyForm | None = None
) -> GrowthPlan:
    """The plan that grows `source` as `growth` says, in the source's key form by default."""
    return build_plan(
        growth,
        source.architecture,
        masters=source.masters,
        target_form=target_form,
        router=read_router(source.args),
    )
