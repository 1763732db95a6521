"""Which checkpoints a run keeps: policies are values, and deciding is pure."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_resume import KeepAll, KeepBest, KeepEvery, KeepLast
from lightning_resume.checkpoint.retention import AnyOf, Policy, Saved, as_policy, superseded

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def saved(step: int, *, hours: float = 0.0, finite: bool = True, **metrics: float) -> Saved:
    created = START + timedelta(hours=hours)
    return Saved(name=f"step-{step}", step=step, created=created, metrics=metrics, finite=finite)


def kept(policy: Policy, *oldest_first: Saved) -> list[int]:
    """The steps that are left after the others were deleted, oldest first."""
    newest_first = oldest_first[::-1]
    doomed = {one.name for one in superseded(newest_first, policy)}
    return [one.step for one in oldest_first if one.name not in doomed]


def test_keep_last_keeps_the_newest_not_the_highest_step() -> None:
    assert kept(KeepLast(2), saved(10), saved(30), saved(20)) == [30, 20]


def test_keep_best_keeps_the_least_or_the_most() -> None:
    run = [saved(1, loss=3.0), saved(2, loss=1.0), saved(3, loss=2.0), saved(4, loss=9.0)]
    assert kept(KeepBest(2, "loss"), *run) == [2, 3, 4]
    assert kept(KeepBest(1, "loss", "max"), *run) == [4]


def test_of_equals_the_older_one_is_best() -> None:
    assert kept(KeepBest(1, "loss"), saved(1, loss=1.0), saved(2, loss=1.0), saved(3, loss=2.0)) == [1, 3]


def test_what_is_not_finite_or_not_measured_is_never_best() -> None:
    run = [saved(1, loss=-9.0, finite=False), saved(2, loss=math.nan), saved(3), saved(4, loss=5.0), saved(5)]
    assert kept(KeepBest(3, "loss"), *run) == [4, 5]


def test_while_nothing_was_measured_the_newest_are_kept() -> None:
    assert kept(KeepBest(2, "loss"), saved(1), saved(2), saved(3)) == [2, 3]
    assert kept(KeepBest(2, "loss"), saved(1), saved(2), saved(3, loss=1.0), saved(4)) == [3, 4]


def test_keep_every_keeps_the_first_at_or_after_each_multiple() -> None:
    run = [saved(step) for step in (40, 80, 120, 160, 200, 240, 280, 290)]
    assert kept(KeepEvery(steps=100), *run) == [120, 200, 290]


def test_keep_every_counts_hours_from_the_oldest() -> None:
    run = [saved(step, hours=step) for step in (0, 1, 5, 6, 7, 13, 14)]
    assert kept(KeepEvery(hours=6), *run) == [0, 6, 13, 14]


def test_policies_combine_to_what_any_of_them_keeps() -> None:
    run = [saved(step, hours=step / 10, loss=abs(step - 30)) for step in (10, 20, 30, 40, 50, 60)]
    policy = KeepLast(1) | KeepBest(1, "loss") | KeepEvery(steps=20)
    assert policy == AnyOf((KeepLast(1), KeepBest(1, "loss"), KeepEvery(steps=20)))
    assert kept(policy, *run) == [20, 30, 40, 60]
    assert kept(as_policy([KeepLast(1), KeepBest(1, "loss")]), *run) == [30, 60]


def test_the_newest_is_kept_whatever_the_policy_says() -> None:
    assert kept(KeepBest(1, "loss"), saved(1, loss=0.0), saved(2, loss=1.0)) == [1, 2]


def test_a_number_means_the_last_and_none_means_all() -> None:
    assert (as_policy(2), as_policy(None)) == (KeepLast(2), KeepAll())
    assert kept(KeepAll(), saved(1), saved(2)) == [1, 2]


@pytest.mark.parametrize("keep", ["3", 2.5, True, ["loss"], object()])
def test_what_is_no_policy_is_refused(keep: object) -> None:
    with pytest.raises(TypeError, match="KeepLast"):
        as_policy(keep)  # type: ignore[arg-type]


def test_arguments_out_of_bounds_are_named() -> None:
    for make in (
        lambda: KeepLast(0),
        lambda: KeepBest(0, "loss"),
        lambda: KeepBest(1, "loss", "least"),
        lambda: KeepEvery(),
        lambda: KeepEvery(steps=1, hours=1),
        lambda: KeepEvery(steps=0),
        lambda: KeepEvery(hours=-1.0),
        lambda: as_policy(0),
        lambda: as_policy([]),
    ):
        with pytest.raises(ValueError, match=r"pass|Pass"):
            make()


policies = st.one_of(
    st.builds(KeepLast, st.integers(1, 4)),
    st.builds(KeepBest, st.integers(1, 3), st.just("loss"), st.sampled_from(["min", "max"])),
    st.builds(KeepEvery, steps=st.integers(1, 30)),
    st.builds(KeepEvery, hours=st.floats(0.5, 9)),
)
runs = st.lists(
    st.tuples(st.integers(1, 10), st.floats(0, 3), st.floats(allow_nan=True), st.booleans()), min_size=1, max_size=25
)


@given(st.lists(policies, min_size=1, max_size=3), runs)
def test_deleting_after_every_save_keeps_what_deleting_once_would(
    chosen: list[Policy], run: list[tuple[int, float, float, bool]]
) -> None:
    """What a policy wants does not depend on what was deleted before, but for what was the newest at the time."""
    policy = as_policy(chosen)
    step, hours, left = 0, 0.0, list[Saved]()
    everything: list[Saved] = []
    for more, later, loss, finite in run:
        step, hours = step + more, hours + later
        everything.append(saved(step, hours=hours, finite=finite, loss=loss))
        left.append(everything[-1])
        doomed = {one.name for one in superseded(left[::-1], policy)}
        left = [one for one in left if one.name not in doomed]
    assert [one.step for one in left] == kept(policy, *everything)
