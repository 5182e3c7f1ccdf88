"""Which adapters have series of their own, and that the number of series stays bounded."""

from __future__ import annotations

import pytest

from hydraserve.server.metrics.labels import HALF_LIFE_S, SHARED_NAMES_PER_PLACE, AdapterLabels


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def retired() -> list[str]:
    return []


@pytest.fixture
def labels(clock: Clock, retired: list[str]) -> AdapterLabels:
    return AdapterLabels(2, retired.append, clock=clock)


def use(labels: AdapterLabels, adapter: str | None, times: int = 1) -> str:
    label = ""
    for _ in range(times):
        label = labels.enter(adapter)
        labels.leave(adapter, label)
    return label


def test_the_first_ones_have_labels_and_the_rest_share_one(labels: AdapterLabels) -> None:
    assert [use(labels, name) for name in ("a", "b", "c", None, "a")] == ["a", "b", "other", "base", "a"]
    assert [labels.find(name) for name in ("a", "c", "unheard of")] == ["a", "other", "other"]


def test_a_much_busier_adapter_takes_the_quietest_one_s_place(labels: AdapterLabels, retired: list[str]) -> None:
    use(labels, "a", 5)
    use(labels, "b", 2)
    assert use(labels, "c", 4) == "other", "twice as busy is not enough"
    assert use(labels, "c") == "c"
    assert retired == ["b"]
    assert labels.find("b") == "other"


def test_equal_traffic_does_not_take_turns(labels: AdapterLabels, retired: list[str]) -> None:
    for _ in range(50):
        for name in ("a", "b", "c", "d"):
            use(labels, name)
    assert retired == []


def test_activity_is_forgotten(labels: AdapterLabels, clock: Clock, retired: list[str]) -> None:
    use(labels, "a", 100)
    use(labels, "b", 100)
    clock.now = 10 * HALF_LIFE_S
    assert use(labels, "c") == "c"
    assert len(retired) == 1


def test_a_label_in_use_is_kept_until_its_request_ends(labels: AdapterLabels, retired: list[str]) -> None:
    labels.enter("a")
    labels.enter("b")
    assert use(labels, "c", 50) == "other"
    labels.leave("a", "a")
    assert use(labels, "c") == "c"
    assert retired == ["a"]


def test_a_request_keeps_the_label_it_began_with(labels: AdapterLabels) -> None:
    use(labels, "a", 10)
    use(labels, "b", 10)
    began = labels.enter("c")
    use(labels, "c", 30)
    labels.leave("c", began)
    assert (began, labels.find("c")) == ("other", "c")
    assert use(labels, "d", 200) == "d", "c's users are counted right, so that it can be given up"


def test_adapters_called_like_our_own_labels(labels: AdapterLabels) -> None:
    assert [use(labels, name) for name in ("base", "other", None)] == ["base_", "other_", "base"]


def test_where_series_cannot_be_removed_the_names_are_counted(clock: Clock) -> None:
    labels = AdapterLabels(2, removable=False, clock=clock)
    seen = set()
    for i in range(100):
        clock.now += 20 * HALF_LIFE_S
        seen.add(use(labels, f"adapter-{i}"))
    assert len(seen - {"other"}) == 2 * SHARED_NAMES_PER_PLACE
    clock.now += 20 * HALF_LIFE_S
    assert use(labels, "adapter-0") == "adapter-0", "its series are there already"
    assert use(labels, "yet another") == "other"


def test_adapters_without_traffic_get_the_places_that_are_free(labels: AdapterLabels, retired: list[str]) -> None:
    use(labels, "a")
    for name in ("b", "c"):
        labels.offer(name)
    assert [labels.find(name) for name in "abc"] == ["a", "b", "other"]
    assert use(labels, "c") == "c", "one with traffic takes the place of one that has none"
    assert retired == ["b"]


def test_what_is_known_of_unused_adapters_is_forgotten(labels: AdapterLabels, clock: Clock) -> None:
    """The places are held by adapters in use, so that nobody gives one up meanwhile."""
    labels.enter("a")
    labels.enter("b")
    for i in range(500):
        clock.now += HALF_LIFE_S
        assert use(labels, f"adapter-{i}") == "other"
    assert len(labels._adapters) < 30
