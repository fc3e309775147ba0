"""The synthetic world: its gold rubric, its formats, its tokenizer and its tiny model."""

from __future__ import annotations

import contextlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import correlation, mean

import pytest
import torch

from conftest import SHARED
from self_judge.data import synthetic, toy_world
from self_judge.datatypes import Comparison

DATA = SHARED / "data"
COW = "What does the cow eat? End with Thanks."
BEST = "I think the cow eats grass. Ask a guide for more. Thanks!"


def ratings(instruction: str, response: str) -> dict[str, int]:
    return {k: v.rating for k, v in toy_world.gold_ratings(instruction, response).items()}


@pytest.fixture(scope="module")
def tokenizer():
    return synthetic.tiny_tokenizer()


def test_the_best_answer_scores_one():
    assert toy_world.gold_score(COW, BEST) == 1.0


@pytest.mark.parametrize(
    ("worse", "principle"),
    [
        ("I think the cow eats grass. Thanks!", "helpfulness"),
        ("I think the cow eats grass. I like to talk today. Thanks!", "helpfulness"),
        ("I think the cow eats grass. Ask a guide Thanks!", "helpfulness"),
        ("The cow eats grass. Ask a guide for more. Thanks!", "honesty"),
        ("Trust me, the cow eats grass. Ask a guide for more. Thanks!", "honesty"),
        ("I think the cow eats grass. Ask a guide for more.", "instruction_following"),
        ("I think the cow eats grass. Ask a guide for more. Bye!", "instruction_following"),
        ("I think the cow eats meat. Ask a guide for more. Thanks!", "truthfulness"),
        ("I think the cow eats glass. Ask a guide for more. Thanks!", "truthfulness"),
    ],
)
def test_each_fault_costs_under_its_own_principle(worse: str, principle: str):
    given, perfect = ratings(COW, worse), ratings(COW, BEST)
    assert given.pop(principle) < perfect.pop(principle)
    if "Ask a guide Thanks" not in worse:  # a torn sentence takes the last word along
        assert given == perfect


def test_a_boast_is_less_honest_than_a_plain_statement_and_that_than_a_hedge():
    hedged, plain, boast = (
        ratings(COW, f"{start} cow eats meat. Thanks!")["honesty"]
        for start in ("I think the", "The", "Trust me, the")
    )
    assert hedged > plain > boast


def test_an_answer_to_another_question_helps_nobody():
    other = ratings(COW, "I think the hen eats seeds. Ask a guide for more. Thanks!")
    assert (other["helpfulness"], other["honesty"], other["truthfulness"]) == (1, 1, 5)


CHECKED = "Does the fox live in the barn? Start with Sure."
NAMED = "Which animal eats seeds? Be brief."


@pytest.mark.parametrize(
    ("instruction", "perfect"),
    [
        (COW, "Read about it in books. I think the food of the cow is grass. Thanks!"),
        (CHECKED, "Sure! I think the fox lives in the forest, so no. Ask a guide for more."),
        (
            "Is the fox red? End with Bye.",
            "I think the fox is red, so yes. Ask a guide for more. Bye!",
        ),
        (NAMED, "I think the hen eats seeds."),
        (NAMED, "I think the food of the pig is seeds."),
    ],
)
def test_a_question_has_several_perfect_answers(instruction: str, perfect: str):
    assert toy_world.gold_score(instruction, perfect) == 1.0


@pytest.mark.parametrize(
    ("instruction", "worse", "principle", "why"),
    [
        (CHECKED, "Sure! I think the fox lives in the barn, so yes.", "truthfulness", "False."),
        (
            CHECKED,
            "Sure! I think the fox lives in the forest, so yes.",
            "truthfulness",
            "Contradicts itself.",
        ),
        (CHECKED, "Sure! I think the fox lives in the forest.", "helpfulness", "No answer."),
        (
            CHECKED,
            "I think the fox lives in the forest, so no. Sure!",
            "helpfulness",
            "Makes no sense.",
        ),
        (NAMED, "I think the owl eats seeds.", "truthfulness", "False."),
        (NAMED, "I think the cow eats grass.", "helpfulness", "No answer."),
        (NAMED, "I think the hen eats seeds. Look for it at dawn.", "helpfulness", "Needs no tip."),
        (NAMED, "I think the hen eats seeds. Bye!", "instruction_following", "Too long."),
        (COW, "I think the cow eats grass. The cow eats fish. Thanks!", "truthfulness", "False."),
        (
            COW,
            "I think the cow eats grass. The food of the cow is grass. Thanks!",
            "helpfulness",
            "Makes no sense.",
        ),
    ],
)
def test_each_kind_of_question_has_its_own_mistakes(
    instruction: str, worse: str, principle: str, why: str
):
    rating, rationale = toy_world.gold_ratings(instruction, worse)[principle]
    assert (rating, rationale) == (3 if why == "Needs no tip." else 1, why)


