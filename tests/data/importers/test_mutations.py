"""Some hundred mutated inputs of every format: each is imported right or refused with one line, and nothing is left half-written.

A mutation says what must come of it: ``same`` (the dataset as if nothing had happened), ``refused``, or ``either`` for random damage, some of
which only makes another valid file. The counts are printed (``pytest -s``).
"""

import gzip
import json
import shutil
import warnings
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest

from benchmarks.amazon import write_files
from ckd_fed.data.dataset import load_dataset
from ckd_fed.data.draft import write_draft
from ckd_fed.data.importers.detect import read_draft
from ckd_fed.data.prepare import prepare
from ckd_fed.errors import DataError

RECORD = 16_394


def random_damage(content, rng):
    """Truncate, lengthen, or overwrite, insert or delete a few bytes."""
    data = bytearray(content)
    kind = rng.integers(6)
    if kind == 0:
        return bytes(data[: rng.integers(len(data))])
    if kind == 1:
        return bytes(data) + rng.bytes(int(rng.integers(1, 20)))
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(len(data)))
        if kind == 2:
            del data[at]
        elif kind == 3:
            data.insert(at, int(rng.integers(256)))
        elif kind == 4:
            data[at] = int(rng.choice(list(b"0123456789-,:(){}[]'\"\t\n")))
        else:
            data[at] = int(rng.integers(256))
    return bytes(data)


