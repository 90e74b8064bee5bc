"""A tiny reward in folders as a run leaves them, and servers in a thread that answer by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from irlfast.data import DataError, Demonstration
from irlfast.rewards import BaseRewardModel, ReaderConfig, create_reward_model
from irlfast.rewards.reader import weights_digest
from irlfast.rollout.sglang.loop_thread import LoopThread
from irlfast.scorer import Score, TextScorer
from irlfast.serving import AppOptions, LoadOptions, ServedReward, ServerOptions, load, serve
from irlfast.train.checkpoint import write_checkpoint

CONTEXT = 64
WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


@dataclass(frozen=True)
class Tiny:
    """A language model with learned positions, which fails on more tokens than its context, and its tokenizer."""

    folder: Path
    model: Any

    def reward(self, seed: int) -> BaseRewardModel:
        """An MLP on its states, another for each seed."""
        torch.manual_seed(seed)
        source = ReaderConfig(model=str(self.folder), weights=weights_digest(self.model))
        reward = create_reward_model({"hidden_size": source.width(32)}, "mlp")
        reward.source = source
        reward.normalizer.update(torch.tensor([-1.0, 2.0]) * (1 + seed))
        return reward.eval()

    def checkpoint(self, run: Path, step: int) -> Path:
        """Step `step` of a run, with reward `step`."""
        reward = self.reward(step)
        return write_checkpoint(
            run / "checkpoints", step, lambda path: reward.save_pretrained(path / "reward"), keep=100
        )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, vocab_size=32, bos_token_id=1, eos_token_id=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("lm")
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return Tiny(folder, model)


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, which no test changes."""
    folder = tmp_path_factory.mktemp("run")
    tiny.checkpoint(folder, 1)
    return folder


@pytest.fixture(scope="module")
def served(run: Path) -> ServedReward:
    return load(LoadOptions(reward=run, batch_size=8))


class Gated(TextScorer):
    """Judges as another scorer does, once the gate is open, and notes the batches."""

    def __init__(self, scorer: TextScorer) -> None:
        super().__init__(scorer.tokenizer, form=scorer.form, batch_size=scorer.batch_size)
        self.scorer = scorer
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []
        self.fails_on: str | None = None

    def score(
        self, rows: Sequence[Demonstration], *, tokens: bool = False, empty_responses: bool = False
    ) -> list[Score | DataError]:
        self.batches.append([row.response for row in rows])
        assert self.gate.wait(20)
        if self.fails_on is not None and any(self.fails_on in row.response for row in rows):
            raise RuntimeError("the model broke on it")
        return self.scorer.score(rows, tokens=tokens, empty_responses=empty_responses)

    def score_tokens(self, *given: Any, **named: Any) -> Any:
        return self.scorer.score_tokens(*given, **named)


@pytest.fixture
def gated(served: ServedReward) -> Gated:
    return Gated(served.scorer)


@dataclass
class Answer:
    status: int
    value: Any
    headers: Any

    @property
    def version(self) -> str:
        return str(self.headers["X-Irlfast-Reward-Version"])

    @property
    def error(self) -> str:
        assert set(self.value) == {"error"}, self.value
        return str(self.value["error"])


class Client:
    """Asks a server from an event loop of its own."""

    def __init__(self, loop: LoopThread, url: str) -> None:
        self.loop, self.url = loop, url

    async def ask(self, path: str, body: Any = None, *, session: Any = None, **options: Any) -> Answer:
        """POST where there is a body (bytes as they are, else as JSON), GET elsewhere."""
        if session is None:
            async with aiohttp.ClientSession() as session:
                return await self.ask(path, body, session=session, **options)
        if body is not None:
            options["data" if isinstance(body, bytes) else "json"] = body
        method = options.pop("method", "GET" if body is None else "POST")
        url = path if path.startswith("http") else self.url + path
        async with session.request(method, url, timeout=aiohttp.ClientTimeout(30), **options) as reply:
            text = await reply.text()
            is_json = reply.content_type == "application/json"
            return Answer(reply.status, await reply.json() if is_json else text, reply.headers)

    def __call__(self, path: str, body: Any = None, **options: Any) -> Answer:
        return self.loop.run(self.ask(path, body, **options))


@pytest.fixture(scope="module")
def loop() -> Iterator[LoopThread]:
    thread = LoopThread("clients")
    yield thread
    thread.close()


Serving = Callable[..., Any]


@pytest.fixture(scope="module")
def serving(served: ServedReward, run: Path, loop: LoopThread) -> Serving:
    """A context manager: a server on a free port that answers by `served`, as its client."""

    @contextmanager
    def start(
        reward: ServedReward = served,
        *,
        folder: Path = run,
        root: Path | None = None,
        watch: float | None = None,
        drain: float = 10.0,
        **changed: Any,
    ) -> Iterator[Client]:
        app = AppOptions(
            token=None, raw=False, batch_size=8, gather=8, batch_wait=0.002, queue_size=64, max_body=20_000
        )
        options = ServerOptions(
            host="127.0.0.1",
            port=0,
            load=LoadOptions(reward=folder, root=root, batch_size=8),
            app=replace(app, **changed),
            watch=watch,
            drain=drain,
        )
        said: list[dict[str, Any]] = []
        listens = threading.Event()
        stop: list[Callable[[], None]] = []

        async def life() -> None:
            event, here = asyncio.Event(), asyncio.get_running_loop()
            stop.append(lambda: here.call_soon_threadsafe(event.set))
            await serve(options, reward, event, lambda address: (said.append(address), listens.set()))

        failures: list[BaseException] = []

        def in_thread() -> None:
            try:
                asyncio.run(life())
            except BaseException as error:
                failures.append(error)
                listens.set()

        thread = threading.Thread(target=in_thread, daemon=True)
        thread.start()
        assert listens.wait(10)
        if failures:
            raise failures[0]
        client = Client(loop, said[0]["url"])
        client.stop = stop[0]  # type: ignore[attr-defined]
        try:
            yield client
        finally:
            stop[0]()
            thread.join(20)
        assert not thread.is_alive()
        assert not failures

    return start


@pytest.fixture(scope="module")
def client(serving: Serving) -> Iterator[Client]:
    with serving() as client:
        yield client
