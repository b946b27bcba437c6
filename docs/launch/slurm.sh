#!/bin/bash
# sbatch docs/launch/slurm.sh sd15 --teacher DIR --prompts captions.txt --output-dir DIR_OF_THE_RUN [--fsdp ...]
#
# From the repository's folder; all arguments are those of train_dmd.py. Two minutes before the end of its time the job
# is told: all processes agree on a step, save and leave, and the job queues itself again. It goes on from there with
# the same batches. Folders must be on a file system that all nodes see. Where nodes have no network, export
# HF_HUB_OFFLINE=1 and give folders rather than ids.
#SBATCH --job-name=dmd
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" train_dmd.py "$@" &
step=$!
told=
trap 'told=yes; kill -TERM "$step"' TERM # srun passes it on to all nodes
wait "$step"
code=$?
if [ "$told" ]; then
    wait "$step" # the first wait ended with the signal
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
