"""Samples rows of different requests in one batch: each with its own settings, end and seed.

This module handles token ids and logits. It does not depend on threads, queues or HTTP.
"""

# `decoding.decode` asks for the next token of every row. A row that must end (its own maximum is
# reached, a stop text was found, its request was abandoned or its deadline has passed) is given a
# stop token, so `decode` removes it from the batch like any finished row:
#
#   step          0  1  2    3
#   row 0 (max 2) A  B  end            the stop token after the maximum is not part of the response
#   row 1         C  D  E    end       the model ended this row itself
#   row 2 (gone)  F  G  end            given up after step 1
#
# A batch pauses for work that waits: all its rows are ended like this, and those that are not
# complete continue in the next batch with their tokens as a part of the prompt. Because that
# computes the prompts again, a batch pauses only after it has run for several times as long.

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from self_judge.config.self_training import SamplingSettings
from self_judge.inference.decoding import decode
from self_judge.inference.logits_processors import SeededTokenSampler
from self_judge.inference.sampling import sampled_response
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.runtime import in_evaluation_mode, to_device
from self_judge.serving.work import Sampling, TokenLogprob

# On a GPU, reading the tokens waits for the device.
_READ_EVERY = 8  # steps
_PAUSE_AFTER = 8  # times the seconds that the batch's prompts took


