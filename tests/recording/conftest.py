import uuid

import pytest


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "runs") if request.param == "local" else f"memory://{uuid.uuid4().hex}"
