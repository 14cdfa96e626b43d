"""Memory that is freed stays with the process and is used again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
if sys.argv[1] == "kept":
    from harmful_unlearn.cli.allocator import keep_freed_memory
    keep_freed_memory()
import torch
def work():
    for _ in range(10):
        blocks = [torch.ones(2**20) for _ in range(16)]
        del blocks
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=work)  # as autograd has one
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_that_is_freed_serves_every_thread():
    faults = {}
    for how in ("kept", "default"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=os.environ)
        faults[how] = int(done.stdout)
    assert faults["kept"] < faults["default"] / 3
