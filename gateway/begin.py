"""How a process of ours begins: `xenios`, and by `python -m gateway.begin MODULE` those that it starts.

Before anything large is imported: an import makes many objects, nearly all of which stay.
"""

import gc
import sys
from importlib import import_module

# Looked through after each 700 new objects, which is Python's habit, they cost a sixth of the start. Before requests
# come, `Worker.running` collects all once; those make few cycles, mostly where they fail, and a kilobyte each.
GC_STARTING = (20_000, 20, 50)
GC_SERVING = (4_000, 10, 10)


def begin() -> None:
    """Call it first."""
    gc.set_threshold(*GC_STARTING)


if __name__ == "__main__":
    begin()
    sys.exit(import_module(sys.argv[1]).main())
