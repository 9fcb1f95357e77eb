"""The demo: a small model trained, grown and trained on, by Megatron itself, without a GPU.

==================  ==========================================================
``settings.py``     sizes and steps
``data.py``         Python's standard library as Megatron's indexed dataset
``train.py``        the training script that the ranks run
``recorder.py``     what the ranks write down of it
``launch.py``       torchrun, and its failure
``progress.py``     what is under way, for someone who watches
``experiment.py``   the three runs, from data to figures
``results.py``      what was measured, as a table and as JSON
``figure.py``       and as curves
==================  ==========================================================
"""

from pathlib import Path


def run(out: Path, quick: bool = False) -> None:
    """Run the demo.

    Args:
        out: directory for everything it makes. An earlier demo in it is replaced; anything else in
            it is left alone, and refused.
        quick: far fewer steps, to see that the road is open; nothing is learnt.

    Raises:
        GrowthError: `out` is not ours to write to, or a run failed.
    """
    from megatron_growth.demo.experiment import run_demo  # takes seconds to import

    run_demo(out, quick)
