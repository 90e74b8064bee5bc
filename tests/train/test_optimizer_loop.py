"""The reward's side alone: BiLevelOptimizer, what stands around it, and the bugs that such systems were found with."""

import json
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irlfast.data import DataError, TokenizedDemonstration
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import (
    BiLevelConfig,
    BiLevelOptimizer,
    BiLevelTrainer,
    BiLevelTrainingLoop,
    IRLTrainer,
    integrate_with_rollout,
    load_expert_demonstrations,
    setup_bi_level_irl,
)
from irlfast.train.trajectories import Trajectories, read_rollouts

H, EOS = 6, 9


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trajectories(count: int = 20, *, shift: float = 1.0) -> list[dict[str, Any]]:
    """Of 1 to 5 tokens, the last EOS; the first field of the document's format, and those that are not read."""
    rows = []
    for i in range(count):
        length = 1 + i % 5
        actions = torch.tensor([i % 7] * (length - 1) + [EOS])
        rows.append(
            {
                "hidden_states": shift + random(i, length, H),
                "actions": actions,
                "rewards": 0.8,
                "returns": 1.5,
                "length": length,
            }
        )
    return rows


def rollouts(count: int = 12, seed: int = 100) -> dict[str, Any]:
    lengths = torch.tensor([1 + i % 4 for i in range(count)])
    mask = torch.arange(4) < lengths[:, None]
    return {
        "hidden_states": random(seed, count, 4, H),
        "mask": mask,
        "log_probs": torch.where(mask, -random(seed + 1, count, 4).abs(), 0.0),
    }


@pytest.fixture
def expert_file(tmp_path: Path) -> Path:
    torch.save(trajectories(), tmp_path / "expert.pt")
    return tmp_path / "expert.pt"


def make(path: Path, *, batch_size: int = 8, **options: Any) -> BiLevelOptimizer:
    torch.manual_seed(0)
    args = Namespace(
        **{"reward_model_hidden_size": 8, "reward_model_num_layers": 1, "reward_model_lr": 0.02, **options}
    )
    return setup_bi_level_irl(
        expert_dataloader=load_expert_demonstrations(path, batch_size, eos_token_id=EOS), args=args
    )


# Bugs found in the bi-level system behind the source documents (each test is named for one)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_ratio_r_gives_r_policy_updates_not_r_plus_1(expert_file: Path, ratio: int) -> None:
    optimizer = make(expert_file, irl_update_ratio=ratio)
    due = [optimizer.step() for _ in range(3 * ratio)]
    assert due == ([False] * (ratio - 1) + [True]) * 3
    taken: list[str] = []
    fresh = make(expert_file, irl_update_ratio=ratio, batch_size=32)
    learn = fresh.update_reward_model
    fresh.update_reward_model = lambda **given: (taken.append("R"), learn(**given))[1]  # type: ignore[method-assign]
    loop = BiLevelTrainingLoop(fresh, generate=lambda i: rollouts(seed=i), train_policy=lambda data: taken.append("P"))
    loop.run(2 * ratio)
    assert "".join(taken) == ("P" * ratio + "R") * 2


def test_the_learned_reward_reaches_the_rollouts(expert_file: Path) -> None:
    optimizer = make(expert_file)
    data = rollouts()
    data["rewards"] = torch.full((12,), 7.0)  # a fixed reward model's
    integrate_with_rollout(optimizer, data)
    before = data["rewards"].clone()
    assert not torch.equal(before, torch.full((12,), 7.0))
    for seed in range(5):
        optimizer.update_reward_model(policy_rollouts=rollouts(seed=seed))
    raw = optimizer.reward_model(data["hidden_states"], data["mask"]).detach()
    after = integrate_with_rollout(optimizer, data)["rewards"]
    normalizer = optimizer.reward_model.normalizer
    torch.testing.assert_close(after, ((raw - float(normalizer.mean)) / normalizer.scale).float())
    assert not torch.allclose(after, before)
    given: list[Tensor] = []
    BiLevelTrainingLoop(
        optimizer, generate=lambda i: rollouts(seed=i), train_policy=lambda d: given.append(d["rewards"])
    ).run(1)
    assert float(given[0].std()) > 0


