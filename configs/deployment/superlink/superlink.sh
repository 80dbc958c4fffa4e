#!/usr/bin/env bash
# The SuperLink. The ServerApp that it starts writes runs to $CKD_FED_HOME/runs (default ~/.ckd_fed).
set -eu
cd "$(dirname "$0")"
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_TELEMETRY_ENABLED=0
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL=0.1
exec flower-superlink --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key --enable-supernode-auth --host 0.0.0.0 --port 8000 --database superlink.db
