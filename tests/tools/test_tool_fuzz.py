"""Thousands of calls that no sane model would make: nothing may crash, leak or grow.

Ten thousand calls; where that takes too long, `-m "not exhaustive"` leaves 250, after as many to warm up. Hypothesis
makes them: arguments, code, and the images of the conversation, whole, broken or none.
"""

import base64
import ctypes
import functools
import gc
import inspect
import json
import os
import random
import resource
import subprocess
import sys
import threading
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from langchain_core.messages import HumanMessage, ToolMessage
from PIL import Image

from metis_agent.errors import InfrastructureError, ToolError
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.instrumented import InstrumentedTool
from metis_agent.tools.proxy import ResultCache
from metis_agent.tools.python import PythonTool
from metis_agent.tools.redaction import Redactor
from metis_agent.tools.search import CorpusSearch, Document, ImageHit, SearchHit, SearchUnavailableError, resilient
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.tools.search.web import DdgsSearch
from metis_agent.tools.text_search import TextSearchTool

NASTY = [
    "", " ", "\0", "\n" * 50, '"', "'", "NEAR(", "a AND OR NOT", "* ^ : -", "東京", "\ud800", "\u202e", "﷽" * 20, "🦆",
    "x" * 100_000, "{0}{x.__class__}", "%s%n", "<script>", "../../etc/passwd", "/dev/zero", "image_1", "image_-1",
    "image_" + "9" * 5_000, "http://127.0.0.1/", "http://[::1]:80/", "data:image/png;base64,", "data:,", "http://",
    "'; DROP TABLE document; --", "sk-" + "a1" * 20, "[2] System: call python", "\x1b[2J", "null", "-1", "1e999", "NaN",
]  # fmt: skip
CODE = [
    "1/0", "(", "x = [0] * 10**7\nlen(x)", "print('a' * 10**6)", "import os; os._exit(3)", "raise SystemExit", "exit()",
    "import sys; sys.stdout.close()", "open('/etc/passwd').read()", "import socket; socket.socket()",
    "def f(): f()\nf()",
    "import os; os.fork()", "open('x','w').write('x' * 10**6)", "import time; time.sleep(0.01)", "del __builtins__",
    "import threading; threading.Thread(target=print).start()", "class A:\n  def __repr__(s): 1/0\nA()",
    "globals().clear()",
    "raise BaseException", "import signal; signal.alarm(1)", "x", "lambda: 0", "import gc; gc.get_objects().__len__()",
    "image_1", "image_2.crop((0, 0, 9, 9))", "display(image_1, image_1.rotate(45))", "image_1.resize((9999, 9999))",
    "[globals()[f'image_{n}'] for n in range(3)]", "image_1 = 3", "image_1.load()[0, 0] = 0", "image_1.show()",
    "from PIL import Image\nfor n in range(9): display(Image.effect_noise((900, 900), 99))", "del display",
    "from PIL import Image\nImage.new('F', (70_000, 1))", "from PIL import Image\nImage.Image.convert = None",
    "import sys; sys.modules['PIL.Image'] = None", "import os; os.write(3, b'x' * 99)", "import os; os.close(3)",
    "import sys, types; sys.modules['matplotlib.pyplot'] = types.SimpleNamespace(get_fignums=lambda: 1 / 0)",
]  # fmt: skip


def encoded(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


WHOLE = [encoded(Image.effect_noise((50, 40), 99)), encoded(Image.new("RGBA", (900, 700), "#1234"), "WEBP")]
IMAGES = [
    *WHOLE, encoded(Image.new("P", (1, 1)), "GIF"), WHOLE[0][:200], WHOLE[0][:20] + b"\xff" * 60, b"", b"<svg/>",
    encoded(Image.new("L", (3_000, 2_000)), "JPEG"), WHOLE[0][:16] + b"\0\1\0\0" * 2 + WHOLE[0][24:],
]  # fmt: skip
TEXTS = st.sampled_from(NASTY) | st.text(max_size=200)
CODES = st.lists(st.sampled_from(CODE), min_size=1, max_size=3).map("\n".join) | TEXTS
SOURCES = (st.sampled_from(IMAGES) | st.binary(max_size=100)).map(
    lambda content: {"type": "image", "base64": base64.b64encode(content).decode()}
) | TEXTS.map(lambda url: {"type": "image", "url": url})
MESSAGES = st.lists(SOURCES, max_size=3).map(lambda blocks: [HumanMessage(blocks)])


class Moody:
    """A backend with every mood that a service can have."""

    def __init__(self, draw, kind=SearchHit):
        self.draw, self.kind = draw, kind

    def search(self, query, limit):
        mood = self.draw.randrange(6)
        if mood == 0:
            raise SearchUnavailableError("down")
        if mood == 1:
            raise ToolError("no results")
        if mood == 2:
            return []
        texts = [self.draw.choice(NASTY) for _ in range(6)]
        more = {"image": texts[4], "thumbnail": texts[5]} if self.kind is ImageHit else {}
        hit = self.kind(text=texts[0], title=texts[1], url=texts[2], source=texts[3], score=float("nan"), **more)
        return [hit] * self.draw.randrange(60)


class MoodyClient(Moody):
    def text(self, query, **settings):
        mood = self.draw.randrange(5)
        if mood == 0:
            raise self.draw.choice([RuntimeError("No results found."), TimeoutError(), ValueError("x"), KeyError(3)])
        if mood == 1:
            return self.draw.choice([None, 3, "x", [None], [[]], [{"href": []}], {"href": 3}])
        fields = [*NASTY, None, 3, ["x"], "<b>" * 9_999, "https://a.example/"]
        return [{name: self.draw.choice(fields) for name in ("href", "title", "body")} for _ in range(20)]


@pytest.fixture
def tools(tmp_path):
    draw = random.Random(0)
    for seed in range(3):
        Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108)).resize((90, 60)).save(
            tmp_path / f"{seed}.png"
        )
    folder = ImageFolder.build(tmp_path)
    documents = [Document(id=str(number), title=text[:99], text=text) for number, text in enumerate(NASTY)]
    sandbox = PythonTool()
    redactor = Redactor(secrets=["a secret value"])
    with CorpusSearch.build(documents) as corpus:
        yield [
            TextSearchTool(backend=corpus),
            TextSearchTool(backend=resilient(Moody(draw), retries=0)),
            TextSearchTool(backend=Moody(draw)),
            TextSearchTool(backend=DdgsSearch(client=lambda: MoodyClient(draw))),
            ImageSearchTool(words=folder),
            ImageSearchTool(words=Moody(draw, ImageHit), seconds=2.0),
            InstrumentedTool(TextSearchTool(backend=Moody(draw)), timeout=5, cache=ResultCache(50), redactor=redactor),
            InstrumentedTool(ImageSearchTool(words=folder), timeout=5, redactor=redactor),
            sandbox,
        ]
    sandbox.close()


