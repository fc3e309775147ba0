"""A real model: what JSFT teaches SmolLM2-135M-Instruct to judge, and what it learns from itself.

The data is HH-helpful. JSFT takes the first records of a seed's order, and an independent judge
learns from as many of the last ones. The policy never sees this judge, which decides who wins.
"""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig, RewardTrainer, SFTConfig

from self_judge.commands.demo import steps
from self_judge.commands.train import jsft_trainer, save_jsft
from self_judge.config.schema import load_run
from self_judge.config.self_training import SamplingSettings
from self_judge.data import synthetic
from self_judge.data.records import first_question, judge_context
from self_judge.data.sources import load_preferences
from self_judge.datatypes import Comparison, PreferenceRecord, Response, stable_seed
from self_judge.evaluation.statistics import judge_quality, labeled_comparisons
from self_judge.inference.sampling import TransformersSampler
from self_judge.judging.judge import Judge
from self_judge.judging.tournament import tournament_rejection_sampling
from self_judge.models import load_model, load_tokenizer
from self_judge.prompting.chat_encoder import ChatEncoder
from self_judge.storage.jsonl import read_lines
from self_judge.storage.run_dir import METRICS
from self_judge.training.self_training.config import SelfJudgeConfig
from self_judge.training.self_training.trainer import SelfJudgeTrainer
from self_judge.training.setup import prompt_rows
from study import Study
from world import code_hash, larger, preference_dataset, rewarded, right, train

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
LEARNED, HELD_OUT = ("base_train", "online_train", "rs_train"), "base_test_1000"
PRIOR_WEIGHTS = (0.0, 5.0)  # of the mean log π per token of the JSFT model


@dataclass(frozen=True)
class Settings:
    """Sizes and hyperparameters.

    Attributes:
        records: the number of records for JSFT.
        moved: records that are moved to the held-out ones, so that these have 1,000 pairs.
        batch, rows: examples per optimizer step, and per forward pass.
        prompts: held-out prompts that policies answer.
    """

    model: Path | None = SHARED / "tools" / "smollm2.py"  # `None`: a tiny model and synthetic data
    data: Path = SHARED / "data" / "hh-rlhf"
    records: int = 1024
    moved: int = 40
    batch: int = 16
    rows: int = 8
    learning_rate: float = 2e-4
    max_length: int = 512
    steps: int = 50
    policy_learning_rate: float = 1e-4
    max_new_tokens: int = 96
    prompts: int = 128
    samples: int = 16