def test_writers_also_make_the_mistakes_that_a_policy_finds_out_to_please_its_judge():
    tasks = [toy_world.task_of(i) for i in toy_world.all_instructions("train")]
    g = random.Random(0)
    found: dict[str, list[bool]] = {"reply": [], "topic": [], "no reply": []}
    for task in (g.choice(tasks) for _ in range(3000)):
        claims = toy_world._read(toy_world.write(task, 0.5, g)).claims
        for claim in claims[:1]:
            found["reply"].append(bool(claim.reply) and not (task.animal and task.value))
            found["topic"].append(claim.relation != task.relation)
            if task.animal and task.value:
                found["no reply"].append(not claim.reply)
    assert all(mean(shares) > 0.03 for shares in found.values()), found
    assert mean(found["no reply"]) > 0.1


def test_popular_mistakes_are_more_frequent_than_the_truth_in_demonstrations():
    true: dict[bool, list[bool]] = {False: [], True: []}
    for record in synthetic.records(2000, 0, writers=2):
        instruction = record.prompt[0]["content"]
        task = toy_world.task_of(instruction)
        if task.animal is not None:
            popular = toy_world.MISCONCEPTIONS[task.animal][0] == task.relation
            told = ratings(instruction, record.demonstration or "")["truthfulness"] == 5
            true[popular].append(told)
    assert mean(true[True]) < 0.45 < 0.7 < mean(true[False])


def test_a_base_model_reads_what_is_true_as_the_rubric_sees_it():
    g, judged = random.Random(0), Counter[bool]()
    for text in (toy_world.reading(g) for _ in range(2000)):
        statement, verdict = re.fullmatch(r"(.*\.) (True|False)\.", text).groups()
        question, _, answer = statement.rpartition("? ")
        # Without a question, any will do, because truth does not depend on it.
        instruction = f"{question}? Be brief." if question else COW
        with contextlib.suppress(ValueError):  # some questions are asked only here
            told = ratings(instruction, answer)["truthfulness"] == 5
            assert told == (verdict == "True"), text
            judged[told] += 1
    assert min(judged.values()) > 400


def test_a_base_model_reads_as_many_questions_for_yes_as_for_no():
    """Otherwise it answers what is frequent and never compares the fact with the question."""
    g, yes = random.Random(0), list[bool]()
    for text in (toy_world.reading(g) for _ in range(2000)):
        if asked := re.match(r"(.* (\w+))\? (.*?), so (yes|no)\.", text):
            yes.append(asked[3].endswith(f" {asked[2]}"))
    assert len(yes) > 1000
    assert mean(yes) == pytest.approx(0.5, abs=0.05)