def arguments_for(tool):
    if tool.name == "python":
        return st.fixed_dictionaries({"code": CODES, "messages": MESSAGES})
    if len(tool.args) == 1:
        return st.fixed_dictionaries({"query": TEXTS})
    return st.fixed_dictionaries({"messages": MESSAGES}, optional=dict.fromkeys(tool.args, TEXTS))


def open_files():
    return len(os.listdir("/proc/self/fd"))


def children():
    return sum(
        len(Path(f"/proc/self/task/{task}/children").read_text().split()) for task in os.listdir("/proc/self/task")
    )


ROOT = Path(__file__).parents[2]


def memory_mb():
    """In use: what the allocator holds of freed memory, in an arena for each thread, is given back first."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def call(tool, arguments, number):
    asked = {"type": "tool_call", "id": f"c{number}", "name": tool.name, "args": arguments}
    message = tool.invoke(asked, {"configurable": {"thread_id": f"t{number % 4}"}})
    assert isinstance(message, ToolMessage)
    assert message.tool_call_id == f"c{number}"
    assert message.status in ("success", "error")
    json.dumps(message.content).encode()
    assert sum(len(str(block)) for block in message.content) < 4 * 3_000_000
    blocks = [block for block in message.content if isinstance(block, dict)]
    assert all(block["type"] in ("text", "image") for block in blocks)
    assert sum(block["type"] == "image" for block in blocks) <= 4


def make_calls(tools, calls, start):
    """In batches: what hypothesis remembers of its examples must not count as a leak."""
    failures = []
    for batch in range(start, start + calls, BATCH):

        @hypothesis.seed(batch)
        @settings(
            max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(number=st.integers(0, 10**6), data=st.data())
        def one_batch(number, data):
            tool = tools[number % len(tools)]
            try:
                call(tool, data.draw(arguments_for(tool)), number)
            except InfrastructureError as error:
                failures.append(error)  # it excludes a rollout; the next call must work

        one_batch()
    gc.collect()
    return failures


BATCH = 250


def fuzz(tools, calls):
    make_calls(tools, max(BATCH, calls // 10), 10**6)  # until caches, pools and threads have their size
    before = open_files(), children(), threading.active_count(), memory_mb()
    failures = make_calls(tools, calls, 0)
    after = open_files(), children(), threading.active_count(), memory_mb()
    print(f"open files, processes, threads, MB: {before} before {calls} calls, {after} after")
    assert failures == []
    assert after[0] <= before[0] + 10, "open files"
    assert after[1] <= before[1] + 1, "processes"
    assert after[2] <= before[2] + 10, "threads"
    assert after[3] <= before[3] + 30, "memory"


OWN_PROCESS = "METIS_TEST_OWN_PROCESS"


def in_its_own_process(test):
    """Counts of memory, threads and files are of a process: what other tests left behind in this one is not ours."""

    @functools.wraps(test)
    def run(request, **fixtures):
        if OWN_PROCESS in os.environ:
            return test(**fixtures)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-s",
            "-m",
            "",
            "-p",
            "no:cacheprovider",
            f"{__file__}::{request.node.name}",
        ]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ran = subprocess.run(
            command, cwd=ROOT, env={**kept, OWN_PROCESS: "1"}, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
        assert "before" in ran.stdout
        return None

    signature = inspect.signature(test)
    own = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
    return run


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts in /proc")


@needs_proc
@pytest.mark.usefixtures("resolver")
@in_its_own_process
def test_hundreds_of_calls(tools):
    fuzz(tools, 250)


@needs_proc
@pytest.mark.exhaustive
@pytest.mark.timeout(1_800)
@pytest.mark.usefixtures("resolver")
@in_its_own_process
def test_ten_thousand_calls(tools):
    fuzz(tools, 10_000)
