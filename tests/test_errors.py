"""Problems of the disk and of memory in the user's words, also where a library has errors of its own."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError

from harmful_unlearn.errors import disk_problem, first_line, is_out_of_memory, system_errors


@pytest.mark.parametrize(
    "number, fix",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "another path"),
        (errno.EROFS, "another path"),
        (errno.ENAMETOOLONG, "another path"),
        (errno.ELOOP, "another path"),
        (errno.ESTALE, "another path"),
    ],
)
def test_a_disk_problem_names_the_path_the_cause_and_the_fix(number, fix):
    message = disk_problem(OSError(number, os.strerror(number), "out.bin"))
    assert message.startswith(f"out.bin: {os.strerror(number)}: ") and fix in message
    renaming = OSError(number, os.strerror(number), "old.bin", None, "new.bin")
    assert disk_problem(renaming).startswith("new.bin: ")
    assert "a file" in disk_problem(OSError(number, os.strerror(number)))


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "ours"), OSError("no number"), ConnectionError(), ValueError()])
def test_other_errors_are_no_disk_problem(error):
    assert disk_problem(error) is None


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # tokenizers
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=str,
)
def test_a_failed_write_is_an_os_error(error, tmp_path):
    with pytest.raises(OSError) as caught, system_errors(tmp_path):
        raise error
    assert caught.value.errno == errno.ENOSPC and caught.value.strerror == os.strerror(errno.ENOSPC)


@pytest.mark.parametrize("error", [ValueError("a bug"), SafetensorError("a broken header")], ids=str)
def test_other_errors_stay_as_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, system_errors(tmp_path):
        raise error
    assert caught.value is error


def test_out_of_memory():
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("a bug"))


def test_first_line():
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"
