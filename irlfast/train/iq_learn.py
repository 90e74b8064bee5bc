"""IQ-Learn fine-tuning of a language model from demonstrations alone: no reward network, no sampling while it trains.

    L = mean (V_t - q_t) + lambda_td mean (q_t - gamma V_{t+1})^2 [+ lambda_kl mean KL(pi || start)]

over the response tokens of a batch (`irlfast.losses.iq_learn`; arXiv 2409.01369). Each micro-batch's sum is divided by
the number of tokens of the whole batch, so that any split of a batch is the same step up to rounding. Every counter is
in optimiser steps. With `online_rate` above 0 the policy answers the batch's prompts too, and the square is partly
taken over its answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import irlfast
from irlfast.data import TokenizedDemonstration, digest
from irlfast.losses import iq_learn_loss, sampled_kl
from irlfast.rewards import TokenRewards
from irlfast.rewards.iq import IQReward, IQTokenRewards
from irlfast.rollout import RolloutEngine, Rollouts, SamplingParams, Sequences

from .checkpoint import latest_checkpoint, write_checkpoint
from .config import config_dict
from .iq_config import IQLearnConfig
from .iq_evaluation import (
    Batch,
    DecodeText,
    SampleEvaluation,
    TaskMetric,
    TokenMeans,
    evaluate_heldout,
    evaluate_samples,
)
from .log import JsonLines, Progress, RunLog
from .optim import Optimizer
from .samples import Decode, Judgement, evaluation_record
from .seeds import EndlessDraws, derive_seed
from .state import config_differences, save_policy

# What a resumed run may change: how often it looks, not what a step does.
_FREE = (
    "eval_every",
    "eval_num_samples",
    "eval_samples_per_prompt",
    "eval_temperatures",
    "local_eval_batch_size",
    "checkpoint_every",
    "keep_checkpoints",
)

OnRow = Callable[[str, int, Mapping[str, Any]], None]


class IQLearnTrainer:
    """Fine-tunes a causal language model by IQ-Learn, evaluates, logs, checkpoints and resumes.

    Args:
        policy: causal LM as in `causal_lm.causal_lm_token_stats`; trained in place.
        demonstrations: rows with prompt_ids and response_ids; prompts are never trained on.
        config: see IQLearnConfig.
        pad_token_id: fills the right of shorter rows.
        heldout: rows that evaluations look at; without them nothing is evaluated.
        engine: samples from the policy; needed by online_rate above 0 and eval_num_samples above 0.
        reference: frozen copy of the start; needed by use_kl, and measured against where given.
        out: folder for metrics.jsonl, samples.jsonl and checkpoints/; None keeps nothing on disk.
        decode, task_metric: see `iq_evaluation.evaluate_samples`.
        pieces: token ids -> as many pieces of text, for samples.jsonl; None writes the ids.
        extra_state: writes further files of every checkpoint (a tokenizer's), given the folder of its policy.
        on_row: called with kind ("train", "eval"), step and values of each row of the log.

    Raises:
        ValueError: no demonstrations, or an engine or reference that is needed and missing.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        demonstrations: Sequence[TokenizedDemonstration],
        config: IQLearnConfig,
        pad_token_id: int,
        heldout: Sequence[TokenizedDemonstration] = (),
        engine: RolloutEngine | None = None,
        reference: nn.Module | None = None,
        out: Path | None = None,
        decode: DecodeText | None = None,
        task_metric: TaskMetric | None = None,
        pieces: Decode | None = None,
        extra_state: Callable[[Path], None] | None = None,
        on_row: OnRow | None = None,
    ) -> None:
        if reference is policy:
            raise ValueError("reference is the policy itself: pass a frozen copy, or the KL is 0 whatever is learned")
        if config.use_kl and reference is None:
            raise ValueError("use_kl needs a reference model: pass reference=, a frozen copy of the start")
        samples_evaluated = bool(heldout) and config.eval_num_samples > 0
        if engine is None and (config.online_rate > 0 or samples_evaluated):
            need = f"online_rate = {config.online_rate}" if config.online_rate else "eval_num_samples above 0"
            raise ValueError(f"{need} needs an engine that samples from the policy: pass engine=")
        self.policy = policy
        self.config = config
        self.pad_token_id = pad_token_id
        self.heldout = list(heldout)
        self.engine = engine
        self.reference = None if reference is None else reference.requires_grad_(False).eval()
        self.out = out
        self.step_count = 0
        self.total_steps = config.total_steps(len(demonstrations))
        self.data_digest = digest([*demonstrations, *self.heldout])
        self._draws = EndlessDraws(list(demonstrations), config.seed, "iq demonstrations")
        self._optimizer = Optimizer(policy, config.optimizer_config(), self.total_steps)
        self._device = next(policy.parameters()).device
        self._decode, self._task_metric, self._pieces = decode, task_metric, pieces
        self._extra_state, self._on_row = extra_state, on_row
        self._resumed = False
        self._samples: JsonLines | None = None
        if config.gradient_checkpointing:
            _checkpoint_activations(policy)

    # The loop

    def train(self) -> dict[str, Any]:
        """Run to the last step, from the start or from where `resume` left off; returns the last evaluation."""
        if self.out is None:
            return self._run(None)
        begin = self.step_count if self._resumed else None
        with (
            RunLog(self.out / "metrics.jsonl", resume_from=begin) as log,
            JsonLines(self.out / "samples.jsonl", resume_from=begin) as samples,
        ):
            self._samples = samples
            return self._run(log)

    def _run(self, log: RunLog | None) -> dict[str, Any]:
        config = self.config
        last: dict[str, Any] = {}
        with Progress(self.total_steps, "iq") as progress:
            if not self._resumed:
                last = self._evaluate(log, progress)
                self._checkpoint()
            while self.step_count < self.total_steps:
                values = self.step()
                self._record(log, "train", values)
                progress.advance_to(self.step_count, {k: values[k] for k in ("nll", "td_error")})
                done = self.step_count == self.total_steps
                if done or self.step_count % config.eval_every == 0:
                    last = self._evaluate(log, progress)
                if done or self.step_count % config.checkpoint_every == 0:
                    self._checkpoint()
        return last or self.evaluate()

    def step(self) -> dict[str, float]:
        """One optimiser step on the next batch of demonstrations; returns its metrics, means over tokens."""
        config = self.config
        rows = self._draws.draw(config.batch_size)
        irl = config.use_irl and self.step_count >= config.mle_steps_before_irl
        lambda_td = config.lambda_td if irl else 0.0
        answers = self._answers(rows) if irl and config.online_rate > 0 else None
        self.policy.train()
        self._optimizer.zero_grad()
        metrics = self._demonstrations_backward(rows, lambda_td * (1 - config.online_rate))
        if answers is not None:
            metrics |= self._answers_backward(answers, lambda_td * config.online_rate)
        norm, lr = self._optimizer.step()
        self.step_count += 1
        if self.engine is not None:
            self.engine.update_weights(None, self.step_count)
        return {**metrics, "grad_norm": norm, "lr": lr}

    def _demonstrations_backward(self, rows: Sequence[TokenizedDemonstration], lambda_td: float) -> dict[str, float]:
        """Accumulate the gradient of the demonstrations' part of the loss."""
        config = self.config
        tokens = sum(len(row.response_ids) for row in rows)
        exact_kl = config.use_kl and config.kl == "exact"
        means, total = TokenMeans(), 0.0
        for low in range(0, len(rows), config.local_micro_batch_size):
            micro = rows[low : low + config.local_micro_batch_size]
            batch = Batch.of_demonstrations(micro, self.pad_token_id, self._device)
            with self._autocast():
                stats = batch.statistics(self.policy, reference=self.reference if exact_kl else None, **self._soft)
            result = iq_learn_loss(
                stats.q,
                stats.lse,
                stats.mask,
                ended=batch.ended,
                gamma=config.gamma,
                lambda_td=lambda_td,
                logprob=stats.logprob,
                kl=stats.kl,
                lambda_kl=config.lambda_kl if exact_kl else 0.0,
                denominator=tokens,
                **self._soft,
            )
            result.loss.backward()
            total += float(result.loss.detach())
            count = sum(len(row.response_ids) for row in micro)
            means.add({name: float(value) for name, value in result.metrics.items()}, count)
        return {"loss": total, **means.result()}

    def _answers(self, rows: Sequence[TokenizedDemonstration]) -> list[Batch]:
        """The policy's own answers to the batch's prompts, in micro-batches."""
        config = self.config
        assert self.engine is not None
        params = SamplingParams(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            seed=derive_seed(config.seed, "iq answers", self.step_count),
        )
        rollouts = self.engine.generate([list(row.prompt_ids) for row in rows], params)
        size = config.local_micro_batch_size
        return [
            Batch.of_rollouts(rollouts.select(slice(low, low + size)).trim()) for low in range(0, len(rollouts), size)
        ]

    def _answers_backward(self, answers: Sequence[Batch], lambda_td: float) -> dict[str, float]:
        """Accumulate the gradient of the answers' part: their square and, where asked for, their divergence."""
        config = self.config
        tokens = sum(int(batch.sequences.response_mask.sum()) for batch in answers)
        means, total = TokenMeans(), 0.0
        for batch in answers:
            with self._autocast():
                stats = batch.statistics(self.policy, reference=self.reference if config.use_kl else None, **self._soft)
            kl = stats.kl
            if config.use_kl and config.kl == "sampled":
                assert stats.ref_logprob is not None
                kl = sampled_kl(stats.logprob, stats.ref_logprob)
            result = iq_learn_loss(
                stats.q,
                stats.lse,
                stats.mask,
                ended=batch.ended,
                gamma=config.gamma,
                lambda_td=lambda_td,
                likelihood=0.0,
                logprob=stats.logprob,
                kl=kl,
                lambda_kl=config.lambda_kl if config.use_kl else 0.0,
                denominator=tokens,
                **self._soft,
            )
            result.loss.backward()
            total += float(result.loss.detach())
            count = int(batch.sequences.response_mask.sum())
            means.add({f"answer_{name}": float(value) for name, value in result.metrics.items()}, count)
        return {"answer_loss": total, **means.result()}

    @property
    def _soft(self) -> dict[str, Any]:
        return {"temperature": self.config.temperature, "truncated": self.config.truncated}

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16) if self.config.bf16 else nullcontext()

    # Evaluation, log, checkpoints

    def reward(self) -> IQReward:
        """The reward that the policy holds now; relative to the reference where there is one."""
        return IQReward(self.policy, gamma=self.config.gamma, reference=self.reference, **self._soft)

    def evaluate(self, record: JsonLines | None = None) -> dict[str, Any]:
        """Metrics of held-out rows ("heldout_...") and of sampled answers ("...@temperature"); {} without such rows."""
        config = self.config
        if not self.heldout:
            return {}
        with self._autocast():
            heldout = evaluate_heldout(
                self.policy,
                self.heldout,
                pad_token_id=self.pad_token_id,
                batch_size=config.local_eval_batch_size,
                reference=self.reference,
                gamma=config.gamma,
                **self._soft,
            )
            found: dict[str, Any] = {f"heldout_{name}": value for name, value in heldout.items()}
            for temperature in config.eval_temperatures if config.eval_num_samples else ():
                answers = self._evaluate_samples(temperature)
                found |= {f"{name}@{temperature:g}": value for name, value in answers.metrics.items()}
                if record is not None and temperature == config.eval_temperatures[0]:
                    record.append(self._samples_record(answers))
        return found

    def _samples_record(self, answers: SampleEvaluation) -> dict[str, Any]:
        """The row of samples.jsonl: answers beside demonstrations, with the rewards of their tokens."""
        rows = self.heldout[: self.config.eval_num_samples]
        experts = Batch.of_demonstrations(rows, self.pad_token_id, self._device)

        def rewards(part: Sequences) -> IQTokenRewards:
            ended = experts.ended[part.groups]
            if isinstance(part, Rollouts):
                ended = Batch.of_rollouts(part).ended
            return self.reward()(part.input_ids, part.attention_mask, part.response_mask, ended)

        expert_returns = rewards(experts.sequences).returns
        return evaluation_record(
            self.step_count,
            policy=(answers.samples, Judgement(rewards=torch.tensor(answers.returns))),
            experts=(experts.sequences, Judgement(rewards=expert_returns)),
            token_rewards=lambda part: TokenRewards(rewards(part).rewards, "sum"),
            decode=self._pieces,
            level=float(expert_returns.mean()),
            scale=float(expert_returns.std(correction=0)),
        )

    def _evaluate_samples(self, temperature: float) -> SampleEvaluation:
        config = self.config
        assert self.engine is not None
        self.policy.eval()
        return evaluate_samples(
            self.engine,
            self.reward(),
            self.heldout[: config.eval_num_samples],
            SamplingParams(
                max_new_tokens=config.response_length,
                temperature=temperature,
                n=config.eval_samples_per_prompt,
                seed=derive_seed(config.seed, "iq evaluation", 0),
            ),
            decode=self._decode,
            task_metric=self._task_metric,
            batch_size=config.local_eval_batch_size,
        )

    def _evaluate(self, log: RunLog | None, progress: Progress) -> dict[str, Any]:
        values = self.evaluate(self._samples)
        if values:
            self._record(log, "eval", values)
            progress.note(f"step {self.step_count}", {k: v for k, v in values.items() if isinstance(v, float)})
        return values

    def _record(self, log: RunLog | None, kind: str, values: Mapping[str, Any]) -> None:
        if log is not None:
            log.write(kind, self.step_count, {k: float("nan") if v is None else v for k, v in values.items()})
        if self._on_row is not None:
            self._on_row(kind, self.step_count, values)

    def _checkpoint(self) -> None:
        if self.out is None:
            return

        def write(path: Path) -> None:
            save_policy(self.policy, path / "policy")
            if self._extra_state is not None:
                self._extra_state(path / "policy")
            tensors = {"optimizer": self._optimizer.state_dict(), "torch_rng": torch.get_rng_state()}
            torch.save(tensors, path / "optimizer.pt")
            position = {
                "irlfast": irlfast.__version__,
                "trainer": "iq_learn",
                "step": self.step_count,
                "data_digest": self.data_digest,
                "config": config_dict(self.config),
            }
            (path / "state.json").write_text(json.dumps(position, indent=1) + "\n", encoding="utf-8")

        write_checkpoint(self.out / "checkpoints", self.step_count, write, keep=self.config.keep_checkpoints)

    def resume(self) -> int:
        """Restore the newest checkpoint below `out`; training then goes on with the same numbers. Returns its step.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it was made on other data, or with a configuration that differs in what a step does.
        """
        from safetensors.torch import load_model

        if self.out is None:
            raise ValueError("out is None: nothing was kept on disk to resume from")
        path = latest_checkpoint(self.out / "checkpoints")
        if path is None:
            raise FileNotFoundError(f"no checkpoint in {self.out / 'checkpoints'}: nothing to resume")
        position = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if position.get("trainer") != "iq_learn":
            raise ValueError(f"{path} is no checkpoint of IQ-Learn: resume it with the trainer that wrote it")
        given = json.loads(json.dumps(config_dict(self.config)))
        changed = [
            f"{name} was {was!r}, is {now!r}"
            for name, was, now in config_differences(position["config"], given)
            if name not in _FREE
        ]
        if changed:
            raise ValueError(
                f"{path} was made with another configuration: {'; '.join(changed)}. Resume with the same one."
            )
        if position["data_digest"] != self.data_digest:
            raise ValueError(f"{path} was made on other demonstrations or held-out rows: resume with the same data")
        load_model(self.policy, path / "policy" / "model.safetensors")
        tensors = torch.load(path / "optimizer.pt", weights_only=True)
        self._optimizer.load_state_dict(tensors["optimizer"])
        torch.set_rng_state(tensors["torch_rng"])
        self.step_count = position["step"]
        self._draws.position = self.step_count * self.config.batch_size
        self._resumed = True
        return self.step_count


def _checkpoint_activations(policy: nn.Module) -> None:
    # transformers 5.24 renamed it.
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        enable = getattr(policy, f"{name}_enable", None)
        if enable is not None:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            return
    raise ValueError(f"gradient_checkpointing: {type(policy).__name__} has no gradient_checkpointing_enable()")
