"""Secrets: planted wherever a run takes text from, and found nowhere in what it says and writes."""

from __future__ import annotations

import gzip
import json
import random
import string
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bad_input import JSFT, TRAIN, Place
from fake_vllm import FakeVLLM, serving
from self_judge import SelfJudgeConfig
from self_judge.cli import main
from self_judge.console import masked
from self_judge.errors import EngineError
from self_judge.inference.vllm.client import VLLMServers


def planted(prefix: str = "") -> str:
    """A secret that is another one in every run of the tests."""
    return prefix + "".join(random.choices(string.ascii_letters + string.digits, k=24))


def leaks(secret: str, folder: Path, *said: str) -> list[str]:
    """The files, compressed ones too, and the texts that contain a secret."""
    found = [text[:200] for text in said if secret in text]
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            found += [str(path)] if secret.encode() in plain else []
    return found


@pytest.mark.parametrize("kind", ["jsft", "train"])
def test_a_run_says_and_writes_no_secret(
    kind: str,
    place: Place,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token, variable, proxy = planted(), planted("hf_"), planted()
    monkeypatch.setenv("HF_TOKEN", variable)
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{proxy}@127.0.0.1:9")
    words = place.run(
        f"training_args.hub_token={token}",
        f"training_args.run_name={variable}",
        f"training_args.hub_model_id=http://me:{proxy}@hub/x",
        "training_args.save_steps=1",
        config=TRAIN if kind == "train" else JSFT,
    )
    folder = place.folder / "run"
    assert main(words) == 0
    # On again with another token: the change is said, and neither of the two.
    other = planted()
    again = [w.replace(token, other) for w in words]
    again += ["training_args.max_steps=2", "training_args.resume_from_checkpoint=true"]
    assert main(again) == 0
    assert main(["report", str(folder)]) == 0
    assert main(["check", *again[1:]]) in (0, 1)
    assert main(["check", *again[1:], "--json"]) in (0, 1)
    assert main([*again, f"training_args.nope={token}"]) == 2
    assert main([*again, "training_args.max_steps=x"]) == 2
    assert main([*again, f"dataset.sources=[{{path: 'http://me:{proxy}@host/x.jsonl'}}]"]) == 2
    with pytest.raises(SystemExit):
        main([*again, f"--hub_token={token}"])
    said = capsys.readouterr()
    assert "trained" in said.out or "training" in said.err  # it did say something
    for secret in (token, other, variable, proxy):
        assert not leaks(secret, folder, said.out, said.err, caplog.text)
    assert "***" in (folder / "run.json").read_text()


def test_the_command_to_resume_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from self_judge import cli
    from self_judge.console import neutral

    token = planted()
    monkeypatch.setattr(sys, "argv", ["self-judge"])
    argv = ["self-judge", "jsft", "x.yaml", f"training_args.hub_token={token}"]
    shown = neutral(cli._resume_command(argv))
    assert token not in shown
    assert "training_args.hub_token=***" in shown


def test_a_password_in_a_servers_url_is_in_no_message(
    caplog: pytest.LogCaptureFixture, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    password = planted()

    def hidden(error: BaseException) -> None:
        assert password not in str(error)
        assert "***@127.0.0.1" in str(error)

    with serving(FakeVLLM()) as good, serving(FakeVLLM()) as bad:
        urls = [s.url.replace("//", f"//me:{password}@") for s in (good, bad)]
        engine = VLLMServers(urls, timeout=2, retry_wait=0.001)
        good.broken = bad.broken = True
        with pytest.raises(EngineError) as error:
            engine.next_token_logprobs([[1]], (1, 2), None, lambda n: None)
        hidden(error.value)
        pairs = place.file("p.jsonl", '{"context": "q", "response_a": "a", "response_b": "b"}\n')
        words = ["judge", str(pairs), str(place.folder / "out.jsonl"), "--model", str(place.saved)]
        assert main([*words, "--vllm-server", urls[0]]) == 2
        with pytest.raises(EngineError) as absent:
            VLLMServers([urls[0].replace(good.url[-5:], "9")], timeout=0.01)
        hidden(absent.value)
    said = capsys.readouterr()
    assert not leaks(password, place.folder, said.out, said.err, caplog.text)
    config = SelfJudgeConfig(str(place.folder), vllm_server_base_url=urls, use_cpu=True)
    assert password not in config.to_json_string()  # what trackers are given


SECRETS = {
    "a setting": "training_args.hub_token={}",
    "a setting in YAML": "training_args={{hub_token: {}}}",
    "a setting in JSON": '{{"hub_token": "{}", "x": 1}}',
    "an older setting": "push_to_hub_token={}",
    "a key": "wandb_api_key='{}'",
    "a variable": "WANDB_API_KEY={} self-judge",
    "a URL": "cannot reach http://me:{}@host:8000/v1",
    "a URL without a user": "https://:{}@host",
    "an @ in a password": "http://me:a@{}@host",
    "a query": "https://host/x.jsonl?token={}&y=1",
    "a header": "Authorization: Bearer {}",
    "another header": "Authorization: Basic {}",
    "a header as Python shows it": "{{'Authorization': 'token {}'}}",
    "a bearer": "bearer {}",
    "Hugging Face": "Invalid token hf_{} given",
    "GitHub": "ghp_{}",
    "a password": "password={}",
}


@pytest.mark.parametrize("text", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_masked_wherever_it_stands_in_a_text(text: str) -> None:
    secret = planted()
    shown = masked(text.format(secret))
    assert secret not in shown
    assert "***" in shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "token_id_a=3", "eos_token='</s>'", "pad_token: <pad>", "max_new_tokens=8",
        "hub_token=null",
        '"hub_token": null', "tokens_per_second/sampling", "training_args.hub_token: unknown key",
        "write to me@example.org", "http://host:8000/v1", "The bearer of this letter", "a@b",
        "5f0c3d1e5f0c3d1e5f0c3d1e5f0c3d1e5f0c3d1e", "s3://bucket/key", "the password is wrong",
    ],
)  # fmt: skip
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert masked(text) == text


def test_a_tree_is_masked_by_its_names_and_its_shape_stays() -> None:
    secret = planted()
    tree = {"a": [{"hub_token": secret, "seed": 1, "none": None}], "note": f"x {secret}"}
    assert masked(tree)["a"] == [{"hub_token": "***", "seed": 1, "none": None}]
    assert masked(tree)["note"] == "x ***"  # what is known as a secret is one everywhere
    assert tree["a"][0]["hub_token"] == secret
    assert json.loads(json.dumps(masked({"hub_token": None}))) == {"hub_token": None}


def test_megabytes_are_masked_in_time_linear_in_their_length() -> None:
    for piece in ("a", "://", "http://a", "token", "hub_token=", "bearer ", "@", "_-.", "hf_"):
        started = time.monotonic()
        masked(piece * (200_000 // len(piece)))
        assert time.monotonic() - started < 5, piece


def test_the_token_is_there_for_the_upload_but_in_no_file(make: Any, tmp_path: Path) -> None:
    token = planted()
    trainer = make(hub_token=token, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert trainer.args.hub_token == token
    assert not leaks(token, tmp_path)
