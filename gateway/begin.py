"""How a process of ours begins: `xenios`, and by `python -m gateway.begin MODULE` those that it starts.

Before anything large is imported: an import makes many objects, nearly all of which stay.
"""

import gc
import sys
from importlib import import_module

# Looked through after each 700 new objects, which is Python's habit, they cost a sixth of the start; and requests make
# few cycles. Before requests come, `Worker.running` collects all once.
GC_THRESHOLD = (20_000, 20, 50)


def begin() -> None:
    """Call it first."""
    gc.set_threshold(*GC_THRESHOLD)


if __name__ == "__main__":
    begin()
    sys.exit(import_module(sys.argv[1]).main())
