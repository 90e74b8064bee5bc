"""What the rewards for TRL read of a trainer, refuse and say about it. Needs no trl: trainers are played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from irlfast.data import TokenizedDemonstration
from irlfast.integrations.trl import OnlineReward, OnlineRewardConfig, SavedReward
from irlfast.integrations.trl.policy import TrainerPolicy
from irlfast.rewards import create_reward_model
from irlfast.train import RewardConfig

EOS = 2
ONE = TokenizedDemonstration(prompt_ids=(3,), response_ids=(4, 5, EOS), truncated=False)
CALL: dict[str, Any] = {"prompts": ["w0", "w0"], "completions": ["w1", "w2 w3"], "completion_ids": [[4, EOS], [5, 6]]}


@dataclass
class Args:
    """What the rewards read of a trainer's arguments."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    fsdp: str = ""
    device: str = "cpu"


@pytest.fixture
def make(make_policy: Callable[[], Any], tokenizer: Any) -> Callable[..., OnlineReward]:
    """A function from an objective, options and trainer arguments to a reward in a trainer that trains."""

    def made(
        objective: str = "maxent",
        args: Args | None = None,
        rows: Any = (ONE,),
        model: tuple[dict[str, Any], str] = ({}, "mlp"),
        form: dict[str, Any] | None = None,
        **options: Any,
    ) -> OnlineReward:
        config = OnlineRewardConfig(reward=RewardConfig(objective=objective, options=form or {}), **options)
        torch.manual_seed(0)
        learned = create_reward_model({"hidden_size": 34, **model[0]}, model[1])
        reward = OnlineReward(learned, rows, reference=make_policy(), config=config)
        reward.bind(make_policy().train(), tokenizer, args or Args())
        return reward

    return made


def test_it_gives_one_finite_number_a_completion(make: Callable[..., OnlineReward]) -> None:
    reward = make()
    rewards = reward(**CALL, an_unknown_column=[1, 2])
    assert len(rewards) == 2
    assert torch.tensor(rewards).isfinite().all()
    assert reward.__name__ == "irlfast_reward"


@pytest.mark.parametrize(
    ("objective", "form", "passes"),
    [
        ("gail", {}, 0),
        ("contrastive", {}, 0),
        ("bradley_terry", {}, 0),
        ("max_margin", {}, 0),
        ("spin", {}, 0),
        ("weighted", {}, 0),
        ("weighted", {"entropy_weight": 0.1}, 1),
        ("maxent", {}, 1),
        ("maxent", {"fuse_demonstrations": True}, 2),
        ("airl", {}, 2),
        ("airl", {"form": "token"}, 2),
    ],
)
def test_every_objective_learns_and_asks_the_policy_no_more_than_it_reads(
    make: Callable[..., OnlineReward],
    monkeypatch: pytest.MonkeyPatch,
    objective: str,
    form: dict[str, Any],
    passes: int,
) -> None:
    kind = ({"width": 16, "reduction": "sum"}, "trajectory") if form.get("form") == "token" else ({}, "mlp")
    reward = make(objective, form=form, model=kind)
    asked: list[int] = []
    inner = TrainerPolicy.logprobs
    monkeypatch.setattr(TrainerPolicy, "logprobs", lambda *given: asked.append(1) or inner(*given))
    before = torch.cat([p.detach().flatten() for p in reward.reward.parameters()])
    reward(**CALL)
    assert len(asked) == passes
    reward.end_step(1)
    (row,) = reward.history
    assert row["step"] == 1
    assert all(torch.tensor(value).isfinite() for value in row.values())
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in reward.reward.parameters()]))
    assert reward.update() == {}  # nothing came since


def test_without_its_callback_it_says_so(make_policy: Callable[[], Any]) -> None:
    reward = OnlineReward(create_reward_model({"hidden_size": 34}), [ONE], reference=make_policy())
    for judge in (lambda: reward(**CALL), lambda: reward.load("anywhere")):
        with pytest.raises(RuntimeError, match=r"callbacks=\[reward\.callback\]"):
            judge()


def test_a_prompt_without_demonstrations_is_named(make: Callable[..., OnlineReward]) -> None:
    with pytest.raises(ValueError, match=r"no demonstration has the prompt 'w5', token ids \[8\]"):
        make()(**{**CALL, "prompts": ["w5", "w0"]})
    assert make("gail", pairing="pooled")(**{**CALL, "prompts": ["w5", "w0"]})


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (Args(top_p=0.9), "top_p = 0.9"),
        (Args(top_k=5), "top_k = 5"),
        (Args(min_p=0.1), "min_p = 0.1"),
        (Args(repetition_penalty=1.1), "repetition_penalty = 1.1"),
        (Args(generation_kwargs={"num_beams": 2}), "num_beams"),
    ],
)
def test_a_sampler_of_unknown_density_is_refused_by_importance_weights_alone(
    make: Callable[..., OnlineReward], args: Args, named: str
) -> None:
    with pytest.raises(ValueError, match=f"MaxEntropyIRLObjective reads the density .*{named}"):
        make("maxent", args)(**CALL)
    assert len(make("gail", args)(**CALL)) == 2
    reward = make("maxent", args)
    reward(**CALL, sampler_logprobs=[[-1.0, -2.0], [-0.5, -0.25]])
    samples = reward.kept[0].experience.samples
    assert samples.sampler_logprobs.sum(1).tolist() == [-3.0, -0.75]
    with pytest.raises(ValueError, match=r"sampler_logprobs\[0\] has 1 entries for a completion of 2 tokens"):
        reward(**CALL, sampler_logprobs=[[-1.0], [-0.5, -0.25]])


