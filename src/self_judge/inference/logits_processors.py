"""Logits become the next tokens: the sampling settings as logits processors, and seeded noise.

Sampling is an argmax over logits plus Gumbel noise, which each row draws from its own seed. It
knows logits and seeds. It does not know prompts or the model.
"""

# The idea (the Gumbel-max trick): argmax(logits + noise) is a sample from softmax(logits). Each
# seed gives one sample; over many seeds the frequencies are the probabilities.
#
#   logits     2.000   1.000   0.000      softmax               .665 .245 .090
#   seed 3    -0.618  -0.524   0.560      argmax is token 0     over 200,000 seeds
#   seed 4    -1.263   2.644  -0.416      argmax is token 1     .667 .244 .089
#
# The noise depends only on (seed, step, token). A row therefore draws the same tokens in any batch,
# on any number of processes and after a resume, as far as its logits are the same.

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
    """Draws the next token of each row by the settings; see `decoding.TokenSampler`."""

    def __init__(
        self, settings: SamplingSettings, seeds_B: torch.Tensor, padding_B: torch.Tensor
    ) -> None:
        s = settings
        self.penalty = RepetitionPenalty(s.repetition_penalty, padding_B)
        self.gumbel = SeededGumbel(seeds_B)
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
        self.gumbel.seeds_B = self.gumbel.seeds_B[rows]


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """The penalty on a row's own tokens, not on its padding.

    Padding may be the EOS token, and depends on the other prompts in the batch.
    """

    def __init__(self, penalty: float, padding_B: torch.Tensor) -> None:
        super().__init__(penalty)
        self.padding_B = padding_B

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        columns_T = torch.arange(input_ids.size(1), device=input_ids.device)
        padding_BT = columns_T < self.padding_B[:, None]
        # A token counts once, however often it occurs, so padding may repeat the row's last token.
        # Row `_ _ s t` becomes `t t s t`.
        own_BT = torch.where(padding_BT, input_ids[:, -1:], input_ids)
        return super().__call__(own_BT, scores)


class TopP(TopPLogitsWarper):
    """The same nucleus without sorting the vocabulary, which took a tenth of the sampling time.

    If the most likely `likeliest` tokens of some row do not contain its nucleus, all are sorted.
    """

    likeliest = 256

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.device.type != "cpu":  # there sorting is fast, and reading waits for the device
            return super().__call__(input_ids, scores)
        top_BK = scores.topk(min(self.likeliest, scores.size(-1))).values
        p_BK = (top_BK - scores.logsumexp(-1, keepdim=True)).exp()
        before_BK = p_BK.cumsum(-1) - p_BK
        if not bool((before_BK[:, -1] + p_BK[:, -1] >= self.top_p).all()):
            return super().__call__(input_ids, scores)
        least_B1 = top_BK.masked_fill(before_BK >= self.top_p, torch.inf).amin(-1, keepdim=True)
        return scores.masked_fill(scores < least_B1, self.filter_value)


class SeededGumbel(LogitsProcessor):
    """Adds Gumbel noise from each row's own seed: the argmax is then an exact sample.

    The noise is a function of (seed, step, token), so rows need no generator state.
    """

    def __init__(self, seeds_B: torch.Tensor) -> None:
        self.seeds_B = seeds_B
        self.step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = seeded_gumbel(self.seeds_B, self.step, scores.size(-1))
        self.step += 1
        return scores.float() + noise_BV


def seeded_gumbel(seeds_B: torch.Tensor, step: int, size: int) -> torch.Tensor:
    """Standard Gumbel noise by a counter-based generator (splitmix64), shape `(B, size)`, float32.

    Args:
        seeds_B: int64 seeds.
        step: the step; every step of a seed has its own noise.
        size: numbers per row.
    """
    # seed, step, token  ->  64 mixed bits  ->  uniform u in (0, 1)  ->  -log(-log(1 - u))
    # The step stays a scalar on the CPU, so no device waits for it.
    rows_B1 = _mix_(seeds_B[:, None] + _mix_(torch.tensor(step)))
    index_V = torch.arange(size, device=seeds_B.device)
    bits_BV = _mix_(rows_B1 + index_V * -7046029254386353131)  # 2^64 / golden ratio, as int64
    # 32 random bits, centred in their cell: u is never 0, so the noise is finite. The clamp keeps
    # float32 from rounding the largest u to 1. All in place, because every sampling step runs this.
    uniform_BV = bits_BV.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF).float()
    uniform_BV.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    exponential_BV = uniform_BV.neg_().log1p_().neg_()
    return exponential_BV.log_().neg_()


def _mix_(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64, in place, on int64; its products wrap like unsigned ones."""
    x.bitwise_xor_((x >> 30) & 0x3FFFFFFFF).mul_(-4658895280553007687)
    x.bitwise_xor_((x >> 27) & 0x1FFFFFFFFF).mul_(-7723592293110705685)
    return x.bitwise_xor_((x >> 31) & 0x1FFFFFFFF)
