"""The whole road on one GPU: bf16, NCCL, Megatron's own optimizer path, nothing of the CPU backend.

With Transformer Engine where it is installed, else with `--transformer-impl local`. What the GPU
holds after the load is compared bit for bit with the definition, which runs on the CPU: growth
gives the same bits on both.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from megatron_growth.training import cpu_backend
from tests.megatron.driver import Job, Result, run_jobs
from tests.megatron.test_growth import DEPTH, WIDTH, config_file, options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

HAVE_TE = importlib.util.find_spec("transformer_engine") is not None
LOCAL = [
    "--transformer-impl",
    "local",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-persist-layer-norm",
    "--no-rope-fusion",
    "--attention-backend",
    "unfused",
]
RUN = [
    "--micro-batch-size",
    "1",
    "--global-batch-size",
    "8",
    "--mock-data",
    "--num-workers",
    "0",
    "--eval-iters",
    "0",
    "--eval-interval",
    "1000",
    "--log-interval",
    "1",
    "--bf16",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "127",
    "--lr",
    "1e-3",
    "--lr-decay-style",
    "constant",
    "--save-interval",
    "6",
]
MODEL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--num-attention-heads",
    "4",
    "--ffn-hidden-size",
    "128",
    "--num-experts",
    "4",
    "--moe-router-topk",
    "2",
    "--moe-ffn-hidden-size",
    "64",
    "--moe-token-dispatcher-type",
    "alltoall",
    "--normalization",
    "RMSNorm",
    "--swiglu",
    "--position-embedding-type",
    "rope",
    "--disable-bias-linear",
    "--untie-embeddings-and-output-weights",
    "--seq-length",
    "32",
    "--max-position-embeddings",
    "32",
    "--moe-aux-loss-coeff",
    "0.01",
    "--hidden-dropout",
    "0",
    "--attention-dropout",
    "0",
    "--moe-router-dtype",
    "fp32",
]


DISTRIBUTED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """With the distributed optimizer, whose state a machine without either library could not
    load: grown, stopped, and started again."""
    folder: Path = tmp_path_factory.mktemp("gpu_distributed")
    base, run = folder / "base", [*RUN, *LOCAL, *DISTRIBUTED]
    growth = {"depth": DEPTH, "width": WIDTH, "optimizer": "rescale"}
    file = config_file(folder / "growth.yaml", base, growth)
    grown = ["--growth-config", file, *run, "--train-iters", "12", "--save", str(folder / "run")]
    jobs = [
        Job("base", [*MODEL, *run, "--train-iters", "6", "--save", str(base)]),
        Job(
            "grown",
            [*grown, "--exit-interval", "9"],
            after_setup="tests.megatron.probes:optimizer_steps",
            options=options(base, growth, stacked=True),
        ),
        Job("again", grown),
    ]
    return run_jobs(1, jobs, timeout=600, directory=folder / "driver")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder: Path = tmp_path_factory.mktemp("gpu")
    base, run = folder / "base", [*RUN, *([] if HAVE_TE else LOCAL)]
    jobs = [Job("base", [*MODEL, *run, "--train-iters", "6", "--save", str(base)])]
    for rule in ("reset", "rescale"):
        growth = {"depth": DEPTH, "width": WIDTH, "optimizer": rule}
        file = config_file(folder / f"{rule}.yaml", base, growth)
        jobs.append(
            Job(
                rule,
                ["--growth-config", file, *run, "--train-iters", "12"],
                after_setup="tests.megatron.probes:compare",
                options=options(base, growth, stacked=True),
            )
        )
    return run_jobs(1, jobs, timeout=600, directory=folder / "driver")


def test_the_cpu_backend_is_off() -> None:
    assert not cpu_backend.needed()
    assert cpu_backend.arguments([]) == []


@pytest.mark.parametrize("rule", ["reset", "rescale"])
def test_the_gpu_holds_the_bits_that_the_cpu_computes(rule: str, runs: dict[str, Result]) -> None:
    (found,) = runs[rule].after_setup
    assert found["wrong"] == []
    assert found["elements"] > 100_000


@pytest.mark.skipif(
    HAVE_TE or importlib.util.find_spec("apex") is not None,
    reason="Transformer Engine or Apex is installed, so Megatron's own fused Adam is used",
)
def test_a_machine_with_neither_library_loads_the_distributed_optimizers_state(
    distributed: dict[str, Result],
) -> None:
    (found,) = distributed["grown"].after_setup
    assert found["wrong"] == []
    assert found["steps"] == [6]
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in found["held"])
    assert distributed["grown"].iterations == [7, 8, 9]
    assert distributed["again"].iterations == [10, 11, 12]
    assert all(map(math.isfinite, distributed["again"].losses))
    assert distributed["again"].losses[-1] < distributed["grown"].losses[0]


@pytest.mark.parametrize("rule", ["reset", "rescale"])
def test_training_goes_on(rule: str, runs: dict[str, Result]) -> None:
    assert runs[rule].iterations == [7, 8, 9, 10, 11, 12]
    assert all(map(math.isfinite, runs[rule].losses))
    assert runs[rule].losses[-1] < runs[rule].losses[0]
