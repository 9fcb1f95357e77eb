"""``cuda`` means ``cpu``, and everything that orders or measures GPU work is inert.

Megatron names its device in three ways: by string or ``torch.device`` (``device="cuda"``, all over
``training/training.py``), by ``torch.cuda.current_device()`` (``core/tensor_parallel/mappings.py``
145), and by the method ``.cuda()`` (``training/training.py`` 1818). The second is answered with the
CPU device itself, which every PyTorch call accepts where it accepts a number; the other two are
translated on the way into PyTorch by a ``TorchFunctionMode``.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

from megatron_growth.training.substitutions import Substitutions

CPU = torch.device("cpu")


class CudaMeansCpu(TorchFunctionMode):
    """Translates each call into PyTorch that names a CUDA device."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func in _RETURN_SELF:
            return args[0]
        if func is torch.Tensor.record_stream:
            return None
        if func is torch.Tensor.type and len(args) == 1 and not named:
            return _cuda_type_name(args[0])
        if named.get("pin_memory"):
            named["pin_memory"] = False  # Pinning asks the CUDA driver, which is not there.
        if "device" in named:
            named["device"] = _on_cpu(named["device"])
        return func(*map(_on_cpu, args), **named)


_RETURN_SELF = frozenset({torch.Tensor.cuda, torch.Tensor.pin_memory})


def _on_cpu(value: object) -> object:
    if isinstance(value, str) and value.startswith("cuda"):
        return CPU
    if isinstance(value, torch.device) and value.type == "cuda":
        return CPU
    return value


def _cuda_type_name(tensor: object) -> str:
    # The optimizers tell precisions apart by the name 'torch.cuda.FloatTensor'
    # (core/optimizer/distrib_optimizer.py 401 and 466, core/optimizer/clip_grads.py 174).
    with torch._C.DisableTorchFunction():
        return tensor.type().replace("torch.", "torch.cuda.")  # type: ignore[attr-defined]


class InertStream:
    """Work on a CPU is done in the order it is written, so there is nothing to order."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "InertStream":
        return self

    def __exit__(self, *args: object) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def record_event(self, event: "InertEvent | None" = None) -> "InertEvent":
        return event or InertEvent()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass


class InertEvent:
    """An event that has always happened already."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _inert(answer: object = None) -> Callable[..., object]:
    """A new function per name: PyTorch's compiler keeps rules by function and refuses to share."""
    return lambda *args, **kwargs: answer


def _local_world_size() -> int:
    # core/parallel_state.py is set up only where there are devices (training/initialize.py 358).
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


_STREAM = InertStream()
_PROPERTIES = SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=0)

_TORCH_CUDA: dict[str, object] = {
    # Which device: core/parallel_state.py, training/initialize.py 270.
    "current_device": _inert(CPU),
    "device_count": _local_world_size,
    "set_device": _inert(),
    "get_device_capability": _inert((0, 0)),
    "get_device_name": _inert("cpu"),
    "get_device_properties": _inert(_PROPERTIES),
    # Order of work: core/pipeline_parallel/p2p_communication.py, core/timers.py 152.
    "Stream": InertStream,
    "Event": InertEvent,
    "stream": _inert(nullcontext()),
    "set_stream": _inert(),
    "current_stream": _inert(_STREAM),
    "default_stream": _inert(_STREAM),
    "synchronize": _inert(),
    "is_current_stream_capturing": _inert(False),
    # Memory: training/utils/common_utils.py 313, training/training.py 2742.
    "empty_cache": _inert(),
    "memory_stats": _inert(defaultdict(int)),
    "memory_allocated": _inert(0),
    "memory_reserved": _inert(0),
    "max_memory_allocated": _inert(0),
    "max_memory_reserved": _inert(0),
    "reset_peak_memory_stats": _inert(),
    "device_memory_used": _inert(0),
}

# core/utils.py 2729: ranges for NVIDIA's profiler; absent from CPU builds of PyTorch.
_NVTX: dict[str, object] = {
    "range_push": _inert(),
    "range_pop": _inert(),
    "range": _inert(nullcontext()),
}


def substitute(substitutions: Substitutions) -> None:
    substitutions.replace_all(torch.cuda, _TORCH_CUDA)
    substitutions.replace_all(torch.cuda.nvtx, _NVTX)
    # training/arguments.py 1437 asks for it on GPUs older than Blackwell, to order kernels.
    substitutions.default_environment("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    substitutions.enter(CudaMeansCpu())
