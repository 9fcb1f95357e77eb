"""The experiment file: extending, defaults, the chain, and one line for each mistake."""
# ruff: noqa: E501 (the table of mistakes has one on each line)

import copy
from pathlib import Path

import pytest

from megatron_growth.errors import ConfigError
from megatron_growth.launcher.chain import chain
from megatron_growth.launcher.experiment import load_experiment
from megatron_growth.launcher.reference import reference
from tests.launcher.experiments import CONTENT, write

REPOSITORY = Path(__file__).resolve().parents[2]


# -- the chain


def test_each_stage_grows_the_one_before_and_counts_on_from_it(tmp_path):
    base, deep, wide = chain(load_experiment(write(tmp_path)))
    shapes = [
        (s.model.num_layers, s.model.num_experts, s.model.moe_router_topk)
        for s in (base, deep, wide)
    ]
    assert shapes == [(4, 8, 2), (8, 8, 2), (8, 16, 4)]
    assert [(s.first, s.last) for s in (base, deep, wide)] == [(0, 10), (10, 20), (20, 25)]
    assert base.parent is None
    assert deep.parent.load == base.checkpoints == Path("runs/small/base/checkpoints")
    assert (wide.base, wide.parent.load) == (deep.model, deep.checkpoints)


def test_a_budget_of_tokens_is_rounded_up_to_whole_iterations(tmp_path):
    path = write(tmp_path)
    assert chain(load_experiment(path, ["stages[0].budget={tokens: 2049}"]))[0].last == 2


def test_a_budget_of_flops_counts_activated_parameters(tmp_path):
    path = write(tmp_path)
    link = chain(load_experiment(path))[0]
    flops = 6 * link.parameters.activated.parameters * link.tokens * 3
    assert chain(load_experiment(path, [f"stages[0].budget={{flops: {flops}}}"]))[0].last == 3


def test_a_reset_iteration_counts_from_zero(tmp_path):
    setting = "stages[1].continue={iteration: reset}"
    links = chain(load_experiment(write(tmp_path), [setting]))
    assert [(s.first, s.last) for s in links] == [(0, 10), (0, 10), (10, 15)]


def test_a_later_stage_that_grows_nothing_trains_on(tmp_path):
    _, deep, anneal = chain(load_experiment(write(tmp_path), ["stages[2].growth=null"]))
    assert (anneal.model, anneal.base) == (deep.model, deep.model)
    assert anneal.growth.as_is
    assert anneal.parent.load == deep.checkpoints
    assert (anneal.first, anneal.last) == (20, 25)


def test_an_existing_base_may_be_trained_on(tmp_path):
    content = copy.deepcopy(CONTENT)
    content |= {"base": {"load": "base", "iteration": 7}, "stages": [content["stages"][0]]}
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=r"stages\[0\]: `learning_rate` is for .* has a base"):
        load_experiment(path)
    (link,) = chain(load_experiment(path, ["stages[0].learning_rate=null"]))
    assert link.growth.as_is
    assert (link.first, link.last) == (7, 17)


def test_a_pattern_of_dense_layers_grows_with_the_layers(tmp_path):
    settings = ["model.moe_layer_freq='[0]*1+[1]*3'", "model.ffn_hidden_size=128"]
    links = chain(load_experiment(write(tmp_path), settings))
    assert links[1].model.moe_layer_freq == [0, 0, 1, 1, 1, 1, 1, 1]


