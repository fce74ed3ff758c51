"""The catalog as a running gateway has it: what changes is noticed, and a broken file costs nobody anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gateway.catalog import Catalog

GOOD = 'source = "path:somewhere"\nengine = "echo"\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CATALOG", str(tmp_path))
    return tmp_path


def write(file: Path, text: str) -> None:
    """With an mtime of its own, however fast the test is."""
    last = file.stat().st_mtime_ns if file.exists() else 0
    file.write_text(text)
    os.utime(file, ns=(last + 10**9, last + 10**9))


def test_files_come_change_and_go(folder: Path) -> None:
    catalog = Catalog()
    assert "echo" in catalog.pipelines
    assert catalog.look() == ({}, frozenset())
    write(folder / "mine.toml", GOOD)
    changed, removed = catalog.look()
    assert (list(changed), removed) == (["mine"], frozenset())
    assert catalog.pipelines["mine"].keep_alive == 300
    before = catalog.pipelines["mine"].version
    write(folder / "mine.toml", GOOD + "keep_alive = 5\n")
    changed, _ = catalog.look()
    assert changed["mine"].keep_alive == 5
    assert changed["mine"].version == before  # which a loaded pipeline can follow as it is
    write(folder / "mine.toml", GOOD + "context = 64\n")
    assert catalog.look()[0]["mine"].version != before
    (folder / "mine.toml").unlink()
    assert catalog.look() == ({}, frozenset({"mine"}))
    assert "mine" not in catalog.pipelines


def test_a_broken_file_is_reported_and_what_it_declared_goes_on(folder: Path) -> None:
    write(folder / "mine.toml", GOOD)
    catalog = Catalog()
    write(folder / "mine.toml", 'source = "path:somewhere"\nkeep_alive = "long"\n')
    assert catalog.look() == ({}, frozenset())
    assert "keep_alive" in catalog.broken[folder / "mine.toml"]
    assert catalog.pipelines["mine"].keep_alive == 300
    write(folder / "mine.toml", GOOD + "keep_alive = 7\n")
    assert catalog.look()[0]["mine"].keep_alive == 7
    assert catalog.broken == {}


def test_a_later_folders_file_wins_and_the_earlier_one_comes_back(folder: Path) -> None:
    catalog = Catalog()
    shipped = catalog.pipelines["echo"]
    write(folder / "echo.toml", GOOD)
    assert catalog.look()[0]["echo"].source.endswith("somewhere")
    (folder / "echo.toml").unlink()
    assert catalog.look() == ({"echo": shipped}, frozenset())


def test_of_those_that_are_named_no_other_is_served(folder: Path) -> None:
    catalog = Catalog(only=["echo"])
    write(folder / "mine.toml", GOOD)
    assert catalog.look() == ({}, frozenset())
    assert list(catalog.pipelines) == ["echo"]
