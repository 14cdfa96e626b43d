"""Memory that is freed stays with the process and is used again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
if sys.argv[1] == "kept":
    from harmful_unlearn.allocator import keep_freed_memory
    keep_freed_memory()
import torch
for _ in range(10):
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_not_fetched_again():
    faults = {}
    for how in ("kept", "default"):
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, env=os.environ)
        faults[how] = int(done.stdout)
    assert faults["kept"] < faults["default"] / 10
