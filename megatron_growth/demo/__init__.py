"""The demo: a small model trained, grown, and trained on, by Megatron itself, on a machine without a GPU.

    settings.py   sizes and steps
    data.py       Python's standard library as Megatron's indexed dataset
    train.py      the training script that the ranks run
    recorder.py   what the ranks write down of it
    launch.py     torchrun, its progress and its failure
    experiment.py the three runs, from data to figures
    results.py    what was measured, as JSON and as a table
    figure.py     and as curves
"""

from pathlib import Path


def run(out: Path, quick: bool = False) -> None:
    """Run the demo.

    Args:
        out: directory for everything it makes; that of an earlier demo is replaced, another is refused.
        quick: far fewer steps, to see that the road is open; nothing is learnt.

    Raises:
        GrowthError: `out` is not ours to write to, or one of the runs failed.
    """
    from megatron_growth.demo.experiment import run_demo  # brings torch in

    run_demo(out, quick)
