"""The report in a real browser: it opens without an error, filters, and runs no text of the data.

Chromium from Debian's packages through Playwright (`make browser`); skipped where there is none.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_report import HOSTILE, comparison_of, evaluation_of, run_of

from self_judge.commands.demo.run import run_demo
from self_judge.reporting.page import write_report
from self_judge.storage.run_dir import BRACKETS, append_line

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="no Playwright here: `make browser` installs it"
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: `make browser` installs it (or set CHROMIUM)"
)
QUIET = Console(quiet=True)
PATIENCE_MS = 120_000  # a page of 5 MB on a machine that is busy with other things
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page from disk; whatever it complains of or asks a network for fails the test."""
    contexts, complaints, requests = [], [], []

    def open_(path: Path, **settings: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


def report_of(*folders: Path, to: Path) -> Path:
    return write_report(folders, to / "report.html", console=QUIET)


def test_the_report_of_a_demo_opens_with_all_its_parts(
    demo: Path,
    tmp_path: Path,
    opened: Open,
) -> None:
    page = opened(report_of(demo, to=tmp_path))
    titles = page.locator("nav a").all_text_contents()
    results = ["Conclusions", "Gold scores", "Runs", "Curves", "Pairs", "Tournaments", "Judge"]
    assert titles == [*results, "Configuration"]
    gold = page.locator("#gold")
    assert gold.locator("tbody th").all_text_contents()[:2] == ["JSFT", "self-trained"]
    assert gold.locator("article").count() == 3
    assert gold.locator("article .gold").count() == 9
    assert page.locator("#pairs article").first.locator(".gold").count() == 2
    charts = page.locator("figure.chart")
    assert charts.count() >= 15
    # Every chart has a curve, drawn by Plotly, and says in words what it shows.
    assert page.locator("figure.chart .plot:has(.scatterlayer .trace)").count() == charts.count()
    label = page.locator("[data-chart=judge-margin] .plot").get_attribute("aria-label")
    assert label.startswith("Judge margin. demo/self_judge: ")
    assert page.locator("#pairs article").count() == 10
    assert page.locator("#judge .plot .trace").count() >= 1
    assert "self_judge_args" not in page.locator("#configuration").inner_text()


def test_policies_that_were_compared_are_drawn_and_their_names_are_text(
    tmp_path: Path, opened: Open
) -> None:
    page = opened(report_of(comparison_of(tmp_path / "compared"), to=tmp_path))
    section = page.locator("#policies")
    assert section.locator(".plot .points path").count() == 4
    assert section.locator("tbody th").inner_text() == "new against <b>old</b>"
    label = section.locator(".plot").get_attribute("aria-label")
    assert "win rate 75" in label
    assert "15 / 0 / 5" in section.inner_text()
    assert section.locator("article").count() == 10
    section.get_by_role("button", name="Show more").click()
    assert section.locator("article").count() == 20
    section.locator("select").select_option("b wins")
    assert "5 of 20 prompts" in section.inner_text()
    assert "b · preferred" in section.locator("article").first.inner_text()


def test_an_evaluation_is_drawn_beside_its_baselines_and_the_other_judge(
    tmp_path: Path, opened: Open
) -> None:
    page = opened(report_of(evaluation_of(tmp_path / "judged"), to=tmp_path))
    section = page.locator("#judge")
    assert section.locator(".baselines .bars .point").count() == 4 * 2 * 2  # and of the other one
    assert section.locator(".baselines .legendtext").first.text_content() == "swap-averaged judge"
    for told in ("decided by position", "better is longer", "honest", "McNemar’s p"):
        assert told in section.inner_text(), told
    assert section.locator("table").count() == 4
    assert "judged · all against <i>old</i>" in section.inner_text()
    label = section.locator(".baselines").get_attribute("aria-label")
    assert label.startswith(
        "Accuracy compared with baselines. judged (new): swap-averaged judge 80%"
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_report_of_the_whole_demo_opens(tmp_path: Path, opened: Open) -> None:
    run_demo(0, tmp_path / "demo", console=QUIET)
    page = opened(tmp_path / "demo" / "report.html")
    assert page.locator("#pairs [role=status]").inner_text() == "400 of 400 pairs"
    assert page.locator("#tournaments option").count() == 12
    assert page.locator("#judge .points path").count() >= 6  # bins with verdicts in them


def test_filter_search_and_more(tmp_path: Path, opened: Open) -> None:
    run = run_of(tmp_path / "run", 12, pairs=2, text="where does the OTTER live?")
    page = opened(report_of(run, to=tmp_path))
    status = page.locator("#pairs [role=status]")
    cards = page.locator("article.pair")
    assert status.inner_text() == "24 of 24 pairs"
    assert cards.count() == 10
    page.get_by_role("button", name="Show more").click()
    assert cards.count() == 20
    page.get_by_role("searchbox", name="search").fill("otter live? 12 1")
    assert status.inner_text() == "1 of 24 pairs"
    assert page.locator("mark").inner_text() == "OTTER live? 12 1"
    page.get_by_role("searchbox", name="search").fill("no such word")
    assert cards.count() == 0
    assert "No pairs match" in page.locator("#pairs").inner_text()
    page.get_by_role("searchbox", name="search").fill("")
    page.get_by_role("combobox", name="step", exact=True).select_option("7")
    assert status.inner_text() == "2 of 24 pairs"
    assert all("step 7" in text for text in cards.all_inner_texts())
    page.get_by_role("combobox", name="outcome").select_option("undecidable")
    assert status.inner_text() == "0 of 24 pairs"
    page.get_by_role("combobox", name="outcome").select_option("cut")
    assert status.inner_text() == "2 of 24 pairs"


def test_a_verdict_shows_the_probabilities_of_both_letters_in_both_orders(
    tmp_path: Path, opened: Open
) -> None:
    run = run_of(tmp_path / "run", 1, pairs=1)
    page = opened(report_of(run, to=tmp_path))
    rows = [" ".join(t.split()) for t in page.locator(".verdict tbody tr").all_inner_texts()]
    assert rows == ["chosen 0.7500 0.5000 chosen", "rejected 0.5000 0.7500 chosen"]


def test_no_text_of_the_data_is_run(tmp_path: Path, opened: Open) -> None:
    run = run_of(tmp_path / "run", 2, pairs=2, text=HOSTILE, **{HOSTILE: 1.0})
    line = {
        "context": HOSTILE,
        "responses": [HOSTILE, "fair"],
        "winner": 0,
        "bracket": [[{"a": 0, "b": 1, "winner": 0, "by_lot": False, "probabilities": None}]],
    }
    append_line(run / BRACKETS, line)
    (run / "run.json").write_text(
        '{"kind": "self_judge", "run_file": {"model": "<img src=x onerror=alert(1)>"}}'
    )
    page = opened(report_of(run, to=tmp_path))
    page.locator("button.match").click()
    for details in page.locator("details").all():
        details.evaluate("node => { node.open = true }")
    page.get_by_role("searchbox", name="search").fill("<script>")
    assert page.locator("mark").first.inner_text() == "<script>"
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script, main a:not([href^='#'])").count() == 0
    assert page.locator("article.pair").first.inner_text().count("onerror=") >= 1


def test_script_that_got_onto_the_page_could_neither_run_nor_call_home(
    tmp_path: Path, browser: Any
) -> None:
    """The policy itself: markup that slipped through would still be dead."""
    path = report_of(run_of(tmp_path / "run", 1), to=tmp_path)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    blocked: list[str] = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    page.evaluate(
        "markup => document.body.insertAdjacentHTML('beforeend', markup)",
        '<img src=x onerror="window.hacked = 1"><button onclick="window.hacked = 2">b</button>',
    )
    page.evaluate("document.body.lastElementChild.click()")
    sent = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    page.wait_for_timeout(200)
    assert sent == "refused"
    assert page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in text for text in blocked)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_the_readers_colours(scheme: str, tmp_path: Path, opened: Open) -> None:
    run = run_of(tmp_path / "run", 3)
    page = opened(report_of(run, to=tmp_path), color_scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in paper.strip("rgb()").split(","))
    assert brightness > 700 if scheme == "light" else brightness < 100
    line = page.locator("[data-chart=loss] .scatterlayer path.js-line").first
    before = line.evaluate("node => getComputedStyle(node).stroke")
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    page.wait_for_timeout(100)
    after = page.locator("[data-chart=loss] .scatterlayer path.js-line").first
    assert after.evaluate("node => getComputedStyle(node).stroke") != before


def test_on_a_phone_nothing_runs_off_the_side(demo: Path, tmp_path: Path, opened: Open) -> None:
    judged = evaluation_of(tmp_path / "judged")
    model = f"/data/{'experiment_with_a_long_name/' * 3}checkpoint-1200"
    results = json.loads((judged / "results.json").read_text())
    own = {"subsets": {"livebench-reasoning": {}}, "overall": {"accuracy": None}}
    results |= {"judge": {"model": model}, "benchmarks": {"JudgeBench": own}}
    (judged / "results.json").write_text(json.dumps(results))
    compared = comparison_of(tmp_path / "compared")
    path = report_of(demo, judged, compared, to=tmp_path)
    page = opened(path, viewport={"width": 390, "height": 844}, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_runs_can_be_hidden_and_settings_compared(tmp_path: Path, opened: Open) -> None:
    runs = [run_of(tmp_path / name, 3) for name in ("one", "two")]
    for run, rate in zip(runs, (1, 2), strict=True):
        (run / "run.json").write_text(
            f'{{"kind": "self_judge", "run_file": {{"rate": {rate}, "seed": 0}}}}'
        )
    page = opened(report_of(*runs, to=tmp_path))
    curves = page.locator("[data-chart=loss] .scatterlayer .trace")
    assert curves.count() == 2
    page.get_by_role("button", name="two").click()
    assert curves.count() == 1
    page.get_by_text("Run file").click()
    box = page.locator("details", has_text="Run file")
    box.get_by_label("only differences").check()
    rows = [row for row in box.locator("tbody tr").all() if row.is_visible()]
    assert [row.inner_text().split() for row in rows] == [["rate", "1", "2"]]


def test_a_link_opens_its_pair_and_its_tournament(demo: Path, tmp_path: Path, opened: Open) -> None:
    for place in ("a", "b"):
        run_of(tmp_path / place, 12, pairs=2)
    path = report_of(tmp_path / "a", tmp_path / "b", demo / BRACKETS, to=tmp_path)
    page = opened(path)
    page.get_by_role("searchbox", name="search").fill("no such word")
    page.evaluate("location.hash = 'pair-2-12-12-2'")  # of the 48, the filter shows none
    pair = page.locator("#pair-2-12-12-2.linked")
    assert "step 12" in pair.inner_text()
    pair.get_by_role("link", name="link to this pair").click()
    assert page.url.endswith("#pair-2-12-12-2")
    again = opened(path, reduced_motion="reduce")
    again.goto(path.as_uri() + "#tournament-3")
    again.reload()
    again.wait_for_selector("#tournament-3.linked")
    assert again.get_by_role("combobox", name="context").input_value() == "2"
    again.wait_for_function(
        "document.querySelector('#tournament-3').getBoundingClientRect().top < 200"
    )


def test_a_match_opens_by_the_keyboard(demo: Path, tmp_path: Path, opened: Open) -> None:
    page = opened(report_of(demo, to=tmp_path))
    match = page.locator("button.match").first
    match.focus()
    page.keyboard.press("Enter")
    assert match.get_attribute("aria-expanded") == "true"
    assert page.locator(".detail").is_visible()
    page.keyboard.press("Enter")
    assert page.locator(".detail").count() == 0
