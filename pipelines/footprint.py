"""What memory this process holds that nobody else does: what would be free if it ended."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path


def ram_bytes() -> int:
    """Anonymous memory alone (proc(5): RssAnon). Pages of files, such as torch's libraries, are the kernel's to drop
    and shared with the other stages; the shared memory is Triton's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def gpu_bytes() -> int:
    """What torch holds of all GPUs, in use or not; 0 where it was never asked for one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return sum(int(torch.cuda.memory_reserved(device)) for device in range(torch.cuda.device_count()))


def trim() -> None:
    """Give back what the allocators hold that nobody uses."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc's
        _LIBC.malloc_trim(0)
    if gpu_bytes():
        sys.modules["torch"].cuda.empty_cache()


_LIBC = ctypes.CDLL(None)