def test_an_existing_base_is_grown_by_the_first_stage(tmp_path):
    content = {**copy.deepcopy(CONTENT), "base": {"load": str(tmp_path / "base")}}
    del content["stages"][0]
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=r"base.iteration 'latest'.*give the number"):
        chain(load_experiment(path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("7")
    assert chain(load_experiment(path))[0].first == 7
    assert chain(load_experiment(path, ["base.iteration=3"]))[0].first == 3


# -- extending, defaults, settings


def test_a_section_is_laid_over_the_file_it_extends(tmp_path):
    write(tmp_path, CONTENT["model"], "models/tiny.yaml")
    write(tmp_path, {"extends": "models/tiny.yaml", "num_layers": 6}, "deeper.yaml")
    content = {**CONTENT, "model": {"extends": "deeper.yaml", "megatron": {"rotary-base": 10000}}}
    model = load_experiment(write(tmp_path, content)).model
    assert (model.num_layers, model.hidden_size) == (6, 64)
    assert model.megatron == {"position-embedding-type": "rope", "rotary-base": 10000}


def test_defaults_lie_under_every_stage_and_settings_come_before_them(tmp_path):
    experiment = load_experiment(
        write(tmp_path), ["defaults.nodes=3", "stages[0].megatron.bf16=null"]
    )
    assert [stage.nodes for stage in experiment.stages] == [3, 2, 3]
    assert experiment.stages[0].megatron == {"bf16": None}
    assert experiment.stages[2].megatron == {"bf16": True}


def test_another_cluster_takes_the_place_of_the_files(tmp_path):
    profile = write(tmp_path, {"device": "cpu"}, "cluster.yaml")
    cluster = load_experiment(write(tmp_path), ["cluster.memory_gb=1"], profile).cluster
    assert (cluster.device, cluster.memory_gb, cluster.slurm.account) == ("cpu", 1, None)


def test_files_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    write(tmp_path, {"extends": "a.yaml"}, "b.yaml")
    with pytest.raises(
        ConfigError, match=r"goes round in a circle .*a.yaml -> .*b.yaml -> .*a.yaml"
    ):
        load_experiment(tmp_path / "a.yaml")


# -- mistakes

MODEL = {"extends": "models/tiny.yaml"}


@pytest.mark.parametrize(
    ("content", "settings", "begins"),
    [
        ({"model": MODEL}, [], "{}/models/tiny.yaml, extended by {}/experiment.yaml: unknown key 'model.num_layerz'; did"),
        ({"model": {**MODEL, "num_layers": 4, "hidden": 3}}, ["model.num_layerz=4"], "{}/experiment.yaml: unknown key"),
        ({"defaults": {**CONTENT["defaults"], "layout": {"extends": "models/layout.yaml"}}}, [],
         "{}/models/layout.yaml, extended by {}/experiment.yaml: stages[0].layout.tensor 0: must be at least 1"),
        ({"cluster": {"extends": "models/nowhere.yaml"}}, [],
         "{}/experiment.yaml: cluster.extends 'models/nowhere.yaml': there is no file "),
        ({"cluster": {"extends": 3}}, [], "{}/experiment.yaml: cluster.extends 3 is no file; give the path"),
    ],
)  # fmt: skip
def test_the_file_that_has_the_mistake_is_named(tmp_path, content, settings, begins):
    write(tmp_path, {**CONTENT["model"], "num_layerz": 4}, "models/tiny.yaml")
    write(tmp_path, {"tensor": 0}, "models/layout.yaml")
    with pytest.raises(ConfigError) as refusal:
        load_experiment(write(tmp_path, {**CONTENT, **content}), settings)
    assert str(refusal.value).startswith(begins.replace("{}", str(tmp_path)))


def test_a_profile_from_the_command_line_is_named_too(tmp_path):
    profile = write(tmp_path, {"devise": "cpu"}, "cluster.yaml")
    with pytest.raises(ConfigError) as refusal:
        load_experiment(write(tmp_path), cluster=profile)
    said = f"{profile}: unknown key 'cluster.devise'; did you mean 'device'?"
    assert str(refusal.value) == said


MISTAKES = [
    ("stages[1].growth.width.facter=3", "unknown key 'stages[1].growth.width.facter'; did you mean 'factor'?"),
    ("stages[1].growth.depth.factor=1", "stages[1].growth.depth.factor 1: must be at least 2; factor: Copies"),
    ("stages[0].budget.tokens=3", "stages[0].budget: tokens and iterations given; give one"),
    ("stages[0].budget={}", "stages[0].budget: nothing given; give one"),
    ("stages[0].learning_rate=null", "stages[0]: `learning_rate` is missing"),
    ("stages[1].learning_rate={peak: 1.0e-3}", "stages[1]: `learning_rate` is for training from random weights"),
    ("stages[0].continue={iteration: reset}", "stages[0]: `continue` says what goes on from a base"),
    ("stages[0].growth={depth: {}}", "stages[0].growth: the first stage ('base') grows, and there is no base"),
    ("stages[1].growth={as_is: true, depth: {}}", "stages[1].growth: as_is grows nothing, and depth would; drop one"),
    ("stages[1].name=base", "stages[1].name 'base': stages[0] has it too; name them apart"),
    ("stages[1].name=Deep", "stages[1].name: 'Deep' is of another form; write lower-case letters and digits, with dashes between them, as in grown-35b"),
    ("stages[1].layout.pipline=2", "unknown key 'stages[1].layout.pipline'; did you mean 'pipeline'?"),
    ("model.moe_router_topk=9", "model: moe_router_topk (9) must not be above num_experts (8); lower it"),
    ("model.moe_layer_freq='[0]+[1]'", "model.moe_layer_freq: '[0]+[1]' is no pattern of layers"),
    ("model.moe_layer_freq=[0, 1]", "model: moe_layer_freq has 2 entries for num_layers (4)"),
    ("model.moe_layer_freq=2", "model: 2 of 4 layers are dense, and their width is not given"),
    ("model.moe_shared_expert_gate=true", "model: moe_shared_expert_gate needs shared experts; set"),
    ("model.megatron.hybrid-layer-pattern=M*",
     "model.megatron: hybrid-layer-pattern 'M*' gives the model layers that are no transformer's, "
     "which an experiment cannot count or divide; leave it out, or grow such a checkpoint with a "
     "growth file"),
    ("model.megatron.position-embedding-type=learned_absolute",
     "model.megatron: position-embedding-type 'learned_absolute' gives the model a tensor"),
    ("model.hidden_size=63", "model: num_attention_heads (4) must divide hidden_size (63)"),
    ("model.megatron.x={a: 1}", "model.megatron.x: must be true or false, a whole number, a number, text or a list; megatron: "),
    ("data.mock=false", "data: give `train` or `mock: true`"),
    ("cluster.slurm.minutes=1", "cluster.slurm.minutes 1: "),
    ("cluster.slurm.account=two words", "cluster.slurm.account: 'two words' is of another form; write one word"),
    ("cluster.slurm.options=[qos=high]", "cluster.slurm.options[0]: 'qos=high' is of another form; write an option of sbatch on one line, as in --qos=high"),
    ("cluster.environment={A-B: 1}", "cluster.environment.A-B: 'A-B' is of another form; write the name of a variable, as in NCCL_IB_HCA"),
    ("base={iteration: 3}", "base: names no checkpoint; set base.load"),
    ("defaults=3", "defaults 3: must be a section of a stage's fields"),
    ("model.extends=3", "unknown key 'model.extends'"),
    ("cluster=null", "cluster is empty; give a section with keys such as device, processes_per_node"),
    ("stages[1].growth=../growth.yaml", "stages[1].growth '../growth.yaml': must be a section; to take that file write `growth: {extends: ../growth.yaml}`"),
    ("cluster=h100", "cluster 'h100': must be a section with keys such as device, processes_per_node"),
    ("stages=null", "stages is empty; give a list (In order;"),
    ("stages[1]=deep.yaml", "stages[1] 'deep.yaml': must be a section; to take that file write `{extends: deep.yaml}`"),
    ("stages[1].continue_={}", "unknown key 'stages[1].continue_'; did you mean 'continue'?"),
    ("stages[1].continue={data: start}", "stages[1].continue.data 'start': must be 'keep' or 'reset' or a section with keys such as offset"),
    ("data.train=['']", "data.train: [0] is an empty text; say something, or leave it out"),
    ('data.tokenizer="\\0"', "data.tokenizer: '\\x00' has a character 0 in it; take it out"),
    ("data.tokenizer=''", "data.tokenizer: is an empty text"),
    ("stages=[]", "stages []: must be a list of at least 1"),
    ("stages[0]={name: base}", "stages[0].budget is missing; give it (How long)"),
    ("model.num_layers=true", "model.num_layers: true is no number; write one"),
    ("model.num_layers=1000000000", "model.num_layers 1000000000: must be at most 10000"),
    ("model.moe_layer_freq='[1]*1000000000'", "model.moe_layer_freq: '[1]*1000000000' says 1000000000 layers; 10000 at most"),
    ("model.hidden_size=.inf", "model.hidden_size inf: must be a finite number"),
    ("model.megatron.x=.nan", "model.megatron.x nan: must be a finite number"),
    ("model.megatron={a_b: 1, a-b: 2}", "model.megatron: 'a_b' and 'a-b' are one option of Megatron; keep one"),
    ("stages[1].megatron={--bf16: true}", "stages[1].megatron: 'bf16' and '--bf16' are one option of Megatron; keep one"),
    ("stages[1].megatron={a b: true}", "stages[1].megatron.a b: 'a b' is of another form; write the name of an option, as in rotary-base"),
    ("cluster.memory_gb=.inf", "cluster.memory_gb inf: must be a finite number"),
    ("cluster.memory_gb=inf", "cluster.memory_gb 'inf': must be a finite number"),
    ("cluster.environment={A: true}", "cluster.environment: A true is no number; write one, or text in quotes"),
    ("cluster.environment={B: .nan}", "cluster.environment.B nan: must be a finite number"),
    ("cluster.environment={B: 1.10}", "cluster.environment.B 1.1: must be text or a whole number (text in quotes)"),
    ("cluster.container={image: 24.07}", "cluster.container.image 24.07: must be text (text in quotes)"),
    ("cluster.container={image: a, mounts: [/a:b]}", "cluster.container.mounts[0]: '/a:b' is of another form; write outside:inside"),
    ("cluster.kubernetes.claims=[{name: shm, path: /a}]", "cluster.kubernetes: a claim is named 'shm'"),
    ("cluster.kubernetes.claims=[{name: a, path: /a}, {name: b, path: /a}]", "cluster.kubernetes: two of the claims have the path '/a'; drop one"),
    ("cluster.kubernetes.namespace=Team_A", "cluster.kubernetes.namespace: 'Team_A' is of another form; write lower-case letters"),
    ("stages[0].budget={tokens: 1.0e+300}", "stages[0].budget.tokens 1e+300: must be at most 1e+17"),
    ("stages[0].budget={tokens: 1e300}", "stages[0].budget.tokens '1e300': must be at most 1e+17"),
    ("stages[0].budget={iterations: 100000000000000000000000000000}", "stages[0].budget.iterations 1"),
    (f"stages[0].name={'a' * 300}", "stages[0].name: has 300 characters; 63 at most"),
    (f"name={'a' * 64}", "name: has 64 characters; 63 at most"),
    ("data={train: [0.7], seq_length: 8}", "data: train [0.7]: a weight stands before each prefix, or none does"),
    ("data={train: [0.7, a, b], seq_length: 8}", "data: train [0.7, 'a', 'b']: a weight stands before"),
    ("data={train: [0, a, 1, b], seq_length: 8}", "data: train [0.0, 'a', 1.0, 'b']: weights must be above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "says"), MISTAKES, ids=[setting for setting, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_its_path(tmp_path, setting, says):
    path = write(tmp_path)
    with pytest.raises(ConfigError) as refusal:
        load_experiment(path, [setting])
    message = str(refusal.value)
    assert message.startswith(f"{path}: {says}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("add_bias_linear=true", "moe_shared_expert_intermediate_size=8"),
         "add_bias_linear: Megatron's shared experts have no biases; drop one of the two"),
        (("add_qkv_bias=true", "multi_latent_attention=true"),
         "add_qkv_bias: latent attention has no such biases; drop it"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_have_together_is_refused(tmp_path, settings, says):
    with pytest.raises(ConfigError, match=f"model: {says}"):
        load_experiment(write(tmp_path), [f"model.{setting}" for setting in settings])


@pytest.mark.parametrize(
    ("setting", "where"),
    [
        ("stages[0].learning_rate.warmup_iters=10", "stages[0].learning_rate"),
        ("stages[1].continue.learning_rate={peak: 1, warmup_iters: 10}",
         "stages[1].continue.learning_rate"),
    ],
)  # fmt: skip
def test_a_warmup_as_long_as_its_stage_is_refused(tmp_path, setting, where):
    with pytest.raises(ConfigError) as refusal:
        chain(load_experiment(write(tmp_path), [setting]))
    assert str(refusal.value).startswith(f"{where}.warmup_iters 10: must be below the iterations")


def test_growth_that_cannot_be_made_names_its_stage(tmp_path):
    setting = "stages[1].growth={depth: {skip_first: 3, skip_last: 3}}"
    with pytest.raises(ConfigError, match=r"stages\[1\].growth: "):
        chain(load_experiment(write(tmp_path), [setting]))


# -- the reference


def test_the_reference_in_docs_is_that_of_the_schema():
    page = (REPOSITORY / "docs" / "reference.md").read_text(encoding="utf-8")
    assert page == reference() + "\n", "run python -m megatron_growth.launcher.reference"
    for field in ("virtual", "new_layer_init", "warmup_iters", "requeues", "moe_router_topk"):
        assert f"| `{field}` |" in page
