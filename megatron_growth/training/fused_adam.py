"""Adam with the interface of a fused one, where neither Transformer Engine nor Apex is installed.

Megatron takes Adam from one of these and falls back to ``torch.optim.AdamW``. In 0.19.2 that
fallback does not survive the distributed optimizer (``core/optimizer/distrib_optimizer.py``):
saving before the first step asserts (839), loading a resharded state asks for a key ``step`` that
is not there (1223), and all parameters are given one shared ``step`` tensor (1032), which then
counts every parameter as an iteration and bends the learning curve without a word. All three lie in
code that production never runs. So the stand-in below has the interface of Apex's FusedAdam,
``step`` in the parameter group included, and the optimizer code that runs is production's.

Without CUDA the CPU backend installs it, for good. With CUDA the entry points do, through
``where_missing()``, and only where Megatron has found neither library: with one of them nothing is
touched.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch

from megatron_growth.errors import ConfigError
from megatron_growth.training.substitutions import Substitutions


class FusedAdam(torch.optim.Optimizer):
    """Adam or AdamW with the constructor and the state layout of ``apex.optimizers.FusedAdam``."""

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, object]],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        if capturable:
            raise ConfigError(
                "--optimizer-cuda-graph needs Transformer Engine's Adam, which is not installed; "
                "leave it out or install transformer-engine"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
            },
        )
        self._decoupled_weight_decay = adam_w_mode

    def __setstate__(self, state: dict) -> None:
        """Called by `load_state_dict` too: groups that torch's own Adam saved lack what is ours."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient; the step count belongs to the group."""
        for group in self.param_groups:
            group["step"] = self._steps_taken(group) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _steps_taken(self, group: dict) -> int:
        """As the group says; where it does not, as each parameter of torch's own Adam does, whose
        state a checkpoint from before the stand-in has."""
        states = [self.state[param] for param in group["params"] if param in self.state]
        kept = [int(state.pop("step")) for state in states if "step" in state]
        return group.get("step", max(kept, default=0))

    def _update(self, param: torch.Tensor, group: dict) -> None:
        beta1, beta2 = group["betas"]
        rate, decay, count = group["lr"], group["weight_decay"], group["step"]
        correction1 = 1 - beta1**count if group["bias_correction"] else 1.0
        correction2 = 1 - beta2**count if group["bias_correction"] else 1.0
        state, grad = self.state[param], param.grad
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        if decay and self._decoupled_weight_decay:
            param.mul_(1 - rate * decay)
        elif decay:
            grad = grad.add(param, alpha=decay)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square / correction2).sqrt_().add_(group["eps"])
        param.addcdiv_(mean, denominator, value=-rate / correction1)


def needed() -> bool:
    """Whether Megatron found neither library, and no stand-in is in place yet."""
    from megatron.core.optimizer import distrib_optimizer

    return not distrib_optimizer.HAVE_APEX_OR_TE


@contextmanager
def where_missing() -> Iterator[None]:
    """Inside, Megatron has a fused Adam: its own, or where it found none the stand-in."""
    substitutions = Substitutions()
    if needed():
        with substitutions:
            substitute(substitutions)
    try:
        yield
    finally:
        substitutions.restore()


def substitute(substitutions: Substitutions) -> None:
    """Put the stand-in in Megatron's place for it."""
    import megatron.core.optimizer
    from megatron.core.optimizer import distrib_optimizer

    # core/optimizer/__init__.py 14-35 and core/optimizer/distrib_optimizer.py 20-35: the imports.
    substitutions.replace(megatron.core.optimizer, "Adam", FusedAdam)
    substitutions.replace(megatron.core.optimizer, "USING_PYTORCH_OPTIMIZER", False)
    substitutions.replace(distrib_optimizer, "Adam", FusedAdam)
    substitutions.replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    substitutions.replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
    # distrib_optimizer.py 2061 is the one loader without no_grad: where the parameters themselves
    # are the fp32 masters, it writes in place to views of leaves that require a gradient.
    owner = distrib_optimizer.DistributedOptimizer
    name = "load_parameter_state_from_dp_reshardable"
    substitutions.replace(owner, name, torch.no_grad()(getattr(owner, name)))
