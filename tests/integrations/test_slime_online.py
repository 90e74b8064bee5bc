"""The reward that learns between slime's rollouts, on stories260K and samples of a policy that is far from its data."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from slime_samples import RolloutFnTrainOutput, Sample

from irlfast.integrations.slime import generate_rollout, generate_rollouts_with_sglang, online, reward
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.scorer import RewardScorer, find_reward
from irlfast.train.irl_trainer import IRLTrainer

transformers = pytest.importorskip("transformers")

PROMPTS = ["Once upon a time", "One day, a girl named Mia", "Tom had a big dog", "The sun was"]
STORIES = [
    ", there was a little boy named Tim.",
    " went for a walk.",
    ". The dog was happy.",
    " hot. They went to the park.",
]
N, LONGEST = 4, 12


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("slime") / "demonstrations.jsonl"
    rows = [json.dumps({"prompt": p, "response": r}) for p, r in zip(PROMPTS, STORIES, strict=True)]
    file.write_text("\n".join(rows), encoding="utf-8")
    return file


class Slime:
    """slime's side: a policy that samples at a high temperature, each sample scored by the reward function."""

    def __init__(self, folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.engine = TransformersEngine(model, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=0)
        self.buffer: list[list[Sample]] = []
        self.prompts = PROMPTS

    def __len__(self) -> int:
        return len(self.prompts)

    def rollout(self, args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
        prompts = [self.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in self.prompts]
        params = SamplingParams(n=N, max_new_tokens=LONGEST, temperature=3.0, seed=rollout_id)
        found = self.engine.generate(prompts, params)
        samples = []
        for row in range(len(found)):
            said = found.input_ids[row][found.response_mask[row]].tolist()
            group = int(found.groups[row])
            samples.append(
                Sample(
                    index=row,
                    group_index=group,
                    prompt=self.prompts[group],
                    tokens=prompts[group] + said,
                    response=self.tokenizer.decode(said),
                    response_length=len(said),
                    rollout_log_probs=found.sampler_logprobs[row][found.response_mask[row]].tolist(),
                    status=Sample.Status("completed" if found.finish_reasons[row] == "stop" else "truncated"),
                )
            )
        if evaluation:
            return {"eval": {"samples": samples}}
        asyncio.run(self.score(args, samples))
        return RolloutFnTrainOutput([list(group) for _, group in itertools.groupby(samples, lambda s: s.group_index)])

    async def score(self, args: Any, samples: list[Sample]) -> None:
        async def one(sample: Sample) -> None:
            sample.reward = await reward(args, sample)

        await asyncio.gather(*map(one, samples))


@pytest.fixture(scope="module")
def slime(stories: Path) -> Slime:
    return Slime(stories)


@pytest.fixture
def make(
    slime: Slime, stories: Path, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Namespace]:
    """slime's args; each call as in a new process."""

    def args(**changed: Any) -> Namespace:
        monkeypatch.setattr(online, "_made", {})
        monkeypatch.setattr(online, "load_function", lambda path: slime.rollout)
        monkeypatch.setattr(slime, "buffer", [])
        given = {
            "hf_checkpoint": str(stories),
            "irl_demonstrations": str(demonstrations),
            "irl_num_epochs": 4,
            "irl_update_ratio": 2,
            "reward_model_hidden_size": 16,
            "reward_model_num_layers": 1,
            "reward_model_dropout": 0.0,
            "reward_model_lr": 3e-3,
            "pooling": "mean",
            "rollout_max_response_len": LONGEST,
            "rollout_batch_size": len(PROMPTS),
            "save": str(tmp_path / "save"),
            "save_interval": 2,
            "num_rollout": 5,
        }
        return Namespace(**{**given, **changed})

    return args


def as_samples(slime: Slime, texts: list[str]) -> list[Sample]:
    rows = zip(PROMPTS, texts, strict=True)
    return [Sample(prompt=p, response=r, status=Sample.Status.COMPLETED) for p, r in rows]


def test_the_reward_learns_serves_is_saved_and_goes_on(
    make: Callable[..., Namespace], slime: Slime, stories: Path, tmp_path: Path
) -> None:
    args = make()
    stale = as_samples(slime, STORIES)[0]
    stale.reward = 123.0
    slime.buffer.append([stale])
    whole = [generate_rollout(args, rollout_id, slime) for rollout_id in range(4)]
    history = [output.metrics for output in whole]
    assert [row["irl/reward_updates"] for row in history] == [0, 4, 4, 8]
    assert ["irl/loss" in row for row in history] == [False, True, False, True]
    assert history[3]["irl/loss"] < history[1]["irl/loss"]
    # What was learned: each demonstration is worth more than what the policy says on average.
    judged = asyncio.run(reward(args, as_samples(slime, STORIES)))
    assert min(judged) > served(whole[3]) + 0.5
    assert stale.reward == pytest.approx(judged[0], abs=1e-4)
    assert [row.get("irl/rescored") for row in history] == [None, 1, None, 1]

    # Saved where slime saves, after every second rollout.
    folder = tmp_path / "save" / "irlfast_reward"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-1", "step-3"]
    scorer = RewardScorer.from_pretrained(find_reward(folder / "step-3"))
    assert scorer.reward.source is not None
    assert scorer.reward.source.model == str(stories.resolve())
    rows = [online.online_reward(args).scorer.reader(sample) for sample in as_samples(slime, STORIES)]
    assert [s.normalised for s in scorer.score_tokenized(rows)] == pytest.approx(judged, abs=1e-5)

    # Killed after rollout 1 and started anew, it goes on with the same numbers. Which samples share a batch is a
    # matter of time, and moves a reward by roundings.
    args = make()
    for rollout_id in (2, 3):
        output = generate_rollout(args, rollout_id, slime)
        assert output.metrics.pop("irl/rescored", None) is None
        assert output.metrics == {k: v for k, v in history[rollout_id].items() if k != "irl/rescored"}
        rewards = [[sample.reward for group in run.samples for sample in group] for run in (output, whole[rollout_id])]
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-5)
    with pytest.raises(FileNotFoundError, match=r"slime resumes at rollout 9 and .*step-8, the reward after the one"):
        generate_rollout(make(), 9, slime)
    generate_rollout(make(irl_fresh=True), 4, slime)  # the last of --num-rollout is saved too
    assert (folder / "step-4").is_dir()


def served(output: RolloutFnTrainOutput) -> float:
    """The mean of the rewards that a rollout's samples were given."""
    return float(torch.tensor([sample.reward for group in output.samples for sample in group]).mean())


def test_a_reward_that_learns_backwards_is_noticed(
    make: Callable[..., Namespace], slime: Slime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail."""
    right = IRLTrainer.step

    def swapped(self: Any, experts: Any, samples: Any, log_proposal: Any = None) -> Any:
        return right(self, samples, experts, torch.zeros(len(experts)))

    monkeypatch.setattr(IRLTrainer, "step", swapped)
    args = make()
    for rollout_id in range(4):
        output = generate_rollout(args, rollout_id, slime)
    assert min(asyncio.run(reward(args, as_samples(slime, STORIES)))) < served(output)


def test_prompts_without_demonstrations_and_evaluation(
    make: Callable[..., Namespace], slime: Slime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slime, "prompts", ["Sara saw a cat", *PROMPTS[1:]])
    args = make(irl_update_ratio=1)
    assert set(generate_rollout(args, 0, slime, evaluation=True)) == {"eval"}
    assert online.online_reward(args).optimizer.get_info()["iteration"] == 0
    with pytest.raises(ValueError, match="a sampled prompt has no demonstration"):
        generate_rollout(args, 0, slime)
    args = make(irl_update_ratio=1, irl_objective="gail", save=None)
    metrics = generate_rollout(args, 0, slime).metrics
    assert metrics["irl/reward_updates"] == 4
    assert metrics["irl/expert_loss"] == pytest.approx(-metrics["irl/expert_reward"])
    with pytest.raises(ValueError, match="no reward: set irlfast_reward"):
        generate_rollout(Namespace(), 0, slime)
    with pytest.raises(ValueError, match="irlfast_reward is 'saved' and irl_demonstrations is set"):
        generate_rollout(make(irlfast_reward="saved"), 0, slime)
    with pytest.raises(ValueError, match="no language model for the reward to read"):
        generate_rollout(make(hf_checkpoint=None), 0, slime)


def test_rollouts_of_an_engine_in_the_documents_form(slime: Slime) -> None:
    """The engine is the embedded one: SGLang's has the same results (tests/rollout/sglang)."""
    made = generate_rollouts_with_sglang(
        slime.engine, PROMPTS[:2], tokenizer=slime.tokenizer, num_samples=2, max_new_tokens=5
    )
    rows = made["rollouts"]
    assert made["hidden_states"].shape == (*rows.input_ids.shape, 64)
    assert torch.equal(made["mask"], rows.response_mask)
    assert made["groups"].tolist() == [0, 0, 1, 1]
    assert torch.equal(made["log_probs"], rows.sampler_logprobs)
    assert torch.equal(made["actions"], rows.input_ids)
    assert [len(slime.tokenizer(text)["input_ids"]) > 0 for text in made["responses"]] == [True] * 4
    bare = generate_rollouts_with_sglang(slime.engine, [[1, 403]], num_samples=1, max_new_tokens=2)
    assert "responses" not in bare
    with pytest.raises(ValueError, match=r"prompts\[0\] is text: give tokenizer="):
        generate_rollouts_with_sglang(slime.engine, PROMPTS)
    with pytest.raises(ValueError, match="prompts is empty"):
        generate_rollouts_with_sglang(slime.engine, [])


@pytest.mark.parametrize("options", [[], ["--group-rm"]], ids=["one by one", "by group"])
def test_slimes_own_rollouts(stories: Path, shared_data: Path, tmp_path: Path, options: list[str]) -> None:
    """The real sampling, scoring, aborting and buffering of a checkout, finished samples in the buffer included."""
    if "IRLFAST_SLIME" not in os.environ:
        pytest.skip("set IRLFAST_SLIME to a checkout of slime")
    for name in ("aiohttp", "httpx", "pylatexenc", "sympy", "tqdm", "PIL", "pybase64"):
        pytest.importorskip(name, reason=f"slime imports {name}")
    script, texts = Path(__file__).parent / "slime_rollouts.py", shared_data / "text" / "tinystories_1000.jsonl.gz"
    told = subprocess.run(
        [sys.executable, str(script), os.environ["IRLFAST_SLIME"], str(stories), str(texts), str(tmp_path), *options],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    ).stdout
    found = json.loads(told.splitlines()[-1])
    assert [row["irl/reward_updates"] for row in found["rollouts"]] == [8, 16, 24]
    for row in found["rollouts"]:
        assert row["samples"] == row["rewarded"] == 32
        assert row["largest_sum_of_advantages"] < 1e-9
        assert row["waiting"] > 0
    if not options:  # by group slime scores what waits when the group is whole
        assert found["rollouts"][1]["irl/rescored"] > 0
    assert found["auc"] > 0.95
    assert found["saved"] == ["step-1", "step-2"]
