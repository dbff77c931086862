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
