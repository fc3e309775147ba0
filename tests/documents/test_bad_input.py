"""Bad input: one line that says what, where and what to do; the document says the same."""

from __future__ import annotations

import re

import pytest

from bad_input import CASES, COMMANDS, GROUPS, LIBRARY, Case, Place
from conftest import ROOT
from self_judge import Comparison, Judge
from self_judge.cli import main


def in_order(text: str, parts: tuple[str, ...]) -> bool:
    """Whether the parts stand in a text, one behind the other."""
    end = 0
    for part in parts:
        end = text.find(part, end)
        if end < 0:
            return False
        end += len(part)
    return True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.wrong)
def test_a_mistake_is_told_in_one_line(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, refused = None, None
    try:
        asked = case.does(place)
    except (ValueError, TypeError) as error:
        refused = str(error).strip()
    if refused is not None:  # by the library
        assert in_order(refused, case.said), refused
        assert "\n" not in refused
        return
    assert isinstance(asked, list), "nothing was refused"
    capsys.readouterr()
    try:
        status = main(asked)
    except SystemExit as left:  # argparse
        status = left.code
    assert status == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error: " in line]
    assert line == said.splitlines()[-1]
    assert re.match(r"self-judge( [a-z]+)?: error: ", line), line
    assert in_order(line, case.said), line


def test_a_traceback_is_shown_where_it_is_asked_for(place: Place) -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(["--debug", "jsft", "nope.yaml"])


def test_a_length_beyond_the_models_positions_is_not_used_and_said(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = place.make(max_length=4000)
    assert trainer.args.max_length == trainer.judge.max_length == 512
    assert "max_length 4000 exceeds the model's 512 positions" in caplog.text
    caplog.clear()
    assert main(place.run("jsft_args.max_length=5000")) == 0
    assert "max_length 5000 exceeds the model's 4096 positions" in caplog.text


def test_pairs_that_say_nothing_are_undecidable_and_no_error(place: Place) -> None:
    judge = Judge.from_pretrained(place.saved)
    pairs = [
        Comparison("what?", "the same", "the same"),
        Comparison("what?", "", ""),
        Comparison("what? " * 3000, "a", "b"),
        Comparison("what?", "<|im_end|></s>", " "),
    ]
    same, empty, long, special = judge.compare(pairs)
    assert (same.preferred, same.undecidable_because) == (None, "an exact tie")
    assert (empty.preferred, empty.undecidable_because) == (None, "an exact tie")
    assert long.undecidable_because == "the pair does not fit into max_length"
    assert special.preferred in ("a", "b")  # control tokens are text like any other


def test_the_document_has_every_case_whose_message_does_not_make_the_remedy_clear() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    listed = [line for line in text.splitlines() if line.startswith(("- ", "## "))]
    wanted: list[str] = []
    for heading, cases in GROUPS.items():
        items = [item(case) for case in cases if case.remedy]
        wanted += [f"## {heading}", *items] if items else []
    assert listed == wanted


def item(case: Case) -> str:
    """A case as an item of the lists in docs/errors.md."""
    said = " … ".join(part.strip() for part in case.said)
    return f"- {case.wrong}: `{said}` ({case.remedy})"


def test_there_are_as_many_cases_as_promised() -> None:
    assert len({case.wrong for case in CASES}) == len(CASES) >= 60
    assert LIBRARY
    assert COMMANDS
