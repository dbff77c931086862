"""What all tests share: how far Hypothesis looks, and a log as it was."""

import pytest
import structlog
from hypothesis import HealthCheck, settings

from tests.tools import keep_files_in_memory

# How long an example takes says how busy the machine is.
untimed = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
# `make test` tries the same examples each time, so a red run is the change's doing. `make test-full` looks for new ones
# (--hypothesis-profile=new); what it finds becomes an @example or a test of its own.
settings.register_profile("repeatable", derandomize=True, **untimed)
settings.register_profile("new", **untimed)
settings.load_profile("repeatable")


def pytest_configure(config):
    if config.option.markexpr != "deploy":  # whose images and machines are large
        keep_files_in_memory()


@pytest.fixture(autouse=True)
def _unchanged_log():
    """A gateway in this process may have set it up."""
    yield
    structlog.reset_defaults()
