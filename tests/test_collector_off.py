"""The collector rests while a stage's process imports, and works when it serves."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc
from pipelines import collector_off, phases
assert not gc.isenabled()
began = phases.Phases(collector_off.end)
began.end("weights")
assert not gc.isenabled()
before = len(gc.get_objects())
began.end("import")
assert gc.isenabled()
assert gc.get_freeze_count() >= before
"""


def test_it_is_off_until_all_is_imported() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60)
