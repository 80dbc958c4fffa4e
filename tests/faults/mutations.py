"""Mutated replies and mutated data files, in one process: none may be accepted, none may crash without a clear reason.

    python tests/faults/mutations.py --replies 1200 --files 240 --seed 0

A small federation runs once; its replies are the material. Two kinds of mutation are made of them:

- *damage*: something in the reply changed on its way, so that its digest no longer fits;
- *lies*: the reply was made by somebody who computes a digest that fits, and is wrong in its stamp, form, shapes, types or ranges, or
  is a true reply to something else. (A lie that is plausible in all of these cannot be told from the truth, and is not made here.)

Data files are damaged at random (as bytes) or in meaning (ids, shapes, values, splits that overlap). A file whose mutation still makes a
valid dataset must be told from the original by its fingerprint, which enrolment compares.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.mutated_files import mutate_files  # noqa: E402
from faults.mutated_replies import mutate_replies  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1200)
    parser.add_argument("--files", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        for what, run, count in (("replies", mutate_replies, chosen.replies), ("data files", mutate_files, chosen.files)):
            refused, wrong = run(Path(folder) / what.replace(" ", "-"), count, chosen.seed)
            accepted = sum(line.startswith("accepted") for line in wrong)
            crashed = sum(line.startswith(("crash", "unclear")) for line in wrong)
            print(f"mutated {what}: {refused.total() + len(wrong)}, accepted {accepted}, crashed without a clear reason {crashed}")
            for kind, number in sorted(refused.items()):
                print(f"  refused {number:>5}  {kind}")
            for line, number in Counter(wrong).most_common(30):
                print(f"  WRONG   {number:>5}  {line}")
            failures += len(wrong)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
