"""From one file to runs on a cluster: an experiment is read, its stages are rendered to Megatron's
command lines, and those to the files that torchrun, SLURM or Kubernetes take.

    experiment.py   the file; stage.py and cluster.py are its sections
    chain.py        what follows from the order of the stages
"""
