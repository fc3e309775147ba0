"""Feeds broken files of every kind to the commands: each has to end with success or one line.

`make fuzz` runs many cases; `tests/test_fuzz.py` runs a few of every kind. The seed determines all.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SECONDS = 60  # a case that takes longer hangs

PAIR = {"context": "what?", "response_a": "yes", "response_b": "no"}
RECORD = {"prompt": "what?", "chosen": "yes", "rejected": "no"}
TURNS = {"prompt": [{"role": "user", "content": "what?"}], "responses": ["yes", "no"]}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
METRICS = {"step": 1, "time": 1.5, "loss": 0.5, "judge/margin": 0.1, "completions/mean_length": 3.0}
ESTIMATE = {"value": 0.5, "ci95": [0.1, 0.9], "n": 4}
EVALUATION = {
    "judge": {"model": "x"},
    "overall": {"pairs": 4, "accuracy": ESTIMATE, "undecidable": {"share": 0.0, "reasons": {}}},
    "subsets": {"one": {"pairs": 4, "accuracy": ESTIMATE}},
    "skipped": {"empty": 1},
}
BRACKET = {
    "context": "what?", "responses": ["yes", "no"], "winner": 0, "response": "yes",
    "principles": ["p"],
    "bracket": [[{"a": 0, "b": 1, "winner": 0, "by_lot": False,
                  "probabilities": [[[0.6, 0.4], [0.3, 0.7]]]}]],
}  # fmt: skip
ROLLOUT = {"step": 1, "record": 0, "context": "what?", "chosen": "yes", "rejected": "no",
           "probabilities": {"p": [[0.6, 0.4], [0.3, 0.7]]}, "margin": 0.1}  # fmt: skip
RUN = {"kind": "jsft", "versions": {"trl": "1"}, "run_file": {"model": {}}, "arguments": {}}
FILE = {
    "model": {"model_name_or_path": "/nowhere"},
    "dataset": {"sources": [{"path": "x.jsonl"}], "held_out": 0.1, "principles": ["a"]},
    "training_args": {"output_dir": "x", "seed": 1, "learning_rate": 0.1},
    "peft_config": {"r": 4, "target_modules": ["q_proj"]},
    "templates": {"judge": {"a": {"user": "{context} {response_a} {response_b}",
                                  "assistant": "x"}}},
    "jsft_args": {"max_length": 64},
}  # fmt: skip


class Hang(BaseException):
    """A case that does not end."""


class Fuzz:
    """Random broken content, all from one generator."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def leaf(self) -> Any:
        r = self.random
        return r.choice([
            None, True, False, 0, -1, 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, float("nan"),
            float("inf"), "", " ", "yes", "\ud800", "\x00", "\u202e", "a" * 5000, "${x}", "1e999",
            [], {}, [[]], [None], {"": None}, {"role": "user"}, {"role": None, "content": None},
            [{"role": "user", "content": [1]}], {"type": "text"}, r.randbytes(4).decode("latin-1"),
        ])  # fmt: skip

    def deep(self) -> Any:
        """Content that is nested, up to where parsers recurse too deeply."""
        r, node = self.random, self.leaf()
        for _ in range(r.choice([3, 30, 300])):
            node = [node] if r.random() < 0.5 else {"a": node}
        return node

    def mutated(self, node: Any) -> Any:
        """The content with one or more values, keys or types changed."""
        r = self.random
        if r.random() < 0.15 or not isinstance(node, (dict, list)) or not node:
            return r.choice([self.leaf, self.leaf, self.deep])()
        if isinstance(node, list):
            at = r.randrange(len(node))
            return [self.mutated(x) if i == at else x for i, x in enumerate(node)]
        node, key = dict(node), r.choice(list(node))
        how = r.random()
        if how < 0.2:
            del node[key]
        elif how < 0.3:
            node[r.choice(["", "x", "messages", "role", key * 2])] = self.leaf()
        else:
            node[key] = self.mutated(node[key])
        return node

    def text(self, *contents: Any, sound: float = 0.1) -> bytes:
        """One JSON value per line, of which some are broken."""
        r, lines = self.random, []
        for content in contents:
            broken = content if r.random() < sound else self.mutated(content)
            lines.append(json.dumps(broken).encode())
        text = b"\n".join(lines) + b"\n"
        how = r.random()
        if how < 0.06:
            depth = r.choice([10, 1000, 100_000])
            return r.choice([b"[", b'{"a":']) * depth
        if how < 0.12:
            return r.randbytes(r.randrange(200))
        if how < 0.2:
            return self.torn(text)
        if how < 0.24:
            return b'{"step": ' + b"9" * 5000 + b"}\n" + text
        if how < 0.28:
            return text.decode().encode(r.choice(["utf-16", "utf-8-sig", "utf-32"]))
        return text

    def torn(self, content: bytes) -> bytes:
        """The content with bytes cut off, changed or put in."""
        r, content = self.random, bytearray(content)
        for _ in range(r.randrange(1, 5)):
            at = r.randrange(len(content) + 1)
            how = r.random()
            if how < 0.3:
                del content[at:]
            elif how < 0.6 and at < len(content):
                content[at] = r.randrange(256)
            else:
                content[at:at] = r.randbytes(r.randrange(1, 8))
        return bytes(content)

    def safetensors(self, sound: bytes) -> bytes:
        """A weights file whose header lies."""
        size = struct.unpack("<Q", sound[:8])[0]
        header, rest = json.loads(sound[8 : 8 + size]), sound[8 + size :]
        how = self.random.random()
        if how < 0.3:
            return self.torn(sound[: 8 + size]) + rest
        if how < 0.4:
            return struct.pack("<Q", self.random.choice([0, 2**40, 2**63, size + 1])) + sound[8:]
        text = json.dumps(self.mutated(header)).encode()
        return struct.pack("<Q", len(text)) + text + (rest if how < 0.9 else rest[:10])


