#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Starts a tied-lora command on every rank of one or more machines without a scheduler. Run on each machine:
#
#   launch/torchrun.sh finetune trainer.num_nodes=2 layout=tp8 model.restore_from_path=base.nemo ...
#
# Environment variables: NNODES (default 1), NODE_RANK (0 to NNODES-1), MASTER_ADDR and MASTER_PORT (of the machine
# with NODE_RANK 0) and NPROC_PER_NODE (default: the number of GPUs, or 1 without a GPU).
set -euo pipefail

if [[ $# -eq 0 ]]; then
    sed -n '3,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
if [[ ${NNODES:-1} -gt 1 && -z ${MASTER_ADDR:-} ]]; then
    echo "torchrun.sh: NNODES=$NNODES without MASTER_ADDR: set it to the address of the machine with NODE_RANK=0" >&2
    exit 2
fi
command=$1
shift
if [[ -z "${NPROC_PER_NODE:-}" ]]; then
    NPROC_PER_NODE=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
    [[ "$NPROC_PER_NODE" -gt 0 ]] || NPROC_PER_NODE=1
fi
exec torchrun \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$NPROC_PER_NODE" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
    -m nemo_tied_lora.commands.main "$command" "$@"
