"""The Amazon pipeline of the literature: the publisher's files to a dataset."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from ckd_fed.data.amazon import Progress, find_files, read_images, read_reviews, read_texts
from ckd_fed.data.draft import Draft, ModalityDraft
from ckd_fed.data.encoders import DEFAULT, encode, find_encoder
from ckd_fed.data.importers.own import sorted_ids, split_interactions
from ckd_fed.data.importers.vectors import align, read_vectors
from ckd_fed.data.splits import DEFAULT_SEED, RULES
from ckd_fed.errors import DataError, unknown

Show = Callable[[Path], AbstractContextManager[Progress]]  # shows the progress through a file


def prepare(
    name: str, directory: Path, show: Show, *, rule: str = "random", seed: int = DEFAULT_SEED, encoder: str = "", text_vectors: Path | None = None
) -> Draft:
    """A draft of baby, sports, clothing or beauty.

    Ids are numbered in the order of ASINs and reviewer ids. The published split rule takes, per user and at random, a tenth of the
    interactions but at least one for validation and as many for test; its draws are this project's own, for the published ones depend on the
    order of a Python set.

    Args:
        name: of the dataset.
        directory: where the publisher's files are.
        show: shows progress.
        rule: split rule, see :mod:`ckd_fed.data.splits`.
        seed: of the rule.
        encoder: for the texts, see :mod:`ckd_fed.data.encoders`, by default that of the literature; where vectors are given its name is only
            recorded.
        text_vectors: text features computed elsewhere: any feature table with ASINs for ids.

    Raises:
        DataError: a file is missing or damaged, or the encoder cannot be had.
    """
    files = find_files(name, directory)
    if rule not in RULES:
        raise DataError(unknown("split rule", rule, RULES))
    if text_vectors is not None:  # whatever can be told before minutes of reading is told now
        try:
            vectors = read_vectors(text_vectors)
        except DataError as error:  # which may advise what an import has options for
            raise DataError(f"--text-vectors: {error} (here: call the ids item_id or asin; .npy, .npz: a list {text_vectors.stem}_ids.txt)") from None
    else:
        encoder = encoder or DEFAULT
        encoder_function = find_encoder(encoder)
    with show(files.reviews) as progress:
        table = read_reviews(files.reviews, progress)
    user_ids, item_ids = sorted_ids(table.users), sorted_ids(table.items)
    parts, about, notes = split_interactions(table, user_ids, item_ids, rule, seed)
    sources = [files.reviews]
    modalities = {}
    if files.images is not None:
        with show(files.images) as progress:
            images, mask = read_images(files.images, item_ids, progress)
        if not mask.any():
            raise DataError(f"{files.images} has none of the {len(item_ids):,} items of the reviews; is it of the same category?")
        modalities["image"] = ModalityDraft(images, mask, files.images.name, "the publisher's: 4096-d, a deep network on product images")
        sources.append(files.images)
        if not mask.all():
            notes.append(f"{files.images.name}: {int((~mask).sum()):,} of {len(item_ids):,} items have no image and are masked")
    else:
        notes.append("there is no file of image features, so there is no image modality")
    if text_vectors is not None:
        features, mask, said = align(vectors, item_ids)
        notes += said
        modalities["text"] = ModalityDraft(features, mask, text_vectors.name, encoder or "not stated")
        sources.append(text_vectors)
    else:
        with show(files.meta) as progress:
            texts = read_texts(files.meta, item_ids, progress)
        if not any(texts.values()):
            raise DataError(f"{files.meta} has no text for any of the {len(item_ids):,} items of the reviews; is it of the same category?")
        features, mask = encode(encoder_function, encoder, [texts.get(item, "") for item in item_ids])
        modalities["text"] = ModalityDraft(features, mask, files.meta.name, encoder)
        sources.append(files.meta)
        if not mask.all():
            notes.append(f"{files.meta.name}: {int((~mask).sum()):,} of {len(item_ids):,} items have no text and are masked")
    return Draft("amazon", user_ids, item_ids, parts, modalities, about, sources, notes)