class Places:
    """A tiny judge, and how the commands are asked to read a broken file."""

    def __init__(self, folder: Path, fuzz: Fuzz) -> None:
        from conftest import TEMPLATES, tiny_llama
        from self_judge import ChatEncoder, JudgeTemplates
        from self_judge.data.synthetic import tiny_tokenizer
        from self_judge.prompting.judge_json import save_judge_settings

        self.folder, self.fuzz, self.sound = folder, fuzz, folder / "sound"
        tokenizer = tiny_tokenizer()
        tiny_llama(len(tokenizer), max_position_embeddings=2048).save_pretrained(self.sound)
        tokenizer.save_pretrained(self.sound)
        encoder, templates = ChatEncoder(tokenizer), JudgeTemplates(TEMPLATES)
        save_judge_settings(self.sound, encoder, templates, encoder.letter_ids(templates))
        self.weights = (self.sound / "model.safetensors").read_bytes()
        self.run = folder / "run"

    def file(self, name: str, content: bytes) -> Path:
        path = self.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def table(self, name: str, content: Any) -> bytes:
        """The content as a sound Parquet or CSV file, if it can be one."""
        if name.endswith("csv"):
            return (
                ",".join(map(str, content)).encode("utf-8", "replace")
                + b"\n"
                + str(list(content.values())).encode("utf-8", "replace")
            )
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([content]), buffer)
        except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
            return self.fuzz.random.randbytes(50)
        return buffer.getvalue()

    def records(self, *shapes: Any) -> Path:
        r, fuzz = self.fuzz.random, self.fuzz
        name = r.choice(["d.jsonl", "d.jsonl", "d.json", "d.parquet", "d.csv", "d.jsonl.gz"])
        content = fuzz.text(*[r.choice(shapes) for _ in range(r.randrange(1, 4))])
        if name.endswith(("parquet", "csv")) and r.random() < 0.8:
            mutated = fuzz.mutated(r.choice(shapes))
            content = self.table(name, mutated if isinstance(mutated, dict) else {"a": mutated})
            content = fuzz.torn(content) if r.random() < 0.3 else content
        return self.file(name, content)

    def out(self, name: str = "out") -> str:
        return str(self.run / name)

    def judge(self) -> list[str]:
        return ["judge", str(self.records(PAIR, TURNS)), self.out(), "--model", str(self.sound)]

    def tournament(self) -> list[str]:
        source = str(self.records({**TURNS, "context": "what?"}))
        return ["tournament", source, self.out(), "--model", str(self.sound), "--n", "2",
                "--max-new-tokens", "2"]  # fmt: skip

    def evaluate(self) -> list[str]:
        return ["eval", str(self.records(RECORD, HH)), "--model", str(self.sound), "--output",
                self.out(), "--max-pairs", "3"]  # fmt: skip

    def check(self) -> list[str]:
        source = self.records(RECORD, HH, {"instruction": "x", "completions": [{"response": "y"}]})
        return ["check", str(ROOT / "configs" / "hh_jsft.yaml"), "--plain", "dataset.eval=[]",
                f"dataset.sources=[{{path: {source}}}]", f"training_args.output_dir={self.out()}",
                f"model.model_name_or_path={self.sound}", "training_args.bf16=false"]  # fmt: skip

    def run_file(self) -> list[str]:
        content = self.fuzz.text(FILE)  # JSON is YAML
        if self.fuzz.random.random() < 0.3:
            sound = (ROOT / "configs" / "uf_jsft.yaml").read_bytes()
            content = self.fuzz.torn(sound)
        command = self.fuzz.random.choice(["jsft", "train", "check"])
        return [command, str(self.file("run.yaml", content))]

    def report(self) -> list[str]:
        fuzz = self.fuzz
        r = fuzz.random
        contents: dict[str, tuple[Any, ...]] = {
            "metrics.jsonl": (METRICS, {**METRICS, "step": 2}),
            "run.json": (RUN,),
            "data.json": ({"x": {"read": 3, "records": 3}},),
            "rollouts/step-000001.jsonl": (ROLLOUT, ROLLOUT),
            "brackets.jsonl": (BRACKET, BRACKET),
            "results.json": (EVALUATION,),
            "judged.jsonl": ({"gold": "a", "probabilities": [[[0.6, 0.4], [0.3, 0.7]]],
                              "a": "yes", "b": "no"},),
        }  # fmt: skip
        broken = r.choice(list(contents))
        for name, given in contents.items():
            if name == broken or r.random() < 0.6:
                self.file(name, fuzz.text(*given, sound=0.1 if name == broken else 1.0))
        return ["report", str(self.run), "-o", self.out("r.html")]

    def model(self) -> list[str]:
        fuzz, model = self.fuzz, self.run / "model"
        shutil.copytree(self.sound, model)
        name = fuzz.random.choice(
            ["model.safetensors"] * 4
            + ["judge.json", "config.json", "tokenizer.json", "tokenizer_config.json"]
            + ["generation_config.json", "adapter_config.json"]
        )
        path = model / name
        if name == "model.safetensors":
            path.write_bytes(fuzz.safetensors(self.weights))
        else:
            own: Any = {"base_model_name_or_path": str(self.sound), "peft_type": "LORA", "r": 2}
            path.write_bytes(fuzz.text(json.loads(path.read_text()) if path.is_file() else own))
        source = self.file("in.jsonl", json.dumps(PAIR).encode())
        return ["judge", str(source), self.out(), "--model", str(model)]

    def checkpoint(self) -> list[str]:
        run = self.run / "trained"
        manifest = self.fuzz.text({"files": {"a": 1, "model.safetensors": 3}})
        self.file("trained/checkpoint-1/manifest.json", manifest)
        self.file("trained/run.json", self.fuzz.text({"run_file": {"model": {"dtype": "x"}}}))
        source = self.file("in.jsonl", (json.dumps(RECORD) + "\n").encode() * 2)
        return ["jsft", str(ROOT / "configs" / "hh_jsft.yaml"), f"training_args.output_dir={run}",
                f"model.model_name_or_path={self.sound}", "dataset.eval=[]", "model.dtype=float32",
                "training_args.max_steps=1", "training_args.per_device_train_batch_size=1",
                "jsft_args.global_batch_size=1", "dataset.held_out=0",
                "training_args.eval_strategy=no", "training_args.disable_tqdm=true",
                f"dataset.sources=[{{path: {source}}}]", "training_args.bf16=false",
                f"training_args.resume_from_checkpoint={run}/checkpoint-1"]  # fmt: skip

    def journal(self) -> list[str]:
        """An output of `judge` that is there, broken."""
        source = self.file("in.jsonl", json.dumps(PAIR).encode() + b"\n")
        self.file("out", self.fuzz.text({**PAIR, "verdict": {}}))
        noted = {"settings": {"model": "x"}, "timed": 1, "seconds": 0.5}
        self.file("out.settings.json", self.fuzz.text(noted))
        return ["judge", str(source), self.out(), "--model", str(self.sound)]

    def kinds(self) -> list[Callable[[], list[str]]]:
        return [self.run_file, self.report, self.judge, self.tournament, self.evaluate, self.check,
                self.model, self.checkpoint, self.journal]  # fmt: skip


