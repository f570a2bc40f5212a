"""The embedder on a real CLIP model with random weights: it knows nothing, but always the same."""

import json
import sys

import pytest
from PIL import Image

from metis_agent.errors import CheckpointError, MissingDependencyError
from metis_agent.tools.image_search import ImageSearchTool
from metis_agent.tools.search.image_folder import ImageFolder
from metis_agent.tools.search.likeness import ClipEmbedder

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES = {"image_size": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    folder.mkdir()
    letters = "abcdefghijklmnopqr"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=TEXT | {"max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=VISION | SIZES,
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    size = {"shortest_edge": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size={"height": 16, "width": 16})
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_images_and_texts_have_vectors_of_one_length(clip):
    embedder = ClipEmbedder(clip, batch=2)
    assert embedder.name == "tiny-clip"
    images = [Image.new("RGB", (30, 20), colour) for colour in ("red", "blue", "green")]
    vectors = embedder.embed_images(images)
    assert [len(vector) for vector in vectors] == [8, 8, 8]
    assert vectors[2] == pytest.approx(embedder.embed_images([images[2].convert("RGBA")])[0], abs=1e-5)
    assert len(embedder.embed_text("a red car")) == 8
    assert len(embedder.embed_text("far " * 500)) == len(embedder.embed_text("")) == 8
    assert embedder.embed_images([]) == []


def test_a_folder_is_searched_with_it(clip, tmp_path):
    for colour in ("red", "blue", "green"):
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
    embedder = ClipEmbedder(clip)
    folder = ImageFolder.build(tmp_path, embedder=embedder, index=tmp_path / "index.jsonl")
    (hit,) = folder.similar(Image.new("RGB", (20, 20), "blue"), 1)
    assert (hit.source, round(hit.score, 4)) == ("blue.png", 1.0)
    by_meaning = folder.search("something like a car", 3)  # no file is described so
    assert sorted(found.source for found in by_meaning) == ["blue.png", "green.png", "red.png"]
    asked = {"type": "tool_call", "id": "1", "name": "image_search", "args": {"query": "something like a car"}}
    message = ImageSearchTool(words=folder, limit=3).invoke(asked)
    assert [block["type"] for block in message.content].count("image") == 3


def test_a_model_of_another_kind(clip, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="can't be loaded"):
        ClipEmbedder(tmp_path / "nothing")
    config = transformers.CLIPVisionConfig(**VISION, **SIZES)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path / "vision")
    transformers.AutoProcessor.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    with pytest.raises(CheckpointError, match="does not embed images and texts"):
        ClipEmbedder(tmp_path / "vision")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="train"):
        ClipEmbedder(clip)
