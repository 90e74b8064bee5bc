"""A run that is interrupted, or killed, and resumed ends with the same bits as one that was left alone."""

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

import irlfast
from irlfast.data import TokenizedDemonstration
from irlfast.demo.toy import make_toy_trainer, toy_config
from irlfast.rollout import SamplingParams
from irlfast.train import BiLevelConfig, BiLevelTrainer, OptimizerConfig, PolicyConfig, checkpoint, state
from irlfast.train.checkpoint import latest_checkpoint

Make = Callable[..., BiLevelTrainer]


class Interrupted(Exception):
    pass


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is most of a small run's time and shows only after a power cut; test_checkpoint sees to it."""
    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)


def rows_without_seconds(out: Path) -> list[str]:
    """The log's lines as they were written, but for the time they took."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in rows]


def tensors(trainer: BiLevelTrainer) -> dict[str, torch.Tensor]:
    optimizers = {}
    for name, optimizer in (("policy", trainer.policy_optimizer), ("reward", trainer.reward_optimizer)):
        for i, values in optimizer.state_dict()["adamw"]["state"].items():  # type: ignore[index]
            optimizers.update({f"{name} optimizer {i} {key}": value for key, value in values.items()})
    policy = {f"policy {k}": v for k, v in trainer.policy.state_dict().items()}
    return {**policy, **{f"reward {k}": v for k, v in trainer.reward.state_dict().items()}, **optimizers}


def assert_same_bits(a: BiLevelTrainer, b: BiLevelTrainer) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def interrupt_before(trainer: BiLevelTrainer, iteration: int) -> None:
    """Raise when `iteration` (from 1) begins."""
    iterate = trainer._iterate

    def iterate_or_raise() -> dict[str, float]:
        if trainer.iteration + 1 == iteration:
            raise Interrupted
        return iterate()

    trainer._iterate = iterate_or_raise  # type: ignore[method-assign]


@pytest.fixture
def config(small_config: BiLevelConfig) -> BiLevelConfig:
    """Everything that carries state: PPO in shuffled minibatches, a warm-up and schedules, uneven steps, a reward with
    dropout (torch's generator), weight decay, a demonstration order that wraps around."""
    return replace(
        small_config,
        iterations=9,
        policy_steps=2,
        reward_steps=3,
        reward_warmup_steps=4,
        prompts_per_step=10,
        eval_every=4,
        checkpoint_every=3,
        policy=PolicyConfig(
            kind="ppo",
            epochs=2,
            minibatches=3,
            optimizer=OptimizerConfig(lr=0.05, warmup_steps=7, schedule="cosine", weight_decay=0.01),
        ),
        reward=replace(small_config.reward, optimizer=OptimizerConfig(lr=0.02, schedule="linear", weight_decay=0.1)),
    )


@pytest.mark.parametrize("killed_in", [1, 2, 4, 6, 9])
def test_interrupted_and_resumed_equals_uninterrupted(
    make_trainer: Make, config: BiLevelConfig, tmp_path: Path, killed_in: int
) -> None:
    """Checkpoints lie at 0, 3, 6 and 9, evaluations at 0, 4, 8 and 9: the resumed run repeats up to two iterations."""
    whole = make_trainer(config, mlp=True, out=tmp_path / "whole")
    whole.fit_reward_scale()
    last = whole.train()

    stopped = make_trainer(config, mlp=True, out=tmp_path / "run")
    stopped.fit_reward_scale()
    interrupt_before(stopped, killed_in)
    with pytest.raises(Interrupted):
        stopped.train()
    assert len(rows_without_seconds(tmp_path / "run")) >= killed_in

    torch.manual_seed(999)  # whatever state the new process happens to be in
    resumed = make_trainer(config, mlp=True, out=tmp_path / "run")
    assert resumed.resume() == (killed_in - 1) // 3 * 3
    assert resumed.train() == last
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(tmp_path / "whole")
    assert_same_bits(resumed, whole)


def test_resumed_twice_equals_uninterrupted(make_trainer: Make, config: BiLevelConfig, tmp_path: Path) -> None:
    whole = make_trainer(config, mlp=True, out=tmp_path / "whole")
    whole.train()
    for attempt, killed_in in enumerate((5, 8, 0)):
        trainer = make_trainer(config, mlp=True, out=tmp_path / "run")
        if attempt:
            trainer.resume()
        if killed_in:
            interrupt_before(trainer, killed_in)
            with pytest.raises(Interrupted):
                trainer.train()
        else:
            trainer.train()
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(tmp_path / "whole")
    assert_same_bits(trainer, whole)


def test_a_run_that_died_while_it_wrote_a_checkpoint_resumes_from_the_one_before(
    make_trainer: Make, config: BiLevelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(config, mlp=True, out=tmp_path / "whole")
    whole.train()
    stopped = make_trainer(config, mlp=True, out=tmp_path / "run")
    save = torch.save

    def disk_full(value: Any, path: Path) -> None:
        if stopped.iteration == 6:
            raise OSError("no space left on device")
        save(value, path)

    with monkeypatch.context() as patch:
        patch.setattr(state.torch, "save", disk_full)
        with pytest.raises(OSError, match="no space left"):
            stopped.train()
    assert (tmp_path / "run" / "checkpoints" / "step-6.tmp").is_dir()
    resumed = make_trainer(config, mlp=True, out=tmp_path / "run")
    assert resumed.resume() == 3
    resumed.train()
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(tmp_path / "whole")
    assert_same_bits(resumed, whole)


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch

from irlfast.demo.toy import make_toy_trainer, toy_config
from irlfast.rollout import SamplingParams

torch.set_num_threads(1)
out, resume = Path(sys.argv[1]), sys.argv[2] == "resume"
{config}
trainer = make_toy_trainer(3, config, out)
if resume:
    print("resumed from", trainer.resume())
trainer.train()
"""

# A second or two long: time enough to be killed half way.
CONFIG = """
config = replace(
    toy_config(),
    iterations=200,
    prompts_per_step=32,
    rollout=SamplingParams(max_new_tokens=5, n=16),
    eval_every=20,
    eval_prompts=32,
    checkpoint_every=40,
)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this platform has no SIGKILL")
@pytest.mark.parametrize("when", ["between checkpoints", "while a checkpoint is written"])
def test_killed_by_the_system_and_resumed_equals_uninterrupted(tmp_path: Path, when: str) -> None:
    names: dict[str, Any] = {"replace": replace, "toy_config": toy_config, "SamplingParams": SamplingParams}
    exec(CONFIG, names)
    whole = make_toy_trainer(3, names["config"], tmp_path / "whole")
    whole.train()

    script, out = tmp_path / "run.py", tmp_path / "run"
    script.write_text(SCRIPT.format(config=CONFIG))
    # The child imports the irlfast that is tested here, wherever it was started from.
    path = [str(Path(irlfast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}

    def due() -> bool:
        if when == "while a checkpoint is written":
            return (out / "checkpoints" / "step-80.tmp").exists()
        log = out / "metrics.jsonl"
        return log.exists() and log.read_bytes().count(b"\n") >= 60

    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(script), str(out), "start"], stdout=errors, stderr=errors, env=environment
        )
        deadline = time.monotonic() + 300  # a busy machine takes a minute to import
        while not due() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "errors").read_text()
    reached = latest_checkpoint(out / "checkpoints")
    assert reached is not None
    assert reached.name in ("step-40", "step-80", "step-120", "step-160")  # under way, not done

    resumed = subprocess.run(
        [sys.executable, str(script), str(out), "resume"], capture_output=True, text=True, env=environment, timeout=600
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == f"resumed from {reached.name.removeprefix('step-')}\n"
    assert rows_without_seconds(out) == rows_without_seconds(tmp_path / "whole")
    ended = make_toy_trainer(3, names["config"], out)
    assert ended.resume() == 200
    assert_same_bits(ended, whole)


@pytest.mark.parametrize("name", ["optimizers.pt", "policy/model.safetensors", "reward/config.json", "state.json"])
def test_a_checkpoint_that_lost_a_byte_is_named_and_the_one_before_resumes_to_the_same_end(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    whole = make_trainer(small_config, out=tmp_path)
    whole.train()
    before = rows_without_seconds(tmp_path)
    file = tmp_path / "checkpoints" / "step-4" / name
    file.write_bytes(file.read_bytes()[:-1])
    resumed = make_trainer(small_config, out=tmp_path)
    assert resumed.resume() == 2
    assert f"damaged checkpoint refused: {file} has {file.stat().st_size} bytes" in caplog.text
    assert "step-2, the newest whole checkpoint, instead of step-4" in caplog.text
    resumed.train()
    assert rows_without_seconds(tmp_path) == before
    assert_same_bits(resumed, whole)
    assert make_trainer(small_config, out=tmp_path).resume() == 4  # written anew, and whole


# What resume refuses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.5}, "beta was 1.0, is 0.5"),
        ({"seed": 4}, "seed was 0, is 4"),
        ({"regularizer": "entropy"}, "regularizer was 'kl', is 'entropy'"),
        (
            {"rollout": SamplingParams(max_new_tokens=5, n=12, temperature=0.5)},
            r"rollout\.temperature was 1\.0, is 0\.5",
        ),
        (
            {"policy": PolicyConfig(optimizer=OptimizerConfig(lr=0.25, max_grad_norm=0.0))},
            r"policy\.optimizer\.lr was 0\.05, is 0\.25\. Resume with the same one",
        ),
        ({"beta": 2.0, "seed": 1}, "beta was 1.0, is 2.0; seed was 0, is 1"),
    ],
)
def test_another_configuration_is_refused_and_the_field_named(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    make_trainer(small_config, out=tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = make_trainer(replace(small_config, **change), out=tmp_path)
    table = other.policy.table.detach().clone()
    with pytest.raises(ValueError, match=r"step-4 was made with another configuration: .*" + message):
        other.resume()
    assert torch.equal(other.policy.table, table)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_how_long_and_how_often_may_change(make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path) -> None:
    """A run of 4 extended to 7 has the rows and the weights of a run of 7, with a constant learning rate."""
    longer = replace(small_config, iterations=7)
    whole = make_trainer(replace(longer, checkpoint_every=100), out=tmp_path / "whole")
    whole.train()
    make_trainer(small_config, out=tmp_path / "run").train()
    extended = make_trainer(replace(longer, checkpoint_every=3, keep_checkpoints=5), out=tmp_path / "run")
    assert extended.resume() == 4
    extended.train()
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(tmp_path / "whole")
    assert_same_bits(extended, whole)


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_a_schedule_that_ends_cannot_change_its_length(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path, part: str
) -> None:
    scheduled = replace(getattr(small_config, part), optimizer=OptimizerConfig(schedule="linear"))
    config = replace(small_config, **{part: scheduled})
    make_trainer(config, out=tmp_path).train()
    with pytest.raises(ValueError, match=r"iterations was 4, is 7: a schedule that ends at the last step cannot"):
        make_trainer(replace(config, iterations=7), out=tmp_path).resume()


def test_nothing_to_resume_is_said(make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*checkpoints: nothing to resume"):
        make_trainer(small_config, out=tmp_path).resume()
    with pytest.raises(ValueError, match="out is None"):
        make_trainer(small_config).resume()


def test_a_finished_run_resumes_to_its_end_and_stays_there(
    make_trainer: Make, small_config: BiLevelConfig, tmp_path: Path
) -> None:
    first = make_trainer(small_config, out=tmp_path)
    last = first.train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = make_trainer(small_config, out=tmp_path)
    assert again.resume() == 4
    assert again.train() == last
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert_same_bits(again, first)


def test_language_model_policies_resume(small_config: BiLevelConfig, tmp_path: Path) -> None:
    """A transformers model with tied weights, saved once and loaded twice: by resume and by itself."""
    transformers = pytest.importorskip("transformers")
    from irlfast.rewards import RewardModel, RewardModelConfig
    from irlfast.rollout import TransformersEngine

    rows = [TokenizedDemonstration(prompt_ids=(20, i, i + 1), response_ids=(3, 21), truncated=False) for i in range(16)]
    config = replace(small_config, prompts_per_step=4, eval_prompts=4, rollout=SamplingParams(max_new_tokens=6, n=4))

    def make(out: Path) -> BiLevelTrainer:
        torch.manual_seed(0)
        shape = transformers.LlamaConfig(
            vocab_size=23, bos_token_id=20, eos_token_id=21, pad_token_id=22, tie_word_embeddings=True, hidden_size=32,
            intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        )  # fmt: skip
        policy = transformers.AutoModelForCausalLM.from_config(shape)
        reference = transformers.AutoModelForCausalLM.from_config(shape)
        reference.load_state_dict(policy.state_dict())
        return BiLevelTrainer(
            policy=policy,
            engine=TransformersEngine(policy, eos_token_id=21, pad_token_id=22),
            reward=RewardModel(RewardModelConfig(hidden_size=34, hidden_sizes=(16,))),
            demonstrations=rows[:12],
            heldout=rows[12:],
            config=config,
            pad_token_id=22,
            out=out,
            reference=reference,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    stopped = make(tmp_path / "run")
    interrupt_before(stopped, 4)
    with pytest.raises(Interrupted):
        stopped.train()
    resumed = make(tmp_path / "run")
    assert resumed.resume() == 2
    resumed.train()
    assert rows_without_seconds(tmp_path / "run") == rows_without_seconds(tmp_path / "whole")
    assert_same_bits(resumed, whole)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step-4" / "policy")
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_other_demonstrations_are_refused(
    make_trainer: Make, config: BiLevelConfig, toy_rows: Callable[..., list[TokenizedDemonstration]], tmp_path: Path
) -> None:
    make_trainer(config, out=tmp_path).train()
    with pytest.raises(ValueError, match="other demonstrations"):
        make_trainer(config, out=tmp_path, demonstrations=toy_rows(64, seed=5)).resume()
