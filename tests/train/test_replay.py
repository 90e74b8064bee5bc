"""Replay: what is kept of whom, that it comes back in its prompt's group, and that it survives a checkpoint."""

from pathlib import Path

import torch

from irlfast.rollout import Rollouts, Sequences
from irlfast.train.replay import Replay

PAD = 9


def rollouts(prompts: list[list[int]], responses: list[list[int]], groups: list[int], log_q: list[float]) -> Rollouts:
    batch = Sequences.from_token_lists(prompts, responses, PAD, groups)
    first = batch.response_mask & (batch.response_mask.cumsum(1) == 1)
    return Rollouts(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        response_mask=batch.response_mask,
        groups=batch.groups,
        sampler_logprobs=torch.where(first, torch.tensor(log_q)[:, None], 0.0),
        model_logprobs=torch.zeros(batch.input_ids.shape),
        finish_reasons=("stop",) * len(batch),
    )


def test_samples_come_back_in_the_groups_of_their_prompts() -> None:
    replay = Replay(2, PAD)
    replay.add(rollouts([[1], [1], [1], [2, 3]], [[4], [5, 6], [7], [8]], [0, 0, 0, 1], [-1.0, -2.0, -3.0, -4.0]))
    kept = replay.of(rollouts([[2, 3], [5], [1]], [[4], [4], [4]], [7, 8, 9], [0.0, 0.0, 0.0]))
    assert kept is not None
    sequences, log_q = kept
    rows = [ids[mask].tolist() for ids, mask in zip(sequences.input_ids, sequences.attention_mask, strict=True)]
    assert rows == [[2, 3, 8], [1, 5, 6], [1, 7]]  # the oldest answer to [1] gave way
    assert sequences.groups.tolist() == [7, 9, 9]
    assert sequences.response_lengths.tolist() == [1, 2, 1]
    assert log_q.tolist() == [-4.0, -2.0, -3.0]


def test_nothing_kept_is_none() -> None:
    replay = Replay(2, PAD)
    samples = rollouts([[1]], [[4]], [0], [-1.0])
    assert replay.of(samples) is None
    replay.add(samples)
    assert replay.of(rollouts([[2]], [[4]], [0], [-1.0])) is None
    off = Replay(0, PAD)
    off.add(samples)
    assert off.of(samples) is None
    assert off.state_dict() == {"samples": []}


def test_state_goes_through_a_file_without_pickled_code(tmp_path: Path) -> None:
    replay = Replay(3, PAD)
    samples = rollouts([[1], [2], [1]], [[4], [5, 6], [7]], [0, 1, 0], [-1.25, -2.5, -0.3])
    replay.add(samples)
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    loaded = Replay(3, PAD)
    loaded.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert loaded.state_dict() == replay.state_dict()
    kept, expected = loaded.of(samples), replay.of(samples)
    assert kept is not None
    assert expected is not None
    assert torch.equal(kept[0].input_ids, expected[0].input_ids)
    assert torch.equal(kept[1], expected[1])
