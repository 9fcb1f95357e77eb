"""How far a width-grown run strays from the run that was not grown, by what becomes of Adam's
moments.

    python -m benchmarks.optimizer_rules [--out benchmarks/results]

Width at alpha = 0 keeps the function, so on the same data the two runs should take the same steps.
Megatron trains a small base, then fifty steps more: not grown, and grown with `rescale`, `copy` and
`reset` at another layout (PP2 x EP2). The table and the figure show |loss difference| step by step;
docs/optimizer.md explains them.
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from tests.megatron.driver import Job, Result, run_jobs
from tests.megatron.test_continuation import BASE_STEPS, RUN, STEPS, changed, continuing
from tests.megatron.test_cpu_backend import EP2, PP2
from tests.megatron.test_growth import EXACT_WIDTH, config_file

RULES = ("rescale", "copy", "reset")
# Adam's epsilon beside the clones' smaller gradients: its effect is m times as strong.
EPSILONS = ("1e-15", "1e-8")


def measure() -> dict[str, list[float]]:
    """Rule and epsilon -> |loss - loss of the run that was not grown|, for each step."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        jobs = [job for epsilon in EPSILONS for job in _jobs(folder / epsilon, epsilon)]
        runs = run_jobs(4, jobs, timeout=1800, directory=folder / "driver")
    distances = {}
    for epsilon in EPSILONS:
        reference = runs[f"not grown {epsilon}"]
        for rule in RULES if epsilon == EPSILONS[0] else RULES[:1]:
            distances[f"{rule}, epsilon {epsilon}"] = _distance(
                runs[f"{rule} {epsilon}"], reference
            )
    return distances


def _jobs(folder: Path, epsilon: str) -> list[Job]:
    folder.mkdir()
    base, run = folder / "base", changed(RUN, adam_eps=epsilon)
    longer = changed(run, train_iters=str(BASE_STEPS + STEPS))
    jobs = [
        Job(f"base {epsilon}", [*run, *EP2.split(), "--save", str(base)]),
        Job(f"not grown {epsilon}",
            [*longer, *EP2.split(), "--load", str(base), "--override-opt-param-scheduler"]),
    ]  # fmt: skip
    for rule in RULES:
        file = config_file(folder / f"{rule}.yaml", base, {"width": EXACT_WIDTH, "optimizer": rule})
        jobs.append(
            Job(f"{rule} {epsilon}", ["--growth-config", file, *continuing(STEPS, f"{PP2} {EP2}")])
        )
    return jobs


def _distance(run: Result, reference: Result) -> list[float]:
    return [abs(a - b) for a, b in zip(run.losses, reference.losses, strict=True)]


def plot(distances: dict[str, list[float]], path: Path) -> None:
    """The distances on a logarithmic axis."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in distances.items():
        axes.semilogy(range(1, len(values) + 1), [max(value, 1e-8) for value in values], label=name)
    axes.set(xlabel="step after growth", ylabel="|loss - loss of the run not grown|",
             title="Width growth at alpha = 0: what becomes of Adam's moments")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    out = parser.parse_args().out
    distances = measure()
    table = Table("moments", "step 1", "step 10", "step 50", "largest", title="|loss difference|")
    for name, values in distances.items():
        table.add_row(
            name, *(f"{value:.1e}" for value in (values[0], values[9], values[-1], max(values)))
        )
    Console().print(table)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": "CPU, fp32",
        "distances": distances,
    }
    (out / "optimizer_rules.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(distances, out / "optimizer_rules.png")


if __name__ == "__main__":
    main()
