"""The plain modules of the local layer spec, where only Transformer Engine's were thought of."""

import megatron.core.transformer.dot_product_attention as attention
import megatron.core.transformer.torch_norm as norm
import torch
from megatron.core.transformer import TransformerConfig

from megatron_growth.training.substitutions import Substitutions

_new_norm = norm.WrappedTorchNorm.__new__
_init_attention = attention.DotProductAttention.__init__


def new_norm(
    cls: type,
    config: TransformerConfig,
    hidden_size: int,
    eps: float = 1e-5,
    **kwargs: object,
) -> torch.nn.Module:
    """A torch norm that may be used with sequence parallelism.

    ``core/transformer/torch_norm.py`` 50 refuses it. All that sequence parallelism asks of a norm
    is that its weights say so, because each rank sees part of the sequence only and their
    gradients must be summed over the tensor-parallel ranks
    (``core/distributed/finalize_model_grads.py`` 452). Without the mark the loss still looks right
    to five digits and the gradient norm does not.
    """
    sequence_parallel = config.sequence_parallel
    config.sequence_parallel = False
    try:
        module = _new_norm(cls, config, hidden_size, eps, **kwargs)
    finally:
        config.sequence_parallel = sequence_parallel
    for parameter in module.parameters():
        parameter.sequence_parallel = sequence_parallel
    return module


def init_attention(
    self: attention.DotProductAttention,
    *args: object,
    k_channels: int | None = None,
    v_channels: int | None = None,
    **kwargs: object,
) -> None:
    """Attention that takes the head sizes which multi-latent attention gives it.

    ``core/transformer/multi_latent_attention.py`` 214 passes two arguments that only Transformer
    Engine's attention has. The scores follow their input's size; the output is as wide as the
    values.
    """
    _init_attention(self, *args, **kwargs)
    if v_channels is not None:
        self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def substitute(substitutions: Substitutions) -> None:
    substitutions.replace(norm.WrappedTorchNorm, "__new__", new_norm)
    substitutions.replace(attention.DotProductAttention, "__init__", init_attention)
