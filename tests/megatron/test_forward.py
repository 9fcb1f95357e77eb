"""What a plan promises of the grown model's logits, and who meets it. That real models do is in
test_growth.py."""

from typing import Any

import pytest
import torch

from megatron_growth import GrowthConfig
from megatron_growth.planning.build import build_plan
from megatron_growth.planning.plan import Architecture, GrowthPlan
from megatron_growth.planning.router import Router
from megatron_growth.training.forward import compared, keeps_function, noise_share

SOURCE = Architecture(num_layers=4, num_experts=8, top_k=2, key_form="stacked")
ROUTER = Router(num_experts=8, score_function="sigmoid", expert_bias=True)
SILENT = {"experts": 0, "router": 0}
ZERO = {"new_layer_init": "zero_output"}
PARKED = {"top_k": "keep", "clones": "parked"}


def _plan(growth: dict[str, Any]) -> GrowthPlan:
    return build_plan(GrowthConfig.model_validate(growth), SOURCE, router=ROUTER)


@pytest.mark.parametrize(
    ("growth", "exact", "share"),
    [
        ({"width": {"noise": SILENT}}, True, 0),
        ({"depth": ZERO}, True, 0),
        ({"depth": ZERO, "width": PARKED}, True, None),
        ({"width": {**PARKED, "noise": {"experts": 9}}}, True, None),
        ({"width": {}}, False, 0.02),
        ({"width": {"noise": {"experts": 0.1, "router": 0}}}, False, 0.1),
        ({"depth": ZERO, "width": {"noise": {"router": 0.03}}}, False, 0.04),
        ({"depth": {}}, False, None),
        ({"depth": {}, "width": PARKED}, False, None),
        ({"depth": {}, "width": {"noise": SILENT}}, False, None),
        ({"width": {"top_k": "keep", "noise": SILENT}}, False, None),
    ],
)
def test_a_plan_promises(growth: dict[str, Any], exact: bool, share: float | None) -> None:
    plan = _plan(growth)
    assert keeps_function(plan) is exact
    if not exact:
        assert noise_share(plan) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("growth", "moved", "passed", "words"),
    [
        ({"width": {"noise": SILENT}}, 0.0, True, "exact: max |dlogit| within "),
        ({"width": {"noise": SILENT}}, 0.01, False, "exact: "),
        ({"width": {}}, 0.01, True, "bounded by alpha: mean |dlogit| within "),
        ({"width": {}}, 0.1, False, "bounded by alpha: "),
        ({"depth": {}}, 5.0, True, "none: "),
    ],
)
def test_logits_are_held_to_the_promise(
    growth: dict[str, Any], moved: float, passed: bool, words: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 16, 32, generator=generator)
    after = before + moved * torch.randn(1, 16, 32, generator=generator)
    tokens = torch.arange(17)[None]
    result = compared(before, after, tokens, _plan(growth), "fp32")
    assert result.passed is passed
    assert result.expectation.startswith(words)
    assert result.mean_difference == pytest.approx(0.8 * moved, rel=0.1)
    assert result.spread == pytest.approx(1, rel=0.1)


def test_in_16_bits_a_token_may_change_its_expert() -> None:
    """A rounded tie of two experts' scores decides by chance; one token then differs much."""
    before = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(0))
    after, tokens = before.clone(), torch.arange(257)[None] % 32
    after[0, 7] += 1
    plan = _plan({"width": {"noise": SILENT}})
    for precision, passed in (("fp32", False), ("bf16", True), ("fp16", True)):
        result = compared(before, after, tokens, plan, precision)
        assert result.exact
        assert result.passed is passed
    assert result.expectation.startswith("exact but for rounding: mean |dlogit| within ")
    assert not compared(before, before + 0.1, tokens, plan, "bf16").passed