def test_stale_rewards_are_never_used(expert_file: Path) -> None:
    """Rollouts that were rewarded before the reward's update are rewarded anew when they are used after it."""
    optimizer = make(expert_file)
    reward_fn, data = optimizer.get_reward_fn(), rollouts()
    first = reward_fn(data["hidden_states"], data["mask"])
    optimizer.update_reward_model(policy_rollouts=data, num_epochs=3)
    second = reward_fn(data["hidden_states"], data["mask"])
    assert not torch.allclose(first, second)
    integrate_with_rollout(optimizer, data)
    assert not torch.allclose(data["rewards"], first)


def test_the_trainer_rewards_rollouts_when_it_trains_on_them(
    make_trainer: Callable[..., BiLevelTrainer], small_config: BiLevelConfig
) -> None:
    """Sampled and scored, then a reward step, then the policy step: it sees the reward after that step."""
    trainer = make_trainer(small_config)
    gathered = trainer._gather()
    old = trainer.rewards(gathered.samples)
    for _ in range(5):
        trainer.reward_step(trainer._gather())
    seen: list[Tensor] = []
    step = trainer.policy_update.step
    trainer.policy_update.step = lambda s, rewards, *a, **k: (seen.append(rewards), step(s, rewards, *a, **k))[1]  # type: ignore[method-assign]
    trainer.policy_step(gathered)
    new = trainer.rewards(gathered.samples)
    assert not torch.allclose(old, new)
    torch.testing.assert_close(seen[0], trainer.reward.normalizer.normalize(new))


def test_demonstrations_without_eos_are_refused_for_rollouts_end_with_it(
    tmp_path: Path, make_trainer: Callable[..., BiLevelTrainer], small_config: BiLevelConfig
) -> None:
    rows = trajectories()
    rows[3]["actions"][-1] = 2
    torch.save(rows, tmp_path / "e.pt")
    with pytest.raises(DataError, match=r"e\.pt\[3\]: the last action is 2, not EOS \(9\)"):
        load_expert_demonstrations(tmp_path / "e.pt", eos_token_id=EOS)
    bad = TokenizedDemonstration(prompt_ids=(4,), response_ids=(0, 1), truncated=False, source="d.jsonl:7")
    with pytest.raises(ValueError, match=r"demonstration 0 \(d\.jsonl:7\) ends with token 1, not with EOS \(3,\)"):
        make_trainer(small_config, demonstrations=[bad])
    cut = TokenizedDemonstration(prompt_ids=(4,), response_ids=(0, 1, 0, 1, 0), truncated=True)
    make_trainer(small_config, demonstrations=[cut])  # cut at the limit, as a rollout may be


def test_demonstrations_are_not_the_same_first_16_every_time(tmp_path: Path) -> None:
    torch.save(trajectories(40), tmp_path / "e.pt")
    loader = load_expert_demonstrations(tmp_path / "e.pt", batch_size=16)
    drawn = [loader.draw() for _ in range(5)]
    first = [{round(float(x), 5) for x in batch.hidden_states[:, 0, 0]} for batch in drawn]
    assert all(first[i] != first[j] for i in range(5) for j in range(i))
    assert len(first[0] | first[1]) == 32  # no repetition within a pass of 40
    assert len(set.union(*first)) == 40
    assert len(loader) == 3
    again = load_expert_demonstrations(tmp_path / "e.pt", batch_size=16)
    again.position = 32
    assert torch.equal(again.draw().hidden_states, drawn[2].hidden_states)


def test_hidden_states_are_never_made_up_and_shapes_that_do_not_fit_are_errors(expert_file: Path) -> None:
    optimizer, data = make(expert_file), rollouts()
    with pytest.raises(ValueError, match="has no hidden_states and none were given"):
        integrate_with_rollout(optimizer, {"mask": data["mask"], "rewards": torch.ones(12)})
    with pytest.raises(ValueError, match=r'policy_rollouts\["hidden_states"\] must be a tensor \[K, S, H\]'):
        optimizer.update_reward_model(policy_rollouts={"mask": data["mask"], "log_probs": data["log_probs"]})
    with pytest.raises(ValueError, match=r"mask has shape \[12, 3\]; expected \[12, 4\]"):
        integrate_with_rollout(optimizer, {**data, "mask": data["mask"][:, :3]})
    with pytest.raises(ValueError, match="hidden_states have width 5, the reward model was made for 6"):
        integrate_with_rollout(optimizer, {**data, "hidden_states": data["hidden_states"][..., :5]})


