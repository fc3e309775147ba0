"""Samples the next tokens from logits, using logits processors and seeded noise.

The sampled token is the argmax of the logits plus Gumbel noise, which is generated from the seed of
each row. This module does not depend on prompts or the model.
"""

# This is the Gumbel-max trick: argmax(logits + noise) is a sample from softmax(logits). Each seed
# gives one sample. Over many seeds, the frequencies approach the probabilities.
#
#   logits     2.000   1.000   0.000      softmax               .665 .245 .090
#   seed 3    -0.618  -0.524   0.560      argmax is token 0     over 200,000 seeds
#   seed 4    -1.263   2.644  -0.416      argmax is token 1     .667 .244 .089
#
# The noise depends only on (seed, step, token). A row with the same logits therefore gets the same
# tokens in any batch, on any number of processes and after a resume.

from __future__ import annotations

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from self_judge.config.self_training import SamplingSettings


class SeededTokenSampler:
    """Draws the next token for each row with the given settings; see `decoding.TokenSampler`.

    Args:
        begun_B: the number of tokens that each row sampled earlier, if it is continued.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        seeds_B: torch.Tensor,
        padding_B: torch.Tensor,
        begun_B: torch.Tensor | None = None,
    ) -> None:
        s = settings
        self.penalty = RepetitionPenalty(s.repetition_penalty, padding_B)
        self.gumbel = SeededGumbel(seeds_B, begun_B)
        self.processors = LogitsProcessorList()
        if s.repetition_penalty != 1.0:
            self.processors.append(self.penalty)
        if s.temperature == 0:
            return
        if s.temperature != 1.0:
            self.processors.append(TemperatureLogitsWarper(s.temperature))
        if s.top_k:
            self.processors.append(TopKLogitsWarper(s.top_k))
        if s.top_p < 1.0:
            self.processors.append(TopP(s.top_p))
        if s.min_p > 0.0:
            self.processors.append(MinPLogitsWarper(s.min_p))
        self.processors.append(self.gumbel)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        return self.processors(ids_BT, logits_BV.float()).argmax(-1)  # type: ignore[arg-type]

    def keep(self, rows: torch.Tensor) -> None:
        self.penalty.padding_B = self.penalty.padding_B[rows]
        self.gumbel.keep(rows)


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """Applies the repetition penalty to the tokens of a row, but not to its padding.

    Padding may be the EOS token, and its length depends on the other prompts in the batch.
    """

    def __init__(self, penalty: float, padding_B: torch.Tensor) -> None:
        super().__init__(penalty)
        self.padding_B = padding_B

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        columns_T = torch.arange(input_ids.size(1), device=input_ids.device)
        padding_BT = columns_T < self.padding_B[:, None]
        # Repeated tokens count only once, so padding can be replaced with the last token in the
        # row. Row `_ _ s t` becomes `t t s t`.
        own_BT = torch.where(padding_BT, input_ids[:, -1:], input_ids)
        return super().__call__(own_BT, scores)


class TopP(TopPLogitsWarper):
    """Computes the nucleus without sorting, because sorting took a tenth of the sampling time.

    If the nucleus of any row has more than `likeliest` tokens, all tokens are sorted after all.
    """

    likeliest = 256

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type != "cpu":  # GPUs sort fast, and the check below would wait for them
            return super().__call__(input_ids, scores)
        top_BK = scores.topk(min(self.likeliest, scores.size(-1))).values
        p_BK = (top_BK - scores.logsumexp(-1, keepdim=True)).exp()
        before_BK = p_BK.cumsum(-1) - p_BK
        if not bool((before_BK[:, -1] + p_BK[:, -1] >= self.top_p).all()):
            return super().__call__(input_ids, scores)
        least_B1 = top_BK.masked_fill(before_BK >= self.top_p, torch.inf).amin(-1, keepdim=True)
        return scores.masked_fill(scores < least_B1, self.filter_value)


class SeededGumbel(LogitsProcessor):
    """Adds Gumbel noise from the seed of each row, so that the argmax is an exact sample.

    The noise is a function of (seed, step, token), so rows do not need a generator state.
    """

    def __init__(self, seeds_B: torch.Tensor, begun_B: torch.Tensor | None = None) -> None:
        self.seeds_B, self.begun_B = seeds_B, begun_B
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = self.step if self.begun_B is None else self.begun_B[:, None] + self.step
        noise_BV = seeded_gumbel(self.seeds_B, step, scores.size(-1))
        self.step += 1
        return scores.float() + noise_BV

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps the given rows and drops all others."""
        self.seeds_B = self.seeds_B[rows]
        self.begun_B = None if self.begun_B is None else self.begun_B[rows]


def seeded_gumbel(seeds_B: torch.Tensor, step: int | torch.Tensor, size: int) -> torch.Tensor:
    """Generates float32 Gumbel noise `(B, size)` with a counter-based generator (splitmix64).

    Args:
        seeds_B: the int64 seeds.
        step: the index of the decoding step, or that of each row `(B, 1)`. The noise is different
            at every step.
        size: the number of values per row.
    """
    # seed, step, token  ->  64 mixed bits  ->  uniform u in (0, 1)  ->  -log(-log(1 - u))
    # The step remains a CPU scalar, which avoids a synchronization with the device.
    steps = step.clone() if isinstance(step, torch.Tensor) else torch.tensor(step)
    rows_B1 = _mix_(seeds_B[:, None] + _mix_(steps))
    index_V = torch.arange(size, device=seeds_B.device)
    bits_BV = _mix_(rows_B1 + index_V * -7046029254386353131)  # 2^64 / golden ratio, as int64
    # Adding 0.5 centers the 32-bit integer in its interval, so u is never 0 and the noise is
    # finite. The clamp prevents float32 from rounding the largest u to 1. All operations are in
    # place, because every sampling step runs this code.
    uniform_BV = bits_BV.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).float()
    uniform_BV.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    exponential_BV = uniform_BV.neg_().log1p_().neg_()
    return exponential_BV.log_().neg_()


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """Applies the finalizer of splitmix64 in place; int64 products wrap like unsigned products."""
    x.bitwise_xor_((x >> 30) & 0x3FFFFFFFF).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & 0x1FFFFFFFFF).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & 0x1FFFFFFFF)
