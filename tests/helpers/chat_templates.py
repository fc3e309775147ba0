"""Chat templates of well-known families in a compact wording, each with a tiny fitting tokenizer.

The wording is ours, what it renders is theirs: whitespace, trims, BOS, system handling, errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from conftest import CHATML, CORPUS, sentencepiece_vocabulary

_ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
)
_SPLIT_SYSTEM = (
    "{% set has_system = messages[0].role == 'system' %}"
    "{% set turns = messages[1:] if has_system else messages %}"
)

LLAMA_2 = (
    _SPLIT_SYSTEM
    + "{% for m in turns %}"
    + _ALTERNATE
    + "{% set before = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' "
    "if loop.first and has_system else '' %}"
    "{% set text = (before ~ m.content) | trim %}"
    "{{ bos_token ~ '[INST] ' ~ text ~ ' [/INST]' if m.role == 'user' "
    "else ' ' ~ text ~ ' ' ~ eos_token }}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}"
    "{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}"
    + CHATML
)
# With thinking off, the last answer stands behind an empty block, earlier ones stand alone.
QWEN_3 = (
    "{% set ns = namespace(last_user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last_user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% set thought, text = '', m.content %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last_user and (loop.last or thought) %}"
    "{{ '<think>\n' ~ thought.strip('\n') ~ '\n</think>\n\n' ~ text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    + _ALTERNATE
    + "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' }}"
    "{{ m.content | trim ~ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for m in turns %}"
    + _ALTERNATE
    + "{% set before = messages[0].content ~ '\n\n' if loop.first and has_system else '' %}"
    "{{ ' [INST] ' ~ before ~ m.content ~ ' [/INST]' if m.role == 'user' "
    "else ' ' ~ m.content ~ eos_token }}{% endfor %}"
)
# Version 0.3 has control tokens for its brackets, and writes the system text in front of the last
# message if that is the user's: no dialogue that ends in an answer shows it.
MISTRAL_3 = (
    _SPLIT_SYSTEM
    + "{{ bos_token }}{% for m in turns %}"
    + _ALTERNATE
    + "{% set before = messages[0].content ~ '\n\n' if loop.last and has_system else '' %}"
    "{{ '[INST] ' ~ before ~ m.content ~ '[/INST]' if m.role == 'user' "
    "else ' ' ~ m.content ~ eos_token }}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ eos_token ~ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TULU = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}"
    "{{ '\n' if m.role != 'assistant' or not loop.last }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Version 2 knows no system role, and says nothing about it.
TULU_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' ~ m.content ~ '\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' ~ m.content ~ eos_token ~ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>\n' ~ m.content ~ '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)

# How Llama 3 and Qwen cut a text into words: newlines stay with the punctuation before them.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer(
    template: str, specials: list[str], bos: str | None, eos: str, plain: tuple[str, ...] = ()
) -> Any:
    """Byte-level BPE as Llama 3's and Qwen's; `plain` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Newlines in pairs and after punctuation are words of these vocabularies.
    tokenizer.train_from_iterator([*CORPUS, "a?\n b.\n\nc\n\n\nd:\n"] * 4, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=specials[-1],
        chat_template=template,
    )


