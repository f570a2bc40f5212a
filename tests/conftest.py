"""For all tests: nothing of the developer's own is used."""

import os

from hypothesis import settings

# A key would have the `python` tool run its code at E2B, past pytest-socket, which does not see that client.
os.environ.pop("E2B_API_KEY", None)

# A busy machine is no failure.
settings.register_profile("metis", deadline=None)
settings.load_profile("metis")
