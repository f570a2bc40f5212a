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
