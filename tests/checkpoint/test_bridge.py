"""A checkpoint of Megatron-Bridge has no arguments; what it says of its model becomes them, or is
refused. That Megatron agrees is in tests/megatron/test_bridge.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.checkpoint.source import COMMON_OBJECT, SourceCheckpoint
from megatron_growth.checkpoint.write import Crew, Draft, grow
from megatron_growth.errors import CheckpointError
from megatron_growth.report.inspection import inspect_checkpoint
from tests.checkpoint import bases
from tests.checkpoint.bridged import QWEN3, run_config, without_arguments

MODEL = bases.Model(layers=4, experts=8, vocab=300, mtp=False)
BOTH = GrowthConfig.model_validate({"depth": {}, "width": {}, "optimizer": "reset"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bridge") / "iter_0000000"
    bases.save(directory, {**bases.tensors(MODEL), **bases.objects(MODEL)})
    without_arguments(directory)
    return directory


@pytest.fixture
def base(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "base" / "iter_0000000"))


def test_its_fields_are_megatrons_arguments(base: Path) -> None:
    run_config(base, QWEN3)
    source = SourceCheckpoint(base)
    args = vars(source.required_args())
    assert source.described_in == "run_config.yaml"
    expected = {
        "num_layers": 4, "num_experts": 8, "moe_router_topk": 2, "kv_channels": 32,
        "num_query_groups": 2, "group_query_attention": True, "swiglu": True, "qk_layernorm": True,
        "untie_embeddings_and_output_weights": True, "use_rope_scaling": False, "bf16": True,
        "layernorm_epsilon": 1e-6, "rotary_base": 1000000, "max_position_embeddings": 256,
        "padded_vocab_size": 300, "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "qwen3", "no_save_optim": True, "no_save_rng": True,
    }  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert type(args["rotary_base"]) is int  # as Megatron's option takes it
    # A run says its own; and nothing that is an object there passes for a value.
    assert not args.keys() & {"seq_length", "vocab_size", "num_moe_experts", "attention_backend"}
    assert source.architecture.top_k == 2


@pytest.mark.parametrize(
    ("groups", "expected"), [(None, (False, 4)), (4, (False, 4)), (1, (True, 1))]
)
def test_heads_share_keys_only_where_they_are_more(
    base: Path, groups: int | None, expected: tuple[bool, int]
) -> None:
    run_config(base, {**QWEN3, "num_query_groups": groups})
    args = SourceCheckpoint(base).args
    assert (args.group_query_attention, args.num_query_groups) == expected


def test_what_grows_from_it_says_its_own_arguments(base: Path, tmp_path: Path) -> None:
    run_config(base, QWEN3)
    (state,) = _common_state(GrowthStorageReader(base, BOTH))
    found = [state["args"]]
    with Crew(1) as crew:
        grow(Draft(base, BOTH, "copy"), tmp_path / "grown", crew=crew)
    written = SourceCheckpoint(tmp_path / "grown" / "iter_0000000")
    assert written.described_in is None
    found.append(written.args)
    for args in found:
        assert (args.num_layers, args.num_experts, args.moe_router_topk) == (8, 16, 4)
        assert args.no_save_rng
    assert state["iteration"] == 0


def _common_state(reader: GrowthStorageReader) -> list[dict[str, Any]]:
    state: dict[str, Any] = {COMMON_OBJECT: None}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return list(state[COMMON_OBJECT])


def test_before_megatron_core_0_19_it_lay_in_a_file_too(base: Path) -> None:
    shutil.rmtree(base)
    bases.save(base, bases.tensors(MODEL))
    torch.save({"iteration": 0}, base / "common.pt")
    run_config(base, QWEN3)
    assert SourceCheckpoint(base).args.num_experts == 8


def test_arguments_of_its_own_are_believed(tmp_path: Path) -> None:
    bases.save(tmp_path, {**bases.tensors(MODEL), **bases.objects(MODEL)})
    run_config(tmp_path, {**QWEN3, "hidden_size": 9})
    source = SourceCheckpoint(tmp_path)
    assert source.described_in is None
    assert source.args.hidden_size == MODEL.hidden


def test_a_window_is_the_pair_that_megatrons_option_takes(base: Path) -> None:
    run_config(base, {**QWEN3, "window_size": [127, 0]})
    assert SourceCheckpoint(base).args.window_size == (127, 0)


OLMOE = "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a model class of its own": (
        {"_target_": "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider"},
        "model._target_ 'megatron.bridge.models.gemma.",
    ),
    "layers of its own": (
        {"transformer_layer_spec": {"_call_": False, "_target_": OLMOE}},
        f"model.transformer_layer_spec '{OLMOE}' in ",
    ),
    "another activation": (
        {"activation_func": {"_target_": "torch.nn.functional.gelu"}},
        "model.activation_func 'torch.nn.functional.gelu'",
    ),
    "no gate": ({"gated_linear_unit": False}, "model.gated_linear_unit False"),
    "yarn": ({"position_embedding_type": "yarn"}, "model.position_embedding_type 'yarn'"),
    "positions that it does not say": (
        {"position_embedding_type": None},
        "model.position_embedding_type None",
    ),
    "a scale": ({"softmax_scale": 0.1}, "model.softmax_scale 0.1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_no_arguments_describe_has_none(base: Path, case: str) -> None:
    changed, says = REFUSED[case]
    run_config(base, QWEN3 | changed)
    source = SourceCheckpoint(base)
    assert source.args is None
    assert source.architecture.num_experts == 8  # it can still be looked at
    assert inspect_checkpoint(source).architecture is not None
    message = _refusal(source)
    assert "has no Megatron arguments, so the model is not known; " + says in message
    assert "run_config.yaml' is of a model that" in message


def test_a_training_run_of_its_own_is_not_continued(base: Path) -> None:
    run_config(base, QWEN3, train={"train_iters": 100})
    assert "is of a training run of Megatron-Bridge" in _refusal(SourceCheckpoint(base))


@pytest.mark.parametrize("text", ["", "model: 3", "{model: {}", "[]", "\x00"])
def test_a_damaged_file_is_said(base: Path, text: str) -> None:
    (base / "run_config.yaml").write_text(text)
    assert "run_config.yaml' describes no model; restore it" in _refusal(SourceCheckpoint(base))


def test_without_the_file_there_are_no_arguments(base: Path) -> None:
    assert "use a checkpoint that Megatron's training saved" in _refusal(SourceCheckpoint(base))


def test_one_whose_tensors_are_others_is_refused(base: Path) -> None:
    run_config(base, {**QWEN3, "num_layers": 5})
    with pytest.raises(CheckpointError, match=r"arguments say num_layers 5 but .* has 4"):
        _ = SourceCheckpoint(base).architecture


def _refusal(source: SourceCheckpoint) -> str:
    with pytest.raises(CheckpointError) as refusal:
        source.required_args()
    assert source.args is None
    assert "\n" not in str(refusal.value)
    return str(refusal.value)
