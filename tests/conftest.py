"""Tiny tokenizers and models, built here: nothing is downloaded, nothing takes a second.

`SELF_JUDGE_TEST_DEVICE=cuda` has them stand, train and judge on the GPU; tests marked `cpu` are
skipped there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("SELF_JUDGE_TEST_DEVICE", "cpu")
os.environ.setdefault("ACCELERATE_USE_CPU", str(os.environ["SELF_JUDGE_TEST_DEVICE"] == "cpu"))

import pytest
import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from self_judge import ChatEncoder, JudgeTemplates
from self_judge.data import synthetic
from self_judge.prompting.judge_json import save_judge_settings

settings.register_profile("brief", max_examples=10, deadline=None)
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
torch.set_num_threads(1)  # tiny models: threads cost more than they give

DEVICE = os.environ["SELF_JUDGE_TEST_DEVICE"]
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE != "cpu":
        skip = pytest.mark.skip(reason=f"about the CPU, and these tests run on {DEVICE}")
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(skip)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "Response A: yes\n\nResponse B: no\n\nWhich one is better? The better one is Response A",
    "Human: what is the capital of France?\n\nAssistant: Paris, I think. Response B",
    "system user assistant context helpful honest the a of and to in is you that it he was for",
    "[INST] <<SYS>> {braces} (round) 0123456789",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz",
] * 4
SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]

TEMPLATES = {
    "helpful": {
        "user": "{context}\n\nResponse A: {response_a}\n\nResponse B: {response_b}\n\n"
        "Which one is better?",
        "assistant": "The better one is Response",
    },
    "honest": {
        "system": "you judge",
        "user": "Q: {context}\n\nA: {response_a}\n\nB: {response_b}\n\nWhich one is honest?",
        "assistant": "The honest one is Response",
    },
}


def byte_bpe(vocab_size: int = 600) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_vocabulary(
    specials: Sequence[str] = ("<unk>", *SPECIALS),
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece trains them: spaces as U+2581, none inside a token."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # As SentencePiece does: digits apart, brackets and colons apart from words.
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), behavior="isolated"),
        ]
    )
    alphabet = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*specials, *alphabet],
        initial_alphabet=[chr(c) for c in range(33, 127)],
        show_progress=False,
    )
    lines = [line for text in CORPUS for line in text.split("\n") if line]
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    # SentencePiece joins runs of spaces, at any place, before anything else.
    vocabulary = model["vocab"]
    for run in ("▁▁", "▁▁▁▁"):
        vocabulary.setdefault(run, len(vocabulary))
    return vocabulary, [("▁", "▁"), ("▁▁", "▁▁"), *merges]


def sentencepiece_bpe() -> Tokenizer:
    """As Llama 2's file: a space in front of the text, spaces as U+2581, bytes for the unknown."""
    vocabulary, merges = sentencepiece_vocabulary()
    model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=[*SPECIALS, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *map(chr, range(32, 127))], trainer)
    return tokenizer


