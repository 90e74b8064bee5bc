"""A language of 121 strings on which everything inverse RL estimates can be summed exactly.

Bodies are up to four tokens of {0, 1, 2}; EOS ends a string and is forced after the fourth body token. The reward of
a string y is linear in five features and the expert is its softmax,

    phi(y) = [#0, #1, #(0 immediately followed by 1), length, first token is 2]
    R(y) = phi(y) . (.8, -.6, 1.2, -.3, .9),      p_E(y) = exp(R(y) - log Z),

so log Z = 5.2524, the expert's entropy is 4.2936 nats and its mean reward is .9588. To a trainer the toy is a language
model: `ToyPolicy` is called like a Hugging Face causal LM, the prompt is the single token BOS, and the last hidden
state at every position is phi of the prefix read so far, so that pooling the last real token yields phi(y).

Prefixes are numbered as a heap: the empty one is 0 and prefix i followed by token t is 3 i + 1 + t. Those numbers,
0 to 120, name the strings as well (a string is its body) and order every tensor of length 121 in this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

BODY_TOKENS = 3
EOS = 3
BOS = 4
PAD = 5
VOCAB_SIZE = 6
MAX_BODY = 4
MAX_RESPONSE = MAX_BODY + 1  # EOS is part of the response

NUM_STRINGS = sum(BODY_TOKENS**length for length in range(MAX_BODY + 1))
NUM_OPEN_PREFIXES = sum(BODY_TOKENS**length for length in range(MAX_BODY))  # those with a choice left to make

FEATURE_NAMES = ("count_0", "count_1", "count_01", "length", "starts_with_2")
NUM_FEATURES = len(FEATURE_NAMES)
TRUE_WEIGHTS = (0.8, -0.6, 1.2, -0.3, 0.9)


def all_strings() -> tuple[tuple[int, ...], ...]:
    """The 121 responses, each a body followed by EOS, in the order of this module."""
    bodies: list[tuple[int, ...]] = [()]
    for i in range(NUM_OPEN_PREFIXES):
        bodies.extend((*bodies[i], t) for t in range(BODY_TOKENS))
    return tuple((*body, EOS) for body in bodies)


def all_input_ids(device: torch.device | str | None = None) -> Tensor:
    """The 121 strings as model input: [121, 6] int64 rows of BOS, body, EOS, right-padded with PAD."""
    ids = torch.full((NUM_STRINGS, 1 + MAX_RESPONSE), PAD, dtype=torch.int64, device=device)
    ids[:, 0] = BOS
    for row, response in enumerate(all_strings()):
        ids[row, 1 : 1 + len(response)] = torch.tensor(response, device=device)
    return ids


def features(*, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """phi of the 121 strings (equally, of the 121 prefixes): [121, 5]."""
    rows = []
    for *body, _ in all_strings():
        pairs = sum(a == 0 and b == 1 for a, b in pairwise(body))
        rows.append([body.count(0), body.count(1), pairs, len(body), float(body[:1] == [2])])
    return torch.tensor(rows, dtype=dtype, device=device)


def true_rewards() -> Tensor:
    """R of the 121 strings: [121] float64."""
    return features() @ torch.tensor(TRUE_WEIGHTS, dtype=torch.float64)


def expert_log_probs() -> Tensor:
    """log p_E of the 121 strings: [121] float64."""
    return torch.log_softmax(true_rewards(), dim=0)


def sample_strings(count: int, *, seed: int, log_probs: Tensor | None = None) -> Tensor:
    """`count` string numbers drawn with replacement from `log_probs` [121], the expert's by default: [count] int64.

    The same seed gives the same strings; torch's global generator is neither read nor advanced.
    """
    if count < 1:
        raise ValueError(f"count is {count}; expected at least 1 string to sample")
    log_probs = expert_log_probs() if log_probs is None else log_probs.detach().double().cpu()
    _require_one_per_string("log_probs", log_probs)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(log_probs.exp(), count, replacement=True, generator=generator)


class RewardRecovery(NamedTuple):
    """How close a learned reward is to the true one.

    pearson: correlation of learned and true reward over the 121 strings, each counted once. Blind to scale and shift.
    tv: total variation between softmax(learned / beta) and p_E; 0 is perfect, 1 is disjoint. Blind to shift alone.
    Gate them together: code that merely ranks strings by their frequency passes either one by itself.
    """

    pearson: float
    tv: float


def reward_recovery(learned_rewards: Tensor, *, beta: float = 1.0) -> RewardRecovery:
    """Compare `learned_rewards` [121] (raw rewards, in the order of this module) with the truth.

    A constant reward has no correlation with anything; its pearson is reported as 0.
    """
    learned = learned_rewards.detach().double().cpu()
    _require_one_per_string("learned_rewards", learned)
    if beta <= 0:
        raise ValueError(f"beta is {beta}; expected a positive temperature of the reward")
    if not torch.isfinite(learned).all():
        row = int((~torch.isfinite(learned)).nonzero()[0, 0])
        raise ValueError(f"learned_rewards[{row}] is {float(learned[row])}; every reward must be finite")
    truth = true_rewards()
    a, b = learned - learned.mean(), truth - truth.mean()
    scale = a.norm() * b.norm()
    # Rounding leaves a constant reward with a norm of the order of its last digit, not exactly zero.
    constant = bool(a.abs().max() <= 1e-12 * learned.abs().max())
    pearson = 0.0 if constant else float(a @ b / scale)
    tv = 0.5 * float((torch.softmax(learned / beta, dim=0) - expert_log_probs().exp()).abs().sum())
    return RewardRecovery(pearson, tv)


class ReadPrefixes(NamedTuple):
    """Per position: `prefix` [B, S] int64, the number of the body read so far; `ended` [B, S] bool, EOS was read."""

    prefix: Tensor
    ended: Tensor


def read_prefixes(input_ids: Tensor, attention_mask: Tensor | None = None) -> ReadPrefixes:
    """Number the prefix that each position of `input_ids` [B, S] has read, that position included.

    BOS, PAD, whatever follows EOS and whatever `attention_mask` [B, S] excludes leave the prefix as it was, so padding
    may stand on either side. More than four body tokens, or a token outside [0, 6), is a ValueError.
    """
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; expected [batch, length]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    outside = real & ((input_ids < 0) | (input_ids >= VOCAB_SIZE))
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(f"input_ids[{row}, {column}] = {int(input_ids[row, column])} is outside [0, {VOCAB_SIZE})")
    ended = (real & (input_ids == EOS)).cumsum(dim=1) > 0
    body = real & (input_ids < BODY_TOKENS) & ~ended
    depth = body.cumsum(dim=1)
    if (depth > MAX_BODY).any():
        row = int((depth > MAX_BODY).any(dim=1).nonzero()[0, 0])
        raise ValueError(f"input_ids[{row}] has {int(depth[row, -1])} body tokens; the language allows {MAX_BODY}")
    # Unrolling child = 3 parent + 1 + t gives prefix_k = sum_j (t_j + 1) 3^(k - j). The sum is kept scaled by
    # 3^(4 - k), which makes it one cumulative sum of integers and the division exact.
    scale = BODY_TOKENS ** (MAX_BODY - depth)
    total = torch.where(body, (input_ids + 1) * scale, 0).cumsum(dim=1)
    return ReadPrefixes(total // scale, ended)


def string_indices(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The number of the string in each row of `input_ids` [B, S]: [B] int64. A row without EOS is a ValueError."""
    prefix, ended = read_prefixes(input_ids, attention_mask)
    if input_ids.shape[1] == 0 or not ended[:, -1].all():
        row = 0 if input_ids.shape[1] == 0 else int((~ended[:, -1]).nonzero()[0, 0])
        raise ValueError(f"input_ids[{row}] has no EOS (token {EOS}); only a finished response is a string")
    return prefix[:, -1]


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """What samplers and trainers read from a causal LM's `config`."""

    model_type: str = "toy"
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = NUM_FEATURES
    max_position_embeddings: int = 1 + MAX_RESPONSE
    bos_token_id: int = BOS
    eos_token_id: int = EOS
    pad_token_id: int = PAD


