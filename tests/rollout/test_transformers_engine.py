import copy
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from irlfast.rollout import RolloutEngine, Rollouts, SamplingParams, Sequences, TransformersEngine

EOS, PAD, VOCAB, CONTEXT = 2, 0, 64, 64
FAMILIES = ["gpt2", "llama", "mistral", "gemma2", "bloom", "opt"]
RAGGED = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17]]


def engine_for(model: nn.Module, **options) -> TransformersEngine:
    return TransformersEngine(model, **{"eos_token_id": EOS, "pad_token_id": PAD, **options})


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollouts.input_ids, rollouts.attention_mask, strict=True)]


def responses_of(rollouts: Rollouts) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollouts.input_ids, rollouts.response_mask, strict=True)]


class Markov(nn.Module):
    """A chain whose next-token logits are a table's row: no cache, no mask, no positions, and a plain tensor out."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids]


class NoCache(nn.Module):
    """A transformers model as it is seen by somebody who wrote down only two of its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.fixture(scope="module")
def stories(shared_data) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(shared_data / "models" / "stories260K").eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_hidden_states_equal_those_of_each_row_run_alone(make_lm, family):
    model = make_lm(family)
    # 24 rows that end at different steps, so the running batch is cut down on the way.
    params = SamplingParams(n=8, max_new_tokens=30, seed=3)
    rollouts = engine_for(model, eos_token_id=[2, 3, 4, 5, 6]).generate(RAGGED, params, return_hidden_states=True)
    assert rollouts.response_lengths.unique().numel() > 6
    for i, row in enumerate(rows_of(rollouts)):
        with torch.no_grad():
            output = model(torch.tensor([row]), output_hidden_states=True)
        logprobs = torch.log_softmax(output.logits[0, :-1].double(), -1)
        expected = logprobs.gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        response = rollouts.response_mask[i, 1 : len(row)]
        found = rollouts.model_logprobs[i, 1 : len(row)].double()
        torch.testing.assert_close(found[response], expected[response], atol=2e-5, rtol=0)
        states = rollouts.hidden_states[i, : len(row)]
        torch.testing.assert_close(states, output.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
    assert rollouts.hidden_states[~rollouts.attention_mask].abs().max() == 0.0


def test_logprobs_are_zero_outside_the_response(make_lm):
    rollouts = engine_for(make_lm("llama")).generate(RAGGED, SamplingParams(n=4, max_new_tokens=20, seed=0))
    for values in (rollouts.sampler_logprobs, rollouts.model_logprobs):
        assert values[~rollouts.response_mask].abs().max() == 0.0
        assert (values[rollouts.response_mask] < 0).all()


@pytest.mark.parametrize(
    "truncation",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9},
    ],
)
def test_sampler_logprobs_are_those_of_the_truncated_distribution(make_lm, truncation):
    model = make_lm("llama")
    params = SamplingParams(n=6, max_new_tokens=16, seed=1, **truncation)
    rollouts = engine_for(model).generate(RAGGED, params)
    double = copy.deepcopy(model).double()
    checked = 0
    for i, row in enumerate(rows_of(rollouts)):
        with torch.no_grad():
            scores = double(torch.tensor([row])).logits[0] / params.temperature
        for position in rollouts.response_mask[i].nonzero()[:, 0].tolist():
            ordered, ids = scores[position - 1].sort(descending=True)
            if params.top_k:
                ordered, ids = ordered[: params.top_k], ids[: params.top_k]
            mass = torch.softmax(ordered, 0).cumsum(0)
            size = int((mass < params.top_p).sum()) + 1
            logprobs = torch.log_softmax(ordered[:size], 0)
            place = (ids[:size] == row[position]).nonzero()
            assert place.numel() == 1, "the sampled token is outside the truncated distribution"
            assert float(rollouts.sampler_logprobs[i, position]) == pytest.approx(float(logprobs[place]), abs=2e-5)
            checked += 1
    assert checked > 100


