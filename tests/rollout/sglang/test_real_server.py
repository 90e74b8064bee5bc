"""SGLangEngine on a real SGLang and a real language model, set beside TransformersEngine on the same weights."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_checks import EOS, PAD, assert_as_exact, assert_close, assert_sampled_apart, changed, logits_of, logprobs_of

from irlfast.integrations import slime
from irlfast.losses import policy_loss
from irlfast.rollout import Rollouts, SamplingParams, SGLangEngine, SGLangServerEngine, TransformersEngine


def transformers_engine(policy: Any) -> TransformersEngine:
    return TransformersEngine(policy, eos_token_id=EOS, pad_token_id=PAD)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_hidden_states_are_those_of_transformers(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=24, n=3, temperature=temperature)
    rollouts = engine.generate(prompts, params, return_hidden_states=True)
    assert len(rollouts) == 24
    assert rollouts.groups.tolist() == [i // 3 for i in range(24)]
    for row, prompt in enumerate(prompts):
        assert rollouts.input_ids[3 * row, : len(prompt)].tolist() == prompt
    single = [logprobs_of(policy, rollouts, t) for t in (1.0, temperature)]
    states = transformers_engine(policy).hidden_states(rollouts)
    policy.double()
    exact = [logprobs_of(policy, rollouts, t) for t in (1.0, temperature)]
    exact_states = transformers_engine(policy).hidden_states(rollouts)
    policy.float()
    assert_as_exact(rollouts.model_logprobs, single[0], exact[0])
    assert_as_exact(rollouts.sampler_logprobs, single[1], exact[1])
    assert rollouts.hidden_states is not None
    assert_as_exact(rollouts.hidden_states, states, exact_states)
    assert_sampled_apart(rollouts, 3)


def test_logprobs_are_those_of_transformers_without_hidden_states(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]]
) -> None:
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=40, n=4))
    assert_close(rollouts.model_logprobs, logprobs_of(policy, rollouts))
    assert torch.equal(rollouts.model_logprobs, rollouts.sampler_logprobs)
    assert rollouts.hidden_states is None
    # Sampled, not chosen: the tokens' own log-prob is near the entropy of what they were drawn from.
    distribution = torch.distributions.Categorical(logits=logits_of(policy, rollouts)[rollouts.response_mask])
    surprise = -float(rollouts.model_logprobs[rollouts.response_mask].mean())
    assert surprise == pytest.approx(float(distribution.entropy().mean()), abs=0.15)


def test_first_tokens_are_drawn_from_the_model(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    """1,024 draws by a chi-square test, which notices another temperature."""
    stats = pytest.importorskip("scipy.stats")
    rollouts = engine.generate([prompts[-1]] * 32, SamplingParams(max_new_tokens=1, n=32))
    drawn = rollouts.input_ids[rollouts.response_mask]
    with torch.no_grad():
        logits = policy(torch.tensor([prompts[-1]])).logits[0, -1].double()

    def p_value(temperature: float) -> float:
        expected = torch.softmax(logits / temperature, -1) * len(drawn)
        counts = torch.bincount(drawn, minlength=len(expected)).double()
        usual = expected >= 5
        found, wanted = (torch.cat([x[usual], x[~usual].sum()[None]]).numpy() for x in (counts, expected))
        return float(stats.chisquare(found, wanted).pvalue)

    assert len(drawn) == 1024
    assert p_value(1.0) > 1e-6
    assert p_value(1.6) < 1e-6


def test_greedy_decoding_is_that_of_transformers(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_new_tokens=16, temperature=0.0)
    found, expected = engine.generate(prompts, params), transformers_engine(policy).generate(prompts, params)
    assert torch.equal(found.input_ids, expected.input_ids)
    assert found.finish_reasons == expected.finish_reasons
    assert_close(found.model_logprobs, expected.model_logprobs)
    assert float(found.sampler_logprobs.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("top_p", "top_k", "temperature"), [(0.8, 0, 1.0), (1.0, 5, 1.0), (0.9, 8, 1.3)], ids=["top_p", "top_k", "both"]
)
def test_truncated_sampling_reports_the_renormalised_logprobs(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], top_p: float, top_k: int, temperature: float
) -> None:
    params = SamplingParams(max_new_tokens=12, n=3, top_p=top_p, top_k=top_k, temperature=temperature)
    rollouts = engine.generate(prompts, params)
    probs = torch.softmax(logits_of(policy, rollouts)[rollouts.response_mask].double() / temperature, -1)
    mass, order = probs.sort(descending=True)
    kept = mass.cumsum(-1) - mass <= top_p  # SGLang's rule: top-p speaks of all tokens, whatever top-k leaves
    if top_k:
        kept[:, top_k:] = False
    truncated = torch.zeros_like(probs).scatter(-1, order, torch.where(kept, mass, 0.0))
    expected = (truncated / truncated.sum(-1, keepdim=True)).gather(
        -1, rollouts.input_ids[rollouts.response_mask][:, None]
    )
    assert_close(rollouts.sampler_logprobs[rollouts.response_mask], expected[:, 0].log().float())
    assert_close(rollouts.model_logprobs, logprobs_of(policy, rollouts))
    assert_sampled_apart(rollouts, 3)


def test_pooled_hidden_states(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=10))
    whole = transformers_engine(policy).hidden_states(rollouts)
    assert_close(engine.hidden_states(rollouts), whole)
    last = rollouts.attention_mask.sum(1) - 1
    assert_close(engine.hidden_states(rollouts, pooling="last"), whole[torch.arange(len(rollouts)), last])
    mask = rollouts.response_mask[..., None]
    assert_close(engine.hidden_states(rollouts, pooling="mean"), (whole * mask).sum(1) / mask.sum(1))


def test_responses_end_at_any_of_the_eos_ids(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    """With a frequent token among them, so that some responses end; EOS belongs to the response."""
    params = SamplingParams(max_new_tokens=6, n=4)
    free = engine.generate(prompts, params)
    frequent = int(free.input_ids[free.response_mask].mode().values)
    attached = SGLangServerEngine(
        [engine.server.url], eos_token_id=[EOS, frequent], pad_token_id=PAD, config=policy.config
    )
    try:
        rollouts = attached.generate(prompts, params, return_hidden_states=True)
    finally:
        attached.close()
    assert set(rollouts.finish_reasons) == {"stop", "length"}
    for row, reason in enumerate(rollouts.finish_reasons):
        response = rollouts.input_ids[row][rollouts.response_mask[row]].tolist()
        assert (response[-1] in (EOS, frequent)) == (reason == "stop")
        assert frequent not in response[:-1]
        assert len(response) == 6 or reason == "stop"
    assert_close(rollouts.model_logprobs, logprobs_of(policy, rollouts))
    assert_close(rollouts.hidden_states, transformers_engine(policy).hidden_states(rollouts))


def test_equal_tokens_give_equal_losses(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    """A policy step on SGLang's rollouts is the step on the same tokens as TransformersEngine reports them."""
    rollouts = engine.generate(prompts, SamplingParams(max_new_tokens=24, n=2))
    advantages = torch.linspace(-1, 1, len(rollouts))
    losses, gradients = [], []
    for sampler in (rollouts.sampler_logprobs, logprobs_of(policy, rollouts)):
        policy.zero_grad()
        logits = policy(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits
        logprobs = torch.log_softmax(logits[:, :-1], -1).gather(-1, rollouts.input_ids[:, 1:, None])[..., 0]
        logprobs = torch.nn.functional.pad(logprobs, (1, 0))
        loss = policy_loss(
            logprobs, advantages, rollouts.response_mask, kind="ppo", old_logprobs=logprobs.detach(),
            rollout_logprobs=sampler, tis_cap=2.0,
        ).loss  # fmt: skip
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(policy.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_close(gradients[0], gradients[1])


# Weights


@pytest.mark.parametrize("way", ["tensors", "disk"])
def test_updates_change_what_is_generated(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], tmp_path: Path, way: str
) -> None:
    greedy = SamplingParams(max_new_tokens=12, temperature=0.0)
    before = engine.generate(prompts, greedy)
    # A whole prompt is in the server's cache now, under the weights that are about to go.
    changed(policy, 0.3)
    if way == "tensors":
        engine.update_weights(None, 5)
    else:
        policy.save_pretrained(tmp_path / "model")
        engine.update_weights_from_disk(tmp_path / "model", 5)
    assert engine.version == 5
    after = engine.generate(prompts, greedy)
    assert not torch.equal(after.input_ids, before.input_ids)
    assert_close(after.model_logprobs, logprobs_of(policy, after))
    assert after.versions is not None
    assert set(after.versions[after.response_mask].tolist()) == {5}


def test_weights_through_a_folder_are_those_over_http(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    changed(policy)
    attached = SGLangServerEngine(
        [engine.server.url], eos_token_id=EOS, pad_token_id=PAD, policy=policy, weights_folder=tmp_path
    )
    try:
        for version in (1, 2, 3):
            attached.update_weights(None, version)
        rollouts = attached.generate(prompts, SamplingParams(max_new_tokens=12))
        assert_close(rollouts.model_logprobs, logprobs_of(policy, rollouts))
        assert len(list(tmp_path.iterdir())) == 1  # what is served stays, what is past goes
    finally:
        attached.close()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks transformers for it
def test_a_lora_policy_is_merged_on_the_way(engine: SGLangEngine, policy: Any, prompts: list[list[int]]) -> None:
    peft = pytest.importorskip("peft")
    import copy

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(copy.deepcopy(policy), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    attached = SGLangServerEngine([engine.server.url], eos_token_id=EOS, pad_token_id=PAD, policy=adapted)
    try:
        attached.update_weights(None, 1)
        rollouts = attached.generate(prompts, SamplingParams(max_new_tokens=12))
    finally:
        attached.close()
    assert_close(rollouts.model_logprobs, logprobs_of(adapted, rollouts))
    assert float((logprobs_of(policy, rollouts) - rollouts.model_logprobs).abs().max()) > 0.1


def test_an_update_in_flight_is_seen_token_by_token(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], load_stories: Callable[[], Any]
) -> None:
    """Responses that were under way go on under the new weights, and each token's log-prob is its own weights'."""
    results: list[Rollouts] = []
    params = SamplingParams(max_new_tokens=300, n=4)
    engine.update_weights(None, 1)
    old = load_stories()
    thread = threading.Thread(target=lambda: results.append(engine.generate(prompts, params)))
    thread.start()
    time.sleep(0.7)
    changed(policy, 0.1)
    engine.update_weights(None, 2)
    thread.join()
    rollouts = results[0]
    versions = rollouts.versions
    assert versions is not None
    assert set(versions[rollouts.response_mask].tolist()) == {1, 2}
    for version, model in ((1, old), (2, policy)):
        mine = rollouts.response_mask & (versions == version)
        # Which weights a token is from, not the last digit: at 300 tokens both round by some 3e-5, others' are 0.1 off.
        assert_close(rollouts.model_logprobs[mine], logprobs_of(model, rollouts)[mine], 1e-4)
    # And not the other's: what was cached under the old weights was read again.
    late = rollouts.response_mask & (versions == 2)
    assert float((logprobs_of(old, rollouts) - rollouts.model_logprobs)[late].abs().max()) > 0.1


def test_the_check_after_an_update_notices_weights_that_did_not_arrive(
    engine: SGLangEngine, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deliberate break: the server is told of an update and given the old tensors."""
    from irlfast.rollout.sglang.client import SGLangClient

    old = {name: value.clone() for name, value in policy.state_dict().items()}
    send = SGLangClient.load_tensors

    async def send_old(self: SGLangClient, tensors: Any, **named: Any) -> None:
        await send(self, [(name, old[name]) for name, _ in tensors], **named)

    monkeypatch.setattr(SGLangClient, "load_tensors", send_old)
    changed(policy)
    with pytest.raises(RuntimeError, match="scores a fixed prompt otherwise than the policy does"):
        engine.update_weights(None, 3)


# Refused before it is sent: each of these would end the server, or be ignored by it.


def test_wrong_weights_are_refused_before_they_are_sent(engine: SGLangEngine, policy: Any, tmp_path: Path) -> None:
    state = {name: value for name, value in policy.state_dict().items() if name != "lm_head.weight"}  # tied
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=rf"{name} has shape \[171, 64\], the served model \[172, 64\]; nothing was"):
        engine.update_weights({**state, name: state[name][:-1]}, 1)
    with pytest.raises(ValueError, match=r"unknown \['model.layers.0.mlp.extra'\]; nothing was sent"):
        engine.update_weights({**state, "model.layers.0.mlp.extra": state[name]}, 1)
    with pytest.raises(ValueError, match=rf"missing \['{name}'\]"):
        engine.update_weights({key: value for key, value in state.items() if key != name}, 1)
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors"):
        engine.update_weights_from_disk(tmp_path, 1)
    with torch.no_grad():
        policy.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match=r"model.norm.weight of the policy is not finite"):
        engine.update_weights(None, 1)
    assert engine.version == 0
    engine.update_weights(state, 1)  # and the server is there


def test_bad_prompts_are_refused_before_they_are_sent(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]]
) -> None:
    few = SamplingParams(max_new_tokens=4)
    with pytest.raises(ValueError, match=r"prompts\[1\]\[2\] = 512 is outside the vocabulary \[0, 512\); nothing was"):
        engine.generate([prompts[0], [1, 2, 512]], few)
    with pytest.raises(ValueError, match=r"prompts\[0\]\[0\] = -1 is outside"):
        engine.generate([[-1]], few)
    with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
        engine.generate([[]], few)
    assert len(engine.generate(prompts, few)) == len(prompts)


def test_the_longest_rows_that_are_accepted_are_whole(engine: SGLangEngine, policy: Any) -> None:
    """At a context of 512: prompts of 505 tokens and rows of 510; SGLang would cut longer ones short and not say so."""
    prompt = [1 + i % 500 for i in range(505)]
    full = engine.generate([prompt], SamplingParams(max_new_tokens=5))
    assert full.response_lengths.tolist() == [5]
    scored = engine.generate([prompt[:495]], SamplingParams(max_new_tokens=10, temperature=0.5))
    assert_close(scored.model_logprobs, logprobs_of(policy, scored))
    for length, tokens, temperature in ((506, 1, 1.0), (505, 6, 1.0), (495, 11, 0.5)):
        with pytest.raises(ValueError, match="exceeds what the server takes"):
            engine.generate([prompt[:1] * length], SamplingParams(max_new_tokens=tokens, temperature=temperature))


def test_the_functions_of_bi_level_irl_take_its_rollouts(
    engine: SGLangEngine, policy: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    found = slime.generate_rollouts_with_sglang(engine, prompts, num_samples=2, max_new_tokens=6)
    states = transformers_engine(policy).hidden_states(found["rollouts"])
    assert_close(found["hidden_states"][found["mask"]], states[found["mask"]])
    assert found["groups"].tolist() == [i // 2 for i in range(2 * len(prompts))]
    experts = [{"hidden_states": torch.randn(3, states.shape[2]), "actions": torch.tensor([5, 6, EOS])}] * 4
    torch.save(experts, tmp_path / "experts.pt")
    optimizer = slime.setup_bi_level_irl(
        expert_dataloader=slime.load_expert_demonstrations(tmp_path / "experts.pt", batch_size=4, eos_token_id=EOS)
    )
    rewards = slime.integrate_with_rollout(optimizer, found)["rewards"]
    assert rewards.shape == (2 * len(prompts),)
    metrics = optimizer.update_reward_model(policy_rollouts=found)
    again = slime.integrate_with_rollout(optimizer, found)["rewards"]
    assert metrics["policy_loss"] == metrics["sample_reward"]
    assert not torch.equal(again, rewards)
