"""What Flower adds to the central loop: the same run through `ckd-fed train` and through Flower's simulation.

    python benchmarks/federation.py                                # the built-in stand-in for Baby
    python benchmarks/federation.py --data DIR --dataset baby -c 'training.epochs=60'
    python benchmarks/federation.py --quick

Both sides train the same models with the same seed and float32 margins, so their results must be the same; the benchmark says so or ends with an
error. Printed: wall time of both commands, time within the rounds and how much of it was messaging, and what starting Flower takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def timed(command: list[str], home: Path) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "CKD_FED_HOME": str(home)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr or done.stdout}")
    return time.perf_counter() - started


def rows(home: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the dataset's folder; by default the stand-in is generated")
    parser.add_argument("--dataset", default="baby", choices=["baby", "tiktok"])
    parser.add_argument("-c", "--config", default="", help="overrides of both sides, as for ckd-fed train")
    parser.add_argument("--quick", action="store_true", help="10 epochs")
    arguments = parser.parse_args()
    shared = f'distillation.margin-dtype="float32" tracking.report=false tracking.wandb="off" {arguments.config}'
    if arguments.data:
        shared += f' data.dir="{(arguments.data / arguments.dataset).resolve()}"'
    if arguments.quick:
        shared += " training.epochs=10"
    command = str(Path(sys.executable).parent / "ckd-fed")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        dataset = [] if arguments.dataset == "baby" else ["-c", f'dataset="{arguments.dataset}"']
        central = timed([command, "train", *dataset, "-c", f'{shared} name="central"'], home)
        federated = timed([command, "run", f"simulations/{arguments.dataset}", "-c", f'{shared} name="federated"'], home)
        of_central, of_federated = rows(home, "central"), rows(home, "federated")
    finals = [next(row for row in of if row["event"] == "final") for of in (of_central, of_federated)]
    names = [name for name in finals[0] if name.startswith("final/student/test/")]
    if not names or any(abs(finals[0][name] - finals[1][name]) > 1e-6 for name in names):
        raise SystemExit(f"the two runs differ: {[(name, finals[0][name], finals[1].get(name)) for name in names[:3]]}")
    rounds = [row for row in of_federated if row["event"] == "round"]
    within, messaging = (sum(row.get(key, 0.0) for row in rounds) for key in ("seconds", "seconds/messaging"))
    print("| | seconds |\n|---|---|")
    print(f"| `ckd-fed train`, the whole command | {central:.1f} |")
    print(f"| `ckd-fed run simulations/{arguments.dataset}`, the whole command | {federated:.1f} |")
    print(f"| of it within {len(rounds)} rounds | {within:.1f} |")
    print(f"| of that messaging | {messaging:.1f} ({messaging / within:.0%}) |")
    print(f"| starting and ending Flower | {federated - within:.1f} |")
    print(f"\nThe rounds took {within / central:.2f} times the central command; test metrics are the same ({len(names)} of them to 1e-6).")


if __name__ == "__main__":
    main()
