"""Rewards extracted from pairs whose true reward is known, and a test for each mistake of an earlier system."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from irlfast.data import Preference
from irlfast.rewards import ReaderConfig, RewardModel, RewardModelConfig
from irlfast.train.answers import Answers, Pairs, ReadingConfig, read_answers
from irlfast.train.config import OptimizerConfig
from irlfast.train.extraction import ExtractionConfig, ExtractionTrainer, score_answers, shuffled_pairs
from irlfast.train.extraction_plots import plot_extraction
from irlfast.train.extraction_report import HeldOut, identifiability, ranking_report

FEATURES, PROMPTS = 6, 60
WEIGHTS = torch.tensor([1.0, -0.8, 0.5, 0.0, 0.0, 0.3])
FAST = ExtractionConfig(epochs=15, batch_size=64, optimizer=OptimizerConfig(lr=0.02))


class World:
    """Answers with a linear true reward; a tuned model's are drawn from its base's by exp(reward)."""

    def __init__(self, seed: int = 0, *, per_prompt: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        columns: tuple[list[int], list[int], list[int]] = ([], [], [])
        for prompt in range(PROMPTS):
            pool = torch.randn(64, FEATURES, generator=generator)
            base = torch.randperm(64, generator=generator)[:per_prompt]
            tuned = torch.multinomial((pool @ WEIGHTS).exp(), per_prompt, generator=generator)
            start = sum(len(part) for part in rows)
            rows += [pool[tuned], pool[base]]
            for i in range(per_prompt):
                for j in range(per_prompt):
                    for column, value in zip(columns, (start + i, start + per_prompt + j, prompt), strict=True):
                        column.append(value)
        features = torch.cat(rows)
        self.truth = features @ WEIGHTS
        # Pooled features have a scale of their own.
        self.answers = Answers(
            features=features * 3.0 + 10.0,
            logprobs=torch.full((len(features),), -20.0),
            lengths=torch.randint(5, 20, (len(features),), generator=generator),
            rows={},
        )
        everything = Pairs(*(torch.tensor(column) for column in columns))
        self.train, self.validation, self.test = (
            Pairs(*(column[(everything.prompt >= low) & (everything.prompt < high)] for column in everything))
            for low, high in ((0, 40), (40, 50), (50, 60))
        )

    def heldout(self) -> HeldOut:
        return HeldOut(
            pairs=self.test,
            validation=self.validation,
            truth=self.truth.double().numpy(),
            lengths=self.answers.lengths.double().numpy(),
        )

    def trainer(self, config: ExtractionConfig, *, hidden: tuple[int, ...] = ()) -> ExtractionTrainer:
        torch.manual_seed(config.seed)
        reward = RewardModel(RewardModelConfig(hidden_size=FEATURES, hidden_sizes=hidden, pooling="mean"))
        return ExtractionTrainer(reward, self.answers, self.train, self.validation, config)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("bradley_terry", {}),
        ("max_margin", {"kind": "ng_russell"}),
        ("max_margin", {"kind": "hinge"}),
        ("maxent", {}),
        ("airl", {}),
    ],
)
def test_every_objective_finds_the_true_reward(world: World, objective: str, options: dict[str, str]) -> None:
    trainer = world.trainer(replace(FAST, objective=objective, options=dict(options)))
    trainer.train()
    report = ranking_report(trainer.scores(), world.heldout())
    assert report["spearman"] > 0.9
    assert report["truth_accuracy"] > 0.85
    assert report["accuracy_low"] <= report["accuracy"] <= report["accuracy_high"]


def test_shuffled_labels_end_at_chance(world: World) -> None:
    """On TRUE test pairs. One such reward is some direction and may rank well by chance; the mean of many may not."""
    accuracies = []
    for seed in range(16):
        torch.manual_seed(seed)
        reward = RewardModel(RewardModelConfig(hidden_size=FEATURES, hidden_sizes=(), pooling="mean"))
        train, validation = (shuffled_pairs(pairs, seed) for pairs in (world.train, world.validation))
        trainer = ExtractionTrainer(reward, world.answers, train, validation, replace(FAST, epochs=4))
        trainer.train()
        accuracies.append(ranking_report(trainer.scores(), world.heldout())["accuracy"])
    error = np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))
    assert abs(np.mean(accuracies) - 0.5) < 2.5 * error
    assert error < 0.06
    straight = world.trainer(FAST)
    straight.train()
    assert ranking_report(straight.scores(), world.heldout())["accuracy_low"] > 0.5 + 2.5 * error


def test_bug_gradients_of_earlier_steps_were_never_cleared(world: World) -> None:
    still = OptimizerConfig(lr=1e-12, max_grad_norm=0)
    config = replace(FAST, epochs=3, patience=3, batch_size=10_000, optimizer=still)
    trainer = world.trainer(config)
    trainer.train()
    last = [p.grad.clone() for p in trainer.reward.parameters() if p.grad is not None]
    once = world.trainer(replace(config, epochs=1))
    once.train()
    first = [p.grad for p in once.reward.parameters() if p.grad is not None]
    for a, b in zip(last, first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bug_the_test_set_was_the_training_set(world: World) -> None:
    elsewhere = torch.cat([world.test.chosen, world.test.rejected]).unique()
    features = world.answers.features.clone()
    features[elsewhere] = torch.randn(len(elsewhere), FEATURES, generator=torch.Generator().manual_seed(1)) * 100
    other = World()
    other.answers = replace(other.answers, features=features)
    a, b = world.trainer(FAST), other.trainer(FAST)
    a.train()
    b.train()
    for left, right in zip(a.reward.state_dict().values(), b.reward.state_dict().values(), strict=True):
        assert torch.equal(left, right)


def test_bug_accuracy_compared_each_reward_with_zero(world: World) -> None:
    scores = world.truth
    report = ranking_report(scores, world.heldout())
    shifted = ranking_report(3 * scores + 100, world.heldout())
    for key in ("accuracy", "auc", "f1", "truth_accuracy", "spearman"):
        assert shifted[key] == pytest.approx(report[key], abs=1e-6), key
    assert report["truth_accuracy"] == 1.0


def test_bug_the_reward_that_is_served_was_not_monotone(world: World) -> None:
    trainer = world.trainer(FAST)
    trainer.train()
    raw = trainer.scores()
    served = trainer.reward.normalizer.normalize(raw)
    assert float(trainer.reward.normalizer.scale) > 0
    assert torch.equal(raw.argsort(stable=True), served.argsort(stable=True))


def test_bug_only_the_last_character_of_a_text_was_read(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        Preference(prompt="Once upon a time", chosen=" there was a big cat.", rejected=" there was a red cat."),
        Preference(prompt="Once upon a time", chosen=" there was a big cat.", rejected=" we saw a cat."),
    ]
    source = ReaderConfig(token_statistics=True)
    answers = read_answers(model, tokenizer, texts, source, pooling=("mean", "last"))
    width = answers.features.shape[1] // 2
    rows = [answers.rows["Once upon a time", text] for text in (" there was a big cat.", " there was a red cat.")]
    assert answers.features.shape == (3, 2 * (64 + 2))
    assert (answers.features[rows[0], :width] - answers.features[rows[1], :width]).abs().max() > 1e-2
    # The whole text, prompt included, when asked for.
    whole = read_answers(model, tokenizer, texts, source, config=ReadingConfig(full_text=True))
    assert not torch.allclose(whole.features[:, :64], answers.features[:, :64])
    # Batches change nothing.
    alone = read_answers(model, tokenizer, texts, source, pooling=("mean", "last"), config=ReadingConfig(batch_size=1))
    torch.testing.assert_close(alone.features, answers.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.logprobs, answers.logprobs, rtol=1e-5, atol=1e-4)


def test_long_prompts_keep_their_end_and_long_answers_their_start(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt, tail = "One day a girl went to the park. " * 30, "She saw a dog."
    rows = [Preference(prompt=p + tail, chosen=" It ran." * 40, rejected=" It sat.") for p in (prompt, "x " + prompt)]
    config = ReadingConfig(max_prompt_tokens=16, max_response_tokens=12)
    answers = read_answers(model, tokenizer, rows, ReaderConfig(), config=config)
    assert answers.lengths.max() == 12
    torch.testing.assert_close(
        answers.features[answers.rows[prompt + tail, " It sat."]],
        answers.features[answers.rows["x " + prompt + tail, " It sat."]],
    )


def test_training_repeats_and_keeps_the_best_pass(world: World) -> None:
    config = replace(FAST, epochs=6, patience=2)
    a, b = world.trainer(config, hidden=(8,)), world.trainer(config, hidden=(8,))
    best = a.train()
    assert b.train() == best
    assert a.history == b.history
    assert best.validation_accuracy == max(row.validation_accuracy for row in a.history)
    kept = ranking_report(a.scores(), replace(world.heldout(), pairs=world.validation))
    assert kept["accuracy"] == pytest.approx(best.validation_accuracy)
    assert torch.equal(score_answers(a.reward, world.answers), a.scores())


def test_seeds_agree_where_the_data_decides_and_not_elsewhere(world: World) -> None:
    learned = []
    for seed in (0, 1):
        trainer = world.trainer(replace(FAST, seed=seed))
        trainer.train()
        learned.append(trainer.scores())
    agreed = identifiability(learned, world.test)
    assert agreed["spearman_min"] > 0.95
    assert agreed["distance_max"] < 0.2
    random = [torch.randn(len(world.truth), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    apart = identifiability(random, world.test)
    assert abs(apart["spearman_mean"]) < 0.35
    assert apart["distance_mean"] == pytest.approx(np.sqrt(0.5), abs=0.15)
    assert identifiability(learned[:1], world.test) == {}


def test_a_normaliser_needs_more_than_one_sample_a_prompt() -> None:
    single = World(per_prompt=1)
    with pytest.raises(ValueError, match=r"maxent estimates a normaliser .* 40 of 40 prompts have only one"):
        single.trainer(replace(FAST, objective="maxent"))
    single.trainer(replace(FAST, objective="airl"))


def test_labels_by_a_threshold_of_the_truth(world: World) -> None:
    report = ranking_report(world.truth, replace(world.heldout(), label_threshold=0.5))
    assert report["auc"] == 1.0
    # The threshold was fitted on validation answers, so a few test answers may lie between.
    assert report["f1"] > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nothing"}, "objective 'nothing' is unknown"),
        ({"options": {"nothing": 1}}, "has no option 'nothing'"),
        ({"beta": 0.0}, "beta = 0.0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"patience": 0}, "patience = 0"),
    ],
)
def test_bad_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractionConfig(**options)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused(world: World) -> None:
    empty = Pairs(*(column[:0] for column in world.train))
    reward = RewardModel(RewardModelConfig(hidden_size=FEATURES, hidden_sizes=(), pooling="mean"))
    with pytest.raises(ValueError, match="train has no pairs"):
        ExtractionTrainer(reward, world.answers, empty, world.validation, FAST)
    with pytest.raises(ValueError, match="validation has no pairs"):
        ExtractionTrainer(reward, world.answers, world.train, empty, FAST)
    wide = RewardModel(RewardModelConfig(hidden_size=FEATURES, pooling=("mean", "max")))
    with pytest.raises(ValueError, match="answers have 6 features, the reward reads 12"):
        ExtractionTrainer(wide, world.answers, world.train, world.validation, FAST)


def test_the_picture_is_drawn_with_and_without_a_true_reward(world: World, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trainer = world.trainer(replace(FAST, epochs=2))
    trainer.train()
    for name, truth in (("known", world.truth.double().numpy()), ("unknown", np.full(len(world.truth), np.nan))):
        heldout = replace(world.heldout(), truth=truth)
        plot_extraction(tmp_path / f"{name}.png", trainer.scores(), heldout, [trainer.history])
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert ("pearson" in ranking_report(trainer.scores(), heldout)) == (name == "known")
