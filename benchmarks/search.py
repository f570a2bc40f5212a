"""Measures search: building and asking the embedded index, the image folder, the wrappers, the tool wrapper.

Run `python benchmarks/search.py [--documents 100000] [--queries 300] [--images 200]`; prints JSON. Documents have
words with the frequencies of natural text (Zipf) and about 400 characters each. Milliseconds are medians.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from langchain_core.tools import tool

from metis_agent.errors import MissingDependencyError
from metis_agent.tools.images import load_image, thumbnail
from metis_agent.tools.instrumented import InstrumentedTool
from metis_agent.tools.proxy import ResultCache
from metis_agent.tools.redaction import Redactor
from metis_agent.tools.search import CorpusSearch, Document, SearchHit, resilient
from metis_agent.tools.search.corpus import TantivySearch
from metis_agent.tools.search.image_folder import ImageFolder

__all__ = ["main"]

_WORDS = 50_000
_CHINESE = "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生"


def measure_corpus(size: int, queries: int, folder: Path) -> dict[str, float]:
    """Time to build an index in memory and in a file, to open it again, and to ask it."""
    documents = list(_documents(size))
    figures: dict[str, float] = {"documents": size, "megabytes": round(sum(len(d.text) for d in documents) / 1e6, 1)}
    began = time.perf_counter()
    CorpusSearch.build(documents).close()
    figures["build_in_memory_s"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    CorpusSearch.build(documents, index=folder / "index").close()
    figures["build_in_file_s"] = round(time.perf_counter() - began, 2)
    began = time.perf_counter()
    with CorpusSearch.build(documents, index=folder / "index") as corpus:
        figures["open_again_s"] = round(time.perf_counter() - began, 2)
        draw = random.Random(1)
        asked = [" ".join(_words(draw, draw.randint(1, 6))) for _ in range(queries)]
        times = [_seconds(lambda query=query: corpus.search(query, 5)) for query in asked]
        figures["query_ms_p50"] = _ms(statistics.median(times))
        figures["query_ms_p95"] = _ms(sorted(times)[int(0.95 * len(times))])
        chinese = ["".join(draw.choices(_CHINESE, k=4)) for _ in range(queries)]
        figures["chinese_query_ms_p50"] = _median(chinese, lambda query: corpus.search(query, 5))
    return figures


def measure_tantivy(size: int, queries: int) -> dict[str, float] | None:
    """The same with the faster engine; `None` where it is not installed."""
    documents = list(_documents(size))
    try:
        began = time.perf_counter()
        search = TantivySearch.build(documents)
    except MissingDependencyError:
        return None
    built, draw = time.perf_counter() - began, random.Random(1)
    asked = [" ".join(_words(draw, draw.randint(1, 6))) for _ in range(queries)]
    return {"build_in_memory_s": round(built, 2), "query_ms_p50": _median(asked, lambda query: search.search(query, 5))}


def measure_images(size: int, folder: Path) -> dict[str, float]:
    """Time to index a folder of 1-megapixel photos, to open it again, and to ask it both ways."""
    from PIL import Image

    for number in range(size):
        small = Image.frombytes("RGB", (8, 8), random.Random(number).randbytes(192))
        small.resize((1200, 900), Image.Resampling.BICUBIC).save(folder / f"photo_{number}.jpg")
    index = folder / "index.jsonl"
    began = time.perf_counter()
    found = ImageFolder.build(folder, index=index)
    built = time.perf_counter() - began
    began = time.perf_counter()
    found = ImageFolder.build(folder, index=index)
    again = time.perf_counter() - began
    image = load_image(folder / "photo_1.jpg")
    content = (folder / "photo_1.jpg").read_bytes()
    uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    return {
        "images": size,
        "index_ms_per_image": _ms(built / size),
        "open_again_ms_per_image": _ms(again / size),
        "by_words_ms_p50": _median(range(20), lambda number: found.search(f"photo {number}", 1)),
        "by_image_ms_p50": _median(range(20), lambda _: found.similar(image, 1)),
        "load_data_uri_ms_p50": _median(range(20), lambda _: load_image(uri)),
        "thumbnail_ms_p50": _median(range(20), lambda _: thumbnail(image)),
    }


def measure_wrappers(rounds: int) -> dict[str, float]:
    """What deadline, retries, breaker and cache add to a search, and metering to a tool, in microseconds."""

    class Instant:
        def search(self, query: str, limit: int) -> list[SearchHit]:
            return []

    @tool
    def instant(number: int) -> str:
        """Answer at once."""
        return "x"

    search = resilient(Instant())
    plain = _per_call(rounds, lambda number: instant.invoke({"number": number}))
    timed = InstrumentedTool(instant, timeout=10)
    full = InstrumentedTool(instant, timeout=10, cache=ResultCache(), redactor=Redactor())
    full.invoke({"number": -1})
    return {
        "resilient_search_us": _per_call(rounds, lambda number: search.search(str(number), 5)),
        "cached_search_us": _per_call(rounds, lambda _: search.search("0", 5)),
        "bare_tool_us": plain,
        "metered_tool_us": _per_call(rounds, lambda number: timed.invoke({"number": number})),
        "metered_cached_tool_us": _per_call(rounds, lambda _: full.invoke({"number": -1})),
    }


def measure_deadline(seconds: float = 0.5) -> dict[str, float]:
    """How late an answer is when the backend never answers."""

    class Hangs:
        def search(self, query: str, limit: int) -> list[SearchHit]:
            time.sleep(30)
            return []

    search = resilient(Hangs(), seconds=seconds)

    def ask() -> None:
        with suppress(RuntimeError):
            search.search("x", 5)

    return {"deadline_s": seconds, "answered_after_s": round(max(_seconds(ask) for _ in range(3)), 3)}


def _documents(size: int) -> Iterator[Document]:
    draw = random.Random(0)
    for number in range(size):
        words = _words(draw, 80)
        text = " ".join(words) + ("".join(draw.choices(_CHINESE, k=30)) if number % 20 == 0 else "")
        yield Document(id=str(number), title=" ".join(words[:4]), text=text)


def _words(draw: random.Random, count: int) -> list[str]:
    # Zipf by inversion: the rank of a word is log-uniform.
    return [f"w{int(_WORDS ** draw.random())}" for _ in range(count)]


def _per_call(rounds: int, call: Callable[[int], Any]) -> float:
    return round(statistics.median(_seconds(lambda number=number: call(number)) for number in range(rounds)) * 1e6, 1)


def _median(values: Any, call: Callable[[Any], Any]) -> float:
    return _ms(statistics.median(_seconds(lambda value=value: call(value)) for value in values))


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--images", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as photos:
        figures = {
            "corpus": measure_corpus(arguments.documents, arguments.queries, Path(folder)),
            "tantivy": measure_tantivy(arguments.documents, arguments.queries),
            "images": measure_images(arguments.images, Path(photos)),
            "wrappers": measure_wrappers(1_000),
            "deadline": measure_deadline(),
        }
    load = round(os.getloadavg()[0], 2)
    print(json.dumps({"cores": os.cpu_count(), "load_average": load, **figures}, indent=2))


if __name__ == "__main__":
    main()
