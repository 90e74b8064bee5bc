"""Bi-level inverse reinforcement learning: a reward learned from demonstrations while the policy is trained on it.

The model of the demonstrator is p(y|x) ~ b(y|x) exp(r(x, y) / beta), b the reference policy or uniform: maximum-entropy
IRL (Ziebart et al. 2008) and, with samples of the policy as importance proposals, guided cost learning (Finn et al.
2016, arXiv 1603.00448). Each iteration takes `policy_steps` steps of

    policy:  maximise E_pi[r] - beta KL(pi || b)          by one of irlfast.train.policy_kinds
    return   R_i = r(y_i) - beta (log pi(y_i) - log b(y_i)),   a response's, or spread over its tokens; detached

and then `reward_steps` steps of, for the objective `maxent` (the others: docs/objectives.md),

    reward:  minimise mean_x [ -r(x, y_E) / beta + log (1/K) sum_k exp(r_k / beta) b_k / q_k ]

over demonstrations y_E and samples y_k of the same prompt, q_k the probability the sampler really gave y_k.

Departures from the papers: the reward reads the last hidden states of a frozen model, so that it does not move when the
policy does; the reward loss uses the rollouts of the policy steps before it (their q_k is recorded, so the weights are
exact) and samples afresh only where there are not enough of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration, digest
from irlfast.losses import group_advantages
from irlfast.rewards import BaseRewardModel, TokenRewards
from irlfast.rewards.base import evaluating
from irlfast.rollout import RolloutEngine, Sequences

from . import monitors, state
from .checks import check_dense_rewards, check_ends
from .config import BiLevelConfig
from .evaluation import OnJudged, SampleMetrics, evaluate_policy
from .experience import Experience
from .log import Progress, RunLog, read_log
from .lora import SharedReference, add_lora, is_lora
from .metrics import prefixed_means
from .policy_update import PolicyUpdate
from .prefetch import Prefetch, Request
from .replay import Replay
from .reward_update import Replayed, RewardUpdate
from .samples import Decode, Judgement, evaluation_record
from .scorer import FeatureFunction, Scorer, stack
from .scoring import response_scores, sequence_sum
from .seeds import EndlessDraws, derive_seed


class BiLevelTrainer:
    """Trains a reward and a policy together, evaluates on held-out demonstrations, logs, checkpoints and resumes.

    Args:
        policy: causal LM, called as model(input_ids=, attention_mask=, use_cache=), its output has `.logits` [B, S, V].
        engine: samples from the policy.
        reward: any reward model of irlfast.rewards.
        demonstrations: what the reward is learned from; their prompts are the policy's prompts.
        heldout: demonstrations for evaluation only.
        config: see BiLevelConfig.
        pad_token_id: fills the right of shorter rows.
        out: folder for metrics.jsonl, samples.jsonl and checkpoints/; None keeps nothing on disk.
        reference: frozen causal LM. Required by regularizer="kl" (it is the base b), and by a reward on hidden states
            where `features` is None.
        features: (input_ids, attention_mask) -> [B, S, H], what a reward on hidden states reads; None: the reference's,
            as `reward.source` says, by default the last layer's.
        sample_metrics: further metrics of the evaluation's samples.
        decode: token ids -> as many pieces of text, for samples.jsonl; None writes the ids.
        extra_state: writes further files of every checkpoint (a tokenizer's, for instance), given the folder of its
            policy.

    Raises:
        ValueError: no demonstrations or held-out rows, one that lacks its EOS, or a reference that is needed and
            missing.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        engine: RolloutEngine,
        reward: BaseRewardModel,
        demonstrations: Sequence[TokenizedDemonstration],
        heldout: Sequence[TokenizedDemonstration],
        config: BiLevelConfig,
        pad_token_id: int,
        out: Path | None = None,
        reference: nn.Module | None = None,
        features: FeatureFunction | None = None,
        sample_metrics: SampleMetrics | None = None,
        decode: Decode | None = None,
        extra_state: Callable[[Path], None] | None = None,
    ) -> None:
        if not heldout:
            raise ValueError("no held-out demonstrations: keep at least one row apart, or nothing can be evaluated")
        reads_states = features is None and reward.reads == "hidden_states"
        if config.policy.lora.rank:
            policy = add_lora(policy, config.policy.lora)
        if reference is None and is_lora(policy):
            reference = SharedReference(policy)
        if reference is None and (config.regularizer == "kl" or reads_states):
            need = "regularizer='kl'" if config.regularizer == "kl" else "features=None"
            raise ValueError(f"{need} needs a reference model: pass reference=, a frozen copy of the initial policy")
        if reference is policy:
            raise ValueError("reference is the policy itself: pass a frozen copy, or the KL is 0 whatever is learned")
        check_ends([*demonstrations, *heldout], getattr(engine, "eos_token_ids", None))
        self.policy = policy
        self.engine = Prefetch(engine, policy, config.overlap) if config.overlap else engine
        self.reward = reward
        self.heldout = list(heldout)[: config.eval_prompts]
        self.config = config
        self.pad_token_id = pad_token_id
        self.out = out
        self.reference = reference.requires_grad_(False).eval() if reference is not None else None
        self._score = Scorer(reward, self.reference, features, config)
        self._sample_metrics = sample_metrics
        self._decode = decode
        self._extra_state = extra_state
        self.draws = EndlessDraws(list(demonstrations), config.seed, "demonstrations")
        self.data_digest = digest([*demonstrations, *self.heldout])
        self.rollout_count = 0
        self.iteration = 0
        self.undecided_evaluations = 0
        self.policy_update = PolicyUpdate(self.policy, config)
        self.policy_optimizer = self.policy_update.optimizer
        self.reward_update = RewardUpdate(reward, config)
        self.reward_optimizer = self.reward_update.optimizer
        self.objective = self.reward_update.objective
        check_dense_rewards(config, self.objective)
        self.replay = Replay(config.reward.replay, pad_token_id)
        self._resumed = False

    @torch.no_grad()
    def fit_reward_scale(self) -> None:
        """Standardise the reward's features on demonstrations and samples of their prompts; call it before `train`."""
        gathered = self._gather()
        inputs = [gathered.scored.inputs, self._score(gathered.experts).inputs]
        self.reward.fit_feature_scale(*map(stack, *inputs))

    # The loop

    def train(self) -> dict[str, float]:
        """Run to `config.iterations`, from the start or from where `resume` left off; returns the last evaluation."""
        if self.out is None:
            return self._run(None)
        with RunLog(self.out / "metrics.jsonl", resume_from=self.iteration if self._resumed else None) as log:
            return self._run(log)

    def _run(self, log: RunLog | None) -> dict[str, float]:
        config = self.config
        last: dict[str, float] = {}
        with Progress(config.iterations, "bilevel") as progress:
            if not self._resumed:
                self._warm_up(log)
                last = self._evaluate(log, progress)
                self._checkpoint()
            while self.iteration < config.iterations and not self.stopped_early:
                values = self._iterate()
                self.iteration += 1
                if log is not None:
                    log.write("train", self.iteration, values)
                progress.advance_to(self.iteration, {k: values[k] for k in ("reward/auc", "policy/kl") if k in values})
                done = self.iteration == config.iterations
                if done or self.iteration % config.eval_every == 0:
                    last = self._evaluate(log, progress)
                    self._consider_stopping(last, log, progress)
                if done or self.stopped_early or self.iteration % config.checkpoint_every == 0:
                    self._checkpoint()
        return last or self.evaluate()

    def _iterate(self) -> dict[str, float]:
        """`policy_steps` policy steps, then `reward_steps` reward steps; the mean of each metric over its steps."""
        experience: list[Experience] = []
        policy_rows, reward_rows = [], []
        for _ in range(self.config.policy_steps):
            gathered = self._gather()
            policy_rows.append(self.policy_step(gathered))
            experience.append(gathered)
        before = self._group_rewards(experience[-1]) if experience else None
        for step in range(self.config.reward_steps):
            gathered = experience[step] if step < len(experience) else self._gather()
            reward_rows.append(self.reward_step(gathered))
        if before is not None and reward_rows:
            # How much of what the policy was just told still holds.
            change = self._group_rewards(experience[-1]) - before
            drift = float(change.norm() / before.norm()) if float(before.norm()) > 0 else 0.0
            reward_rows = [{**row, "advantage_drift": drift} for row in reward_rows]
        return {**prefixed_means("policy", policy_rows), **prefixed_means("reward", reward_rows)}

    def _warm_up(self, log: RunLog | None) -> None:
        rows = [self.reward_step(self._gather()) for _ in range(self.config.reward_warmup_steps)]
        if rows and log is not None:
            log.write("warmup", 0, prefixed_means("reward", rows[-10:]))

    def _group_rewards(self, experience: Experience) -> Tensor:
        """Served rewards [B] less the mean of their prompt's: the reward's share of the advantages."""
        return group_advantages(self.reward.serve(*experience.scored.inputs), experience.samples.groups, kind="dr_grpo")

    @property
    def stopped_early(self) -> bool:
        """Whether `config.early_stop` has ended the run."""
        patience = self.config.early_stop.patience
        return 0 < patience <= self.undecided_evaluations

    def _consider_stopping(self, metrics: dict[str, float], log: RunLog | None, progress: Progress) -> None:
        """Count evaluations in a row in which the reward cannot tell demonstrations from samples."""
        options = self.config.early_stop
        if self.iteration < options.after:
            return
        undecided = abs(metrics["reward_auc"] - 0.5) <= options.band
        self.undecided_evaluations = self.undecided_evaluations + 1 if undecided else 0
        if self.stopped_early:
            shown = {"reward_auc": metrics["reward_auc"], "evaluations": self.undecided_evaluations}
            progress.note(f"stopped early at iteration {self.iteration}", shown)
            if log is not None:
                log.write("stop", self.iteration, shown)

    # Steps

    def draw_request(self) -> Request:
        """The next batch to sample: demonstrations, and the policy's prompts."""
        drawn = self.draws.draw(self.config.prompts_per_step)
        prompts = list(dict.fromkeys(tuple(row.prompt_ids) for row in drawn))
        params = replace(self.config.rollout, seed=derive_seed(self.config.seed, "rollout", self.rollout_count))
        self.rollout_count += 1
        return Request(drawn=drawn, prompts=prompts, params=params)

    def _gather(self) -> Experience:
        """Draw demonstrations and sample the policy on their prompts."""
        if isinstance(self.engine, Prefetch):
            request, samples = self.engine.take(self.draw_request)
        else:
            request = self.draw_request()
            samples = self.engine.generate(request.prompts, request.params)
        drawn = request.drawn
        groups = {tuple(prompt): i for i, prompt in enumerate(request.prompts)}
        experts = Sequences.from_token_lists(
            [list(row.prompt_ids) for row in drawn],
            [list(row.response_ids) for row in drawn],
            self.pad_token_id,
            [groups[tuple(row.prompt_ids)] for row in drawn],
        ).to(samples.input_ids.device)
        asked = {"expert_logprobs", "expert_tokens"} & self.objective.needs
        logprobs = self._token_logprobs(experts) if asked else None
        return Experience(
            experts=experts,
            samples=samples,
            scored=self._score(samples),
            expert_logprobs=None if logprobs is None else sequence_sum(logprobs, experts),
            expert_token_logprobs=logprobs,
        )

    def policy_step(self, experience: Experience) -> dict[str, float]:
        """One policy step on fresh rollouts: `epochs` x `minibatches` optimiser steps.

        The rewards are those of the reward model as it is now, whenever the rollouts were made.
        """
        samples = experience.samples
        served = self.reward.serve(*experience.scored.inputs, update=True, shape=self.objective.policy_reward)
        # Serving rescales the reward by 1 / scale; beta is rescaled with it, so that the optimum stays where it is.
        scale = self.reward.normalizer.scale
        if self.config.policy.dense_rewards:
            served = self._token_rewards(experience)
        metrics = self.policy_update.step(
            samples, served, experience.scored, beta=self.config.beta / scale, counter=self.rollout_count
        )
        self.engine.update_weights(None, self.policy_optimizer.step_count)
        return metrics

    def _token_rewards(self, experience: Experience) -> Tensor:
        """[B, S], what each token of the samples adds to the reward as it is served."""
        mask, normalizer = experience.samples.response_mask, self.reward.normalizer
        given = self.reward.token_rewards(*experience.scored.inputs)
        terms = given.above(float(normalizer.mean), mask)
        if given.kind == "mean":
            terms = terms / mask.sum(1, keepdim=True).clamp(min=1)
        return terms / normalizer.scale

    def reward_step(self, experience: Experience) -> dict[str, float]:
        """One optimiser step of the reward on demonstrations and samples of their prompts."""
        kept = self.replay.of(experience.samples)
        replayed = None if kept is None else Replayed(kept[0], self._score(kept[0]), kept[1])
        metrics = self.reward_update.step(experience, self._score(experience.experts), replayed)
        self.replay.add(experience.samples)
        return metrics

    @torch.no_grad()
    def _token_logprobs(self, sequences: Sequences) -> Tensor:
        """log pi [B, S] of the response tokens under the policy as it is."""
        self.policy.eval()
        size = self.config.policy.micro_batch_size
        parts = [sequences.select(slice(low, low + size)) for low in range(0, len(sequences), size)]
        return torch.cat([response_scores(self.policy, part).stats.logprob for part in parts])

    # Evaluation, checkpoints

    def rewards(self, sequences: Sequences) -> Tensor:
        """Raw learned reward of each sequence: [B], no gradient."""
        with torch.no_grad():
            return self.judge(sequences).rewards

    @torch.no_grad()
    def judge(self, sequences: Sequences) -> Judgement:
        """Raw learned rewards, and what they are made of where the reward model has named components."""
        inputs = self._score(sequences).inputs
        with evaluating(self.reward):
            return Judgement(rewards=self.reward(*inputs), components=self.reward.components(*inputs))

    def token_rewards(self, sequences: Sequences) -> TokenRewards:
        """Raw learned rewards of the tokens of each sequence; NotImplementedError where the model has none."""
        return self.reward.token_rewards(*self._score(sequences).inputs)

    def evaluate(self, on_judged: OnJudged | None = None) -> dict[str, float]:
        """Held-out metrics of the policy and the reward as they are (see evaluate_policy)."""
        return evaluate_policy(
            policy=self.policy,
            engine=self.engine,
            heldout=self.heldout,
            sampling=self.config.rollout,
            pad_token_id=self.pad_token_id,
            seed=derive_seed(self.config.seed, "evaluation", 0),
            reward=self.judge,
            reference=self.reference,
            sample_metrics=self._sample_metrics,
            on_judged=on_judged,
        )

    def _evaluate(self, log: RunLog | None, progress: Progress) -> dict[str, float]:
        metrics = self.evaluate(None if log is None else partial(self._record, log))
        if log is not None:
            log.write("eval", self.iteration, metrics)
            for alert in monitors.check(read_log(log.path), self.config.monitors):
                log.write("warning", self.iteration, asdict(alert))
                progress.warn(f"iteration {self.iteration}: {alert.seen} {alert.advice}")
        shown = {k: v for k, v in metrics.items() if not k.startswith("expert_") or k == "expert_token_logprob"}
        progress.note(f"iteration {self.iteration}", shown)
        return metrics

    def _record(self, log: RunLog, policy: tuple[Sequences, Judgement], experts: tuple[Sequences, Judgement]) -> None:
        """Keep what a person wants to read of an evaluation."""
        log.samples.append(
            evaluation_record(
                self.iteration,
                policy=policy,
                experts=experts,
                token_rewards=self.token_rewards if self.reward.has_token_rewards else None,
                decode=self._decode,
                level=float(self.reward.normalizer.mean),
                scale=self.reward.normalizer.scale,
            )
        )

    def _checkpoint(self) -> None:
        if self.out is not None:
            state.save(self, self.out / "checkpoints", self._extra_state)

    def resume(self) -> int:
        """Take everything from the newest checkpoint under `out`; returns its iteration.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another configuration.
        """
        if self.out is None:
            raise ValueError("out is None: a trainer without a folder has no checkpoint to resume from")
        state.load(self, self.out / "checkpoints")
        self._resumed = True
        return self.iteration
