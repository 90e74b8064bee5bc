"""Signs that a policy exploits its reward, or that the reward has stopped meaning anything, said in words.

Each rule reads the run's log (rows of ``metrics.jsonl``: the newest evaluation, the one before, and the training rows
between) and gives a warning that says what was seen, against what, and what to change. No rule changes the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Where the rules draw the line. A level outside its range turns a rule off: correlation 1, AUC 0 and 1."""

    length_correlation: float = 0.5
    """Rank correlation of reward and length beyond which a drift of the length is held against the reward."""
    length_drift: float = 0.1
    """Share by which the policy's mean length may leave that of the demonstrations."""
    repetition: float = 0.1
    """How much larger a share of repeated 4-grams the policy may have than the demonstrations."""
    kl_per_token: float = 0.5
    """KL to the start, nats a token."""
    entropy_share: float = 0.25
    """Entropy a token as a share of the start's."""
    ess: float = 0.1
    """Effective sample size as a share of the samples, mean since the last evaluation."""
    auc_blind: float = 0.55
    """Held-out AUC below which the reward tells nothing."""
    auc_perfect: float = 0.98
    """Held-out AUC above which the reward tells everything, so that a trivial difference is likely."""
    auc_gap: float = 0.15
    """How much higher the AUC on training rows may be than on held-out rows."""
    advantage_drift: float = 0.5
    """Relative change of the samples' advantages by one iteration's reward steps, mean since the last evaluation."""
    disagreement: float = 2.0
    """An ensemble's disagreement on the policy's samples, as a multiple of that on demonstrations."""


@dataclass(frozen=True, kw_only=True)
class Alert:
    """rule: the name of the rule. seen: what was observed. advice: what to change."""

    rule: str
    seen: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class History:
    """What the rules look at: evaluations oldest first (at least one), training rows since the last but one."""

    evaluations: Sequence[Row]
    training: Sequence[Row]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> History:
        """From the rows of a run's log up to and with an evaluation."""
        evaluations = [row for row in rows if row["kind"] == "eval"]
        since = evaluations[-2]["iteration"] if len(evaluations) > 1 else -1
        training = [row for row in rows if row["kind"] == "train" and row["iteration"] > since]
        return cls(evaluations=evaluations, training=training)

    @property
    def now(self) -> Row:
        return self.evaluations[-1]

    def mean(self, name: str) -> float | None:
        """Mean of a training metric since the last evaluation; None where it was not measured."""
        values = [row[name] for row in self.training if row.get(name) is not None]
        return sum(values) / len(values) if values else None


def check(rows: Sequence[Row], config: MonitorConfig | None = None) -> list[Alert]:
    """The warnings that hold at the newest evaluation.

    Args:
        rows: the run's log so far, oldest first; without an evaluation there is nothing to say.
        config: where the rules draw the line.
    """
    history = History.of(rows)
    if not history.evaluations:
        return []
    found = []
    for rule, function in RULES.items():
        said = function(history, config or MonitorConfig())
        if said is not None:
            found.append(Alert(rule=rule, seen=said[0], advice=said[1]))
    return found


