import pytest

from tests.stores.postgres import postgres_server
from tests.stores.servers import valkey_server


@pytest.fixture(scope="module")
def server():
    """A Valkey for the tests of one file."""
    with valkey_server() as running:
        yield running


@pytest.fixture(scope="module")
def postgres():
    """A PostgreSQL for the tests of one file."""
    with postgres_server() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
async def url(request, tmp_path):
    """Address of a new database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/keys.sqlite"
    return await request.getfixturevalue("postgres").new()
