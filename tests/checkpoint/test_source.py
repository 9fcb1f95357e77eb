"""What cannot be grown is refused before anything else happens, by name, with the remedy, on one
line."""

import json
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.errors import CheckpointError, PlanError
from megatron_growth.planning.plan import Architecture
from tests.checkpoint import bases
from tests.checkpoint.bases import COMMON_STATE, FC1, Model
from tests.checkpoint.loading import load_all

GROWTH = GrowthConfig.model_validate({"depth": {}, "width": {}})
MODEL = Model(layers=2, experts=2, mtp=False)
FLAT = (
    "optimizer.distributed.dp_group_idx_0."
    "gbuf_idx_0.dtype_(torch.float32, torch.float32).bucket_idx_0"
)
BUFFER = f"{FLAT}.exp_avg"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong, to be copied and then damaged."""
    directory = tmp_path_factory.mktemp("sound") / "iter_0000007"
    return bases.save(directory, {**bases.tensors(MODEL), **bases.objects(MODEL)})


@pytest.fixture
def base(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "iter_0000007"))


def _refusal(directory: Path, growth: GrowthConfig = GROWTH) -> str:
    with pytest.raises(CheckpointError) as refusal:
        GrowthStorageReader(directory, growth).read_metadata()
    message = str(refusal.value)
    assert "\n" not in message
    return message


def _with(directory: Path, **state: Any) -> Path:
    """A sound checkpoint with more in it, or other things."""
    return bases.save(directory, {**bases.tensors(MODEL), **bases.objects(MODEL), **state})


def _edit(directory: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_sound_checkpoint_is_opened_and_known(base: Path) -> None:
    source = SourceCheckpoint(base)
    assert source.architecture == Architecture(
        num_layers=2, num_experts=2, top_k=2, key_form="stacked"
    )
    assert (source.optimizer_states, source.masters) == ((), None)
    assert source.args == MODEL.args
    assert source.tensors.keys() == bases.shapes(MODEL).keys()
    assert source.objects.keys() == bases.objects(MODEL).keys()


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        (Model(layers=4, experts=3), Architecture(4, 3, 2, "stacked")),
        (Model(layers=3, experts=2, stacked=False, dense=(0,)), Architecture(3, 2, 2, "per_layer")),
        (Model(layers=3, experts=0), Architecture(3, 0, None, "stacked")),
    ],
)
def test_the_architecture_is_read_off_the_tensors(
    tmp_path: Path, model: Model, architecture: Architecture
) -> None:
    bases.save(tmp_path / "with", {**bases.tensors(model), **bases.objects(model)})
    assert SourceCheckpoint(tmp_path / "with").architecture == architecture
    bases.save(tmp_path / "without", bases.tensors(model))
    bare = SourceCheckpoint(tmp_path / "without")
    assert bare.common_state is None
    assert bare.architecture == replace(architecture, top_k=None)


@pytest.mark.parametrize(
    ("states", "masters"),
    [
        (("param", "exp_avg"), "param"),
        (("fp32_param", "exp_avg_sq"), "fp32_param"),
        (("exp_avg",), None),
    ],
)
def test_masters_are_found_where_there_are_any(
    tmp_path: Path, states: tuple[str, ...], masters: str | None
) -> None:
    model = Model(layers=1, experts=1, mtp=False, states=states)
    source = SourceCheckpoint(bases.save(tmp_path, bases.tensors(model)))
    assert source.optimizer_states == tuple(sorted(states))
    assert source.masters == masters


# -- the directory


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere"
    assert _refusal(path) == f"checkpoint {str(path)!r} does not exist; give an iter_* directory"


def test_the_parent_of_an_iteration_is_refused_with_a_hint(base: Path) -> None:
    parent = base.parent
    (parent / "latest_checkpointed_iteration.txt").write_text("7")
    assert _refusal(parent) == (
        f"checkpoint {str(parent)!r} has no .metadata: it is no torch_dist checkpoint, "
        "or its save did not finish; "
        "give one of its iter_* directories, named in latest_checkpointed_iteration.txt"
    )


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert _refusal(tmp_path) == (
        f"checkpoint {str(tmp_path)!r} has no .metadata: it is no torch_dist checkpoint, "
        "or its save did not finish; "
        "use another iteration, or save it with --ckpt-format torch_dist"
    )


def test_an_iteration_is_found_by_number_by_name_and_as_the_latest(base: Path) -> None:
    load = base.parent
    assert iteration_directory(load, 7) == base
    (load / "latest_checkpointed_iteration.txt").write_text("7\n")
    assert iteration_directory(load) == iteration_directory(load, "latest") == base
    (load / "release").mkdir()
    (load / "latest_checkpointed_iteration.txt").write_text("release")
    assert iteration_directory(load) == load / "release"
    assert iteration_directory(load, "release") == load / "release"


@pytest.mark.parametrize(
    ("tracker", "iteration", "expected"),
    [
        (
            None,
            "latest",
            "has no latest_checkpointed_iteration.txt; training has saved nothing there yet",
        ),
        ("8", "latest", "iter_0000008' does not exist; iterations there: iter_0000007"),
        ("seven", "latest", "holds 'seven', not an iteration; write the iteration's number in it"),
        ("", "latest", "holds '', not an iteration; write the iteration's number in it"),
        ("7", 9, "iter_0000009' does not exist; iterations there: iter_0000007"),
    ],
)
def test_an_iteration_that_is_not_there_is_refused(
    base: Path, tracker, iteration, expected: str
) -> None:
    if tracker is not None:
        (base.parent / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(CheckpointError) as refusal:
        iteration_directory(base.parent, iteration)
    assert str(refusal.value).endswith(expected)
    assert "\n" not in str(refusal.value)


def test_a_load_directory_that_is_missing_or_an_iteration_itself_is_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; give the one that holds latest_"):
        iteration_directory(base / "nowhere")
    with pytest.raises(
        CheckpointError,
        match=r"has no latest_checkpointed_iteration\.txt; give its parent directory",
    ):
        iteration_directory(base)


# -- half-written and damaged


def test_a_save_that_did_not_come_to_its_metadata_is_refused(base: Path) -> None:
    (base / ".metadata").unlink()
    assert "has no .metadata" in _refusal(base)


@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_metadata_is_refused(base: Path, share: float) -> None:
    content = (base / ".metadata").read_bytes()
    (base / ".metadata").write_bytes(content[: int(share * len(content))])
    message = _refusal(base)
    assert message.startswith(f"the .metadata of checkpoint {str(base)!r} cannot be read (")
    assert message.endswith("its save did not finish or it is damaged: use another iteration")


@pytest.mark.parametrize(
    "content", [b"\0" * 4096, b"not a pickle\nat all\n", pickle.dumps({"a": 1}), pickle.dumps(None)]
)
def test_metadata_that_is_something_else_is_refused(base: Path, content: bytes) -> None:
    (base / ".metadata").write_bytes(content)
    assert "cannot be read" in _refusal(base)


def test_a_truncated_data_file_is_refused(base: Path) -> None:
    victim = sorted(base.glob("*.distcp"))[1]
    size = victim.stat().st_size
    victim.write_bytes(victim.read_bytes()[:-1000])
    assert _refusal(base) == (
        f"checkpoint {str(base)!r} is incomplete: {victim.name} has {size - 1000} bytes of {size}; "
        "use another iteration or restore the file"
    )


def test_a_missing_data_file_is_refused(base: Path) -> None:
    victim = sorted(base.glob("*.distcp"))[-1]
    victim.unlink()
    assert _refusal(base) == (
        f"checkpoint {str(base)!r} is incomplete: {victim.name} is missing; "
        "use another iteration or restore the file"
    )


def test_ranks_of_a_job_share_out_the_files_and_one_of_them_finds_what_is_missing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "2")
    victim = sorted(base.glob("*.distcp"))[1]
    victim.write_bytes(victim.read_bytes()[:-1000])
    monkeypatch.setenv("RANK", "0")
    SourceCheckpoint(base)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(CheckpointError, match="is incomplete"):
        SourceCheckpoint(base)


def test_metadata_is_read_once(base: Path) -> None:
    """It takes seconds where a base is large."""
    reader = _CountingReader(base)
    grown = GrowthStorageReader(base, GROWTH, reader)
    assert grown.source.common_state
    load_all(grown)
    assert reader.count == 1


class _CountingReader(FileSystemReader):
    count = 0

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.count += 1
        return super().read_metadata(*args, **kwargs)


def test_a_tensor_that_lacks_a_chunk_is_refused(tmp_path: Path) -> None:
    bases.save(tmp_path, bases.tensors(MODEL), bases.megatron())
    key = f"decoder.layers.{FC1}"
    _edit(tmp_path, lambda metadata: metadata.state_dict_metadata[key].chunks.pop())
    assert _refusal(tmp_path) == (
        f"the chunks of {key} hold 120 of its 128 elements; the checkpoint is damaged: use another "
        "iteration"
    )


def test_a_chunk_that_leaves_its_tensor_is_refused(tmp_path: Path) -> None:
    bases.save(tmp_path, bases.tensors(MODEL), bases.megatron())
    key = f"decoder.layers.{FC1}"

    def move(metadata: Metadata) -> None:
        chunks = metadata.state_dict_metadata[key].chunks
        chunks[-1] = replace(chunks[-1], offsets=torch.Size((2, 0, 0, 0)))

    _edit(tmp_path, move)
    assert _refusal(tmp_path).startswith(f"the chunks of {key} hold 128 of its 128 elements")


def test_a_common_state_that_cannot_be_read_is_refused(base: Path) -> None:
    metadata = FileSystemReader(base).read_metadata()
    (info,) = [info for index, info in metadata.storage_data.items() if index.fqn == COMMON_STATE]
    content = bytearray((base / info.relative_path).read_bytes())
    content[info.offset : info.offset + info.length] = b"\0" * info.length
    (base / info.relative_path).write_bytes(content)
    message = _refusal(base)
    assert message.startswith(f"the common state of checkpoint {str(base)!r} cannot be read (")
    assert message.endswith("it is damaged: use another iteration")


# -- other formats


def test_the_legacy_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_00_000").mkdir()
    assert _refusal(tmp_path) == (
        f"checkpoint {str(tmp_path)!r} is the legacy `torch` format, which cannot be grown; "
        "save it with --ckpt-format torch_dist"
    )


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor", "torch_dcp"])
def test_other_backends_are_refused_by_name(base: Path, backend: str) -> None:
    (base / "metadata.json").write_text(
        json.dumps({"sharded_backend": backend, "sharded_backend_version": 1})
    )
    assert _refusal(base) == (
        f"checkpoint {str(base)!r} is of format {backend!r}, which cannot be grown; "
        "save it with --ckpt-format torch_dist"
    )


def test_the_torch_dist_backend_is_taken(base: Path) -> None:
    (base / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    assert GrowthStorageReader(base, GROWTH).read_metadata().state_dict_metadata


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_a_damaged_metadata_json_is_refused(base: Path, content: str) -> None:
    (base / "metadata.json").write_text(content)
    assert _refusal(base) == (
        f"{str(base / 'metadata.json')!r} is damaged; restore it from another copy of the "
        "checkpoint"
    )


# -- keys and models


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    message = _refusal(_with(tmp_path, **{"decoder.layers.mlp.mystery.weight": torch.zeros(2, 3)}))
    assert message.startswith(
        "checkpoint key 'decoder.layers.mlp.mystery.weight' cannot be grown: "
    )


def test_an_unknown_object_is_refused_by_name(tmp_path: Path) -> None:
    message = _refusal(_with(tmp_path, **{"mystery/shard_0_1": ["?"]}))
    assert message.startswith("checkpoint key 'mystery' cannot be grown: ")


def test_flat_optimizer_buffers_are_refused_with_both_remedies(tmp_path: Path) -> None:
    message = _refusal(_with(tmp_path, **{BUFFER: torch.zeros(9)}))
    assert message.startswith(f"checkpoint key {BUFFER!r} cannot be grown: ")
    assert "--dist-ckpt-optim-fully-reshardable" in message
    assert "`optimizer: reset`" in message


def test_the_remedy_named_for_flat_optimizer_buffers_works(tmp_path: Path) -> None:
    """Megatron's default optimizer format: its weights grow where the moments are dropped
    anyway."""
    object_key = f"{FLAT}.per_bucket_numel/shard_0_1"
    base = _with(tmp_path, **{BUFFER: torch.zeros(9), object_key: [9]})
    reset = GrowthConfig.model_validate({"depth": {}, "width": {}, "optimizer": "reset"})
    tensors, _ = load_all(GrowthStorageReader(base, reset))
    assert tensors.keys() == bases.shapes(MODEL).keys()


def test_a_hybrid_model_is_refused_as_such(tmp_path: Path) -> None:
    """Its final norm has a key of its own, which must not be what the message is about."""
    state = [{"args": Namespace(hybrid_layer_pattern="*E*E", num_layers=4)}]
    norm, qkv = "decoder.final_norm.weight", "decoder.layers.0.self_attention.linear_qkv.weight"
    tensors = {norm: torch.zeros(4), qkv: torch.zeros(12, 4)}
    bases.save(tmp_path, {**tensors, COMMON_STATE: state})
    assert _refusal(tmp_path) == (
        f"checkpoint {str(tmp_path)!r} is a hybrid model (pattern '*E*E'), which cannot be grown "
        "yet; grow a GPT model"
    )


def test_a_checkpoint_without_decoder_layers_is_refused(tmp_path: Path) -> None:
    bases.save(tmp_path, {"embedding.word_embeddings.weight": torch.zeros(3, 2)})
    assert _refusal(tmp_path) == (
        f"checkpoint {str(tmp_path)!r} has no decoder.layers tensor; it is no GPT model that can "
        "be grown"
    )


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    bases.save(tmp_path, {COMMON_STATE: [{"iteration": 1}]})
    assert (
        _refusal(tmp_path)
        == f"checkpoint {str(tmp_path)!r} holds no tensor; nothing can be grown from it"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 5}, "the checkpoint's arguments say num_layers 5 but decoder.layers."),
        (
            {"num_experts": 8},
            "the checkpoint's arguments say num_experts 8 but decoder.layers.mlp.",
        ),
    ],
)
def test_arguments_that_contradict_the_tensors_are_refused(
    tmp_path: Path, changes: dict, expected: str
) -> None:
    args = Namespace(**{**vars(MODEL.args), **changes})
    message = _refusal(_with(tmp_path, **{COMMON_STATE: [{"args": args}]}))
    assert message.startswith(expected)
    assert message.endswith("has 2; they disagree: use a checkpoint whose save finished")


def test_layers_with_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    key = "decoder.layers.{}." + FC1
    bases.save(tmp_path, {key.format(0): torch.zeros(2, 4, 4), key.format(1): torch.zeros(3, 4, 4)})
    with pytest.raises(PlanError) as refusal:
        GrowthStorageReader(tmp_path, GROWTH).read_metadata()
    assert "layers with different numbers of experts cannot be grown" in str(refusal.value)


def test_a_common_state_in_a_file_of_its_own_is_read(tmp_path: Path) -> None:
    """As megatron-core before 0.19 wrote it."""
    bases.save(tmp_path, bases.tensors(MODEL))
    torch.save({"args": MODEL.args, "iteration": 3}, tmp_path / "common.pt")
    source = SourceCheckpoint(tmp_path)
    assert source.common_state == {"args": MODEL.args, "iteration": 3}
    assert source.architecture.top_k == 2
    (tmp_path / "common.pt").write_bytes(b"damaged")
    assert "the common state of checkpoint" in _refusal(tmp_path)
