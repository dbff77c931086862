"""Plugins that must not start, for ten_mistakes.yaml."""

from __future__ import annotations

from gateway import hookimpl


class Misspelt:
    def __init__(self, config, services):
        pass

    @hookimpl
    async def chek_request(self, exchange):
        pass


class Blocking:
    def __init__(self, config, services):
        pass

    @hookimpl
    def check_request(self, exchange):
        pass
