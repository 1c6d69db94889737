"""Places where others can write are seen: whoever owns them, by links, and by the folders around them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergekit_lfm.machine.private import make_private, why_unsafe


def test_a_new_folder_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "kernels"
        assert make_private(folder) == "" and folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert make_private(folder) == ""


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_a_place_that_others_may_write_is_unsafe(mode: int, tmp_path: Path) -> None:
    place = tmp_path / "x"
    place.mkdir()
    place.chmod(mode)
    assert why_unsafe(place) == make_private(place) == "others may write there"


def test_a_link_is_unsafe(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("x")
    assert make_private(tmp_path / "link") == "it is a link"


def test_a_place_of_another_user_is_unsafe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert why_unsafe(tmp_path) == "it belongs to another user"


def test_a_folder_around_it_counts_too(tmp_path: Path) -> None:
    around = tmp_path / "around"
    assert make_private(around / "x") == ""
    around.chmod(0o777)
    assert why_unsafe(around / "x") == f"everybody may write in {around}"
    around.chmod(0o1777)  # as /tmp
    assert why_unsafe(around / "x") == ""


def test_a_folder_that_cannot_be_made_is_unsafe(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert make_private(tmp_path / "file/x").startswith("it cannot be made (")