@contextmanager
def within(seconds: int) -> Any:
    def late(*_: Any) -> None:
        raise Hang(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def wrong(words: list[str]) -> tuple[int | None, str | None]:
    """The exit status of a command, and what is wrong with how it ended, if anything."""
    from self_judge.cli import main

    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()), within(SECONDS):
            status: Any = main(words)
    except SystemExit as left:
        status = left.code
    except (Exception, Hang):
        return None, traceback.format_exc()
    if "Traceback" in said.getvalue():
        return status, said.getvalue()
    last = (said.getvalue().strip().splitlines() or [""])[-1]
    if status == 2 and "error: " not in last:
        return status, f"the last line is no error: {last!r}"
    return status, None if status in (0, 1, 2) else f"exit status {status}"


def run(cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """The number of cases by kind and exit status, and a text for each that ended wrongly."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        places = Places(Path(folder), Fuzz(seed))
        kinds = places.kinds()
        for number in range(cases):
            kind = kinds[number % len(kinds)]
            places.fuzz.random.seed(f"{seed} {number}")  # a case does not depend on those before
            shutil.rmtree(places.run, ignore_errors=True)
            places.run.mkdir()
            status, reason = wrong(kind())
            counts[f"{kind.__name__}, exit status {status}"] += 1
            if reason is not None:
                failures.append(f"seed {seed}, case {number}, {kind.__name__}: {reason}")
    logging.disable(logging.NOTSET)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts, failures = run(given.cases, given.seed)
    for failure in failures:
        print(failure)
    for name, count in sorted(counts.items()):
        print(f"{count:>6,}  {name}")
    print(f"{sum(counts.values()):,} cases with seed {given.seed}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main())
