"""Megatron's own judgement of a command line, for an H100 that is not there."""
# ruff: noqa: E501 (the table of mistakes has one on each line)

import os

import pytest
import torch

from megatron_growth.errors import ConfigError
from megatron_growth.launcher.arguments import stage_arguments
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.flags import check_flags
from megatron_growth.training.flag_check import check, hopper
from tests.launcher.experiments import CONTENT, write

FUSED = {
    "bf16": True, "transformer-impl": "transformer_engine", "moe-grouped-gemm": True,
    "moe-permute-fusion": True, "moe-router-fusion": True, "overlap-grad-reduce": True,
    "overlap-param-gather": True, "moe-token-dispatcher-type": "alltoall",
}  # fmt: skip


def argv(tmp_path):
    content = {**CONTENT, "defaults": {**CONTENT["defaults"], "megatron": FUSED}}
    experiment = load_experiment(write(tmp_path, content))
    return stage_arguments(experiment, chain(experiment)[0])


def checked(tmp_path, *more, **environment):
    return check([*argv(tmp_path), *more], world_size=8, environment=environment)


def test_what_an_h100_with_transformer_engine_takes_is_taken(tmp_path):
    args = checked(tmp_path, "--expert-model-parallel-size", "4")
    assert (args.world_size, args.data_parallel_size, args.num_experts) == (8, 8, 8)


# What each mistake would cost: a job that waits for its nodes and dies in its first minute.
MISTAKES = [
    ("--no-such-option", "Megatron's parser refuses: unrecognized arguments: --no-such-option"),
    ("--micro-batch-size x", "Megatron's parser refuses: argument --micro-batch-size: invalid int"),
    ("--global-batch-size 12", "must be divisible by"),
    ("--expert-model-parallel-size 5", "multiple of expert model parallel_size"),
    ("--tensor-model-parallel-size 2 --sequence-parallel", "CUDA_DEVICE_MAX_CONNECTIONS to 1"),
    ("--cross-entropy-loss-fusion --cross-entropy-fusion-impl te", "Use --cross-entropy-fusion-impl native"),
    ("--pipeline-model-parallel-size 4 --overlap-moe-expert-parallel-comm --expert-model-parallel-size 2",
     "virtual_pipeline_model_parallel_size must be specified"),
    ("--expert-model-parallel-size 2 --overlap-moe-expert-parallel-comm --recompute-granularity full "
     "--recompute-method uniform --recompute-num-layers 1", "disable full recomputation"),
    ("--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 3",
     "pipeline (4) x virtual (3) = 12 must divide the layers (4); with this pipeline, virtual can be [1]"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "says"), MISTAKES)
def test_a_mistake_is_one_line(tmp_path, more, says):
    with pytest.raises(ConfigError) as refusal:
        checked(tmp_path, *more.split())
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_environment_of_the_job_is_what_counts(tmp_path):
    before = dict(os.environ)
    more = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    assert checked(tmp_path, *more, CUDA_DEVICE_MAX_CONNECTIONS="1")
    assert dict(os.environ) == before


def test_the_environment_of_whoever_submits_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    more = ("--tensor-model-parallel-size", "2", "--sequence-parallel")
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS to 1"):
        checked(tmp_path, *more)


def test_nothing_is_left_of_the_device_that_is_not_there():
    before = torch.cuda.get_device_capability
    with hopper():
        assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_capability is before


def test_a_refused_stage_is_named(tmp_path):
    content = {**CONTENT, "defaults": {**CONTENT["defaults"], "megatron": FUSED}}
    path = write(tmp_path, content)
    experiment = load_experiment(path, ["stages[1].layout={pipeline: 2, virtual: 3}"])
    with pytest.raises(ConfigError, match=r"^stages\[1\]\.layout\.virtual 3: does not divide"):
        check_flags(experiment, chain(experiment))


def test_a_grown_stage_is_checked_with_what_growth_puts_in(tmp_path):
    content = {**CONTENT, "defaults": {**CONTENT["defaults"], "megatron": FUSED}}
    experiment = load_experiment(write(tmp_path, content))
    base, deep, wide = check_flags(experiment, chain(experiment))
    assert (base.num_layers, deep.num_layers, wide.num_layers) == (4, 8, 8)
    assert (wide.num_experts, wide.moe_router_topk) == (16, 4)
    assert wide.position_embedding_type == "rope"
    assert wide.lr == base.lr == 1.0e-3