def test_variable_length_demonstrations_collate_and_padding_is_not_read(expert_file: Path) -> None:
    loader = load_expert_demonstrations(expert_file, batch_size=20)
    batch = loader.draw()
    assert sorted(batch.mask.sum(1).tolist()) == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    assert batch.hidden_states.shape == (20, 5, H)
    optimizer = make(expert_file)
    noisy = Trajectories(
        hidden_states=torch.where(batch.mask[..., None], batch.hidden_states, torch.nan),
        actions=batch.actions,
        mask=batch.mask,
    )
    samples, log_probs = read_rollouts(rollouts())
    results = []
    for experts in (batch, noisy):
        optimizer = make(expert_file, reward_model_dropout=0.0)
        results.append(optimizer.irl_trainer.step(experts, samples, log_probs))
    assert results[0] == results[1]


def test_pooling_reads_the_last_token_of_the_mask_not_the_last_column(expert_file: Path) -> None:
    optimizer = make(expert_file, pooling="last")
    data = rollouts()
    length = data["mask"].sum(1)
    last = data["hidden_states"][torch.arange(12), length - 1]
    mean = torch.stack([h[:n].mean(0) for h, n in zip(data["hidden_states"], length, strict=True)])
    data["hidden_states"][~data["mask"]] = torch.nan

    def rewards(given: dict[str, Any] = data, **options: Any) -> Tensor:
        for buffer in optimizer.reward_model.normalizer.buffers():
            buffer.zero_()
        return integrate_with_rollout(optimizer, dict(given), **options)["rewards"]

    expected = rewards(hidden_states=last)
    torch.testing.assert_close(rewards(), expected)
    torch.testing.assert_close(rewards(pooling="last"), expected)
    torch.testing.assert_close(rewards(pooling="mean"), rewards(hidden_states=mean), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rewards(pooling="mean"), expected)
    by_length = {"hidden_states": data["hidden_states"], "lengths": length}
    torch.testing.assert_close(rewards(by_length), expected)


@pytest.mark.parametrize("killed_after", [1, 2, 3, 5])
def test_joint_resume_goes_on_with_the_same_numbers(expert_file: Path, tmp_path: Path, killed_after: int) -> None:
    """Reward, normaliser, optimiser, counts, place in the demonstrations, dropout's generator; and a policy beside."""

    def loop(optimizer: BiLevelOptimizer, policy: torch.nn.Linear, adam: torch.optim.Adam) -> BiLevelTrainingLoop:
        def generate(i: int) -> dict[str, Any]:
            data = rollouts(seed=10 * i)
            data["raw"] = data["hidden_states"]
            data["hidden_states"] = policy(data["raw"]).detach()
            return data

        def train(data: dict[str, Any]) -> dict[str, float]:
            loss = -(policy(data["raw"]).mean((1, 2)) * data["rewards"]).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            return {"loss": float(loss.detach())}

        return BiLevelTrainingLoop(optimizer, generate=generate, train_policy=train)

    def start() -> tuple[BiLevelOptimizer, torch.nn.Linear, torch.optim.Adam]:
        optimizer = make(expert_file, irl_update_ratio=2, reward_model_dropout=0.3)
        policy = torch.nn.Linear(H, H)
        return optimizer, policy, torch.optim.Adam(policy.parameters(), lr=0.1)

    torch.manual_seed(0)
    whole = loop(*start()).run(7)
    parts = start()
    history = loop(*parts).run(killed_after)
    torch.save([part.state_dict() for part in parts], tmp_path / "joint.pt")
    torch.manual_seed(77)
    resumed = start()
    torch.manual_seed(78)
    for part, saved in zip(resumed, torch.load(tmp_path / "joint.pt", weights_only=True), strict=True):
        part.load_state_dict(saved)
    history += loop(*resumed).run(7 - killed_after)
    assert history == whole
    assert sum("reward/loss" in row for row in whole) == 3


# What it learns, and is given


