"""Our counts of a model that is not there, against Megatron's own."""

from pathlib import Path

import pytest

from megatron_growth.launcher.budget import budget
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.flags import check_flags

EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiments"


@pytest.mark.parametrize(
    "name", ["paper_17b_35b_70b", "qwen3_30b_a3b_width", "mixtral_8x7b_width", "deepseek_v3_style"]
)
def test_weights_gradients_and_optimizer_are_megatrons_own_estimate(name):
    """Megatron's estimator knows fp32 gradients and fp32 optimizer states alone."""
    where = "stages[0]" if name.endswith("width") else "defaults"
    options = ("grad-reduce-in-bf16", "use-precision-aware-optimizer")
    settings = [f"{where}.megatron.{option}=null" for option in options]
    experiment = load_experiment(EXPERIMENTS / f"{name}.yaml", settings)
    links = chain(experiment)
    compared = 0
    for stage, args in zip(budget(experiment, links), check_flags(experiment, links), strict=True):
        from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

        args.padded_vocab_size = experiment.model.vocab_size
        ours = stage.memory.weights + stage.memory.gradients + stage.memory.optimizer
        # Upstream's most loaded shard is 1 / pipeline of the layers and one embedding, as ours.
        assert ours == pytest.approx(compute_weight_and_optimizer_memory(args), rel=0.01)
        compared += 1
    assert compared == len(links)
