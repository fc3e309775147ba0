"""Self-training of a policy that thinks: answers are judged, every sampled id is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Make, history
from self_judge import ChatEncoder, Comparison, Judge
from self_judge.datatypes import Response
from self_judge.storage.run_dir import rollout_files
from self_judge.training.self_training.rollouts import judged_rollouts, preference_batch
from thinking import QWEN_3, R1, thinking_tokenizer, thinks
from value_judges import ByValue

# "Ċ" is a newline: the prompt's end, or that of the opening marker. A thought is one or two of
# h and e, an answer one of f and o; some thoughts go on to the limit.
TABLES = {
    "qwen-3": {"Ċ": ["<think>"], "<think>": ["h", "e"]},
    "r1": {"Ċ": ["h", "e"]},
}
THOUGHT = {"h": ["h", "</think>"], "e": ["e", "</think>"], "</think>": ["f", "o"]}
ANSWER = {"f": ["<|im_end|>"], "o": ["<|im_end|>"]}


def run(
    make: Make, kind: str, table: dict[str, list[str]], **changes: Any
) -> tuple[Any, list[dict[str, Any]], list[Comparison]]:
    """A trainer after its run, the pairs it wrote, and the comparisons that its judge saw."""
    tokenizer = thinking_tokenizer({"qwen-3": QWEN_3, "r1": R1}[kind])
    trainer = make(
        model=thinks(tokenizer, {**TABLES[kind], **table}),
        processing_class=tokenizer,
        encoder=ChatEncoder(tokenizer, chat_template_kwargs={"enable_thinking": True}),
        **changes,
    )
    asked: list[Comparison] = []
    compare = Judge.compare

    def seen(judge: Any, comparisons: Any, **arguments: Any) -> Any:
        asked.extend(comparisons)
        return compare(judge, comparisons, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judge, "compare", seen)
        trainer.train()
    files = rollout_files(Path(trainer.args.output_dir))
    pairs = [json.loads(line) for _, f in files for line in f.read_text().splitlines()]
    assert pairs
    return trainer, pairs, asked


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("k", [2, 4])
def test_the_judge_sees_answers_and_lengths_are_theirs(make: Make, kind: str, k: int) -> None:
    trainer, pairs, asked = run(make, kind, {**THOUGHT, **ANSWER}, num_generations=k)
    assert {t for c in asked for t in (c.response_a, c.response_b)} - {"f", "o", ""} <= {
        f"<think>\n{letter * n}" for letter in "he" for n in range(3, 7)
    }
    for pair in pairs:
        for side in ("chosen", "rejected"):
            assert set(pair[f"{side}_thought"]) <= {"h", "e"}
            assert pair[side] in ("f", "o", "")
            assert pair[f"{side}_tokens"] == len(pair[side]) + pair[f"{side}_finished"]
    assert any(pair["decided"] for pair in pairs)
    assert all(0 < n <= 2 for n in history(trainer, "completions/mean_length"))
    assert all(2 <= n <= 6 for n in history(trainer, "completions/thought_length"))
    assert len(history(trainer, "completions/unanswered")) == 2


@pytest.mark.parametrize("kind", TABLES)
def test_thoughts_that_never_end_are_counted_and_not_trained(make: Make, kind: str) -> None:
    endless = {"h": ["e"], "e": ["h", "e"]}
    trainer, pairs, _ = run(make, kind, endless, max_new_tokens=5)
    assert {pair["undecidable_because"] for pair in pairs} == {"no answer after a thought"}
    assert not any(pair["chosen"] or pair["chosen_finished"] for pair in pairs)
    assert set(history(trainer, "judge/undecidable")) == {1.0}
    assert set(history(trainer, "completions/unanswered")) == {1.0}
    assert set(history(trainer, "completions/finished")) == {0.0}
    assert set(history(trainer, "completions/mean_length")) == {0.0}


def thought(value: int) -> Response:
    return Response((7, value, 8, 4), str(value), True, "hm", 3)


ENDLESS = Response((7, 6, 6), "", False, "hm hm", 3, answered=False)


@pytest.mark.parametrize("selection", ["best_worst", "best_random"])
def test_a_response_without_an_answer_is_in_no_pair_that_is_trained(selection: Any) -> None:
    for seed in range(40):
        own = [ENDLESS, thought(5), ENDLESS, thought(2), thought(9)]
        (pair,) = judged_rollouts(ByValue(), [0], [[1]], ["c"], [own], [seed], selection)
        assert pair.decided
        assert pair.chosen.text == "9"
        assert pair.rejected.text in ("2", "5")


def test_all_sampled_ids_are_trained_the_thought_included() -> None:
    own = [thought(5), thought(9)]
    (pair,) = judged_rollouts(ByValue(), [0], [[1, 2]], ["c"], [own], [0])
    batch = preference_batch([(pair.prompt_ids, pair.chosen.ids, pair.rejected.ids, True)], 0)
    assert batch["input_ids"].tolist() == [[1, 2, 7, 9, 8, 4], [1, 2, 7, 5, 8, 4]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 1, 1]] * 2


def test_a_policy_that_does_not_think_logs_no_thoughts(make: Make) -> None:
    trainer = make()
    trainer.train()
    assert not history(trainer, "completions/thought_length")
    assert not history(trainer, "completions/unanswered")
