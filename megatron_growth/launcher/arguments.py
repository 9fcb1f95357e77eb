"""A stage as Megatron's command line.

Three tables, in this order: what makes the model, what the stage's fields say, and the free options
of its `megatron` section. The model's are there only for training from random weights: any other
stage's architecture is the base's, grown, and `megatron_growth.pretrain` puts it in. So is the
tokenizer, but for the stage after a base from elsewhere.
"""

import math

from megatron_growth.config import LearningRateConfig
from megatron_growth.errors import ConfigError
from megatron_growth.geometry import Geometry
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.options import Table, without_clash, words
from megatron_growth.launcher.stage import Data, Layout

GROWTH_FILE = "growth.yaml"

# Megatron's default is a table of positions, which `Geometry` does not count.
_GIVEN: Table = {"position-embedding-type": "rope"}

# A stage is resumed, grown and stopped; this is what it takes.
_ALWAYS: Table = {
    "ckpt-format": "torch_dist",
    "use-distributed-optimizer": True,
    "dist-ckpt-optim-fully-reshardable": True,
    "exit-signal-handler": True,
}

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_SHAPE = (
    "num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size",
    "num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate", "moe_latent_size", "swiglu", "normalization", "add_qkv_bias",
    "qk_layernorm", "mtp_num_layers", "vocab_size", "untie_embeddings_and_output_weights",
)  # fmt: skip

# Options that fields say in some experiments and leave out in others.
_SCHEDULE = ("lr", "min-lr", "lr-decay-style", "lr-warmup-iters", "lr-decay-iters")
_CONDITIONAL: Table = dict.fromkeys((
    "group-query-attention", "num-query-groups", "multi-latent-attention", "moe-layer-freq",
    *(name.replace("_", "-") for name in _LATENT), "mock-data", "data-cache-path", "data-path",
    "train-data-path", "valid-data-path", "split", "load", "growth-config",
))  # fmt: skip


def model_arguments(experiment: Experiment) -> list[str]:
    """What makes the model that the experiment begins with."""
    return words(_model_table(experiment))


def stage_arguments(
    experiment: Experiment, link: Link, *, walltime: int | None = None
) -> list[str]:
    """A stage's whole command line, that of the module behind `python -m`.

    Args:
        experiment: it all.
        link: the stage.
        walltime: minutes after which it is killed; None where it is not.

    Raises:
        ConfigError: an option is given twice, or nothing is left of the walltime.
    """
    stage = _stage_table(experiment, link, walltime)
    own = _CONDITIONAL | _fields(experiment) | stage
    without_clash(dict.fromkeys(_SCHEDULE) | own, experiment.model.megatron, "model.megatron")
    model = _of_base(experiment, link) if link.growth else _model_table(experiment)
    own |= model | _rates(link)
    free = without_clash(own, link.stage.megatron, f"{link.path}.megatron")
    # Evaluated with every checkpoint unless said otherwise; upstream divides by it in any case.
    return words({"eval-interval": link.stage.save_interval} | model | stage | free)


def _model_table(experiment: Experiment) -> Table:
    return _GIVEN | _fields(experiment) | experiment.model.megatron


def _fields(experiment: Experiment) -> Table:
    """What the fields of `model` and `data` make the model."""
    model, data = experiment.model, experiment.data
    return _shape(model) | _tokenizer(data) | {"max-position-embeddings": data.seq_length}


def _rates(link: Link) -> Table:
    """A schedule in `continue`, which no option may say differently."""
    rate = link.stage.continue_.learning_rate
    return {} if rate == "keep" else _schedule(rate)


def _of_base(experiment: Experiment, link: Link) -> Table:
    """A base from elsewhere may have no tokenizer, or one that lay elsewhere; what `data` says of
    it wins."""
    data = experiment.data
    if not link.outside or not data.model_fields_set & {
        "tokenizer",
        "tokenizer_model",
    }:
        return {}
    return _tokenizer(data) | {"vocab-size": experiment.model.vocab_size}


def _tokenizer(data: Data) -> Table:
    return {"tokenizer-type": data.tokenizer, "tokenizer-model": data.tokenizer_model}


def _shape(model: Geometry) -> Table:
    table: Table = {name.replace("_", "-"): getattr(model, name) for name in _SHAPE}
    table["disable-bias-linear"] = not model.add_bias_linear
    if model.num_query_groups:
        table |= {"group-query-attention": True, "num-query-groups": model.num_query_groups}
    if model.multi_latent_attention:
        table |= {"multi-latent-attention": True}
        table |= {name.replace("_", "-"): getattr(model, name) for name in _LATENT}
    if model.moe_layer_freq != 1:
        table["moe-layer-freq"] = str(model.moe_layer_freq).replace(" ", "")
    return table


def _stage_table(experiment: Experiment, link: Link, walltime: int | None) -> Table:
    stage = link.stage
    return {
        **_data(experiment.data),
        **_layout(stage.layout),
        "global-batch-size": stage.global_batch_size,
        "micro-batch-size": stage.micro_batch_size,
        "train-iters": link.last,
        **(_schedule(stage.learning_rate) if stage.learning_rate else {}),
        **_checkpoints(link),
        **_ALWAYS,
        "exit-duration-in-mins": _minutes(experiment, walltime),
        "tensorboard-dir": str(link.directory / "tensorboard"),
    }


def _data(data: Data) -> Table:
    table: Table = {"seq-length": data.seq_length}
    if data.cache:
        table["data-cache-path"] = str(data.cache)
    if data.mock:
        table["mock-data"] = True
    train = [str(part) for part in data.train]
    if data.valid:
        return table | {
            "train-data-path": train,
            "valid-data-path": [str(part) for part in data.valid],
        }
    if data.train:
        table |= {"data-path": train, "split": "100,0,0"}
    return table | {"eval-iters": 0}


def _layout(layout: Layout) -> Table:
    return {
        "tensor-model-parallel-size": layout.tensor,
        "sequence-parallel": layout.tensor > 1,  # upstream asks for it with experts
        "pipeline-model-parallel-size": layout.pipeline,
        "num-virtual-stages-per-pipeline-rank": layout.virtual,
        "context-parallel-size": layout.context,
        "expert-model-parallel-size": layout.expert,
        "expert-tensor-parallel-size": layout.expert_tensor,
    }


def _schedule(rate: LearningRateConfig) -> Table:
    return {
        "lr": rate.peak,
        "min-lr": rate.min,
        "lr-decay-style": rate.decay_style,
        "lr-warmup-iters": rate.warmup_iters,
        "lr-decay-iters": rate.decay_iters,
    }


def _checkpoints(link: Link) -> Table:
    table: Table = {"save": str(link.checkpoints), "save-interval": link.stage.save_interval}
    # Upstream would hold a run to the schedule length that it, or its base, began with.
    table["override-opt-param-scheduler"] = True
    if link.growth is None:
        return table | {"load": str(link.checkpoints)}  # its own; none at the first start
    return table | {"growth-config": str(link.directory / GROWTH_FILE)}


def _minutes(experiment: Experiment, walltime: int | None) -> int | None:
    """When training ends by itself and saves: in time for the walltime."""
    if walltime is None:
        return None
    cluster = experiment.cluster
    save = math.ceil(cluster.save_seconds / 60)
    left = walltime - cluster.start_minutes - save
    if left < 1:
        raise ConfigError(
            f"cluster.slurm.minutes {walltime}: starting takes {cluster.start_minutes} "
            f"(start_minutes) and saving {save} (save_seconds), so nothing is left to train; raise "
            "it"
        )
    return left
