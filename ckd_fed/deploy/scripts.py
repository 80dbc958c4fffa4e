"""Shell scripts, systemd units and a Slurm batch script for a planned cluster."""

from __future__ import annotations

import re
import shlex

from ckd_fed.deploy.plan import ClusterPlan, NodePlan, shown

# Flower would install the app's dependencies anew for every run, look for updates and report usage; and a message that has reached a node would
# wait half a second on average, of at most one, for a process.
_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
_EXPORTS = "\n".join(f"export {name}={value}" for name, value in _ENVIRONMENT.items())


def superlink_script(plan: ClusterPlan) -> str:
    """Starts the SuperLink; to be run on its machine."""
    return _script("The SuperLink. The ServerApp that it starts writes runs to $CKD_FED_HOME/runs (default ~/.ckd_fed).", plan.superlink_command())


def supernode_script(plan: ClusterPlan, node: NodePlan) -> str:
    """Starts a node; to be run on its machine."""
    what = f"teacher of {node.modality}" if node.role == "teacher" else "student"
    return _script(f"Node {node.name}: {what}.", plan.supernode_command(node))


def connection_script(plan: ClusterPlan) -> str:
    """Prints the entry of Flower's configuration, which needs an absolute path: of the certificate beside the script, wherever that was copied to."""
    entry = re.sub(r"[\\$`]", r"\\\g<0>", plan.connection("@here@/ca.crt")).replace("@here@", "$here")  # the shell expands that and nothing else
    return f"""#!/usr/bin/env bash
# Print this cluster's entry of Flower's configuration: bash connection.sh >> ~/.flwr/config.toml
set -eu
here="$(cd "$(dirname "$0")" && pwd | sed 's/["\\\\]/\\\\&/g')"
cat <<END
{entry}END
"""


def register_script(plan: ClusterPlan) -> str:
    """Registers the nodes' public keys and keeps the ids given to them; to be run when the SuperLink is up and before the nodes start."""
    names = shlex.join(node.name for node in plan.nodes)
    return f"""#!/usr/bin/env bash
# Register the nodes' keys, after the SuperLink has started and before the nodes do. The ids are kept for `ckd-fed doctor --cluster`.
set -eu
cd "$(dirname "$0")"
mkdir -p registered
for node in {names}; do
  if [ -s "registered/$node.json" ]; then echo "$node is registered"; continue; fi
  answer="$(flwr supernode register "keys/$node.pub" {shlex.quote(plan.name)} --name "$node" --format json)"
  echo "$node: $answer"
  case "$answer" in *node-id*) echo "$answer" > "registered/$node.json" ;; *) exit 1 ;; esac
done
"""


def _script(what: str, command: list[str]) -> str:
    return f'#!/usr/bin/env bash\n# {what}\nset -eu\ncd "$(dirname "$0")"\n{_EXPORTS}\nexec {shown(command)}\n'


def systemd_unit(description: str, folder: str, script: str) -> str:
    """A unit that runs a script of a folder and starts it again when it ends.

    A SuperNode that was killed is refused for about a minute under its key, hence the pause.
    """
    folder = folder.replace("%", "%%")  # no specifier
    command = f"{folder}/{script}".replace("$", "$$")  # no variable; only commands have them, and only they take quotes
    return f"""[Unit]
Description={description}
After=network-online.target
Wants=network-online.target

[Service]
User=ckd
WorkingDirectory={folder}
# The environment that ckd_fed is installed in comes first.
Environment=PATH=/opt/ckd_fed/venv/bin:/usr/bin:/bin
ExecStart=/usr/bin/env bash {f'"{command}"' if " " in command else command}
Restart=always
RestartSec=15

[Install]
WantedBy=multi-user.target
"""


def slurm_script(plan: ClusterPlan, directory: str) -> str:
    """One batch job: the SuperLink on the first machine, a node on each task, then the run.

    The folder of the cluster must lie on a file system that all machines see. The SuperLink's host name is only known once the job
    runs, so the server certificate is made in the job, by the cluster's own CA. Every student node works; a run-config given may say otherwise.
    """
    nodes = shlex.join(node.name for node in plan.nodes)
    register = 'bash "$CLUSTER/operator/register.sh"\n' if plan.secure else ""
    return f"""#!/usr/bin/env bash
#SBATCH --job-name=ckd_fed
#SBATCH --nodes={len(plan.nodes)}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=ckd_fed-%j.log
# Usage: sbatch slurm.sh <app directory> [run-config], for example: sbatch slurm.sh simulations/baby 'backbone="mmgcn"'
set -eu
CLUSTER={shlex.quote(directory)}
APP="$1"
HOSTS=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
NODES=({nodes})
{_EXPORTS}
export FLWR_HOME="$CLUSTER/flwr-$SLURM_JOB_ID"

# The SuperLink's host is known only now: certificate and scripts are made anew for it, keys and CA stay.
ckd-fed cluster move "$CLUSTER" --host "${{HOSTS[0]}}"
mkdir -p "$FLWR_HOME" && bash "$CLUSTER/operator/connection.sh" > "$FLWR_HOME/config.toml"

srun --nodes=1 --ntasks=1 --nodelist="${{HOSTS[0]}}" --overlap bash "$CLUSTER/superlink/superlink.sh" &
until (exec 3<>"/dev/tcp/${{HOSTS[0]}}/{plan.port}") 2>/dev/null; do sleep 1; done
{register}for i in "${{!NODES[@]}}"; do
  srun --nodes=1 --ntasks=1 --nodelist="${{HOSTS[$i]}}" --overlap bash "$CLUSTER/nodes/${{NODES[$i]}}/supernode.sh" &
done
code=0
ckd-fed run "$APP" {shlex.quote(plan.name)} -c federation.student-workers={plan.students} ${{2:+-c "$2"}} || code=$?
kill $(jobs -p)
exit $code
"""
