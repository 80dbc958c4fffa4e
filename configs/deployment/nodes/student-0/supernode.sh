#!/usr/bin/env bash
# Node student-0: student.
set -eu
cd "$(dirname "$0")"
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_TELEMETRY_ENABLED=0
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1
exec flower-supernode --root-certificates ca.crt --auth-supernode-private-key key --superlink gpu0.example:8000 --port 9096 --node-config 'role="student" data-dir="/data/baby" device="auto"'