def wrap(tokenizer: Tokenizer, chat_template: str | None = CHATML, **kwargs: Any) -> Any:
    if tokenizer.token_to_id("<unk>") is not None:
        kwargs.setdefault("unk_token", "<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>" if chat_template == CHATML else "</s>",
        pad_token="<pad>",
        chat_template=chat_template,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **kwargs,
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return wrap(byte_bpe())


@pytest.fixture
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


@pytest.fixture
def templates() -> JudgeTemplates:
    return JudgeTemplates(TEMPLATES)


def on_test_device(model: Any) -> Any:
    """The model on `SELF_JUDGE_TEST_DEVICE`; what a test calls it with goes to `model.device`."""
    return model.to(DEVICE)


def placed(batch: dict[str, Any]) -> dict[str, Any]:
    """A collator's batch on `SELF_JUDGE_TEST_DEVICE`, where a trainer would put it."""
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """What follows, `(V,)` on the CPU."""
    logits_BTV = model(torch.tensor([ids], device=model.device)).logits
    return logits_BTV[0, -1].cpu()


def tiny_llama(vocabulary: int, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # far from uniform: mistakes show
        **changes,
    }
    return on_test_device(LlamaForCausalLM(LlamaConfig(**settings)).eval())


@pytest.fixture
def model(tokenizer: Any) -> LlamaForCausalLM:
    return tiny_llama(len(tokenizer))


def saved_as_judge(folder: Path) -> Path:
    """Saves a tiny model as JSFT does."""
    tokenizer = wrap(byte_bpe())
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    encoder, templates = ChatEncoder(tokenizer), JudgeTemplates(TEMPLATES)
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    return folder


@pytest.fixture
def saved_judge(tmp_path: Path) -> Path:
    """A model trained with JSFT, as a folder."""
    return saved_as_judge(tmp_path / "judge")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model and its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = synthetic.tiny_tokenizer()
    tiny_llama(len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the synthetic world, by their format."""
    folder = tmp_path_factory.mktemp("data")
    return {
        kind: synthetic.write_dataset(kind, folder / f"{kind}.jsonl", 40, seed=3)
        for kind in ("hh", "ultrafeedback", "preference")
    }


@pytest.fixture
def queries() -> list[dict[str, Any]]:
    """Conversational prompts with a given pair, as a dataset's rows."""
    return [
        {
            "prompt": [{"role": "user", "content": f"what is {i} and the capital of France?"}],
            "chosen": [{"role": "assistant", "content": "Paris, I think."}],
            "rejected": [{"role": "assistant", "content": f"no {i}"}],
        }
        for i in range(8)
    ]


Make = Callable[..., Any]  # gives a SelfJudgeTrainer
SMALL = {
    "per_device_train_batch_size": 4,
    "max_new_tokens": 6,
    "max_length": 256,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "bf16": False,  # what TRL takes on a GPU
}


@pytest.fixture
def make(tmp_path: Path, tokenizer: Any, model: Any, queries: list[dict[str, Any]]) -> Make:
    """Builds a SelfJudgeTrainer on the tiny model, by arguments of it or of its configuration."""
    # Here, since few tests need what it takes seconds to import.
    from datasets import Dataset

    from self_judge import SelfJudgeConfig, SelfJudgeTrainer

    def build(**changes: Any) -> SelfJudgeTrainer:
        settings = {"output_dir": str(tmp_path / "run"), "max_steps": 2, **SMALL}
        trainer_arguments = {
            key: changes.pop(key)
            for key in list(changes)
            if key not in SelfJudgeConfig.__dataclass_fields__
        }
        return SelfJudgeTrainer(
            **{
                "model": model,
                "args": SelfJudgeConfig(**{**settings, **changes}),
                "processing_class": tokenizer,
                "train_dataset": Dataset.from_list(queries),
                "judge_templates": TEMPLATES,
                **trainer_arguments,
            }
        )

    return build


@pytest.fixture
def place(
    tmp_path: Path,
    base: Path,
    saved_judge: Path,
    data: dict[str, Path],
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Where the mistakes of `bad_input` are made."""
    from bad_input import Place

    folder = tmp_path / "here"
    folder.mkdir()
    return Place(folder, base, saved_judge, data, make, monkeypatch)


def history(trainer: Any, key: str) -> list[float]:
    """What was logged under a name, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of parameters are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo in small: JSFT, self-training, labeled verdicts, tournaments."""
    from rich.console import Console

    from self_judge.commands.demo.run import run_demo
    from self_judge.commands.demo.steps import DemoSettings

    folder = tmp_path_factory.mktemp("report") / "demo"
    settings = DemoSettings(
        base_steps=2,
        jsft_records=60,
        prompts_per_step=4,
        steps=3,
        max_new_tokens=6,
        held_out_pairs=40,
        held_out_prompts=5,
    )
    run_demo(3, folder, settings, Console(quiet=True))
    return folder