def test_without_truncation_sampler_and_model_logprobs_are_the_same(make_lm):
    rollouts = engine_for(make_lm("gpt2")).generate(RAGGED, SamplingParams(seed=0, max_new_tokens=8))
    assert torch.equal(rollouts.sampler_logprobs, rollouts.model_logprobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_decodes_greedily_as_each_prompt_alone(make_lm, family):
    engine = engine_for(make_lm(family))
    params = SamplingParams(temperature=0, max_new_tokens=20)
    together = engine.generate(RAGGED, params)
    alone = [responses_of(engine.generate([prompt], params))[0] for prompt in RAGGED]
    assert responses_of(together) == alone
    assert together.sampler_logprobs.abs().max() == 0.0
    assert (together.model_logprobs[together.response_mask] < 0).all()


def test_greedy_decoding_on_a_real_model_is_that_of_transformers(stories, shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    prompts = tokenizer(["Once upon a time", "Lily and Tom went to the", "The"])["input_ids"]
    rollouts = engine_for(stories, eos_token_id=1).generate(prompts, SamplingParams(temperature=0, max_new_tokens=48))
    for prompt, response in zip(prompts, responses_of(rollouts), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = stories.generate(ids, attention_mask=mask, max_new_tokens=48, do_sample=False)
        assert response == whole[0, len(prompt) :].tolist()
    assert tokenizer.decode(rows_of(rollouts)[0], skip_special_tokens=True).startswith("Once upon a time, there was a")


def test_real_model_rollouts_equal_a_teacher_forced_pass(stories):
    prompts = [[1, 403, 407, 261, 378], [1, 410], [1]]
    engine = engine_for(stories, eos_token_id=1)
    params = SamplingParams(n=8, temperature=0.8, top_p=0.95, seed=0)
    rollouts = engine.generate(prompts, params, return_hidden_states=True)
    with torch.no_grad():
        output = stories(rollouts.input_ids, attention_mask=rollouts.attention_mask.long(), output_hidden_states=True)
    logprobs = torch.log_softmax(output.logits[:, :-1].double(), -1)
    logprobs = logprobs.gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
    response = rollouts.response_mask[:, 1:]
    torch.testing.assert_close(rollouts.model_logprobs[:, 1:].double()[response], logprobs[response], atol=1e-4, rtol=0)
    real = rollouts.attention_mask
    torch.testing.assert_close(rollouts.hidden_states[real], output.hidden_states[-1][real], atol=1e-5, rtol=1e-5)


def test_eos_is_the_last_token_of_a_response_and_part_of_it(make_lm):
    rollouts = engine_for(make_lm("llama")).generate([[5, 6]], SamplingParams(n=64, max_new_tokens=40, seed=0))
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for response, reason in zip(responses_of(rollouts), rollouts.finish_reasons, strict=True):
        assert response.count(EOS) == (reason == "stop")
        assert response[-1] == EOS if reason == "stop" else len(response) == 40
    ends = rollouts.input_ids.gather(1, rollouts.attention_mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (ends == EOS).tolist() == [reason == "stop" for reason in rollouts.finish_reasons]
    widths = rollouts.attention_mask.sum(1)
    assert rollouts.input_ids.shape[1] == int(widths.max())
    assert (rollouts.input_ids[~rollouts.attention_mask] == PAD).all()


def test_padding_with_the_eos_id_changes_nothing_but_the_padding(make_lm):
    params = SamplingParams(n=16, max_new_tokens=30, seed=0)
    first = engine_for(make_lm("gpt2")).generate(RAGGED, params)
    second = engine_for(make_lm("gpt2"), pad_token_id=EOS).generate(RAGGED, params)
    assert rows_of(first) == rows_of(second)
    assert first.finish_reasons == second.finish_reasons
    assert (second.input_ids[~second.attention_mask] == EOS).all()


def test_each_of_several_eos_ids_ends_a_response(make_lm):
    engine = engine_for(make_lm("llama"), eos_token_id=[EOS, 7, 9])
    responses = responses_of(engine.generate([[5, 6]], SamplingParams(n=64, max_new_tokens=40, seed=0)))
    assert {response[-1] for response in responses} >= {EOS, 7, 9}
    assert all(token not in (EOS, 7, 9) for response in responses for token in response[:-1])


def test_rows_are_prompt_major(make_lm):
    rollouts = engine_for(make_lm("llama")).generate(RAGGED, SamplingParams(n=3, max_new_tokens=4, seed=0))
    assert rollouts.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for i, row in enumerate(rows_of(rollouts)):
        prompt = RAGGED[i // 3]
        assert row[: len(prompt)] == prompt
        assert int(rollouts.prompt_lengths[i]) == len(prompt)
    assert len({tuple(response) for response in responses_of(rollouts)}) > 3


def test_a_seed_gives_the_same_samples_and_another_seed_others(make_lm):
    engine = engine_for(make_lm("llama"))
    draws = [
        rows_of(engine.generate(RAGGED, SamplingParams(n=4, max_new_tokens=10, seed=seed))) for seed in (0, 0, 1, None)
    ]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert draws[3] not in (draws[0], draws[2])


def test_without_a_seed_two_calls_differ_even_after_manual_seed(make_lm):
    engine = engine_for(make_lm("llama"))
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        draws.append(rows_of(engine.generate(RAGGED, SamplingParams(n=4, max_new_tokens=10))))
    assert draws[0] != draws[1]


def test_a_rows_samples_do_not_depend_on_the_other_prompts_or_on_max_batch_size(make_lm):
    model = make_lm("llama")
    params = SamplingParams(n=4, max_new_tokens=25, seed=5)
    whole = engine_for(model).generate(RAGGED, params)
    # 5 rows at once: chunks begin in the middle of a prompt's samples, and the last one is smaller.
    parts = engine_for(model, max_batch_size=5).generate(RAGGED, params, return_hidden_states=True)
    assert rows_of(whole) == rows_of(parts)
    assert whole.finish_reasons == parts.finish_reasons
    assert torch.equal(whole.groups, parts.groups)
    torch.testing.assert_close(whole.sampler_logprobs, parts.sampler_logprobs, atol=1e-5, rtol=0)
    other = engine_for(model).generate([RAGGED[0], [40, 41], [42]], params)
    assert rows_of(other)[:4] == rows_of(whole)[:4]


def test_the_global_random_state_is_untouched(make_lm):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for seed in (1, None):
        engine_for(make_lm("gpt2").train()).generate(RAGGED, SamplingParams(seed=seed, max_new_tokens=5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}])
def test_sampled_frequencies_match_the_distribution(params):
    # A chain over 7 tokens, EOS never: every transition is one draw from a known row. 99.9 % quantiles of chi-square.
    quantiles = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}
    torch.manual_seed(0)
    logits = torch.randn(7, 7)
    logits[:, EOS] = float("-inf")
    n, steps = 600, 12
    rollouts = engine_for(Markov(logits)).generate([[3]], SamplingParams(n=n, max_new_tokens=steps, seed=11, **params))
    assert (rollouts.response_lengths == steps).all()
    counts = torch.zeros(7, 7)
    pairs = torch.stack([rollouts.input_ids[:, :-1].flatten(), rollouts.input_ids[:, 1:].flatten()])
    counts.index_put_((pairs[0], pairs[1]), torch.ones(pairs.shape[1]), accumulate=True)
    assert counts.sum() == n * steps
    checked = 0
    for token in range(7):
        scores = logits[token].double() / params.get("temperature", 1.0)
        ordered, ids = scores.sort(descending=True)
        probabilities = torch.softmax(ordered, 0)
        keep = params.get("top_k", 7)
        keep = min(keep, int((probabilities.cumsum(0) < params.get("top_p", 1.0 + 1e-9)).sum()) + 1)
        allowed = ids[:keep][probabilities[:keep] > 0]
        total = counts[token].sum()
        if total < 300:
            continue
        expected = total * torch.softmax(scores[allowed], 0)
        assert counts[token].sum() == counts[token, allowed].sum(), "a token outside the truncated set was drawn"
        if len(allowed) > 1:
            chi_square = float(((counts[token, allowed] - expected).square() / expected).sum())
            assert chi_square < quantiles[len(allowed) - 1]
            checked += 1
    assert checked >= 2


def test_a_model_without_a_cache_gives_the_same_samples(make_lm):
    model = make_lm("llama")
    params = SamplingParams(n=6, max_new_tokens=20, seed=2, temperature=0.9, top_p=0.95)
    cached = engine_for(model).generate(RAGGED, params)
    plain = engine_for(NoCache(model)).generate(RAGGED, params)
    assert rows_of(cached) == rows_of(plain)
    torch.testing.assert_close(cached.sampler_logprobs, plain.sampler_logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(cached.model_logprobs, plain.model_logprobs, atol=2e-5, rtol=0)


def test_a_model_that_takes_a_cache_but_returns_none_is_run_on_the_whole_prefix(make_lm):
    class Forgetful(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)

    model = make_lm("llama")
    params = SamplingParams(n=2, max_new_tokens=10, seed=2)
    expected = engine_for(model).generate(RAGGED, params)
    assert rows_of(engine_for(Forgetful(model)).generate(RAGGED, params)) == rows_of(expected)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_passed_by_the_name_that_the_model_gives_it(make_lm, name):
    """transformers 5.24 calls `cache` what older versions, and other models, call `past_key_values`."""
    inner = make_lm("llama")
    own = "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def run(self, input_ids, attention_mask, position_ids, cache, use_cache):
            inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
            output = self.inner(input_ids=input_ids, **inputs, **{own: cache})
            return SimpleNamespace(logits=output.logits, **{name: getattr(output, own)})

    class New(Renamed):
        def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None):
            return self.run(input_ids, attention_mask, position_ids, cache, use_cache)

    class Old(Renamed):
        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
            return self.run(input_ids, attention_mask, position_ids, past_key_values, use_cache)

    model = New() if name == "cache" else Old()
    params = SamplingParams(n=2, max_new_tokens=10, seed=2)
    expected = engine_for(inner).generate(RAGGED, params)
    calls = Calls(model)
    assert rows_of(engine_for(model).generate(RAGGED, params)) == rows_of(expected)
    assert {width for _, width in calls.shapes[1:]} == {1}


class Calls:
    """Rows and columns of each forward call of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_each_prompt_is_read_once_and_each_step_reads_one_token(make_lm):
    model = make_lm("llama")
    calls = Calls(model)
    engine_for(model, eos_token_id=63).generate(RAGGED, SamplingParams(n=4, max_new_tokens=5, seed=0))
    assert calls.shapes[0] == (3, 9)
    assert len(calls.shapes) == 5  # the last sampled token is not read again
    assert {width for _, width in calls.shapes[1:]} == {1}


def test_ended_rows_leave_the_batch_and_sampling_stops_with_the_last_row(make_lm):
    model = make_lm("llama")
    calls = Calls(model)
    ends = list(range(2, 34))
    engine = engine_for(model, eos_token_id=ends)
    rollouts = engine.generate([[40, 41]], SamplingParams(n=32, max_new_tokens=60, seed=0))
    sizes = [rows for rows, _ in calls.shapes[1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 16
    assert len(calls.shapes) == int(rollouts.response_lengths.max()) < 60


@pytest.mark.parametrize("fail", [False, True])
def test_dropout_is_off_and_every_submodule_gets_its_mode_back(make_lm, fail):
    model = make_lm("gpt2").train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    params = SamplingParams(max_new_tokens=8, seed=0)
    if fail:
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"NaN logits for row 0 \(prompt 0\)"):
            engine_for(model).generate(RAGGED, params)
    else:
        expected = engine_for(make_lm("gpt2")).generate(RAGGED, params, return_hidden_states=True)
        found = engine_for(model).generate(RAGGED, params, return_hidden_states=True)
        assert torch.equal(found.model_logprobs, expected.model_logprobs)
        assert torch.equal(found.hidden_states, expected.hidden_states)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_results_are_ordinary_tensors_that_autograd_may_use(make_lm):
    model = make_lm("llama")
    rollouts = engine_for(model).generate(RAGGED, SamplingParams(max_new_tokens=4), return_hidden_states=True)
    tensors = [getattr(rollouts, name) for name in rollouts.__dataclass_fields__ if name != "finish_reasons"]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)
    weight = torch.ones((), requires_grad=True)
    (weight * rollouts.model_logprobs.sum() + weight * rollouts.hidden_states.sum()).backward()
    assert float(weight.grad) == pytest.approx(float(rollouts.model_logprobs.sum() + rollouts.hidden_states.sum()))
    logits = model(rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_engine_sees_what_an_optimiser_does_to_the_shared_module(make_lm):
    model = make_lm("llama")
    engine = engine_for(model)
    greedy = SamplingParams(temperature=0, max_new_tokens=6)
    engine.generate(RAGGED, greedy)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    engine.update_weights(None, version=3)
    assert engine.version == 3
    after = engine.generate(RAGGED, greedy)
    assert after.model_logprobs[after.response_mask].tolist() == pytest.approx([-math.log(VOCAB)] * 18)


def test_update_weights_loads_a_state_dict(make_lm):
    model, other = make_lm("llama"), make_lm("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    params = SamplingParams(seed=0, n=4, max_new_tokens=12)
    engine = engine_for(model)
    engine.update_weights(other.state_dict(), version=1)
    assert torch.equal(
        engine.generate(RAGGED, params).model_logprobs, engine_for(other).generate(RAGGED, params).model_logprobs
    )


def test_update_weights_takes_a_tied_weight_under_one_name(make_lm):
    model, other = make_lm("gpt2"), make_lm("gpt2")
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    with torch.no_grad():
        other.transformer.wte.weight.add_(1.0)
    weights = {name: value for name, value in other.state_dict().items() if name != "lm_head.weight"}
    engine_for(model).update_weights(weights, version=1)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_change_nothing(make_lm, fault):
    model = make_lm("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items()}
    name = "model.norm.weight"
    if fault == "missing":
        del weights[name]
        message = r"missing \['model.norm.weight'\]"
    elif fault == "unknown":
        weights["model.extra"] = torch.zeros(1)
        message = r"unknown \['model.extra'\]"
    else:
        weights[name] = torch.zeros(3)
        message = r"state_dict\['model.norm.weight'\] has shape \[3\], the model \[32\]"
    engine = engine_for(model)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(weights, version=7)
    assert engine.version == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_closed_engine_says_so(make_lm):
    engine = engine_for(make_lm("llama"))
    engine.close()
    with pytest.raises(RuntimeError, match="this engine was closed"):
        engine.generate(RAGGED, SamplingParams())


def test_it_is_a_rollout_engine(make_lm):
    assert isinstance(engine_for(make_lm("llama")), RolloutEngine)


def test_hidden_states_of_demonstrations_equal_those_of_rollouts(make_lm):
    engine = engine_for(make_lm("llama"))
    rollouts = engine.generate(RAGGED, SamplingParams(seed=0, max_new_tokens=6), return_hidden_states=True)
    lists = [(row[: len(p)], row[len(p) :]) for row, p in zip(rows_of(rollouts), RAGGED, strict=True)]
    same = Sequences.from_token_lists([p for p, _ in lists], [r for _, r in lists], pad_id=PAD)
    assert torch.equal(engine.hidden_states(same), rollouts.hidden_states)
    with pytest.raises(ValueError, match="sequences is empty"):
        engine.hidden_states(same.select([]))


def test_a_module_without_hidden_states_is_told_what_is_missing():
    engine = engine_for(Markov(torch.zeros(7, 7)))
    with pytest.raises(TypeError, match="Markov gives no hidden states: its forward must take output_hidden_states"):
        engine.generate([[3]], SamplingParams(max_new_tokens=2), return_hidden_states=True)


def test_autocast_computes_in_the_given_dtype_and_leaves_the_module_alone(make_lm):
    model = make_lm("llama")
    params = SamplingParams(max_new_tokens=4, temperature=0)
    full = engine_for(model).generate(RAGGED, params, return_hidden_states=True)
    half = engine_for(model, dtype=torch.bfloat16).generate(RAGGED, params, return_hidden_states=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert half.model_logprobs.dtype == torch.float32
    difference = (half.hidden_states[:, 0] - full.hidden_states[:, 0]).abs().max()
    assert 0 < difference < 0.3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts is empty"),
        ([[5], []], r"prompts\[1\] is empty"),
        ([[5, 64]], r"prompts\[0\]\[1\] = 64 is outside the vocabulary \[0, 64\)"),
        ([[5], [-1]], r"prompts\[1\]\[0\] = -1 is outside the vocabulary"),
        (
            [[5], [5] * 61],
            r"prompts\[1\] has 61 tokens; with max_new_tokens = 4 that exceeds the model's context of 64",
        ),
    ],
)
def test_bad_prompts_are_refused_before_any_work(make_lm, prompts, message):
    model = make_lm("gpt2")
    calls = Calls(model)
    with pytest.raises(ValueError, match=message):
        engine_for(model).generate(prompts, SamplingParams(max_new_tokens=4))
    assert calls.shapes == []


def test_the_whole_context_can_be_used(make_lm):
    rollouts = engine_for(make_lm("gpt2"), eos_token_id=63).generate(
        [[5] * 60], SamplingParams(max_new_tokens=4, temperature=0), return_hidden_states=True
    )
    assert rollouts.hidden_states.shape == (1, CONTEXT, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_token_id": VOCAB}, r"eos_token_id = 64 is outside the vocabulary \[0, 64\)"),
        ({"eos_token_id": []}, "eos_token_id is empty"),
        ({"eos_token_id": None}, "eos_token_id is None"),
        ({"pad_token_id": -1}, "pad_token_id = -1 is outside the vocabulary"),
        ({"pad_token_id": None}, "pad_token_id = None is outside the vocabulary"),
        ({"max_batch_size": 0}, "max_batch_size must be at least 1"),
        ({"device": "meta"}, "device = meta, but the model is on cpu: move the model first"),
    ],
)
def test_bad_options_are_refused(make_lm, options, message):
    with pytest.raises(ValueError, match=message):
        engine_for(make_lm("llama"), **options)


def test_encoder_decoder_models_are_refused():
    class Config:
        is_encoder_decoder = True

    model = Markov(torch.zeros(7, 7))
    model.config = Config()
    with pytest.raises(ValueError, match="Markov is an encoder-decoder model"):
        engine_for(model)
