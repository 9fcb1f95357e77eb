"""What a model costs: parameters, activated parameters, FLOPs, and the bytes that growth moves.

Counted from the tensors that a checkpoint really holds, never from a formula over arguments, so
that shared experts, latent projections and dense layers count as they are.

Conventions, those of the paper's tables (arXiv:2510.08008):

    parameters   trained tensors of the model; a tied embedding is there once. Optimizer states are
    none, nor
                 are the router's running statistics (`expert_bias`, `qb_beta`). MTP modules count.
    activated    those that one token uses: all but the routed experts, and top_k / num_experts of
                 them.
                 Input and output embeddings count in full; `without_embeddings` leaves them out.
    F_c   6 N_a x 20 N_a FLOPs, one Chinchilla budget; N_a activated parameters, embeddings counted.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_growth.planning.keys import Key
from megatron_growth.planning.pieces import Shape
from megatron_growth.planning.plan import Architecture, GrowthPlan

FLOPS_PER_PARAMETER_AND_TOKEN = 6
CHINCHILLA_TOKENS_PER_PARAMETER = 20

_ROUTED_EXPERTS = "mlp.experts."
_EMBEDDINGS = ("embedding.", "output_layer.")
_STATISTICS = ("mlp.router.expert_bias", "mlp.router.qb_beta")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        key: its key.
        shape: its global shape.
        itemsize: bytes of an element.
    """

    key: Key
    shape: Shape
    itemsize: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Activated:
    """Parameters that one token uses, and the Chinchilla budget they imply."""

    parameters: int
    without_embeddings: int

    @property
    def chinchilla_flops(self) -> int:
        """F_c = 6 N_a x 20 N_a."""
        n = self.parameters
        return FLOPS_PER_PARAMETER_AND_TOKEN * n * CHINCHILLA_TOKENS_PER_PARAMETER * n


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model.

    Attributes:
        total: all of them.
        embeddings: input and output embeddings.
        experts: routed experts.
        activated: those one token uses; None where top-k is not known.
    """

    total: int
    embeddings: int
    experts: int
    activated: Activated | None

    @property
    def without_embeddings(self) -> int:
        return self.total - self.embeddings


@dataclass(frozen=True)
class Road:
    """One way from a base checkpoint to a grown model in memory, in bytes of tensors.

    Attributes:
        name: the road.
        read: from storage, each byte once; ranks that share bytes may read them again.
        written: to storage.
        delivered: into the model and its optimizer, once.
    """

    name: str
    read: int
    written: int
    delivered: int


def count_parameters(tensors: Iterable[StoredTensor], model: Architecture) -> ParameterCount:
    """Count a model's parameters.

    Args:
        tensors: of its checkpoint; optimizer states among them are passed over.
        model: says how many experts there are and how many a token uses.
    """
    total = embeddings = experts = 0
    for tensor in tensors:
        if tensor.key.state is not None or tensor.key.name in _STATISTICS:
            continue
        total += tensor.numel
        if tensor.key.name.startswith(_EMBEDDINGS):
            embeddings += tensor.numel
        elif tensor.key.name.startswith(_ROUTED_EXPERTS):
            experts += tensor.numel
    if experts and model.top_k is None:
        return ParameterCount(total, embeddings, experts, None)
    used = experts * (model.top_k or 0) // model.num_experts if experts else 0
    activated = total - experts + used
    return ParameterCount(total, embeddings, experts, Activated(activated, activated - embeddings))


def kept_tensors(plan: GrowthPlan, base: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """The base's tensors that growth reads: without optimizer states when those are reset."""
    return (tensor for tensor in base if tensor.key.state is None or plan.optimizer != "reset")


def grown_tensors(plan: GrowthPlan, base: Iterable[StoredTensor]) -> list[StoredTensor]:
    """The tensors of the grown checkpoint."""
    grown: dict[
        str, StoredTensor
    ] = {}  # layers that are keys of the base may be one stack in the target
    for tensor in kept_tensors(plan, base):
        for key, shape in plan.target_tensors(tensor.key, tensor.shape):
            grown[str(key)] = StoredTensor(key, shape, tensor.itemsize)
    return list(grown.values())


def roads(plan: GrowthPlan, base: Iterable[StoredTensor]) -> tuple[Road, Road]:
    """What growing while loading moves, and what writing a grown copy first and loading that
    would."""
    base = list(base)
    source = sum(tensor.nbytes for tensor in kept_tensors(plan, base))
    target = sum(tensor.nbytes for tensor in grown_tensors(plan, base))
    return (
        Road("load-time", read=source, written=0, delivered=target),
        Road("written copy", read=source + target, written=target, delivered=target),
    )
