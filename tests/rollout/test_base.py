import pytest
import torch

from irlfast.rollout import Rollouts, SamplingParams, Sequences


def sequences(**changes) -> Sequences:
    fields = {
        "input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 0, 0]]),
        "attention_mask": torch.tensor([[True, True, True, True], [True, True, False, False]]),
        "response_mask": torch.tensor([[False, False, True, True], [False, True, False, False]]),
        "groups": torch.tensor([0, 1]),
    }
    return Sequences(**{**fields, **changes})


def rollouts(**changes) -> Rollouts:
    base = sequences()
    fields = {
        "input_ids": base.input_ids,
        "attention_mask": base.attention_mask,
        "response_mask": base.response_mask,
        "groups": base.groups,
        "sampler_logprobs": torch.tensor([[0.0, 0.0, -1.0, -2.0], [0.0, -3.0, 0.0, 0.0]]),
        "model_logprobs": torch.tensor([[0.0, 0.0, -1.5, -2.5], [0.0, -3.5, 0.0, 0.0]]),
        "finish_reasons": ("stop", "length"),
        "hidden_states": torch.arange(16.0).reshape(2, 4, 2),
    }
    return Rollouts(**{**fields, **changes})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got 2.0"),
        ({"n": True}, TypeError, "n must be an int, got True"),
        ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\]"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an int or None"),
    ],
)
def test_sampling_params_refuse_bad_values(values, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**values)


def test_sampling_params_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        SamplingParams(64)
    with pytest.raises(AttributeError):
        SamplingParams().n = 2


