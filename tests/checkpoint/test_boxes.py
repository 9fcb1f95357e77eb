"""Any box of any target tensor, from any chunking of any base, is that slice of the definition."""

import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint import fanout
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.planning.build import build_plan
from tests.checkpoint import bases, definition
from tests.checkpoint.bases import FC1, FC2, ROUTER, Cuts, Shape
from tests.checkpoint.definition import Growth, appended, interleaved
from tests.checkpoint.loading import RecordingReader, load_boxes

QUICK = settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
PROJECTION = "self_attention.linear_proj.weight"
NAMES = (FC1, FC2, ROUTER, PROJECTION)


class _Base:
    """A random base: some tensors of one layer, stacked or not, cut at random places."""

    def __init__(self, draw: Any) -> None:
        self.layers = draw(st.integers(1, 3))
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
        self.experts = draw(st.integers(1, 3)) if names != [PROJECTION] else 0
        self.stacked = draw(st.booleans())
        self.masters = draw(st.booleans())
        generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
        shapes = {
            FC1: (self.experts, 5, 3),
            FC2: (self.experts, 3, 2),
            ROUTER: (self.experts, 3),
            PROJECTION: (3, 4),
        }
        self.tensors: dict[str, torch.Tensor] = {}
        for name in names:
            for layer in [""] if self.stacked else [f"{i}." for i in range(self.layers)]:
                lead = (self.layers,) if self.stacked else ()
                master = torch.randn(*lead, *shapes[name], generator=generator) * 3
                key = f"decoder.layers.{layer}{name}"
                self.tensors[key] = master.bfloat16()
                if self.masters:
                    self.tensors[f"optimizer.state.param.{key}"] = master
                    self.tensors[f"optimizer.state.exp_avg_sq.{key}"] = master.square()
        self.cuts = {
            key: [draw(_cuts(n)) for n in tensor.shape] for key, tensor in self.tensors.items()
        }

    def grid(self, key: str, shape: Shape) -> Cuts:
        return self.cuts[key]


@st.composite
def _cuts(draw: st.DrawFn, length: int) -> list[int]:
    inner = draw(st.sets(st.integers(1, length - 1), max_size=2)) if length > 1 else set()
    return [0, *sorted(inner), length]


def _growth(draw: Any, base: _Base) -> tuple[GrowthConfig, Growth]:
    """A random growth of the base, as configuration and written out."""
    wide = base.experts > 0 and draw(st.booleans())
    extra = draw(st.lists(st.integers(0, base.layers - 1), min_size=0 if wide else 1, max_size=4))
    layers = (
        draw(st.permutations([*range(base.layers), *extra])) if extra else list(range(base.layers))
    )
    factor = draw(st.integers(2, 3)) if wide else 1
    order = draw(st.sampled_from(["interleave", "append"]))
    optimizer = draw(st.sampled_from(["rescale", "copy", "reset"]))
    zero = bool(extra) and draw(st.booleans())
    config: dict[str, Any] = {"optimizer": optimizer, "seed": draw(st.integers(0, 5))}
    if extra:
        init = "zero_output" if zero else "copy"
        config["depth"] = {"method": "map", "map": layers, "new_layer_init": init}
    if wide:
        config["width"] = {
            "factor": factor,
            "order": order,
            "noise": {"experts": 0.1, "router": 0.2},
        }
    experts = (interleaved if order == "interleave" else appended)(base.experts, factor)
    growth = Growth(
        tuple(layers),
        experts,
        (("experts", 0.1), ("router", 0.2)),
        zero,
        optimizer,
        config["seed"],
        stacked=draw(st.booleans()),
    )
    return GrowthConfig.model_validate(config), growth


def _boxes(draw: Any, want: dict[str, torch.Tensor]) -> list[tuple[str, Shape, Shape]]:
    boxes = []
    for key in draw(st.lists(st.sampled_from(sorted(want)), min_size=1, max_size=4)):
        low = tuple(draw(st.integers(0, n - 1)) for n in want[key].shape)
        sizes = tuple(
            draw(st.integers(1, n - a)) for n, a in zip(want[key].shape, low, strict=True)
        )
        boxes.append((key, low, sizes))
    return boxes


def _slice(tensor: torch.Tensor, offsets: Shape, sizes: Shape) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


