#!/usr/bin/env bash
#SBATCH --job-name=ckd_fed
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=ckd_fed-%j.log
# Usage: sbatch slurm.sh <app directory> [run-config], for example: sbatch slurm.sh simulations/baby 'backbone="mmgcn"'
set -eu
CLUSTER=/srv/ckd/lab
APP="$1"
HOSTS=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
NODES=(teacher-image teacher-text student-0 student-1)
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_TELEMETRY_ENABLED=0
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1
export FLWR_HOME="$CLUSTER/flwr-$SLURM_JOB_ID"

# The SuperLink's host is known only now: certificate and scripts are made anew for it, keys and CA stay.
ckd-fed cluster move "$CLUSTER" --host "${HOSTS[0]}"
mkdir -p "$FLWR_HOME" && bash "$CLUSTER/operator/connection.sh" > "$FLWR_HOME/config.toml"

srun --nodes=1 --ntasks=1 --nodelist="${HOSTS[0]}" --overlap bash "$CLUSTER/superlink/superlink.sh" &
until (exec 3<>"/dev/tcp/${HOSTS[0]}/8000") 2>/dev/null; do sleep 1; done
bash "$CLUSTER/operator/register.sh"
for i in "${!NODES[@]}"; do
  srun --nodes=1 --ntasks=1 --nodelist="${HOSTS[$i]}" --overlap bash "$CLUSTER/nodes/${NODES[$i]}/supernode.sh" &
done
code=0
ckd-fed run "$APP" lab -c federation.student-workers=2 ${2:+-c "$2"} || code=$?
kill $(jobs -p)
exit $code
