"""train_supervised: fits, never trains on prompts, keeps the best held-out step."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from irlfast.data import TokenizedDemonstration
from irlfast.eval import toy
from irlfast.rollout import Sequences
from irlfast.train import OptimizerConfig, SupervisedConfig, train_supervised
from irlfast.train.scoring import response_scores

Rows = Callable[..., list[TokenizedDemonstration]]


def nll(policy: toy.ToyPolicy, rows: list[TokenizedDemonstration]) -> float:
    batch = Sequences.from_token_lists(
        [list(r.prompt_ids) for r in rows], [list(r.response_ids) for r in rows], toy.PAD
    )
    with torch.no_grad():
        return -float(response_scores(policy, batch).stats.logprob.sum() / batch.response_mask.sum())


def config(steps: int, **options: object) -> SupervisedConfig:
    optimizer = OptimizerConfig(lr=0.1, schedule="linear", final_lr_fraction=0.02)
    return SupervisedConfig(steps=steps, batch_size=64, optimizer=optimizer, **options)  # type: ignore[arg-type]


def test_fits_the_distribution_of_the_demonstrations(toy_rows: Rows) -> None:
    """The table can hold any distribution, so its likelihood must come to that of the counts, the best there is."""
    rows = toy_rows(2000)
    policy = toy.ToyPolicy()
    steps: list[int] = []
    result = train_supervised(policy, rows, config(400), pad_token_id=toy.PAD, on_step=steps.append)
    counts = Counter(row.response_ids for row in rows)
    tokens = sum(len(row.response_ids) for row in rows)
    best = -sum(n * torch.tensor(n / len(rows)).log() for n in counts.values()) / tokens
    assert nll(policy, rows) == pytest.approx(float(best), abs=0.005)
    assert nll(toy.ToyPolicy(), rows) > float(best) + 0.2  # where it started
    assert steps == list(range(1, 401))
    assert result.steps == 400
    assert result.heldout_nll is None
    assert result.train_nll == pytest.approx(float(best), abs=0.1)
    assert not policy.training


def test_early_stopping_keeps_the_best_step(toy_rows: Rows) -> None:
    """40 demonstrations over 121 strings are soon learned by heart: the held-out likelihood turns."""
    rows, heldout = toy_rows(40), toy_rows(400, seed=1)
    policy, straight = toy.ToyPolicy(), toy.ToyPolicy()
    result = train_supervised(policy, rows, config(150, eval_every=5), pad_token_id=toy.PAD, heldout=heldout)
    assert result.heldout_nll == nll(policy, heldout)
    assert 0 < result.steps < 150
    assert result.steps % 5 == 0

    curve: dict[int, float] = {}

    def look(step: int) -> None:
        curve[step] = nll(straight, heldout)

    train_supervised(straight, rows, config(150), pad_token_id=toy.PAD, on_step=look)
    looked_at = {step: value for step, value in curve.items() if step % 5 == 0}
    assert result.heldout_nll == min(looked_at.values()) == looked_at[result.steps]
    assert curve[150] > result.heldout_nll + 0.05
    assert nll(straight, rows) < nll(policy, rows)


def test_a_start_that_is_best_is_kept(toy_rows: Rows) -> None:
    """Held-out rows that training only makes less likely: the weights come back as they were."""
    rows = [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=(0, 0, toy.EOS), truncated=False)]
    heldout = [TokenizedDemonstration(prompt_ids=(toy.BOS,), response_ids=(1, toy.EOS), truncated=False)]
    policy = toy.ToyPolicy()
    start = nll(policy, heldout)
    result = train_supervised(policy, rows, config(20), pad_token_id=toy.PAD, heldout=heldout)
    assert result.steps == 0
    assert result.heldout_nll == start
    assert not policy.table.any()


def test_the_last_step_is_looked_at_though_it_is_no_multiple(toy_rows: Rows) -> None:
    rows = toy_rows(500)
    policy = toy.ToyPolicy()
    result = train_supervised(
        policy, rows, config(17, eval_every=10), pad_token_id=toy.PAD, heldout=toy_rows(500, seed=1)
    )
    assert result.steps == 17


def test_prompts_are_never_trained_on() -> None:
    """After BOS 0 1 the response is EOS: the rows of the empty prefix and of "0" predict prompt tokens only."""
    rows = [TokenizedDemonstration(prompt_ids=(toy.BOS, 0, 1), response_ids=(toy.EOS,), truncated=False)]
    policy = toy.ToyPolicy()
    train_supervised(policy, rows, config(3), pad_token_id=toy.PAD)
    changed = policy.table.detach().abs().sum(1).nonzero()[:, 0].tolist()
    assert changed == [toy.all_strings().index((0, 1, toy.EOS))]


def test_no_steps_change_nothing(toy_rows: Rows) -> None:
    policy = toy.ToyPolicy()
    heldout = toy_rows(10)
    result = train_supervised(policy, toy_rows(10), config(0), pad_token_id=toy.PAD, heldout=heldout)
    assert not policy.table.any()
    assert result.steps == 0
    assert result.train_nll is None
    assert result.heldout_nll == nll(policy, heldout)


def test_the_seed_decides_the_order(toy_rows: Rows) -> None:
    def trained(seed: int) -> torch.Tensor:
        policy = toy.ToyPolicy()
        train_supervised(policy, toy_rows(300), config(5, seed=seed), pad_token_id=toy.PAD)
        return policy.table.detach()

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to draw supervised from: the list is empty"):
        train_supervised(toy.ToyPolicy(), [], config(1), pad_token_id=toy.PAD)
