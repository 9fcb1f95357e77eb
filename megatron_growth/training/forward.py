"""Base and grown model on the same tokens, through Megatron: how far apart are their logits?

    torchrun -m megatron_growth.training.forward --load DIR [--growth-config FILE] \\
        --tokens FILE --out FILE

One process loads one model, plainly or grown, exactly as training would, runs one forward pass and
stops. `compare` starts one for the base and one for the grown model and sets their logits against
each other. The model must fit on one device.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_growth.checkpoint.directory import iteration_directory
from megatron_growth.checkpoint.source import SourceCheckpoint
from megatron_growth.config import load_config
from megatron_growth.errors import CheckpointError
from megatron_growth.planning.plan import GrowthPlan
from megatron_growth.training import cpu_backend
from megatron_growth.training.entry import one_line_errors, train

# What any run of Megatron must be told; no step is trained and no data read.
_ONE_PASS = """
    --micro-batch-size 1 --global-batch-size 1 --mock-data --num-workers 0 --eval-iters 0
    --eval-interval 1000 --no-load-optim --no-load-rng --exit-on-missing-checkpoint
""".split()  # noqa: SIM905
# megatron_growth: error: ...
# [rank0]: ValueError: ...
_ERROR = re.compile(r"(\[rank\d+\]: )?(megatron_growth: error|[\w.]*(Error|Exception)\b)")
_TOKENS = 1024  # that a comparison takes, or one sequence where that is longer
# Largest |dlogit| that summation order explains, as a share of the largest logit.
_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.02}
# Mean |dlogit| that rounding makes, beside that of noise, as a share of the logits' standard
# deviation.
_MEAN_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.005}


@dataclass(frozen=True)
class Forward:
    """Two models on the same tokens.

    What the plan promises is `exact` (the function is kept), a `bound` on the mean difference
    (clones with noise), or neither (depth by copy, a kept top-k).

    Attributes:
        tokens: positions compared.
        base_loss: mean next-token cross-entropy of the base, nats.
        grown_loss: the same of the grown model.
        max_difference: max |dlogit|.
        mean_difference: mean |dlogit|.
        largest_logit: max |logit| of the base, for scale.
        spread: standard deviation of the base's logits, for scale.
        kl: mean KL(base || grown) a position, nats.
        exact: whether the plan keeps the function.
        tolerance: the largest max_difference that an exact plan may have in fp32.
        bound: the largest mean_difference that this plan may have; None where it promises none, and
            for an exact plan in fp32.
    """

    tokens: int
    base_loss: float
    grown_loss: float
    max_difference: float
    mean_difference: float
    largest_logit: float
    spread: float
    kl: float
    exact: bool
    tolerance: float
    bound: float | None

    @property
    def passed(self) -> bool:
        """Whether the models are as near as the plan promises; one that promises nothing has
        nothing to fail."""
        if self.bound is not None:
            return self.mean_difference <= self.bound
        return not self.exact or self.max_difference <= self.tolerance

    @property
    def expectation(self) -> str:
        """What the plan promises, in words."""
        if self.exact and self.bound is None:
            return f"exact: max |dlogit| within {self.tolerance:.1e}, the order of summation"
        if self.exact:
            return (
                f"exact but for rounding: mean |dlogit| within {self.bound:.1e}; the maximum is of "
                "a token whose expert a rounded tie decides"
            )
        if self.bound is not None:
            return (
                f"bounded by alpha: mean |dlogit| within {self.bound:.1e}, (alpha of experts + "
                "alpha of router + rounding) * standard deviation of the logits"
            )
        return (
            "none: depth copies and a kept top-k make another function; the figures are to be read"
        )


def keeps_function(plan: GrowthPlan) -> bool:
    """Whether the grown model computes what the base does: depth with zero outputs, and clones
    without noise or parked.

    Router options that would not keep it were refused when the plan was made, `top_k: keep` with
    clones in use apart.
    """
    silent = plan.noise.experts == plan.noise.router == 0
    if plan.experts.is_identity or plan.parked:
        return _depth_keeps(plan)
    return noise_share(plan) is not None and silent


def noise_share(plan: GrowthPlan) -> float | None:
    """How far noise on clones may move logits on average, as a share of their standard deviation;
    None where more than noise moves them.

    To first order each layer's output moves by a small multiple of alpha: that of an expert as its
    weights do, gates as logits of the router do, and the share of tokens whose last expert changes
    is proportional to alpha, too. The mean is bounded so, the maximum is not: it is of a token that
    changed its expert. docs/verify.md has what was measured: a seventh of this at most.
    """
    scaled = (
        plan.source.top_k is None or plan.target.top_k == plan.source.top_k * plan.experts.factor
    )
    if not (_depth_keeps(plan) and scaled):
        return None
    return plan.noise.experts + plan.noise.router


def _depth_keeps(plan: GrowthPlan) -> bool:
    return plan.layers.is_identity or plan.zero_output


def compare(
    base: Path, plan: GrowthPlan, *, grown: Path | None = None, config: Path | None = None
) -> Forward:
    """Run both models.

    Args:
        base: Megatron checkpoint directory of the base.
        plan: the growth between the two.
        grown: Megatron checkpoint directory of the grown model; None grows the base at load.
        config: the growth configuration, for a grown model that is not on disk.

    Raises:
        CheckpointError: one of the models cannot be run; the message ends with what it said.
    """
    args = SourceCheckpoint(iteration_directory(base), weights_only=True).required_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = real_tokens(_length(args), args.padded_vocab_size)
        torch.save(tokens, folder / "tokens.pt")
        second = [] if grown else ["--growth-config", _growth_alone(config, folder)]
        before = _logits(folder, "base", ["--load", str(base)])
        after = _logits(folder, "grown", ["--load", str(grown or base), *second])
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return compared(before, after, tokens, plan, precision)


def _growth_alone(config: Path | None, folder: Path) -> str:
    """The configuration without `continue`: of a warm-up the one step here is too short."""
    path = folder / "growth.yaml"
    path.write_text(json.dumps({"growth": load_config(config).growth.model_dump(mode="json")}))
    return str(path)


def compared(
    before: torch.Tensor,
    after: torch.Tensor,
    tokens: torch.Tensor,
    plan: GrowthPlan,
    precision: str,
) -> Forward:
    """Two models' logits, and what the plan promises of them.

    Args:
        before: the base's, [rows, positions, vocabulary].
        after: the grown model's.
        tokens: what they were computed from, and the label of the last, [rows, positions + 1].
        plan: the growth between the two.
        precision: `fp32`, `bf16` or `fp16`.
    """
    first, second = before.float().log_softmax(-1), after.float().log_softmax(-1)
    labels = tokens[:, 1:, None]
    largest, spread = float(before.abs().max()), float(before.float().std())
    difference = (before.float() - after.float()).abs()
    exact, share = keeps_function(plan), noise_share(plan)
    # In 16 bits some tokens change their expert by rounding alone: the maximum tells nothing.
    bounded = precision != "fp32" if exact else share is not None
    return Forward(
        tokens=labels.numel(),
        base_loss=-float(first.gather(-1, labels).mean()),
        grown_loss=-float(second.gather(-1, labels).mean()),
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        largest_logit=largest,
        spread=spread,
        kl=float((first.exp() * (first - second)).sum(-1).mean()),
        exact=exact,
        tolerance=_TOLERANCE[precision] * largest,
        bound=((0 if exact else share or 0) + _MEAN_TOLERANCE[precision]) * spread
        if bounded
        else None,
    )


def _length(args: Any) -> int:
    """The sequences that the base was trained on; one that no run of Megatron has trained does not
    say."""
    trained = getattr(args, "seq_length", None)
    return trained or min(_TOKENS, args.max_position_embeddings)


def real_tokens(length: int, vocabulary: int) -> torch.Tensor:
    """Text of Python's standard library, a token for each byte: rows of `length` and the label of
    the last, some `_TOKENS` in all, shape [rows, length + 1]."""
    rows = max(1, _TOKENS // length)
    text = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) > rows * length:
            break
    flat = torch.tensor([byte % vocabulary for byte in text[: rows * length + 1]])
    return flat.unfold(0, length + 1, length)


def _logits(folder: Path, name: str, argv: list[str]) -> torch.Tensor:
    out = folder / f"{name}.pt"
    words = [*argv, "--tokens", str(folder / "tokens.pt"), "--out", str(out)]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
    ]
    done = subprocess.run(
        [*command, "-m", "megatron_growth.training.forward", *words],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if done.returncode or not out.exists():
        said = [line for line in done.stderr.splitlines() if _ERROR.match(line)] or ["nothing"]
        raise CheckpointError(
            f"the {name} model cannot be run on one device; it said: {said[0].strip()}; "
            "check without --forward"
        )
    return torch.load(out)


# -- in the process that runs one model


class _Done(BaseException):
    """The logits are written; not an error, and not for Megatron's handlers of those."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load one model and write its logits."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--load", required=True)
    parser.add_argument("--growth-config")
    parser.add_argument("--tokens", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    own = parser.parse_args(argv)
    with one_line_errors():
        cpu_backend.install()
        from megatron_growth.training.arguments import completed

        source = SourceCheckpoint(iteration_directory(own.load), weights_only=True)
        args = source.required_args()
        last = str((source.common_state or {}).get("iteration", 0) + 1)
        words = [*_ONE_PASS, *_described(args), "--load", own.load, "--train-iters", last]
        if getattr(args, "lr", None) is None:
            words += ["--lr", "1"]  # of steps that are not made
        if own.growth_config:  # the architecture is the base's, grown
            train(["--growth-config", own.growth_config, *words], lambda w: _run(w, own))
        else:
            words = completed(words, args)
            _run([*words, *cpu_backend.arguments(words)], own)


def _described(args: Any) -> list[str]:
    """What of the base's arguments must be given with an option of its family, or may not be there.

    No text is read, so the base's tokenizer, which may have moved, is not either; Megatron's null
    tokenizer has one token more than it is told.
    """
    from megatron_growth.training.arguments import render

    return render(
        {
            "bf16": args.bf16,
            "fp16": args.fp16,
            "seq_length": _length(args),
            "tokenizer_type": "NullTokenizer",
            "vocab_size": args.padded_vocab_size - 1,
        }
    )


def _run(words: list[str], own: argparse.Namespace) -> None:
    from megatron_growth.training import gpt  # imports megatron, which the CPU backend must precede

    with _instead_of_training(lambda model: _write(model, own)):
        try:
            gpt.run(words)
        except _Done:
            return


@contextmanager
def _instead_of_training(act: Callable[[Any], None]) -> Iterator[None]:
    """Once Megatron has built and loaded the model, hand it over and stop."""
    from megatron.training import training

    original = training.setup_model_and_optimizer

    def built(*args: Any, **kwargs: Any) -> Any:
        model, *_ = original(*args, **kwargs)
        act(model)
        raise _Done

    training.setup_model_and_optimizer = built
    try:
        yield
    finally:
        training.setup_model_and_optimizer = original


def _write(model: Any, own: argparse.Namespace) -> None:
    (chunk,) = model
    device = next(chunk.parameters()).device
    tokens = torch.load(own.tokens)[:, :-1].to(device)
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, device=device).triu(1).bool()
    chunk.eval()
    positions = torch.arange(length, device=device)[None]
    with torch.no_grad():
        logits = [chunk(row[None], positions, mask).cpu() for row in tokens]
    torch.save(torch.cat(logits), own.out)


if __name__ == "__main__":
    main()
