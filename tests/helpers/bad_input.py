"""Mistakes and the messages they get: cases of test_bad_input.py, some also in docs/errors.md."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.training_args
from peft import LoraConfig, get_peft_model

from conftest import CHATML, ROOT, TEMPLATES, Make, byte_bpe, tiny_llama, wrap
from self_judge import ChatEncoder, Judge, JudgeTemplates, SelfJudgeConfig
from self_judge import tournament_rejection_sampling as play
from self_judge.inference.sampling import stop_tokens
from self_judge.models import load_model, load_tokenizer
from self_judge.training.identity.saved_weights import check_adapter

JSFT = str(ROOT / "configs" / "hh_jsft.yaml")
TRAIN = str(ROOT / "configs" / "hh_self_judge.yaml")
PRINCIPLES = str(ROOT / "configs" / "uf_jsft_pr.yaml")


@dataclass(frozen=True)
class Place:
    """Where a mistake is made.

    Attributes:
        folder: an empty one.
        base, saved: a tiny model without and with judge.json.
        data: sound files, by format.
        make: builds a trainer.
        patch: undone after the mistake.
    """

    folder: Path
    base: Path
    saved: Path
    data: dict[str, Path]
    make: Make
    patch: pytest.MonkeyPatch

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def run(self, *more: str, config: str = JSFT, source: Path | None = None) -> list[str]:
        """A run of a shipped file on the tiny model, with something changed."""
        kind, section = ("train", "self_judge_args") if config == TRAIN else ("jsft", "jsft_args")
        model = self.saved if config == TRAIN else self.base
        small = ["self_judge_args.max_new_tokens=8"] if config == TRAIN else []
        return [
            kind,
            config,
            f"training_args.output_dir={self.folder / 'run'}",
            "training_args.max_steps=1",
            "training_args.per_device_train_batch_size=2",
            "training_args.eval_strategy=no",
            "training_args.disable_tqdm=true",
            "training_args.bf16=false",
            f"{section}.global_batch_size=4",
            f"model.model_name_or_path={model}",
            "model.dtype=float32",
            f"dataset.sources=[{{path: {source or self.data['hh']}}}]",
            "dataset.eval=[]",
            *small,
            *more,
        ]

    def on(self, name: str, *lines: Any, config: str = JSFT) -> list[str]:
        """A run on data of one's own."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        return self.run(source=self.file(name, text), config=config)

    def templates(self, text: str) -> list[str]:
        """A run file with judge templates of one's own."""
        rest = "training_args: {output_dir: x}\nmodel: {model_name_or_path: x}\n"
        rest += "dataset: {sources: [{path: x}]}\n"
        return ["jsft", str(self.file("own.yaml", f"{rest}templates: {text}"))]

    def copy(self, source: Path, name: str) -> Path:
        return Path(shutil.copytree(source, self.folder / name))


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        wrong: what it is, in words; names the case.
        does: gives the words of the command, or calls the library.
        said: what is said, in parts that stand in this order.
        remedy: what to do, for docs/errors.md; empty where the message makes it clear.
    """

    wrong: str
    does: Callable[[Place], Any]
    said: tuple[str, ...]
    remedy: str


def setting(wrong: str, change: str, said: str, remedy: str, config: str = JSFT) -> Case:
    """A run file with one value changed."""
    return Case(wrong, lambda p: p.run(*change.split(" "), config=config), (said,), remedy)


RUN_FILE = [
    Case("a missing run file", lambda p: ["jsft", "nope.yaml"], ("nope.yaml: no such file",),
         ""),
    Case("an empty run file", lambda p: ["jsft", str(p.file("e.yaml", ""))],
         ("e.yaml: expected sections such as 'model:', found none",), ""),
    Case("invalid YAML", lambda p: ["jsft", str(p.file("s.yaml", "model:\n  a: ]"))],
         ("s.yaml:2: not valid YAML",), ""),
    Case("YAML with code",
         lambda p: ["jsft", str(p.file("x.yaml", "model: !!python/object/apply:os.abort []"))],
         ("x.yaml:1: not valid YAML: could not determine a constructor",),
         "remove the tag; its code was not run"),
    Case("a self-training file for `jsft`", lambda p: ["jsft", TRAIN],
         ("it has self_judge_args, so it is a file for", "self-judge train"), ""),
    Case("a JSFT file for `train`", lambda p: ["train", JSFT],
         ("it has jsft_args, so it is a file for", "self-judge jsft"), ""),
    Case("a missing file in `extends`",
         lambda p: ["jsft", str(p.file("x.yaml", "extends: nope.yaml"))],
         ("nope.yaml: no such file (named by extends in",), "give a path relative to that file"),
    Case("a file that extends itself",
         lambda p: ["jsft", str(p.file("x.yaml", "extends: x.yaml"))],
         ("x.yaml: extends itself",), ""),
    Case("a missing section",
         lambda p: ["jsft", str(p.file("x.yaml", "dataset: {sources: [{path: x}]}"))],
         ("x.yaml: model: missing",), ""),
    setting("an unknown section", "trainin_args.seed=1",
            "trainin_args: unknown; did you mean training_args?", ""),
    setting("an unknown key", "jsft_args.max_lenght=3",
            "jsft_args.max_lenght: unknown; did you mean max_length?", ""),
    setting("an unknown trainer key", "training_args.learning_rat=1e-5",
            "training_args.learning_rat: unknown; did you mean learning_rate?",
            ""),
    setting("an unknown adapter key", "peft_config.lora_alfa=8",
            "peft_config.lora_alfa: unknown; did you mean lora_alpha?", ""),
    setting("a key in the wrong section", "training_args.max_length=512",
            "training_args.max_length: set jsft_args.max_length instead", ""),
    setting("an override without a value", "training_args.seed",
            "override 'training_args.seed': expected key.path=value", ""),
    setting("text for a number", "jsft_args.max_length=long",
            "jsft_args.max_length: expected a whole number, got text 'long'", ""),
    setting("text for a trainer's number", "training_args.learning_rate=fast",
            "training_args.learning_rate: expected a number, got text 'fast'", ""),
    setting("text for a boolean", "training_args.bf16=perhaps",
            "training_args.bf16: expected true or false or null, got text 'perhaps'",
            ""),
    setting("an unknown choice", "jsft_args.packing=trie",
            "jsft_args.packing: expected one of auto, tree, cache, padding, off", ""),
    setting("an unknown optimizer", "training_args.optim=adamw_touch",
            "training_args.optim: adamw_touch is not a valid", ""),
    setting("an unknown dtype", "model.dtype=float33",
            "model.dtype: expected one of auto, bfloat16, float16, float32", ""),
    setting("rationales without templates", "templates.decision_rationale=null",
            "dataset.rationales is true but templates.decision_rationale is not set",
            "add it, or dataset.rationales=false", PRINCIPLES),
    setting("a length of 1", "jsft_args.max_length=1", "max_length must be at least 2, got 1",
            ""),
    setting("an empty batch", "training_args.per_device_train_batch_size=0",
            "training_args.per_device_train_batch_size must be at least 1, got 0", ""),
    setting("a negative learning rate", "training_args.learning_rate=-1",
            "training_args.learning_rate must be at least 0, got -1.0", ""),
    setting("an indivisible global batch", "jsft_args.global_batch_size=5",
            "global_batch_size 5 is not divisible by 2 (2 per device",
            ""),
    setting("a fraction above 1", "dataset.held_out=1.5",
            "held_out must be in [0, 1), got 1.5", ""),
    setting("no data source", "dataset.sources=[]", "sources is empty: name at least one",
            ""),
    Case("an unknown kind of data",
         lambda p: p.run("dataset.sources=[{path: x, kind: hhh}]"),
         ("dataset.sources.0.kind: expected one of auto, hh, ultrafeedback, preference",),
         ""),
    setting("an unknown loss", "self_judge_args.loss_type=sigmod",
            "loss_type sigmod: unknown; did you mean sigmoid?", "", TRAIN),
    setting("averaging for an unsupported loss",
            "self_judge_args.average_log_prob=true self_judge_args.loss_type=robust",
            "average_log_prob requires sigmoid, hinge or ipo alone, got robust: leave it unset",
            "", TRAIN),
    setting("greedy sampling", "self_judge_args.temperature=0",
            "temperature must be above 0, got 0.0", "", TRAIN),
    setting("an empty nucleus", "self_judge_args.top_p=0", "top_p must be in (0, 1], got 0.0",
            "", TRAIN),
    setting("one response per prompt", "self_judge_args.num_generations=1",
            "num_generations must be at least 2, got 1", "", TRAIN),
    setting("an empty judge batch", "self_judge_args.judge_batch_size=0",
            "judge_batch_size must be at least 1, got 0", "", TRAIN),
    setting("no room for the prompt", "self_judge_args.max_new_tokens=4096",
            "max_new_tokens (4096) must be below max_length (2048)", "",
            TRAIN),
    setting("equal letter ids",
            "self_judge_args.token_id_a=3 self_judge_args.token_id_b=3",
            "token_id_a and token_id_b are the same token (3)", "leave them out", TRAIN),
    setting("a wrong letter id", "self_judge_args.token_id_a=7",
            "token_id_a=7 is [7 ", "", TRAIN),
    setting("a letter id outside the vocabulary", "self_judge_args.token_id_a=999999",
            "token_id_a=999999 is [999999 (out of range)]", "", TRAIN),
    setting("a moving reference", "training_args.sync_ref_model=true",
            "sync_ref_model must be False", "", TRAIN),
    setting("precomputed log-probabilities",
            "training_args.precompute_ref_log_probs=true",
            "precompute_ref_log_probs must be False", "", TRAIN),
    setting("servers without a URL",
            "self_judge_args.use_vllm=true self_judge_args.vllm_mode=server",
            "vllm_mode=server needs vllm_server_base_url", "", TRAIN),
    setting("a missing checkpoint", "training_args.resume_from_checkpoint=/nope",
            "cannot resume from /nope: there is no such folder",
            "true uses the last complete checkpoint"),
]  # fmt: skip

DATA = [
    Case("missing data", lambda p: p.run(source=p.folder / "no.jsonl"),
         ("no.jsonl: no such file or folder",), ""),
    Case("an empty data file", lambda p: p.run(source=p.file("empty.jsonl", "")),
         ("empty.jsonl: the file has no records",), ""),
    Case("a truncated gzip file",
         lambda p: p.run(source=p.file("t.jsonl.gz", gzip.compress(bytes(9999))[:20])),
         ("t.jsonl.gz: the gzip file is truncated; download it again",), ""),
    Case("not a gzip file", lambda p: p.run(source=p.file("n.jsonl.gz", b"hello")),
         ("n.jsonl.gz: not a valid gzip file",), "rename it, or download it again"),
    Case("not a Parquet file", lambda p: p.run(source=p.file("n.parquet", b"hello")),
         ("n.parquet: not a valid parquet file",), ""),
    Case("text in Latin-1",
         lambda p: p.run(source=p.file("l.jsonl", '{"chosen": "caf\xe9"}'.encode("latin-1"))),
         ("l.jsonl: not UTF-8 text (", "byte 15)"), ""),
    Case("text in UTF-16",
         lambda p: p.run(source=p.file("u.jsonl", '{"chosen": "x"}'.encode("utf-16"))),
         ("u.jsonl: not UTF-8 text (", "byte 0)", "(or UTF-16) -t UTF-8"), ""),
    Case("invalid JSON",
         lambda p: p.run(source=p.file("b.jsonl", '{"chosen": "a", "rejected": "b"}\n{oops\n')),
         ("b.jsonl, line 2: not JSON",), ""),
    Case("a line without an object", lambda p: p.on("l.jsonl", [1, 2]),
         ("l.jsonl, line 1: expected a JSON object, got list",), ""),
    Case("a missing column", lambda p: p.on("m.jsonl", {"prompt": "x", "chosen": "y"}),
         ("m.jsonl: cannot detect the kind of data from the columns ['chosen', 'prompt']",),
         ""),
    Case("no prompt, but another text",
         lambda p: p.on("c.jsonl", {"input": "x", "chosen": "The a", "rejected": "The b"}),
         ("c.jsonl, line 1, field 'prompt': is missing; rename the column 'input', map it",), ""),
    Case("a git-lfs pointer",
         lambda p: p.run(source=p.file("g.jsonl", "version https://git-lfs.github.com/spec/v1")),
         ("g.jsonl: a git-lfs pointer instead of the data",), ""),
    Case("a number as prompt",
         lambda p: p.on("t.jsonl", {"prompt": 3, "chosen": "y", "rejected": "n"}),
         ("t.jsonl, line 1, field 'prompt': expected text or messages, got int",),
         ""),
    Case("an unknown role",
         lambda p: p.on("r.jsonl", {"prompt": [{"role": "human", "content": "x"}],
                                    "chosen": [{"role": "assistant", "content": "y"}],
                                    "rejected": [{"role": "assistant", "content": "n"}]}),
         ("r.jsonl, line 1, field 'prompt[0].role': is 'human', expected one of system, user",),
         ""),
    Case("a response without ratings",
         lambda p: p.on("u.jsonl", {"instruction": "x", "completions": [{"response": "y"}]},
                        config=PRINCIPLES),
         ("u.jsonl, line 1, field 'completions[0].annotations': is missing",),
         ""),
    Case("only empty prompts",
         lambda p: p.on("e.jsonl", {"prompt": "", "chosen": "y", "rejected": "n"}),
         ("e.jsonl: no record could be used", "skipped record: empty prompt: 1"),
         ""),
    Case("only tool calls",
         lambda p: p.on("e.jsonl", {"prompt": "x", "rejected": "n", "chosen": [
             {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}),
         ("e.jsonl: no record could be used", "skipped record: a message with tool_calls: 1"),
         ""),
    Case("only empty responses",
         lambda p: p.on("e.jsonl", {"prompt": "x", "chosen": "", "rejected": "n"}),
         ("e.jsonl: no record could be used", "skipped record: empty response: 1"),
         ""),
    Case("a folder without data", lambda p: p.run(source=_empty(p)),
         ("nothing: no data file (",), ""),
    Case("an unknown file type", lambda p: p.run(source=p.file("x.docx", b"hello")),
         ("x.docx: unknown file type; supported types are .json",), ""),
    setting("only examples above the limit", "jsft_args.max_length=4",
            "no training example remains from 40 records", "raise jsft_args.max_length"),
    Case("a principle without a template",
         lambda p: p.run(
             'templates.judge={helpfulness: {user: "{context} {response_a} {response_b}", '
             'assistant: "x"}}', config=PRINCIPLES, source=p.data["ultrafeedback"]),
         ("record 0: a pair is labeled for principle 'honesty', but there are judge templates",),
         "add its template, or dataset.principles=false dataset.rationales=false"),
]  # fmt: skip

WORDING = [
    Case("a judge template without a placeholder",
         lambda p: p.templates('{judge: {a: {user: "{context} {response_a}", assistant: "b:"}}}'),
         ("judge template 'a' lacks {response_b} in 'user'",), ""),
    Case("a judge template without a lead-in",
         lambda p: p.templates('{judge: {a: {user: "{context} {response_a} {response_b}"}}}'),
         ("judge template 'a' needs a non-empty string as 'assistant'",), ""),
    Case("an unknown part of a judge template",
         lambda p: p.templates('{judge: {a: {usr: "{context}", assistant: "b:"}}}'),
         ("judge template 'a' has unknown parts ['usr']; "
          "the valid parts are system, user, assistant",),
         ""),
    Case("no judge template", lambda p: p.templates("{judge: {}}"),
         ("with at least one principle",), "add one, or extend a file of configs/templates"),
    Case("a rationale template without a placeholder",
         lambda p: p.templates(
             '{judge: {a: {user: "{context} {response_a} {response_b}", assistant: "b:"}}, '
             'decision_rationale: " {rationale_a}"}'),
         ("decision_rationale of 'a' lacks {rationale_b}",), ""),
    Case("a tokenizer without a chat template",
         lambda p: ChatEncoder(wrap(byte_bpe(), None)),
         ("has no chat template: set templates.chat, or the turn markers",), ""),
    Case("a chat template value that is not JSON",
         lambda p: ChatEncoder(wrap(byte_bpe()), chat_template_kwargs={"tools": object()}),
         ("chat_template_kwargs must be plain JSON values",), ""),
    Case("a chat template that changes contents",
         lambda p: ChatEncoder(wrap(byte_bpe()), CHATML.replace("m['content']", "m.content | e")),
         ("changes the content of a 'user' message",), ""),
    Case("a chat template that draws random numbers",
         lambda p: ChatEncoder(wrap(byte_bpe()), "{{ range(9) | random }}" + CHATML),
         ("renders differently every time",), ""),
    Case("a tokenizer without padding and end tokens", lambda p: load_tokenizer(_mute(p)),
         ("has neither a padding nor an end-of-sequence token: set tokenizer.eos_token",),
         ""),
    Case("a tokenizer without end of sequence", lambda p: stop_tokens(ChatEncoder(_endless())),
         ("there is no stop token: the tokenizer has no end-of-sequence token",),
         "then save the tokenizer"),
    Case("a length below the judge template", lambda p: _judge(p, max_length=20),
         ("max_length 20 leaves no room for responses: judge template 'helpful' alone has",),
         ""),
    Case("a letter of several tokens",
         lambda p: ChatEncoder(wrap(byte_bpe(vocab_size=1))).letter_ids(JudgeTemplates(TEMPLATES)),
         ("the letter 'A' is not exactly one token after the lead-in of",),
         ""),
]  # fmt: skip


def _shorter(model: Any) -> Any:
    model.model.layers = model.model.layers[:1]
    return model


def _relu(model: Any) -> Any:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    return model


def _unfrozen(model: Any) -> Any:
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.model.norm.weight.requires_grad_(True)
    return adapter


MODELS = [
    Case("a missing model", lambda p: p.run(f"model.model_name_or_path={p.folder / 'none'}"),
         ("there is no such folder",), ""),
    Case("a folder without a tokenizer", lambda p: p.run(f"model.model_name_or_path={_bare(p)}"),
         ("cannot load a tokenizer from ", "Couldn't instantiate the backend tokenizer"),
         "save it in the model's folder"),
    Case("a tokenizer and a model with different vocabularies",
         lambda p: p.run(f"model.model_name_or_path={_small(p)}"),
         ("the tokenizer has token ids up to ", "but the model has only 50 embeddings",
          "use the model's own tokenizer"), ""),
    Case("pickled weights", lambda p: load_model(_pickled(p)),
         ("has pickled weights (pytorch_model.bin)", "convert the weights: python -c "),
         ""),
    Case("truncated weights", lambda p: load_model(_cut(p)),
         ("cannot load a model from ", "SafetensorError"), "download or save them again"),
    Case("an adapter for another base model", lambda p: load_model(_adapter(p, str(p.saved))),
         ("the adapter ", " does not fit its base ", "size mismatch"),
         "correct adapter_config.json"),
    Case("an adapter whose base model is missing",
         lambda p: load_model(_adapter(p, str(p.folder / "gone"))),
         ("cannot load a model from ", "there is no such folder"),
         "correct base_model_name_or_path in adapter_config.json"),
    Case("an adapter without a base model", lambda p: load_model(_adapter(p, None)),
         ("does not name its base model in adapter_config.json",), ""),
    Case("a model without judge.json", lambda p: Judge.from_pretrained(p.base),
         ("has no judge.json (JSFT writes this file): pass the judge templates",),
         ""),
    Case("a broken judge.json", lambda p: Judge.from_pretrained(_broken(p)),
         ("judge.json is not a judge file written by JSFT",), "copy it from a checkpoint"),
    Case("a model that differs from its configuration",
         lambda p: p.make(model=_shorter(tiny_llama(441))).train(),
         ("in memory does not match its configuration",), "correct model.config"),
    Case("a model that is saved as another one",
         lambda p: p.make(model=_relu(tiny_llama(441))).train(),
         ("another one after it is saved and loaded",),
         ""),
    Case("an adapter beside other trained weights",
         lambda p: check_adapter(_unfrozen(tiny_llama(441))),
         ("and would not be saved",), ""),
    Case("a frozen model",
         lambda p: p.make(model=tiny_llama(441).requires_grad_(False)),
         ("no parameter of the model requires gradients",), ""),
]  # fmt: skip


def _without_bf16(p: Place) -> SelfJudgeConfig:
    """On a machine without it, as this one is made out to be."""
    p.patch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: False)
    return SelfJudgeConfig(str(p.folder), bf16=True, use_cpu=False)


LIBRARY = [
    Case("not a comparison", lambda p: _judge(p).compare([("x", "a", "b")]),
         ("comparison 0 is of type tuple: pass Comparison(context, response_a, response_b)",),
         ""),
    Case("lists of different lengths",
         lambda p: play(judge=_judge(p), contexts=["x"], responses=[["a"], ["b"]]),
         ("1 contexts, 2 lists of responses",), ""),
    Case("no responses", lambda p: play(judge=_judge(p), contexts=["x"], responses=[[]]),
         ("context 0 has no responses to choose from",), ""),
    Case("an unsupported precision", _without_bf16,
         ("Your setup doesn't support bf16",),
         "bf16=False; the commands replace it"),
    Case("two precisions",
         lambda p: SelfJudgeConfig(str(p.folder), bf16=True, fp16=True, use_cpu=True),
         ("At most one of fp16 and bf16 can be True, but not both",), ""),
    Case("rows without a prompt",
         lambda p: p.make(train_dataset=_rows({"text": "x"})),
         ("record 0 of the train dataset has neither 'query' nor 'prompt'; it has ['text']",),
         ""),
    Case("an empty prompt", lambda p: p.make(train_dataset=_rows({"prompt": ""})),
         ("record 0 of the train dataset: 'query' is empty or not text",), ""),
    Case("only prompts above the limit",
         lambda p: p.make(train_dataset=_rows({"prompt": "so " * 900})),
         ("no prompt in the train dataset fits: max_length 256 minus max_new_tokens 6",),
         ""),
    Case("a trainer without judge templates", lambda p: p.make(judge_templates=None),
         ("has no judge.json (JSFT writes this file): pass judge_templates",),
         ""),
    Case("responses longer than the context",
         lambda p: p.make(max_new_tokens=3000, max_length=4000),
         ("max_new_tokens (3000) must be below max_length (512)",),
         "max_length is at most the model's context"),
    Case("one argument under two names",
         lambda p: p.make(tokenizer=wrap(byte_bpe())),
         ("pass either tokenizer or processing_class, not both",), ""),
]  # fmt: skip

COMMANDS = [
    Case("output equal to input",
         lambda p: ["judge", str(p.data["hh"]), str(p.data["hh"]), "--model", str(p.saved)],
         ("hh.jsonl: the output would overwrite the input",), ""),
    Case("a line without the second response",
         lambda p: ["judge", str(p.file("l.jsonl", '{"context": "x", "response_a": "y"}')),
                    str(p.folder / "o.jsonl"), "--model", str(p.saved)],
         ("l.jsonl, line 1, field 'response_b': is missing; found",), ""),
    Case("a length below every prompt",
         lambda p: ["judge", str(p.file("l.jsonl", json.dumps(
             {"context": "x", "response_a": "y", "response_b": "z"}))),
             str(p.folder / "o.jsonl"), "--model", str(p.saved), "--max-length", "9"],
         ("max_length 9 leaves no room for responses: judge template ",), ""),
    Case("an existing verdict field",
         lambda p: ["judge", str(p.file("l.jsonl", json.dumps(
             {"context": "x", "response_a": "y", "response_b": "z", "verdict": 1}))),
             str(p.folder / "o.jsonl"), "--model", str(p.saved)],
         ("l.jsonl, line 1, field 'verdict': already exists", "--field NAME"),
         ""),
    Case("an empty evaluation",
         lambda p: ["eval", str(p.data["hh"]), "--model", str(p.saved), "--output",
                    str(p.folder / "o"), "--max-pairs", "0"],
         ("--max-pairs must be at least 1, got 0",), ""),
    Case("an empty tournament",
         lambda p: ["tournament", str(p.file("t.jsonl", '{"prompt": "x"}')),
                    str(p.folder / "o.jsonl"), "--model", str(p.saved), "--n", "0"],
         ("--n must be at least 1, got 0",), ""),
    Case("policies without prompts",
         lambda p: ["compare", str(p.saved), str(p.saved), "--judge", str(p.saved), "--output",
                    str(p.folder / "o")],
         ("no prompts to answer: pass --prompts FILE",), ""),
    Case("an empty report", lambda p: ["report", str(_empty(p))],
         ("nothing: nothing to report on",), ""),
    Case("an unknown GPU", lambda p: [*_check(p), "--gpu", "h900"],
         ("--gpu h900: unknown GPU; known GPUs: rtx-3090",), ""),
]  # fmt: skip

GROUPS = {
    "The run file": RUN_FILE,
    "Data": DATA,
    "Templates and tokenizers": WORDING,
    "Models": MODELS,
    "In Python": LIBRARY,
    "Commands": COMMANDS,
}
CASES = [case for cases in GROUPS.values() for case in cases]


# -- what the cases need ---------------------------------------------------------------------------


def _empty(p: Place) -> Path:
    folder = p.folder / "nothing"
    folder.mkdir()
    return folder


def _check(p: Place) -> list[str]:
    return ["check", *p.run()[1:]]


def _rows(*rows: dict[str, Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(list(rows))


def _judge(p: Place, **settings: Any) -> Judge:
    tokenizer = wrap(byte_bpe())
    return Judge(tiny_llama(len(tokenizer)), tokenizer, TEMPLATES, **settings)


def _mute(p: Place) -> Path:
    tokenizer = wrap(byte_bpe())
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(p.folder)
    return p.folder


def _endless() -> Any:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = wrap(byte_bpe(), plain)
    tokenizer.eos_token = None
    return tokenizer


def _bare(p: Place) -> Path:
    shutil.copy(p.base / "config.json", p.folder)
    return p.folder


def _small(p: Place) -> Path:
    folder = p.copy(p.base, "small")
    tiny_llama(50).save_pretrained(folder)
    return folder


def _pickled(p: Place) -> Path:
    folder = p.copy(p.saved, "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    return folder


def _cut(p: Place) -> Path:
    folder = p.copy(p.saved, "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def _adapter(p: Place, base: str | None) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    other = tiny_llama(441, hidden_size=64, intermediate_size=128)
    get_peft_model(other, config).save_pretrained(p.folder)
    about = p.folder / "adapter_config.json"
    named = {**json.loads(about.read_text()), "base_model_name_or_path": base}
    about.write_text(json.dumps(named))
    return p.folder


def _broken(p: Place) -> Path:
    folder = p.copy(p.saved, "broken")
    (folder / "judge.json").write_text('{"judge_templates": ')
    return folder
