"""IQLearnTrainer: a step whatever its split; phases, KL and samples; evaluation; checkpoints that resume exactly."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import irlfast
from irlfast.data import TokenizedDemonstration
from irlfast.rewards.iq import IQReward, iq_statistics
from irlfast.rollout import TransformersEngine
from irlfast.train import IQLearnConfig, IQLearnTrainer, checkpoint, iq_learn
from irlfast.train.checkpoint import latest_checkpoint
from irlfast.train.iq_evaluation import Batch

EOS, PAD = 2, 0
MakeLM = Callable[[str], nn.Module]


def rows(count: int, seed: int = 0) -> list[TokenizedDemonstration]:
    """Prompts of 1 to 4 tokens, responses of 1 to 8: those that have 8 were cut off, the others end with EOS."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: tuple[int, ...] = (1,)) -> list[int]:
        return torch.randint(low, high, size, generator=generator).tolist()

    found = []
    for _ in range(count):
        length = draw(1, 9)[0]
        response = draw(3, 64, (length,))
        if length < 8:
            response[-1] = EOS
        found.append(
            TokenizedDemonstration(
                prompt_ids=(1, *draw(3, 64, (draw(0, 4)[0],))), response_ids=tuple(response), truncated=length == 8
            )
        )
    return found


CONFIG = IQLearnConfig(
    num_train_epochs=3,
    local_micro_batch_size=4,
    gradient_accumulation_steps=3,
    lr=1e-3,
    scheduler="constant",
    response_length=8,
    eval_every=4,
    eval_num_samples=0,
    checkpoint_every=4,
)


def trainer_on(model: nn.Module, config: IQLearnConfig = CONFIG, **options: Any) -> IQLearnTrainer:
    given: dict[str, Any] = {"demonstrations": rows(40), "pad_token_id": PAD, **options}
    if config.use_kl:
        given.setdefault("reference", copy.deepcopy(model))
    engine = TransformersEngine(model, eos_token_id=EOS, pad_token_id=PAD)
    return IQLearnTrainer(policy=model, config=config, engine=engine, **given)


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# A step


@pytest.mark.parametrize("options", [{}, {"use_kl": True, "online_rate": 0.4}], ids=["offline", "online, KL"])
def test_any_split_of_a_batch_gives_the_same_parameters(make_lm: MakeLM, options: dict[str, Any]) -> None:
    ends = []
    for micro in (1, 4, 6, 12):
        model = make_lm("llama").train()
        config = replace(
            CONFIG, local_micro_batch_size=micro, gradient_accumulation_steps=12 // micro, lr=1e-4, **options
        )
        trainer = trainer_on(model, config)
        for _ in range(10):
            trainer.step()
        ends.append(parameters(model))
    assert float((ends[0] - parameters(make_lm("llama"))).abs().max()) > 9e-4  # ten steps of nearly the learning rate
    for other in ends[1:]:
        assert float((other - ends[0]).abs().max()) <= 1e-6


