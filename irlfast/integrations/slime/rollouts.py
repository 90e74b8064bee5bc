"""Rollouts from SGLang in the form that `integrate_with_rollout` and `update_reward_model` take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from irlfast.rollout import RolloutEngine, SamplingParams


def generate_rollouts_with_sglang(
    engine: RolloutEngine,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any = None,
    num_samples: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> dict[str, Any]:
    """Sample responses with the hidden states that a reward reads.

    Args:
        engine: `irlfast.rollout.SGLangServerEngine` on servers that run, `SGLangEngine`, which starts one, or any other
            engine.
        prompts: texts, given a tokenizer, whose leading special tokens they get; or token ids.
        tokenizer: the policy's.
        num_samples: responses to each prompt.
        max_new_tokens, temperature, top_p, top_k: as for SamplingParams.

    Returns:
        Of K = len(prompts) * num_samples rows: hidden_states [K, S, H], mask [K, S], True on response tokens, actions
        [K, S], log_probs [K, S] under the sampler, groups [K], the prompt of each row; "rollouts", the Rollouts with
        all else; and with a tokenizer "responses", the K texts.

    Raises:
        ValueError: no prompts, or texts without a tokenizer. SGLangError: a server that does not answer.
    """
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    ids: list[list[int]] = []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, str) and tokenizer is None:
            raise ValueError(f"prompts[{number}] is text: give tokenizer=, or token ids")
        ids.append(list(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt))
    params = SamplingParams(
        n=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k
    )
    rollouts = engine.generate(ids, params, return_hidden_states=True)
    found: dict[str, Any] = {
        "rollouts": rollouts,
        "hidden_states": rollouts.hidden_states,
        "mask": rollouts.response_mask,
        "actions": rollouts.input_ids,
        "log_probs": rollouts.sampler_logprobs,
        "groups": rollouts.groups,
    }
    if tokenizer is not None:
        rows = zip(rollouts.input_ids, rollouts.response_mask, strict=True)
        found["responses"] = [tokenizer.decode(row[mask], skip_special_tokens=True) for row, mask in rows]
    return found
