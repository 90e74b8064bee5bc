"""The reward that learns, in the real GRPOTrainer and RLOOTrainer: what it learns, from what, and how it goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from irlfast.data import Demonstration, Message, TokenizedDemonstration
from irlfast.integrations.trl import OnlineReward, OnlineRewardConfig, SavedReward, demonstrations_for_trl
from irlfast.integrations.trl.text import prompt_token_ids
from irlfast.rewards import create_reward_model
from irlfast.scorer import RewardScorer
from irlfast.train import OptimizerConfig, RewardConfig
from irlfast.train.checkpoint import DamagedCheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's, of which TRL has several
EOS = 2
PROMPTS = [f"w{i}" for i in range(6)]
# Whoever wrote these counts on by one, three times, and stops.
DEMONSTRATIONS = [
    TokenizedDemonstration(prompt_ids=(3 + i,), response_ids=(4 + i, 5 + i, 6 + i, EOS), truncated=False)
    for i in range(6)
]
MakePolicy = Callable[[], Any]


def expert_logprob(policy: Any) -> float:
    """Mean log-prob of the demonstrations' tokens."""
    ids = torch.tensor([[*row.prompt_ids, *row.response_ids] for row in DEMONSTRATIONS])
    with torch.no_grad():
        logprobs = policy(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return float(logprobs.mean())


def make_online(
    reference: Any,
    *,
    objective: str = "maxent",
    lr: float = 0.02,
    dropout: float = 0.0,
    replay: int = 0,
    **options: Any,
) -> OnlineReward:
    torch.manual_seed(0)
    head = {"hidden_size": 34, "hidden_sizes": (32,), "pooling": "mean", "dropout": dropout}
    config = OnlineRewardConfig(
        **options,
        reward=RewardConfig(
            objective=objective, replay=replay, optimizer=OptimizerConfig(lr=0.02, weight_decay=0.01, schedule="linear")
        ),
    )
    return OnlineReward(create_reward_model(head), DEMONSTRATIONS, reference=reference, config=config)


def make_trainer(
    policy: Any,
    rewards: Any,
    tokenizer: Any,
    folder: Path,
    *,
    kind: str = "GRPO",
    prompts: list[Any] = PROMPTS,
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> Any:
    trl = pytest.importorskip("trl", reason="the real trainers run where trl is installed")
    datasets = pytest.importorskip("datasets")
    usual = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 12,
        "num_generations": 2,
        "max_completion_length": 6,
        "learning_rate": 4e-3,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 1,
    }
    return getattr(trl, f"{kind}Trainer")(
        model=policy,
        reward_funcs=rewards,
        args=getattr(trl, f"{kind}Config")(**{**usual, **options}),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        eval_dataset=datasets.Dataset.from_dict({"prompt": prompts[:2]}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


def gate(make_policy: MakePolicy, tokenizer: Any, folder: Path, **options: Any) -> float:
    """How much likelier the demonstrations are after 40 steps on the reward."""
    policy = make_policy()
    reward = make_online(make_policy(), update_steps=4, **options)
    trainer = make_trainer(
        policy,
        reward,
        tokenizer,
        folder,
        callbacks=(reward.callback,),
        per_device_train_batch_size=48,
        num_generations=8,
        max_steps=40,
        beta=0.1,
    )
    before = expert_logprob(policy)
    trainer.train()
    return expert_logprob(policy) - before


def test_the_policy_comes_to_write_like_the_demonstrations(
    make_policy: MakePolicy, tokenizer: Any, tmp_path: Path
) -> None:
    """The gate: 0.4 nats a token, about half of what it comes to."""
    assert gate(make_policy, tokenizer, tmp_path) > 0.4


def test_a_reward_that_does_not_learn_fails_the_gate(make_policy: MakePolicy, tokenizer: Any, tmp_path: Path) -> None:
    """The break: the same, but the callback never finds it time to learn."""
    assert gate(make_policy, tokenizer, tmp_path, update_every=41) < 0


def test_rloo_trains_with_it_beside_a_saved_reward(make_policy: MakePolicy, tokenizer: Any, tmp_path: Path) -> None:
    """AIRL, which reads the policy's density at demonstrations; the saved reward judges as the scorer does."""
    policy = make_policy()
    reward = make_online(make_policy(), objective="airl")
    reward.reward.source = reward.reward.source.__class__(
        model=policy.config.name_or_path, weights=reward.reward.source.weights
    )
    reward.reward.save_pretrained(tmp_path / "saved")
    saved, seen = SavedReward(tmp_path / "saved", name="frozen"), []

    def spy(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, columns["completion_ids"], strict=True))
        return saved(prompts, completions, **columns)

    spy.__name__ = saved.__name__
    before = {name: value.clone() for name, value in reward.reward.named_parameters()}
    trainer = make_trainer(
        policy, [reward, spy], tokenizer, tmp_path, kind="RLOO", callbacks=(reward.callback,), max_steps=3, beta=0.1
    )
    trainer.train()
    assert [row["step"] for row in reward.history] == [1, 2, 3]
    assert all(not torch.equal(value, before[name]) for name, value in reward.reward.named_parameters())
    logs = trainer.state.log_history
    # What an update measured is logged with the next generation.
    assert logs[1]["irl/loss"] == pytest.approx(reward.history[0]["irl/loss"], rel=1e-6)
    assert {"irl/auc", "irl/expert_accuracy", "irl/normalizer_std"} <= logs[2].keys()
    scorer = RewardScorer.from_pretrained(tmp_path / "saved")
    rows = [
        TokenizedDemonstration(prompt_ids=(3 + int(prompt[1:]),), response_ids=tuple(ids), truncated=False)
        for prompt, ids in seen[:12]
    ]
    want = [score.normalised for score in scorer.score_tokens(rows)]
    assert logs[0]["rewards/frozen/mean"] == pytest.approx(sum(want) / 12, abs=1e-5)
    assert max(want) - min(want) > 0.01


def test_what_it_learns_from_is_what_the_trainer_sampled(
    make_policy: MakePolicy, tokenizer: Any, tmp_path: Path
) -> None:
    """Ids, ends and log-probs beside those of the trainer: its old log-probs, at temperature 0.8."""
    reward = make_online(make_policy(), update_every=9)
    trainer = make_trainer(
        make_policy(),
        reward,
        tokenizer,
        tmp_path,
        callbacks=(reward.callback,),
        num_iterations=2,
        temperature=0.8,
        max_steps=1,
    )
    made: list[Any] = []
    inner = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: made.append(inner(inputs)) or made[-1]
    trainer.train()
    (batch,) = made
    samples = reward.kept[0].experience.samples
    real = samples.attention_mask & ~samples.response_mask
    for row in range(12):
        want = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        assert torch.equal(samples.input_ids[row][real[row]], want)
        kept = batch["completion_mask"][row].bool()
        assert torch.equal(samples.input_ids[row][samples.response_mask[row]], batch["completion_ids"][row][kept])
        torch.testing.assert_close(
            samples.sampler_logprobs[row][samples.response_mask[row]],
            batch["old_per_token_logps"][row][kept],
            rtol=1e-4,
            atol=1e-5,
        )
        ended = int(samples.input_ids[row][samples.response_mask[row]][-1]) == EOS
        assert samples.finish_reasons[row] == ("stop" if ended else "length")
    assert set(samples.finish_reasons) == {"stop", "length"}
    assert [int(g) for g in samples.groups] == [i // 2 for i in range(12)]  # two completions a prompt
    firsts = reward.kept[0].experience.experts.input_ids[:, 0].tolist()
    assert firsts == samples.input_ids[::2, 0].tolist()  # each prompt's own demonstration


def test_prompts_are_tokenised_as_the_trainer_does(make_policy: MakePolicy, tokenizer: Any, tmp_path: Path) -> None:
    reward = make_online(make_policy())
    trainer = make_trainer(make_policy(), reward, tokenizer, tmp_path, callbacks=(reward.callback,), max_steps=1)
    chats = [[{"role": "w1", "content": "w2 w3"}], [{"role": "w1", "content": "w4"}, {"role": "w0", "content": "w5"}]]
    for prompts in (["w1 w2 w3", "w4"], chats):
        want = trainer._tokenize_prompts(prompts)[0]
        assert prompt_token_ids(prompts, tokenizer) == [tuple(ids) for ids in want]


def test_generations_that_serve_several_steps_are_learned_from_once(
    make_policy: MakePolicy, tokenizer: Any, tmp_path: Path
) -> None:
    """Two generations of two steps each, of which each takes two accumulated batches; and evaluations in between."""
    reward = make_online(make_policy(), objective="gail", warmup_steps=1)
    trainer = make_trainer(
        make_policy(),
        reward,
        tokenizer,
        tmp_path,
        callbacks=(reward.callback,),
        prompts=PROMPTS * 2,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    assert all(math.isfinite(value) for value in trainer.evaluate().values() if isinstance(value, float))
    assert len(reward.kept) == 0
    trainer.train()
    assert [row["step"] for row in reward.history] == [1, 3]
    # Of the two generations of 24 the first is the warm-up's; evaluations count nowhere.
    assert float(reward.reward.normalizer.count) == 24
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert logs[0]["reward"] == logs[0]["reward_std"] == 0


def test_a_resumed_run_has_the_same_bits(make_policy: MakePolicy, tokenizer: Any, tmp_path: Path) -> None:
    """Dropout and replay on; the checkpoint falls between a generation and the update that learns from it."""

    def run(folder: Path, *, resume: bool = False) -> tuple[OnlineReward, Any]:
        reward = make_online(make_policy(), update_every=2, update_steps=2, dropout=0.3, replay=2)
        policy = make_policy()
        options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "beta": 0.1}
        options["prompts"] = PROMPTS * 8  # one epoch: TRL itself does not repeat its order of prompts over a boundary
        trainer = make_trainer(policy, reward, tokenizer, folder, callbacks=(reward.callback,), **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return reward, policy

    whole, policy = run(tmp_path)
    again, resumed = run(tmp_path, resume=True)
    assert [row["step"] for row in whole.history] == [2, 4, 6]
    for left, right in zip(policy.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)
    assert whole.history[1:] == again.history
    for name, value in whole.reward.state_dict().items():
        assert torch.equal(value, again.reward.state_dict()[name]), name
    ours, theirs = (r.learner.optimizer.state_dict()["adamw"]["state"] for r in (whole, again))
    for key, moments in ours.items():
        assert all(torch.equal(value, theirs[key][name]) for name, value in moments.items())
    assert whole.replay.state_dict() == again.replay.state_dict()
    assert whole.experts.state_dict() == again.experts.state_dict()

    saved = tmp_path / "checkpoint-3" / "irlfast_reward"
    other = make_online(make_policy(), update_every=2)
    other.bind(policy, tokenizer, SimpleNamespace(device="cpu"))
    with pytest.raises(ValueError, match="update_steps was 2, is 1"):
        other.load(saved)
    (saved / "learning.pt").write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"learning\.pt has 0 bytes"):
        again.load(saved)
    with pytest.raises(FileNotFoundError, match=r"call reward\.load"):
        again.load(tmp_path / "elsewhere")
    whole.load(tmp_path / "checkpoint-6" / "irlfast_reward")
    with pytest.raises(ValueError, match="loaded from step 6, the trainer resumes at step 5"):
        whole.begin(5, 6, tmp_path)


def test_demonstrations_and_prompts_for_a_trainer(tokenizer: Any) -> None:
    """Pairs, chats and texts, the prompts each once; rows are paired with their prompts by token ids."""
    rows = [
        Demonstration(prompt="w1 w2", response="w3"),
        Demonstration(prompt="w1 w2", response="w4"),
        Demonstration(prompt="", response="", messages=(Message(role="w1", content="w5"),)),
        Demonstration(prompt="", response="w6 w7 w8 w9", is_text=True),
    ]
    rows[2] = Demonstration(prompt="", response="w3", messages=(Message(role="w1", content="w5"),))
    demonstrations, prompts = demonstrations_for_trl(rows, tokenizer, max_completion_length=3, prompt_tokens=2)
    assert prompts == ["w1 w2", [{"role": "w1", "content": "w5"}], "w6 w7"]
    assert [row.prompt_ids for row in demonstrations] == [(4, 5), (4, 5), (4, 8, 15), (9, 10)]
    assert [row.response_ids for row in demonstrations] == [(6, EOS), (7, EOS), (6, EOS), (11, 12, EOS)]
