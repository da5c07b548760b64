from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Annotated, Any, Literal

import pytest

from conductor.errors import OptionInvalid, StepNameReused, StepOrderChanged
from conductor.replay import UNSET, Replay, check_step_name, member_of, step_codec
from conductor.store.steps import StoredStep


def stored(name: str, position: int | None, kind: str = "step") -> StoredStep:
    return StoredStep(name, position, kind, b"1", None, due=True)


def test_places_are_counted_on_the_sequential_path_alone() -> None:
    replay = Replay([])
    assert replay.reach("a", "step", sequential=True) == (0, None)
    assert replay.reach("b", "step", sequential=False) == (None, None)
    assert replay.reach("c", "step", sequential=True) == (1, None)


def test_what_is_stored_is_found() -> None:
    replay = Replay([stored("a", 0), stored("b", None)])
    assert replay.reach("b", "step", sequential=False)[1] == stored("b", None)
    assert replay.reach("a", "step", sequential=True) == (0, stored("a", 0))


def test_a_handler_may_go_on_after_what_is_stored() -> None:
    replay = Replay([stored("a", 0)])
    replay.reach("a", "step", sequential=True)
    assert replay.reach("new", "step", sequential=True) == (1, None)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_name_is_used_once(sequential: bool) -> None:
    replay = Replay([])
    replay.reach("a", "step", sequential=True)
    with pytest.raises(StepNameReused, match="'a'"):
        replay.reach("a", "step", sequential=sequential)


@pytest.mark.parametrize(
    "steps, reached",
    [
        ([stored("a", 0), stored("b", 1)], ["b"]),
        ([stored("a", 0), stored("b", 1)], ["a", "new"]),
        ([stored("a", 0)], ["new"]),
        ([stored("b", 1)], ["b"]),
        ([stored("a", 0, "sleep")], ["a"]),
    ],
)
def test_another_order_is_refused(steps: list[StoredStep], reached: list[str]) -> None:
    replay = Replay(steps)
    *before, last = reached
    for name in before:
        replay.reach(name, "step", sequential=True)
    with pytest.raises(StepOrderChanged):
        replay.reach(last, "step", sequential=True)


def test_a_step_may_move_to_and_from_a_concurrent_place() -> None:
    replay = Replay([stored("a", None), stored("b", 0)])
    assert replay.reach("a", "step", sequential=False)[1] is not None
    assert replay.reach("b", "step", sequential=True)[1] is not None


def test_a_gather_takes_a_place_and_keeps_its_names() -> None:
    replay = Replay([])
    place = replay.take_place()
    replay.reach("b", "step", sequential=False)
    assert replay.end_gather(place, {"b", "a"}) == "gather 1"
    assert replay.reach("after", "step", sequential=True) == (1, None)
    assert replay.end_gather(replay.take_place(), set()) == "gather 3"  # and so may an empty one


@pytest.mark.parametrize("names, changed", [({"a", "b"}, None), ({"a"}, "b"), (set(), "a, b")])
def test_a_gather_that_was_interrupted_has_what_was_in_it(
    names: set[str], changed: str | None
) -> None:
    """And may have more: nobody knows what else it had not begun."""
    replay = Replay([stored("a", member_of(0)), stored("b", member_of(0)), stored("c", None)])
    place = replay.take_place()
    if changed is None:
        assert replay.end_gather(place, {*names, "more"}) == "gather 1"
    else:
        with pytest.raises(StepOrderChanged, match=f": {changed}$"):
            replay.end_gather(place, names)


@pytest.mark.parametrize("names, changed", [({"a", "b"}, None), ({"a", "c"}, "b, c")])
def test_a_gather_that_was_over_has_the_same_names(names: set[str], changed: str | None) -> None:
    known = StoredStep("gather 1", 0, "gather", b'["a","b"]', None, due=True)
    replay = Replay([known])
    if changed is None:
        assert replay.end_gather(replay.take_place(), names) is None
    else:
        with pytest.raises(StepOrderChanged, match=f": {changed}$"):
            replay.end_gather(replay.take_place(), names)