def _length(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    correlation, length, expert = _values(history.now, "reward_length", "length", "expert_length")
    if correlation is None or length is None or not expert:
        return None
    drift = length / expert - 1
    if abs(correlation) < config.length_correlation or drift * correlation <= config.length_drift * abs(correlation):
        return None
    word = "longer" if drift > 0 else "shorter"
    return (
        f"The reward follows length: rank correlation {correlation:+.2f}, and responses are {abs(drift):.0%} {word} "
        f"than the demonstrations ({length:.1f} against {expert:.1f} tokens).",
        "Pool by the mean and not the sum, raise beta, or take fewer policy steps between reward steps. "
        "If demonstrations end with EOS and samples are cut off, or the other way round, mend that first.",
    )


def _repetition(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    repeated, expert = _values(history.now, "repetition", "expert_repetition")
    if repeated is None or expert is None or repeated - expert <= config.repetition:
        return None
    return (
        f"The policy repeats itself: {repeated:.1%} of its 4-grams were said before, {expert:.1%} in demonstrations.",
        "Raise beta, lower the policy's learning rate, or take more reward steps, so that the reward learns to see it.",
    )


def _kl(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    (kl,) = _values(history.now, "kl_per_token")
    if kl is None or kl <= config.kl_per_token:
        return None
    return (
        f"The policy is {kl:.2f} nats a token from where it started: the reward's features are little tested there.",
        "Raise beta, lower the policy's learning rate, or stop at an earlier checkpoint.",
    )


def _entropy(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    now, start = (_ratio(row, "entropy", "length") for row in (history.now, history.evaluations[0]))
    if now is None or not start or now >= config.entropy_share * start:
        return None
    return (
        f"Entropy has collapsed: {now:.3f} nats a token, {start:.3f} at the start. The samples of a prompt are nearly "
        "the same, so that neither policy nor reward learns from them.",
        "Raise beta, lower the policy's learning rate, or use regularizer = entropy.",
    )


def _ess(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    share = history.mean("reward/ess_relative")
    if share is None or share >= config.ess:
        return None
    return (
        f"The importance weights rest on few samples: an effective {share:.1%} of them.",
        "Draw more samples a prompt (rollout.n), flatten the weights (reward.weight_temper below 1, "
        "reward.weight_clip), raise beta, or bound the reward (reward-model.output-bound).",
    )


def _auc_blind(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    (auc,) = _values(history.now, "reward_auc")
    if auc is None or auc >= config.auc_blind:
        return None
    return (
        f"The reward no longer tells held-out demonstrations from samples: AUC {auc:.2f}, chance is 0.50.",
        "If the policy is as good as the demonstrations, stop: more steps fit noise. If it is not, the reward reads "
        "too little: more reward steps or warm-up, another pooling, reward-model.type = trajectory or backbone.",
    )


def _auc_perfect(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    last = [_values(row, "reward_auc")[0] for row in history.evaluations[-2:]]
    if len(last) < 2 or any(auc is None or auc <= config.auc_perfect for auc in last):
        return None
    return (
        f"The reward tells held-out demonstrations from samples every time (AUC {last[-1]:.3f}), and the policy does "
        "not come closer: a trivial difference may be all it has learned.",
        "Look at the best and worst samples for a difference of form (EOS, white space, a cut-off length, a chat "
        "template); then weaken the reward (weight decay, dropout, fewer reward steps) or train the policy more.",
    )


def _auc_gap(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    training = history.mean("reward/auc")
    (auc,) = _values(history.now, "reward_auc")
    if training is None or auc is None or training - auc <= config.auc_gap:
        return None
    return (
        f"The reward overfits its demonstrations: AUC {training:.2f} on training rows, {auc:.2f} on held-out rows.",
        "More demonstrations, more weight decay or dropout, a smaller head, or fewer reward steps.",
    )


def _drift(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    drift = history.mean("reward/advantage_drift")
    if drift is None or drift <= config.advantage_drift:
        return None
    return (
        f"The reward moves under the policy: the reward steps of an iteration change the advantages by {drift:.0%}.",
        "Lower the reward's learning rate, take fewer reward steps, or more policy steps between them.",
    )


def _disagreement(history: History, config: MonitorConfig) -> tuple[str, str] | None:
    sample, expert = _values(history.now, "disagreement_sample", "disagreement_expert")
    if sample is None or not expert or sample <= config.disagreement * expert:
        return None
    return (
        f"The ensemble disagrees {sample / expert:.1f} times as much on the policy's samples as on demonstrations: the "
        "policy has left the region where the reward is known.",
        "Take the disagreement off the reward (reward-model.penalty), raise beta, or take more reward steps.",
    )


RULES: dict[str, Callable[[History, MonitorConfig], tuple[str, str] | None]] = {
    "length": _length,
    "repetition": _repetition,
    "kl": _kl,
    "entropy": _entropy,
    "ess": _ess,
    "auc_blind": _auc_blind,
    "auc_perfect": _auc_perfect,
    "auc_gap": _auc_gap,
    "advantage_drift": _drift,
    "disagreement": _disagreement,
}


def _values(row: Row, *names: str) -> list[float | None]:
    return [row.get(name) for name in names]


def _ratio(row: Row, above: str, below: str) -> float | None:
    a, b = _values(row, above, below)
    return None if a is None or not b else a / b
