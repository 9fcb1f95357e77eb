"""What verification found, on a terminal and as JSON."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from megatron_growth.checkpoint.verify import Problem, Verification

if TYPE_CHECKING:
    from megatron_growth.training.forward import Forward

SHOWN = 50  # problems on a terminal; JSON has all


def verification_document(result: Verification, forward: "Forward | None" = None) -> dict[str, Any]:
    """A verification as JSON takes it. A difference that is no finite number is a word."""
    problems = [asdict(problem) for problem in result.problems]
    for problem in problems:
        difference = problem["difference"]
        if difference is not None and not math.isfinite(difference):
            problem["difference"] = str(difference)
    document = {**asdict(result), "passed": result.passed, "problems": problems}
    if forward is not None:
        document["forward"] = {
            **asdict(forward),
            "expectation": forward.expectation,
            "passed": forward.passed,
        }
    return document


def print_verification(
    console: Console, result: Verification, forward: "Forward | None" = None
) -> None:
    """What was compared, and what is wrong."""
    console.print(_counts(result))
    console.print()
    for problem in result.problems[:SHOWN]:
        console.print(_where(problem), soft_wrap=True)
        console.print(_what(problem), soft_wrap=True)
    if (more := len(result.problems) - SHOWN) > 0:
        console.print(f"and {more} more; --json lists all")
    console.print(_verdict(result))
    if forward is not None:
        console.print()
        console.print(_forward(forward))


def _forward(forward: "Forward") -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, value in (
        ("forward pass", f"{forward.tokens} tokens of the standard library's source"),
        ("loss", f"{forward.base_loss:.6f} -> {forward.grown_loss:.6f}"),
        ("max |dlogit|", f"{forward.max_difference:.2e} of {forward.largest_logit:.2f}"),
        ("mean |dlogit|", f"{forward.mean_difference:.2e} of {forward.spread:.2f}"),
        ("KL(base || grown)", f"{forward.kl:.2e}"),
        ("expectation", forward.expectation),
        ("verdict", "as expected" if forward.passed else "NOT as expected"),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _counts(result: Verification) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("base", result.base),
        ("grown", result.grown),
        ("fingerprint", result.fingerprint),
        ("tensors", f"{result.tensors:,}"),
        ("elements compared", f"{result.elements:,} ({decimal(result.nbytes)})"),
        ("objects compared", f"{result.objects:,}"),
        ("seconds", f"{result.seconds:.1f}"),
    ):
        table.add_row(Text(name, style="bold"), Text(value))
    return table


def _where(problem: Problem) -> Text:
    places = (("layer", problem.layer), ("expert", problem.expert))
    numbered = [f"{name} {number}" for name, number in places if number is not None]
    return Text(", ".join([problem.key or "the checkpoint", *numbered]), style="bold")


def _what(problem: Problem) -> Text:
    text = Text(f"    {problem.what}")
    if problem.elements:
        text.append(
            f": {problem.elements:,} elements differ, by {problem.difference:.3g} at most",
            style="red",
        )
    return text


def _verdict(result: Verification) -> Text:
    if result.passed:
        return Text(
            "verified: every tensor and object is what the plan says, to the bit",
            style="bold green",
        )
    keys = len({problem.key for problem in result.problems})
    return Text(f"not verified: {len(result.problems)} problems in {keys} keys", style="bold red")
