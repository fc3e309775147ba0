"""Stand-ins for vLLM: a server with as much of its HTTP as the client uses, by a rule in place of
a model; and its `LLM` in this process, over a model.
"""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import last_logits
from local_server import local_server

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
STOP = 7


class FakeVLLM:
    """Answers a prompt with ids that follow from the prompt, the seed and the adapter.

    Attributes:
        requests: (path, body) of every request, as they came.
        adapters: name -> folder of the adapters that are loaded.
        weights: names of the tensors of the last weights that were handed over.
        failures: HTTP statuses to answer next instead of doing what is asked; 0 drops the line.
        broken: every completion from now on drops the line.
        key: the key that every request must have, or `None`.
    """

    def __init__(self, model: str = "policy", max_model_len: int = 512, lora: bool = True) -> None:
        self.model, self.max_model_len, self.lora = model, max_model_len, lora
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.adapters: dict[str, str] = {}
        self.weights: list[str] = []
        self.failures: list[int] = []
        self.broken = False
        self.key: str | None = None
        self.url = ""
        self.current = threading.local()  # `connection`: that of the request in this thread

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter" and self.lora:
            folder = Path(body["lora_path"])
            assert {f.name for f in folder.iterdir()} >= {
                "adapter_config.json",
                "adapter_model.safetensors",
            }
            self.adapters[body["lora_name"]] = body["lora_path"]
            return 200, "Success"
        if path == "/v1/unload_lora_adapter" and self.lora:
            del self.adapters[body["lora_name"]]
            return 200, "Success"
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
            self.weights = [n for f in files for n in safe_open(f, "pt").keys()]  # noqa: SIM118
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = body["model"]
        if model not in (self.model, *self.adapters):
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        prompts = body["prompt"]
        if isinstance(prompts[0], int):
            prompts = [prompts]
        if any(len(p) + body["max_tokens"] > self.max_model_len for p in prompts):
            return 400, {"error": {"message": "This model's maximum context length is exceeded."}}
        choices: list[dict[str, Any]] = []
        for index, prompt in enumerate(prompts):
            if body.get("logprob_token_ids"):
                listed = {0, 1, 2, 3, 4, *body["logprob_token_ids"]}
                top = {f"token_id:{t}": -float(1 + (sum(prompt) + t) % 5) for t in listed}
                choices.append({"index": index, "logprobs": {"top_logprobs": [top]}})
            else:
                first = (sum(prompt) + body["seed"] + 3 * (model != self.model)) % 5
                ids = [first, first + 1, STOP]
                choice: dict[str, Any] = {"index": index, "token_ids": ids}
                if body.get("logprobs") is not None:
                    tops = [{f"token_id:{t}": -0.5} for t in ids] if body["logprobs"] else None
                    choice["logprobs"] = {"token_logprobs": [-0.5] * 3, "top_logprobs": tops}
                choices.append(choice)
        return 200, {"choices": choices[::-1]}  # in whatever order they were finished


def _handler(fake: FakeVLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def reply(self, status: int, body: Any) -> None:
            if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                status, body = 401, {"error": "Unauthorized"}
            payload = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def do_GET(self) -> None:
            card = {"id": fake.model, "root": fake.model, "parent": None}
            cards = [{**card, "max_model_len": fake.max_model_len}]
            cards += [{"id": a, "parent": fake.model} for a in fake.adapters]
            self.reply(200, {"data": cards[::-1]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fake.requests.append((self.path, body))
            fake.current.connection = self.connection
            status = fake.failures.pop(0) if fake.failures else 200
            if status == 0 or (fake.broken and self.path == "/v1/completions"):
                self.close_connection = True
                return
            if status != 200:
                self.reply(status, {"error": {"message": "told to fail"}})
                return
            self.reply(*fake.answer(self.path, body))

    return Handler


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    with local_server(_handler(fake)) as fake.url:
        yield fake


class FakeLLM:
    """vLLM's `LLM` in this process over a real model, as far as the colocated engine uses it.

    Like vLLM's, it drops its weights where it sleeps at level 2, and answers nothing while asleep.

    Attributes:
        started: every engine of this process.
        slept: the levels it was asked to sleep at.
    """

    started: ClassVar[list[FakeLLM]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings = settings
        config = AutoConfig.from_pretrained(model)
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.adapters: dict[int, str] = {}
        self.slept: list[int] = []
        self.asleep = False
        self.llm_engine = self
        FakeLLM.started.append(self)

    def sleep(self, level: int) -> None:
        assert self.settings["enable_sleep_mode"]
        self.slept.append(level)
        self.asleep = True
        if level == 2:
            for parameter in self.model.parameters():
                parameter.data.fill_(torch.nan)

    def wake_up(self) -> None:
        self.asleep = False

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        assert not self.asleep
        self.model.load_state_dict(dict(kwargs["weights_iterator"]), strict=False)

    def apply_model(self, call: Any) -> None:
        call(self.model)

    def reset_prefix_cache(self) -> None:
        pass

    def add_lora(self, request: Any) -> None:
        self.adapters[request.lora_int_id] = request.folder

    def remove_lora(self, number: int) -> None:
        del self.adapters[number]

    @torch.no_grad()
    def generate(
        self, prompts: list[Any], params: list[Any], use_tqdm: bool, lora_request: Any
    ) -> list[Any]:
        assert not self.asleep
        model: Any = self.model
        if lora_request is not None:
            folder = self.adapters[lora_request.lora_int_id]
            model = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        outputs = []
        for prompt, param in zip(prompts, params, strict=True):
            ids = list(prompt["prompt_token_ids"])
            logprobs = last_logits(model, ids).log_softmax(-1)
            listed = getattr(param, "logprob_token_ids", [])
            read = {t: SimpleNamespace(logprob=logprobs[t].item()) for t in listed}
            generator = torch.Generator().manual_seed(getattr(param, "seed", 0))
            start = len(ids)
            while len(ids) - start < param.max_tokens:
                probabilities = last_logits(model, ids).softmax(-1)
                ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
                if ids[-1] in getattr(param, "stop_token_ids", ()):
                    break
            output = SimpleNamespace(token_ids=ids[start:], logprobs=[read])
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs


def install(monkeypatch: Any, llm: Any = FakeLLM) -> None:
    """Makes `import vllm` find as much of it as the colocated engine imports."""
    FakeLLM.started.clear()

    def lora_request(name: str, number: int, folder: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, lora_int_id=number, folder=folder)

    for name, parts in {
        "vllm": {"LLM": llm, "SamplingParams": SimpleNamespace},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lora_request},
    }.items():
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("self_judge.inference.vllm.colocated.find_spec", lambda name: True)
