"""Thinking models in small: templates of Qwen 3's and DeepSeek-R1's kind, and a model that thinks.

The markers are added tokens, special tokens, or ordinary text over several tokens.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import LlamaForCausalLM

from conftest import byte_bpe, on_test_device, tiny_llama, wrap

_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# With thinking off the prompt holds an empty thought; with thinking on the model opens it.
QWEN_3 = (
    _TURNS + "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}" + "{% endif %}"
)
R1 = _TURNS + "<think>\n{% endif %}"  # the prompt opens the thought

MARKERS = ("<think>", "</think>")


def thinking_tokenizer(template: str, markers: str = "added") -> Any:
    """A tokenizer whose thought markers are `added`, `special` or `text`."""
    bpe = byte_bpe()
    if markers != "text":
        bpe.add_tokens([AddedToken(m, normalized=False, special=False) for m in MARKERS])
    tokenizer = wrap(bpe, template)
    tokenizer.eos_token = "<|im_end|>"
    if markers == "special":
        turns = ["<|im_start|>", "<|im_end|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": [*turns, *MARKERS]})
    return tokenizer


class Thinks(LlamaForCausalLM):
    """A model that writes what a table of next tokens allows; behind other tokens it is itself."""

    allowed: dict[int, list[int]]

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, **kwargs)
        for b in range(output.logits.shape[0]):
            following = self.allowed.get(int(input_ids[b, -1]))
            if following:
                row = output.logits[b, -1].clone()
                output.logits[b, -1] = -1e4
                output.logits[b, -1, following] = row[following].clamp(-1, 1)
        return output


def thinks(tokenizer: Any, table: dict[str, list[str]], seed: int = 0) -> Thinks:
    """A model that follows a table of tokens, such as `{"<think>": ["a", "b"]}`."""
    ids = tokenizer.convert_tokens_to_ids
    like = tiny_llama(len(tokenizer), seed)
    model = Thinks(like.config).eval()
    model.load_state_dict(like.state_dict())
    model.allowed = {ids(last): [ids(t) for t in following] for last, following in table.items()}
    return on_test_device(model)
