"""The report: what it reads of runs, how much it keeps, and that no text can become markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from report_pages import embedded
from self_judge import cli
from self_judge.commands.compare import outcome
from self_judge.datatypes import Response
from self_judge.evaluation.judge_metrics import JudgedPair, JudgeTally, PairedTally, credit
from self_judge.judging.voting import aggregate
from self_judge.reporting.charts import CHARTS
from self_judge.reporting.collect import Limits, ReportData, collect
from self_judge.reporting.page import json_block, page, write_report
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import BRACKETS, METRICS, append_line, rollout_file
from self_judge.training.self_training.rollout_log import (
    rollout_metrics,
    rollout_totals,
    write_rollouts,
)
from self_judge.training.self_training.rollouts import Rollout

QUIET = Console(quiet=True)
HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'></script>"
    '<!-- ]]> <a href="javascript:window.hacked = 3">press</a> {{7*7}} @data@ \u2028 %{x} \ud800'
)


def pair(text: str, step: int = 1, chosen: str = "yes", margin: float = 0.25) -> Rollout:
    verdict = aggregate([((0.5 + margin, 0.5), (0.5, 0.5 + margin))])
    answers = (Response((1, 2), chosen, True), Response((3,), "no", False))
    return Rollout(step, (1,), text, *answers, verdict, True)


def run_of(folder: Path, steps: int, pairs: int = 3, text: str = "why?", **logs: float) -> Path:
    """A run's folder by the writers that training uses."""
    for step in range(1, steps + 1):
        rollouts = [pair(f"{text} {step} {i}", step) for i in range(pairs)]
        metrics = rollout_metrics(rollout_totals(rollouts, ["helpful"]))
        append_line(folder / METRICS, {"step": step, "loss": 1 / step, **metrics, **logs})
        write_rollouts(rollout_file(folder, step), rollouts, step, ["helpful"], lambda ids: text)
    return folder


# -- reading ---------------------------------------------------------------------------------------


def test_a_demo_has_runs_pairs_tournaments_and_a_judge(demo: Path) -> None:
    data = collect([demo])
    assert [(r["name"], r["kind"]) for r in data.runs] == [
        ("demo/jsft", "jsft"),
        ("demo/self_judge", "self_judge"),
    ]
    jsft, training = data.runs
    assert jsft["series"]["loss"]["step"]
    assert training["series"]["judge/margin"]["step"] == [1, 2, 3]
    assert training["series"]["completions/length_drift"]["value"][0] == 1.0
    assert training["about"]["changed_arguments"]["max_new_tokens"] == 6
    assert len(data.pairs) == 12
    assert {p["run"] for p in data.pairs} == {1}
    assert [len(b["responses"]) for b in data.brackets] == [16] * 5
    (gold,) = data.gold
    assert gold["win_rate_vs_jsft"]["ci95"]
    assert len(gold["examples"]) == 3
    (judge,) = data.judges
    assert judge["pairs"] == 40
    bins = judge["calibration"]["bins"]
    assert sum(b["n"] for b in bins) == judge["accuracy"]["n"] <= 40
    right = sum(b["n"] * b["accuracy"]["value"] for b in bins if b["n"])
    assert right == pytest.approx(judge["accuracy"]["n"] * judge["accuracy"]["value"])


def test_every_chart_shows_what_a_training_really_logs(demo: Path) -> None:
    """A renamed metric would leave a chart empty without a word."""
    held_out = re.compile(r"eval_")
    series = {run["kind"]: run["series"] for run in collect([demo]).runs}
    for chart in CHARTS:
        logged = series[chart.section[0]]
        for key in chart.lines:
            if key == chart.prefix:
                assert any(name.startswith(key) for name in logged), chart.title
            else:
                assert key in logged or held_out.match(key), f"{chart.title}: {key}"


def test_several_runs_have_names_that_tell_them_apart(tmp_path: Path) -> None:
    folders = [run_of(tmp_path / name / "run", 2) for name in ("first", "second")]
    names = [r["name"] for r in collect(folders).runs]
    assert names == ["first/run", "second/run"]
    assert [r["name"] for r in collect([folders[0], folders[0]]).runs] == ["run"]


