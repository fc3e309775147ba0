"""The code of docs/reward.md runs in the frameworks that it names, where they are installed.

pip install verifiers==0.4.0 (or 0.3.1) runs two of these tests, and verl==0.9.1 one. NeMo-RL and
slime run with a copy of their source in PYTHONPATH.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_readme import blocks

from conftest import ROOT
from self_judge import PairwiseReward
from value_judges import value_judge

PAGE = (ROOT / "docs" / "reward.md").read_text(encoding="utf-8")
ANSWERS = ["3", "9", "5"]
EXPECTED = PairwiseReward(value_judge())(["Q?"] * 3, ANSWERS)


def code(name: str) -> str:
    """The block of code that contains this name."""
    (found,) = [block for block in blocks(PAGE, "python") if name in block]
    return found


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with this block of code and `reward`, as the page describes it."""
    made: Any = ModuleType("pairwise")
    made.reward = PairwiseReward(value_judge())
    exec(compile(code(name), "docs/reward.md", "exec"), vars(made))
    monkeypatch.setitem(sys.modules, "pairwise", made)
    return made


def test_the_page_says_which_versions_it_is_about() -> None:
    for framework in (
        "verifiers** up to 0.3.1",
        "verl** 0.9.1",
        "NeMo-RL** 0.7.0",
        "slime** 0.3.1",
    ):
        assert framework in PAGE


def test_an_episode_of_verifiers_is_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    vf = pytest.importorskip("verifiers.v1", reason="pip install verifiers==0.4.0")
    pytest.importorskip("verifiers.v1.envs.best_of_n", reason="pip install verifiers==0.4.0")
    pairwise = module("verifiers", monkeypatch).Pairwise
    data = vf.TaskData(prompt="Q?")
    task = vf.TraceTask(type="Task", data=data)

    def attempt(answer: str) -> Any:
        message = vf.AssistantMessage(content=answer)
        return vf.Trace(
            task=task,
            agent=vf.AgentInfo(config=vf.AgentConfig()),
            nodes=[vf.MessageNode(message=message, sampled=True)],
        )

    episode = vf.Episode(task=task, traces=[attempt(answer) for answer in ANSWERS])
    asyncio.run(pairwise.finalize(None, vf.Task(data), episode))
    assert [trace.reward for trace in episode.traces] == pytest.approx(EXPECTED)


def test_a_rubric_of_verifiers_takes_the_reward_as_a_group_function() -> None:
    vf = pytest.importorskip("verifiers", reason="pip install verifiers==0.3.1")
    if getattr(vf, "Rubric", None) is None:
        pytest.skip("pip install verifiers==0.3.1, the last version with Rubric")
    line = "vf.Rubric(funcs=[reward])"
    assert f"`{line}`" in PAGE
    rubric = eval(line, {"vf": vf, "reward": PairwiseReward(value_judge())})
    assert rubric.has_group_rewards
    states = [
        vf.State(
            prompt=[{"role": "user", "content": "Q?"}],
            completion=[{"role": "assistant", "content": answer}],
            trajectory=[],
        )
        for answer in ANSWERS
    ]
    asyncio.run(rubric.score_group(states))
    assert [state["reward"] for state in states] == pytest.approx(EXPECTED)


def test_a_manager_of_verl_waits_for_the_group(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("verl", reason="pip install verl==0.9.1")
    import numpy as np
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    file = tmp_path / "pairwise.py"
    file.write_text(
        "from self_judge import PairwiseReward\nfrom value_judges import value_judge\n"
        f"reward = PairwiseReward(value_judge())\n{code('verl')}"
    )
    manager = {"source": "importlib", "name": "Pairwise", "module": {"path": str(file)}}
    config = OmegaConf.create(
        {"reward": {"reward_manager": manager}, "actor_rollout_ref": {"rollout": {"n": 3}}}
    )

    def sample(answer: str, uid: str) -> Any:
        """One response, as verl's agent loop sends it to a reward worker."""
        prompt, response = (tokenizer(t, return_tensors="pt").input_ids for t in ("Q?", answer))
        ids = torch.cat([prompt, response], 1)
        batch = {"prompts": prompt, "responses": response, "input_ids": ids,
                 "attention_mask": torch.ones_like(ids)}  # fmt: skip
        own = {"raw_prompt": [{"role": "user", "content": "Q?"}], "uid": uid}
        return DataProto(
            batch=TensorDict(batch, batch_size=1),
            non_tensor_batch={k: np.array([v]) for k, v in own.items()},
        )

    async def scored() -> list[Any]:
        loaded = load_reward_manager(
            config, tokenizer, reward_router_address=None, reward_model_tokenizer=None
        )
        asked = [sample(answer, uid) for answer in ANSWERS for uid in ("one", "two")]
        given = await asyncio.gather(*(loaded.run_single(own) for own in asked))
        assert not loaded.groups
        return given

    scores = [own["reward_score"] for own in asyncio.run(scored())]
    assert scores[::2] == scores[1::2] == pytest.approx(EXPECTED)


def test_an_environment_of_nemo_rl_rewards_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = pytest.importorskip(
        "nemo_rl.environments.interfaces", reason="needs the source of NeMo-RL 0.7.0"
    )
    made = module("nemo_rl", monkeypatch).Pairwise
    environment = made.__ray_metadata__.modified_class({})
    assert isinstance(environment, interfaces.EnvironmentInterface)
    logs = [[{"role": "user", "content": "<user>Q?"}, {"role": "assistant", "content": answer}]
            for answer in ANSWERS]  # fmt: skip
    given = environment.step(logs, [{"prompt": "Q?"}] * 3)
    assert given.rewards.tolist() == pytest.approx(EXPECTED)
    assert given.terminateds.all()
    assert len(given.observations) == len(given.metadata) == len(given.next_stop_strings) == 3


def test_slime_rewards_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("slime.rollout.rm_hub", reason="needs the source of slime 0.3.1")
    from slime.utils.types import Sample

    module("args, samples", monkeypatch)
    samples = [Sample(response=answer, metadata={"prompt": "Q?"}) for answer in ANSWERS]
    args = SimpleNamespace(custom_rm_path="pairwise.pairwise")
    assert asyncio.run(hub.batched_async_rm(args, samples)) == pytest.approx(EXPECTED)
