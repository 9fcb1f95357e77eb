"""The environment follows the layout."""

import pytest

from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.environment import environment, modules
from megatron_growth.launcher.experiment import load_experiment
from tests.launcher.experiments import write


def of(tmp_path, *settings):
    experiment = load_experiment(write(tmp_path), settings)
    return environment(chain(experiment)[1], experiment.cluster)


OVERLAP = "stages[1].megatron.overlap-moe-expert-parallel-comm=true"


@pytest.mark.parametrize(
    ("settings", "connections"),
    [
        ((), "8"),
        (("stages[1].layout.tensor=2",), "1"),
        (("stages[1].layout.context=2",), "1"),
        ((OVERLAP,), "32"),
        ((OVERLAP, "stages[1].layout.tensor=2"), "32"),
        (("cluster.environment={CUDA_DEVICE_MAX_CONNECTIONS: 4}",), "4"),
    ],
)
def test_queues_of_a_device_follow_the_layout(tmp_path, settings, connections):
    assert of(tmp_path, *settings)["CUDA_DEVICE_MAX_CONNECTIONS"] == connections


def test_the_fabric_is_the_clusters_and_wins(tmp_path):
    found = of(tmp_path, "cluster.environment={NCCL_IB_HCA: mlx5, NCCL_NVLS_ENABLE: 1}")
    assert (found["NCCL_IB_HCA"], found["NCCL_NVLS_ENABLE"]) == ("mlx5", "1")


def test_hybrid_ep_is_told_its_domain(tmp_path):
    name = "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN"
    assert name not in of(tmp_path)
    assert of(tmp_path, "stages[1].megatron.moe-flex-dispatcher-backend=hybridep")[name] == "2"


def test_overlap_leaves_multiprocessors_to_communication(tmp_path):
    assert "NVTE_FWD_LAYERNORM_SM_MARGIN" not in of(tmp_path)
    assert of(tmp_path, OVERLAP)["NVTE_FWD_LAYERNORM_SM_MARGIN"] == "16"


def test_a_cpu_sees_no_gpu(tmp_path):
    found = of(tmp_path, "cluster.device=cpu")
    assert found == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


FLEX = "{0}.megatron.moe-token-dispatcher-type=flex"
HYBRID = "stages[1].megatron.moe-flex-dispatcher-backend=hybridep"
ENGINE = "transformer_engine.pytorch"


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ((), [ENGINE]),
        (("stages[1].megatron.transformer-impl=local",), []),
        ((FLEX.format("stages[1]"),), [ENGINE, "deep_ep:Buffer"]),
        ((FLEX.format("stages[1]"), HYBRID), [ENGINE, "deep_ep:HybridEPBuffer"]),
        ((HYBRID,), [ENGINE]),
        ((FLEX.format("model"),), [ENGINE, "deep_ep:Buffer"]),
        ((FLEX.format("stages[0]"),), [ENGINE, "deep_ep:Buffer"]),
        ((FLEX.format("stages[2]"),), [ENGINE]),
        (
            (FLEX.format("model"), "stages[1].megatron.moe-token-dispatcher-type=alltoall"),
            [ENGINE],
        ),
        (("cluster.device=cpu",), []),
    ],
)
def test_the_modules_that_a_stage_needs_follow_its_options_and_those_of_its_base(
    tmp_path, settings, needed
):
    experiment = load_experiment(write(tmp_path), settings)
    assert modules(experiment, chain(experiment)[1]) == needed