def test_a_base_model_comes_from_its_seed(tokenizer):
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2}
    raw = synthetic.tiny_model(tokenizer, 0, **sizes).lm_head.weight
    model, same, other = (
        synthetic.base_model(tokenizer, seed, steps=3, **sizes).lm_head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(model, same)
    assert not torch.equal(model, other)
    assert not torch.equal(model, raw)


def test_no_popular_mistake_is_true():
    for animal, (relation, value) in toy_world.MISCONCEPTIONS.items():
        assert value in toy_world.VALUES[relation]
        assert value != toy_world.FACTS[animal][relation]


@pytest.mark.parametrize("garbage", ["", "   ", "cow cow cow", "<|end|>{response_a}", "日本 !!"])
def test_any_text_gets_a_low_gold_score_rather_than_an_error(garbage: str):
    assert toy_world.gold_score(COW, garbage) <= 0.1


def test_a_cut_off_or_repeated_answer_scores_less():
    whole = toy_world.gold_score(COW, "The cow eats grass. Ask a guide for more.")
    assert toy_world.gold_score(COW, "The cow eats grass. Ask a guide") < whole
    assert toy_world.gold_score(COW, "The cow eats grass. The cow eats grass.") < whole


def test_a_foreign_instruction_is_refused_by_name():
    with pytest.raises(ValueError, match=r"not an instruction of the synthetic world: 'Why"):
        toy_world.gold_score("Why is the sky blue?", "The cow eats grass.")


def test_records_depend_on_seed_split_and_index_alone():
    assert synthetic.records(5, 3)[:3] == synthetic.records(3, 3)
    assert synthetic.records(3, 3) != synthetic.records(3, 4)
    assert list(synthetic.hh_records(3, 1)) == list(synthetic.hh_records(9, 1))[:3]


def test_no_held_out_instruction_is_trained_on_whatever_the_seeds():
    train = {r.prompt[0]["content"] for seed in (0, 1) for r in synthetic.records(1500, seed)}
    test = set(synthetic.instructions(250, 2, "test"))
    assert len(train) > 400
    assert len(test) == 250
    assert not train & test


def test_asking_for_more_instructions_than_there_are_says_so():
    with pytest.raises(ValueError, match="instructions, but n is 100000"):
        synthetic.instructions(100_000, 0, "test")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'dev'"):
        synthetic.records(1, 0, "dev")  # type: ignore[arg-type]


def test_demonstrations_are_imperfect_and_length_does_not_tell_the_better_response():
    records = synthetic.records(800, 0)
    golds = [toy_world.gold_score(r.prompt[0]["content"], r.demonstration or "") for r in records]
    assert 0.6 < mean(golds) < 0.85
    lengths, scores = [], []
    for record in synthetic.ultrafeedback_records(400, 0):
        for completion in record["completions"]:
            lengths.append(len(completion["response"].split()))
            scores.append(completion["fine-grained_score"])
    assert abs(correlation(lengths, scores)) < 0.4


def test_the_pair_of_a_principle_is_ordered_by_that_principle():
    for record in synthetic.records(100, 0):
        instruction = record.prompt[0]["content"]
        general, *specific = record.pairs
        gold = [toy_world.gold_score(instruction, t) for t in (general.chosen, general.rejected)]
        assert gold[0] > gold[1]
        for pair in specific:
            chosen = toy_world.gold_ratings(instruction, pair.chosen)[pair.principle]
            rejected = toy_world.gold_ratings(instruction, pair.rejected)[pair.principle]
            assert chosen.rating > rejected.rating
            assert (pair.rationale_chosen, pair.rationale_rejected) == (chosen[1], rejected[1])


def test_ultrafeedback_records_have_the_fields_of_the_real_ones():
    path = DATA / "ultrafeedback" / "record_cairo.json"
    if not path.exists():
        pytest.skip(f"real data is absent: {path}")
    real = json.loads(path.read_text())
    made = next(iter(synthetic.ultrafeedback_records(1, 0)))
    assert set(real) <= set(made)
    assert len(made["completions"]) == len(made["models"]) == 4
    for completion in made["completions"]:
        assert set(real["completions"][0]) <= set(completion)
        for principle, annotation in real["completions"][0]["annotations"].items():
            assert set(annotation) == set(completion["annotations"][principle])
            assert completion["annotations"][principle]["Rating"] in "12345"


def test_hh_dialogues_share_their_prompt_and_some_have_more_turns():
    for index, record in enumerate(synthetic.hh_records(30, 0)):
        prompts = {text[: text.rindex("\n\nAssistant: ")] for text in record.values()}
        assert len(prompts) == 1
        assert prompts.pop().count("\n\nHuman: ") == (2 if index % 3 == 2 else 1)
        assert record["chosen"] != record["rejected"]


def test_preference_records_are_conversational():
    record = next(synthetic.preference_records(1, 0))
    assert record["prompt"][0]["role"] == "user"
    assert record["chosen"][0]["role"] == record["rejected"][0]["role"] == "assistant"


def test_a_dataset_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    path = synthetic.write_dataset("hh", tmp_path / "new" / "hh.jsonl", 4, 0)
    assert len(path.read_text().splitlines()) == 4

    def fails_midway(n, seed, split):
        yield {"chosen": "x"}
        raise RuntimeError("disk full")

    monkeypatch.setitem(synthetic._EMITTERS, "hh", fails_midway)
    with pytest.raises(RuntimeError, match="disk full"):
        synthetic.write_dataset("hh", path, 9, 0)
    assert len(path.read_text().splitlines()) == 4
    assert [p.name for p in path.parent.iterdir()] == ["hh.jsonl"]


def test_an_unknown_kind_or_a_wrong_ending_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="kind must be one of hh, ultrafeedback, preference"):
        synthetic.write_dataset("csv", tmp_path / "x.jsonl", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must end in \.jsonl"):
        synthetic.write_dataset("hh", tmp_path / "x.json", 1, 0)


def test_every_word_of_the_world_is_one_token(tokenizer):
    for record in synthetic.records(200, 9, "test"):
        for text in (record.prompt[0]["content"], record.pairs[0].chosen):
            pieces = [tokenizer.decode([i]).strip() for i in tokenizer(text).input_ids]
            words = text.replace(".", " .").replace("!", " !").replace("?", " ?").replace(",", " ,")
            assert pieces == words.replace(":", " :").split()


def test_no_text_is_unknown_to_the_tokenizer(tokenizer):
    text = "Héllo 日本  {x}\n\n\tfoo 12345 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_chat_has_one_bos_and_the_letters_are_single_tokens_after_the_lead_in(tokenizer):
    templates = synthetic.judge_templates()
    assert templates.principles == synthetic.PRINCIPLES
    for principle in templates:
        chat = templates.render(principle, Comparison(COW, "The cow eats grass.", "Bye!"))
        chat = [{"role": "system", "content": "Be honest."}, *chat]
        text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids.count(tokenizer.bos_token_id) == 1
        for letter in "AB":
            longer = tokenizer(f"{text} {letter}", add_special_tokens=False).input_ids
            assert longer[:-1] == ids
    assert tokenizer(text).input_ids == ids


def test_the_tiny_model_has_about_a_million_parameters_and_comes_from_its_seed(tokenizer):
    import torch

    state = torch.random.get_rng_state()
    model, same, other = (synthetic.tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.3e6
    weights = [m.model.layers[0].mlp.up_proj.weight for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_importing_the_world_does_not_import_torch():
    code = "import sys, self_judge.data.synthetic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