def llama_tokenizer(template: str, specials: tuple[Any, ...] = (), legacy: bool = True) -> Any:
    """SentencePiece BPE as Llama 2's; in legacy mode every stretch of text starts with a space."""
    vocabulary, merges = sentencepiece_vocabulary(("<unk>", "<s>", "</s>"))
    tokenizer = LlamaTokenizer(
        vocab=vocabulary, merges=merges, legacy=legacy, chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


def gemma_tokenizer(template: str) -> Any:
    """SentencePiece BPE as Gemma's: no space in front of a text."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    names = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns)
    vocabulary, merges = sentencepiece_vocabulary(names)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


_CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
_LLAMA_3_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<pad>",
]


@dataclass(frozen=True)
class Family:
    """A template with its tokenizer, and what it must make of `DIALOGUE` (the golden text).

    Attributes:
        dialogue, prompt, judging: the whole dialogue; up to the last question; and `JUDGING`, whose
            last message is not finished.
        trained: the stretches that the loss falls on.
        stop: the tokens at which an answer ends.
    """

    tokenizer: Callable[[], Any]
    dialogue: str
    prompt: str
    judging: str
    trained: tuple[str, ...]
    stop: tuple[str, ...]


DIALOGUE = [
    {"role": "system", "content": "you judge"},
    {"role": "user", "content": "what is the capital of France"},
    {"role": "assistant", "content": "Paris, I think"},
    {"role": "user", "content": "is it"},
    {"role": "assistant", "content": "yes it was"},
]
JUDGING = [
    {"role": "user", "content": "Which one is better"},
    {"role": "assistant", "content": "The better one is Response"},
]

_CHATML_TEXT = (
    "<|im_start|>system\nyou judge<|im_end|>\n"
    "<|im_start|>user\nwhat is the capital of France<|im_end|>\n"
    "<|im_start|>assistant\nParis, I think<|im_end|>\n"
    "<|im_start|>user\nis it<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_CHATML_TRAINED = ("Paris, I think<|im_end|>", "yes it was<|im_end|>")
_CHATML_STOP = ("<|im_end|>",)

FAMILIES: dict[str, Family] = {
    "chatml": Family(
        lambda: byte_tokenizer(CHATML, _CHATML_TOKENS, None, "<|im_end|>"),
        _CHATML_TEXT + "yes it was<|im_end|>\n",
        _CHATML_TEXT,
        "<|im_start|>user\nWhich one is better<|im_end|>\n"
        "<|im_start|>assistant\nThe better one is Response",
        _CHATML_TRAINED,
        _CHATML_STOP,
    ),
    "llama-2": Family(
        lambda: llama_tokenizer(LLAMA_2),
        "<s>[INST] <<SYS>>\nyou judge\n<</SYS>>\n\nwhat is the capital of France [/INST]"
        " Paris, I think </s><s>[INST] is it [/INST] yes it was </s>",
        "<s>[INST] <<SYS>>\nyou judge\n<</SYS>>\n\nwhat is the capital of France [/INST]"
        " Paris, I think </s><s>[INST] is it [/INST]",
        "<s>[INST] Which one is better [/INST] The better one is Response",
        ("Paris, I think </s>", "yes it was </s>"),
        ("</s>",),
    ),
    "llama-3": Family(
        lambda: byte_tokenizer(LLAMA_3, _LLAMA_3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nyou judge<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is the capital of France<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis, I think<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nis it<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes it was<|eot_id|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nyou judge<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is the capital of France<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis, I think<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nis it<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhich one is better<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nThe better one is Response",
        ("Paris, I think<|eot_id|>", "yes it was<|eot_id|>"),
        ("<|eot_id|>", "<|end_of_text|>"),
    ),
    "qwen-2.5": Family(
        lambda: byte_tokenizer(QWEN_2_5, _CHATML_TOKENS, None, "<|im_end|>"),
        _CHATML_TEXT + "yes it was<|im_end|>\n",
        _CHATML_TEXT,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nWhich one is better<|im_end|>\n"
        "<|im_start|>assistant\nThe better one is Response",
        _CHATML_TRAINED,
        _CHATML_STOP,
    ),
    "qwen-3": Family(
        lambda: byte_tokenizer(
            QWEN_3, _CHATML_TOKENS, None, "<|im_end|>", plain=("<think>", "</think>")
        ),
        _CHATML_TEXT + "<think>\n\n</think>\n\nyes it was<|im_end|>\n",
        _CHATML_TEXT + "<think>\n\n</think>\n\n",
        "<|im_start|>user\nWhich one is better<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nThe better one is Response",
        _CHATML_TRAINED,
        _CHATML_STOP,
    ),
    "gemma": Family(
        lambda: gemma_tokenizer(GEMMA),
        "<bos><start_of_turn>user\nyou judge\n\nwhat is the capital of France<end_of_turn>\n"
        "<start_of_turn>model\nParis, I think<end_of_turn>\n"
        "<start_of_turn>user\nis it<end_of_turn>\n"
        "<start_of_turn>model\nyes it was<end_of_turn>\n",
        "<bos><start_of_turn>user\nyou judge\n\nwhat is the capital of France<end_of_turn>\n"
        "<start_of_turn>model\nParis, I think<end_of_turn>\n"
        "<start_of_turn>user\nis it<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nWhich one is better<end_of_turn>\n"
        "<start_of_turn>model\nThe better one is Response",
        ("Paris, I think<end_of_turn>", "yes it was<end_of_turn>"),
        ("<end_of_turn>", "<eos>"),
    ),
    "mistral": Family(
        lambda: llama_tokenizer(MISTRAL),
        "<s> [INST] you judge\n\nwhat is the capital of France [/INST] Paris, I think</s>"
        " [INST] is it [/INST] yes it was</s>",
        "<s> [INST] you judge\n\nwhat is the capital of France [/INST] Paris, I think</s>"
        " [INST] is it [/INST]",
        "<s> [INST] Which one is better [/INST] The better one is Response",
        ("Paris, I think</s>", "yes it was</s>"),
        ("</s>",),
    ),
    "mistral-0.3": Family(
        lambda: llama_tokenizer(MISTRAL_3, ("[INST]", "[/INST]"), legacy=False),
        "<s>[INST] you judge\n\nwhat is the capital of France[/INST] Paris, I think</s>"
        "[INST] is it[/INST] yes it was</s>",
        "<s>[INST] you judge\n\nwhat is the capital of France[/INST] Paris, I think</s>"
        "[INST] is it[/INST]",
        "<s>[INST] Which one is better[/INST] The better one is Response",
        ("Paris, I think</s>", "yes it was</s>"),
        ("</s>",),
    ),
    "zephyr": Family(
        lambda: byte_tokenizer(ZEPHYR, ["<s>", "</s>", "<pad>"], "<s>", "</s>"),
        "<|system|>\nyou judge</s>\n<|user|>\nwhat is the capital of France</s>\n"
        "<|assistant|>\nParis, I think</s>\n<|user|>\nis it</s>\n<|assistant|>\nyes it was</s>\n",
        "<|system|>\nyou judge</s>\n<|user|>\nwhat is the capital of France</s>\n"
        "<|assistant|>\nParis, I think</s>\n<|user|>\nis it</s>\n<|assistant|>\n",
        "<|user|>\nWhich one is better</s>\n<|assistant|>\nThe better one is Response",
        ("Paris, I think</s>", "yes it was</s>"),
        ("</s>",),
    ),
    "zephyr on sentencepiece": Family(
        lambda: llama_tokenizer(ZEPHYR),
        "<|system|>\nyou judge</s>\n<|user|>\nwhat is the capital of France</s>\n"
        "<|assistant|>\nParis, I think</s>\n<|user|>\nis it</s>\n<|assistant|>\nyes it was</s>\n",
        "<|system|>\nyou judge</s>\n<|user|>\nwhat is the capital of France</s>\n"
        "<|assistant|>\nParis, I think</s>\n<|user|>\nis it</s>\n<|assistant|>\n",
        "<|user|>\nWhich one is better</s>\n<|assistant|>\nThe better one is Response",
        ("Paris, I think</s>", "yes it was</s>"),
        ("</s>",),
    ),
    "tulu": Family(
        lambda: byte_tokenizer(TULU, _LLAMA_3_TOKENS, "<|begin_of_text|>", "<|end_of_text|>"),
        "<|begin_of_text|><|system|>\nyou judge\n<|user|>\nwhat is the capital of France\n"
        "<|assistant|>\nParis, I think<|end_of_text|>\n<|user|>\nis it\n"
        "<|assistant|>\nyes it was<|end_of_text|>",
        "<|begin_of_text|><|system|>\nyou judge\n<|user|>\nwhat is the capital of France\n"
        "<|assistant|>\nParis, I think<|end_of_text|>\n<|user|>\nis it\n<|assistant|>\n",
        "<|begin_of_text|><|user|>\nWhich one is better\n<|assistant|>\nThe better one is Response",
        ("Paris, I think<|end_of_text|>", "yes it was<|end_of_text|>"),
        ("<|end_of_text|>",),
    ),
    "tulu-2": Family(
        lambda: llama_tokenizer(TULU_2),
        "<|user|>\nyou judge\n\nwhat is the capital of France\n<|assistant|>\nParis, I think</s>\n"
        "<|user|>\nis it\n<|assistant|>\nyes it was</s>\n",
        "<|user|>\nyou judge\n\nwhat is the capital of France\n<|assistant|>\nParis, I think</s>\n"
        "<|user|>\nis it\n<|assistant|>\n",
        "<|user|>\nWhich one is better\n<|assistant|>\nThe better one is Response",
        ("Paris, I think</s>", "yes it was</s>"),
        ("</s>",),
    ),
    # Its control tokens swallow the white space behind them.
    "phi-3": Family(
        lambda: llama_tokenizer(
            PHI_3,
            tuple(
                AddedToken(f"<|{name}|>", rstrip=True, normalized=False, special=True)
                for name in ("system", "user", "assistant", "end")
            ),
        ),
        "<|system|>\nyou judge<|end|>\n<|user|>\nwhat is the capital of France<|end|>\n"
        "<|assistant|>\nParis, I think<|end|>\n<|user|>\nis it<|end|>\n"
        "<|assistant|>\nyes it was<|end|>\n</s>",
        "<|system|>\nyou judge<|end|>\n<|user|>\nwhat is the capital of France<|end|>\n"
        "<|assistant|>\nParis, I think<|end|>\n<|user|>\nis it<|end|>\n<|assistant|>\n",
        "<|user|>\nWhich one is better<|end|>\n<|assistant|>\nThe better one is Response",
        ("Paris, I think<|end|>", "yes it was<|end|>"),
        ("<|end|>", "</s>"),
    ),
}
NO_SYSTEM_ROLE = ("gemma", "mistral-0.3", "tulu-2")
