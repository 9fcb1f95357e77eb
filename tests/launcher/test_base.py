"""An existing base is held against the experiment's account of it, where it can be read."""

import copy
from argparse import Namespace

import pytest

from megatron_growth import cli
from megatron_growth.errors import CheckpointError, ConfigError
from megatron_growth.launcher.arguments import stage_arguments
from megatron_growth.launcher.base import check_base
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from tests.checkpoint import bases
from tests.launcher.experiments import CONTENT, write

ARGS = {
    "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16,
    "group_query_attention": False, "num_query_groups": 1, "ffn_hidden_size": 256,
    "num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 32, "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None, "multi_latent_attention": False,
    "kv_lora_rank": 32, "qk_layernorm": False, "mtp_num_layers": None,
    "untie_embeddings_and_output_weights": True, "padded_vocab_size": 256,
}  # fmt: skip


@pytest.fixture
def experiment(tmp_path):
    """The small experiment's grown stages, from a checkpoint with these arguments."""

    def make(*settings, directory="iter_0000007", **changed):
        model = bases.Model(layers=4, experts=8, mtp=False)
        state = {**bases.tensors(model), **bases.objects(model)}
        state[bases.COMMON_STATE] = [{"args": Namespace(**ARGS | changed), "iteration": 7}]
        bases.save(tmp_path / "base" / directory, state)
        content = copy.deepcopy(CONTENT)
        del content["stages"][0]
        content["base"] = {"load": str(tmp_path / "base"), "iteration": 7}
        path = write(tmp_path, content)
        return path, load_experiment(path, settings)

    return make


def test_one_that_is_as_described_passes(experiment):
    check_base(experiment()[1])
    check_base(experiment("model.num_query_groups=2", group_query_attention=True,
                          num_query_groups=2)[1])  # fmt: skip
    check_base(experiment("model.moe_layer_freq=[0, 1, 1, 1]", "model.ffn_hidden_size=256",
                          moe_layer_freq=[0, 1, 1, 1])[1])  # fmt: skip
    check_base(experiment("model.megatron.moe-router-load-balancing-type=aux_loss",
                          moe_router_load_balancing_type=["aux_loss"])[1])  # fmt: skip
    check_base(experiment("model.megatron.an-option-of-a-later-megatron=1")[1])


@pytest.mark.parametrize(
    ("setting", "changed", "says"),
    [
        ("model.num_layers=6", {}, r"model.num_layers 6: the base .*iter_0000007' has 4; describe"),
        ("model.hidden_size=128", {}, "model.hidden_size 128: .* has 64"),
        ("model.moe_router_topk=3", {}, "model.moe_router_topk 3: .* has 2"),
        ("model.kv_channels=32", {}, "model.kv_channels 32: .* has 16"),
        ("model.qk_layernorm=true", {}, "model.qk_layernorm True: .* has False"),
        ("model.mtp_num_layers=1", {}, "model.mtp_num_layers 1: .* has None"),
        ("model.vocab_size=300", {}, "model.vocab_size 300: .* has 256"),
        ("model.num_layers=4", {"moe_layer_freq": 2}, "model.moe_layer_freq 1: .* has 2"),
        ("model.num_layers=4", {"group_query_attention": True, "num_query_groups": 2},
         "model.num_query_groups 4: .* has 2"),
        ("model.multi_latent_attention=true", {"multi_latent_attention": True},
         "model.kv_lora_rank 512: .* has 32"),
        ("model.megatron.rotary-base=10000", {"rotary_base": 1000000},
         "model.megatron.rotary-base 10000: .* has 1000000; .* say it in a stage's `megatron`"),
        ("model.megatron.moe-router-dtype=fp32", {"moe_router_dtype": None},
         "model.megatron.moe-router-dtype 'fp32': .* has None"),
        ("model.megatron.norm-epsilon=1.0e-6", {"layernorm_epsilon": 1e-5},
         "model.megatron.norm-epsilon 1e-06: .* has 1e-05"),
    ],
)  # fmt: skip
def test_one_that_is_not_is_refused_by_field(experiment, setting, changed, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        check_base(experiment(setting, **changed)[1])
    assert "\n" not in str(refusal.value)


def test_one_that_is_not_there_is_for_the_cluster_to_find(experiment):
    check_base(experiment("base.load=/on/the/cluster")[1])


def test_one_without_arguments_is_refused(experiment):
    _, loaded = experiment()
    state = bases.tensors(bases.Model(layers=4, experts=8, mtp=False))
    bases.save(loaded.base.load / "iter_0000007", state)
    with pytest.raises(CheckpointError, match=r"iter_0000007' has no Megatron arguments, so the"):
        check_base(loaded)


def test_the_tokenizer_is_what_the_experiment_says(experiment):
    """A base may have none, as a converted one, or one that lay elsewhere; stages after the first
    have it from there."""
    stage, *others = chain(loaded := experiment()[1])
    words = " ".join(stage_arguments(loaded, stage))
    assert "--tokenizer-type NullTokenizer --vocab-size 256" in words
    assert others
    assert not any("tokenizer" in " ".join(stage_arguments(loaded, link)) for link in others)


def test_an_iteration_that_is_not_there_is_said(experiment):
    with pytest.raises(CheckpointError, match=r"iter_0000007' does not exist; iterations there"):
        check_base(experiment(directory="iter_0000009")[1])


@pytest.mark.parametrize("words", [("plan",), ("launch", "--target", "slurm", "--dry-run")])
def test_plan_and_launch_ask(experiment, words, capsys):
    path, _ = experiment(num_layers=6)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, str(path)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.num_layers 4: the base" in line
