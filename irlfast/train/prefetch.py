"""Sample the next batches while reward and policy train on this one: asynchrony of a bounded, fixed number of batches.

With `ahead` = 1, in the order of time,

    sampler:   | batch 1 under v0 | batch 2 under v0 | batch 3 under v1 | batch 4 under v2 | ...
    trainer:                      | train on 1 -> v1 | train on 2 -> v2 | train on 3 -> v3 | ...

Sampling, weight updates and evaluations go through one queue, in the order in which the trainer asks for them. So which
weights a batch is sampled under depends on the program alone, never on which side is faster: batch k is under the
weights from `ahead` policy steps before the ones it would have without. What is given up is a bias of that lag, which
the recorded log-probs of the sampler correct for (policy.tis_cap, policy.icepop_band).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from irlfast.data import TokenizedDemonstration
from irlfast.rollout import RolloutEngine, Rollouts, SamplingParams

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A batch to sample: the demonstrations drawn, their distinct prompts in order, and how to sample them."""

    drawn: Sequence[TokenizedDemonstration]
    prompts: Sequence[Sequence[int]]
    params: SamplingParams


class Prefetch:
    """A rollout engine around another one that keeps `ahead` batches under way.

    Args:
        engine: has weights of its own: an SGLang engine, or a TransformersEngine on a copy of the policy.
        policy: whose weights `update_weights(None, version)` takes.
        ahead: batches sampled before they are asked for, at least 1.

    `waited` are the seconds that the caller waited for batches so far.

    Raises:
        ValueError: the engine samples from the very module that is trained.
    """

    def __init__(self, engine: RolloutEngine, policy: nn.Module, ahead: int) -> None:
        if ahead < 1:
            raise ValueError(f"ahead must be at least 1, got {ahead}")
        shared = getattr(engine, "model", None)
        if shared is not None and any(a is b for a, b in zip(shared.parameters(), policy.parameters(), strict=False)):
            raise ValueError(
                "overlap samples while the policy trains, so the engine needs weights of its own: use --rollout.engine "
                "sglang, or a TransformersEngine on a copy of the policy"
            )
        self.engine = engine
        self.ahead = ahead
        self.waited = 0.0
        self._policy = policy
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="irlfast-prefetch")
        self._queue: deque[tuple[Request, Future[Rollouts]]] = deque()
        self._failure: BaseException | None = None

    def take(self, draw: Callable[[], Request]) -> tuple[Request, Rollouts]:
        """The oldest batch under way, with `draw` called for as many as have to be begun."""
        while len(self._queue) <= self.ahead:
            request = draw()
            self._queue.append((request, self._submit(self.engine.generate, request.prompts, request.params)))
        request, samples = self._queue.popleft()
        return request, self._result(samples)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, return_hidden_states: bool = False
    ) -> Rollouts:
        """As the engine's, after all that was asked for before."""
        return self._result(
            self._submit(self.engine.generate, prompts, params, return_hidden_states=return_hidden_states)
        )

    def update_weights(self, state_dict: Mapping[str, Tensor] | None, version: int) -> None:
        """Take the weights as they are now; they reach the engine after all that was asked for before.

        Raises:
            Exception: what an earlier update or batch failed with.
        """
        if self._failure is not None:
            raise self._failure
        snapshot = getattr(self.engine, "snapshot_weights", None)
        if snapshot is not None:
            self._submit(self.engine.push_weights, snapshot(state_dict, version))  # type: ignore[attr-defined]
            return
        source = self._policy.state_dict() if state_dict is None else state_dict
        self._submit(self.engine.update_weights, {k: v.detach().clone() for k, v in source.items()}, version)

    def close(self) -> None:
        """Wait for what is under way and close the engine."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.engine.close()

    # Checkpoints

    def save(self, path: Path) -> None:
        """Write the batches under way, once they have come, so that a resumed run trains on the very same."""
        batches = [self._result(samples) for _, samples in self._queue]
        torch.save([{f.name: getattr(batch, f.name) for f in fields(batch)} for batch in batches], path)

    def load(self, path: Path, draw: Callable[[], Request]) -> None:
        """Put back what `save` wrote; `draw` makes the requests of these batches again."""
        device = next(self._policy.parameters()).device
        for values in torch.load(path, weights_only=True, map_location=device):
            done: Future[Rollouts] = Future()
            done.set_result(Rollouts(**values))
            self._queue.append((draw(), done))

    @property
    def pending(self) -> int:
        """Batches drawn and not yet taken."""
        return len(self._queue)

    def _submit(self, call: Callable[..., T], *args: Any, **named: Any) -> Future[T]:
        return self._worker.submit(self._unless_failed, call, *args, **named)

    def _unless_failed(self, call: Callable[..., T], *args: Any, **named: Any) -> T:
        """After one failure nothing more is done: a batch must not be sampled under weights that did not arrive."""
        if self._failure is not None:
            raise self._failure
        try:
            return call(*args, **named)
        except BaseException as error:
            self._failure = error
            raise

    def _result(self, future: Future[T]) -> T:
        start = time.perf_counter()
        try:
            return future.result()
        finally:
            self.waited += time.perf_counter() - start
