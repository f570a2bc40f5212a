import json
from pathlib import Path

import pytest

from metis_agent.audit.accounting import ModelPrice, Prices
from metis_agent.errors import ConfigurationError

MILLION = 1_000_000


def test_prices_of_the_package_by_hand() -> None:
    # gpt-4o: $2.5 a million read, $10 written, $1.25 read from the cache.
    found = Prices().of_call("openai:gpt-4o", {"input_tokens": 200_000, "output_tokens": 10_000})
    assert found is not None
    assert (found.read, found.written, found.total) == pytest.approx((0.5, 0.1, 0.6))
    cached = Prices().of_call(
        "gpt-4o-2024-08-06", {"input_tokens": 200_000, "output_tokens": 0, "input_cache_read": 100_000}
    )
    assert cached is not None
    assert cached.read == pytest.approx(0.25 + 0.125)


@pytest.mark.parametrize("model", ["openai:gpt-4o", "azure_openai:gpt-4o", "google_genai:gemini-2.5-flash", "gpt-4o"])
def test_names_as_langchain_writes_them_are_known(model: str) -> None:
    assert Prices().of_call(model, {"input_tokens": 1, "output_tokens": 1}) is not None


@pytest.mark.parametrize("model", ["", "almanac", "somebody:model-7", "qwen2.5:7b"])
def test_an_unknown_price_is_none_and_not_nothing(model: str) -> None:
    assert Prices().of_call(model, {"input_tokens": 100, "output_tokens": 100}) is None


def test_ones_own_prices_come_first() -> None:
    prices = Prices(models={"gpt-4o": ModelPrice(input=1, output=2, cache_read=0.5)}, tools={"search": 0.005})
    found = prices.of_call("openai:gpt-4o", {"input_tokens": MILLION, "output_tokens": MILLION})
    assert found is not None
    assert found.total == pytest.approx(3.0)
    cached = prices.of_call("gpt-4o", {"input_tokens": MILLION, "input_cache_read": MILLION})
    assert cached is not None
    assert cached.total == pytest.approx(0.5)
    assert (prices.of_tool("search", 1.0), prices.of_tool("other", 0.25)) == (0.005, 0.25)


def test_a_price_file(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text(json.dumps({"models": {"m": {"input": 1, "output": 2}}, "tools": {"s": 0.1}}))
    (tmp_path / "prices.toml").write_text("[models.m]\ninput = 1\noutput = 2\n[tools]\ns = 0.1\n")
    for name in ("prices.json", "prices.toml"):
        prices = Prices.read(tmp_path / name, {"t": 0.2})
        assert prices.models["m"] == ModelPrice(input=1, output=2)
        assert dict(prices.tools) == {"s": 0.1, "t": 0.2}


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "Expecting"), ('{"models": {"m": {"input": -1, "output": 1}}}', "models.m.input"),
     ('{"model": {}}', "model: Extra"), ("[]", "file: ")],
)  # fmt: skip
def test_a_price_file_that_holds_something_else_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="dollars a million tokens") as caught:
        Prices.read(path)
    assert said in str(caught.value)
    with pytest.raises(ConfigurationError, match="can't be used"):
        Prices.read(tmp_path / "none.json")
