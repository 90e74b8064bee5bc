"""Worked arithmetic, judged by a reader of its own: every equation is read back from the text and worked out anew."""

import random
import re

import pytest

from irlfast.data import TokenizedDemonstration
from irlfast.demo import arithmetic
from irlfast.demo.arithmetic import BOS, EOS, PAD, SYMBOLS, Problem

PROBLEMS = arithmetic.all_problems()
EQUATION = re.compile(r"(\d+)([+-])(\d+)=(\d+);")


def equations(working: str) -> list[tuple[int, int, int]]:
    """(value, signed step, result) of each equation; the working must consist of nothing else."""
    found = EQUATION.findall(working)
    assert "".join(f"{a}{sign}{b}={c};" for a, sign, b, c in found) == working
    return [(int(a), int(sign + b), int(c)) for a, sign, b, c in found]


def operations(prompt: str) -> tuple[int, list[int]]:
    """The start and the signed steps of a prompt."""
    match = re.fullmatch(r"(\d+)((?:[+-]\d+)+)=", prompt)
    assert match is not None
    return int(match[1]), [int(step) for step in re.findall(r"[+-]\d+", match[2])]


def is_sound(prompt: str, working: str) -> bool:
    """Every operation of the prompt, in order, each on the value before it, each worked out rightly."""
    start, steps = operations(prompt)
    lines = equations(working)
    if [step for _, step, _ in lines] != steps:
        return False
    value = start
    for left, step, result in lines:
        if left != value or left + step != result:
            return False
        value = result
    return value == start + sum(steps)


def test_there_are_enough_problems_and_no_prompt_twice() -> None:
    prompts = [problem.prompt for problem in PROBLEMS]
    assert len(set(prompts)) == len(prompts) > 1800
    assert Problem(12, (5, -3)).prompt == "12+5-3="
    assert Problem(12, (5, -3)) in PROBLEMS
    assert {len(p.steps) for p in PROBLEMS} == {arithmetic.OPERATIONS}
    for problem in PROBLEMS:
        start, steps = operations(problem.prompt)
        assert (start, tuple(steps)) == (problem.start, problem.steps)
        values = [start + sum(steps[:i]) for i in range(len(steps) + 1)]
        assert 1 <= start <= arithmetic.LARGEST_START
        assert all(0 <= value <= arithmetic.LARGEST_RESULT for value in values)
        assert all(1 <= abs(step) <= 9 for step in steps)


def test_right_working_by_hand() -> None:
    assert Problem(12, (5, -3)).right_working == "12+5=17;17-3=14;"


def test_every_right_working_is_right() -> None:
    for problem in PROBLEMS:
        assert is_sound(problem.prompt, problem.right_working)


def test_every_wrong_working_is_wrong_by_one_or_two_and_goes_on_from_its_slip() -> None:
    rng = random.Random(0)
    slips, lines = 0, 0
    for problem in PROBLEMS:
        working = problem.wrong_working(rng)
        assert not is_sound(problem.prompt, working)
        start, steps = operations(problem.prompt)
        assert [step for _, step, _ in equations(working)] == steps
        value, wrong = start, 0
        for left, step, result in equations(working):
            assert left == value
            assert abs(result - (left + step)) in (0, 1, 2)
            assert 0 <= result <= arithmetic.LARGEST_RESULT
            wrong += result != left + step
            value = result
        assert wrong >= 1
        slips += wrong
        lines += len(steps)
    # Half of the results are slips, less those workings that have none: 2/3 of two lines.
    assert 0.6 < slips / lines < 0.73


def test_wrong_workings_follow_the_generator_alone() -> None:
    first, second = random.Random(5), random.Random(5)
    assert [p.wrong_working(first) for p in PROBLEMS[:50]] == [p.wrong_working(second) for p in PROBLEMS[:50]]


