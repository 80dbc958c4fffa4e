"""Throughput and memory of the Amazon pipeline, on made-up files of the true formats, extrapolated to the real Baby files.

    python benchmarks/amazon.py [--scale 0.1]

Nothing here is Amazon's: names, texts and features are drawn at random.
"""

from __future__ import annotations

import argparse
import gzip
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ckd_fed.data.amazon import CATEGORIES, DIMENSION, read_images, read_reviews, read_texts
from ckd_fed.data.importers.own import sorted_ids

# The real Baby: 19,445 users and 7,050 items with 160,792 reviews; 71,317 products in the metadata, about as many with an image.
USERS, ITEMS, DEGREE, PRODUCTS, IMAGES = 19_445, 7_050, 8, 71_317, 64_000
_WORDS = [
    "soft",
    "cotton",
    "baby",
    "blanket",
    "stroller",
    "organic",
    "bottle",
    "set",
    "safe",
    "washable",
    "travel",
    "crib",
    "monitor",
    "the",
    "with",
    "and",
    "for",
    "of",
    "to",
    "in",
]


def write_files(directory: Path, name: str = "baby", *, users: int, items: int, degree: int, products: int, images: int, seed: int = 0) -> list[str]:
    """Write made-up files of a category.

    Args:
        directory: where to.
        name: of the dataset.
        users, items, degree: every user reviews ``degree`` distinct items; users × degree must be at least 5 × items.
        products: in the metadata, the items among them.
        images: products with image features, the items first.
        seed: of everything drawn.

    Returns:
        ASINs of all products, the items first.
    """
    rng = np.random.default_rng(seed)
    asins = [f"B{number:09d}" for number in rng.choice(10**9, products, replace=False)]
    category = CATEGORIES[name]

    def text(n: int) -> str:
        return " ".join(rng.choice(_WORDS, n))

    with gzip.open(directory / f"reviews_{category}_5.json.gz", "wt", compresslevel=4) as file:
        for user in range(users):
            start = (user * degree) % items
            for item in (np.arange(start, start + degree) % items).tolist():
                record = {
                    "reviewerID": f"A{user:012d}",
                    "asin": asins[item],
                    "reviewText": text(90),
                    "overall": 5.0,
                    "unixReviewTime": 1_300_000_000 + 86_400 * int(rng.integers(1000)),
                }
                file.write(json.dumps(record) + "\n")
    with gzip.open(directory / f"meta_{category}.json.gz", "wt", compresslevel=4) as file:
        for asin in rng.permutation(asins).tolist():
            related = {"also_bought": [asins[k] for k in rng.integers(products, size=30)]}
            record = {"asin": asin, "title": text(8), "brand": "it's", "related": related, "categories": [["Baby", text(2)]], "description": text(80)}
            file.write(repr(record) + "\n")  # a Python literal, as in the old files
    with (directory / f"image_features_{category}.b").open("wb") as binary:
        for k in rng.permutation(images).tolist():
            binary.write(asins[k].encode() + np.maximum(rng.standard_normal(DIMENSION, dtype=np.float32), 0).tobytes())
    return asins


@contextmanager
def _timed(what: str, path: Path, scale: float) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds, size = time.perf_counter() - start, path.stat().st_size / 1e6
    print(f"{what:<10} {size:>10.1f} MB {seconds:>8.2f} s {size / seconds:>8.1f} MB/s   the real file: about {seconds / scale:.0f} s")


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=0.1, help="size relative to the real Baby files")
    scale = parser.parse_args().scale
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        items = int(ITEMS * scale)
        write_files(directory, users=int(USERS * scale), items=items, degree=DEGREE, products=int(PRODUCTS * scale), images=int(IMAGES * scale))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        reviews, meta, images = (next(directory.glob(f"{kind}*")) for kind in ("reviews", "meta", "image"))
        with _timed("reviews", reviews, scale):
            ids = sorted_ids(read_reviews(reviews).items)
        with _timed("metadata", meta, scale):
            texts = read_texts(meta, ids)
        with _timed("images", images, scale):
            features, mask = read_images(images, ids)
        assert len(texts) == len(ids)
        assert mask.all()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory {after:.0f} MiB, of which {before:.0f} before reading and {features.nbytes / 2**20:.0f} are the items' image features")


if __name__ == "__main__":
    main()
