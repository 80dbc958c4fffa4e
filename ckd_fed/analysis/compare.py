"""Compare runs on the same test users: differences with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from ckd_fed.analysis.history import RunHistory, read_history
from ckd_fed.analysis.locate import find_run
from ckd_fed.analysis.users import FILE, UserTable, load_users, user_table
from ckd_fed.errors import ConfigError, DataError, unknown
from ckd_fed.evaluation.tested import rank_test_users


@dataclass(frozen=True)
class Entry:
    """One model of one run.

    Attributes:
        label: as it was asked for, ``RUN`` or ``RUN:MODEL``.
        history: of the run.
        model: ``student``, ``plain`` or ``teacher/<m>``.
        users: the run's test metrics by user.
    """

    label: str
    history: RunHistory
    model: str
    users: UserTable

    def values(self, metric: str) -> np.ndarray:
        """The metric of every user, ``(n,)``.

        Raises:
            ConfigError: the run has no such metric.
        """
        known = [name.removeprefix(f"{self.model}/") for name in self.users.values if name.startswith(f"{self.model}/")]
        if metric not in known:
            raise ConfigError(f"{self.label}: {unknown('metric', metric, known)}")
        return self.users.values[f"{self.model}/{metric}"].astype(np.float64)


@dataclass(frozen=True)
class Comparison:
    """An entry against the first one, on one metric.

    Attributes:
        label: of the entry.
        mean: over users.
        difference: mean of the paired differences; 0 for the first entry.
        low, high: 95 % confidence interval of the difference (Student's t over users); 0 for the first entry, NaN with one user.
        p: two-sided paired t-test over users; 1 where no user differs, NaN for the first entry and with one user.
        p_holm: the same, adjusted by Holm's method for the number of entries compared with the first.
        n: users.
    """

    label: str
    mean: float
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int


def read_entry(name: str) -> Entry:
    """A run's model by ``RUN`` (its student) or ``RUN:MODEL`` (for example ``mine:plain``, ``mine:teacher/text``).

    A run whose ``test_users.npz`` is not there (``evaluation.user-table=false``) is tested anew from its best student, where its
    dataset is on this machine, and the file is kept.

    Raises:
        DataError: no such run, or its users cannot be had.
        ConfigError: the run has no such model.
    """
    run, _, model = name.rpartition(":") if ":" in name and not name.endswith(":") else (name, "", "student")
    history = read_history(find_run(run))
    path = history.directory / FILE
    if path.is_file():
        table = load_users(path)
    else:
        from ckd_fed.analysis.student import load_student

        student = load_student(history)
        tested = rank_test_users("student", student.tables(), student.dataset.train, student.dataset.test, student.config.ks)
        table = user_table(student.dataset.fingerprint, {"student": tested})
        table.save(path)
    models = sorted({key.rpartition("/")[0] for key in table.values})
    if model not in models:
        raise ConfigError(f"run {history.name}: {unknown('model', model, models)}")
    return Entry(name, history, model, table)


def compare(entries: Sequence[Entry], metric: str) -> list[Comparison]:
    """Compare every entry with the first, user by user.

    Raises:
        DataError: the entries were not tested on the same split.
    """
    first = entries[0]
    base = first.values(metric)
    found = [Comparison(first.label, float(base.mean()), 0.0, 0.0, 0.0, float("nan"), float("nan"), len(base))]
    for entry in entries[1:]:
        if entry.users.split != first.users.split:
            raise DataError(
                f"{entry.label} and {first.label} were tested on different splits ({entry.users.split[:12]}, {first.users.split[:12]}); "
                "only runs on the same data can be compared user by user"
            )
        values = entry.values(metric)
        found.append(Comparison(entry.label, float(values.mean()), *paired(values, base), float("nan"), len(values)))
    for place, p in zip(range(1, len(found)), holm([entry.p for entry in found[1:]]), strict=True):
        found[place] = replace(found[place], p_holm=p)
    return found


def paired(values: np.ndarray, base: np.ndarray) -> tuple[float, float, float, float]:
    """Mean difference of paired samples, its 95 % confidence interval, and the p of the two-sided paired t-test.

    One pair tells nothing of how differences vary: the interval and p are NaN then.
    """
    differences = values - base
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, float("nan"), float("nan"), float("nan")
    if not differences.any():
        return mean, mean, mean, 1.0
    error = float(differences.std(ddof=1)) / len(differences) ** 0.5
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    p = float(stats.ttest_rel(values, base).pvalue) if error > 0 else 0.0
    return mean, mean - reach, mean + reach, p


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the k-th smallest of n is multiplied by n - k + 1, made monotone, and cut at 1.

    NaN stays NaN and is not counted: there was no test.
    """
    adjusted = [float("nan")] * len(ps)
    tested = sorted((place for place, p in enumerate(ps) if not np.isnan(p)), key=ps.__getitem__)
    largest = 0.0
    for rank, place in enumerate(tested):
        largest = max(largest, min(1.0, ps[place] * (len(tested) - rank)))
        adjusted[place] = largest
    return adjusted
