"""The report: complete, self-contained, safe whatever a sample says, and its pictures show the numbers."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from irlfast.cli import main
from irlfast.reporting import Run, read_run, render_report, write_report
from irlfast.reporting.style import CSS

ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onmouseover=\"alert(2)"


class Page(HTMLParser):
    """Tags and their attributes, in order; text outside of style; open tags at the end."""

    VOID = frozenset(("meta", "line", "rect", "circle", "polyline", "img", "br"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        elif tag in ("rect", "circle"):
            self.open.append(tag)  # these may hold a title

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def evaluation(iteration: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "eval",
        "iteration": iteration,
        "seconds": 1.0,
        "reward_auc": 0.8 - iteration / 100,
        "reward_expert": 1.0,
        "reward_sample": 0.2,
        "length": 12.0,
        "expert_length": 13.0,
        "kl_per_token": iteration / 1000,
        "odd_metric": 3.0,
        **changes,
    }


def record(iteration: int, **row: Any) -> dict[str, Any]:
    base = {"source": "policy", "index": 0, "prompt": "Once", "tokens": [" upon", " a", " time"], "reward": 0.5}
    rows = [
        {**base, "token_rewards": [0.9, -0.8, 0.05], "kind": "mean", **row},
        {**base, "index": 1, "reward": -0.5, "token_rewards": [-0.9, None, 0.0], "kind": "mean"},
        {**base, "source": "demonstration", "reward": 1.5},
    ]
    return {
        "iteration": iteration,
        "reward_level": 0.1,
        "reward_scale": 0.5,
        "expert_rewards": [1.0, 1.2, 0.9],
        "policy_rewards": [0.5, -0.5, None],
        "rows": rows,
    }


@pytest.fixture
def run() -> Run:
    return Run(
        name="stories",
        rows=[
            evaluation(0),
            {"kind": "train", "iteration": 5, "seconds": 1.0, "reward/auc": 0.7, "policy/grad_norm": 0.3},
            {"kind": "warning", "iteration": 0, "rule": "ess", "seen": "Few samples.", "advice": "More."},
            evaluation(10),
            {"kind": "warning", "iteration": 10, "rule": "kl", "seen": "Far away: 0.9.", "advice": "Raise beta."},
        ],
        samples=[record(0), record(10)],
        config={"model": "stories260K", "train": {"iterations": 10, "beta": 0.5}},
        summary={"start": {"kl": 0.0}, "bi-level IRL": {"kl": 0.01}},
    )


def test_it_is_one_whole_page_without_a_script_or_anything_from_elsewhere(run: Run) -> None:
    html = render_report(run)
    page = Page(html)
    assert page.open == []
    assert html.startswith("<!DOCTYPE html>")
    assert not page.named("script") + page.named("link") + page.named("img") + page.named("iframe")
    assert not re.search(r"(https?:)?//[a-z]|@import|url\((?!#)", html)
    policies = [m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    for heading in ("Warnings", "Comparison", "Curves", "Rewards over time", "Best and worst", "Configuration"):
        assert heading in page.text


def test_what_a_sample_says_stays_text(run: Run) -> None:
    """A sample, a prompt, a warning, a configuration and a metric's name that try to be markup."""
    rows = [*run.rows, {"kind": "warning", "iteration": 10, "rule": "x", "seen": ATTACK, "advice": ATTACK}]
    rows[3] = evaluation(10, **{ATTACK: 1.0})
    hostile = Run(
        name=ATTACK,
        rows=rows,
        samples=[record(0, prompt=ATTACK, tokens=[ATTACK, ATTACK, ATTACK], components={ATTACK: 1.0})],
        config={"model": ATTACK, ATTACK: ATTACK},
        summary={ATTACK: {ATTACK: ATTACK}},
    )
    html = render_report(hostile)
    page = Page(html)
    assert page.open == []
    assert "<script" not in html
    assert not page.named("img")
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    assert page.text.count("<script>alert('x')</script>") >= 12  # shown, as text


