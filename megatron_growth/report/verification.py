"""What verification found, on a terminal and as JSON."""

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from megatron_growth.checkpoint.verify import Problem, Verification

SHOWN = 50  # problems on a terminal; JSON has all


def verification_document(result: Verification) -> dict[str, Any]:
    """A verification as JSON takes it. A difference that is no finite number is a word."""
    problems = [asdict(problem) for problem in result.problems]
    for problem in problems:
        difference = problem["difference"]
        if difference is not None and not math.isfinite(difference):
            problem["difference"] = str(difference)
    return {**asdict(result), "passed": result.passed, "problems": problems}


def print_verification(console: Console, result: Verification) -> None:
    """What was compared, and what is wrong."""
    console.print(_counts(result))
    console.print()
    if result.problems:
        console.print(_problems(result.problems[:SHOWN]))
        if (more := len(result.problems) - SHOWN) > 0:
            console.print(f"and {more} more; --json lists all")
        console.print()
    console.print(_verdict(result))


def _counts(result: Verification) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
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


def _problems(problems: tuple[Problem, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Problems", title_justify="left")
    table.add_column("key", overflow="fold")
    table.add_column("layer", justify="right")
    table.add_column("expert", justify="right")
    table.add_column("what", overflow="fold")
    table.add_column("elements", justify="right")
    table.add_column("max difference", justify="right")
    for problem in problems:
        table.add_row(
            Text(problem.key),
            _number(problem.layer),
            _number(problem.expert),
            Text(problem.what),
            f"{problem.elements:,}" if problem.elements else "",
            "" if problem.difference is None else f"{problem.difference:.3g}",
        )
    return table


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _verdict(result: Verification) -> Text:
    if result.passed:
        return Text("verified: every tensor and object is what the plan says, to the bit", style="bold green")
    keys = len({problem.key for problem in result.problems})
    return Text(f"not verified: {len(result.problems)} problems in {keys} keys", style="bold red")
