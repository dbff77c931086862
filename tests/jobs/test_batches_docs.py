"""What the README says of files and batches."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import gateway_plugins.jobs
from gateway.kit.testing import Gateway
from tests.clients.process import plain_environment
from tests.jobs.inline import Inline
from tests.jobs.test_files_api import KEYS

README = (Path(gateway_plugins.jobs.__file__).parent / "README.md").read_text()
[EXAMPLE] = re.findall(r"```python\n(.*?)```", README.partition("## Batches")[2].partition("\n## ")[0], re.DOTALL)


async def test_the_example_works_as_pasted():
    """It prints both answers under their names."""

    async with Gateway.test(plugins=[KEYS, Inline]) as gw:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", EXAMPLE],
            env={**plain_environment(), "XENIOS_URL": gw.url, "XENIOS_KEY": gw.key},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed 2 of 2\n")
    assert sorted(line.split()[0] for line in done.stdout.splitlines()[1:]) == ["capital", "colour"]
