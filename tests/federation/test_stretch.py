"""How long a distillation round is, without any federation."""

import pytest

from ckd_fed.config import resolve
from server.stretch import LONGEST, LONGEST_SECONDS, advice, grown, sheet_bytes, stretch_epochs


def config(**given):
    return resolve({"dataset": "toy", "training.epochs": 23, "training.validate-every": 5}, given)


@pytest.mark.parametrize(
    ("epoch", "validations", "per_epoch", "expected"),
    [
        (0, 1, 0, 5),
        (0, 3, 0, 15),
        (5, 8, 0, 18),  # to the last epoch, which is validated too
        (20, 1, 0, 3),
        (23, 1, 0, 0),
        (7, 1, 0, 3),  # cut before: up to the next validation
        (0, 8, 10_000_000, 5),  # 64 MB are 6 epochs, of which 5 are a whole interval
        (0, 8, 6_000_000, 10),
        (0, 8, 20_000_000, 3),  # less than an interval: no validation in this round
        (3, 8, 20_000_000, 2),
        (0, 1, 10**9, 1),  # an epoch at least
        (22, 4, 10**9, 1),
        (23, 1, 10_000_000, 0),
    ],
)
def test_epochs_of_a_round(epoch, validations, per_epoch, expected):
    assert stretch_epochs(config(), epoch, validations, per_epoch) == expected


def test_a_round_grows_while_messaging_takes_too_much_of_it():
    assert grown(config(), 1, 1, messaging=0.9, seconds=10.0) == 1
    assert grown(config(), 1, 1, messaging=2.0, seconds=10.0) == 3  # 2 of 26
    assert grown(config(), 2, 2, messaging=2.0, seconds=10.0) == 5  # 2 of 22
    assert grown(config(), 4, 2, messaging=2.0, seconds=10.0) == 5  # asked for before they grew, and yet they were to be longer
    assert grown(config(), 6, 2, messaging=2.0, seconds=10.0) == 6
    assert grown(config(), 1, 1, messaging=5.0, seconds=10.0) == 9  # 5 of 50
    assert grown(config(), 1, 1, messaging=9.0, seconds=10.0) == LONGEST_SECONDS  # of a second each
    assert grown(config(), 1, 1, messaging=90.0, seconds=100.0) == LONGEST  # of ten seconds each
    assert grown(config(), 1, 1, messaging=10.0, seconds=10.0) == LONGEST
    assert grown(config(), 3, 0, messaging=9.0, seconds=10.0) == 3  # without a validation
    assert grown(config(**{"federation.messaging-share": 1}), 1, 1, messaging=9.9, seconds=10.0) == 1


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_a_round_as_long_as_it_grows_keeps_messaging_to_its_share(share):
    wanted = config(**{"federation.messaging-share": share})
    for messaging in (0.5, 1.0, 3.0, 7.0):
        length = grown(wanted, 1, 1, messaging, messaging + 10.0)
        assert length == LONGEST or messaging <= share * (messaging + 10.0 * length) * (1 + 1e-9)
        assert length == 1 or messaging > share * (messaging + 10.0 * (length - 1))  # and no longer than that


def test_several_students_are_told_how_long_their_rounds_should_be():
    wanted = resolve({"dataset": "toy", "training.epochs": 1000, "training.validate-every": 5}, {})
    assert advice(wanted, 2, epochs=5, messaging=1.0, seconds=10.0) == ""
    assert advice(wanted, 2, epochs=5, messaging=3.0, seconds=13.0) == (  # 3 of 31 s with 14 epochs, 3 of 29 with 13
        "NOTE: messaging took 3 of the 13 s (23%) of a round of 2 students, 10% is wanted (federation.messaging-share): "
        "set training.validate-every=14 training.patience=4"
    )
    said = advice(wanted, 2, epochs=5, messaging=15.0, seconds=25.0)  # 5 s an epoch, one student 2 * 2 / 0.9
    assert "training.validate-every=68 training.patience=1;" in said
    assert said.endswith("a lone student, whose rounds grow by themselves, would be done sooner (federation.student-workers=1)")
    assert "more than 10% (federation.messaging-share) whatever their length" in advice(wanted, 2, epochs=5, messaging=9.99, seconds=10.0)
    assert "whatever their length" in advice(wanted, 2, epochs=5, messaging=10.0, seconds=10.0)
    assert "raise federation.stretch-mb=64" in advice(wanted, 2, epochs=2, messaging=9.0, seconds=10.0)  # cut by its bytes
    never = resolve({"dataset": "toy", "federation.messaging-share": 1}, {})
    assert advice(never, 2, epochs=5, messaging=9.0, seconds=10.0) == ""


def test_bytes_of_an_epoch_of_baby():
    assert sheet_bytes(config(), 119_674) == 117 * (1024 + 5000) * 2