def test_the_reward_learns_to_tell_demonstrations_from_rollouts(expert_file: Path) -> None:
    optimizer = make(expert_file)
    first = optimizer.update_reward_model(policy_rollouts=rollouts())
    for seed in range(10):
        last = optimizer.update_reward_model(policy_rollouts=rollouts(seed=seed), num_epochs=2)
    assert last["auc"] > first["auc"]
    assert last["auc"] > 0.9
    assert last["expert_loss"] == -last["expert_reward"]
    assert last["policy_loss"] == last["sample_reward"]
    assert optimizer.get_info() == {"iteration": 0, "reward_updates": 3 + 10 * 2 * 3, "update_ratio": 1}


def test_every_form_of_rollouts_is_the_same_to_it(expert_file: Path, make_lm: Callable[[str], Any]) -> None:
    data = rollouts()
    rows = [
        {"hidden_states": h[m], "actions": torch.zeros(int(m.sum()), dtype=torch.int64), "log_probs": p[m]}
        for h, m, p in zip(data["hidden_states"], data["mask"], data["log_probs"], strict=True)
    ]
    forms = [data, {**data, "log_probs": data["log_probs"].sum(1)}, rows]
    results = [
        make(expert_file, reward_model_dropout=0.0).update_reward_model(policy_rollouts=form)["loss"] for form in forms
    ]
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])
    engine = TransformersEngine(make_lm("llama"), eos_token_id=2, pad_token_id=0)
    sampled = engine.generate([[5, 6], [7]], SamplingParams(n=3, max_new_tokens=5, seed=0), return_hidden_states=True)
    samples, log_probs = read_rollouts(sampled)
    assert log_probs is not None
    torch.testing.assert_close(log_probs, (sampled.sampler_logprobs * sampled.response_mask).sum(1))
    for row in range(len(sampled)):
        assert sampled.hidden_states is not None
        states = sampled.hidden_states[row][sampled.response_mask[row]]
        assert torch.equal(samples.hidden_states[row][samples.mask[row]], states)
    assert samples.groups is not None
    assert torch.equal(samples.groups, sampled.groups)


def test_a_demonstration_is_set_against_its_own_prompts_rollouts(expert_file: Path) -> None:
    """Two prompts whose rollouts have unlike rewards: pooled as one, the normaliser is another."""
    trainer = make(expert_file, reward_model_dropout=0.0).irl_trainer
    samples, log_probs = read_rollouts({**rollouts(), "groups": torch.arange(12) % 2})
    experts = load_expert_demonstrations(expert_file, 20).draw()
    groups = torch.arange(20) % 2
    apart = Trajectories(hidden_states=experts.hidden_states, actions=experts.actions, mask=experts.mask, groups=groups)
    together = trainer.step(experts, samples, log_probs)
    own = make(expert_file, reward_model_dropout=0.0).irl_trainer.step(apart, samples, log_probs)
    assert own["log_normalizer"] != pytest.approx(together["log_normalizer"], abs=1e-4)


@pytest.mark.parametrize("objective", ["max_entropy", "gail", "weighted"])
def test_objectives_by_name(expert_file: Path, objective: str) -> None:
    metrics = make(expert_file, irl_objective=objective).update_reward_model(policy_rollouts=rollouts())
    assert {"loss", "expert_loss", "policy_loss"} <= set(metrics)


def test_what_is_missing_is_named(expert_file: Path, tmp_path: Path) -> None:
    optimizer = make(expert_file)
    data = rollouts()
    without = {name: value for name, value in data.items() if name != "log_probs"}
    with pytest.raises(ValueError, match="MaxEntropyIRLObjective needs log_proposal: give the rollouts' log_probs"):
        optimizer.update_reward_model(policy_rollouts=without)
    with pytest.raises(ValueError, match=r"need a mask \[K, S\] or lengths \[K\]"):
        optimizer.update_reward_model(policy_rollouts={"hidden_states": data["hidden_states"]})
    with pytest.raises(TypeError, match="policy_rollouts is int; expected Rollouts, a dict, or a list of dicts"):
        optimizer.update_reward_model(policy_rollouts=3)
    with pytest.raises(ValueError, match="irl_update_ratio = 0, expected at least 1"):
        make(expert_file, irl_update_ratio=0)
    with pytest.raises(ValueError, match=r"args\.hidden_size is 5, the demonstrations' hidden states have 6"):
        make(expert_file, hidden_size=5)
    with pytest.raises(ValueError, match="expert_dataloader is None"):
        setup_bi_level_irl()
    with pytest.raises(ValueError, match="num_epochs = 0"):
        optimizer.update_reward_model(policy_rollouts=data, num_epochs=0)
    with pytest.raises(ValueError, match="AirlObjective needs expert_logprobs"):
        make(expert_file, irl_objective="airl").update_reward_model(policy_rollouts=data)


