#!/usr/bin/env bash
# Train with NPROC processes on this machine, one for each GPU:
#   tools/dist_train.sh CONFIG NPROC [options of train.py]
# PORT chooses another port than 29500. On several machines, run it on each, with NNODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 CONFIG NPROC [options of train.py]" >&2
    exit 2
fi

exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${PORT:-29500}" \
    --nproc_per_node "$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
