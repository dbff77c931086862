"""A plugin that works in a process of its own: its command says what it does in a file, line by line."""

import gc
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from gateway import hookimpl
from gateway.settings import Loaded


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    embedded: bool = False
    arguments: list[str] = []
    word: str = "first"
    diary: Path = Path("diary")


class Plugin:
    """Counts what its command does and how many configurations its process holds, and writes it down."""

    Config = Config
    reads_settings = ()
    companion = staticmethod(lambda config: ["beside", *config.arguments] if config.embedded else None)

    def __init__(self, config, services):
        self.config = config
        self.services = services
        self.counted = services.metrics.counter("xenios_beside_total", "What the command did.")

    @hookimpl
    def register_commands(self, cli):
        @cli.command("beside")
        def beside(processes: int = 1, fail: bool = False) -> None:
            async def run(plugin, stop):
                if fail:
                    raise RuntimeError("as asked")
                await plugin.work(stop)

            self.headless(run, processes=processes)

    async def work(self, stop):
        self.say("works")
        self.counted.add(1)
        gc.collect()
        with self.config.diary.with_name("configurations").open("a") as file:
            file.write(f"{sum(type(each) is Loaded for each in gc.get_objects())}\n")
        await stop.wait()
        self.say("ends")

    def say(self, what):
        redis = "redis" if self.services.redis is not None else "no redis"
        with self.config.diary.open("a") as file:
            file.write(f"{what} {self.config.word} {os.getpid()} {self.services.serves} {redis}\n")