class Real:
    """The model and the data, in the order of one seed."""

    QUICK = Settings(
        model=None, records=8, moved=2, batch=4, rows=4, steps=1, max_new_tokens=6, prompts=4,
        samples=4,
    )  # fmt: skip

    def __init__(
        self, seed: int, settings: Settings | None = None, folder: Path | None = None
    ) -> None:
        self.seed, self.settings = seed, settings or Settings()
        self.common = (folder or Path("outputs/studies")) / f"real-{self.version(self.settings)}"
        self.folder = self.common / str(seed)
        steps.quiet()

    @staticmethod
    def version(settings: Settings | None = None) -> str:
        """Returns a hash of everything that determines the results."""
        shown = {k: v for k, v in vars(settings or Settings()).items() if not isinstance(v, Path)}
        return code_hash(sys.modules[__name__], said=str(shown))

    @staticmethod
    def missing() -> str | None:
        """Returns why the study cannot run here."""
        absent = [str(p) for p in (Settings.model, Settings.data) if p and not p.exists()]
        return f"{' and '.join(absent)} not found" if absent else None

    # -- the model and the data --------------------------------------------------------------------

    @cached_property
    def base(self) -> Path:
        """The folder of the model before JSFT."""
        folder, made = self.common / "base", self.settings.model
        if not (folder / "config.json").exists():
            if made:
                subprocess.run([sys.executable, str(made), str(folder)], check=True)
            else:
                tokenizer = synthetic.tiny_tokenizer()
                tokenizer.save_pretrained(folder)
                synthetic.tiny_model(tokenizer, 0, hidden_size=32, layers=2).save_pretrained(folder)
        return folder

    @cached_property
    def encoder(self) -> ChatEncoder:
        return ChatEncoder(load_tokenizer(self.base))

    @cached_property
    def templates(self) -> Any:
        run = load_run(ROOT / "configs/hh_jsft.yaml", [], "jsft")
        return run.templates.judge_templates()

    @cached_property
    def records(self) -> tuple[list[PreferenceRecord], list[PreferenceRecord]]:
        """The records to learn from and the held-out ones, which share no first question."""
        settings = self.settings
        if settings.model is None:
            made = synthetic.records(40, 0, writers=2)
            made = [dataclasses.replace(r, pairs=r.pairs[:1]) for r in made]  # the overall pairs
            return made[:-10], made[-10:]
        learned = [record for name in LEARNED for record in self._load(name)]
        held_out = self._load(HELD_OUT)
        counts = Counter(map(first_question, [*learned, *held_out]))
        alone = [r for r in learned if r.pairs and counts[first_question(r)] == 1]
        moved = {id(r) for r in alone[-settings.moved :]}
        held_out += [r for r in learned if id(r) in moved]
        learned = [r for r in learned if id(r) not in moved]
        random.Random(stable_seed(self.seed, "records")).shuffle(learned)
        return learned, held_out

    def _load(self, name: str) -> list[PreferenceRecord]:
        (path,) = self.settings.data.glob(f"{name}.*")
        return load_preferences(str(path)).records

    @cached_property
    def pairs(self) -> list[Comparison]:
        """The held-out pairs, with the better response first."""
        return [comparison for comparison, _ in labeled_comparisons(self.records[1])]

    @cached_property
    def asked(self) -> list[PreferenceRecord]:
        """The held-out records whose prompts policies answer."""
        return self.records[1][: self.settings.prompts]

    # -- training ----------------------------------------------------------------------------------

    def jsft(self, name: str, records: Sequence[PreferenceRecord]) -> Path:
        """Runs JSFT with LoRA, or continues it, and returns the folder of the merged model."""
        output = self.folder / name
        if (output / "seconds").exists():
            return output
        args = SFTConfig(**self.arguments(output, self.settings.learning_rate))
        trainer = jsft_trainer(
            load_model(self.base, dtype="float32", device="auto"), self.encoder, self.templates,
            records, None, args, max_length=self.settings.max_length, peft_config=_lora(),
        )  # fmt: skip
        self.train(
            trainer, output, lambda: save_jsft(trainer, self.encoder, self.templates, merge=True)
        )
        return output

    def taught(self, part: float = 1) -> Path:
        """The JSFT model of a part of its records."""
        count = round(part * self.settings.records)
        return self.jsft(f"jsft-{count}", self.records[0][:count])

    def independent(self) -> Path:
        """A JSFT model of other records, whose judge no policy sees."""
        return self.jsft("independent", self.records[0][-self.settings.records :])

    def policy(self) -> tuple[Path, list[dict[str, Any]]]:
        """Runs self-training, or continues it; returns the policy's folder and the logs."""
        output = self.folder / "policy"
        if not (output / "seconds").exists():
            self._self_training(output)
        logs = list(read_lines(output / METRICS))
        return output, [x for x in logs if "judge/margin" in x]

    def _self_training(self, output: Path) -> None:
        settings = self.settings
        prompts = self.records[0][: settings.steps * settings.batch]
        args = SelfJudgeConfig(
            **self.arguments(output, settings.policy_learning_rate),
            max_steps=settings.steps,
            max_new_tokens=settings.max_new_tokens,
            max_length=2 * settings.max_length,
            generation_batch_size=4 * settings.batch,
        )
        trainer = SelfJudgeTrainer(
            model=load_model(self.taught(), dtype="float32", device="auto"),
            args=args,
            processing_class=self.encoder.tokenizer,
            encoder=self.encoder,
            judge_templates=self.templates,
            train_dataset=Dataset.from_list(prompt_rows(prompts)),
            peft_config=_lora(),
        )
        self.train(trainer, output, lambda: trainer.save_model(str(output)))

    def arguments(self, output: Path, learning_rate: float) -> dict[str, Any]:
        settings = self.settings
        return {
            "output_dir": str(output),
            "num_train_epochs": 1,
            "per_device_train_batch_size": settings.rows,
            "gradient_accumulation_steps": settings.batch // settings.rows,
            "learning_rate": learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 20,
            "save_total_limit": 1,
            "seed": self.seed,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(),
            "use_cpu": not torch.cuda.is_available(),
        }

    def train(self, trainer: Any, output: Path, save: Callable[[], Any]) -> None:
        """Trains from the last checkpoint. The file `seconds` marks a folder as complete."""
        started = time.perf_counter()
        last = get_last_checkpoint(str(output)) if output.exists() else None
        train(trainer, last)
        save()
        (output / "seconds").write_text(str(time.perf_counter() - started))

    # -- measuring ---------------------------------------------------------------------------------

    def judge(self, folder: Path) -> Judge:
        return Judge.from_pretrained(
            folder, self.templates, encoder=self.encoder, max_length=2 * self.settings.max_length,
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
        )  # fmt: skip

    def judged(self, folder: Path, records: int) -> dict[str, Any]:
        """Judges the held-out pairs."""
        verdicts = self.judge(folder).compare(self.pairs)
        quality = judge_quality(verdicts)
        return {
            "right": right(verdicts),
            "records": records,
            "one_order": round(quality.single_order, 4),
            "order_agreement": round(quality.order_agreement, 4),
            "undecidable": round(quality.undecidable, 4),
        }

    def sampler(self, folder: Path) -> TransformersSampler:
        sampling = SamplingSettings(max_new_tokens=self.settings.max_new_tokens, top_p=0.9)
        model = load_model(folder, dtype="float32", device="auto")
        return TransformersSampler(model, self.encoder, sampling, 64)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [self.encoder.encode_prompt(record.prompt) for record in self.asked]

    def answers(self, folder: Path, n: int) -> list[list[Response]]:
        """Samples responses to held-out prompts, with the same seeds for every policy."""
        seeds = [stable_seed(self.seed, "held-out", i) for i in range(len(self.prompts))]
        return self.sampler(folder).sample(self.prompts, n, seeds)

    def won(self, judge: Judge, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
        """Compares one response per prompt with another, by a judge."""
        asked = zip(map(judge_context, self.asked), ours, theirs, strict=True)
        return {
            "wins": right(judge.compare([Comparison(*texts) for texts in asked])),
            "longer": [len(a) - len(b) for a, b in zip(ours, theirs, strict=True)],
        }


def _lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")


def longer(real: Real) -> dict[str, Any]:
    """The longer response is said to be the better one."""
    lengths = ((len(p.response_a), len(p.response_b)) for p in real.pairs)
    return {"right": larger(lengths), "records": 0}


def untaught(real: Real) -> dict[str, Any]:
    return real.judged(real.base, 0)


def taught(real: Real, part: float) -> dict[str, Any]:
    return real.judged(real.taught(part), round(part * real.settings.records))


def independent(real: Real) -> dict[str, Any]:
    """The judge of other records, which decides who wins."""
    return real.judged(real.independent(), real.settings.records)


def reward_model(real: Real) -> dict[str, Any]:
    """TRL's reward model of the same base, on the pairs of the JSFT model's records."""
    settings, output = real.settings, real.folder / "reward-model"
    records = [r for r in real.records[0][: settings.records] if r.pairs]
    pairs = ((list(r.prompt), r.pairs[0].chosen, r.pairs[0].rejected) for r in records)
    model = AutoModelForSequenceClassification.from_pretrained(real.base, num_labels=1)
    model.config.pad_token_id = real.encoder.tokenizer.pad_token_id
    arguments = real.arguments(output, settings.learning_rate)
    lora = dataclasses.replace(_lora(), task_type="SEQ_CLS", modules_to_save=["score"])
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**arguments, max_length=2 * settings.max_length),
        train_dataset=preference_dataset(pairs),
        processing_class=real.encoder.tokenizer,
        peft_config=lora,
    )
    real.train(trainer, output, lambda: trainer.save_model(str(output)))
    prompts = [list(record.prompt) for record in real.records[1] for _ in record.pairs]
    pairs = (
        (prompt, pair.response_a, pair.response_b)
        for prompt, pair in zip(prompts, real.pairs, strict=True)
    )
    decided = rewarded(trainer.model, real.encoder.tokenizer, pairs, 2 * settings.max_length)
    return {"right": decided, "records": settings.records}