def test_a_run_killed_in_the_middle_of_a_line_can_be_looked_at(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 3)
    with (run / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')
    assert collect([run]).runs[0]["series"]["loss"]["step"] == [1, 2, 3]


def test_a_loss_that_is_not_a_number_is_a_gap(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 2, grad_norm=float("nan"))
    series = embedded(page(collect([run])))["runs"][0]["series"]
    assert series["grad_norm"]["value"] == [None, None]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "nothing to report on: no metrics.jsonl"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "metrics.jsonl, line 2: not JSON"),
    ],
)
def test_what_cannot_be_reported_on_is_said_in_one_line(
    content: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / METRICS).write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not list(tmp_path.glob("*.html*"))
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


# -- bounds ----------------------------------------------------------------------------------------


def test_pairs_are_taken_evenly_over_the_steps_and_the_page_says_so(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 20, pairs=3)
    for most in (0, 1, 7, 20, 25, 59, 60):
        data = collect([run], Limits(pairs=most))
        assert len(data.pairs) == most
        steps = sorted({p["step"] for p in data.pairs})
        if most >= 20:
            assert steps == list(range(1, 21))
        elif most > 1:
            assert (steps[0], steps[-1]) == (1, 20)
        assert bool(data.notes) == (most < 60)
    assert "25 of the 60 pairs on disk" in page(collect([run], Limits(pairs=25)))


