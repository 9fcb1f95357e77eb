"""The definition of a grown checkpoint, by the shortest route that is plainly right: whole tensors
and loops.

For each target layer, take its source layer; for each target expert, its source expert; add what
the definition of noise says, element by element. Nothing here knows of boxes, chunks or readers,
and nothing comes from the package: Philox runs on Python's integers, sigma on fractions. The view
must equal this bit for bit.
"""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from statistics import NormalDist

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

EXPERT_TENSORS = ("mlp.experts.experts.", "mlp.router.")
NOISY = {
    "mlp.experts.experts.linear_fc1.weight": "experts",
    "mlp.experts.experts.linear_fc2.weight": "experts",
    "mlp.router.weight": "router",
}
RESIDUAL_OUTPUTS = (
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.experts.experts.linear_fc2.weight",
    "mlp.experts.experts.linear_fc2.bias",
    "mlp.fc2_latent_proj.bias",
)
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
MASTERS = ("param", "fp32_param")


@dataclass(frozen=True)
class Growth:
    """A growth, written out.

    Attributes:
        layers: source layer of each target layer.
        experts: (source expert, clone index) of each target expert.
        alpha: noise scales of "experts" and "router".
        zero_output: depth copies start with zero residual outputs.
        optimizer: rescale, copy or reset.
        seed: of the noise.
        parked: clones start with a bias that no score makes up for.
        stacked: the grown checkpoint stacks its layers.
    """

    layers: tuple[int, ...]
    experts: tuple[tuple[int, int], ...]
    alpha: tuple[tuple[str, float], ...] = (("experts", 0.01), ("router", 0.01))
    zero_output: bool = False
    optimizer: str = "rescale"
    seed: int = 1234
    parked: bool = False
    stacked: bool = True

    @property
    def num_clones(self) -> int:
        return 1 + max(clone for _, clone in self.experts) if self.experts else 1


def interleaved(num_experts: int, factor: int) -> tuple[tuple[int, int], ...]:
    return tuple((expert, clone) for expert in range(num_experts) for clone in range(factor))


def appended(num_experts: int, factor: int) -> tuple[tuple[int, int], ...]:
    return tuple((expert, clone) for clone in range(factor) for expert in range(num_experts))


# -- tensors ---------------------------------------------------------------------------------------


def grown_tensors(base: Tensors, growth: Growth) -> Tensors:
    """Every tensor of the grown checkpoint by key."""
    grown: Tensors = {}
    stacks: dict[str, list[torch.Tensor]] = defaultdict(list)
    apart = _by_layer(base)
    for (state, name), layers in apart.items():
        if state and growth.optimizer == "reset":
            continue
        masters = next(
            (apart[m, name] for m in MASTERS if (m, name) in apart and growth.optimizer != "reset"),
            {},
        )
        prefix = f"optimizer.state.{state}." if state else ""
        if None in layers:  # no layer of the decoder: outside, or of an MTP module
            grown[prefix + name] = _outside(state, name, layers[None], masters.get(None), growth)
            continue
        for target, source in enumerate(growth.layers):
            if source not in layers:  # a dense layer has no router, a MoE layer no dense projection
                continue
            is_copy = source in growth.layers[:target]
            tensor = _layer(
                state, name, layers[source], masters.get(source), growth, target, is_copy
            )
            if growth.stacked:
                stacks[f"{prefix}decoder.layers.{name}"].append(tensor)
            else:
                grown[f"{prefix}decoder.layers.{target}.{name}"] = tensor
    grown.update((key, torch.stack(tensors)) for key, tensors in stacks.items())
    return grown


def _by_layer(base: Tensors) -> dict[tuple[str, str], dict[int | None, torch.Tensor]]:
    """(optimizer state, name) -> decoder layer, None outside the decoder -> tensor."""
    apart: dict[tuple[str, str], dict[int | None, torch.Tensor]] = defaultdict(dict)
    for key, tensor in base.items():
        state, name = re.fullmatch(r"(?:optimizer\.state\.(\w+)\.)?(.+)", key).groups(default="")  # type: ignore[union-attr]
        if per_layer := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
            apart[state, per_layer[2]][int(per_layer[1])] = tensor
        elif name.startswith("decoder.layers."):
            for layer, part in enumerate(tensor):
                apart[state, name.removeprefix("decoder.layers.")][layer] = part
        else:
            apart[state, name][None] = tensor
    return apart


def _outside(
    state: str, name: str, tensor: torch.Tensor, master: torch.Tensor | None, growth: Growth
) -> torch.Tensor:
    inner = re.sub(r"mtp\.layers\.\d+\.transformer_layer\.", "", name)
    if name.startswith("mtp.") and inner.startswith(EXPERT_TENSORS):
        return _experts(state, inner, tensor, master, growth, name, "null")
    return tensor.clone()


def _layer(
    state: str,
    name: str,
    tensor: torch.Tensor,
    master: torch.Tensor | None,
    growth: Growth,
    target: int,
    is_copy: bool,
) -> torch.Tensor:
    """One target layer's tensor, from its source layer's."""
    if not name.startswith(EXPERT_TENSORS):
        grown = tensor.clone()
    else:
        grown = _experts(state, name, tensor, master, growth, f"decoder.layers.{name}", str(target))
    if growth.zero_output and is_copy and name in RESIDUAL_OUTPUTS and state not in MOMENTS:
        return torch.zeros_like(grown)
    return grown


