"""Images go in and come back."""

from __future__ import annotations

from io import BytesIO

import pytest

from metis_agent.tools.sandboxes import E2BSandbox, E2BSession, SandboxLimits

from ..e2b_server import E2BServer

pytest.importorskip("e2b_code_interpreter")
pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


Image = pytest.importorskip("PIL.Image")


def opened(content: bytes):
    return Image.open(BytesIO(content))


def png(colour: str, size: tuple[int, int] = (3, 2)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def test_images_out(session: E2BSession) -> None:
    execution = session.run(
        "from PIL import Image\ndisplay(Image.new('RGB', (8, 4), 'red'))\nImage.new('L', (2, 2), 255)"
    )
    assert [(image.width, image.height, image.mime_type) for image in execution.images] == [
        (8, 4, "image/png"),
        (2, 2, "image/png"),
    ]
    assert opened(execution.images[0].content).getpixel((0, 0)) == (255, 0, 0)
    assert (execution.result, execution.stdout, execution.notes) == (None, "", ())


def test_images_out_that_are_too_many_too_large_or_none(sandbox: E2BSandbox) -> None:
    limits = SandboxLimits(seconds=20, images=2, image_pixels=10_000)
    with sandbox.open(limits) as session:
        many = session.run("from PIL import Image\nfor _ in range(5): display(Image.new('RGB', (200, 100)))")
        assert [(image.width, image.height) for image in many.images] == [(141, 70), (141, 70)]
        assert many.notes == (
            "Image 1 is shown smaller than it is: 141 x 70 instead of 200 x 100 pixels.",
            "Image 2 is shown smaller than it is: 141 x 70 instead of 200 x 100 pixels.",
            "3 more not shown: a call shows at most 2 images.",
        )
        none = session.run("class Fake:\n    def _repr_png_(self): return b'<svg>'\nFake()")
        assert none.images == ()
        assert none.notes[0].startswith("An image can't be shown: ")
        bomb = session.run("display(Image.new('1', (8_000, 8_000)))")
        assert bomb.images == ()
        assert "pixels" in bomb.notes[0]
        assert session.run("1").result == "1"


def test_images_in(server: E2BServer, session: E2BSession) -> None:
    from metis_agent.tools.sandboxes.base import InputImage

    def uploads() -> int:
        return server.requests.count(("POST", "/files"))

    images = {"image_1": InputImage(source=png("red")), "image_2": InputImage(source=png("blue"))}
    code = "image_1.size, image_1.getpixel((0, 0)), image_2.getpixel((0, 0))"
    assert session.run(code, images=images).result == "((3, 2), (255, 0, 0), (0, 0, 255))"
    assert uploads() == 2
    assert session.run(code, images=images).ok
    assert uploads() == 2
    changed = images | {"image_2": InputImage(source=png("lime"))}
    assert session.run("image_2.getpixel((0, 0))", images=changed).result == "(0, 255, 0)"
    assert uploads() == 3
    session.run("while True: pass", timeout=0.3)
    assert session.run(code, images=images).ok
    broken = session.run("image_3", images={"image_3": InputImage(source=b"nothing")})
    assert "NameError" in broken.traceback
    assert broken.notes[0].startswith("image_3 is not there: ")


def test_an_image_that_is_shown_came_from_png(session: E2BSession) -> None:
    from metis_agent.tools.sandboxes.base import InputImage

    shown = session.run("image_1.resize((6, 4))", images={"image_1": InputImage(source=png("red"))}).images[0]
    assert opened(shown.content).size == (6, 4)
