"""The stand-in for a fused Adam: the same steps as torch's, and in Megatron's place for it only
where Megatron has none."""

import copy
import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_growth.errors import ConfigError
from megatron_growth.training.fused_adam import FusedAdam
from megatron_growth.training.substitutions import Substitutions
from tests.megatron.driver import REPOSITORY


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2)]


def _train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("decoupled", [True, False])
def test_it_takes_torchs_steps(decoupled: bool) -> None:
    ours, theirs = _parameters(), _parameters()
    _train(FusedAdam(ours, adam_w_mode=decoupled, **SETTINGS), range(9))
    _train((torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **SETTINGS), range(9))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)
        assert not torch.equal(mine, _parameters()[0])


def test_it_goes_on_from_torchs_state_at_its_step() -> None:
    """Torch's Adam counts for each parameter; a step of 0 would correct for a bias long gone."""
    ours, theirs = _parameters(), _parameters()
    torchs = torch.optim.AdamW(theirs, **SETTINGS)
    _train(torchs, range(5))
    for mine, trained in zip(ours, theirs, strict=True):
        mine.data.copy_(trained.data)
    stand_in = FusedAdam(ours, **SETTINGS)
    stand_in.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for optimizer in (torchs, stand_in):
        _train(optimizer, range(5, 8))
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted)
    (group,) = stand_in.param_groups
    assert group["step"] == 8
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in stand_in.state.values())


def test_a_cuda_graph_of_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="--optimizer-cuda-graph needs Transformer Engine's Adam"):
        FusedAdam(_parameters(), capturable=True)


def test_what_stayed_replaced_can_be_put_back() -> None:
    class Owner:
        name = "before"

    substitutions = Substitutions()
    with substitutions:
        substitutions.replace(Owner, "name", "after")
    assert Owner.name == "after"
    substitutions.restore()
    assert Owner.name == "before"


def _run(program: str) -> None:
    """In a process where no CPU backend is installed, as on a machine with CUDA."""
    opening = """
        import torch
        import megatron.core.optimizer as optimizer
        from megatron.core.optimizer import distrib_optimizer as distributed
        from megatron_growth.training import fused_adam

        def found():
            return (optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER, distributed.Adam,
                    distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER)

        before = found()
    """
    source = textwrap.dedent(opening) + textwrap.dedent(program)
    subprocess.run([sys.executable, "-W", "ignore", "-c", source], cwd=REPOSITORY, check=True)


@pytest.mark.slow
def test_it_stands_in_where_megatron_found_neither_library_and_leaves_again() -> None:
    _run("""
        if before[3]:
            raise SystemExit  # one of them is installed
        assert fused_adam.needed()
        with fused_adam.where_missing():
            stand_in = fused_adam.FusedAdam
            assert found() == (stand_in, False, stand_in, True, True)
            assert not fused_adam.needed()
            with fused_adam.where_missing():  # within another's
                assert found() == (stand_in, False, stand_in, True, True)
            assert found() == (stand_in, False, stand_in, True, True)
        assert found() == before
        try:
            with fused_adam.where_missing():
                raise KeyError
        except KeyError:
            assert found() == before
        else:
            raise AssertionError
    """)


@pytest.mark.slow
def test_it_stays_away_where_megatron_found_one_and_where_a_name_is_gone() -> None:
    _run("""
        distributed.HAVE_APEX_OR_TE = True
        before = found()
        with fused_adam.where_missing():
            assert found() == before

        distributed.HAVE_APEX_OR_TE = False
        del distributed.USING_APEX_OPTIMIZER
        try:
            with fused_adam.where_missing():
                raise SystemError("entered")
        except AttributeError as error:
            assert "no 'USING_APEX_OPTIMIZER'" in str(error)
        assert optimizer.Adam is before[0]
        assert not distributed.HAVE_APEX_OR_TE
    """)