@pytest.mark.parametrize(("title", "names"), [("gather a …", {"b", "a"}), ("gather", set())])
def test_a_gather_that_an_earlier_version_stored_is_over(title: str, names: set[str]) -> None:
    document = json.dumps(sorted(names)).encode()
    known = StoredStep(title, 0, "step", document, None, due=True)
    replay = Replay([known, StoredStep("next", 1, "step", b"1", None, due=True)])
    assert replay.end_gather(replay.take_place(), names) is None
    assert replay.reach("next", "step", sequential=True)[0] == 1
    with pytest.raises(StepOrderChanged, match="other steps than in an earlier run: more"):
        Replay([known]).end_gather(0, {*names, "more"})


def test_a_gather_that_failed_took_no_place_in_an_earlier_version() -> None:
    before = Replay([stored("next", 0)])
    before.fail_gather(before.take_place())
    assert before.reach("next", "step", sequential=True)[0] == 0
    now = Replay([stored("next", 1)])
    now.fail_gather(now.take_place())
    assert now.reach("next", "step", sequential=True)[0] == 1


def test_a_gather_has_its_place() -> None:
    replay = Replay([stored("a", 0)])
    with pytest.raises(StepOrderChanged, match="was 'a'"):
        replay.end_gather(replay.take_place(), set())


def test_a_step_may_leave_a_gather() -> None:
    replay = Replay([stored("a", member_of(3))])
    assert replay.reach("a", "step", sequential=True)[1] is not None


def annotated() -> datetime:
    return datetime(2026, 1, 1, tzinfo=UTC)


async def annotated_async() -> set[int]:
    return {1}


def test_the_type_of_a_step() -> None:
    assert step_codec(annotated, UNSET).form is datetime
    assert step_codec(annotated, UNSET) is step_codec(annotated, UNSET)
    assert step_codec(annotated_async, UNSET).form == set[int]
    assert step_codec(annotated, bytes).form is bytes
    with pytest.raises(ValueError, match="JSON"):
        step_codec(lambda: 1, UNSET).encode({1, 2})


class Oven:
    def __call__(self, _degrees: int) -> set[int]:
        return {1}

    def bake(self) -> datetime:
        return annotated()


def passed(fn: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(fn)
    def wrapper(*args: Any) -> Any:
        return fn(*args)

    return wrapper


@pytest.mark.parametrize(
    "fn, form",
    [
        (partial(Oven(), 200), set[int]),
        (partial(partial(passed(annotated))), datetime),
        (Oven(), set[int]),
        (Oven().bake, datetime),
        (passed(annotated), datetime),
        (passed(annotated_async), set[int]),
    ],
)
def test_the_type_is_that_of_what_is_called(fn: Callable[..., Any], form: Any) -> None:
    assert step_codec(fn, UNSET).form == form


@pytest.mark.parametrize("fn", [Oven, int, len, partial(int, "1")])
def test_a_class_says_nothing_of_its_type(fn: Callable[..., Any]) -> None:
    assert step_codec(fn, UNSET) is step_codec(lambda: None, UNSET)


@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800", 7])
def test_what_the_database_cannot_hold_does_not_name_a_step(name: object) -> None:
    with pytest.raises(OptionInvalid, match="cannot be the name of a step"):
        check_step_name(name)


@pytest.mark.parametrize("fn", [3, iter(())])
def test_what_cannot_be_called_is_no_step(fn: Any) -> None:
    with pytest.raises(OptionInvalid, match=f"a step is given {type(fn).__name__}") as refused:
        step_codec(fn, int)
    assert "not what it returns" in refused.value.hint


def test_functions_of_one_factory_keep_their_own_types() -> None:
    def loader(form: Any) -> Callable[[], Any]:
        def load() -> None: ...

        load.__annotations__["return"] = form  # as without `from __future__ import annotations`
        return load

    assert step_codec(loader(int), UNSET).form is int
    assert step_codec(loader(list[str]), UNSET).form == list[str]


def test_a_given_type_is_built_once() -> None:
    """Building pydantic's validator for each step took half of a step's time."""
    fn = dict
    assert step_codec(fn, list[int]) is step_codec(fn, list[int])
    assert step_codec(fn, int | str) is not step_codec(fn, str | int)
    assert step_codec(fn, Literal[1]) is not step_codec(fn, Literal[True])
    unhashable = Annotated[int, ["no", "hash"]]
    assert step_codec(fn, unhashable).decode(b"3") == 3
