"""Judges that think first: what they think about, where it stands, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from judge_pairs import ASKED, PAIRS
from self_judge import ChatEncoder, Judge
from self_judge.config.self_training import SamplingSettings
from self_judge.inference.sampling import TransformersSampler
from self_judge.inference.thinking import ROOM, ThinkingScorer


def test_the_letter_is_read_after_the_thought_in_both_orders(
    model: Any, encoder: ChatEncoder
) -> None:
    judge = Judge(model, encoder, ASKED, thought_tokens=7)
    (verdict,) = judge.compare(PAIRS[:1])
    sampler = TransformersSampler(model, encoder, SamplingSettings(7, temperature=0.0))
    letters = list(judge.letter_ids)
    for principle, orders in zip(judge.templates, verdict.probabilities, strict=True):
        for pair, found in zip((PAIRS[0], PAIRS[0].swapped()), orders, strict=True):
            *asked, lead_in = judge.templates.render(principle, pair)
            question = encoder.encode_prompt(asked)
            ((thought,),) = sampler.sample([question], 1, [0])
            kept = [i for i in thought.ids if i not in encoder.stop_token_ids]
            whole = [*question, *kept, *encoder.encode_content(f"\n\n{lead_in['content']}")]
            with torch.no_grad():
                row = model(torch.tensor([whole])).logits[0, -1].softmax(-1)
            assert row[letters].tolist() == pytest.approx(list(found), abs=1e-5)


def test_thoughts_are_counted_and_bounded(model: Any, encoder: ChatEncoder) -> None:
    judge = Judge(model, encoder, ASKED, thought_tokens=3)
    assert judge.thought_tokens == 0
    judge.compare(PAIRS)
    assert 0 < judge.thought_tokens <= len(PAIRS) * 2 * 2 * 3
    assert judge.max_length == 512 - 3 - ROOM
    assert Judge(model, encoder, ASKED).thought_tokens == 0


def test_a_thought_that_is_cut_is_closed_before_the_lead_in(encoder: ChatEncoder) -> None:
    seen: list[Any] = []

    class Seen:
        max_length = None

        def letter_probabilities(self, prompts: Any, letters: Any, done: Any) -> torch.Tensor:
            seen.extend(map(encoder.tokenizer.decode, prompts))
            return torch.full((len(prompts), 2), 0.5)

    class Thinks:
        def sample(self, prompts: Any, n: int, seeds: Any, **_: Any) -> Any:
            from self_judge import Response

            ids = tuple(encoder.encode_content("<think>\nParis is right, and"))
            return [[Response(ids, "", False)] for _ in prompts]

    judge = Judge(Seen(), encoder, ASKED)
    scorer = ThinkingScorer(Seen(), Thinks(), encoder, 9)  # type: ignore[arg-type]
    from self_judge.prompting.judge_prompt import WithThought

    prompt = WithThought(encoder).encode_open(judge.templates.render("helpful", PAIRS[0]))
    scorer.letter_probabilities([prompt], judge.letter_ids, lambda n: None)
    assert "Paris is right, and\n</think>\n\nThe more helpful is Response" in seen[0]


def test_a_scorer_that_samples_nothing_cannot_think(encoder: ChatEncoder) -> None:
    class Scores:
        max_length = None

        def letter_probabilities(self, *_: Any) -> torch.Tensor:
            raise NotImplementedError

    with pytest.raises(ValueError, match="a Scores cannot think"):
        Judge(Scores(), encoder, ASKED, thought_tokens=3)
