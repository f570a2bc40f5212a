"""For all tests: nothing of the developer's own is used."""

import os

# A key would have the `python` tool run its code at E2B, past pytest-socket, which does not see that client.
os.environ.pop("E2B_API_KEY", None)
