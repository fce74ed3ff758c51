"""A process that compiles (`compiled_build`), as it is started: `python -m pipelines.engine.compiled_child FOLDER`.

Whoever starts it keeps its standard input open: when that ends, so does this with the compilers it runs, from the first
moment on. What compiles takes seconds to import.
"""

from __future__ import annotations

import os
import signal
import threading


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(19)
    from pipelines.engine import compiled_build

    compiled_build.main()


def _end_with_parent() -> None:
    """The compilers are in this process's group."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
