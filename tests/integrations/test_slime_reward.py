"""The learned reward as slime's reward function, and advantages within groups."""

from __future__ import annotations

import asyncio
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from slime_samples import Sample

from irlfast.data import DataError, Demonstration, TokenizedDemonstration
from irlfast.integrations.slime import group_reward, post, reload_reward, rescore, reward
from irlfast.integrations.slime.samples import SampleReader
from irlfast.integrations.slime.scoring import SampleScorer
from irlfast.rewards import ReaderConfig, create_reward_model, load_reward_model
from irlfast.rewards.reader import weights_digest
from irlfast.scorer import RewardScorer, Score, TextForm, TextScorer

transformers = pytest.importorskip("transformers")

PROMPT, RESPONSE = "Once upon a time", " there was a dog named Max."
COMPLETED, TRUNCATED, ABORTED = Sample.Status.COMPLETED, Sample.Status.TRUNCATED, Sample.Status.ABORTED


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def saved(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward that was never trained, with statistics of rewards that it served."""
    language_model = transformers.AutoModelForCausalLM.from_pretrained(stories)
    source = ReaderConfig(model=str(stories), weights=weights_digest(language_model))
    torch.manual_seed(0)
    made = create_reward_model({"hidden_size": source.width(language_model.config.hidden_size)}, "mlp")
    made.source = source
    made.normalizer.update(torch.tensor([-1.0, 2.0]))
    folder = tmp_path_factory.mktemp("slime") / "reward"
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(saved: Path) -> RewardScorer:
    return RewardScorer.from_pretrained(saved)


def ids(scorer: RewardScorer, text: str) -> list[int]:
    return list(scorer.tokenizer(text, add_special_tokens=False)["input_ids"])


def sampled(scorer: RewardScorer, *, ended: bool = True, response: str = RESPONSE, **fields: Any) -> Sample:
    """As slime samples: no BOS before a plain prompt, EOS among the tokens of a response that ended."""
    said = ids(scorer, PROMPT + response)[len(ids(scorer, PROMPT)) :] + [scorer.tokenizer.eos_token_id] * ended
    return Sample(
        index=3,
        prompt=PROMPT,
        tokens=ids(scorer, PROMPT) + said,
        response=response,
        response_length=len(said),
        status=COMPLETED if ended else TRUNCATED,
        **fields,
    )


def expected(scorer: RewardScorer, response: str = RESPONSE, *, cut: bool = False) -> Score:
    prompt = (scorer.tokenizer.bos_token_id, *ids(scorer, PROMPT))
    said = ids(scorer, PROMPT + response)[len(prompt) - 1 :]
    row = TokenizedDemonstration(
        prompt_ids=prompt, response_ids=(*said, *[scorer.tokenizer.eos_token_id] * (not cut)), truncated=cut
    )
    (score,) = scorer.score_tokenized([row])
    return score


def settings(saved: Path, stories: Path | None, **changed: Any) -> Namespace:
    """As slime's args are, without a policy's tokenizer where `stories` is None."""
    return Namespace(irlfast_reward=str(saved), hf_checkpoint=None if stories is None else str(stories), **changed)


@pytest.mark.parametrize("by", ["tokens", "text"])
def test_a_sample_is_judged_as_the_reward_was_trained(
    saved: Path, stories: Path, scorer: RewardScorer, by: str
) -> None:
    args = settings(saved, stories if by == "tokens" else None)
    whole, cut = sampled(scorer), sampled(scorer, ended=False)
    # The text says what the tokens do not, to tell which of the two was read.
    other = sampled(scorer)
    other.response = " nobody."
    given = asyncio.run(reward(args, [whole, cut, other]))
    said = RESPONSE if by == "tokens" else " nobody."
    want = [expected(scorer), expected(scorer, cut=True), expected(scorer, said)]
    assert given == pytest.approx([score.normalised for score in want], abs=1e-5)
    assert abs(given[0] - given[1]) > 1e-4  # EOS counts
    assert asyncio.run(reward(args, whole)) == pytest.approx(want[0].normalised, abs=1e-5)
    assert asyncio.run(group_reward(args, [whole, cut])) == pytest.approx(given[:2], abs=1e-6)
    assert asyncio.run(group_reward(args, [])) == []


def test_the_same_text_scored_by_irlfast_has_the_same_reward(saved: Path, stories: Path, scorer: RewardScorer) -> None:
    (score,) = scorer.score([Demonstration(prompt=PROMPT, response=RESPONSE)])
    assert not isinstance(score, DataError)
    given = asyncio.run(reward(settings(saved, stories), sampled(scorer)))
    assert given == pytest.approx(score.normalised, abs=1e-5)


def test_raw_rewards_are_given_where_they_are_asked_for(
    saved: Path, stories: Path, scorer: RewardScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = expected(scorer)
    assert want.normalised is not None
    assert abs(want.reward - want.normalised) > 1e-3
    assert asyncio.run(reward(settings(saved, stories, irlfast_reward_raw=True), sampled(scorer))) == pytest.approx(
        want.reward, abs=1e-5
    )
    monkeypatch.setenv("IRLFAST_REWARD", str(saved))
    monkeypatch.setenv("IRLFAST_REWARD_RAW", "true")
    given = asyncio.run(reward(Namespace(hf_checkpoint=str(stories)), sampled(scorer)))
    assert given == pytest.approx(want.reward, abs=1e-5)


def test_aborted_empty_and_failed_samples(saved: Path, stories: Path, scorer: RewardScorer) -> None:
    prompt = ids(scorer, PROMPT)
    aborted = sampled(scorer, ended=False)
    aborted.status = ABORTED
    silent = Sample(prompt=PROMPT, tokens=[*prompt, scorer.tokenizer.eos_token_id], response_length=1, status=COMPLETED)
    empty = Sample(prompt=PROMPT, tokens=prompt, status=TRUNCATED)  # slime: the prompt left no room to answer
    failed = sampled(scorer)
    failed.status = Sample.Status.FAILED
    for args in (settings(saved, stories), settings(saved, None)):
        given = asyncio.run(reward(args, [aborted, silent, empty, failed]))
        assert given[0] is None
        assert given[1] == pytest.approx(given[2], abs=1e-6)  # both judged as EOS alone
        assert given[3] == pytest.approx(expected(scorer).normalised, abs=1e-5)
    assert asyncio.run(reward(settings(saved, stories), aborted)) is None


def test_what_cannot_be_judged_is_named(saved: Path, scorer: RewardScorer) -> None:
    args = settings(saved, None)
    chat = Sample(
        index=7, prompt=[{"role": "user", "content": "Hello"}], response="Hi", response_length=1, status=COMPLETED
    )
    with pytest.raises(DataError, match="sample 7: a chat needs a tokenizer with a chat template"):
        asyncio.run(reward(args, [sampled(scorer), chat]))
    image = Sample(index=8, prompt=[{"role": "user", "content": [{"type": "image"}]}], response="Hi", status=COMPLETED)
    with pytest.raises(DataError, match=r"sample 8: turn 0 of its prompt .* content that is text"):
        asyncio.run(reward(args, image))
    with pytest.raises(ValueError, match=r"--rm-type remote_rm --rm-url http://127\.0\.0\.1:8000"):
        asyncio.run(reward(Namespace(irlfast_reward="http://127.0.0.1:8000"), chat))
    with pytest.raises(ValueError, match="no reward: set irlfast_reward"):
        asyncio.run(reward(Namespace(), chat))
    with pytest.raises(ValueError, match="irlfast_reward_batch_size must be at least 1, got 0"):
        asyncio.run(reward(settings(saved, None, irlfast_reward_batch_size=0), chat))


def test_how_tokens_become_a_row(scorer: RewardScorer) -> None:
    bos, eos = scorer.tokenizer.bos_token_id, scorer.tokenizer.eos_token_id

    def read(tokens: list[int], length: int, status: Any = COMPLETED, *, limit: int | None = None, **made: Any) -> Any:
        reader = SampleReader(
            scorer.tokenizer, TextForm(max_response_tokens=limit), **{"same_tokens": True, "rendered": False, **made}
        )
        row = reader(Sample(prompt=PROMPT, response=" a b", tokens=tokens, response_length=length, status=status))
        return row.prompt_ids, row.response_ids, row.truncated

    assert read([bos, 5, 6, 7], 2) == ((bos, 5), (6, 7, eos), False)  # stopped by a stop string: an end all the same
    assert read([5, 6, 7], 2) == ((bos, 5), (6, 7, eos), False)
    assert read([5, 6, 7], 2, rendered=True) == ((5,), (6, 7, eos), False)  # a chat template puts BOS itself
    assert read([5, 6, eos, 7], 3) == ((bos, 5), (6, eos), False)
    assert read([5, 6, 7, 8], 3, TRUNCATED) == ((bos, 5), (6, 7, 8), True)
    assert read([5, 6, 7, 8], 3, limit=2) == ((bos, 5), (6, 7), True)
    assert read([5, 6, eos], 2, limit=2) == ((bos, 5), (6, eos), False)
    text = read([6, 7], 2)  # no prompt among the tokens: the texts are read
    assert text == (
        (bos, *ids(scorer, PROMPT)),
        (*ids(scorer, PROMPT + " a b")[len(ids(scorer, PROMPT)) :], eos),
        False,
    )


class Slow(TextScorer):
    """Rewards the number of tokens, after a while; tells what it was given at once."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.batches: list[int] = []
        self.diverged = False

    def score_tokens(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> Iterator[Score]:
        self.batches.append(len(rows))
        time.sleep(0.02)
        for row in rows:
            number = float("nan") if self.diverged else float(len(row.response_ids))
            yield Score(reward=number, normalised=None)


def test_samples_that_are_asked_for_at_once_share_batches_and_block_nobody(scorer: RewardScorer) -> None:
    slow = Slow(scorer.tokenizer)
    service = SampleScorer(slow, SampleReader(scorer.tokenizer, TextForm(), same_tokens=True, rendered=False))
    samples = [Sample(tokens=[5] * (n + 2), response_length=n + 1, status=COMPLETED) for n in range(30)]
    beats = 0

    async def main() -> list[list[float]]:
        nonlocal beats
        tasks = [asyncio.ensure_future(service.score([sample])) for sample in samples]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.002)
            beats += 1
        return [task.result() for task in tasks]

    assert asyncio.run(main()) == [[n + 2.0] for n in range(30)]  # with EOS
    assert sum(slow.batches) == 30
    assert len(slow.batches) <= 6
    assert beats >= 3
    assert asyncio.run(service.score(samples[:2])) == [2.0, 3.0]  # another loop, the same thread
    slow.diverged = True
    with pytest.raises(ArithmeticError, match="the reward of a response is nan: the reward model has diverged"):
        asyncio.run(service.score(samples[:1]))
    slow.diverged = False
    bad = Sample(index=9, prompt=[{"role": "user"}], status=COMPLETED)  # type: ignore[list-item]
    answers = asyncio.run(gathered(service, [samples[0], bad]))
    assert answers[0] == [2.0]
    assert isinstance(answers[1], DataError)  # and the one beside it was judged
    assert threading.active_count() < 20


async def gathered(service: SampleScorer, samples: list[Sample]) -> list[Any]:
    return await asyncio.gather(*(service.score([sample]) for sample in samples), return_exceptions=True)


def test_stale_rewards_are_renewed_or_taken_away(saved: Path, stories: Path, scorer: RewardScorer) -> None:
    """slime scores no sample that has a reward, and fails on a finished one that has none."""
    args = settings(saved, stories)
    done, waiting, fresh = sampled(scorer, reward=-100.0), sampled(scorer, ended=False, reward=5.0), Sample()
    waiting.status = ABORTED
    assert asyncio.run(rescore(args, [[done], [waiting, [fresh]]])) == 2
    assert done.reward == pytest.approx(expected(scorer).normalised, abs=1e-5)
    assert waiting.reward is None
    assert fresh.reward is None
    assert asyncio.run(rescore(args, [])) == 0


def test_a_reward_is_loaded_once_until_it_is_forgotten(
    saved: Path, stories: Path, scorer: RewardScorer, tmp_path: Path
) -> None:
    model = load_reward_model(saved)
    model.save_pretrained(tmp_path)
    args = settings(tmp_path, stories)
    first = asyncio.run(reward(args, sampled(scorer)))
    model.normalizer.update(torch.tensor([50.0]))
    model.save_pretrained(tmp_path)
    assert asyncio.run(reward(args, sampled(scorer))) == first
    reload_reward(args)
    assert asyncio.run(reward(args, sampled(scorer))) < first - 0.1


# Advantages


def group(rewards: list[float], *, first: int = 0, **fields: Any) -> list[Sample]:
    return [Sample(group_index=first, reward=value, **fields) for value in rewards]


def slimes_rule(args: Namespace, rewards: list[float]) -> list[float]:
    """What slime does with equal groups."""
    values = torch.tensor(rewards, dtype=torch.float64).reshape(-1, args.n_samples_per_prompt)
    values = values - values.mean(1, keepdim=True)
    if args.grpo_std_normalization and args.advantage_estimator != "reinforce_plus_plus_baseline":
        values = values / (values.std(1, keepdim=True) + 1e-6)
    return values.flatten().tolist()


@pytest.mark.parametrize("estimator", ["grpo", "gspo", "cispo", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("std", [True, False])
def test_equal_groups_are_normalised_as_slime_does(estimator: str, std: bool) -> None:
    args = Namespace(
        advantage_estimator=estimator, grpo_std_normalization=std, rewards_normalization=True, n_samples_per_prompt=3
    )
    rewards = [1.0, 2.5, -1.0, 0.2, 0.1, 0.9]
    samples = group(rewards[:3]) + group(rewards[3:], first=1)
    raw, relative = post(args, samples)
    assert raw == rewards
    assert relative == pytest.approx(slimes_rule(args, rewards), abs=1e-9)
    for sample in samples:
        sample.group_index = None
    assert post(args, samples) == (raw, relative)


def test_ragged_groups_keep_to_their_own_prompt() -> None:
    """slime would compare all five with the batch's mean, 3: samples of an easy prompt would all be pushed up."""
    args = Namespace(advantage_estimator="grpo", grpo_std_normalization=False, n_samples_per_prompt=3)
    _, relative = post(args, group([1.0, 3.0]) + group([8.0, 2.0, 1.0], first=5))
    assert relative == pytest.approx([-1, 1, 13 / 3, -5 / 3, -8 / 3])
    _, constant = post(args, group([0.1 + 0.2, 0.3, 0.30000000000000004]))
    assert max(map(abs, constant)) < 1e-15
    assert post(Namespace(advantage_estimator="grpo"), group([0.7, 0.7]))[1] == [0.0, 0.0]


def test_other_estimators_and_choices() -> None:
    rewards = [1.0, 2.0, 4.0]
    for estimator in ("ppo", "reinforce_plus_plus"):
        assert post(Namespace(advantage_estimator=estimator), group(rewards)) == (rewards, rewards)
    assert post(Namespace(advantage_estimator="grpo", rewards_normalization=False), group(rewards))[1] == rewards
    _, rloo = post(Namespace(advantage_estimator="grpo", irlfast_advantages="rloo"), group(rewards))
    assert rloo == pytest.approx([1 - 3, 2 - 2.5, 4 - 1.5])
    keyed = group([0.0, 0.0], metadata={})
    for sample, value in zip(keyed, (1.0, 3.0), strict=True):
        sample.reward = {"score": value}
    assert post(Namespace(advantage_estimator="cispo", grpo_std_normalization=False, reward_key="score"), keyed)[1] == [
        -1.0,
        1.0,
    ]


def test_what_cannot_be_compared_is_refused() -> None:
    args = Namespace(advantage_estimator="grpo", n_samples_per_prompt=2)
    missing = group([1.0, 2.0])
    missing[1].reward, missing[1].index = None, 41
    with pytest.raises(ValueError, match=r"samples\[1\] \(index 41, .*has no reward"):
        post(args, missing)
    with pytest.raises(ValueError, match=r"rewards\[0\] is nan"):
        post(args, group([float("nan"), 1.0]))
    with pytest.raises(ValueError, match="3 samples, some without group_index, are no multiple of"):
        post(args, [Sample(reward=1.0) for _ in range(3)])
    with pytest.raises(ValueError, match="advantage_estimator is 'vtrace'"):
        post(Namespace(advantage_estimator="vtrace"), group([1.0]))
    with pytest.raises(ValueError, match="irlfast_advantages is 'rloo' with advantage_estimator 'ppo'"):
        post(Namespace(advantage_estimator="ppo", irlfast_advantages="rloo"), group([1.0]))