def test_a_mean_of_micro_batch_means_would_not(make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above fails code that divides each micro-batch by its own tokens."""
    right = iq_learn.iq_learn_loss

    def broken(*arguments: Tensor, denominator: int, **options: Any) -> Any:
        result = right(*arguments, **options)
        return result._replace(loss=result.loss * len(arguments[0]) / 12)

    monkeypatch.setattr(iq_learn, "iq_learn_loss", broken)
    ends = []
    for micro in (1, 12):
        model = make_lm("llama").train()
        trainer = trainer_on(
            model, replace(CONFIG, local_micro_batch_size=micro, gradient_accumulation_steps=12 // micro)
        )
        for _ in range(10):
            trainer.step()
        ends.append(parameters(model))
    assert float((ends[1] - ends[0]).abs().max()) > 1e-4


def test_a_step_descends_the_loss_it_reports(make_lm: MakeLM) -> None:
    """One batch again and again: the reported loss is nll + lambda td_error, and falls."""
    model = make_lm("llama")
    trainer = trainer_on(model, replace(CONFIG, num_train_epochs=40, lambda_td=0.5), demonstrations=rows(12))
    seen = [trainer.step() for _ in range(30)]
    for row in seen:
        assert row["loss"] == pytest.approx(row["nll"] + 0.5 * row["td_error"], rel=1e-4)
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]


def test_maximum_likelihood_is_lambda_zero(make_lm: MakeLM) -> None:
    ends = []
    for config in (replace(CONFIG, use_irl=False), replace(CONFIG, lambda_td=0.0)):
        model = make_lm("llama")
        trainer_on(model, config).train()
        ends.append(parameters(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_port_iq_learn_begins_after_so_many_optimiser_steps(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """There, a counter of micro-batches was compared with ==, so that it might never begin."""
    weights: list[float] = []
    right = iq_learn.iq_learn_loss

    def watched(*arguments: Tensor, lambda_td: float, **options: Any) -> Any:
        weights.append(lambda_td)
        return right(*arguments, lambda_td=lambda_td, **options)

    monkeypatch.setattr(iq_learn, "iq_learn_loss", watched)
    config = replace(CONFIG, gradient_accumulation_steps=accumulation, mle_steps_before_irl=2)
    trainer = trainer_on(make_lm("llama"), config)
    for _ in range(4):
        trainer.step()
    assert weights == [0.0] * 2 * accumulation + [0.1] * 2 * accumulation


def test_port_prompts_are_never_trained_on(make_lm: MakeLM) -> None:
    """The head's gradient is made of the states that predict a response's tokens: here one, and no prompt token's."""
    model = make_lm("llama")
    row = TokenizedDemonstration(prompt_ids=(1, 7, 8, 9), response_ids=(EOS,), truncated=False)
    trainer = trainer_on(model, replace(CONFIG, lambda_td=1.0, max_grad_norm=0.0), demonstrations=[row] * 12)
    ids = torch.tensor([[1, 7, 8, 9, EOS]])
    trainer._demonstrations_backward([row], 1.0)
    states = model.model(ids).last_hidden_state[0].detach()
    head_gradient = model.lm_head.weight.grad
    # dW is a sum of outer products over the states that were trained: here one, that of the prompt's last token.
    assert torch.linalg.matrix_rank(head_gradient, rtol=1e-4) == 1
    direction = head_gradient[EOS] / head_gradient[EOS].norm()
    torch.testing.assert_close(
        (direction @ states[3]).abs() / states[3].norm(), torch.tensor(1.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("truncated", ["bootstrap", "drop"])
def test_padding_and_what_stands_on_it_change_nothing(make_lm: MakeLM, truncated: str) -> None:
    model = make_lm("llama")
    batch = Batch.of_demonstrations(rows(12), PAD, torch.device("cpu"))
    found = []
    for fill in (PAD, 5):
        s = batch.sequences
        ids = torch.where(s.attention_mask, s.input_ids, fill)
        stats = iq_statistics(model, ids, s.attention_mask, s.response_mask, batch.ended, truncated=truncated)
        loss = iq_learn.iq_learn_loss(stats.q, stats.lse, stats.mask, ended=batch.ended, truncated=truncated).loss
        model.zero_grad()
        loss.backward()
        found.append((float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_statistics_are_those_of_the_models_logits(make_lm: MakeLM) -> None:
    model, temperature = make_lm("llama"), 0.7
    batch = Batch.of_demonstrations(rows(12), PAD, torch.device("cpu"))
    s = batch.sequences
    stats = batch.statistics(model, temperature=temperature)
    logits = model(input_ids=s.input_ids, attention_mask=s.attention_mask.long()).logits
    value = (logits / temperature).logsumexp(-1)
    for row in range(12):
        places = s.response_mask[row].nonzero()[:, 0]
        chosen = logits[row, places - 1, s.input_ids[row, places]]
        torch.testing.assert_close(stats.q[row, places], chosen, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(stats.lse[row, places], value[row, places - 1], rtol=1e-4, atol=1e-4)
        if not batch.ended[row]:
            end = int(places[-1])
            torch.testing.assert_close(stats.lse[row, end + 1], value[row, end], rtol=1e-4, atol=1e-4)


# KL, samples, precision


def test_the_kl_holds_the_policy_at_the_start(make_lm: MakeLM) -> None:
    found = {}
    for name, options in (
        ("free", {}),
        ("exact", {"lambda_kl": 5.0}),
        ("sampled", {"lambda_kl": 5.0, "kl": "sampled"}),
    ):
        model = make_lm("llama")
        config = replace(CONFIG, use_kl=bool(options), online_rate=0.0 if name == "exact" else 0.5, **options)
        trainer = trainer_on(model, config, heldout=rows(20, seed=1), reference=make_lm("llama"))
        found[name] = trainer.train()["heldout_kl"]
    assert found["exact"] < 0.5 * found["free"]
    assert found["sampled"] < 0.8 * found["free"]


def test_online_answers_enter_the_square_alone(make_lm: MakeLM) -> None:
    """The gradient of lambda rho mean r^2 over the policy's answers to the batch's prompts, in micro-batches."""
    model = make_lm("llama")
    trainer = trainer_on(model, replace(CONFIG, online_rate=0.3, lambda_td=0.5))
    answers = trainer._answers(rows(12))
    found = trainer._answers_backward(answers, 0.3 * 0.5)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    squares, tokens = torch.zeros(()), 0
    for batch in answers:
        stats = batch.statistics(model)
        following = nn.functional.pad(stats.lse[:, 1:], (0, 1))
        end = stats.mask & ~nn.functional.pad(stats.mask[:, 1:], (0, 1)) & batch.ended[:, None]
        rewards = stats.q - torch.where(end, 0.0, following)
        squares = squares + rewards[stats.mask].square().sum()
        tokens += int(stats.mask.sum())
    (0.3 * 0.5 * squares / tokens).backward()
    torch.testing.assert_close(got, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-4, atol=1e-5)
    assert found["answer_loss"] == pytest.approx(0.3 * 0.5 * found["answer_td_error"], rel=1e-4)
    row = trainer.step()
    assert row["loss"] == pytest.approx(row["nll"] + 0.7 * 0.5 * row["td_error"], rel=1e-4)
    again = trainer._answers(rows(12))
    assert not torch.equal(again[0].sequences.input_ids, answers[0].sequences.input_ids)  # fresh ones at each step


def test_gradient_checkpointing_gives_the_same_parameters(make_lm: MakeLM) -> None:
    ends = []
    for on in (False, True):
        model = make_lm("llama")
        trainer_on(model, replace(CONFIG, gradient_checkpointing=on)).train()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == on
        ends.append(parameters(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


def test_bfloat16_autocast_is_near_float32_and_leaves_weights_alone(make_lm: MakeLM) -> None:
    found = []
    for on in (False, True):
        model = make_lm("llama")
        found.append(trainer_on(model, replace(CONFIG, bf16=on)).step())
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert found[0]["nll"] != found[1]["nll"]
    assert found[1]["nll"] == pytest.approx(found[0]["nll"], rel=0.02)


# Evaluation


def test_evaluations_are_means_over_held_out_tokens(make_lm: MakeLM) -> None:
    model = make_lm("llama")
    heldout = rows(30, seed=1)
    trainer = trainer_on(model, replace(CONFIG, local_eval_batch_size=7), heldout=heldout, reference=make_lm("gpt2"))
    found = trainer.evaluate()
    batch = Batch.of_demonstrations(heldout, PAD, torch.device("cpu"))
    with torch.no_grad():
        stats = batch.statistics(model, reference=make_lm("gpt2").eval())
    mask = stats.mask
    rewards = trainer.reward()(*_parts(batch)).rewards
    tokens = int(mask.sum())
    want = {
        "nll": -float(stats.logprob[mask].mean()),
        "td_error": float(rewards.square().sum()) / tokens,
        "reward": float(rewards.sum()) / tokens,
        "q": float(stats.q[mask].mean()),
        "value": float(stats.lse[mask].mean()),
        "kl": float(stats.kl[mask].mean()),
        "logprob": float(stats.logprob[mask].mean()),
    }
    for name, value in want.items():
        assert found[f"heldout_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    centred = (rewards[:, : mask.shape[1]] - want["reward"])[mask[:, : rewards.shape[1]]]
    assert found["heldout_reward_std"] == pytest.approx(float(centred.square().mean().sqrt()), rel=1e-4)


def _parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = batch.sequences
    return s.input_ids, s.attention_mask, s.response_mask, batch.ended


def test_answers_are_sampled_at_each_temperature_and_scored(make_lm: MakeLM) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    config = replace(CONFIG, eval_num_samples=6, eval_samples_per_prompt=3, eval_temperatures=(0.0, 1.5))
    references = {" ".join(f"w{i}" for i in row.response_ids) for row in rows(10, seed=1)}
    trainer = trainer_on(
        make_lm("llama"),
        config,
        heldout=rows(10, seed=1),
        decode=lambda ids: " ".join(f"w{i}" for i in ids),
        task_metric=lambda reference, answer: len(answer) + 1000.0 * (reference in references),
    )
    found = trainer.evaluate()
    names = "length stopped return distinct_1 distinct_2 self_bleu rouge_l spearman_rouge_l chrf task spearman_task"
    assert {f"{name}@{t}" for name in names.split() for t in ("0", "1.5")} <= found.keys()
    assert found["self_bleu@0"] == pytest.approx(1.0)  # greedy answers to one prompt are the same
    assert found["self_bleu@1.5"] < 0.5
    assert found["task@0"] > 1000  # it is given the demonstration first, the answer second
    assert trainer.evaluate() == found  # the same seed each time, so that steps can be compared


# The reward


def test_rewards_add_up_to_the_likelihood_and_the_relative_ones_to_its_ratio(make_lm: MakeLM) -> None:
    model, start = make_lm("llama"), make_lm("gpt2").eval()
    batch = Batch.of_demonstrations(rows(12), PAD, torch.device("cpu"))
    found = IQReward(model, reference=start)(*_parts(batch))
    s = batch.sequences
    stats, ref = (batch.statistics(m, truncated="drop") for m in (model, start))
    logprob, ref_logprob = (torch.where(s.response_mask, x.logprob, 0.0).sum(1) for x in (stats, ref))
    first = s.response_mask.int().argmax(1)
    value = stats.lse.gather(1, first[:, None])[:, 0]
    ended = batch.ended
    torch.testing.assert_close(found.returns[ended], (logprob + value)[ended].detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.relative_returns, (logprob - ref_logprob).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.advantages.sum(1), logprob.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.rewards.sum(1), found.returns)
    assert not found.rewards[~s.response_mask].any()
    discounted = IQReward(model, gamma=0.9)(*_parts(batch)).returns
    assert float((discounted - found.returns).abs().min()) > 0.1


# Checkpoints


@pytest.fixture
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing shows only after a power cut; test_checkpoint sees to it."""
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)


def log_rows(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


@pytest.mark.usefixtures("no_flushing")
@pytest.mark.parametrize("killed_before", [3, 9])
def test_interrupted_and_resumed_equals_uninterrupted(make_lm: MakeLM, tmp_path: Path, killed_before: int) -> None:
    """GPT-2 has dropout, so torch's generator counts too; checkpoints lie at 0, 4, 8 and 10."""
    config = replace(CONFIG, scheduler="cosine", warm_up_steps=3, weight_decay=0.1, online_rate=0.2)

    def make(name: str) -> IQLearnTrainer:
        torch.manual_seed(5)
        return trainer_on(make_lm("gpt2"), config, out=tmp_path / name, heldout=rows(10, seed=1))

    whole = make("whole")
    last = whole.train()
    stopped = make("run")
    take = stopped.step

    def step() -> dict[str, float]:
        if stopped.step_count == killed_before:
            raise KeyboardInterrupt
        return take()

    stopped.step = step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make("run")
    torch.manual_seed(99)
    assert resumed.resume() == killed_before // 4 * 4
    assert resumed.train() == last
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")
    assert torch.equal(parameters(resumed.policy), parameters(whole.policy))


SCRIPT = """
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from irlfast.data import TokenizedDemonstration
from irlfast.train import IQLearnConfig, IQLearnTrainer

torch.set_num_threads(1)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    attention_dropout=0.1,
))
rows = [TokenizedDemonstration(prompt_ids=(1, i), response_ids=(3 + i % 20, 2), truncated=False) for i in range(3, 31)]
config = IQLearnConfig(
    num_train_epochs=40, local_micro_batch_size=4, gradient_accumulation_steps=2, eval_every=20, eval_num_samples=0,
    checkpoint_every=30,
)
trainer = IQLearnTrainer(
    policy=model, demonstrations=rows[:20], heldout=rows[20:], config=config, pad_token_id=0, out=Path(sys.argv[1])
)
if sys.argv[2] == "resume":
    print("resumed from", trainer.resume())
trainer.train()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
def test_killed_by_the_system_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    path = [str(Path(irlfast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def run(name: str, how: str) -> str:
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / name), how],
            capture_output=True, text=True, env=environment, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("whole", "start")
    log = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "run"), "start"], stderr=errors, env=environment
        )
        deadline = time.monotonic() + 600
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= 45:
                break
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "errors").read_text()
    reached = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert reached is not None
    assert reached.name in ("step-30", "step-60", "step-90")  # under way, not done
    assert run("run", "resume") == f"resumed from {reached.name.removeprefix('step-')}\n"
    assert log_rows(tmp_path / "run") == log_rows(tmp_path / "whole")
    ends = [
        load_file(tmp_path / name / "checkpoints" / "step-100" / "policy" / "model.safetensors")
        for name in ("run", "whole")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.usefixtures("no_flushing")
def test_resume_refuses_what_would_not_be_the_same_run(make_lm: MakeLM, tmp_path: Path) -> None:
    trainer_on(make_lm("llama"), out=tmp_path).train()
    with pytest.raises(ValueError, match=r"lambda_td was 0\.1, is 0\.5; lr was 0\.001, is 0\.01"):
        trainer_on(make_lm("llama"), replace(CONFIG, lambda_td=0.5, lr=0.01), out=tmp_path).resume()
    with pytest.raises(ValueError, match="made on other demonstrations"):
        trainer_on(make_lm("llama"), out=tmp_path, demonstrations=rows(40, seed=3)).resume()
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        trainer_on(make_lm("llama"), out=tmp_path / "none").resume()
    with pytest.raises(FileExistsError, match="is there already"):
        trainer_on(make_lm("llama"), out=tmp_path).train()
    assert trainer_on(make_lm("llama"), replace(CONFIG, eval_every=3), out=tmp_path).resume() == 10


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_mle": False, "use_irl": False}, "both off: nothing is trained"),
        ({"mle_steps_before_irl": 3, "use_mle": False}, "mle_steps_before_irl = 3 needs use_mle and use_irl"),
        ({"use_kl": True, "kl": "sampled"}, "kl = 'sampled' needs samples of the policy"),
        ({"optimizer": "adam", "weight_decay": 0.1}, "weight_decay = 0.1 with optimizer = 'adam'"),
        ({"gamma": 1.1}, r"gamma = 1\.1, expected a discount"),
        ({"temperature": 0.0}, r"temperature = 0\.0, expected a number above 0"),
        ({"local_micro_batch_size": 0}, "local_micro_batch_size = 0, expected at least 1"),
        ({"online_rate": 2.0}, r"online_rate = 2\.0, expected a share"),
    ],
)
def test_bad_configurations_are_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_what_is_needed_and_missing_is_said(make_lm: MakeLM) -> None:
    model = make_lm("llama")
    given: dict[str, Any] = {"policy": model, "pad_token_id": PAD, "demonstrations": rows(3)}
    with pytest.raises(ValueError, match="use_kl needs a reference"):
        IQLearnTrainer(config=replace(CONFIG, use_kl=True), **given)
    with pytest.raises(ValueError, match=r"online_rate = 0\.5 needs an engine"):
        IQLearnTrainer(config=replace(CONFIG, online_rate=0.5), **given)
    with pytest.raises(ValueError, match="eval_num_samples above 0 needs an engine"):
        IQLearnTrainer(config=replace(CONFIG, eval_num_samples=2), heldout=rows(3), **given)
    with pytest.raises(ValueError, match="reference is the policy itself"):
        IQLearnTrainer(config=CONFIG, reference=model, **given)
    with pytest.raises(ValueError, match="the list is empty"):
        IQLearnTrainer(config=CONFIG, **{**given, "demonstrations": []})