# Files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.__setitem__(2, 5), r"e\.pt\[2\] is int; expected a dict"),
        (
            lambda rows: rows[1].pop("actions"),
            r"e\.pt\[1\]: field 'actions' must be a tensor of 1 dim.*NoneType",
        ),
        (lambda rows: rows[1].update(hidden_states=torch.zeros(3)), r"e\.pt\[1\]: field 'hidden_states' .* got \[3\]"),
        (lambda rows: rows[4].update(length=9), r"e\.pt\[4\]: length 9 does not fit"),
        (lambda rows: rows[0]["hidden_states"].fill_(torch.nan), r"e\.pt\[0\]: field 'hidden_states' has values"),
        (lambda rows: rows[0].update(hidden_states=torch.zeros(1, 3)), r"different widths, \[3, 6\]"),
    ],
)
def test_a_bad_trajectory_is_named(tmp_path: Path, change: Callable[[list[Any]], Any], message: str) -> None:
    rows = trajectories()
    change(rows)
    torch.save(rows, tmp_path / "e.pt")
    with pytest.raises(DataError, match=message):
        load_expert_demonstrations(tmp_path / "e.pt")


def test_length_cuts_padding_off(tmp_path: Path) -> None:
    rows = trajectories(1)
    rows[0]["hidden_states"] = torch.cat([rows[0]["hidden_states"], torch.full((3, H), torch.nan)])
    rows[0]["actions"] = torch.cat([rows[0]["actions"], torch.zeros(3, dtype=torch.int64)])
    torch.save(rows, tmp_path / "e.pt")
    assert load_expert_demonstrations(tmp_path / "e.pt", eos_token_id=EOS).draw().hidden_states.shape == (1, 1, H)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run by the file",))


def test_files_that_could_run_code_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save([Evil()], tmp_path / "e.pt")
    with pytest.raises(DataError, match="cannot be read with weights_only=True"):
        load_expert_demonstrations(tmp_path / "e.pt")
    (tmp_path / "e.pkl").write_bytes(b"")
    with pytest.raises(DataError, match="pickle runs whatever code a file holds"):
        load_expert_demonstrations(tmp_path / "e.pkl")
    assert "run by the file" not in capsys.readouterr().out
    torch.save({}, tmp_path / "d.pt")
    with pytest.raises(DataError, match="holds dict; expected a list"):
        load_expert_demonstrations(tmp_path / "d.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_expert_demonstrations(tmp_path / "absent.pt")


def test_json_lines_become_trajectories_of_a_model(tmp_path: Path, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Once upon a time", "response": f" there was a {w}."} for w in ("dog", "very big cat")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="is text: give tokenizer= and model="):
        load_expert_demonstrations(path)
    loader = load_expert_demonstrations(path, 2, tokenizer=tokenizer, model=model, max_response_tokens=64)
    assert all(int(row.actions[-1]) == tokenizer.eos_token_id for row in loader.rows)
    assert [row.group for row in loader.rows] == [0, 0]  # one prompt
    ids = tokenizer("Once upon a time there was a dog.", return_tensors="pt").input_ids
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    count = len(loader.rows[0].actions) - 1  # without EOS
    torch.testing.assert_close(loader.rows[0].hidden_states[:-1], states[-count:], rtol=1e-4, atol=1e-4)


def test_a_reward_that_reads_tokens_is_refused(make_lm: Callable[[str], Any]) -> None:
    class ReadsTokens:
        reads = "tokens"

    with pytest.raises(ValueError, match="reads tokens, not hidden states: use BiLevelTrainer"):
        IRLTrainer(ReadsTokens(), BiLevelConfig())  # type: ignore[arg-type]


def test_the_page_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    page = Path(__file__).resolve().parents[2] / "docs" / "bilevel_names.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert names["history"][0] != names["history"][1]
