"""One image for all tests that need it: building it takes a minute or two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.deploy.image import Image, built
from tests.integration.process import REPOSITORY

CANARY = "canary-4f1c9a7d"
"""In files of the working copy that must not get into the image."""


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """Built from a working copy that somebody has worked in: with secrets, an environment, rests of tests."""
    copy = tmp_path_factory.mktemp("image") / "xenios"
    foreign = shutil.ignore_patterns(".git", ".venv*", "node_modules", "__pycache__", "mutants", ".*_cache")
    shutil.copytree(REPOSITORY, copy, ignore=foreign)
    for name in (
        "config/xenios.local.yaml",
        "deploy/secrets/openrouter_api_key",
        ".env",
        "gateway/.env",
        ".xenios/pepper",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(CANARY)
    with built(copy) as image:
        yield image
    shutil.rmtree(copy)