def test_lengths():
    batch = sequences()
    assert batch.prompt_lengths.tolist() == [2, 1]
    assert batch.response_lengths.tolist() == [2, 1]
    assert len(batch) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"shape \[B, S\]"),
        ({"input_ids": [[1]]}, ValueError, "got list"),
        ({"input_ids": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "input_ids must be torch.int64"),
        ({"attention_mask": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "attention_mask must be torch.bool"),
        ({"attention_mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"must have shape \[2, 4\].*got \[2, 3\]"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, ValueError, r"groups must have shape \[2\]"),
        ({"groups": [0, 1]}, TypeError, "groups must be a tensor, got list"),
    ],
)
def test_sequences_refuse_wrong_shapes_and_dtypes(changes, error, message):
    with pytest.raises(error, match=message):
        sequences(**changes)


def test_left_padding_is_refused():
    mask = torch.tensor([[True, True, True, True], [False, True, True, True]])
    with pytest.raises(ValueError, match=r"attention_mask\[1\] is False at 0 and True at 1: rows must be right-padded"):
        sequences(attention_mask=mask, response_mask=torch.zeros(2, 4, dtype=torch.bool))


def test_response_on_padding_is_refused():
    response = torch.tensor([[False, False, True, True], [False, True, True, False]])
    with pytest.raises(ValueError, match=r"response_mask\[1, 2\] is True on padding"):
        sequences(response_mask=response)


def test_response_before_the_end_is_refused():
    response = torch.tensor([[False, True, False, True], [False, True, False, False]])
    with pytest.raises(ValueError, match=r"response_mask\[0\] is True at 1 and False at 2"):
        sequences(response_mask=response)


def test_from_token_lists_lays_the_response_after_its_prompt():
    batch = Sequences.from_token_lists([[5, 6], [8], [3]], [[7, 2], [9], []], pad_id=0, groups=[4, 4, 5])
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [8, 9, 0, 0], [3, 0, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.groups.tolist() == [4, 4, 5]
    assert Sequences.from_token_lists([[1], [1]], [[2], [2]], pad_id=0).groups.tolist() == [0, 1]


def test_from_token_lists_accepts_pad_equal_to_eos():
    batch = Sequences.from_token_lists([[5], [5, 6]], [[2], [7, 2]], pad_id=2)
    assert batch.attention_mask.sum(1).tolist() == [2, 4]
    assert batch.response_lengths.tolist() == [1, 2]


def test_from_token_lists_of_nothing_is_an_empty_batch():
    assert Sequences.from_token_lists([], [], pad_id=0).input_ids.shape == (0, 0)


def test_from_token_lists_errors():
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        Sequences.from_token_lists([[1], [2]], [[3]], pad_id=0)
    with pytest.raises(ValueError, match="row 1 has neither prompt nor response"):
        Sequences.from_token_lists([[1], []], [[3], []], pad_id=0)


@pytest.mark.parametrize("rows", [[1, 0, 1], torch.tensor([1, 0, 1]), [-1, 0, 1]])
def test_select_by_index_takes_every_field(rows):
    picked = rollouts().select(rows)
    assert isinstance(picked, Rollouts)
    assert picked.input_ids.tolist() == [[8, 9, 0, 0], [5, 6, 7, 2], [8, 9, 0, 0]]
    assert picked.finish_reasons == ("length", "stop", "length")
    assert picked.sampler_logprobs[:, 1].tolist() == [-3.0, 0.0, -3.0]
    assert picked.hidden_states[:, 0, 0].tolist() == [8.0, 0.0, 8.0]
    assert picked.groups.tolist() == [1, 0, 1]


def test_select_by_mask_slice_and_nothing():
    batch = rollouts()
    assert batch.select(torch.tensor([False, True])).finish_reasons == ("length",)
    assert batch.select(slice(0, 1)).groups.tolist() == [0]
    assert len(batch.select([])) == 0


def test_select_errors():
    with pytest.raises(IndexError, match=r"row 2 is outside \[0, 2\)"):
        rollouts().select([2])
    with pytest.raises(ValueError, match="bool mask of 3 entries for 2 rows"):
        rollouts().select(torch.tensor([True, False, True]))
    with pytest.raises(TypeError, match="rows must be a slice"):
        rollouts().select(torch.tensor([0.0]))


def test_concat_pads_to_the_widest_and_keeps_groups():
    narrow = rollouts().select([1]).trim()
    assert narrow.input_ids.shape == (1, 2)
    assert narrow.hidden_states.shape == (1, 2, 2)
    joined = Rollouts.concat([narrow, rollouts()], pad_id=9)
    assert joined.input_ids.tolist() == [[8, 9, 9, 9], [5, 6, 7, 2], [8, 9, 0, 0]]
    assert joined.attention_mask[0].tolist() == [True, True, False, False]
    assert joined.sampler_logprobs[0].tolist() == [0.0, -3.0, 0.0, 0.0]
    assert joined.hidden_states[0].tolist() == [[8.0, 9.0], [10.0, 11.0], [0.0, 0.0], [0.0, 0.0]]
    assert joined.finish_reasons == ("length", "stop", "length")
    assert joined.groups.tolist() == [1, 0, 1]


def test_rollouts_concatenate_as_plain_sequences_with_demonstrations():
    demonstrations = Sequences.from_token_lists([[5, 6]], [[1, 1, 1, 2]], pad_id=0, groups=[0])
    joined = Sequences.concat([demonstrations, rollouts()], pad_id=0)
    assert type(joined) is Sequences
    assert joined.response_lengths.tolist() == [4, 2, 1]


def test_concat_errors():
    with pytest.raises(ValueError, match="at least one batch"):
        Sequences.concat([], pad_id=0)
    with pytest.raises(TypeError, match=r"batches\[1\] is Sequences, expected Rollouts"):
        Rollouts.concat([rollouts(), sequences()], pad_id=0)
    with pytest.raises(ValueError, match="hidden_states is None in some batches only"):
        Rollouts.concat([rollouts(), rollouts(hidden_states=None)], pad_id=0)


def test_to_moves_every_tensor():
    moved = rollouts().to("meta")
    assert moved.hidden_states.device.type == "meta"
    assert moved.groups.device.type == "meta"
    assert moved.finish_reasons == ("stop", "length")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"sampler_logprobs": torch.zeros(2, 4, dtype=torch.float64)},
            TypeError,
            "sampler_logprobs must be torch.float32",
        ),
        ({"model_logprobs": torch.zeros(2, 3)}, ValueError, "model_logprobs must have shape"),
        ({"finish_reasons": ("stop",)}, ValueError, "finish_reasons has 1 entries for 2 rows"),
        ({"finish_reasons": ("stop", "eos")}, ValueError, r"finish_reasons\[1\] is 'eos'"),
        ({"hidden_states": torch.zeros(2, 4)}, ValueError, r"shape \[B, S, H\]"),
        ({"hidden_states": torch.zeros(2, 3, 5)}, ValueError, "hidden_states must have shape"),
    ],
)
def test_rollouts_refuse_bad_fields(changes, error, message):
    with pytest.raises(error, match=message):
        rollouts(**changes)
