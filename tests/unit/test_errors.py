"""The tree of errors: drawn as it is, sent over the wire and over a pickle without loss."""

from __future__ import annotations

import pickle

import pytest

from snapshotd import errors
from snapshotd.errors import NoRoom, ProtocolError, RankClaimed, Refused, SnapshotError, SnapshotGone, SnapshotLost

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SnapshotError)]


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: dict[str, int] = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("├──", "   ").replace("└──", "   ").replace("│", " ")
        if words.split() and any(words.split()[0] == kind.__name__ for kind in KINDS):
            drawn[words.split()[0]] = (len(words) - len(words.lstrip()) - 4) // 4
    assert drawn == {kind.__name__: kind.__mro__.index(SnapshotError) for kind in KINDS}


def test_every_refusal_has_a_kind_of_its_own_that_finds_it_again() -> None:
    refusals = [kind for kind in KINDS if issubclass(kind, Refused)]
    assert {kind.kind: kind for kind in refusals} == errors.REFUSALS
    assert len(refusals) == len(errors.REFUSALS)


@pytest.mark.parametrize(
    "error",
    [
        ProtocolError("version", "the other side is older"),
        NoRoom("no room", 10, 5, "memory_limit"),
        RankClaimed("taken", 3, 4711),
        SnapshotGone("gone"),
        SnapshotLost("rank 1 is missing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_survives_the_pickle_of_a_launcher(error: SnapshotError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)


def test_a_loss_says_what_it_means_and_what_to_do() -> None:
    error = SnapshotLost("rank 1 of 2 is missing")
    assert error.why in str(error)
    assert "training has not started" in str(error) and 'on_lost="fresh"' in str(error)
