"""Rollouts from SGLang servers: sampled over HTTP, with the policy's weights sent to them.

`SGLangServerEngine` attaches to servers that run already. `SGLangEngine` starts one on this machine, as a process of
its own on the loopback interface, because a fault in SGLang's in-process engine ends the process that it is in.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
import warnings
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from irlfast.rollout.base import Rollouts, SamplingParams, Sequences

from .errors import SGLangError, SGLangRefused, SGLangUnreachable
from .loop_thread import LoopThread
from .options import SGLangOptions
from .routing import spread
from .sampled import Response, needs_scoring, refuse_raw_logprobs, request, response, truncates
from .server import SGLangServer
from .weights import ExpectedWeights, WeightSnapshot, folder_shapes, policy_tensors, probe_logprobs, save_folder

if TYPE_CHECKING:
    from .client import SGLangClient
    from .fleet import Fleet, Member

T = TypeVar("T")
Pooling = Literal["all", "last", "mean"]

# Requests under way at once; more wait here rather than in the servers' queues, where their time would run.
_MAX_REQUESTS = 256
# SGLang names the length from which on it refuses prompts (context - 6), and shortens responses, saying nothing, so
# that a row ends so many tokens above it (at context - 2).
_ROW_ABOVE_INPUT = 4
_PROBE_TOKENS = 16


class SGLangServerEngine:
    """Samples from one or several servers that run already.

    Results are those of TransformersEngine, but for two things: `params.seed` has no influence, since not every backend
    of SGLang honours seeds; and with top-k and top-p together SGLang's top-p speaks of all tokens, not of those that
    top-k left. Log-probs are exact for what was sampled all the same.

    Everything that would end or confuse a server is refused here, before it is sent: ids outside the vocabulary, rows
    beyond the context, weights whose names or shapes are not the served model's.

    Args:
        urls: http://host:port of each server; prompts that begin alike go to the same one.
        eos_token_id: the id, or the ids, that end a response.
        pad_token_id: fills the right of shorter rows.
        policy: the model that `update_weights(None, version)` sends; a transformers causal LM, also with LoRA adapters
            or sharded by FSDP2. Without one, weights come as a state dict or a folder.
        config: the served model's transformers configuration; by default the policy's.
        device: where rollouts are put; by default the policy's device, or the CPU.
        weights_folder: send weights through this folder, which the servers can read, and not over HTTP.
        options: timeouts, retries and the check after an update; what starts a server is not read here.

    Raises:
        ValueError: no policy and no configuration, or settings out of their range.
        SGLangError: a server that does not answer, or serves another kind of model.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        policy: nn.Module | None = None,
        config: Any = None,
        device: torch.device | str | None = None,
        weights_folder: Path | None = None,
        options: SGLangOptions | None = None,
    ) -> None:
        if not urls:
            raise ValueError("urls is empty: give the address of at least one server")
        config = config if config is not None else getattr(policy, "config", None)
        if config is None:
            raise ValueError("neither policy nor config: without one of them ids and weights cannot be checked")
        text_config = config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.max_input_length = int(text_config.max_position_embeddings) - 6
        self.eos_token_ids = (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)
        self.pad_token_id = pad_token_id
        if not self.eos_token_ids:
            raise ValueError("eos_token_id is empty: give at least one id")
        for name, token in (*(("eos_token_id", t) for t in self.eos_token_ids), ("pad_token_id", pad_token_id)):
            if token is None or not 0 <= token < self.vocab_size:
                raise ValueError(f"{name} = {token} is outside the vocabulary [0, {self.vocab_size})")
        self.policy = policy
        self.options = options or SGLangOptions()
        parameter = None if policy is None else next(policy.parameters())
        self.device = torch.device(device or (parameter.device if parameter is not None else "cpu"))
        tolerance = self.options.check_tolerance
        if tolerance is None:
            tolerance = 1e-3 if parameter is None or parameter.dtype == torch.float32 else 0.05
        self.version = 0
        self._config = config
        self._expected = ExpectedWeights(config)
        self._weights_folder = weights_folder
        # Names of weights tell this engine's from those of any other, and from a server's own after a restart.
        self._run = uuid.uuid4().hex[:8]
        self._versions: dict[str, int] = {}
        self._unmasked_said = False
        self._loop = LoopThread("irlfast-sglang")
        self._closed = False
        try:
            self._fleet: Fleet = self._loop.run(self._connect(urls, tolerance))
        except BaseException:
            self._stop_servers()
            self._loop.close()
            raise

    # What a subclass that starts its own server fills in
    _server: SGLangServer | None = None

    # The engine protocol

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, return_hidden_states: bool = False
    ) -> Rollouts:
        """Sample `params.n` responses to each prompt; may be called while another thread updates the weights.

        A request whose connection drops or that times out is repeated, at a server that was brought back and holds the
        right weights or at another one; responses that have come are kept.

        Args:
            prompts: token ids, at least one prompt, each with at least one token.
            params: how to sample; `seed` has no influence.
            return_hidden_states: also give the last layer's states at every token.

        Returns:
            Rollouts; row i answers prompt i // n. `versions` has the version of the weights at each response token.

        Raises:
            ValueError: a prompt that is empty, too long or has an id outside the vocabulary; nothing was sent.
            SGLangError: no server could answer. No part of the batch is returned then.
        """
        token_lists = [list(prompt) for prompt in prompts]
        scored = return_hidden_states or needs_scoring(params)
        self._check_prompts(token_lists, params, scored)
        responses = self._wait(self._generate(token_lists, params, scored, return_hidden_states))
        return self._lay_out(responses, params)

    def hidden_states(self, sequences: Sequences, *, pooling: Pooling = "all") -> Tensor:
        """The last layer's states after the final norm, as the servers compute them.

        Args:
            sequences: prompts and responses, or anything laid out so.
            pooling: "all": [B, S, H] at every token, 0 on padding; "mean": [B, H], their mean over the response;
                "last": [B, H] at each row's last token, the only one whose state travels where the server has the row
                in its cache.

        Raises:
            ValueError: no sequences, an id outside the vocabulary, or a row beyond the context.
            SGLangRefused: the server was not started with --enable-return-hidden-states.
        """
        rows = [ids[real].tolist() for ids, real in zip(sequences.input_ids, sequences.attention_mask, strict=True)]
        self._check_prompts(rows, SamplingParams(max_new_tokens=1), True)
        states = self._wait(self._states_of(rows, whole=pooling != "last"))
        if pooling == "last":
            return torch.stack([row[-1] for row in states]).to(self.device)
        laid_out = _stack(states, sequences.input_ids.shape[1]).to(self.device)
        if pooling == "all":
            return laid_out
        mask = sequences.response_mask.to(self.device)[..., None]
        return (laid_out * mask).sum(1) / mask.sum(1).clamp(min=1)

    def update_weights(self, state_dict: Mapping[str, Tensor] | None, version: int) -> None:
        """Send the weights of `state_dict`, or of the policy if it is None, to all servers, as `version`.

        Generation under way is paused and goes on under the new weights. Where torch.distributed runs with several
        ranks, all of them call this; a sharded policy is gathered and the first rank sends.

        Raises:
            ValueError: weights that do not fit the served model, or are not finite; nothing was sent.
            SGLangError: a server refused them, or scores a fixed prompt otherwise than the policy afterwards.
        """
        self.push_weights(self.snapshot_weights(state_dict, version))

    def snapshot_weights(self, state_dict: Mapping[str, Tensor] | None, version: int) -> WeightSnapshot:
        """The weights as they are now, checked and copied to host memory, for `push_weights` in any thread later on."""
        self._require_open()
        probe: tuple[int, ...] = ()
        expected: Tensor | None = None
        if state_dict is not None:
            tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state_dict.items()}
        elif self.policy is not None:
            tensors = dict(policy_tensors(self.policy))
            probe = tuple((1 + 97 * i) % self.vocab_size for i in range(min(_PROBE_TOKENS, self.max_input_length - 1)))
            expected = probe_logprobs(self.policy, probe)
        else:
            raise ValueError(
                "state_dict is None and there is no policy: make the engine with policy=, or give a state dict"
            )
        self._expected.check({name: tuple(value.shape) for name, value in tensors.items()})
        return WeightSnapshot(tensors=tensors, version=version, probe=probe, probe_logprobs=expected)

    def push_weights(self, snapshot: WeightSnapshot) -> None:
        """Send a snapshot to all servers; see `update_weights`."""
        self._require_open()
        self._send(snapshot, folder=None)

    def update_weights_from_disk(self, folder: Path | str, version: int) -> None:
        """Let all servers load the *.safetensors of `folder`, a path that is the same to them.

        Raises:
            FileNotFoundError, ValueError: no weights there, or not the served model's; nothing was sent.
            SGLangError: a server refused them.
        """
        self._require_open()
        path = Path(folder).resolve()
        self._expected.check(folder_shapes(path))
        self._send(WeightSnapshot(tensors={}, version=version), folder=path)

    def close(self) -> None:
        """Let go of the servers, and stop one that was started here."""
        if self._closed:
            return
        self._closed = True
        try:
            self._loop.run(_close_all([member.client for member in self._fleet.members]))
        finally:
            self._stop_servers()
            self._loop.close()

    @property
    def restarts(self) -> int:
        """How many times a server was started again."""
        return self._fleet.restarts

    # Servers

    async def _connect(self, urls: Sequence[str], tolerance: float) -> Fleet:
        try:
            from .client import SGLangClient
            from .fleet import Fleet, Member
        except ImportError as error:
            raise ImportError("SGLang engines need aiohttp and pydantic: pip install 'irlfast[train]'") from error
        options = self.options
        clients = [SGLangClient(url, request_timeout=options.request_timeout) for url in urls]
        members = [Member(client, self._server) for client in clients]
        try:
            await all_of(self._meet(member) for member in members)
        except BaseException:
            await _close_all(clients)
            raise
        return Fleet(
            members,
            reconnect_timeout=options.start_timeout,
            request_timeout=options.request_timeout,
            tolerance=tolerance,
        )

    async def _meet(self, member: Member) -> None:
        if member.server is not None:
            await member.server.start(member.client)
        info = await member.client.model_info()
        if info.model_type not in (None, self._config.model_type):
            raise SGLangRefused(
                f"{member.url} serves a {info.model_type} model ({info.model_path}); the policy is a "
                f"{self._config.model_type}"
            )
        told = await member.client.server_info()
        member.tp_size = told.tp_size
        self.max_input_length = min(self.max_input_length, told.max_req_input_len or self.max_input_length)

    def _stop_servers(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _send(self, snapshot: WeightSnapshot, folder: Path | None) -> None:
        """Push on the first rank, and let every rank know under which name, or that it failed."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        shared: list[str | None] = [f"{self._run}-{snapshot.version}", None]
        failure: Exception | None = None
        if not distributed or torch.distributed.get_rank() == 0:
            try:
                self._push(f"{self._run}-{snapshot.version}", snapshot, folder)
            except Exception as error:
                if not distributed:
                    raise
                failure, shared[1] = error, str(error)
        if distributed:
            torch.distributed.broadcast_object_list(shared, src=0)
            if failure is not None:
                raise failure
            name, reason = shared
            if reason is not None or name is None:
                raise SGLangError(f"the first rank could not update the servers: {reason}")
            self._know(name, snapshot, folder)
        self.version = snapshot.version

    def _push(self, name: str, snapshot: WeightSnapshot, folder: Path | None) -> None:
        root = self._weights_folder
        if folder is None and root is not None:
            folder = (root / name).resolve()
            save_folder(snapshot, self._config, folder)
        self._know(name, snapshot, folder)
        self._wait(self._fleet.push())
        if root is not None:
            # What is served stays: a server that is started again loads it.
            for old in root.glob(f"{self._run}-*"):
                if old.resolve() != folder:
                    shutil.rmtree(old)

    def _know(self, name: str, snapshot: WeightSnapshot, folder: Path | None) -> None:
        """From now on servers have to hold these weights, and replies under their name are taken."""
        from .fleet import Weights

        self._versions[name] = snapshot.version
        self._fleet.weights = Weights(name=name, snapshot=snapshot, folder=folder)

    # Sampling

    async def _generate(
        self, prompts: list[list[int]], params: SamplingParams, scored: bool, hidden: bool
    ) -> list[Response]:
        slots = asyncio.Semaphore(_MAX_REQUESTS)
        members = self._homes(prompts)
        sampled = await all_of(
            self._sample(prompt, member, params, slots, hidden=hidden, scored=scored)
            for prompt, member in zip(prompts, members, strict=True)
        )
        rows = [row for part in sampled for row in part]
        if needs_scoring(params):
            refuse_raw_logprobs(rows)
        return rows

    def _homes(self, prompts: Sequence[Sequence[int]]) -> list[Member]:
        members = {member.url: member for member in self._fleet.alive()}
        return [members[url] for url in spread(prompts, list(members), prefix_tokens=self.options.prefix_tokens)]

    async def _sample(
        self,
        prompt: list[int],
        home: Member,
        params: SamplingParams,
        slots: asyncio.Semaphore,
        hidden: bool,
        scored: bool,
    ) -> list[Response]:
        body = request(prompt, params, eos=self.eos_token_ids, vocab_size=self.vocab_size)

        async def attempt(member: Member) -> list[Response]:
            async with slots:
                replies = await member.client.generate(body)
                if len(replies) != params.n:
                    raise SGLangRefused(f"{member.url} gave {len(replies)} responses, asked for {params.n}")
                rows = [response(prompt, reply, params, eos=self.eos_token_ids) for reply in replies]
                self._note_missing_mask(replies[0].meta_info, params)
                self._check_versions(member, rows)
                if scored:
                    for row in rows:
                        await self._score(member, row, hidden)
                return rows

        return await self._with_repairs(attempt, prompt, home)

    async def _score(self, member: Member, row: Response, hidden: bool) -> None:
        """Fill in the log-probs at temperature 1, and the hidden states, under the weights that sampled the row."""
        from .fleet import score

        ids, count = row.prompt + row.ids, len(row.ids)
        if hidden:
            read = await self._read(member, ids, whole=True)
            row.hidden, row.scored, weights = read.states, read.logprobs[-count:], read.weights
        else:
            row.scored, weights = await score(member.client, ids, count)
        if self._versions and {weights} != set(row.versions):
            raise SGLangUnreachable(
                f"{member.url} took new weights between sampling a response and scoring it: sampling it again"
            )

    async def _read(self, member: Member, ids: list[int], *, whole: bool) -> _Read:
        """Hidden states of a row; with `whole`, of every token, and every token's log-prob but the first's."""
        from .fleet import scored_tokens

        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        body: dict[str, Any] = {"input_ids": ids, "sampling_params": sampling, "return_hidden_states": True}
        if whole:  # asked for log-probs from the start on, the server does not leave out what its cache holds
            body |= {"return_logprob": True, "logprob_start_len": 0}
        meta = (await member.client.generate(body))[0].meta_info
        if not meta.hidden_states or not isinstance(meta.hidden_states[0][0], list):
            raise SGLangRefused(f"{member.url} returned no hidden states: start it with --enable-return-hidden-states")
        states: Any = meta.hidden_states[0]
        if whole and len(states) != len(ids):
            raise SGLangRefused(
                f"{member.url} returned {len(states)} hidden states for {len(ids)} tokens: it drops all but those "
                "of the last chunk where it reads a prompt in several; start it with --chunked-prefill-size -1"
            )
        logprobs = scored_tokens(member.url, meta.input_token_logprobs[1:], ids[1:]) if whole else []
        return _Read(states, logprobs, meta.weight_version)

    async def _states_of(self, rows: list[list[int]], *, whole: bool) -> list[Tensor]:
        slots = asyncio.Semaphore(_MAX_REQUESTS)

        async def one(row: list[int], home: Member) -> Tensor:
            async def attempt(member: Member) -> Tensor:
                async with slots:
                    return torch.tensor((await self._read(member, row, whole=whole)).states)

            return await self._with_repairs(attempt, row, home)

        return await all_of(one(row, home) for row, home in zip(rows, self._homes(rows), strict=True))

    async def _with_repairs(
        self, attempt: Callable[[Member], Awaitable[T]], prompt: Sequence[int], member: Member
    ) -> T:
        """`attempt(member)`, repeated after repairs, at the prompt's next server where the first is given up."""
        for count in range(self.options.retries + 1):
            if member.lost is not None:
                member = self._homes([prompt])[0]
            seen = member.repairs
            try:
                return await attempt(member)
            except SGLangUnreachable as error:
                if count == self.options.retries:
                    raise SGLangUnreachable(
                        f"{error} (tried {count + 1} times). Nothing sampled was used in part; resume the run from its "
                        "last checkpoint"
                    ) from error
                await self._fleet.repair(member, seen, error)
        raise AssertionError("unreachable")

    def _check_versions(self, member: Member, rows: Sequence[Response]) -> None:
        """A server that was started anew serves its first weights again, under their name."""
        if not self._versions:
            return
        for row in rows:
            for name in row.versions:
                if name not in self._versions:
                    raise SGLangUnreachable(
                        f"{member.url} sampled under the weights {name!r}, which were not sent from here"
                    )

    def _note_missing_mask(self, meta: Any, params: SamplingParams) -> None:
        if self._unmasked_said or meta.output_token_sampling_logprobs is not None:
            return
        if truncates(params, self.vocab_size):
            self._unmasked_said = True
            warnings.warn(
                "this SGLang gives no log-probs renormalised after top-k and top-p: sampler_logprobs are those before "
                "them, too low by the log of the mass that was kept. Use top_p = 1 and top_k = 0, or a newer SGLang",
                stacklevel=2,
            )

    def _lay_out(self, responses: Sequence[Response], params: SamplingParams) -> Rollouts:
        base = Sequences.from_token_lists(
            [row.prompt for row in responses],
            [row.ids for row in responses],
            self.pad_token_id,
            [i // params.n for i in range(len(responses))],
        )

        def place(values: list[list[float]]) -> Tensor:
            flat = torch.tensor([value for row in values for value in row])
            return torch.zeros(base.input_ids.shape).masked_scatter(base.response_mask, flat)

        versions = torch.tensor([self._versions.get(name, self.version) for row in responses for name in row.versions])
        width = base.input_ids.shape[1]
        hidden = None
        if responses[0].hidden is not None:
            hidden = _stack([torch.tensor(row.hidden) for row in responses], width)
        rollouts = Rollouts(
            input_ids=base.input_ids,
            attention_mask=base.attention_mask,
            response_mask=base.response_mask,
            groups=base.groups,
            sampler_logprobs=place([row.sampler for row in responses]),
            model_logprobs=place([row.model if row.scored is None else row.scored for row in responses]),
            finish_reasons=tuple(row.finish for row in responses),
            hidden_states=hidden,
            versions=torch.zeros_like(base.input_ids).masked_scatter(base.response_mask, versions),
        )
        if not bool(rollouts.model_logprobs.isfinite().all()):
            raise FloatingPointError("a server gave log-probs that are not finite: check the policy's weights")
        return rollouts.to(self.device)

    def _check_prompts(self, prompts: list[list[int]], params: SamplingParams, scored: bool) -> None:
        if not prompts:
            raise ValueError("prompts is empty: give at least one prompt")
        longest_prompt, longest_row = self.max_input_length - 1, self.max_input_length + _ROW_ABOVE_INPUT
        if scored:  # a row is then a prompt itself
            longest_row = longest_prompt
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompts[{i}] is empty: a prompt needs at least one token, e.g. the BOS id")
            for position, token in enumerate(prompt):
                if not (isinstance(token, int) and 0 <= token < self.vocab_size):
                    raise ValueError(
                        f"prompts[{i}][{position}] = {token} is outside the vocabulary [0, {self.vocab_size}); "
                        "nothing was "
                        "sent, because it would end the server"
                    )
            if len(prompt) > longest_prompt or len(prompt) + params.max_new_tokens > longest_row:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens = {params.max_new_tokens} that "
                    "exceeds "
                    f"what the server takes: {longest_prompt} tokens in a prompt and {longest_row} in a row (its "
                    "context "
                    "less what it keeps back, and less again where hidden states or another temperature than 1 are "
                    "asked "
                    "for). Shorten the prompt or lower max_new_tokens"
                )

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            coroutine.close()
            self._require_open()
        return self._loop.run(coroutine)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine was closed; make a new one")


class SGLangEngine(SGLangServerEngine):
    """Samples from an SGLang of its own: a child process on this machine, started, watched, restarted and stopped.

    A server that ends is started again and given the weights it had. It ends with this process, however that ends.

    Args:
        model_path: the model to serve, a folder or a hub name: the policy's start.
        options: how to start the server, timeouts and retries.
        server_device: "cuda" or "cpu"; by default "cuda" where there is one.
        dtype: SGLang's dtype; by default the policy's.
        eos_token_id, pad_token_id, policy and all else: as for SGLangServerEngine.

    Raises:
        SGLangError: the server did not start, with the end of its log.
    """

    def __init__(
        self,
        model_path: str,
        *,
        eos_token_id: int | Sequence[int],
        pad_token_id: int,
        policy: nn.Module | None = None,
        config: Any = None,
        device: torch.device | str | None = None,
        server_device: str | None = None,
        dtype: str | None = None,
        weights_folder: Path | None = None,
        options: SGLangOptions | None = None,
    ) -> None:
        if dtype is None:
            dtype = "auto" if policy is None else str(next(policy.parameters()).dtype).removeprefix("torch.")
        if config is None and policy is None:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(model_path)
        self._server = self.server = SGLangServer(
            model_path, options or SGLangOptions(), device=server_device, dtype=dtype
        )
        self._finalizer = weakref.finalize(self, self.server.stop)
        super().__init__(
            [self.server.url], eos_token_id=eos_token_id, pad_token_id=pad_token_id, policy=policy, config=config,
            device=device, weights_folder=weights_folder, options=options,
        )  # fmt: skip

    def close(self) -> None:
        """Stop the server; its log stays if the server ever failed."""
        failed = self.restarts > 0 or any(member.lost is not None for member in self._fleet.members)
        super().close()
        if not failed:
            self.server.remove_log()


class _Read(NamedTuple):
    states: list[list[float]]
    logprobs: list[float]
    weights: str


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, or the first exception, with the others cancelled and over before it is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close_all(clients: Sequence[SGLangClient]) -> None:
    for client in clients:
        await client.close()


def _stack(states: Sequence[Tensor], width: int) -> Tensor:
    """Rows [S_i, H] as [B, width, H], 0 on the right."""
    laid_out = torch.zeros(len(states), width, states[0].shape[-1])
    for row, state in zip(laid_out, states, strict=True):
        row[: len(state)] = state
    return laid_out
