"""The environment that a layout asks for on H100.

How many queues CUDA keeps (`CUDA_DEVICE_MAX_CONNECTIONS`) is no constant. With one queue, kernels
start in the order they are issued, which overlapping tensor- or context-parallel communication
needs, and Megatron asserts. With one queue, too, expert communication cannot run beside compute.

The values are those of NVIDIA's own H100 recipes (Megatron-Bridge, Megatron-LM's MoE guide).
"""

from collections.abc import Mapping

from megatron_growth.geometry import Value
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.cluster import Cluster
from megatron_growth.launcher.experiment import Experiment

_H100 = {
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # fragmentation
    "NCCL_GRAPH_REGISTER": "0",  # does not go with expandable segments
    "NCCL_NVLS_ENABLE": "0",  # memory
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",  # say which collective hangs
    "TORCH_FR_BUFFER_SIZE": "2000",
}


def environment(link: Link, cluster: Cluster) -> dict[str, str]:
    """What every process of a stage has in its environment, the cluster's own last."""
    own = {name: str(value) for name, value in cluster.environment.items()}
    return _derived(link, cluster) | own


def _derived(link: Link, cluster: Cluster) -> dict[str, str]:
    if cluster.device == "cpu":
        # One thread for each rank, and no GPU that a machine may happen to have.
        return {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = link.stage.megatron
    return {
        "OMP_NUM_THREADS": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": _connections(link, options),
        **_H100,
        **_margins(options),
        **_hybrid_ep(options, cluster),
    }


def _connections(link: Link, options: Mapping[str, Value | None]) -> str:
    if options.get("overlap-moe-expert-parallel-comm"):
        return "32"
    if link.stage.layout.tensor > 1 or link.stage.layout.context > 1:
        return "1"
    return "8"  # CUDA's default, said


def _margins(options: Mapping[str, Value | None]) -> dict[str, str]:
    """Leave multiprocessors to communication that runs beside the norms."""
    if not options.get("overlap-moe-expert-parallel-comm"):
        return {}
    return {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}


def modules(experiment: Experiment, link: Link) -> list[str]:
    """Python modules that a stage's options need and whose lack would show when its model is built:
    `deep_ep:Buffer` is a name in a module."""
    if experiment.cluster.device == "cpu":
        return []
    options = link.stage.megatron
    needed = []
    if options.get("transformer-impl", "transformer_engine") == "transformer_engine":
        needed.append("transformer_engine.pytorch")
    hybrid = options.get("moe-flex-dispatcher-backend") == "hybridep"
    if options.get("moe-enable-deepep") or _dispatcher(experiment, link) == "flex":
        needed.append("deep_ep:HybridEPBuffer" if hybrid else "deep_ep:Buffer")
    return needed


def _dispatcher(experiment: Experiment, link: Link) -> Value | None:
    """A stage that does not name its own has that of its base."""
    until = experiment.stages.index(link.stage) + 1
    tables = [experiment.model.megatron, *(stage.megatron for stage in experiment.stages[:until])]
    said = [table.get("moe-token-dispatcher-type") for table in tables]
    return next((one for one in reversed(said) if one), None)


def _hybrid_ep(options: Mapping[str, Value | None], cluster: Cluster) -> dict[str, str]:
    """A wrong domain size costs speed, and may cost correctness."""
    if options.get("moe-flex-dispatcher-backend") != "hybridep":
        return {}
    domain = str(cluster.processes_per_node)
    return {
        "NUM_OF_HYBRID_EP_RANKS_PER_NVLINK_DOMAIN": domain,
        "NVLINK_DOMAIN_SIZE": domain,
        "USE_MNNVL": "0",
    }
