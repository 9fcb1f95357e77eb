"""What bad input gets: one line that says what, why and what to do; no traceback, no hang, exit
code not 0."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.api import CheckpointException

from megatron_growth import GrowthConfig, GrowthStorageReader
from megatron_growth.config import GrowthFile
from megatron_growth.errors import CheckpointError, GrowthError
from megatron_growth.training import cpu_backend, entry, start
from tests.checkpoint.bases import Model, megatron, objects, save, tensors
from tests.megatron.driver import REPOSITORY

BASE = Model(layers=4, experts=4, states=("param", "exp_avg", "exp_avg_sq"))
GROWTH = {"depth": {"factor": 2}, "width": {"factor": 2}, "optimizer": "reset"}


def checkpoint(folder: Path, model: Model = BASE, **more: Any) -> Path:
    """A Megatron checkpoint directory."""
    save(folder / "iter_0000007", {**tensors(model), **objects(model), **more}, megatron())
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"))


def refusal(
    tmp_path: Path,
    base: Path,
    growth: dict[str, Any],
    argv: list[str] = (),  # type: ignore[assignment]
    settings: dict[str, Any] | None = None,
) -> str:
    """The message with which the entry point refuses; the training itself must never be reached."""
    cpu_backend.install()
    file = tmp_path / "growth.yaml"
    content = {"base": {"load": str(base)}, "growth": growth, "continue": settings or {}}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(GrowthError) as refused:
        entry.train(
            ["--growth-config", str(file), *argv],
            lambda words: pytest.fail(f"trained with {words}"),
        )
    message = str(refused.value)
    assert "\n" not in message
    return message


# growth or command line, and what its refusal says.
CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "factor 1": (
        {"depth": {"factor": 1}},
        [],
        ["growth.depth.factor 1", "at least 2"],
    ),
    "factor 0": ({"width": {"factor": 0}}, [], ["growth.width.factor 0"]),
    "a misspelt key": ({"depht": {}}, [], ["growth.depht", "did you mean 'depth'"]),
    "too few target layers": (
        {"depth": {"target_layers": 4}},
        [],
        ["target_layers (4)", "above", "(4)"],
    ),
    "skips that leave nothing": (
        {"depth": {"skip_first": 2, "skip_last": 2}},
        [],
        ["skip_first (2)", "leave no layer"],
    ),
    "nothing to grow": ({}, [], ["neither `depth` nor `width`"]),
    "EP that does not divide": (
        GROWTH,
        ["--expert-model-parallel-size", "3"],
        ["expert_model_parallel_size (3) must divide num_experts (8)"],
    ),
    "layers against the plan": (
        GROWTH,
        ["--num-layers", "6"],
        ["--num-layers 6 contradicts", "has 8"],
    ),
    "experts against the plan": (
        GROWTH,
        ["--num-experts=16"],
        ["--num-experts 16 contradicts", "has 8"],
    ),
    "top-k against the plan": (
        GROWTH,
        ["--moe-router-topk", "2"],
        ["--moe-router-topk 2 contradicts", "has 4"],
    ),
    "a layer pattern against the plan": (
        GROWTH,
        ["--moe-layer-freq", "[0]+[1]*7"],
        ["--moe-layer-freq", "contradicts"],
    ),
    "another checkpoint format": (
        GROWTH,
        ["--ckpt-format", "torch"],
        ["--ckpt-format 'torch'", "torch_dist"],
    ),
    "an iteration that is not there": (
        GROWTH,
        ["--ckpt-step", "8"],
        ["iter_0000008", "does not exist", "iter_0000007"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_on_one_line(name: str, tmp_path: Path, base: Path) -> None:
    growth, argv, said = CASES[name]
    message = refusal(tmp_path, base, growth, argv)
    for part in said:
        assert part in message


RESCALED = {**GROWTH, "optimizer": "rescale"}


def test_rescale_needs_optimizer_state(tmp_path: Path) -> None:
    bare = checkpoint(tmp_path / "base", Model(layers=4, experts=4))
    assert "needs the base's optimizer state" in refusal(tmp_path, bare, RESCALED)


def test_a_manifest_that_says_nothing(tmp_path: Path, base: Path) -> None:
    run = checkpoint(tmp_path / "run")
    (run / "growth_manifest.json").write_text("{}")
    assert "does not say how" in refusal(tmp_path, base, GROWTH, ["--save", str(run)])


def test_the_base_is_never_the_runs_own_directory(tmp_path: Path, base: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    message = refusal(tmp_path, base, GROWTH, ["--save", str(tmp_path / "link")])
    assert "--load and --save are the same directory" in message


def test_a_missing_base(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path, tmp_path / "nowhere", GROWTH)


def test_a_half_written_base(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "base")
    largest = max((folder / "iter_0000007").glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    assert "is incomplete" in refusal(tmp_path, folder, GROWTH)
    (folder / "iter_0000007" / ".metadata").unlink()
    assert "has no .metadata" in refusal(tmp_path, folder, GROWTH)


def test_width_of_a_dense_base(tmp_path: Path) -> None:
    dense = checkpoint(tmp_path / "base", Model(experts=0))
    assert "needs experts to clone" in refusal(
        tmp_path, dense, {"width": {"factor": 2}, "optimizer": "reset"}
    )


def test_a_key_that_the_grammar_does_not_know(tmp_path: Path) -> None:
    odd = checkpoint(tmp_path / "base", **{"decoder.layers.mlp.gate.weight": torch.zeros(4, 4)})
    assert "'decoder.layers.mlp.gate.weight' cannot be grown" in refusal(tmp_path, odd, GROWTH)


def test_a_run_grown_by_another_configuration_is_not_taken_up(tmp_path: Path, base: Path) -> None:
    run = checkpoint(tmp_path / "run")
    (run / "growth_manifest.json").write_text('{"growth": {"depth": {"factor": 3}}}')
    assert "grown by another configuration" in refusal(tmp_path, base, GROWTH, ["--save", str(run)])


def test_a_release_is_loaded_where_the_tracker_names_it(tmp_path: Path) -> None:
    cpu_backend.install()
    folder = checkpoint(tmp_path / "base")
    (folder / "iter_0000007").rename(folder / "release")
    argv = ["--load", str(folder), "--save", str(tmp_path / "run")]
    config = GrowthFile.model_validate({"base": {"iteration": "release"}, "growth": GROWTH})
    with pytest.raises(CheckpointError, match=r"iter_0000007' does not exist.*release"):
        start.decide(config, argv)  # the tracker still says 7
    (folder / "iter_0000007").mkdir()
    with pytest.raises(CheckpointError, match="names iter_0000007; write 'release' in it"):
        start.decide(config, argv)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    begin = start.decide(config, argv)
    assert begin.source == folder / "release"
    assert "--ckpt-step" not in begin.argv


def started(run: Path, **fields: Any) -> Path:
    """A run that holds a checkpoint, and a manifest with these fields."""
    checkpoint(run)
    (run / "growth_manifest.json").write_text(json.dumps({"growth": GROWTH, **fields}))
    return run


RATE = {"learning_rate": {"peak": 2e-3}}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "how many of these an iteration has is not said; give --global-batch-size"),
        (
            ["--global-batch-size", "8", "--rampup-batch-size", "2", "2", "100"],
            "with --rampup-batch-size [2, 2, 100] iterations are of different sizes",
        ),
        (
            ["--step-batch-size-schedule", "0:4 100:8"],
            "with --step-batch-size-schedule '0:4 100:8' iterations are of different sizes",
        ),
    ],
)
def test_a_schedule_in_iterations_for_a_run_in_samples_of_unknown_number(
    argv: list[str], said: str, tmp_path: Path, base: Path
) -> None:
    settings = {"learning_rate": {"peak": 2e-3, "warmup_iters": 4}}
    words = ["--train-samples", "100", *argv]
    assert said in refusal(tmp_path, base, GROWTH, words, settings)


@pytest.mark.parametrize(
    ("rate", "argv", "words"),
    [
        (
            {"warmup_iters": 4, "decay_iters": 9},
            ["--train-samples", "100", "--global-batch-size", "8"],
            "--lr-warmup-samples 32 --lr-decay-samples 72",
        ),
        ({"warmup_iters": 4}, ["--train-iters", "20"], "--lr-warmup-iters 4"),
        ({}, ["--train-samples", "100"], ""),
    ],
)
def test_a_schedule_is_said_as_the_run_counts(
    rate: dict[str, Any], argv: list[str], words: str, base: Path
) -> None:
    cpu_backend.install()
    settings = {"learning_rate": {"peak": 2e-3, **rate}}
    config = GrowthFile.model_validate({"growth": GROWTH, "continue": settings})
    begun = " ".join(start.decide(config, ["--load", str(base), *argv]).argv)
    lengths = re.findall(r"--lr-(?:warmup|decay)-(?:iters|samples) \d+", begun)
    assert " ".join(lengths) == words
    assert "--lr 0.002" in begun


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({}, RATE, "continue.learning_rate is {'peak': 0.002, 'warmup_iters': 0,"),
        (RATE, {}, "continue.learning_rate is 'keep', but the run in"),
        (
            RATE,
            {"learning_rate": {"peak": 2e-3, "warmup_iters": 9}},
            "was started with {'peak': 0.002, 'warmup_iters': 0,",
        ),
        ({"iteration": "reset"}, {}, "continue.iteration is 'keep', but the run in"),
        ({}, {"data": {"offset": 5}}, "continue.data is {'offset': 5}, but the run in"),
    ],
)
def test_a_restart_with_another_continue_section(
    before: dict[str, Any], after: dict[str, Any], said: str, tmp_path: Path, base: Path
) -> None:
    run = started(tmp_path / "run", **{"continue": before})
    message = refusal(tmp_path, base, GROWTH, ["--save", str(run)], after)
    assert said in message
    assert message.endswith("put it back, or give --save a new directory to grow anew")


@pytest.mark.parametrize("fields", [{}, {"continue": {}}, {"continue": {"data": "keep"}}])
def test_a_restart_as_it_was_started_resumes(
    fields: dict[str, Any], tmp_path: Path, base: Path
) -> None:
    """Also where the manifest is older than the field, or than a part of it."""
    cpu_backend.install()
    run = started(tmp_path / "run", **fields)
    config = GrowthFile.model_validate({"growth": GROWTH})
    begin = start.decide(config, ["--load", str(base), "--save", str(run)])
    assert begin.source is None
    assert "resuming it as it is" in begin.message


def test_another_schedule_than_the_runs_is_one_line() -> None:
    cpu_backend.install()
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    def schedule(rate: float, steps: int) -> OptimizerParamScheduler:
        group = {"lr": 0.0, "params": [], "max_lr": rate}
        return OptimizerParamScheduler(
            SimpleNamespace(param_groups=[group]), 0.0, rate, 0.0, 0, steps, "constant", 0.0, 0.0,
            steps, "constant", use_checkpoint_opt_param_scheduler=False,
        )  # fmt: skip

    def message(rate: float, steps: int) -> str:
        with pytest.raises(AssertionError) as failed:
            schedule(rate, steps).load_state_dict(schedule(1e-3, 100).state_dict())
        return str(entry._cause(failed.value))

    assert message(5e-4, 100).startswith("the run's learning rate is 0.001 but now 0.0005; give ")
    assert "number of iterations, in samples, is 100 but now 200; give " in message(1e-3, 200)
    assert "\n" not in message(1e-3, 200)
    assert entry._cause(AssertionError("of something else")) is None


def test_a_tensor_that_the_checkpoint_lacks_is_named_on_one_line(base: Path) -> None:
    """A run of another precision or optimizer asks for what is not there; upstream lists all."""
    cpu_backend.install()
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner

    wanted = ShardedTensor.from_rank_offsets("optimizer.state.fp32_param.x", torch.zeros(2))
    planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=[wanted])
    reader = GrowthStorageReader(base / "iter_0000007", GrowthConfig.model_validate(GROWTH))
    state = {"decoder.final_layernorm.weight": torch.zeros(4)}
    with pytest.raises(CheckpointException) as failed:
        dcp.load(state, storage_reader=reader, planner=planner, no_dist=True)
    message = str(entry._cause(failed.value))
    assert message.startswith("the run asks for optimizer.state.fp32_param.x, which")
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.parametrize("module", ["megatron_growth.pretrain", "megatron_growth.run"])
def test_all_ranks_stop_and_one_speaks(module: str, tmp_path: Path, base: Path) -> None:
    file = tmp_path / "growth.yaml"
    file.write_text(yaml.safe_dump({"base": {"load": str(base)}, "growth": GROWTH}))
    script = (
        [str(REPOSITORY / "megatron_growth" / "demo" / "train.py")]
        if module.endswith("run")
        else []
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        module,
    ]
    command += [*script, "--growth-config", str(file), "--num-layers", "6"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    (line,) = [
        line for line in done.stderr.splitlines() if line.startswith("megatron_growth: error")
    ]
    assert "--num-layers 6 contradicts" in line
    assert (
        f'File "{REPOSITORY}/megatron_growth' not in done.stderr
    )  # torchrun prints a traceback of its own, not of ours
