"""The triple stream: pinned bit for bit, drawn as the protocol says."""

import hashlib
import warnings

import numpy as np
import pytest
from scipy.stats import chisquare

from ckd_fed.data.interactions import Interactions
from ckd_fed.data.triples import _KD_USERS, _USERS, TripleStream, below, derive_key, first_distinct, mix64, smallest, triples_hash, words
from ckd_fed.errors import DataError
from ckd_fed.kernels import Kernels, kernels

# Users 0, 4, 8, ... have no training items; user 1 has all items but one.
ROWS = [[] if user % 4 == 0 else [(7 * user + 3 * k) % 23 for k in range(1 + user % 5)] for user in range(24)]
ROWS[1] = [item for item in range(23) if item != 11]


@pytest.fixture(autouse=True, params=["compiled", "numpy"])
def way(request, monkeypatch):
    """All holds of both ways to draw."""
    if request.param == "numpy":
        monkeypatch.setattr(TripleStream, "_compiled", None)
    elif kernels() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture
def train(interactions):
    return interactions(ROWS, 23)


def same(a, b):
    return np.array_equal(a.ranking, b.ranking) and np.array_equal(a.distillation, b.distillation)


def test_splitmix64_matches_its_published_first_outputs():
    # https://prng.di.unimi.it/splitmix64.c, seed 1234567
    assert words(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert len(set(mix64(np.arange(1000, dtype=np.uint64)).tolist())) == 1000


def test_keys_are_pinned():
    assert derive_key("a", 1) == int.from_bytes(hashlib.sha256(b"a\x1f1").digest()[:8], "little")
    assert derive_key("a", 11) != derive_key("a1", 1)


def test_below_covers_its_range():
    assert below(np.array([0, 2**64 - 1], dtype=np.uint64), 7).tolist() == [0, 6]
    assert below(np.array([2**63], dtype=np.uint64), 1).tolist() == [0]


@pytest.mark.parametrize(
    ("batch_size", "kd_batch_size", "expected"),
    [
        (3, 4, "6fa8b6148dadb53775e4a2bdcb2bfb55f2e19e3bd76020fc2405ba834da58a61"),  # sparse drawing of users
        (9, 18, "784d9de88e02fcb039064ff699b138a4c293b7706c075f88bdb1a1be480ce643"),  # dense drawing
        (40, 0, "ecce1329f817918f966b6f043c4851a86761287d0fcb73fd23caac6cf64a4e70"),  # users repeated, no distillation batch
    ],
)
def test_triples_are_the_same_on_every_machine(train, batch_size, kd_batch_size, expected):
    stream = TripleStream(train, "fingerprint", 123, batch_size, kd_batch_size)
    assert triples_hash([*stream.epoch(0), *stream.epoch(7)]) == expected


def test_a_step_in_full(train):
    triples = TripleStream(train, "fingerprint", 123, 4, 3).step(2, 1)
    assert triples.ranking.tolist() == [[6, 7, 9, 22], [22, 6, 3, 16], [21, 17, 22, 20]]
    assert triples.distillation.tolist() == [[9, 15, 19], [2, 19, 19], [13, 0, 0]]
    assert triples.ranking.dtype == triples.distillation.dtype == np.int32


def test_a_step_equals_one_drawn_with_python_integers(train):
    """The whole stream once more, without numpy: no overflow, rounding or sort order of a library has a say."""
    full, gamma, mix_1 = 2**64 - 1, 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9

    def mix(x):
        x = (x ^ x >> 30) * mix_1 & full
        x = (x ^ x >> 27) * 0x94D049BB133111EB & full
        return x ^ x >> 31

    def lane(base, number, n):
        key = mix(base ^ (number + 1) * mix_1 & full)
        return [mix(key + k * gamma & full) for k in range(1, n + 1)]

    def draw(word, bound):
        return (word >> 32) * bound >> 32

    pool = [user for user, row in enumerate(ROWS) if row]

    def users(base, number, n):
        if n > len(pool):
            return sorted(pool[draw(word, len(pool))] for word in lane(base, number, n))
        if 4 * n >= len(pool):
            order = lane(base, number, len(pool))
            return [user for user, word in zip(pool, order, strict=True) if word in sorted(order)[:n]]
        distinct = list(dict.fromkeys(draw(word, len(pool)) for word in lane(base, number, n + n // 4 + 8)))
        assert len(distinct) >= n
        return sorted(pool[index] for index in distinct[:n])

    for n, k in ((3, 4), (9, 12), (40, 30)):
        key = int.from_bytes(hashlib.sha256("\x1f".join(["ckd-triples-1", "f", "5", "3"]).encode()).digest()[:8], "little")
        base = mix(key + 2 * gamma & full)
        drawn = users(base, 0, n)
        positives = [sorted(ROWS[user])[draw(word, len(ROWS[user]))] for user, word in zip(drawn, lane(base, 1, n), strict=True)]
        outside = [sorted(set(range(23)) - set(ROWS[user])) for user in drawn]
        negatives = [items[draw(word, len(items))] for items, word in zip(outside, lane(base, 2, n), strict=True)]
        pairs = [[draw(word, 23) for word in lane(base, number, k)] for number in (4, 5)]
        triples = TripleStream(train, "f", 5, n, k).step(3, 1)
        assert triples.ranking.tolist() == [drawn, positives, negatives]
        assert triples.distillation.tolist() == [users(base, 3, k), *pairs]


def test_any_step_alone_equals_the_epoch(train):
    stream = TripleStream(train, "f", 5, 4, 6)
    epoch = stream.epoch(3)
    for step in reversed(range(len(epoch))):
        assert same(TripleStream(train, "f", 5, 4, 6).step(3, step), epoch[step])


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_shares_partition_an_epoch(train, workers):
    stream = TripleStream(train, "f", 5, 4, 6)
    shares = [stream.epoch(1, (worker, workers)) for worker in range(workers)]
    whole = stream.epoch(1)
    assert sum(map(len, shares)) == len(whole)
    assert all(same(shares[step % workers][step // workers], triples) for step, triples in enumerate(whole))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 12, 13, 59, 60, 61, 1000])
def test_steps_per_epoch(train, batch_size):
    stream = TripleStream(train, "f", 0, batch_size)
    assert stream.steps_per_epoch == len(train) // batch_size + 1 == len(stream.epoch(0))


@pytest.mark.parametrize("size", range(1, 26))
def test_users_are_distinct_where_possible_and_have_training_items(train, size):
    pool = train.users  # 18 of them: drawn sparsely below 5, densely from 5 on, repeated above 18
    assert len(pool) == 18
    for step in TripleStream(train, "f", 1, size, size).epoch(0) + TripleStream(train, "f", 2, size, size).epoch(0):
        for users in (step.ranking[0], step.distillation[0]):
            assert len(users) == size
            assert np.isin(users, pool).all()
            assert len(np.unique(users)) == min(size, len(pool)) if size <= len(pool) else len(np.unique(users)) <= len(pool)
            assert (np.diff(users) >= 0).all()


def test_repeated_users_are_drawn_with_repetition(train):
    counts = np.bincount(TripleStream(train, "f", 1, 500).step(0, 0).ranking[0], minlength=24)
    assert chisquare(counts[train.users]).pvalue > 1e-3


def test_sparse_drawing_draws_again_after_collisions(interactions, monkeypatch):
    """A first lane that repeats one user forces a second attempt, from a lane that nothing else uses."""
    monkeypatch.setattr(TripleStream, "_compiled", None)
    stream = TripleStream(interactions([[0]] * 200, 5), "f", 0, 10, 10)
    genuine, used = TripleStream._lane, []

    def lane(base, number, n):
        used.append(number)
        return np.zeros(n, dtype=np.uint64) if number in (_USERS, _KD_USERS) else genuine(base, number, n)

    monkeypatch.setattr(TripleStream, "_lane", staticmethod(lane))
    triples = stream.step(0, 0)
    for users in (triples.ranking[0], triples.distillation[0]):
        assert len(np.unique(users)) == 10
        assert users[0] == 0
    assert len(used) == 8
    assert len(set(used)) == 8
    assert not np.array_equal(triples.ranking[0], triples.distillation[0])


@pytest.mark.parametrize("n", [1, 2, 250, 999, 1000], ids="{} of 1000".format)
def test_the_smallest_words(n):
    word = words(derive_key("smallest", n), 1000)
    assert np.array_equal(smallest(word, n), np.sort(np.argsort(word)[:n]))


@pytest.mark.parametrize("shift", [0, 63], ids=["all small", "all large"])
def test_the_smallest_words_where_they_are_not_spread_evenly(shift):
    """Then none of them, or all of them, is where the n-th was looked for."""
    word = (np.random.default_rng(0).permutation(1000).astype(np.uint64)) + (np.uint64(1) << np.uint64(shift))
    assert np.array_equal(smallest(word, 400), np.sort(np.argsort(word)[:400]))


@pytest.mark.parametrize(
    ("numbers", "n", "expected"),
    [([5, 3, 5, 9, 3, 1], 3, [3, 5, 9]), ([5, 3, 5, 9, 3, 1], 4, [1, 3, 5, 9]), ([4, 4, 2**31 - 1, 0], 9, [0, 4, 2**31 - 1]), ([], 2, [])],
    ids=["some", "all", "fewer", "none"],
)
def test_the_first_distinct_numbers(numbers, n, expected):
    assert first_distinct(np.array(numbers, dtype=np.int64), n).tolist() == expected


@pytest.mark.parametrize("size", [8, 60])
def test_every_user_is_equally_likely(interactions, size):
    """Sparse (8 of 80) and dense (60 of 80)."""
    stream = TripleStream(interactions([[0]] * 80, 5), "f", 3, size)
    draws = np.concatenate([stream.step(epoch, 0).ranking[0] for epoch in range(400)])
    counts = np.bincount(draws, minlength=80)
    assert chisquare(counts).pvalue > 1e-3


def test_positives_are_training_items_and_negatives_never(train):
    for size in (4, 18, 300):
        for triples in TripleStream(train, "f", 0, size).epoch(0):
            users, positives, negatives = triples.ranking
            assert train.contains(users, positives).all()
            assert not train.contains(users, negatives).any()
            assert negatives.min() >= 0
            assert negatives.max() < train.n_items


def test_positives_and_negatives_of_a_user_are_uniform(train):
    users, positives, negatives = TripleStream(train, "f", 0, 40_000).step(0, 0).ranking
    for user in (1, 2, 3, 23):
        own = set(ROWS[user])
        counts = np.bincount(positives[users == user], minlength=23)
        assert chisquare(counts[sorted(own)]).pvalue > 1e-3
        outside = sorted(set(range(23)) - own)
        counts = np.bincount(negatives[users == user], minlength=23)
        assert counts[sorted(own)].sum() == 0
        assert counts[outside].sum() == (users == user).sum()
        assert len(outside) == 1 or chisquare(counts[outside]).pvalue > 1e-3


def test_every_rank_is_another_negative(train):
    """The map from rank to negative is a bijection onto the items outside, so uniform ranks give uniform negatives exactly."""
    stream = TripleStream(train, "f", 0, 1)
    for user in train.users:
        outside = sorted(set(range(23)) - set(ROWS[user]))
        assert stream._negatives(np.full(len(outside), user), np.arange(len(outside))).tolist() == outside


def test_pairs_are_uniform_and_independent(train):
    _, j, k = TripleStream(train, "f", 0, 1, 40_000).step(0, 0).distillation
    counts = np.bincount(j.astype(np.int64) * 23 + k, minlength=23 * 23)
    assert len(counts) == 23 * 23
    assert chisquare(counts).pvalue > 1e-3


def test_ranking_batches_do_not_depend_on_the_distillation_batch(train):
    for k in (1, 17, 5000):
        for with_k, without in zip(TripleStream(train, "f", 9, 4, k).epoch(2), TripleStream(train, "f", 9, 4).epoch(2), strict=True):
            assert np.array_equal(with_k.ranking, without.ranking)
            assert with_k.distillation.shape == (3, k)
            assert without.distillation.shape == (3, 0)


def test_seed_epoch_step_and_fingerprint_all_matter(train):
    base = TripleStream(train, "f", 9, 17, 30)
    different = [base.step(1, 0), base.step(0, 1), TripleStream(train, "f", 10, 17, 30).step(0, 0), TripleStream(train, "g", 9, 17, 30).step(0, 0)]
    for other in different:
        assert not np.array_equal(other.ranking, base.step(0, 0).ranking)
        assert not np.array_equal(other.distillation, base.step(0, 0).distillation)
    assert triples_hash([base.step(0, 0), base.step(0, 1)]) != triples_hash([base.step(0, 1), base.step(0, 0)])


def test_no_training_items_at_all(interactions, refuses):
    refuses(DataError, lambda: TripleStream(interactions([[], []], 4), "f", 0, 4), "no user has a training item")


def test_drawing_warns_of_nothing(train):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TripleStream(train, "f", 2**63, 4, 7).epoch(10**6)


@pytest.mark.parametrize(
    ("batch_size", "users"),
    [(4, [2, 10, 15, 18]), (5, [5, 14, 18, 19, 23])],  # of 18: less than a quarter, and more
)
def test_which_way_users_are_drawn_is_pinned(batch_size, users, train):
    assert TripleStream(train, "fingerprint", 123, batch_size, 4).step(0, 0).ranking[0].tolist() == users


def test_the_smallest_where_one_word_too_few_is_below_the_bound():
    word = np.arange(1000, dtype=np.uint64) + np.uint64(2**63)
    word[5] = 0
    assert smallest(word, 2).tolist() == [0, 5]


@pytest.mark.parametrize("seed", range(40))
def test_compiled_and_numpy_draw_the_same(monkeypatch, seed, way):
    """Of any users and items, and any size against the number of users with items: repeated, dense and sparse drawing."""
    rng = np.random.default_rng(seed)
    n_users, n_items = int(rng.integers(1, 3000)), int(rng.integers(2, 400))
    of_all = np.unique(rng.integers(0, n_users * (n_items - 1), int(rng.integers(1, 8000))))
    train = Interactions.from_pairs(of_all // (n_items - 1), of_all % (n_items - 1), n_users, n_items)
    p = len(train.users)
    sizes = [1, 2, 300, 1024, p, p + 1, max(1, p // 4), max(1, p // 4 - 1)]
    stream = TripleStream(train, "f", seed, int(rng.choice(sizes)), int(rng.choice([0, 5000, *sizes])))
    found = stream.epoch(0)[:3]
    monkeypatch.setattr(TripleStream, "_compiled", None)
    assert all(same(mine, stream.step(0, step)) for step, mine in enumerate(found))


def test_arrays_of_another_kind_are_not_for_the_kernel(monkeypatch, train, way):
    calls, compiled = [], Kernels.triples
    monkeypatch.setattr(Kernels, "triples", lambda *args: (calls.append(1), compiled(*args))[1])
    other = Interactions(train.indptr.astype(np.int32), train.items, train.n_items)
    assert same(TripleStream(train, "f", 1, 4, 3).step(0, 0), TripleStream(other, "f", 1, 4, 3).step(0, 0))
    assert len(calls) == (TripleStream._compiled is not None)
