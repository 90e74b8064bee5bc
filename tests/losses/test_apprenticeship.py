"""AbbeelNgProjection: one step by hand; on the toy language the margin never rises and falls below .005 by 200."""

import re
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from irlfast.eval import toy
from irlfast.losses import AbbeelNgProjection


def test_a_step_projects_on_the_line_to_the_new_policy() -> None:
    projection = AbbeelNgProjection(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert projection.margin == 2.0
    margin = projection.step(torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(projection.mixture, torch.tensor([1.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(projection.weights, torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert margin == pytest.approx(2**0.5)


def test_a_policy_that_is_no_closer_changes_nothing() -> None:
    projection = AbbeelNgProjection(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    for worse in ([0.0, -1.0], [0.0, 0.0], [1.0, 0.0]):
        assert projection.step(torch.tensor(worse)) == 2.0


def test_a_policy_beyond_the_demonstrator_is_reached_at_most() -> None:
    projection = AbbeelNgProjection(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    assert projection.step(torch.tensor([0.0, 1.0])) == 1.0
    assert projection.step(torch.tensor([0.0, 5.0])) == pytest.approx(0.0)


def margins(expert: Tensor, rounds: int = 200, *, optimal: bool = True) -> list[float]:
    """From the uniform policy; each round's policy picks the string of highest reward (a broken one: of lowest)."""
    phi = toy.features()
    uniform = toy.log_probs(toy.ToyPolicy(dtype=torch.float64)).detach().exp()
    projection = AbbeelNgProjection(expert, uniform @ phi)
    found = [projection.margin]
    for _ in range(rounds):
        rewards = phi @ projection.weights
        found.append(projection.step(phi[rewards.argmax() if optimal else rewards.argmin()]))
    return found


EXACT = toy.expert_log_probs().exp() @ toy.features()


def test_margin_never_rises_and_is_below_five_thousandths_by_200() -> None:
    found = margins(EXACT)
    assert all(b <= a for a, b in pairwise(found))
    assert found[-1] < 0.005  # measured: .0043


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_margin_never_rises_from_2000_demonstrations(seed: int) -> None:
    """Their mean features lie nearer to the edge of what policies reach, and the method slows down there."""
    found = margins(toy.features()[toy.sample_strings(2000, seed=seed)].mean(0))
    assert all(b <= a for a, b in pairwise(found))
    assert found[-1] < 0.01  # measured: .0048, .0034, .0059


def test_gate_fails_broken_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert margins(EXACT, optimal=False)[-1] > 0.5  # policies that minimise the reward never come closer

    def jump(self: AbbeelNgProjection, policy: Tensor) -> float:
        self.mixture = policy.double()  # no projection: the last policy in place of the mixture
        return self.margin

    monkeypatch.setattr(AbbeelNgProjection, "step", jump)
    found = margins(EXACT)
    assert any(b > a for a, b in pairwise(found))
    assert min(found[1:]) > 0.1


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=re.escape("policy has shape (3,); expected that of expert, (2,)")):
        AbbeelNgProjection(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=re.escape("expert[0] is nan")):
        AbbeelNgProjection(torch.full((2,), torch.nan), torch.zeros(2))
