from functools import lru_cache

import pytest
from langchain_core.messages import content

from tests.providers.conversations import Bench


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        # LangChain works it out anew for every content block: a tenth of the time of these tests.
        patch.setattr(content, "_get_data_content_block_types", lru_cache(content._get_data_content_block_types))
        bench = Bench()
        yield bench
        bench.close()
