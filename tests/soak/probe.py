"""A plugin that tells what its process holds once it has collected its garbage."""

import asyncio
import gc
import os
import sys
from collections import Counter
from pathlib import Path

from gateway import Reply, hookimpl


class Plugin:
    def __init__(self, config, services): ...

    @hookimpl
    def register_routes(self, router):
        router.add("GET", "/soak", self.held, access="public", body="none")

    async def held(self, exchange):
        gc.collect()
        kinds = Counter(type(each).__qualname__ for each in gc.get_objects())
        data = {
            "blocks": sys.getallocatedblocks(),
            "objects": kinds.total(),
            "tasks": len(asyncio.all_tasks()),
            "files": sum(1 for _ in Path("/dev/fd").iterdir()),
            "memory": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE"),
            "kinds": dict(kinds.most_common(40)),
        }
        return Reply(200, data=data)