def test_encode_and_decode_are_inverse_and_a_number_is_one_token() -> None:
    rng = random.Random(1)
    for problem in PROBLEMS[::7]:
        for text in (problem.prompt, problem.right_working, problem.wrong_working(rng)):
            ids = arithmetic.encode(text)
            assert arithmetic.decode(ids) == text
            assert len(ids) == len(re.findall(r"\d+|[+=;-]", text))
            assert all(0 <= i < len(SYMBOLS) for i in ids)
    assert arithmetic.encode("12+5=17;") == [12, SYMBOLS.index("+"), 5, SYMBOLS.index("="), 17, SYMBOLS.index(";")]
    assert arithmetic.decode([BOS, 7, EOS, PAD, PAD]) == "7"
    assert len({*range(len(SYMBOLS)), BOS, EOS, PAD}) == arithmetic.VOCAB_SIZE
    with pytest.raises(KeyError):
        arithmetic.encode("20+1=")


def test_rows_begin_with_bos_and_end_with_eos_within_the_longest_response() -> None:
    lengths = set()
    for problem in PROBLEMS:
        row = arithmetic.row(problem, problem.right_working)
        assert row.prompt_ids == (BOS, *arithmetic.encode(problem.prompt))
        assert row.response_ids == (*arithmetic.encode(problem.right_working), EOS)
        lengths.add(len(row.response_ids))
    assert lengths == {arithmetic.MAX_RESPONSE}


def test_only_the_whole_right_working_with_its_end_is_right() -> None:
    problem = Problem(12, (5, -3))
    right = [*arithmetic.encode("12+5=17;17-3=14;"), EOS]
    assert arithmetic.is_right(problem, right)
    wrong = [right[:-1], [*right, EOS], right[:6], [], [*right[:-1], PAD], right[6:]]
    wrong.append([*arithmetic.encode("12+5=16;16-3=13;"), EOS])
    wrong.append([*arithmetic.encode("12-3=9;9+5=14;"), EOS])  # the right result by another way
    assert not any(arithmetic.is_right(problem, response) for response in wrong)


def text_of(rows: list[TokenizedDemonstration]) -> list[tuple[str, str]]:
    return [(arithmetic.decode(list(r.prompt_ids)), arithmetic.decode(list(r.response_ids))) for r in rows]


def test_half_of_the_training_text_is_right() -> None:
    rows = text_of(arithmetic.mixed_text(PROBLEMS, 4000, random.Random(0)))
    right = sum(is_sound(prompt, working) for prompt, working in rows)
    assert abs(right / 4000 - 0.5) < 4 * 0.5 / 4000**0.5
    assert len({prompt for prompt, _ in rows}) > 0.7 * len(PROBLEMS)


@pytest.mark.parametrize("seed", [0, 1])
def test_sets_share_no_prompt_and_demonstrations_are_right(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from irlfast.demo import experiment

    monkeypatch.setattr(experiment, "PRETRAINING_ROWS", 5000)
    data = experiment.make_data(seed)
    sets = {name: text_of(getattr(data, name)) for name in ("text", "demonstrations", "validation", "heldout")}
    prompts = {name: {prompt for prompt, _ in rows} for name, rows in sets.items()}
    names = list(prompts)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert not prompts[name] & prompts[other]
    for name in names[1:]:
        assert len(prompts[name]) == len(sets[name]) >= 30
        assert all(is_sound(prompt, working) for prompt, working in sets[name])
    assert [p.prompt for p in data.heldout_problems] == [prompt for prompt, _ in sets["heldout"]]
    again = experiment.make_data(seed)
    assert again.text == data.text
    assert again.heldout == data.heldout
    assert experiment.make_data(seed + 10).heldout != data.heldout


def test_share_right_counts_whole_right_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    import torch

    from irlfast.demo import experiment
    from irlfast.rollout import Rollouts, Sequences

    monkeypatch.setattr(experiment, "PRETRAINING_ROWS", 10)
    data = experiment.make_data(0)
    rng = random.Random(0)
    responses = [
        list(arithmetic.row(p, p.right_working if i % 4 == 0 else p.wrong_working(rng)).response_ids)
        for i, p in enumerate(data.heldout_problems)
    ]
    batch = Sequences.from_token_lists([list(row.prompt_ids) for row in data.heldout], responses, PAD)
    samples = Rollouts(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        response_mask=batch.response_mask,
        groups=batch.groups,
        sampler_logprobs=torch.zeros(batch.input_ids.shape),
        model_logprobs=torch.zeros(batch.input_ids.shape),
        finish_reasons=("stop",) * len(batch),
    )
    assert experiment.share_right(samples, data) == 0.25