def test_tokens_carry_their_reward_in_colour_underline_and_number(run: Run) -> None:
    page = Page(render_report(run))
    spans = [a for a in page.named("span") if a.get("title")]
    newest = spans[:3]  # the newest evaluation comes first
    assert [a["title"] for a in newest] == ["+0.8", "-0.9", "-0.05"]  # above the level of 0.1
    assert [a.get("class") for a in newest] == ["for s3", "against s4", None]
    assert "1.5" in page.text  # a demonstration without token rewards is shown plainly
    assert page.text.count("Token rewards as numbers") == 4  # two responses with any, in two evaluations


def test_charts_show_every_number_and_say_what_they_are(run: Run) -> None:
    html = render_report(run)
    charts = [a for a in Page(html).named("svg") if a.get("role") == "img"]
    labels = [a["aria-label"] or "" for a in charts]
    assert all(labels)
    assert "AUC of the reward: held-out from 0.8 to 0.7" in labels
    assert "Length: policy from 12 to 12; demonstrations from 13 to 13" in labels
    assert "<title>held-out, iteration 10: 0.7</title>" in html
    assert "odd_metric: odd_metric from 3 to 3" in labels
    assert "policy/grad_norm: policy/grad_norm from 0.3 to 0.3" in labels
    assert sum("Mean rewards: policy 0, demonstrations 1.033" in label for label in labels) == 2


def test_current_warnings_come_with_advice_and_past_ones_apart(run: Run) -> None:
    text = Page(render_report(run)).text
    assert "Far away: 0.9." in text
    assert "What to change: Raise beta." in text
    assert "Earlier warnings that no longer hold (1)" in text
    assert "At iteration 0: Few samples." in text
    quiet = Run(name="quiet", rows=[evaluation(0)])
    assert "None at the last evaluation." in Page(render_report(quiet)).text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"kind": "train", "iteration": 1, "reward/auc": None}],
        [evaluation(0, reward_auc=None)],
        [{"kind": "eval", "iteration": 0}],
    ],
)
def test_a_run_that_has_hardly_begun_has_a_page(rows: list[dict[str, Any]]) -> None:
    assert Page(render_report(Run(name="new", rows=rows))).open == []


def test_a_folder_is_read_as_a_run_left_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    lines = [json.dumps(evaluation(0)), json.dumps(evaluation(10)), '{"kind": "eval", "itera']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "samples.jsonl").write_text(json.dumps(record(10)) + "\n")
    (folder / "config.json").write_text('{"model": "m", "train": {"iterations": 20}}')
    read = read_run(folder)
    assert (read.name, len(read.rows), len(read.samples), read.config["model"]) == ("my run", 2, 1, "m")
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert "iteration 10 of 20" in (folder / "report.html").read_text()
    write_report(folder, tmp_path / "elsewhere.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere.html", "my run"]


def test_the_configuration_is_found_in_a_checkpoint_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluation(0)) + "\n")
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-4\n")
    (tmp_path / "checkpoints" / "step-4" / "state.json").write_text('{"config": {"beta": 0.25}}')
    assert read_run(tmp_path).config == {"beta": 0.25}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, "", "metrics.jsonl is missing: give the folder"),
        ("metrics.jsonl", "{\n", "metrics.jsonl is not JSON lines"),
        ("metrics.jsonl", "[1]\n", r"metrics.jsonl, line 1: expected an object with \"iteration\", got \[1\]"),
        ("config.json", "[]", "config.json: expected an object, got list"),
        ("summary.json", "{", "summary.json is not JSON"),
    ],
)
def test_a_folder_that_is_no_run_is_an_error_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: str, message: str
) -> None:
    if name is not None:
        (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluation(0)) + "\n")
        (tmp_path / name).write_text(content)
    assert main(["report", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(mode: str) -> None:
    """WCAG 2 AA: 4.5 to 1 for text, also on the strongest token colours; 3 to 1 for lines and marks."""
    light, dark = CSS.split("prefers-color-scheme: dark")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark if mode == "dark" else light))

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    tokens = [f"{sign}{step}" for sign in ("for", "against") for step in (1, 2, 3, 4)]
    for behind in ("page", "card", "warn-page", *tokens):
        assert contrast("ink", behind) >= 4.5, behind
    for behind in ("page", "card"):
        assert contrast("soft", behind) >= 4.5
        assert contrast("link", behind) >= 4.5
    for line in ("policy", "expert"):
        assert contrast(line, "card") >= 3
