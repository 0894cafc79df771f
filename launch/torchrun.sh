#!/usr/bin/env bash
# One host, all its GPUs:  launch/torchrun.sh umd-l2 --data.source latents/imagenet --out runs/umd-l2
# batch_size is that of all GPUs together. Of 1024, 8 GPUs get 128 each; one GPU needs --accumulate 8 for the same
# micro-batches, which make the same run. Run it again to go on after whatever stopped it.
set -euo pipefail
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# The first word may be another command of umd than pretrain: finetune RUN, evaluate RUN, encode-latents.
case ${1-} in finetune | evaluate | sample | probe | transfer | embed | encode-latents | encode-pixels) ;; *) set -- pretrain "$@" ;; esac
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
exec torchrun --standalone --nproc_per_node "$GPUS" -m umd.cli "$@"
