"""A study of missing modalities: hide a modality of some items, deterministically."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np

from ckd_fed.data.dataset import Dataset
from ckd_fed.data.triples import derive_key, words
from ckd_fed.errors import ConfigError, unknown


def check_hidden(shares: Mapping[str, float], modalities: Collection[str]) -> None:
    """Whether all that is to be hidden is there.

    Args:
        shares: modality -> share of its items to hide.
        modalities: of the student.

    Raises:
        ConfigError: the student has no such modality.
    """
    for modality in shares:
        if modality not in modalities:
            raise ConfigError(f"data.missing: {unknown('modality', modality, modalities)}")


def hide(dataset: Dataset, shares: Mapping[str, float], seed: int) -> Dataset:
    """The dataset with a modality masked for a share of the items that have it.

    Which items is a function of (split, modality, seed): a teacher and a student that open different files hide the same ones, and those
    hidden at a smaller share are among those at a greater one. Of any item that has the modality at least one keeps it.

    Args:
        dataset: with one modality (a teacher's) or several.
        shares: modality -> share of its items to hide, 0 to 1; those of modalities that a teacher does not open are passed over.
        seed: the run's.

    Raises:
        ConfigError: a student's dataset has no such modality.
    """
    if len(dataset.modalities) > 1:
        check_hidden(shares, dataset.modalities)
    masks = dict(dataset.masks)
    for modality, share in shares.items():
        if modality not in dataset.modalities:
            continue
        present = masks.get(modality, np.ones(dataset.n_items, dtype=bool))
        order = np.argsort(words(derive_key("ckd-missing-1", dataset.fingerprint, modality, seed), dataset.n_items), kind="stable")
        having = order[present[order]]
        hidden = having[: min(round(share * len(having)), len(having) - 1)]
        if len(hidden):
            masks[modality] = present.copy()
            masks[modality][hidden] = False
    return dataclasses.replace(dataset, masks=masks)
