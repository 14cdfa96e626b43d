"""How this process keeps memory on a CPU: settings of the C library's allocator, made once at the start.

Each step of training allocates the same few gigabytes again. By default glibc gives large blocks back to the system as
they are freed, and gets them anew, page by page. And what autograd's thread frees cannot be used by the main thread.
"""

import ctypes
import os
import sys

ARENA_MAX, TRIM_THRESHOLD, MMAP_THRESHOLD = -8, -1, -3  # options of mallopt(3)
LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let all threads share one heap, which keeps what is freed. Only with glibc; before threads are started."""
    # oneDNN keeps code and scratch memory for the last 1024 shapes that it multiplied, hundreds of MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # musl has none
        for option, value in ((ARENA_MAX, 1), (TRIM_THRESHOLD, LARGEST), (MMAP_THRESHOLD, 2**30)):
            mallopt(option, value)
