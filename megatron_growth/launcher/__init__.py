"""From one file to runs on a cluster: an experiment is read, its stages are rendered to Megatron's
command lines, and those to the files that torchrun, SLURM or Kubernetes take.

    experiment.py   the file; stage.py and cluster.py are its sections
    json_schema.py  schemas of the files, for editors; reference.py, for docs/
    chain.py        what follows from the order of the stages
    budget.py       what it costs and whether it fits; sharding.py, budget_notes.py
    arguments.py    a stage as Megatron's command line; options.py is how options are written
    environment.py  the environment that its layout asks for
    flags.py        the command line put to Megatron itself
    render.py       files for a target, by the templates in launch/; files.py writes them
    mounts.py       whether containers have the directories that they need
    launched.py     what was launched before, and may not be said otherwise now
    submit.py       stages started: slurm.py, kubernetes.py, here.py; jobs.py remembers as what
    status.py       where they are, from events.py, logs.py and marks.py
    preflight.py    what each node checks before it trains
    budget_tables.py, status_table.py    tables of the commands
"""
