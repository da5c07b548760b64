from __future__ import annotations

from conductor.lease import Watch


def observe(watch: Watch, *counters: dict[int, int], elapsed_s: float = 0.5) -> list[int]:
    dead: list[int] = []
    for one in counters:
        dead = [worker for worker, _ in watch.observe(one, elapsed_s)]
    return dead


def test_a_counter_that_stands_still_is_dead_after_the_time() -> None:
    watch = Watch(8.0)
    assert observe(watch, *[{1: 5}] * 16) == []
    assert observe(watch, {1: 5}) == [1]


def test_a_counter_that_moves_is_alive() -> None:
    watch = Watch(8.0)
    for renewals in range(10):
        assert observe(watch, *[{1: renewals}] * 15) == []


def test_a_long_gap_counts_as_a_short_one() -> None:
    watch = Watch(8.0)
    observe(watch, {1: 5}, {1: 5})
    assert observe(watch, {1: 5}, elapsed_s=600.0) == []
    assert observe(watch, {1: 6}) == []


def test_a_lost_connection_starts_again() -> None:
    watch = Watch(8.0)
    observe(watch, *[{1: 5}] * 16)
    watch.forget()
    assert observe(watch, *[{1: 5}] * 16) == []


def test_who_was_declared_dead_by_another_is_taken_over_at_once() -> None:
    assert Watch(8.0).observe({1: -1, 2: 0}, 0.5) == [(1, -1)]


def test_it_says_when_to_look_again() -> None:
    watch = Watch(8.0)
    assert watch.next_death_s() == 8.0
    observe(watch, *[{1: 5, 2: 6}] * 5)
    assert watch.next_death_s() == 6.0
