"""Takes the images out of a record and puts them back: what stays in the line is `image:sha256:<hex>`.

Between `schema` and the store. A picture of megabytes that stands in sixteen rollouts of a question, in the question
and in the messages of each, is one file. Read again, the record is what it was, to the byte: whatever block an image
stands in, only its base64 is exchanged, and only where the same base64 comes back. What is no image that the image
store knows by its first bytes stays where it is, broken images too: records are of what was.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable

from metis_agent.recording.images import is_image

__all__ = ["put_back", "set_aside"]

_WORTH = 80
"""Characters from which on an image is set aside: a reference takes as many."""
_PREFIX = rb'"(data:image/[\w.+-]+;base64,)?'
_IMAGE = re.compile(_PREFIX + rb'([A-Za-z0-9+/]{%d,}={0,2})"' % _WORTH)
_MARK = re.compile(_PREFIX + rb'image:(sha256:[0-9a-f]{64})"')


def set_aside(line: bytes, put_image: Callable[[bytes], str]) -> bytes:
    """The line with references in place of its images.

    Args:
        line: A record as JSON.
        put_image: Keeps the bytes of an image and returns `sha256:<hex>`, such as `ImageStore.put_image`.

    Raises:
        StorageError: an image can't be written.
    """

    def kept(found: re.Match[bytes]) -> bytes:
        try:
            content = base64.b64decode(found[2], validate=True)
        except binascii.Error:
            return found[0]
        if not is_image(content) or base64.b64encode(content) != found[2]:
            return found[0]
        return b'"%simage:%s"' % (found[1] or b"", put_image(content).encode())

    return _IMAGE.sub(kept, line) if b"base64" in line else line


def put_back(line: bytes, get_encoded: Callable[[str], bytes | None]) -> bytes:
    """The line with its images again.

    Args:
        line: What `set_aside` returned.
        get_encoded: The base64 of a reference; `None` where the image is gone, and the reference stays.
    """

    def again(found: re.Match[bytes]) -> bytes:
        encoded = get_encoded(found[2].decode())
        return found[0] if encoded is None else b'"%s%s"' % (found[1] or b"", encoded)

    return _MARK.sub(again, line) if b"image:sha256:" in line else line
