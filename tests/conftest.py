"""What all tests share: how far Hypothesis looks."""

from hypothesis import settings

# `make test` tries the same examples each time, so a red run is the change's doing. `make test-full` looks for new ones
# (--hypothesis-profile=default); what it finds becomes an @example or a test of its own.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
