"""What holds for a transport holds on both event loops: asyncio's and the one that the gateway runs on."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
