"""`self-judge check` shows what a run trains on, and says what would go wrong, before it runs."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conftest import CHATML, ROOT, SHARED, byte_bpe, tiny_llama, wrap
from run_overrides import given
from self_judge.check.check import Report, check
from self_judge.check.findings import engine_findings
from self_judge.check.view import show
from self_judge.cli import main
from self_judge.config.schema import kind_of_run, load_run
from self_judge.console import neutral
from self_judge.data import synthetic
from self_judge.errors import ConfigError
from self_judge.models import load_tokenizer
from self_judge.prompting.judge_json import save_judge_settings
from self_judge.storage.atomic import seal
from self_judge.training.jsft.examples import jsft_dataset
from self_judge.training.setup import jsft_chat_setup, load_data

JSFT = str(ROOT / "configs" / "hh_jsft.yaml")
TRAIN = str(ROOT / "configs" / "hh_self_judge.yaml")


@pytest.fixture
def taught(base: Path, tmp_path: Path) -> Path:
    """The base model with a judge.json, as JSFT writes it."""
    folder = tmp_path / "taught"
    shutil.copytree(base, folder)
    run = load_run(JSFT, [f"model.model_name_or_path={base}"], "jsft")
    encoder, settings = jsft_chat_setup(run)
    templates = settings.templates
    save_judge_settings(folder, encoder, templates, encoder.letter_ids(templates))
    return folder


def problems(report: Report) -> str:
    return "\n".join(f"{f.about}: {f.text}" for f in report.problems)


def warnings(report: Report) -> str:
    return "\n".join(f"{f.about}: {f.text}" for f in report.findings if f.level == "warning")


def shown(report: Report, **options: Any) -> str:
    stream = io.StringIO()
    plain = options.get("plain", True)
    # Wide, so that no line is broken inside of what is looked for.
    console = Console(
        file=stream, width=10_000, highlight=False, color_system=None if plain else "truecolor"
    )
    show(report, console, plain=plain)
    return stream.getvalue()


# -- what is shown -------------------------------------------------------------------------------


def test_a_sound_jsft_run_has_no_problem(base: Path, data: dict[str, Path]) -> None:
    report = check(JSFT, given(base, data["hh"]))
    assert not problems(report)
    assert report.encoded == report.records
    assert report.counts["judge examples"] == sum(report.letter_counts.values())
    assert report.letter_counts["A"] == report.letter_counts["B"] > 0
    assert {f.kind for f in report.figures} == {"SFT", "judge, helpfulness"}
    assert all(f.bos == (1, 1) for f in report.figures)


def test_what_is_shown_is_what_the_run_trains_on(base: Path, data: dict[str, Path]) -> None:
    overrides = given(base, data["hh"])
    run = load_run(JSFT, overrides, "jsft")
    encoder, settings = jsft_chat_setup(run)
    templates = settings.templates
    records = load_data(run, lambda line: None)[0].records
    rows, _ = jsft_dataset(records, encoder, templates, encoder.letter_ids(templates))
    report = check(JSFT, overrides)
    firsts = [rows[0], rows[1], rows[2]]  # SFT, better first, worse first
    assert report.examples[0].title.startswith("SFT")
    for sample, row in zip(report.examples, firsts, strict=True):
        assert [i for p in sample.pieces for i in p.ids] == row["input_ids"]
        labels = [i if p.trained else -100 for p in sample.pieces for i in p.ids]
        assert labels == row["labels"]
        text = "".join(p.text for p in sample.pieces)
        assert text == encoder.tokenizer.decode(row["input_ids"])
        for piece in sample.pieces:
            assert all(encoder.is_control(i) == piece.control for i in piece.ids)


def test_plain_output_marks_exactly_the_trained_text_and_has_no_escape_codes(
    base: Path, data: dict[str, Path]
) -> None:
    report = check(JSFT, given(base, data["hh"]))
    text = shown(report)
    assert "\x1b" not in text
    judge = [s for s in report.examples if s.title.startswith("judge")]
    assert [p.text for s in judge for p in s.pieces if p.trained] == [" A", " B"]
    assert "« A»" in text
    assert "« B»" in text
    (end,) = [p.text for p in report.examples[0].pieces if p.trained and p.control]
    assert end == "<|end|>"
    assert "«<|end|>»" in text


def test_long_samples_keep_the_end_of_the_context_and_the_start_of_the_responses(
    base: Path, taught: Path, tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    rows = [
        {"prompt": f"{'many words. ' * 60}Why {i}?", "chosen": f"Because {i}. {'So. ' * 150}",
         "rejected": f"Who knows {i}. {'No. ' * 150}"}
        for i in range(8)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    for report in (check(JSFT, given(base, path)), check(TRAIN, given(taught, path))):
        text = " ".join(shown(report).split())
        judged = [s for s in text.split("judge, helpfulness, ")[1:] if "characters…]" in s]
        for sample, first in zip(judged, ("Because", "Who knows"), strict=True):
            assert re.search(rf"words. Why \d[^…]{{,99}}{first} \d. \w\w. ", sample)


def test_every_principle_is_shown_in_both_orders_with_its_rationale(
    base: Path, data: dict[str, Path]
) -> None:
    report = check(str(ROOT / "configs" / "uf_jsft_pr.yaml"), given(base, data["ultrafeedback"]))
    titles = [s.title for s in report.examples]
    for principle in synthetic.PRINCIPLES:
        assert f"judge, {principle}, better response first: A" in titles
        assert f"judge, {principle}, worse response first: B" in titles
    trained = [p.text for s in report.examples[1:] for p in s.pieces if p.trained]
    assert all("Rationale for Response A:" in text for text in trained)


def test_self_training_shows_the_prompt_and_both_orders_of_the_judge(
    taught: Path, data: dict[str, Path]
) -> None:
    report = check(TRAIN, given(taught, data["hh"]))
    assert not problems(report)
    prompt, first, second = report.examples
    assert prompt.pieces[-1].text.endswith("<|assistant|>")
    assert not any(p.trained for s in report.examples for p in s.pieces)
    assert "first response first" in first.title
    assert "second response first" in second.title
    assert report.cost is not None
    assert report.cost.per_step == {
        "prompts": 64,
        "responses": 128,
        "comparisons": 64,
        "judge prompts": 128,
    }


def test_steps_are_those_that_the_trainer_takes(base: Path, data: dict[str, Path]) -> None:
    sizes = ["training_args.per_device_train_batch_size=4", "jsft_args.global_batch_size=8"]
    report = check(JSFT, given(base, data["hh"], *sizes, "training_args.num_train_epochs=2"))
    assert report.cost is not None
    assert report.cost.examples == sum(report.counts[k] for k in ("sft examples", "judge examples"))
    assert report.cost.steps_per_epoch == -(-report.cost.examples // 8)
    assert report.cost.steps == 2 * report.cost.steps_per_epoch


def test_of_many_records_some_are_encoded_and_the_report_says_so(
    base: Path, data: dict[str, Path]
) -> None:
    whole = check(JSFT, given(base, data["hh"]))
    part = check(JSFT, given(base, data["hh"]), examples=10)
    assert part.encoded == 10 < part.records == whole.records
    assert part.sources == whole.sources
    assert f"10 of {part.records} records" in shown(part)
    assert part.cost is not None
    assert whole.cost is not None
    assert part.cost.examples == pytest.approx(whole.cost.examples, rel=0.1)


@pytest.mark.parametrize(
    ("hostile", "written_out"),
    [("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J"), ("\u202eevil", "\\u202e"), ("\x9b31m", "\\x9b")],
)
def test_text_from_data_cannot_steer_the_terminal(
    hostile: str, written_out: str, base: Path, tmp_path: Path
) -> None:
    source = tmp_path / "hostile.jsonl"
    rows = [
        {
            "chosen": f"\n\nHuman: hello {i}\n\nAssistant: yes {hostile}[red]x[/red]",
            "rejected": f"\n\nHuman: hello {i}\n\nAssistant: no {hostile}",
        }
        for i in range(8)
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    report = check(JSFT, given(base, source, "dataset.held_out=0.0"))
    for text in (shown(report), shown(report, plain=False)):
        assert hostile not in text
        assert "\x1b]" not in text
        assert written_out in text
        assert "[red]x[/red]" in text  # markup is text as well
    assert neutral("a\nb é 你") == "a\nb é 你"


# -- exit status ---------------------------------------------------------------------------------


def test_the_exit_status_is_0_1_or_2(
    base: Path, data: dict[str, Path], capsys: Any, tmp_path: Path
) -> None:
    sound = given(base, data["hh"])
    assert main(["check", JSFT, *sound, "--plain"]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["check", JSFT, *sound, "jsft_args.max_length=8", "--plain"]) == 1
    assert "problem" in capsys.readouterr().out
    # Overrides may stand behind options.
    assert main(["check", JSFT, "--plain", *sound, "jsft_args.max_lenght=8"]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["check", JSFT, *given(base, tmp_path / "no.jsonl")]) == 2
    assert "no.jsonl" in capsys.readouterr().err
    assert main(["check", JSFT, *given(tmp_path / "nowhere", data["hh"])]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_json_has_everything(base: Path, data: dict[str, Path], capsys: Any) -> None:
    assert main(["check", JSFT, *given(base, data["hh"]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == 0
    assert found["kind"] == "jsft"
    assert found["needs"]["memory"]["weights"] > 0
    assert found["samples"][0]["pieces"][0]["ids"]
    assert found["level"] in ("amber", "green")
    long = "jsft_args.max_length=20"
    assert main(["check", JSFT, *given(base, data["hh"]), "--json", long]) == 1
    assert json.loads(capsys.readouterr().out)["level"] == "red"


def test_the_kind_of_a_run_is_told_by_its_content(tmp_path: Path) -> None:
    assert kind_of_run(JSFT) == "jsft"
    assert kind_of_run(TRAIN) == "self_judge"
    neither = tmp_path / "run.yaml"
    neither.write_text("model: {model_name_or_path: x}\n")
    with pytest.raises(ConfigError, match="neither jsft_args nor self_judge_args"):
        kind_of_run(neither)


@pytest.mark.parametrize("command", ["jsft", "train", "check"])
def test_every_command_refuses_a_run_file_that_does_not_say_its_kind(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    judge = "templates: {judge: {a: {user: '{context} {response_a} {response_b}', assistant: b}}}"
    file.write_text(f"model: {{model_name_or_path: x}}\ndataset: {{sources: [x: 1]}}\n{judge}\n")
    assert main([command, str(file), "dataset.sources=[{path: x}]"]) == 2
    assert "it has neither jsft_args nor self_judge_args" in capsys.readouterr().err


# -- findings------------------------------------------------------------------------------------


def test_no_room_beside_a_response_is_refused_when_the_file_is_read(
    taught: Path, data: dict[str, Path], capsys: Any
) -> None:
    lengths = ["self_judge_args.max_new_tokens=128", "self_judge_args.max_length=128"]
    assert main(["check", TRAIN, *given(taught, data["hh"]), *lengths]) == 2
    assert "max_new_tokens (128) must be below max_length (128)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft_config.inference_mode=true"], "no parameter is trained"),
        (["peft_config.target_modules=[nowhere]"], "nowhere"),
        (["jsft_args.global_batch_size=7"], "global_batch_size 7"),
        (["jsft_args.max_length=8"], "no training example remains"),
        (["dataset.sources.0.pairs=false"], "no judge example"),
    ],
)
def test_jsft_findings(
    overrides: list[str], message: str, base: Path, data: dict[str, Path]
) -> None:
    assert message in problems(check(JSFT, given(base, data["hh"], *overrides)))


def with_template(base: Path, folder: Path, template: str | None, **tokens: Any) -> Path:
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = template
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


ROLES = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
)
OPENS = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (ROLES + OPENS.replace("'<|assistant|>'", "'<|assistant|>Sure:'"), "not a prefix"),
        (ROLES.replace(" + '<|end|>'", " + '\n'") + OPENS, "end of an answer is not trained"),
        ("{{ bos_token }}{{ bos_token }}" + ROLES + OPENS, "twice"),
    ],
)
def test_chat_template_findings(
    template: str, message: str, base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    model = with_template(base, tmp_path / "model", template)
    assert message in problems(check(JSFT, given(model, data["hh"])))


def test_a_tokenizer_in_which_nothing_ends_an_answer_is_a_problem(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    ends = ROLES.replace(" + '<|end|>'", " + '\n'") + OPENS
    model = with_template(base, tmp_path / "m", ends, eos_token=None)
    assert "there is no stop token" in problems(check(JSFT, given(model, data["hh"])))


def test_letters_that_are_not_one_token_are_a_problem(
    data: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = wrap(byte_bpe(vocab_size=1))  # bytes alone: " A" is a space, then an A
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(len(tokenizer), max_position_embeddings=8192).save_pretrained(tmp_path)
    found = problems(check(JSFT, given(tmp_path, data["hh"], "jsft_args.max_length=8192")))
    assert found.startswith("letters: ")
    assert "A" in found


def test_data_that_is_mostly_skipped_is_warned_of(base: Path, tmp_path: Path) -> None:
    asked = [f"\n\nHuman: what is {i}?\n\nAssistant:" for i in range(20)]
    rows = [
        {"chosen": f"{ask} A number.", "rejected": f"{ask} {'No' if i % 3 else 'A number'}."}
        for i, ask in enumerate(asked)
    ]
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    report = check(JSFT, given(base, source, "dataset.held_out=0.0"))
    assert "7 of 20 pairs are skipped" in warnings(report)


def test_padding_with_the_end_of_sequence_is_harmless_and_explained(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    own = load_tokenizer(base)
    model = with_template(base, tmp_path / "m", own.chat_template, pad_token=own.eos_token)
    report = check(JSFT, given(model, data["hh"]))
    assert not problems(report)
    assert any(f.level == "note" and "harmless here" in f.text for f in report.findings)


def test_a_tokenizer_larger_than_the_model_is_a_problem(
    data: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = synthetic.tiny_tokenizer()
    tiny_llama(len(tokenizer) - 8).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "use the model's own tokenizer" in problems(check(JSFT, given(tmp_path, data["hh"])))


def test_a_tokenizer_without_a_chat_template_is_a_problem(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    model = with_template(base, tmp_path / "m", None)
    markers = ["templates.user=null", "templates.assistant=null"]
    assert "has no chat template" in problems(check(JSFT, given(model, data["hh"], *markers)))


def test_sequences_beyond_the_models_context_are_a_problem(
    data: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = synthetic.tiny_tokenizer()
    tiny_llama(len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "the model's context length is 64" in problems(check(JSFT, given(tmp_path, data["hh"])))


def test_cut_examples_and_full_half_precision_are_warned_of(
    base: Path, data: dict[str, Path]
) -> None:
    report = check(JSFT, given(base, data["hh"]))
    longest = max(f.tokens["max"] for f in report.figures)
    short = check(JSFT, given(base, data["hh"], f"jsft_args.max_length={longest // 2}"))
    assert "examples are left out" in warnings(short) + problems(short)
    half = given(base, data["hh"], "peft_config=null", "model.dtype=bfloat16")
    found = check(JSFT, half, gpu="h100")
    assert "loses small updates to rounding" in warnings(found)


def test_evaluation_on_what_is_trained_on_is_warned_of(base: Path, data: dict[str, Path]) -> None:
    same = given(base, data["hh"], f"dataset.eval=[{{path: {data['hh']}}}]")
    assert "evaluation prompts begin with a question from the training data" in warnings(
        check(JSFT, same)
    )


def test_other_judge_templates_than_were_taught_are_a_problem(
    taught: Path, base: Path, data: dict[str, Path]
) -> None:
    run = load_run(JSFT, [f"model.model_name_or_path={base}"], "jsft")
    judge = run.templates.judge
    assert judge is not None
    other = json.dumps({"helpfulness": {**judge["helpfulness"], "assistant": "I prefer Response"}})
    report = check(TRAIN, given(taught, data["hh"], f"templates.judge={other}"))
    assert "helpfulness.assistant differs from the model's judge.json" in problems(report)
    stranger = json.dumps({"wit": judge["helpfulness"]})
    report = check(TRAIN, given(taught, data["hh"], f"templates.judge={stranger}"))
    assert "was not trained on the principle 'wit'" in problems(report)
    untaught = given(base, data["hh"], f"templates.judge={json.dumps(judge)}")
    assert "has no judge.json" in warnings(check(TRAIN, untaught))
    assert "has no judge.json" in problems(check(TRAIN, given(base, data["hh"])))


def test_another_chat_template_or_letter_than_was_taught_is_a_problem(
    taught: Path, data: dict[str, Path]
) -> None:
    chat = json.dumps(CHATML.replace("<|im_start|>", "<|user|>").replace("<|im_end|>", "<|end|>"))
    assert "templates.chat: differs" in problems(
        check(TRAIN, given(taught, data["hh"], f"templates.chat={chat}"))
    )
    thinking = given(taught, data["hh"], "templates.chat_template_kwargs={enable_thinking: true}")
    assert "chat_template_kwargs.enable_thinking: is True, but was False in" in problems(
        check(TRAIN, thinking)
    )
    wrong = given(taught, data["hh"], "self_judge_args.token_id_a=7")
    assert "token_id_a=7" in problems(check(TRAIN, wrong))


def test_prompts_that_leave_no_room_for_a_response(taught: Path, data: dict[str, Path]) -> None:
    report = check(TRAIN, given(taught, data["hh"]))
    longest = next(f for f in report.figures if f.kind == "prompts").tokens["max"]
    lengths = [
        "self_judge_args.max_new_tokens=200",
        f"self_judge_args.max_length={200 + longest - 1}",
    ]
    assert "prompts" in warnings(check(TRAIN, given(taught, data["hh"], *lengths)))
    none = ["self_judge_args.max_new_tokens=200", "self_judge_args.max_length=202"]
    assert "prompts are longer than" in problems(check(TRAIN, given(taught, data["hh"], *none)))


def test_two_long_responses_that_no_judge_prompt_holds(taught: Path, data: dict[str, Path]) -> None:
    lengths = ["self_judge_args.max_new_tokens=300", "self_judge_args.max_length=600"]
    report = check(TRAIN, given(taught, data["hh"], *lengths))
    assert "leave no room in a judge prompt for two responses of 300" in warnings(report)


def test_settings_that_do_not_do_what_they_say(
    taught: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    own = given(taught, data["hh"])
    assert "sync_ref_model" in problems(check(TRAIN, [*own, "training_args.sync_ref_model=true"]))
    assert "padding_free" in warnings(check(TRAIN, [*own, "training_args.padding_free=true"]))
    assert "would overwrite the input" in problems(
        check(TRAIN, [*own, f"training_args.output_dir={taught}"])
    )
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    before = [*own, f"training_args.output_dir={tmp_path / 'run'}"]
    assert "checkpoint-5 is skipped: it has no manifest" in warnings(check(TRAIN, before))
    (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    seal(tmp_path / "run" / "checkpoint-5")
    goes_on = check(TRAIN, before)
    assert any("the run resumes from" in f.text for f in goes_on.findings)
    anew = [*before, "training_args.resume_from_checkpoint=null"]
    assert "has checkpoints from another run" in warnings(check(TRAIN, anew))
    nothing = [*own, "dataset.held_out=0.0"]
    assert "no evaluation data" in warnings(check(TRAIN, nothing))
    ipo = check(TRAIN, [*own, "self_judge_args.loss_type=ipo"])
    assert any("averages log-probabilities" in f.text for f in ipo.findings)


def bloom(folder: Path, base: Path) -> Path:
    """A model whose positions are counted in the row: no tree is exact for it."""
    from transformers import BloomConfig, BloomForCausalLM

    shutil.copytree(base, folder)
    size = len(load_tokenizer(base))
    config = BloomConfig(vocab_size=size, hidden_size=32, n_layer=3, n_head=4)
    BloomForCausalLM(config).save_pretrained(folder)
    return folder


def test_prefixes_that_will_not_be_shared_are_warned_of(
    base: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    model = bloom(tmp_path / "bloom", base)
    own = given(model, data["hh"], "model.attn_implementation=eager")
    found = warnings(check(JSFT, [*own, "training_args.gradient_checkpointing=true"]))
    assert "the update does not share prefixes: no tree: it does not accept position ids" in found
    assert "gradient checkpointing does not support a cache" in found
    without = warnings(check(JSFT, [*own, "training_args.gradient_checkpointing=false"]))
    assert "does not share prefixes" not in without
    forced = problems(check(JSFT, [*own, "jsft_args.packing=tree"]))
    assert "packing=tree cannot be used: it does not accept position ids" in forced


def test_bf16_alone_is_no_reason_not_to_share_prefixes(base: Path, data: dict[str, Path]) -> None:
    for full in ([], ["peft_config=null"]):
        own = [*given(base, data["hh"]), "training_args.bf16=true", *full]
        report = check(JSFT, own)
        assert "does not share prefixes" not in warnings(report)
        notes = [f.text for f in report.findings if f.level == "note"]
        assert any("the update shares prefixes (tree): exact with sdpa" in text for text in notes)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_a_model_that_samples_through_generate_is_warned_of(
    packing: str, taught: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("self_judge.inference.decoding._gate", lambda model: "its cache forgets")
    own = [*given(taught, data["hh"]), f"self_judge_args.packing={packing}"]
    assert "for each response: its cache forgets" in warnings(check(TRAIN, own))


def test_a_run_that_does_not_fit_into_the_gpu_is_a_problem(
    taught: Path, data: dict[str, Path]
) -> None:
    sizes = [
        "self_judge_args.generation_batch_size=4000000",
        "self_judge_args.global_batch_size=4000000",
    ]
    report = check(TRAIN, given(taught, data["hh"], *sizes), gpu="l4")
    assert "lower generation_batch_size" in problems(report)


def test_a_colocated_engine_is_set_beside_what_training_leaves(
    taught: Path, data: dict[str, Path]
) -> None:
    def found(*more: str, gpu: str | None = "h100") -> dict[str, tuple[str, str]]:
        own = given(taught, data["hh"], "self_judge_args.use_vllm=true", *more)
        report = check(TRAIN, own, gpu=gpu)
        return {f.about: (f.level, f.text) for f in report.findings}

    fits = found()
    level, text = fits["vllm_gpu_memory_utilization"]
    assert level == "note"
    assert "takes 24.0 of the GPU's 80 GiB and cannot start if less is free" in text
    assert "capturing CUDA graphs take minutes" in fits["use_vllm"][1]
    whole = "self_judge_args.vllm_gpu_memory_utilization=1.0"
    level, text = found(whole)["vllm_gpu_memory_utilization"]
    assert (level, text[-8:]) == ("problem", "lower it")  # CUDA itself takes some
    level, text = found("self_judge_args.vllm_gpu_memory_utilization=0.000001")[
        "vllm_gpu_memory_utilization"
    ]
    assert (level, text[-8:]) == ("problem", "raise it")
    server = ["self_judge_args.vllm_mode=server", "self_judge_args.vllm_server_base_url=http://x"]
    for elsewhere in (found(*server), found(gpu=None)):
        assert "vllm_gpu_memory_utilization" not in elsewhere


def test_an_engine_that_sleeps_leaves_its_memory_to_the_update(
    taught: Path, data: dict[str, Path]
) -> None:
    overrides = given(taught, data["hh"], "self_judge_args.use_vllm=true")
    run = load_run(TRAIN, overrides, "self_judge")
    report = check(TRAIN, overrides, gpu="h100")
    assert report.cost is not None
    large = dataclasses.replace(report.cost.memory, activations=70 * 2**30)
    cost = dataclasses.replace(report.cost, memory=large)
    (engine, _) = engine_findings(run.self_judge_args, cost, bf16=True)
    assert engine.level == "warning"
    assert engine.text.endswith("lower it, or set vllm_enable_sleep_mode")
    asleep = dataclasses.replace(run.self_judge_args, vllm_enable_sleep_mode=True)
    (engine, _) = engine_findings(asleep, cost, bf16=True)
    assert engine.level == "note"


# -- a real model --------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "data/hh-rlhf").is_dir(), reason="the real data is not there")
@pytest.mark.skipif(
    not (SHARED.parent / "smollm2").is_dir(), reason="SmolLM2 is not beside the project"
)
def test_smollm2_on_real_dialogues() -> None:
    source = SHARED / "data/hh-rlhf/base_train.jsonl.gz"
    report = check(JSFT, given(SHARED.parent / "smollm2", source), examples=20)
    assert not problems(report)
    assert report.letters[0].token == "ĠA"
    assert report.cost is not None
    assert report.cost.size.parameters == pytest.approx(134.5e6, rel=0.02)
    assert "skipped pair: identical responses" in next(iter(report.sources.values()))