class Row:
    """One response to sample, and its tokens so far.

    Attributes:
        work, k, seed: the request's responses, the index of this one, and its seed.
        tokens, logprobs: what has been sampled.
        over: whether the row is complete or given up.
    """

    def __init__(self, work: Sampling, k: int, seed: int) -> None:
        self.work, self.k, self.seed = work, k, seed
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.over = False

    @property
    def most(self) -> int:
        return self.work.settings.max_new_tokens

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the next one."""
        return (*self.work.prompt, *self.tokens)

    @property
    def left(self) -> int:
        """The maximum number of tokens that are left to sample."""
        return self.most - len(self.tokens)


def decode_rows(
    model: Any,
    encoder: ChatEncoder,
    stop: Sequence[int],
    rows: Sequence[Row],
    over: Callable[[Row], object],
    pause: Callable[[int], bool],
) -> list[Row]:
    """Samples all rows in one batch; equal prompts are computed once.

    Args:
        stop: the stop tokens.
        over: called as soon as a row is complete (its response is in `work.samples`) or given up.
        pause: returns whether work waits that could join a batch with this number of rows.

    Returns:
        The rows that continue in another batch, because this one has paused.
    """
    of_prompt: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        of_prompt.setdefault(row.prompt, []).append(row)
    ordered = [row for own in of_prompt.values() for row in own]
    pad = encoder.tokenizer.pad_token_id
    draw = _MixedRows(ordered, encoder, stop, next(model.parameters()).device, over, pause)
    with torch.no_grad(), in_evaluation_mode(model):
        decode(
            model,
            list(of_prompt),
            [len(own) for own in of_prompt.values()],
            draw,
            stop=stop,
            pad=stop[0] if pad is None else pad,
            max_new_tokens=max(row.left for row in rows),
        )
    draw.read()
    return [row for row in rows if not row.over]


class _MixedRows:
    """Draws the next token of each row with the settings of its request.

    It implements `decoding.TokenSampler`. A row's token depends only on its own seed, settings and
    logits, so it is the token of `SeededTokenSampler` in any batch.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        encoder: ChatEncoder,
        stop: Sequence[int],
        device: torch.device,
        over: Callable[[Row], object],
        pause: Callable[[int], bool],
    ) -> None:
        self.rows, self.encoder, self.stop, self.device = list(rows), encoder, stop, device
        self.over, self.pause = over, pause
        self.step = 0
        self.started, self.first_read, self.paused = time.monotonic(), 0.0, False
        self.every = 1 if device.type == "cpu" else _READ_EVERY
        self.unread: list[torch.Tensor] = []  # the tokens of the last steps
        self.unread_logprobs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.left = [row.left for row in rows]
        longest = max(len(row.prompt) for row in rows)
        groups: dict[SamplingSettings, list[int]] = {}
        for place, row in enumerate(rows):  # the sampler does not use the maximum length
            groups.setdefault(replace(row.work.settings, max_new_tokens=1), []).append(place)
        self.groups = [
            (
                SeededTokenSampler(
                    settings,
                    self._on_device([rows[place].seed for place in places]),
                    self._on_device([longest - len(rows[place].prompt) for place in places]),
                    self._on_device([len(rows[place].tokens) for place in places]),
                ),
                places,
            )
            for settings, places in groups.items()
        ]
        self.top = max((row.work.top_logprobs or 0 for row in rows), default=0)
        self.scored = any(row.work.top_logprobs is not None for row in rows)
        self._place()

    def _on_device(self, values: Sequence[int]) -> torch.Tensor:
        return to_device(torch.tensor(list(values)), self.device)

    def _place(self) -> None:
        """Updates what depends on which rows are left."""
        self.places = [self._on_device(places) for _, places in self.groups]
        self.left_B = self._on_device(self.left)
        self._end()

    def _end(self) -> None:
        ends = [row.over or self.paused for row in self.rows]
        self.ended_B = to_device(torch.tensor(ends), self.device)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        if len(self.groups) == 1:
            token_B = self.groups[0][0](ids_BT, logits_BV)
        else:
            token_B = ids_BT.new_empty(len(ids_BT))
            for (draw, _), places_B in zip(self.groups, self.places, strict=True):
                token_B[places_B] = draw(ids_BT[places_B], logits_BV[places_B])
        token_B = torch.where(self.ended_B | (self.left_B <= self.step), self.stop[0], token_B)
        if self.scored:
            logprobs_BV = logits_BV.float().log_softmax(-1)
            top = logprobs_BV.topk(max(1, self.top))
            own_B = logprobs_BV.gather(1, token_B[:, None])[:, 0]
            self.unread_logprobs.append((own_B, top.indices, top.values))
        self.unread.append(token_B)
        self.step += 1
        if len(self.unread) == self.every:
            self.read()
        return token_B

    def keep(self, rows: torch.Tensor) -> None:
        self.read()
        left = rows.tolist()
        self.rows = [self.rows[place] for place in left]
        self.left = [self.left[place] for place in left]
        moved = {place: to for to, place in enumerate(left)}
        groups = []
        for draw, places in self.groups:
            stay = [at for at, place in enumerate(places) if place in moved]
            if stay:
                draw.keep(self._on_device(stay))
                groups.append((draw, [moved[places[at]] for at in stay]))
        self.groups = groups
        self._place()

    def read(self) -> None:
        """Reads the tokens of the last steps, and completes or gives up rows."""
        if not self.unread:
            return
        tokens_TB = torch.stack(self.unread).tolist()
        logprobs = [[part.tolist() for part in parts] for parts in self.unread_logprobs]
        self.unread, self.unread_logprobs = [], []
        if self.paused:  # these are the stop tokens that end the batch
            return
        changed = False
        for place, row in enumerate(self.rows):
            if row.over:
                continue
            for step, tokens_B in enumerate(tokens_TB):
                if logprobs and len(row.tokens) < row.most:
                    own_B, ids_BK, values_BK = logprobs[step]
                    top = list(zip(ids_BK[place], values_BK[place], strict=True))
                    top = top[: row.work.top_logprobs]
                    entry = TokenLogprob(tokens_B[place], own_B[place], tuple(top))
                    row.logprobs.append(entry)
                if self._ends(row, tokens_B[place]):
                    break
            if row.over or row.work.given_up():
                row.over = changed = True
                self.over(row)
        self.paused = self._pauses()
        if changed or self.paused:
            self._end()

    def _pauses(self) -> bool:
        now = time.monotonic()
        self.first_read = self.first_read or now
        remaining = sum(not row.over for row in self.rows)
        ran, prompts = now - self.first_read, self.first_read - self.started
        return remaining > 0 and ran >= _PAUSE_AFTER * prompts and self.pause(remaining)

    def _ends(self, row: Row, token: int) -> bool:
        """Adds a token to a row, and returns whether the row is now complete."""
        if len(row.tokens) < row.most:
            row.tokens.append(token)
            row.work.sampled_tokens += 1
        stopped = token in self.stop or len(row.tokens) == row.most or self._has_stop_text(row)
        if stopped:
            row.over = True
            response = sampled_response(row.tokens, self.encoder, row.work.prompt)
            logprobs = None if row.work.top_logprobs is None else row.logprobs
            row.work.complete(row.k, response, logprobs)
        return stopped

    def _has_stop_text(self, row: Row) -> bool:
        if not row.work.stop:
            return False
        # A token has at least one byte, and a character at most four.
        tail = row.tokens[-4 * max(map(len, row.work.stop)) - 4 :]
        text = self.encoder.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in str(text) for stop in row.work.stop)
