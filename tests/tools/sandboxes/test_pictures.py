"""Images into a session and out of it, in every local backend, and where nothing contains."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image

from metis_agent.errors import MissingDependencyError
from metis_agent.tools.images import ImageRules, load_image
from metis_agent.tools.sandboxes import Execution, Sandbox, SandboxLimits, SandboxSession, base
from metis_agent.tools.sandboxes.base import InputImage, encode_image
from metis_agent.tools.sandboxes.inside.pictures import flat_pixels
from metis_agent.tools.sandboxes.inside.wire import LONGEST_SIDE
from metis_agent.tools.sandboxes.template import DEFAULT_PACKAGES


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (31, 15), seed: int = 0) -> Image.Image:
    pixels = random.Random(seed).randbytes(len(Image.new(mode, size).tobytes()))
    return Image.frombytes(mode, size, pixels)


def given(image: Image.Image) -> InputImage:
    return InputImage(source=file_of(image))


def shown(execution: Execution) -> list[tuple[int, int]]:
    """Sizes, each checked to be those of the file."""
    sizes = [load_image(image.content).size for image in execution.images]
    assert sizes == [(image.width, image.height) for image in execution.images]
    return sizes


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_image_arrives_as_it_is(session: SandboxSession, mode: str) -> None:
    image = noise(mode)
    code = "import PIL.Image\nassert type(image_1) is PIL.Image.Image\nprint(image_1.mode, image_1.size)\n"
    execution = session.run(code + "image_1.tobytes().hex()", images={"image_1": given(image)})
    assert (execution.stdout, execution.result) == (f"{mode} (31, 15)\n", repr(image.tobytes().hex()))
    assert execution.notes == ()


def test_it_is_sent_once_to_each_process(session: SandboxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = InputImage.load
    monkeypatch.setattr(InputImage, "load", lambda self, *rest: loaded.append(self) or load(self, *rest))
    one, other = {"image_1": given(noise())}, {"image_1": given(noise(size=(5, 5)))}
    assert session.run("image_1.size", images=one).result == "(31, 15)"
    assert session.run("image_1 = image_1.crop((0, 0, 9, 9))", images=one).ok
    assert session.run("image_1.size", images=one).result == "(9, 9)"
    assert len(loaded) == 1
    assert session.run("image_1.size", images=other).result == "(5, 5)"
    assert session.run("while True: pass", timeout=0.2).status == "timeout"
    assert session.run("image_1.size", images=other).result == "(5, 5)"
    assert len(loaded) == 3


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_1 is not there: the image is an SVG"),
        (b"", "0 bytes"),
        (file_of(noise())[:60], "can't be read"),
        ("file:///etc/passwd", "is no image"),
        ("data:image/png;base64,x", "base64"),
        (file_of(Image.new("RGB", (400, 400))), "at most 1,000"),
    ],
)
def test_one_that_can_not_be_used_is_said_so(session: SandboxSession, source: str | bytes, said: str) -> None:
    image = InputImage(source=source, rules=ImageRules(max_pixels=1_000))
    execution = session.run("print('runs')\nimage_1", images={"image_1": image})
    assert (execution.status, execution.stdout) == ("error", "runs\n")
    assert "NameError" in execution.traceback
    assert said in execution.notes[0]
    assert session.run("1 + 1", images={"image_1": image}).result == "2"


def test_more_than_fits_into_memory(sandbox: Sandbox) -> None:
    large = {"image_1": given(Image.new("RGB", (4_000, 3_000)))}
    with sandbox.open(SandboxLimits(memory_mb=24)) as session:
        execution = session.run("image_1.size", 60, large)
        assert "fit" in execution.notes[0]
        assert "NameError" in execution.traceback
        assert session.run("image_1", 60, large).notes == execution.notes
        assert session.run("40 + 2").result == "42"
        assert session.run("image_2.size", images={"image_2": given(noise())}).result == "(31, 15)"


def test_without_pillow_inside(session: SandboxSession) -> None:
    session.run("import sys\nsys.modules['PIL'] = sys.modules['PIL.Image'] = None")
    execution = session.run("image_1", images={"image_1": given(noise())})
    assert execution.notes == ("image_1 is not there: Pillow is not installed where this code runs.",)
    assert session.run("1 + 1").notes == ()


def test_without_pillow_outside(session: SandboxSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> object:
        raise MissingDependencyError("images need Pillow")

    monkeypatch.setattr("metis_agent.tools.sandboxes.session.encode_pixels", missing)
    execution = session.run("from PIL import Image\nImage.new('RGB', (4, 4))")
    assert (execution.status, execution.images) == ("ok", ())
    assert execution.notes == ("An image can't be shown: images need Pillow",)


SETUP = "from PIL import Image\nred, blue = (Image.new('RGB', (8, n), c) for n, c in ((4, 'red'), (6, 'blue')))\n"


@pytest.mark.parametrize(
    ("code", "sizes"),
    [
        ("red", [(8, 4)]),
        ("display(red)\nblue.show()\nred", [(8, 4), (8, 6), (8, 4)]),
        ("display(red, 'text', 3, blue)", [(8, 4), (8, 6)]),
        ("red\n1 / 0", []),
        ("display(red)\n1 / 0", [(8, 4)]),
        ("None", []),
    ],
)
def test_what_is_shown(session: SandboxSession, code: str, sizes: list[tuple[int, int]]) -> None:
    execution = session.run(SETUP + code)
    assert shown(execution) == sizes
    assert execution.result is None
    assert execution.stdout == ("text\n3\n" if "text" in code else "")


def test_a_list_of_images_is_a_list(session: SandboxSession) -> None:
    execution = session.run(SETUP + "[red]")
    assert execution.images == ()
    assert "size=8x4" in str(execution.result)


def test_where_nothing_contains_it_is_the_same(unsafe_session: SandboxSession) -> None:
    image = given(noise())
    execution = unsafe_session.run("display(image_1)\nimage_1.size", images={"image_1": image})
    assert execution.result == "(31, 15)"
    assert shown(execution) == [(31, 15)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_any_mode_is_shown(session: SandboxSession, mode: str) -> None:
    execution = session.run(f"from PIL import Image\nImage.new({mode!r}, (7, 5))")
    assert shown(execution) == [(7, 5)], execution


def test_colours_are_kept_and_what_shows_through_is_white(session: SandboxSession) -> None:
    code = (
        "from PIL import Image\nimage = Image.new('RGBA', (2, 1), (10, 20, 30, 255))\nimage.putpixel((1, 0), (0,) * 4)"
    )
    (image,) = session.run(f"{code}\nimage").images
    assert image.mime_type == "image/png"
    pixels = load_image(image.content)
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (255, 255, 255)]


def test_sixteen_bits_of_grey_are_scaled(session: SandboxSession) -> None:
    (image,) = session.run("from PIL import Image\nImage.new('I;16', (2, 2), 32_768)").images
    assert load_image(image.content).getpixel((0, 0)) == (128, 128, 128)


def test_too_many_and_too_large(sandbox: Sandbox) -> None:
    with sandbox.open(SandboxLimits(images=2, image_pixels=10_000)) as session:
        execution = session.run(SETUP + "for _ in range(5): display(red)")
        assert shown(execution) == [(8, 4)] * 2
        assert execution.notes == ("3 more not shown: a call shows at most 2 images.",)
        execution = session.run("Image.new('RGB', (400, 100))")
        assert shown(execution) == [(200, 50)]
        assert execution.notes == ("Image 1 is shown smaller than it is: 200 x 50 instead of 400 x 100 pixels.",)
        assert shown(session.run("Image.new('RGB', (20_000, 1))")) == [(LONGEST_SIDE, 1)]
    with sandbox.open(SandboxLimits(images=0)) as session:
        execution = session.run(SETUP + "red")
        assert (execution.images, execution.result) == ((), None)
        assert "at most 0 images" in execution.notes[0]


def test_one_that_can_not_be_shown(session: SandboxSession) -> None:
    execution = session.run("from PIL import Image\nImage.new('RGB', (0, 5))")
    assert (execution.status, execution.images) == ("ok", ())
    assert "An image can't be shown" in execution.notes[0]
    hostile = "class Bad(Image.Image):\n    size = (5, 5)\n    def convert(self, *_): raise SystemExit\nBad()"
    execution = session.run(hostile)
    assert "An image can't be shown" in execution.notes[0]
    assert session.run("40 + 2").result == "42"


FIGURES = """
import matplotlib.pyplot as plt
plt.figure(figsize=(2, 1), dpi=50)
plt.plot([1, 2])
plt.show()
figure, axes = plt.subplots(figsize=(1, 2), dpi=50)
axes.bar([1], [1])
plt.figure()
plt.figure(figsize=(3, 1), dpi=50).text(0.5, 0.5, "words only")
len(plt.get_fignums())
"""


@pytest.fixture(scope="module")
def drawing(sandbox: Sandbox) -> Iterator[SandboxSession]:
    """One session for all that needs matplotlib: importing it takes a while."""
    pytest.importorskip("matplotlib")
    with sandbox.open(SandboxLimits(seconds=60)) as session:
        yield session


SLOW = "Matplotlib is building the font cache; this may take a moment.\n"


def test_figures(drawing: SandboxSession) -> None:
    execution = drawing.run(FIGURES)
    assert shown(execution) == [(100, 50), (50, 100), (150, 50)], execution
    assert (execution.result, execution.stderr.replace(SLOW, "")) == ("3", "")
    # All were shown, and are closed, but stay what they are.
    assert shown(drawing.run("plt.get_fignums()")) == []
    execution = drawing.run("axes.plot([1, 2])\nfigure")
    assert shown(execution) == [(50, 100)]
    assert execution.result is None


def test_matplotlib_can_be_loaded_beforehand(sandbox: Sandbox) -> None:
    pytest.importorskip("matplotlib")
    packages = (*DEFAULT_PACKAGES, "matplotlib.pyplot", "no_such_package")
    with type(sandbox)(packages=packages) as warm, warm.open() as session:  # type: ignore[call-arg]
        code = "import sys\nprint('matplotlib' in sys.modules)\nimport matplotlib.pyplot as plt\n"
        execution = session.run(f"{code}plt.plot([1, 2])\nplt.show()", timeout=60)
        assert execution.stdout == "True\n"
        assert shown(execution) == [(640, 480)]


def test_a_figure_is_drawn(drawing: SandboxSession) -> None:
    code = (
        "import matplotlib.pyplot as plt\nf = plt.figure(figsize=(1, 1), dpi=40, facecolor='red')\nf.text(0, 0, '')\nf"
    )
    (image,) = drawing.run(code).images
    assert load_image(image.content).getpixel((20, 20)) == (255, 0, 0)


def test_figures_that_can_not_be_drawn(drawing: SandboxSession) -> None:
    execution = drawing.run("import matplotlib.pyplot as plt\nplt.title('$\\\\nonsense{$')")
    assert (execution.status, execution.images) == ("ok", ())
    assert "An image can't be shown" in execution.notes[0]
    execution = drawing.run("plt.figure(figsize=(900, 900), dpi=300).gca()\nNone")
    assert (execution.status, execution.images) == ("ok", ())
    assert "An image can't be shown" in execution.notes[0]
    execution = drawing.run("plt.get_fignums = None\n40 + 2")
    assert execution.result == "42"


def test_a_file_has_its_limit() -> None:
    photo = encode_image(noise(size=(1_000, 900)))
    assert photo.mime_type == "image/jpeg"
    assert len(photo.content) <= 2_000_000
    huge = encode_image(noise(size=(4_000, 3_500)))
    assert len(huge.content) <= 2_000_000
    assert load_image(huge.content).size == (huge.width, huge.height) == (2_000, 1_750)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match="langgraph-metis"):
        base.encode_pixels(1, 1, b"abc")


def test_the_source_is_not_in_messages() -> None:
    assert base64.b64encode(b"x" * 30).decode() not in repr(InputImage(source="eHh4" * 10))


@pytest.mark.parametrize("size", [(1, 1), (10, 4_000_000), (3_000, 2_000)])
def test_shrinking_keeps_the_limits(size: tuple[int, int]) -> None:
    width, height, pixels = flat_pixels(Image.new("L", size), 2_000_000)
    assert width * height <= 2_000_000
    assert max(width, height) <= LONGEST_SIDE
    assert len(pixels) == 3 * width * height
