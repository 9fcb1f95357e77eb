"""How a stage's model lies on its ranks, from the stage's fields and Megatron's options.

What is here is what the estimate of memory knows. `unknown` names the options of a stage that
change memory and that it does not know, and which way they go.
"""

from collections.abc import Iterator, Mapping

from megatron_growth.geometry import Value
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.planning.memory import Sharding
from megatron_growth.planning.pipeline import parsed_layout

LAYOUT = "pipeline-model-parallel-layout"

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1}
_ADAM = 12  # fp32 master, two fp32 moments
_REMAINDER = 2  # of the fp32 master, what the 16-bit weight lacks

_LESS = "less memory than estimated"
_MORE = "more memory than estimated"
_UNKNOWN = {
    "fp8-format": _LESS,
    "fp4-format": _LESS,
    "use-megatron-fsdp": _LESS,
    "use-torch-fsdp2": _LESS,
    "optimizer-cpu-offload": _LESS,
    "cpu-offloading-num-layers": _LESS,
    "fine-grained-activation-offloading": _LESS,
    "moe-expert-capacity-factor": "tokens dropped or padded",
    "cuda-graph-impl": _MORE,
    "decoder-first-pipeline-num-layers": "layers divided otherwise",
    "decoder-last-pipeline-num-layers": "layers divided otherwise",
    "account-for-embedding-in-pipeline-split": "layers divided otherwise",
    "account-for-loss-in-pipeline-split": "layers divided otherwise",
}
# The values that an option may have without the estimate being wrong.
_KNOWN = {
    "optimizer": ("adam",),
    "attention-backend": ("flash", "fused", "auto"),
    "transformer-impl": ("transformer_engine",),
    "recompute-method": ("uniform",),
    "recompute-num-layers": (1,),
    "cuda-graph-impl": ("none",),
}


def sharding(experiment: Experiment, link: Link) -> Sharding:
    """How the stage's model lies on its ranks."""
    stage, layout = link.stage, link.stage.layout
    options = stage.megatron
    gpus = stage.nodes * experiment.cluster.processes_per_node
    data = max(1, gpus // (layout.tensor * layout.pipeline * layout.context))
    expert_data = max(1, gpus // (layout.pipeline * layout.expert * layout.expert_tensor))
    instances = _number(options.get("num-distributed-optimizer-instances"), 1)
    return Sharding(
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual=layout.virtual or 1,
        context=layout.context,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        data=max(1, data * layout.context // instances),
        expert_data=max(1, expert_data // instances),
        tokens=stage.micro_batch_size * experiment.data.seq_length // layout.context,
        microbatches=max(1, stage.global_batch_size // (stage.micro_batch_size * data)),
        gradient_bytes=2 if options.get("grad-reduce-in-bf16") else 4,
        optimizer_bytes=_optimizer_bytes(options),
        recomputed=_recomputed(options),
        layout=_layout(link),
        overlap=bool(options.get("overlap-moe-expert-parallel-comm")),
    )


def unknown(link: Link) -> Iterator[tuple[str, str]]:
    """Options that the estimate does not know: path and value, and what they make of it."""
    options = link.stage.megatron
    for name, value in options.items():
        known = (None, False, *_KNOWN.get(name, ()))
        if name in (*_UNKNOWN, *_KNOWN) and value not in known:
            yield f"{link.path}.megatron.{name} {value!r}", _UNKNOWN.get(name, _MORE)
    if not options.get("bf16") and not options.get("fp16"):
        yield f"{link.path}.megatron: neither bf16 nor fp16", _MORE


def layout_problem(link: Link) -> str | None:
    """What is wrong with the stage's layout string; None where nothing is, or there is none."""
    text = link.stage.megatron.get(LAYOUT)
    if not isinstance(text, str):
        return None
    try:
        chunks = parsed_layout(text)
    except ValueError as error:
        return str(error)
    pipeline, layers = link.stage.layout.pipeline, "".join(chunks).count("t")
    if len(chunks) % pipeline:
        return f"its {len(chunks)} chunks cannot be divided by layout.pipeline ({pipeline})"
    if layers != link.model.num_layers:
        return f"it has {layers} layers, the model {link.model.num_layers}"
    return None


def _layout(link: Link) -> tuple[str, ...] | None:
    text = link.stage.megatron.get(LAYOUT)
    if not isinstance(text, str) or layout_problem(link):
        return None
    return parsed_layout(text)


def _optimizer_bytes(options: Mapping[str, Value | None]) -> int:
    if not options.get("use-precision-aware-optimizer"):
        return _ADAM
    half = options.get("bf16") or options.get("main-params-dtype") == "fp16"
    moments = ("exp-avg-dtype", "exp-avg-sq-dtype")
    return (_REMAINDER if half else 4) + sum(
        _BYTES.get(str(options.get(name) or "fp32"), 4) for name in moments
    )


def _recomputed(options: Mapping[str, Value | None]) -> tuple[str, ...]:
    granularity = options.get("recompute-granularity")
    if granularity == "full":
        return ("full",)
    modules = options.get("recompute-modules")
    if granularity != "selective" or not isinstance(modules, list):
        return ()
    return tuple(map(str, modules))


def _number(value: Value | None, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
