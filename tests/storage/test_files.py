"""Folders and files that are complete or absent, and checks before the work."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from harmful_unlearn.errors import UserError
from harmful_unlearn.storage import files
from harmful_unlearn.storage.files import new_folder, write_file


def test_new_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "a" / "model"
    with pytest.raises(KeyboardInterrupt), new_folder(target) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())  # its parent, which was made for it, is gone too
    with new_folder(target) as folder:
        (folder / "whole").write_text("x")
        assert not target.exists()
    assert [file.name for file in target.iterdir()] == ["whole"]
    assert [file.name for file in target.parent.iterdir()] == ["model"]


def test_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "model"
    with new_folder(target) as folder:
        (folder / "old").write_text("x")
    with pytest.raises(UserError, match="--overwrite"), new_folder(target):
        pass
    with pytest.raises(RuntimeError), new_folder(target, overwrite=True) as folder:
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["old"]
    with new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert [file.name for file in target.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_an_empty_folder_is_no_obstacle(tmp_path):
    (tmp_path / "model").mkdir()
    with new_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "model" / "file").exists()


def test_others_may_read_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        with new_folder(tmp_path / "model"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755


def test_unwritable_parent(tmp_path, monkeypatch):
    def refuse(**_):  # root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(UserError, match="not a writable folder"):
        files.check_target(tmp_path / "model", overwrite=False)


def test_files_and_folders_that_would_mix_are_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        files.check_file(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a writable folder"):
        files.check_file(tmp_path / "file" / "run.log")
    files.check_apart([tmp_path / "a", tmp_path / "b", tmp_path / "ab"])
    for first, second in (("a", "a"), ("a", "a/b"), ("a/b/c", "a"), ("a", "b/../a")):
        with pytest.raises(UserError, match="folder of its own"):
            files.check_apart([tmp_path / "z", tmp_path / first, tmp_path / second])


def test_a_mount_or_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="give a folder in it"):
        files.check_target(files.Path("."), overwrite=True)


def test_a_failing_rename_loses_neither_the_old_folder_nor_the_new(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("x")
    rename = files.Path.rename

    def refuse(self, to):
        if ".partial-" in self.name:
            raise OSError(errno.EBUSY, "busy")
        return rename(self, to)

    monkeypatch.setattr(files.Path, "rename", refuse)
    with pytest.raises(UserError, match="which is complete"), new_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("x")
    assert (target / "old").exists()
    (partial,) = tmp_path.glob(".model.partial-*")
    assert (partial / "new").exists()


def test_home_in_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/models") == tmp_path / "models"


def test_write_file_replaces_in_one_step(tmp_path):
    write_file(tmp_path / "deep" / "file.json", "one")
    write_file(tmp_path / "deep" / "file.json", "two")
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["file.json"]
    assert (tmp_path / "deep" / "file.json").read_text() == "two"


def test_what_a_killed_process_left_is_cleared_up(tmp_path):
    """Of processes of this machine that are gone; not what a living one, or another machine's, is writing."""
    target, host = tmp_path / "model", socket.gethostname()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f".model.partial-{host}-{gone.pid}-a", f".model.previous-{host}-{gone.pid}-a"]
    others = [f".model.partial-{host}-1-b", f".model.partial-elsewhere-{gone.pid}-c", f".models.partial-{host}-1-d"]
    for name in left + others:
        (tmp_path / name).mkdir()
    with new_folder(target):
        assert not (tmp_path / left[0]).exists() and (tmp_path / left[1]).exists()  # nothing stands in its place yet
    with new_folder(target, overwrite=True):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"model", *others}


def test_a_folder_is_removed_whole(tmp_path, monkeypatch):
    """Killed in the middle of removing, no half of it is left under its name."""
    (tmp_path / "step-1").mkdir()

    def killed(*_, **_more):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.remove_folder(tmp_path / "step-1")
    assert not (tmp_path / "step-1").exists()
