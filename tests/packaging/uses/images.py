"""A picture is loaded safely, and found by its words and by likeness."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from metis_agent.errors import InputError
from metis_agent.tools.images import load_image
from metis_agent.tools.search.image_folder import ImageFolder

Path("pictures").mkdir()
Image.linear_gradient("L").save("pictures/red_bicycle.png")
buffer = BytesIO()
Image.linear_gradient("L").resize((128, 128)).save(buffer, "JPEG")
same = load_image(buffer.getvalue())
folder = ImageFolder.build("pictures")
assert [hit.source for hit in folder.search("bicycle", 1)] == ["red_bicycle.png"]
assert [hit.source for hit in folder.similar(same, 1)] == ["red_bicycle.png"]
try:
    load_image("http://127.0.0.1/secret.png")
except InputError:
    pass
else:
    raise AssertionError("an address within the network was fetched")
