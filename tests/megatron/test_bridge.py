"""A checkpoint of Megatron's, made what Megatron-Bridge would have written, is read as Megatron
described it, and grows.

The weights are Megatron's own: that Bridge converts them rightly is Bridge's to test.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_growth import GrowthConfig, cli
from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.checkpoint.reader import plan_for
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import GrowthFile
from megatron_growth.training import cpu_backend, start
from megatron_growth.training.arguments import ARCHITECTURE, INHERITED
from megatron_growth.training.load_hook import growth_on_load
from tests.checkpoint.bases import Model, save, tensors
from tests.checkpoint.bridged import QWEN3, run_config, without_arguments
from tests.megatron.driver import Job, Result, run_jobs
from tests.megatron.test_bad_input import refusal
from tests.megatron.test_cpu_backend import EP2, MODEL, NO_DROPOUT
from tests.megatron.test_growth import DEPTH, EXACT_WIDTH, RUN, WIDTH, config_file, options

GROWTH: dict[str, Any] = {"depth": DEPTH, "width": WIDTH}
RESET = {"optimizer": "reset"}
SETTINGS = {"iteration": "reset", "data": "reset", "learning_rate": {"peak": 1e-3}}

# A run's own, of which an import knows nothing; without them Megatron's defaults hold.
_OF_A_RUN = {"seq_length", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "seed",
             "use_distributed_optimizer"}  # fmt: skip
# Not of the models that are read: other attention, other activations, other rope.
_OF_OTHERS = {
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type",
    "mscale", "mscale_all_dim", "squared_relu", "openai_gelu", "quick_geglu",
}  # fmt: skip
# Arguments that Bridge has no field of that name for.
_RENAMED = {
    "num_experts", "untie_embeddings_and_output_weights", "use_rope_scaling", "padded_vocab_size",
    "rotary_seq_len_interpolation_factor", "max_position_embeddings", "group_query_attention",
    "swiglu",
}  # fmt: skip


def _as_fields(args: Namespace) -> dict[str, Any]:
    """The model as Bridge's fields, all of them that have an argument's name and those renamed."""
    same = set(ARCHITECTURE) | set(INHERITED) | {"bf16", "fp16"}
    same -= _OF_A_RUN | _OF_OTHERS | _RENAMED
    return {
        **QWEN3,
        **{name: getattr(args, name) for name in same},
        "num_moe_experts": args.num_experts,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "rope_scaling": args.use_rope_scaling,
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
        "seq_length": args.max_position_embeddings,
        "rotary_base": float(args.rotary_base),
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Namespace]:
    """The base, and what Megatron said of it."""
    cpu_backend.install()  # the arguments hold objects of Megatron's, so reading them imports it
    folder = tmp_path_factory.mktemp("bridge") / "base"
    words = [*MODEL, *NO_DROPOUT, *EP2.split(), "--save", str(folder), "--no-save-optim",
             "--no-save-rng", "--save-interval", "6"]  # fmt: skip
    run_jobs(2, [Job("base", words)])
    directory = iteration_directory(folder)
    args = SourceCheckpoint(directory).args
    without_arguments(directory)
    run_config(directory, _as_fields(args))
    return folder, args


@pytest.mark.slow
def test_it_is_read_as_megatron_described_it(said: tuple[Path, Namespace]) -> None:
    folder, args = said
    read = SourceCheckpoint(iteration_directory(folder)).required_args()
    names = set(ARCHITECTURE) | set(INHERITED)
    lacking = {name for name in names if not hasattr(read, name)}
    assert lacking == _OF_A_RUN | _OF_OTHERS
    found = {name: getattr(read, name) for name in names - lacking}
    # Upstream gives heads that share nothing one group; the number is not used.
    del found["num_query_groups"]
    assert found == {name: getattr(args, name) for name in found}
    assert len(found) > 60


@pytest.fixture(scope="module")
def grown(said: tuple[Path, Namespace], tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder, _ = said
    file = config_file(tmp_path_factory.mktemp("grown") / "growth.yaml", folder, GROWTH, SETTINGS)
    words = ["--growth-config", file, *_without_rate(RUN), "--seq-length", "32", *EP2.split()]
    about = options(folder, GROWTH, stacked=True)
    job = Job("grown", words, after_setup="tests.megatron.probes:compare", options=about)
    return run_jobs(2, [job])["grown"]


def _without_rate(words: list[str]) -> list[str]:
    start = words.index("--lr")
    return [*words[:start], *words[start + 4 :]]


@pytest.mark.slow
def test_it_grows_while_megatron_loads_it(grown: Result) -> None:
    assert grown.iterations == list(range(1, 10))
    assert [rank["wrong"] for rank in grown.after_setup] == [[], []]
    assert min(rank["elements"] for rank in grown.after_setup) > 10_000


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    """One that no run has trained; its common state is a file, as before megatron-core 0.19."""
    base = Model(layers=4, experts=8, vocab=300, mtp=False)
    directory = save(tmp_path / "base" / "iter_0000000", tensors(base))
    (directory.parent / "latest_checkpointed_iteration.txt").write_text("0")
    torch.save({"iteration": 0, "checkpoint_version": 3.0}, directory / "common.pt")
    run_config(directory, QWEN3)
    return directory


def test_the_log_says_where_its_arguments_are_from(imported: Path) -> None:
    cpu_backend.install()
    config = GrowthFile.model_validate({"growth": GROWTH | RESET, "continue": SETTINGS})
    begin = start.decide(config, ["--load", str(imported.parent), "--seq-length", "32"])
    assert "\n  the base's arguments are from its run_config.yaml" in begin.message
    words = " ".join(begin.argv)
    assert "--num-layers 8" in words
    assert "--num-experts 16" in words
    assert "--rotary-base 1000000" in words
    assert "--padded-vocab-size 300" in words
    assert words.count("--seq-length") == 1


def test_a_learning_rate_that_it_does_not_have_is_not_kept(imported: Path, tmp_path: Path) -> None:
    said = refusal(tmp_path, imported.parent, GROWTH | RESET, ["--seq-length", "32"])
    assert said.endswith("has no learning rate to keep; say continue.learning_rate")


def test_megatron_finds_them_in_the_common_state(imported: Path) -> None:
    cpu_backend.install()
    from megatron.core.dist_checkpointing import serialization

    growth = GrowthConfig.model_validate(GROWTH | RESET)
    plan = plan_for(SourceCheckpoint(imported), growth)
    with growth_on_load(imported, plan):
        args = serialization.load_common(str(imported))["args"]
    assert (args.num_layers, args.num_experts, args.moe_router_topk) == (8, 16, 4)
    assert "args" not in serialization.load_common(str(imported))


@pytest.mark.slow
def test_verify_runs_it_whatever_the_run_continues_with(
    said: tuple[Path, Namespace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no length of sequences, tokenizer or learning rate; a warm-up is of the run alone."""
    folder, _ = said
    settings = {**SETTINGS, "learning_rate": {"peak": 1e-3, "warmup_iters": 5}}
    file = config_file(tmp_path / "growth.yaml", folder, {"width": EXACT_WIDTH}, settings)
    with pytest.raises(SystemExit) as done:
        cli.main(["verify", str(folder), "--config", file, "--forward", "--json"])
    assert done.value.code in (0, None)
    forward = json.loads(capsys.readouterr().out)["forward"]
    assert forward["exact"]
    assert forward["largest_logit"] > 0
    assert forward["max_difference"] <= forward["tolerance"]
