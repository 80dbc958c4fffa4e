"""How many epochs a distillation round holds, and what would be a better number where that is the user's choice."""

from __future__ import annotations

import math

from ckd_fed.config import Config
from ckd_fed.training.fit import validations_due
from ckd_fed.wire import margin_dtype

# A run should be seen to go on, and little lost when it breaks off: no round is made longer than the longer of these.
LONGEST = 8  # validations
LONGEST_SECONDS = 60.0  # of work


def sheet_bytes(config: Config, n_train: int) -> int:
    """Bytes of margins that a teacher sends for one epoch."""
    steps = n_train // config.training.batch_size + 1
    return steps * (config.training.batch_size + config.distillation.batch_size) * margin_dtype(config).itemsize


def stretch_epochs(config: Config, epoch: int, validations: int, per_epoch: int) -> int:
    """Epochs of the round that starts at an epoch; 0 after the last.

    Args:
        config: of the run.
        epoch: where it starts.
        validations: that it is to hold; fewer where that would be more than ``federation.stretch-mb``, and none where an interval between
            two validations is more than that.
        per_epoch: bytes of margins of an epoch, 0 without teachers.
    """
    chosen = config.training
    left = chosen.epochs - epoch
    longest = max(1, int(config.federation.stretch_mb * 1e6 / per_epoch)) if per_epoch else left
    due = validations_due(chosen.validate_every, chosen.epochs, epoch, min(chosen.epochs, epoch + longest))
    return due[:validations][-1] - epoch if due else min(longest, left)


def grown(config: Config, validations: int, held: int, messaging: float, seconds: float) -> int:
    """How many validations the rounds of a lone student are to hold from now on: as many as bring messaging down to its share, and no fewer
    than before. A message costs the same whatever is in it, all but.

    Args:
        config: of the run.
        validations: that a round was to hold.
        held: that this one did.
        messaging: seconds of this round that no node worked.
        seconds: that it took.
    """
    share = config.federation.messaging_share
    if not held or messaging <= share * seconds:
        return validations
    work, wanted = (seconds - messaging) / held, messaging * (1 - share)  # wanted: what share times the work of a round should come to
    longest = max(LONGEST, int(LONGEST_SECONDS / work)) if work > 0 else LONGEST
    return max(validations, math.ceil(wanted / (share * work)) if share * work * longest > wanted else longest)


def advice(config: Config, workers: int, epochs: int, messaging: float, seconds: float) -> str:
    """What to say of the length of several students' rounds, which are not made longer by themselves; nothing where messaging keeps to its share.

    Args:
        config: of the run.
        workers: how many students.
        epochs: of a round.
        messaging: seconds of it that no node worked.
        seconds: that it took.
    """
    share = config.federation.messaging_share
    if not 0 < share < 1 or messaging <= share * seconds:
        return ""
    every, work = config.training.validate_every, (seconds - messaging) / epochs
    said = f"NOTE: messaging took {messaging:.0f} of the {seconds:.0f} s ({messaging / seconds:.0%}) of a round of {workers} students"
    wanted = math.ceil(messaging * (1 - share) / (share * work)) if share * work * config.training.epochs > messaging * (1 - share) else 0
    if epochs >= every and wanted:  # the rounds are as long as they are to be, and there is a length that would do
        patience = math.ceil(config.training.patience * every / wanted)  # as many epochs
        said += f", {share:.0%} is wanted (federation.messaging-share): set training.validate-every={wanted} training.patience={patience}"
    elif epochs >= every:
        said += f", more than {share:.0%} (federation.messaging-share) whatever their length"
    else:
        said += f", {share:.0%} is wanted (federation.messaging-share): raise federation.stretch-mb={config.federation.stretch_mb:g}"
    if seconds / epochs > workers * work / (1 - share):
        said += "; at this length a lone student, whose rounds grow by themselves, would be done sooner (federation.student-workers=1)"
    return said
