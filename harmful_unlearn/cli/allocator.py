"""How this process keeps memory on a CPU: settings of the C library's allocator, made once at the start.

Each step of training allocates the same few gigabytes again. By default glibc gives large blocks back to the system as
they are freed, and gets them anew, page by page. And what autograd's thread frees cannot be used by the main thread.
"""

import ctypes
import os
import sys

ARENA_MAX, TRIM_THRESHOLD, MMAP_THRESHOLD = -8, -1, -3  # options of mallopt(3)
NEVER = 2**31 - 1
# Larger blocks, such as a gradient of the embeddings, are not part of the heap, where few holes would fit them.
OF_ITS_OWN = 32 * 2**20


def keep_freed_memory() -> None:
    """Let all threads share one heap, which keeps what is freed. Only with glibc; before threads are started."""
    # oneDNN keeps code and scratch memory for the last 1024 shapes that it multiplied, hundreds of MB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if sys.platform != "linux" or "MALLOC_ARENA_MAX" in os.environ:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # musl has none
        for option, value in ((ARENA_MAX, 1), (TRIM_THRESHOLD, NEVER), (MMAP_THRESHOLD, OF_ITS_OWN)):
            mallopt(option, value)
