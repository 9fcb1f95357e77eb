"""Every stage's command line, put to Megatron before any node is paid for.

A stage with a base is checked as it will run: what `megatron_growth.pretrain` takes from the base
and grows is put in by the same function, on the arguments of the base as Megatron validated them.
"""

from argparse import Namespace

from megatron_growth.errors import ConfigError, GrowthError
from megatron_growth.launcher.arguments import model_arguments, stage_arguments
from megatron_growth.launcher.budget_notes import divisions
from megatron_growth.launcher.chain import Link
from megatron_growth.launcher.environment import environment
from megatron_growth.launcher.experiment import Experiment
from megatron_growth.launcher.options import words


def check_flags(experiment: Experiment, links: list[Link]) -> list[Namespace]:
    """Megatron's validated arguments of each stage.

    Raises:
        ConfigError: Megatron refuses a stage, or would miss what does not divide; the message names
            it.
    """
    for link in links:
        for note in divisions(experiment, link):
            raise ConfigError(str(note))
    from megatron_growth.training import flag_check  # imports megatron

    checked: list[Namespace] = []
    for link in links:
        argv = stage_arguments(experiment, link)
        try:
            if link.growth is not None:
                base = checked[-1] if checked else _base(experiment, link)
                argv = flag_check.grown_command_line(argv, base, link.growth)
            checked.append(_checked(experiment, link, argv))
        except GrowthError as error:
            raise ConfigError(f"{link.path} ({link.stage.name}): {error}") from None
    return checked


def _checked(experiment: Experiment, link: Link, argv: list[str]) -> Namespace:
    from megatron_growth.training import flag_check

    cluster = experiment.cluster
    return flag_check.check(
        argv,
        world_size=link.stage.nodes * cluster.processes_per_node,
        environment=environment(link, cluster),
        h100=cluster.device == "h100",
    )


def _base(experiment: Experiment, link: Link) -> Namespace:
    """An existing base's arguments, from the experiment's account of it, on one rank."""
    run = {"seq-length": experiment.data.seq_length, "micro-batch-size": 1, "train-iters": 1}
    argv = [*model_arguments(experiment), *words({**run, "lr": 1.0e-4, "mock-data": True})]
    free = {k: v for k, v in link.stage.megatron.items() if k in ("bf16", "transformer-impl")}
    from megatron_growth.training import flag_check

    return flag_check.check(
        [*argv, *words(free)],
        world_size=1,
        environment={},
        h100=experiment.cluster.device == "h100",
    )