def _experts(
    state: str,
    name: str,
    tensor: torch.Tensor,
    master: torch.Tensor | None,
    growth: Growth,
    stream: str,
    layer: str,
) -> torch.Tensor:
    """All target experts of one layer, axis 0 the expert."""
    alpha = dict(growth.alpha).get(NOISY.get(name, ""), 0.0)
    grown = []
    for target, (source, clone) in enumerate(growth.experts):
        part = tensor[source]
        if state in MOMENTS:
            if growth.optimizer == "rescale" and growth.parked:
                part = torch.zeros_like(part) if clone > 0 and state == "exp_avg" else part
            elif growth.optimizer == "rescale":
                part = (part.float() / growth.num_clones ** MOMENTS[state]).to(part.dtype)
        elif clone > 0 and growth.parked and name == "mlp.router.expert_bias":
            spread = np.ptp(tensor.double().numpy())
            part = torch.tensor(float(part) - spread - 2.0, dtype=torch.float64).to(part.dtype)
        elif clone > 0 and alpha > 0:
            exact = tensor if master is None or state else master
            spread = exact if name == "mlp.router.weight" else exact[source]
            text = f'[1,{growth.seed},"{stream}",{layer},{target}]'
            part = _noisy(exact[source], alpha * sigma(spread), text).to(part.dtype)
        grown.append(part)
    return torch.stack(grown)


def _noisy(tensor: torch.Tensor, scale: float, stream: str) -> torch.Tensor:
    z = torch.tensor(normals(stream, tensor.numel()), dtype=torch.float32).view(tensor.shape)
    return tensor.float() + torch.tensor(scale, dtype=torch.float32) * z


# -- objects ---------------------------------------------------------------------------------------


def grown_objects(
    base: dict[str, object], growth: Growth, num_layers: int, num_experts: int
) -> dict[str, object]:
    """Every object of the grown checkpoint, the common state left as it is."""
    grown: dict[str, object] = {}
    num_targets, num_clones = len(growth.layers), len(growth.experts)
    for key, value in base.items():
        name, _, shard = key.partition("/shard_")
        mtp = name.startswith("mtp.")
        found = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", name)
        if not (mtp or found):
            grown[key] = value
            continue
        of_experts = "mlp.experts.experts." in name
        place = [int(part) for part in shard.partition("_")[0].split(".")]
        if mtp:
            for target, (source, _) in enumerate(growth.experts):
                if not of_experts:
                    grown[key] = value
                elif source == place[0]:
                    grown[f"{name}/shard_{target}_{num_clones}"] = value
            continue
        assert found
        layer = int(found[1]) if found[1] else place[0]
        for target in (t for t, source in enumerate(growth.layers) if source == layer):
            experts = (
                [e for e, (source, _) in enumerate(growth.experts) if source == place[-1]]
                if of_experts
                else [-1]
            )
            for e in experts:
                if growth.stacked:
                    where = (
                        f"{target}.{e}_{num_targets}.{num_clones}"
                        if of_experts
                        else f"{target}_{num_targets}"
                    )
                    grown[f"decoder.layers.{found[2]}/shard_{where}"] = value
                else:
                    where = f"{e}_{num_clones}" if of_experts else "0_1"
                    grown[f"decoder.layers.{target}.{found[2]}/shard_{where}"] = value
    return grown


# -- noise -----------------------------------------------------------------------------------------


def philox4x32_10(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Salmon et al., SC 2011: ten rounds on four 32-bit words, on Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k0, second % 2**32, (first >> 32) ^ d ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@cache
def quantiles() -> list[float]:
    """65536 midpoint quantiles of the normal distribution, scaled to variance 1."""
    raw = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(65536)]
    scale = math.sqrt(math.fsum(z * z for z in raw) / 65536)
    return [z / scale for z in raw]


def normals(stream: str, count: int) -> list[float]:
    """The first `count` normals of a stream."""
    return [z for _, z in zip(range(count), _normals(stream), strict=False)]


def _normals(stream: str) -> Iterator[float]:
    digest = hashlib.blake2b(stream.encode(), digest_size=8).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    counter = 0
    while True:
        for word in philox4x32_10((counter % 2**32, counter >> 32, 0, 0), key):
            yield quantiles()[word % 65536]
            yield quantiles()[word // 65536]
        counter += 1


# -- sigma -----------------------------------------------------------------------------------------


def sigma(tensor: torch.Tensor) -> float:
    """Sample standard deviation of the values put on a grid, in exact fractions."""
    values = [Fraction(value) for value in tensor.double().flatten().tolist()]
    largest = max(map(abs, values))
    if largest == 0 or len(values) < 2:
        return 0.0
    above = Fraction(1)  # the power of two just above the largest magnitude
    while above <= largest:
        above *= 2
    while above / 2 > largest:
        above /= 2
    step = above / 2**16
    grid = [round(value / step) for value in values]  # half to even
    n = len(grid)
    variance = Fraction(n * sum(g * g for g in grid) - sum(grid) ** 2, n * (n - 1))
    return float(math.sqrt(variance) * step) if step >= 1 else math.sqrt(variance) * float(step)
