import pytest

from tests.stores.servers import emptied, valkey_server


@pytest.fixture(scope="module")
def server():
    """A Valkey for the tests of one file."""
    with valkey_server() as running:
        yield running


@pytest.fixture
async def url(server):
    """The address of one that is empty."""
    return await emptied(server)