def self_training(real: Real) -> dict[str, Any]:
    """The policy against the JSFT model, by the independent judge and by its own."""
    policy, logs = real.policy()
    ours, theirs = (
        [own[0].text for own in real.answers(folder, 1)] for folder in (policy, real.taught())
    )
    return {
        **real.won(real.judge(real.independent()), ours, theirs),
        "own_judge": real.won(real.judge(real.taught()), ours, theirs),
        "order_agreement": [round(x["judge/order_agreement"], 4) for x in logs],
        "mean_length": [round(x["completions/mean_length"], 2) for x in logs],
    }


def self_rejection(real: Real) -> dict[str, Any]:
    """The best of N against the first sample, by the independent judge."""
    folder, n = real.policy()[0], real.settings.samples
    sampled = real.answers(folder, n)
    means = real.sampler(real.taught()).mean_log_probs(real.prompts, sampled)
    texts = [[r.text for r in own] for own in sampled]
    own, other = real.judge(real.taught()), real.judge(real.independent())
    found = {}
    for size in sorted({min(4, n), n}):
        for weight in PRIOR_WEIGHTS:
            best = tournament_rejection_sampling(
                judge=own,
                contexts=[judge_context(record) for record in real.asked],
                responses=[t[:size] for t in texts],
                prior=[[weight * m for m in ms[:size]] for ms in means] if weight else None,
            )
            first = [t[0] for t in texts]
            name = f"best of {size}" + (f" + {weight:g} log π per token" if weight else "")
            found[name] = real.won(other, best, first)
    return {"ways": found}


STUDY = Study(
    "real",
    "What does JSFT teach SmolLM2-135M-Instruct to judge in HH-helpful, and what does it learn "
    "from its own judgments?",
    {
        "longer response": longer,
        "before JSFT": untaught,
        "JSFT, a quarter of the records": partial(taught, part=0.25),
        "JSFT, half of the records": partial(taught, part=0.5),
        "JSFT": partial(taught, part=1),
        "reward model": reward_model,
        "independent judge": independent,
        "self-training": self_training,
        "self-rejection": self_rejection,
    },
    world=Real,
)
