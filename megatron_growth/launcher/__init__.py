"""From one file to runs on a cluster: an experiment is read, its stages are rendered to Megatron's
command lines, and those to the files that torchrun, SLURM or Kubernetes take.

    experiment.py   the file; stage.py and cluster.py are its sections
    json_schema.py  schemas of the files, for editors; reference.py, for docs/
    chain.py        what follows from the order of the stages
    budget.py       what it costs and whether it fits
    arguments.py    a stage as Megatron's command line; options.py is how options are written
    environment.py  the environment that its layout asks for
    flags.py        the command line put to Megatron itself
    render.py       files for a target, by the templates in launch/
    mounts.py       whether containers have the directories that they need
    submit.py       stages started, and their jobs
    status.py       where they are
    preflight.py    what each node checks before it trains
    command.py      the commands; budget_tables.py and status_table.py are what they print
"""
