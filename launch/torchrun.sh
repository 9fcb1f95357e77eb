#!/usr/bin/env bash
# One node's torchrun of a grow-and-continue run; start it on every node with the same arguments.
#
#   NNODES=8 NODE_RANK=3 HEAD=node0 launch/torchrun.sh growth.yaml --load BASE --save RUN <Megatron arguments>
#
# GPUs a node: NPROC (8). A restart of the same command resumes from RUN.
set -euo pipefail

if [[ $# -lt 1 || ! -f $1 ]]; then
  echo "usage: [NNODES=N NODE_RANK=R HEAD=host NPROC=8] $0 growth.yaml <Megatron arguments>" >&2
  exit 2
fi
config=$1
shift

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Megatron needs 1 with tensor or context parallelism on Hopper; with --overlap-moe-expert-parallel-comm set 32.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

exec torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "${NPROC:-8}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29400}" \
  -m megatron_growth.pretrain --growth-config "$config" "$@"
