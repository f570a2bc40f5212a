from metis_agent.models.recent import Recent


def test_a_value_is_computed_once() -> None:
    recent: Recent[int] = Recent(2)
    values = iter([1, 2])
    assert [recent.get("a", lambda: next(values)) for _ in range(3)] == [1, 1, 1]


def test_the_least_recently_used_goes() -> None:
    recent: Recent[str] = Recent(2)
    for key in ("a", "b", "a", "c"):
        recent.get(key, lambda key=key: key.upper())  # type: ignore[misc]
    assert ["a" in recent, "b" in recent, "c" in recent] == [True, False, True]


def test_heavy_results_push_out_more_than_one() -> None:
    recent: Recent[str] = Recent(6, len)
    for value in ("aa", "bb", "cc"):
        recent.get(value, lambda value=value: value)  # type: ignore[misc]
    assert all(value in recent for value in ("aa", "bb", "cc"))
    recent.get("ddd", lambda: "ddd")
    assert [value in recent for value in ("aa", "bb", "cc", "ddd")] == [False, False, True, True]
    recent.get("long", lambda: "far too long")
    assert [value in recent for value in ("cc", "ddd", "long")] == [False, False, True]
