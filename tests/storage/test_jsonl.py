"""A file of JSON lines that an interruption does not lose, and that no other run can spoil."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest

from self_judge.errors import JournalError
from self_judge.storage.jsonl import (
    open_journal,
    parse_lines,
    read_journal,
    read_lines,
    settings_path,
    write_lines,
)

SETTINGS = {"model": "m", "max_length": None}


def begun(path: Path, n: int = 3) -> Path:
    with open_journal(path, SETTINGS) as journal:
        journal.append([{"i": i} for i in range(n)], seconds=1.5)
    return path


def test_lines_are_there_when_it_is_opened_again_and_it_goes_on(tmp_path: Path) -> None:
    path = begun(tmp_path / "new" / "out.jsonl")
    with open_journal(path, SETTINGS) as journal:
        assert (journal.lines, journal.timed, journal.seconds) == (3, 3, 1.5)
        journal.append([{"i": 3, "text": "ü \ud800"}], seconds=0.5)
    assert [line["i"] for line in read_journal(path)] == [0, 1, 2, 3]
    assert list(read_journal(path))[3]["text"] == "ü \ud800"
    assert json.loads(settings_path(path).read_text())["seconds"] == 2.0


@pytest.mark.parametrize("torn", [b'{"i": 3', b'{"i": 3}', b"\0\0\0\0\n"])
def test_an_unfinished_last_line_is_cut(torn: bytes, tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with open_journal(path, SETTINGS) as journal:
        assert journal.lines == 3
        assert path.read_bytes() == whole


def test_it_can_be_cut_back_to_any_number_of_lines(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl", 5)
    with open_journal(path, SETTINGS) as journal:
        journal.cut(2)
        journal.append([{"i": 9}])
    assert [line["i"] for line in read_journal(path)] == [0, 1, 9]


def test_other_settings_are_refused_and_named_unless_it_begins_anew(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    with pytest.raises(JournalError, match="model was 'm', now 'other'"):
        with open_journal(path, {**SETTINGS, "model": "other"}):
            pass
    assert len(list(read_journal(path))) == 3
    with open_journal(path, {**SETTINGS, "model": "other"}, overwrite=True) as journal:
        assert journal.lines == 0


def test_a_file_from_elsewhere_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"precious": 1}\n')
    with pytest.raises(JournalError, match="cannot be resumed"):
        with open_journal(path, SETTINGS):
            pass
    assert path.read_text() == '{"precious": 1}\n'


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with open_journal(tmp_path / "out.jsonl", SETTINGS):
        with pytest.raises(JournalError, match="another process"):
            with open_journal(tmp_path / "out.jsonl", SETTINGS):
                pass


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    path.write_bytes(path.read_bytes().replace(b'{"i": 1}', b'{"i": 1'))
    with pytest.raises(JournalError, match="line 2: not JSON"):
        list(read_journal(path))


def test_a_journal_without_a_line_is_begun_anew_with_any_settings(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with open_journal(path, {"model": "a"}):
        pass  # what was to be written could not be computed
    with open_journal(path, {"model": "b"}) as journal:
        journal.append([{"x": 1}])
    with pytest.raises(JournalError, match="was written with different settings"):
        with open_journal(path, {"model": "a"}):
            pass


def test_nothing_is_lost_or_left_where_work_fails_before_the_first_line(tmp_path: Path) -> None:
    path = begun(tmp_path / "out.jsonl")
    before = path.read_bytes(), settings_path(path).read_bytes()
    with (
        pytest.raises(ZeroDivisionError),
        open_journal(path, {}, overwrite=True) as new,
    ):
        assert 1 // len(list(new.read()))
    assert (path.read_bytes(), settings_path(path).read_bytes()) == before
    other = tmp_path / "other.jsonl"
    with pytest.raises(ZeroDivisionError), open_journal(other, SETTINGS) as new:
        assert 1 // new.lines
    assert not other.exists()
    assert not settings_path(other).exists()
    with open_journal(path, {"model": "other"}, overwrite=True) as journal:
        journal.append([{"i": 7}])
    assert [line["i"] for line in read_journal(path)] == [7]


def test_what_was_there_before_is_not_taken_away(tmp_path: Path) -> None:
    empty, link = tmp_path / "empty.jsonl", tmp_path / "link.jsonl"
    empty.touch()
    link.symlink_to(empty)  # as a device, /dev/null say, it is no file of a journal
    with pytest.raises(ZeroDivisionError), open_journal(link, SETTINGS) as new:
        assert 1 // new.lines
    assert link.is_symlink()
    with pytest.raises(ZeroDivisionError), open_journal(empty, SETTINGS) as new:
        assert 1 // new.lines
    assert empty.exists()


def test_what_a_reader_passes_over_is_said_by_its_caller(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"x": NaN}\n\n{"x": 1')
    assert list(read_lines(path)) == [{"x": None}]
    with pytest.raises(JournalError, match="line 2: not JSON"):
        list(read_journal(path))
    with pytest.raises(ValueError, match="line 3: not JSON"):
        list(parse_lines(path.read_text().splitlines(True), path))
    path.write_bytes(b'{"x": "\xff"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl, line 1: not JSON \(.*utf-8"):
        list(read_lines(path))
    (kept,) = parse_lines(['{"x": NaN}\n'], path)
    assert kept[0] == 1
    assert math.isnan(kept[1]["x"])


def test_a_full_disk_is_named_and_the_lines_before_it_stay(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill() -> None:
        with open_journal(path, SETTINGS) as new:
            new.append([{"x": 0}])
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
            new.append([{"x": "long" * 500}])

    try:
        with pytest.raises(OSError, match=r"x\.jsonl"):
            fill()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    with open_journal(path, SETTINGS) as again:
        assert list(again.read()) == [{"x": 0}]


def test_a_file_never_takes_the_place_of_a_folder_or_a_device(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        with pytest.raises(ValueError, match="is not a regular file: choose another output"):
            write_lines(path, [{"x": 1}])
    assert folder.is_dir()
    assert pipe.is_fifo()