def test_long_curves_are_averaged_and_long_texts_cut(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in range(1, 11):
        append_line(run / METRICS, {"step": step, "loss": float(step)})
    write_rollouts(rollout_file(run, 1), [pair("x" * 100)], 1, ["p"], lambda ids: "")
    data = collect([run], Limits(points=4, characters=30))
    assert data.runs[0]["series"]["loss"] == {"step": [3, 6, 9, 10], "value": [2, 5, 8, 10]}
    assert any("windows of 3 logs" in note for note in data.notes)
    assert data.pairs[0]["context"] == "x" * 30 + " … [70 more characters]"


# -- the page --------------------------------------------------------------------------------------


def test_text_from_data_stands_in_the_json_block_alone(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", 1, pairs=1, text=HOSTILE)
    html = page(collect([run]))
    assert "window.hacked" in html
    for found in re.finditer("window.hacked", html):
        before = html[: found.start()]
        assert before.rindex('id="data">') > before.rindex("</"), "outside of the JSON block"
    assert html.count("</script") == 3
    assert embedded(html)["pairs"][0]["context"] == HOSTILE + " 1 0"
    assert "\u2028" not in json_block({"x": HOSTILE})
    assert not set("<>&") & set(json_block({"<": "</script>&"}))


def test_nothing_on_the_page_may_be_loaded_or_sent(demo: Path) -> None:
    html = page(collect([demo]))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    outside = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)=(?!["']?#)""", outside)


def test_the_command_writes_one_file_into_the_first_folder(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(demo), "--pairs", "5", "-o", str(tmp_path / "a.html")]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
    assert "2 runs, 5 pairs, 5 tournaments, 1 judge" in " ".join(capsys.readouterr().err.split())
    run = run_of(tmp_path / "run", 1)
    assert write_report([run], console=QUIET) == run / "report.html"
    assert write_report([demo / BRACKETS], tmp_path / "b.html", console=QUIET).is_file()
    twice = [str(demo), str(demo / "."), "--pairs", "5", "-o", str(tmp_path / "c.html")]
    assert cli.main(["report", *twice]) == 0
    assert "2 runs, 5 pairs, 5 tournaments, 1 judge" in " ".join(capsys.readouterr().err.split())


def test_an_evaluation_is_shown_with_its_subsets(tmp_path: Path) -> None:
    share = {"value": 0.5, "ci95": [0.3, 0.7], "n": 20}
    numbers = {
        "pairs": 20,
        "accuracy": share,
        "order_agreement": share,
        "undecidable": {"share": 0.1, "reasons": {}},
        "calibration": {"n": 20, "ece": 0.1, "brier": 0.2, "bins": []},
    }
    results = {"overall": numbers, "subsets": {"hard": {**numbers, "calibration": None}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    judges = collect([tmp_path]).judges
    assert [j["name"] for j in judges] == [tmp_path.name, f"{tmp_path.name} · hard"]
    assert judges[0]["accuracy"] == share
    assert collect([tmp_path / "results.json"]).judges[1]["undecidable"] == 0.1
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="self-judge eval"):
        collect([tmp_path / "results.json"])


@pytest.mark.parametrize(
    "more",
    [{"judge": "gpt"}, {"compared_with": "gpt"}, {"compared_with": {"overall": {}, "judge": "x"}}],
)
def test_somebody_elses_evaluation_is_shown_as_far_as_it_goes(
    more: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"overall": {"pairs": 3}, **more}))
    data = collect([tmp_path])
    assert (data.judges[0]["name"], data.judges[0]["pairs"]) == (tmp_path.name, 3)
    assert data.paired == []


def evaluation_of(folder: Path) -> Path:
    """What `self-judge eval --compare` leaves of 40 pairs in one subset: right in four of five."""
    folder.mkdir()
    tallies, paired = [JudgeTally(["helpful", "honest"]) for _ in range(2)], PairedTally()
    for i in range(40):
        right, wrong = ((0.6 + i / 200, 0.2), (0.2, 0.7)), ((0.3, 0.5), (0.6, 0.2))
        verdicts = [aggregate([wrong if i % 5 == k else right, right]) for k in range(2)]
        verdicts[0] = aggregate([wrong] * 2) if i % 5 == 0 else verdicts[0]
        for tally, verdict in zip(tallies, verdicts, strict=True):
            tally.add(JudgedPair("a", verdict, None, (8, 5)))
        ours, theirs = (credit(v.preferred, "a") for v in verdicts)
        paired.add(ours, theirs)
    new, old = (
        {"judge": {"model": m}, "overall": t.report(), "subsets": {"hard": t.report()}}
        for m, t in zip(("new", "<i>old</i>"), tallies, strict=True)
    )
    differences = {"overall": paired.report(), "subsets": {"hard": paired.report()}}
    results = {**new, "skipped": {}, "compared_with": {**old, "paired": differences}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def comparison_of(folder: Path, responses: str = "It is long.") -> Path:
    """What `self-judge compare` leaves of 20 judged pairs: a wins three of four."""
    folder.mkdir()
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(20):
            p = [0.7, 0.2] if i % 4 else [0.2, 0.7]
            told = {"preferred": "a" if i % 4 else "b", "margin": 0.5, "orders_agree": True}
            verdict = {**told, "undecidable_because": None, "probabilities": {"x": [p, p[::-1]]}}
            asked = {"index": i, "prompt": [{"role": "user", "content": f"why {i}?"}]}
            line = {**asked, "response_a": responses, "response_b": "No." * (i % 5 + 1)}
            file.write(json.dumps({**line, "verdict": verdict, "finished": [True, None]}) + "\n")
    results = {"policies": ["new", "<b>old</b>"], **outcome(folder / "pairs.jsonl")}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_policies_that_were_compared_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = comparison_of(tmp_path / "compared")
    (shown,) = collect([folder]).comparisons
    assert shown["name"] == "new against <b>old</b>"
    assert (shown["wins"], shown["ties"], shown["losses"]) == (15, 0, 5)
    assert shown["win_rate"]["value"] == 0.75
    first = shown["pairs"][0]
    assert (first["context"], first["a"], first["preferred"]) == ("why 0?", "It is long.", "b")
    assert (first["principles"], first["probabilities"]) == (["x"], [[[0.2, 0.7], [0.7, 0.2]]])
    few = Limits(pairs=3, characters=2)
    (shorter,) = collect([folder], few).comparisons
    assert [pair["b"] for pair in shorter["pairs"]] == [
        f"No … [{n:,} more characters]" for n in (1, 4, 7)
    ]
    assert cli.main(["report", str(folder)]) == 0
    assert "(1 comparison)" in capsys.readouterr().err
    (folder / "results.json").write_text('{"length_controlled_win_rate": {}}')
    with pytest.raises(ValueError, match="not the results of a comparison: prompts, wins"):
        collect([folder])


def test_without_plotly_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", 1)
    monkeypatch.setattr("self_judge.reporting.page.plotly_is_there", lambda: False)
    assert cli.main(["report", str(run)]) == 2
    assert "pip install 'self-judge[report]'" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_an_empty_report_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([])
    assert ReportData().runs == []


def test_brackets_with_broken_scores_can_be_drawn(tmp_path: Path) -> None:
    line = {
        "context": "c",
        "responses": ["x", "y"],
        "winner": 0,
        "bracket": [
            [
                {
                    "a": 0,
                    "b": 1,
                    "winner": 0,
                    "by_lot": True,
                    "probabilities": [[[float("nan"), 0.1], [0.2, 0.3]]],
                }
            ]
        ],
    }
    (tmp_path / "best.jsonl").write_text(json.dumps(line) + "\n")
    (bracket,) = embedded(page(collect([tmp_path])))["brackets"]
    assert bracket["rounds"][0][0]["probabilities"] == [[[None, 0.1], [0.2, 0.3]]]
    assert list(read_lines(tmp_path / "best.jsonl"))
