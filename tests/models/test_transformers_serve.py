"""An agent with three tools in front of a real `transformers serve`, on a tiny Qwen3-VL with random weights.

Nothing is scripted: the model writes noise, as it sees pictures and results of its own calls. What is tested is that a
run ends, whatever is written, that the record has it, and that what goes wrong at the server says so.
"""

from __future__ import annotations

import base64
import io
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.messages import HumanMessage
from PIL import Image

from metis_agent.agent import create_metis_agent
from metis_agent.errors import InfrastructureError, InputError
from metis_agent.gates.reference import AlwaysGate, ModelGate, NeverGate
from metis_agent.models.served import ServedChatModel
from metis_agent.recording.recorder import Recorder
from metis_agent.recording.store import TrajectoryStore
from metis_agent.rules.budget import Budget
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.python import PythonTool
from metis_agent.tools.search import CorpusSearch, Document
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.tools.text_search import TextSearchTool
from metis_agent.worlds.gallery.cold_start import build_model
from metis_agent.worlds.gallery.tokens import build_processor
from tests.servers import wait_for

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.timeout(600)]

# As Qwen3-VL's: tools in the system turn, content as text or blocks, results as a turn of their own.
TEMPLATE = (
    "{%- if tools -%}{{- '<|system|>' + (tools | tojson) + '<|end|>' -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for block in message.content -%}"
    "{%- if block.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- block.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' -}}{%- endfor -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# The stock processor of a Qwen3-VL needs torchvision; the rest is transformers' own command.
SERVE = (
    "import sys; from transformers import AutoProcessor, Qwen3VLConfig; "
    "from metis_agent.models.checkpoint import StillsProcessor; "
    "AutoProcessor.register(Qwen3VLConfig, StillsProcessor, exist_ok=True); "
    "from transformers.cli.transformers import main; sys.exit(main())"
)


@dataclass(frozen=True, kw_only=True)
class Served:
    url: str
    model: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served") / "tiny-qwen3-vl"
    torch.manual_seed(0)
    processor = build_processor()
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    model = build_model(processor)
    model.generation_config.do_sample = True
    # A placeholder for an image that is not there could not be read back.
    placeholders = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = [processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in placeholders]
    model.generation_config.suppress_tokens = ids
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "serve", str(folder), "--device", "cpu", "--host", "127.0.0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = folder.parent / "log"
    with log.open("wb") as output:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=output, stderr=output)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield Served(url=f"http://127.0.0.1:{port}/v1", model=str(folder))
    finally:
        server.kill()
        server.wait()


def chat_on(served: Served, **options: Any) -> ServedChatModel:
    settings = {"temperature": 1.0, "max_tokens": 24, "max_retries": 0, "seed": 7, **options}
    return ServedChatModel(base_url=served.url, model=served.model, **settings)


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    pictures = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        (pictures / f"sign {number}.png").write_bytes(picture(number))
    texts = CorpusSearch.build([Document(id="1", title="Signs", text="A sign shows a number.")])
    python = PythonTool()
    yield [python, TextSearchTool(backend=texts), ImageSearchTool(likeness=ImageFolder.build(pictures))]
    python.close()


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(seed).randbytes(64 * 64 * 3)).save(file, "PNG")
    return file.getvalue()


def question(seed: int) -> dict[str, Any]:
    data = base64.b64encode(picture(seed)).decode()
    image = {"type": "image", "base64": data, "mime_type": "image/png"}
    return {"messages": [HumanMessage([image, {"type": "text", "text": "What does the sign say?"}])]}


@pytest.mark.parametrize("wire", ["template", "metis"])
@pytest.mark.parametrize("gate", [ModelGate(), AlwaysGate(), NeverGate()], ids=lambda gate: type(gate).__name__)
def test_a_run_ends_within_its_budget_and_is_recorded(
    served: Served, tools: list[Any], tmp_path: Path, wire: Any, gate: Any
) -> None:
    store = TrajectoryStore(tmp_path)
    agent = create_metis_agent(
        chat_on(served, wire=wire), tools, gate=gate, budget=Budget(calls=2), recorder=Recorder(store)
    )
    ended = failed = 0
    for seed in range(2):
        try:
            state = agent.invoke(question(seed))
        except InfrastructureError:
            failed += 1  # the server's own parser gives up on a call that is no JSON
        else:
            ended += 1
            assert state["messages"][-1].content
            assert sum(outcome.executed for outcome in state["outcomes"]) <= 2
    runs = list(store.read())
    assert [run.status for run in runs].count("finished") == ended
    assert [run.status for run in runs].count("failed") == failed
    assert all(run.calls[0].usage["output_tokens"] <= 24 for run in runs if run.calls)
    assert ended >= 1


def test_the_server_sees_the_picture(served: Served) -> None:
    chat = chat_on(served)
    with_image = chat.invoke(question(0)["messages"])
    without = chat.invoke([HumanMessage("What does the sign say?")])
    assert with_image.usage_metadata is not None
    assert without.usage_metadata is not None
    # 64 x 64 pixels in patches of 8, four of them a token, and what stands around them.
    assert with_image.usage_metadata["input_tokens"] - without.usage_metadata["input_tokens"] == 16 + 2
    assert chat.invoke(question(0)["messages"]).content == with_image.content  # the seed is passed on


async def test_what_the_server_refuses_or_can_not_do_says_so(served: Served) -> None:
    with pytest.raises(InputError, match="refused the request"):
        chat_on(served, extra_body={"no_such_field": 1}).invoke("hi")
    with pytest.raises(InputError, match="refused the request"):
        ServedChatModel(base_url=served.url, model="another", max_retries=0).invoke("hi")
    gone = ServedChatModel(base_url="http://127.0.0.1:9/v1", model="x", max_retries=0)
    with pytest.raises(InfrastructureError, match="Is it up"):
        await gone.ainvoke("hi")