class Trial:
    """Runs mutations of one set of files, each on a fresh copy, and collects what went wrong."""

    def __init__(self, original, read, tmp_path):
        self.original, self.read, self.home = original, read, tmp_path / "home"
        self.work = tmp_path / "work"
        self.faults, self.counts = [], Counter()
        self.expected = self.snapshot(original)
        assert isinstance(self.expected, dict), self.expected

    def snapshot(self, directory):
        """The dataset that comes of a folder under the source's ids, or the message of the refusal."""
        shutil.rmtree(self.home, ignore_errors=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                write_draft(self.read(directory), self.home / "made")
        except DataError as error:
            return str(error)
        dataset = load_dataset(self.home / "made", at_least=1)
        items = json.loads((self.home / "made" / "items.json").read_text())
        users = json.loads((self.home / "made" / "users.json").read_text())
        state = {
            split: sorted((users[u], items[i]) for u, i in zip(part.row.tolist(), part.items.tolist(), strict=True))
            for split, part in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test))
        }
        for modality, features in dataset.features.items():
            assert np.isfinite(features).all()
            mask = dataset.masks.get(modality, np.ones(len(items), dtype=bool))
            state[modality] = {name: features[k].tobytes() for k, name in enumerate(items) if mask[k]}
        return state

    def run(self, label, mutate, expect, *mentions, change=lambda state: state):
        """Mutate a copy and hold the outcome against what is expected: 'same' (after ``change``), 'refused' or 'either'."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.original, self.work)
        mutate(self.work)
        try:
            outcome = self.snapshot(self.work)
        except Exception as error:
            self.faults.append(f"{label}: {type(error).__name__}: {error}")
            return
        left = sorted(path.name for path in self.home.iterdir()) if self.home.exists() else []
        refused = isinstance(outcome, str)
        if left != ([] if refused else ["made"]):
            self.faults.append(f"{label}: left behind {left}")
        if refused and "\n" in outcome:
            self.faults.append(f"{label}: several lines")
        if refused and expect == "same":
            self.faults.append(f"{label}: refused: {outcome}")
        if not refused and expect == "refused":
            self.faults.append(f"{label}: was imported")
        if not refused and expect == "same" and outcome != change({key: dict(v) if isinstance(v, dict) else v for key, v in self.expected.items()}):
            self.faults.append(f"{label}: another dataset came of it")
        if refused:
            self.faults += [f"{label}: {mention!r} is not in {outcome!r}" for mention in mentions if mention not in outcome]
        self.counts["refused" if refused else "imported"] += 1

    def random(self, name, times, seed):
        rng = np.random.default_rng(seed)
        content = (self.original / name).read_bytes()
        for number in range(times):
            damaged = random_damage(content, rng)
            self.run(f"{name} #{number}", lambda d, damaged=damaged: (d / name).write_bytes(damaged), "either")

    def finish(self, least):
        assert not self.faults, "\n".join(self.faults[:20])
        total = sum(self.counts.values())
        print(f"\n{self.original.name}: {total} mutated inputs, {self.counts['imported']} imported, {self.counts['refused']} refused")
        assert total >= least
        assert min(self.counts["imported"], self.counts["refused"]) > 0


def edit(name, change):
    """Change a text file, or one in gzip, by lines."""

    def run(directory):
        path = directory / name
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as file:
            lines = file.read().split(b"\n")
        with opened(path, "wb") as file:
            file.write(b"\n".join(change(lines)))

    return run


def at(number, change):
    return lambda lines: [*lines[:number], *change(lines[number]), *lines[number + 1 :]]


@pytest.fixture
def amazon(tmp_path):
    directory = tmp_path / "amazon"
    directory.mkdir()
    asins = write_files(directory, users=24, items=20, degree=6, products=40, images=30)
    return directory, asins


def encoder(texts):
    """Stands for a sentence encoder."""
    return np.array([[len(text), sum(map(ord, text)) % 97] for text in texts], dtype=np.float32)


def test_amazon(amazon, tmp_path, monkeypatch):
    directory, asins = amazon
    monkeypatch.setattr("ckd_fed.data.prepare.find_encoder", lambda name: encoder)
    trial = Trial(directory, lambda d: prepare("baby", d, lambda path: nullcontext(lambda done: None), encoder="tiny"), tmp_path)
    reviews, meta, images = "reviews_Baby_5.json.gz", "meta_Baby.json.gz", "image_features_Baby.b"
    size = (directory / images).stat().st_size
    records = [(directory / images).read_bytes()[start : start + RECORD] for start in range(0, size, RECORD)]
    own = next(k for k, record in enumerate(records) if record[:10].decode() in asins[:20])
    other = next(k for k, record in enumerate(records) if record[:10].decode() not in asins[:20])
    name = records[own][:10].decode()

    for keep in np.linspace(0, 0.99, 12):  # truncated files
        for file in (reviews, meta, images):
            content = (directory / file).read_bytes()
            cut = content[: int(keep * len(content))]
            empty_or_whole = not cut or (file == images and len(cut) % RECORD == 0)
            trial.run(f"{file} cut at {keep:.2f}", lambda d, f=file, c=cut: (d / f).write_bytes(c), "either" if empty_or_whole else "refused", file)
    for number in (0, 7, 100):
        for label, change in (
            ("no JSON", lambda line: [line[:40]]),
            ("a list", lambda line: [b"[1, 2]"]),
            ("no asin", lambda line: [line.replace(b'"asin"', b'"nisa"')]),
            ("an empty user", lambda line: [b'{"reviewerID": "", "asin": "B0", "unixReviewTime": 1}']),
            ("a time that is none", lambda line: [b'{"reviewerID": "A", "asin": "B", "unixReviewTime": "x"}']),
            ("non-UTF-8", lambda line: [line.replace(b'"reviewText": "', b'"reviewText": "\xff')]),
            ("a review of an unknown item", lambda line: [line, b'{"reviewerID": "A000000000001", "asin": "X", "unixReviewTime": 1}']),
            ("a lone user", lambda line: [line, line.replace(b'"reviewerID": "A', b'"reviewerID": "Z')]),
        ):  # fmt: skip
            trial.run(f"reviews line {number}: {label}", edit(reviews, at(number, change)), "refused", reviews)
        for label, change in (("twice", lambda line: [line, line]), ("blank lines", lambda line: [b"", line, b"  "])):
            trial.run(f"reviews line {number}: {label}", edit(reviews, at(number, change)), "same")
    lines = gzip.decompress((directory / meta).read_bytes()).split(b"\n")
    mine = next(k for k, line in enumerate(lines) if name.encode() in line[:30])
    for label, change, expect in (
        ("not closed", lambda line: [line[:-1]], "refused"),
        ("a call", lambda line: [line[:-1] + b", 'x': open('y')}"], "refused"),
        ("a number for a title", lambda line: [line.replace(b"'title': '", b"'title': 5, 't': '")], "refused"),
        ("non-UTF-8", lambda line: [line.replace(b"'title': '", b"'title': '\xe9")], "refused"),
        ("twice, differing", lambda line: [line, line.replace(b"'title': '", b"'title': 'x ")], "refused"),
        ("twice, the same", lambda line: [line, line], "same"),
        ("an unknown product", lambda line: [line, b"{'asin': 'B99999999X', 'title': 5}"], "same"),
        ("more fields", lambda line: [line[:-1] + b", 'price': 3.5, 'salesRank': {'Baby': 3}}"], "same"),
        ("JSON instead", lambda line: [json.dumps(eval(line)).encode()], "same"),
        ("blank lines", lambda line: [b"", line, b"\t"], "same"),
        ("a deep line", lambda line: [line, b"{'asin': '" + name.encode() + b"', 'x': " + b"[" * 5000 + b"]" * 5000 + b"}"], "refused"),
    ):
        trial.run(f"meta: {label}", edit(meta, at(mine, change)), expect, *([meta] if expect == "refused" else []))
    without = lambda key: lambda state: {**state, key: {k: v for k, v in state[key].items() if k != name}}  # noqa: E731
    trial.run(
        "meta: an empty category and nothing else",
        edit(meta, at(mine, lambda line: [f"{{'asin': '{name}', 'categories': [[]]}}".encode()])),
        "same",
        change=without("text"),
    )
    trial.run("meta: no record of an item", edit(meta, at(mine, lambda line: [])), "same", change=without("text"))

    def with_records(change):
        return lambda d: (d / images).write_bytes(b"".join(change(list(records))))

    for label, change, expect, key in (
        ("a missing image", lambda r: r[:own] + r[own + 1 :], "same", "image"),
        ("no image of another product", lambda r: r[:other] + r[other + 1 :], "same", None),
        ("an ASIN twice, the same", lambda r: [*r, r[own]], "same", None),
        ("an ASIN twice, differing", lambda r: [*r, r[own][:10] + r[other][10:]], "refused", None),
        ("a wrong dimension", lambda r: [record[:-4] for record in r], "refused", None),
        ("a wrong dimension that fits", lambda r: [r[0][: RECORD // 2], *r[1:], r[0][: RECORD // 2]], "refused", None),
        ("a NaN", lambda r: [*r[:own], r[own][:10] + b"\0\0\xc0\x7f" + r[own][14:], *r[own + 1 :]], "refused", None),
        ("a NaN in another product", lambda r: [*r[:other], r[other][:10] + b"\0\0\xc0\x7f" + r[other][14:], *r[other + 1 :]], "same", None),
        ("an ASIN in lower case", lambda r: [r[0][:10].lower() + r[0][10:], *r[1:]], "refused", None),
        ("another order", lambda r: r[::-1], "same", None),
        ("another category", lambda r: [b"X" + record[1:] for record in r], "refused", None),
        ("nothing", lambda r: [], "refused", None),
    ):
        trial.run(
            f"images: {label}",
            with_records(change),
            expect,
            *([images] if expect == "refused" else []),
            change=without(key) if key else lambda state: state,
        )
    for file, seed in ((reviews, 1), (meta, 2), (images, 3)):
        trial.random(file, 25, seed)
    trial.finish(130)


def moved(line):
    """A row of interactions with another part."""
    row, _, part = line.strip().rpartition(b",")
    return row + (b",val" if part == b"train" else b",train")


def test_own_tables(own, tmp_path):
    np.save(own / "audio.npy", np.arange(28, dtype=np.float32).reshape(14, 2))
    (own / "audio_ids.txt").write_text("\n".join(f"sku-{k:02d}" for k in range(14)))
    from safetensors.numpy import save_file

    save_file(
        {"features": np.eye(14, dtype=np.float32)}, own / "title.safetensors", metadata={"ids": json.dumps([f"sku-{k:02d}" for k in range(14)])}
    )
    (own / "tags.csv").write_text("item_id,a,b\n" + "".join(f"sku-{k:02d},{k},-1.5e-3\n" for k in range(14)))
    trial = Trial(own, lambda d: read_draft([d]), tmp_path)
    for label, file, change, expect in (
        ("Windows line ends", "clicks.csv", lambda lines: [line + b"\r" if line and not line.endswith(b"\r") else line for line in lines], "same"),
        ("a byte order mark", "clicks.csv", lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]], "same"),
        ("blank lines", "clicks.csv", at(5, lambda line: [line, b"", b""]), "same"),
        ("quoted fields", "clicks.csv", at(5, lambda line: [b",".join(b'"' + cell + b'"' for cell in line.strip().split(b","))]), "same"),
        ("another column", "clicks.csv", lambda lines: [line.strip() + b",x" if line else line for line in lines], "same"),
        ("another order", "clicks.csv", lambda lines: [lines[0], *[line for line in lines[:0:-1] if line]], "same"),
        ("a row twice", "clicks.csv", at(5, lambda line: [line, line]), "same"),
        ("blanks around ids", "clicks.csv", at(5, lambda line: [line.replace(b"u", b" u", 1)]), "same"),
        ("semicolons", "clicks.csv", lambda lines: [line.replace(b",", b";") for line in lines], "same"),
        ("a short row", "clicks.csv", at(5, lambda line: [line.rpartition(b",")[0]]), "refused"),
        ("an empty id", "clicks.csv", at(5, lambda line: [b"," + line.partition(b",")[2]]), "refused"),
        ("a pair in two parts", "clicks.csv", at(5, lambda line: [line, moved(line)]), "refused"),
        ("non-UTF-8", "clicks.csv", at(5, lambda line: [b"\xe4" + line]), "refused"),
        ("UTF-16", "clicks.csv", lambda lines: [b"\n".join(lines).decode().encode("utf-16")], "refused"),
        ("no header", "clicks.csv", lambda lines: lines[1:], "refused"),
        ("features in another order", "tags.csv", lambda lines: [lines[0], *[line for line in lines[:0:-1] if line]], "same"),
        ("a row of an unknown item", "tags.csv", at(3, lambda line: [line, b"sku-77,1,2"]), "same"),
        ("a row twice, the same", "tags.csv", at(3, lambda line: [line, line]), "same"),
        ("a row twice, differing", "tags.csv", at(3, lambda line: [line, line + b"9"]), "refused"),
        ("a word for a number", "tags.csv", at(3, lambda line: [line + b"x"]), "refused"),
        ("an infinite number", "tags.csv", at(3, lambda line: [line.rpartition(b",")[0] + b",1e999"]), "refused"),
        ("a list of ids one short", "audio_ids.txt", lambda lines: lines[:-1], "refused"),
        ("an empty id in the list", "audio_ids.txt", at(3, lambda line: [b""]), "refused"),
        ("an id twice in the list", "audio_ids.txt", at(3, lambda line: [b"sku-00"]), "refused"),
    ):  # fmt: skip
        trial.run(f"{file}: {label}", edit(file, change), expect, *([file.partition("_")[0].partition(".")[0]] if expect == "refused" else []))
    kind = edit("clicks.csv", lambda lines: [line.replace(b"sku-", b"") for line in lines])
    trial.run("clicks.csv: ids of another kind", kind, "refused", "'00'", "'sku-00'", "of one kind")
    gone = lambda state: {**state, "tags": {k: v for k, v in state["tags"].items() if k != "sku-02"}}  # noqa: E731
    trial.run("tags.csv: no row for an item", edit("tags.csv", at(3, lambda line: [])), "same", change=gone)
    trial.run("tags.csv: an empty row for an item", edit("tags.csv", at(3, lambda line: [b"sku-02,,"])), "same", change=gone)
    for file, seed in (
        ("clicks.csv", 4),
        ("image.parquet", 5),
        ("text.npz", 6),
        ("title.safetensors", 7),
        ("tags.csv", 8),
        ("audio.npy", 9),
        ("audio_ids.txt", 10),
    ):
        trial.random(file, 15, seed)
    trial.finish(130)


def test_published_layouts(lattice, mmrec, hkuds, tmp_path):
    plan = (
        (lattice, ["5-core/train.json", "5-core/test.json", "5-core/item_list.txt", "image_feat.npy"]),
        (mmrec, ["tiny.inter", "i_id_mapping.csv", "text_feat.npy"]),
        (hkuds(), ["train_mat", "val_mat", "image_feat.npy"]),
    )
    for directory, files in plan:
        trial = Trial(directory, lambda d: read_draft([d]), tmp_path)
        for file in files:
            trial.random(file, 15, len(file))
            trial.run(f"{file} is gone", lambda d, file=file: (d / file).unlink(), "either")
        trial.finish(45)
