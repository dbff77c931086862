"""A plugin that does next to nothing in five hooks, as one more of somebody's own: what a plugin costs by being there."""

from gateway import hookimpl


class Plugin:
    def __init__(self, config, services):
        self.seen = 0

    @hookimpl
    async def request_received(self, exchange):
        self.seen += 1

    @hookimpl
    async def check_request(self, exchange):
        self.seen += 1

    @hookimpl
    def attempt_finished(self, exchange, attempt):
        self.seen += 1

    @hookimpl
    def response_started(self, exchange):
        self.seen += 1

    @hookimpl
    async def request_finished(self, exchange):
        self.seen += 1