@dataclass(frozen=True, kw_only=True)
class ToyOutput:
    """logits [B, S, 6]; hidden_states a tuple of one [B, S, 5] tensor where asked for; there is never a cache."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: None = None


class ToyFeatures(nn.Module):
    """phi of the prefix at each position, for a reward model that pools the last real token."""

    table: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.register_buffer("table", features(dtype=dtype), persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids [B, S], attention_mask [B, S] -> [B, S, 5]. At EOS and after it, phi of the whole string."""
        return self.table[read_prefixes(input_ids, attention_mask).prefix]


class ToyPolicy(nn.Module):
    """Every policy over the 121 strings: one free logit for each next token of each of the 40 open prefixes.

    `table` [40, 4] holds the logits of 0, 1, 2 and EOS and starts at zero: uniform over the four. BOS and PAD have
    logit -inf everywhere, and after four body tokens (or once EOS was read) EOS is the only token left.
    """

    forced: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = ToyConfig()
        self.features = ToyFeatures(dtype=dtype)
        self.table = nn.Parameter(torch.zeros(NUM_OPEN_PREFIXES, BODY_TOKENS + 1, dtype=dtype))
        forced = torch.full((1, VOCAB_SIZE), -torch.inf, dtype=dtype)
        forced[0, EOS] = 0.0
        self.register_buffer("forced", forced, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> ToyOutput:
        """Called as Hugging Face causal LMs are: logits[b, s] is over the token after position s.

        input_ids [B, S] and attention_mask [B, S] hold the whole text so far: the policy looks a prefix up, it has no
        cache to extend, and says so where `past_key_values` is given. position_ids and use_cache change nothing.
        logits_to_keep: only the logits of so many last positions (0: all of them).
        """
        if past_key_values is not None:
            raise ValueError("ToyPolicy keeps no cache: pass the whole text in input_ids and past_key_values=None")
        if return_dict is False:
            raise ValueError("return_dict=False is not available: ToyPolicy returns an object with named fields")
        prefix, ended = read_prefixes(input_ids, attention_mask)
        row = torch.where(ended, NUM_OPEN_PREFIXES, prefix.clamp(max=NUM_OPEN_PREFIXES))
        open_rows = nn.functional.pad(self.table, (0, VOCAB_SIZE - BODY_TOKENS - 1), value=-torch.inf)
        logits = nn.functional.embedding(row[:, -logits_to_keep:], torch.cat([open_rows, self.forced]))
        hidden = (self.features.table[prefix],) if output_hidden_states else None
        return ToyOutput(logits=logits, hidden_states=hidden)


@torch.no_grad()
def policy_of(log_probs: Tensor, *, dtype: torch.dtype = torch.float32) -> ToyPolicy:
    """The policy whose strings have these log-probs [121] (up to a constant): `expert_log_probs()` makes the expert."""
    _require_one_per_string("log_probs", log_probs)
    # Mass of all strings that begin with a prefix; that of a full prefix is its own string's.
    mass = log_probs.detach().double().cpu().clone()
    policy = ToyPolicy(dtype=dtype)
    for prefix in reversed(range(NUM_OPEN_PREFIXES)):
        children = mass[BODY_TOKENS * prefix + 1 : BODY_TOKENS * prefix + 1 + BODY_TOKENS]
        choices = torch.cat([children, log_probs[prefix, None].double().cpu()])
        policy.table[prefix] = choices.log_softmax(0).to(dtype)
        mass[prefix] = choices.logsumexp(0)
    return policy


class _CausalOutput(Protocol):
    @property
    def logits(self) -> Tensor: ...


class CausalPolicy(Protocol):
    """Anything that maps input_ids and attention_mask [B, S] to an object with logits [B, S, 6]."""

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor) -> _CausalOutput: ...


def log_probs(policy: CausalPolicy, *, device: torch.device | str | None = None) -> Tensor:
    """log pi(y) of all 121 strings under `policy`, EOS included: [121], differentiable, exact.

    For a policy that can only produce these strings (as ToyPolicy) the probabilities sum to 1. `device` is where
    input_ids is made; give the policy's own.
    """
    input_ids = all_input_ids(device)
    real = input_ids != PAD
    logits = policy(input_ids=input_ids, attention_mask=real).logits
    chosen = torch.log_softmax(logits[:, :-1], dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    # PAD's logit is -inf, so it is replaced, not multiplied away.
    return torch.where(real[:, 1:], chosen, 0.0).sum(dim=1)


def _require_one_per_string(name: str, values: Tensor) -> None:
    if values.shape != (NUM_STRINGS,):
        raise ValueError(f"{name} has shape {tuple(values.shape)}; expected [{NUM_STRINGS}], one value per string")