def test_airl_needs_temperature_one_and_maxent_takes_any(make: Callable[..., OnlineReward]) -> None:
    warm = Args(temperature=2.0)
    with pytest.raises(ValueError, match=r"AirlObjective reads the density .*temperature = 2\.0"):
        make("airl", warm)(**CALL)
    warmer, plain = make("maxent", warm), make("maxent")
    warmer(**CALL), plain(**CALL)
    sums = [float(r.kept[0].experience.samples.sampler_logprobs.sum()) for r in (warmer, plain)]
    assert abs(sums[0] - sums[1]) > 1e-3


def test_a_policy_spread_over_processes_is_refused_where_its_logprobs_are_read(
    make: Callable[..., OnlineReward],
) -> None:
    with pytest.raises(ValueError, match="FSDP or DeepSpeed"):
        make("maxent", Args(fsdp="full_shard"))
    make("gail", Args(fsdp="full_shard"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": None}, "completion_ids is missing"),
        ({"completion_ids": [[4]]}, "2 prompts, 2 completions, 1 completion_ids"),
        ({"completion_ids": [[4], []]}, "completion 1 has no tokens"),
        (
            {"completions": ["w1", [{"role": "assistant", "content": "w1"}, {"role": "tool", "content": "w2"}]]},
            "completion 1 is no single answer",
        ),
    ],
)
def test_completions_that_cannot_be_judged(
    make: Callable[..., OnlineReward], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()(**{**CALL, **changes})


def test_demonstrations_that_end_otherwise_are_refused(make: Callable[..., OnlineReward]) -> None:
    endless = TokenizedDemonstration(prompt_ids=(3,), response_ids=(4, 5), truncated=False)
    with pytest.raises(ValueError, match="not with EOS"):
        make(rows=[endless])


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="pairing = 'pooled' with objective 'maxent'"):
        OnlineRewardConfig(pairing="pooled")
    with pytest.raises(ValueError, match="update_every = 0, expected at least 1"):
        OnlineRewardConfig(update_every=0)
    with pytest.raises(ValueError, match="serve = 'whitened'"):
        OnlineRewardConfig(serve="whitened")  # type: ignore[arg-type]
    reward = create_reward_model({"hidden_size": 34})
    with pytest.raises(ValueError, match="no demonstrations"):
        OnlineReward(reward, [], reference=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="a reward on hidden states needs reference="):
        OnlineReward(reward, [ONE])


def test_what_is_given_to_the_policy(make: Callable[..., OnlineReward]) -> None:
    """Zeros while the reward warms up, then its own units or normalised ones."""
    waiting = make(warmup_steps=2)
    assert waiting(**CALL, trainer_state=SimpleNamespace(global_step=1)) == [0.0, 0.0]
    assert float(waiting.reward.normalizer.count) == 0
    served = torch.tensor(waiting(**CALL, trainer_state=SimpleNamespace(global_step=2)))
    assert float(waiting.reward.normalizer.count) == 2
    assert served.mean().abs() < 1e-6
    torch.testing.assert_close(served.std(unbiased=False), torch.tensor(1.0))
    raw = make(serve="raw")
    raw.reward.load_state_dict(waiting.reward.state_dict())
    given = torch.tensor(raw(**CALL))
    torch.testing.assert_close((given - given.mean()) / given.std(unbiased=False), served)


def test_a_saved_reward_refuses_another_tokenizers_ids(
    make: Callable[..., OnlineReward], policy_folder: Path, tmp_path: Path
) -> None:
    make().reward.save_pretrained(tmp_path)
    saved = SavedReward(tmp_path, model=str(policy_folder))
    normalised = saved(**CALL)
    assert normalised == pytest.approx(SavedReward(tmp_path, model=str(policy_folder), serve="raw")(**CALL))
    with pytest.raises(ValueError, match="another tokenizer than the reward"):
        saved(**{**CALL, "completions": ["w1", "w2 w3 w4"]})
    chats = {
        "prompts": [[{"role": "w1", "content": "w2"}]],
        "completions": [[{"role": "assistant", "content": "w1"}]],
        "completion_ids": [[4, EOS]],
    }
    assert len(saved(**chats)) == 1