@QUICK
@given(st.data())
def test_any_box_of_any_growth_equals_the_definition_and_no_chunk_is_read_twice(
    data: st.DataObject,
) -> None:
    base = _Base(data.draw)
    config, growth = _growth(data.draw, base)
    want = definition.grown_tensors(base.tensors, growth)
    boxes = _boxes(data.draw, want)
    with tempfile.TemporaryDirectory() as directory:
        bases.save(Path(directory), base.tensors, base.grid, num_files=2)
        source = SourceCheckpoint(directory)
        form = "stacked" if growth.stacked else "per_layer"
        plan = build_plan(config, source.architecture, masters=source.masters, target_form=form)
        recorder = RecordingReader(Path(directory))
        reader = GrowthStorageReader(directory, plan, base=recorder)
        got = load_boxes(reader, boxes, random.Random(0).shuffle)
    compared = 0
    for (key, offsets, sizes), tensor in zip(boxes, got, strict=True):
        expected = _slice(want[key], offsets, sizes)
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), key
        compared += tensor.numel()
    assert compared > 0
    read = [(index.fqn, index.offset) for call in recorder.calls for index in call]
    assert len(read) == len(set(read))


@pytest.mark.parametrize("form", ["stacked", "per_layer"])
def test_reading_everything_reads_each_chunk_of_the_weights_exactly_once(
    tmp_path: Path, form: str
) -> None:
    model = bases.Model(layers=2, experts=2, stacked=form == "stacked", states=("exp_avg",))
    tensors = bases.tensors(model)
    bases.save(tmp_path, tensors, bases.megatron())
    recorder = RecordingReader(tmp_path)
    config = GrowthConfig.model_validate({"depth": {"factor": 3}, "width": {"factor": 3}})
    reader = GrowthStorageReader(tmp_path, config, base=recorder)
    shapes = reader.view.shapes
    load_boxes(
        reader,
        [(key, (0,) * len(shape), shape) for key, shape in shapes.items()],
        random.Random(1).shuffle,
    )
    read = [(index.fqn, index.offset) for call in recorder.calls for index in call]
    saved = [
        (key, c.offsets) for key, t in reader.source.tensors.items() for c in t.metadata.chunks
    ]
    assert sorted(read, key=str) == sorted(saved, key=str)
    assert len(saved) > len(tensors)


def test_a_small_box_reads_only_the_chunks_that_it_needs(tmp_path: Path) -> None:
    key = f"decoder.layers.{FC1}"
    bases.save(tmp_path, bases.tensors(bases.Model()), bases.megatron(tp=2))
    recorder = RecordingReader(tmp_path)
    reader = GrowthStorageReader(
        tmp_path, GrowthConfig.model_validate({"depth": {}, "width": {}}), base=recorder
    )
    load_boxes(
        reader, [(key, (5, 2, 0, 0), (1, 1, 1, 4))]
    )  # an original: one row of one shard of one expert
    assert [(i.fqn, tuple(i.offset or ())) for call in recorder.calls for i in call] == [
        (key, (2, 1, 0, 0))
    ]
    recorder.calls.clear()
    load_boxes(
        reader, [(key, (5, 3, 0, 0), (1, 1, 1, 4))]
    )  # its clone: sigma wants the whole projection
    read = [tuple(i.offset or ()) for call in recorder.calls for i in call]
    assert sorted(read) == [(2, 1, row, 0) for row in (0, 2, 4, 6)]


@pytest.mark.parametrize("batch", [fanout.BATCH_BYTES, 200])
def test_chunks_are_read_in_the_order_in_which_they_lie_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(fanout, "BATCH_BYTES", batch)
    bases.save(tmp_path, bases.tensors(bases.Model()), bases.megatron())
    recorder = RecordingReader(tmp_path)
    reader = GrowthStorageReader(
        tmp_path, GrowthConfig.model_validate({"depth": {}}), base=recorder
    )
    boxes = [(key, (0,) * len(shape), shape) for key, shape in reader.view.shapes.items()]
    load_boxes(reader, boxes, random.Random(2).shuffle)
    infos = [
        reader.source.metadata.storage_data[index] for call in recorder.calls for index in call
    ]
    places = [(info.relative_path, info.offset) for info in infos]
    assert places == sorted(places)
    assert len({name for name, _ in places}) == 3
    assert (len(recorder.calls) > 10) == (batch == 200)
