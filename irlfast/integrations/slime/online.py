"""A reward that learns between slime's rollouts: bi-level IRL with slime as the policy's trainer.

--rollout-function-path irlfast.integrations.slime.generate_rollout samples as slime does, its samples judged by the
reward as it is. Every irl_update_ratio rollouts the reward then learns from demonstrations against those samples; the
policy trains on the rewards that they were given before. The settings are attributes of args, or environment
variables, as for `reward`:

    irl_demonstrations          text to imitate (`irlfast.data.load_demonstrations`)
    irl_num_epochs              passes through the demonstrations in an update, by default 1
    irl_batch_size              demonstrations a step, by default 32
    irl_token_statistics        read each token's log-prob and entropy beside its state, by default true
    irl_seed                    of the reward's start and the demonstrations' order, by default 0
    irl_rollout_function        what samples, by default slime.rollout.sglang_rollout.generate_rollout
    irl_fresh                   true to begin with a new reward where slime does not begin at rollout 0

and those of `setup_bi_level_irl`: irl_update_ratio, irl_objective, irl_objective_options (a dict, or JSON),
reward_model_type, reward_model_hidden_size, reward_model_num_layers, reward_model_dropout, reward_model_lr, pooling and
beta. The frozen language model whose states the reward reads is irlfast_reward_model, by default --hf-checkpoint, on
irlfast_reward_device; a rollout's states are held in memory at once, 4 bytes for each of its tokens and features.

A demonstration is set against samples of its own prompt where every sampled prompt has one, as the normaliser of
max-ent IRL asks for, and against all samples elsewhere. The reward is saved beside slime's own checkpoints, at the same
rollouts, and a resumed run goes on with the one of the rollout that it resumes after.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from irlfast.data import TokenizedDemonstration, load_demonstrations, tokenize_demonstrations
from irlfast.rewards import ReaderConfig
from irlfast.rewards.base import evaluating
from irlfast.rewards.reader import lasting_name, weights_digest
from irlfast.scorer import RewardScorer, TextForm
from irlfast.train import BiLevelOptimizer, ExpertLoader, setup_bi_level_irl
from irlfast.train.checkpoint import verify_checkpoint, write_checkpoint
from irlfast.train.metrics import mean_rows
from irlfast.train.trajectories import Trajectory, collate, read_trajectories

from .reward import RewardSettings, is_true, reader_for, rescore, setting
from .samples import flat, status
from .scoring import SampleScorer
from .weights import load_function

_OF_THE_OPTIMIZER = (
    "irl_update_ratio", "irl_objective", "irl_objective_options", "reward_model_type", "reward_model_hidden_size",
    "reward_model_num_layers", "reward_model_dropout", "reward_model_lr", "pooling", "beta",
)  # fmt: skip
_FOLDER = "irlfast_reward"


def generate_rollout(args: Any, rollout_id: int, data_source: Any, evaluation: bool = False) -> Any:
    """--rollout-function-path irlfast.integrations.slime.generate_rollout, beside --custom-rm-path ...slime.reward.

    Args:
        args: slime's, and the settings of this module.
        rollout_id: counts from 0.
        data_source: slime's; the stale rewards in its buffer, where it has one, are renewed after a reward update.
        evaluation: sample as slime does, and learn nothing.

    Returns:
        What slime's own function returns, with the reward's figures, named irl/..., among its metrics.

    Raises:
        ValueError, DataError: settings or samples that the reward cannot learn from. FileNotFoundError: slime resumes,
            and no reward was saved for that rollout.
    """
    learner = online_reward(args)
    sample = load_function(setting(args, "irl_rollout_function", "slime.rollout.sglang_rollout.generate_rollout"))
    if evaluation:
        return sample(args, rollout_id, data_source, evaluation=True)
    learner.begin(rollout_id)
    output = sample(args, rollout_id, data_source, evaluation=False)
    figures, updated = learner.learn(list(flat(output.samples)))
    if updated and (buffer := getattr(data_source, "buffer", None)):
        figures["irl/rescored"] = float(asyncio.run(rescore(args, buffer)))
    if _saves(args, rollout_id, data_source):
        learner.save(rollout_id)
    output.metrics = {**(output.metrics or {}), **figures}
    return output


class OnlineReward:
    """The reward's side of bi-level IRL, in the process that rolls out.

    Args:
        args: slime's, and the settings of this module.

    Attributes:
        optimizer: the BiLevelOptimizer.
        scorer: judges samples by its reward.
    """

    def __init__(self, args: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings = settings = RewardSettings.of(args)
        if settings.path:
            raise ValueError(
                f"irlfast_reward is {settings.path!r} and irl_demonstrations is set: samples would be judged by the "
                "saved reward while another one learns. Set one of the two"
            )
        name = settings.model or settings.policy
        if not name:
            raise ValueError("no language model for the reward to read: set irlfast_reward_model or --hf-checkpoint")
        loaded: Any = AutoModelForCausalLM.from_pretrained(name)
        self.language_model = loaded.to(settings.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
        self.source = ReaderConfig(
            model=lasting_name(name),
            token_statistics=is_true(setting(args, "irl_token_statistics", True)),
            weights=weights_digest(self.language_model),
        )
        longest = getattr(args, "rollout_max_response_len", None)
        demonstrations = tokenize_demonstrations(
            load_demonstrations(str(setting(args, "irl_demonstrations"))),
            tokenizer,
            max_response_tokens=sys.maxsize if longest is None else longest,
        )
        self.prompts: dict[tuple[int, ...], int] = {}
        groups = [self.prompts.setdefault(row.prompt_ids, len(self.prompts)) for row in demonstrations]
        experts = self._read(demonstrations, groups)
        self.experts: dict[int, list[Trajectory]] = {}
        for expert, group in zip(experts, groups, strict=True):
            self.experts.setdefault(group, []).append(expert)
        self.optimizer = _optimizer(args, experts, settings.device)
        self.reward = self.optimizer.reward_model
        self.reward.source = self.source
        known = collate(experts).to(settings.device)
        self.reward.fit_feature_scale(known.hidden_states, known.mask, known.mask)
        form = TextForm(max_response_tokens=longest)
        scorer = RewardScorer(self.reward, tokenizer, self.language_model, form=form, batch_size=settings.batch_size)
        self.scorer = SampleScorer(scorer, reader_for(scorer, settings), raw=settings.raw)
        self.num_epochs = int(setting(args, "irl_num_epochs", 1))
        folder = getattr(args, "save", None)
        self.folder = None if folder is None else Path(folder) / _FOLDER
        self._resumes_from = Path(getattr(args, "load", None) or folder or ".") / _FOLDER
        self._fresh = is_true(setting(args, "irl_fresh", False))
        self._begun = False

    def begin(self, rollout_id: int) -> None:
        """Before the first rollout of this process: where that is not rollout 0, take up what was saved before it."""
        if not self._begun and rollout_id > 0 and not self._fresh:
            path = self._resumes_from / f"step-{rollout_id - 1}"
            if not path.is_dir():
                raise FileNotFoundError(
                    f"slime resumes at rollout {rollout_id} and {path}, the reward after the one before, is not there: "
                    "resume from a rollout whose reward was saved, or set irl_fresh: true to begin with a new reward"
                )
            verify_checkpoint(path)
            with self.scorer.lock:
                self.optimizer.load_state_dict(torch.load(path / "state.pt", weights_only=True))
        self._begun = True

    def learn(self, samples: Sequence[Any]) -> tuple[dict[str, float], bool]:
        """Take the samples' rewards into the statistics that rewards are normalised by, and learn where it is time.

        Returns:
            Figures named irl/..., and whether the reward has changed.
        """
        finished = [sample for sample in samples if status(sample) != "aborted"]
        rows = [self.scorer.reader(sample) for sample in finished]
        found = [self.prompts.get(row.prompt_ids) for row in rows]
        trajectories = self._read(rows, found)
        batch = collate(trajectories).to(self.optimizer.device)
        with self.scorer.lock:
            with torch.no_grad(), evaluating(self.reward):
                rewards = self.reward(batch.hidden_states, batch.mask, batch.mask)
            self.reward.normalizer.update(rewards)
            figures = {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std(correction=0))}
            turn = self.optimizer.step()
            if turn:
                log_proposal = _log_proposal(finished)
                if None in found:
                    figures |= self._against_all(trajectories, log_proposal)
                else:
                    figures |= self._by_prompt(trajectories, log_proposal)
        figures |= {"reward_updates": float(self.optimizer.get_info()["reward_updates"])}
        return {f"irl/{name}": value for name, value in figures.items()}, turn

    def save(self, rollout_id: int) -> Path | None:
        """Write the reward, as `irlfast score` reads it, and all that a resumed run needs; None without --save."""
        if self.folder is None:
            return None

        def write(path: Path) -> None:
            self.reward.save_pretrained(path / "reward")
            torch.save(self.optimizer.state_dict(), path / "state.pt")

        return write_checkpoint(self.folder, rollout_id, write, keep=sys.maxsize)

    def _read(self, rows: Sequence[TokenizedDemonstration], groups: Sequence[int | None]) -> list[Trajectory]:
        return read_trajectories(
            rows,
            groups,
            self.language_model,
            token_statistics=self.source.token_statistics,
            batch_size=self.settings.batch_size,
        )

    def _by_prompt(self, samples: Sequence[Trajectory], log_proposal: torch.Tensor | None) -> dict[str, float]:
        """Steps on the demonstrations of the sampled prompts, each set against the samples of its own."""
        groups = dict.fromkeys(sample.group for sample in samples)
        experts = collate([expert for group in groups if group is not None for expert in self.experts[group]])
        batch, device = collate(samples), self.optimizer.device
        steps = [
            self.optimizer.irl_trainer.step(experts.to(device), batch.to(device), log_proposal)
            for _ in range(self.num_epochs)
        ]
        return mean_rows(steps)

    def _against_all(self, samples: Sequence[Trajectory], log_proposal: torch.Tensor | None) -> dict[str, float]:
        """Steps on all demonstrations against all samples, for objectives that compare no prompts."""
        if "log_proposal" in self.optimizer.irl_trainer.update.objective.needs:
            raise ValueError(
                "a sampled prompt has no demonstration, and this objective compares demonstrations with samples of "
                "the same prompt: let --prompt-data hold the demonstrations' prompts, or set irl_objective: gail"
            )
        rollouts = [{"hidden_states": row.hidden_states, "actions": row.actions} for row in samples]
        return self.optimizer.update_reward_model(policy_rollouts=rollouts, num_epochs=self.num_epochs)


# slime names functions by their paths, so what they share lies in this module.
_making = threading.Lock()
_made: dict[str, OnlineReward] = {}


def online_reward(args: Any) -> OnlineReward:
    """The reward that learns from irl_demonstrations in this process, made when it is first asked for."""
    demonstrations = setting(args, "irl_demonstrations")
    if not demonstrations:
        raise ValueError(
            "no reward: set irlfast_reward to the folder of a reward or a run, or, for one that learns, "
            "irl_demonstrations to the text to imitate; in the YAML file of --custom-config-path, or as the "
            "environment variables IRLFAST_REWARD and IRL_DEMONSTRATIONS"
        )
    with _making:
        if str(demonstrations) not in _made:
            _made[str(demonstrations)] = OnlineReward(args)
        return _made[str(demonstrations)]


def _optimizer(args: Any, experts: Sequence[Trajectory], device: str) -> BiLevelOptimizer:
    seed = int(setting(args, "irl_seed", 0))
    options = {key: setting(args, key) for key in _OF_THE_OPTIMIZER}
    if isinstance(options["irl_objective_options"], str):
        options["irl_objective_options"] = json.loads(options["irl_objective_options"])
    batch_size = int(setting(args, "irl_batch_size", 32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return setup_bi_level_irl(
            expert_dataloader=ExpertLoader(experts, batch_size=batch_size, seed=seed, device=device),
            args=Namespace(**{key: value for key, value in options.items() if value is not None}),
            device=device,
        )


def _log_proposal(samples: Sequence[Any]) -> torch.Tensor | None:
    """[K] log-prob of each response under the sampler; None where slime has none."""
    if any(sample.rollout_log_probs is None for sample in samples):
        return None
    return torch.tensor([sum(sample.rollout_log_probs) for sample in samples])


def _saves(args: Any, rollout_id: int, data_source: Any) -> bool:
    """Whether slime saves the policy after this rollout: --save-interval, the end of an epoch, or the last one."""
    interval = getattr(args, "save_interval", None)
    if interval is None:
        return False
    if rollout_id + 1 == getattr(args, "num_rollout", None) or (rollout_id + 1) % interval == 0:
        return True
    epoch = len(data_source) // args.rollout_batch_size if getattr(args, "rollout_global_dataset", False) else 0
    return epoch > 0 and (rollout_id + 1) % epoch == 0
