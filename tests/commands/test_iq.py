"""`irlfast iq` on real stories, and what reads its runs; `irlfast data gsm8k`."""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from irlfast.cli import main
from irlfast.commands.iq import IQCommand, run_iq
from irlfast.commands.rows import DataConfig
from irlfast.train import IQLearnConfig, checkpoint

PARAMETERS = """
gamma lambda-td lambda-kl use-kl use-mle use-irl mle-steps-before-irl lr eps optimizer scheduler warm-up-steps
num-train-epochs gradient-accumulation-steps local-micro-batch-size local-eval-batch-size base-model query-dataset
response-length temperature eval-every eval-num-samples seed output-dir push-to-hub track
"""


@pytest.fixture(scope="module")
def run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[IQCommand, Path]:
    """A short run on 40 stories, done once."""
    for module in ("transformers", "tyro", "sacrebleu", "rouge_score"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("iq") / "run"
    command = IQCommand(
        base_model=str(shared_data / "models" / "stories260K"),
        query_dataset=str(shared_data / "text" / "tinystories_1000.jsonl.gz"),
        output_dir=out,
        device="cpu",
        data=DataConfig(limit=40, heldout=8, prompt_tokens=12),
        train=IQLearnConfig(
            local_micro_batch_size=4,
            gradient_accumulation_steps=2,
            response_length=12,
            gamma=0.9,
            lr=1e-3,
            eval_every=2,
            eval_num_samples=4,
            eval_samples_per_prompt=2,
            checkpoint_every=2,
        ),
    )
    assert run_iq(command) == 0
    return command, out


def log_rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_a_run_leaves_its_figures_its_samples_its_page_and_its_model(run: tuple[IQCommand, Path]) -> None:
    _, out = run
    evaluations = [row for row in log_rows(out) if row["kind"] == "eval"]
    assert [row["iteration"] for row in evaluations] == [0, 2, 4]
    assert evaluations[-1]["heldout_td_error"] < evaluations[0]["heldout_td_error"]
    assert evaluations[0]["heldout_kl"] == pytest.approx(0.0, abs=1e-5)
    for name in (
        "heldout_td_error",
        "heldout_q",
        "heldout_value",
        "heldout_logprob",
        "rouge_l@1",
        "chrf@1",
        "self_bleu@1",
    ):
        assert isinstance(evaluations[-1][name], float), name
    assert json.loads((out / "summary.json").read_text()).keys() == {"start", "step 4"}
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in samples] == [0, 2, 4]
    row = samples[-1]["rows"][0]
    assert row["kind"] == "sum"
    assert sum(row["token_rewards"]) == pytest.approx(row["reward"], rel=1e-3)
    page = (out / "report.html").read_text()
    assert "Held-out NLL" in page
    assert "TD error" in page
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = out / "checkpoints" / "step-4" / "policy"
    assert AutoModelForCausalLM.from_pretrained(policy).num_parameters() == 260_032
    assert AutoTokenizer.from_pretrained(policy).eos_token_id is not None


def test_score_gives_token_rewards_their_sum_and_advantages(
    run: tuple[IQCommand, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, out = run
    output = tmp_path / "scores.jsonl"
    arguments = ["score", "--reward", str(out), "--input", command.query_dataset, "--limit", "3", "--device", "cpu"]
    assert main([*arguments, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(found) == 3
    for row in found:
        assert sum(row["token_rewards"]) == pytest.approx(row["reward"], rel=1e-4)
        assert sum(row["advantages"]) == pytest.approx(row["components"]["log_likelihood"], rel=1e-4)
        assert len(row["tokens"]) == len(row["token_rewards"]) == len(row["advantages"]) == 12  # cut as in training
        assert row["kind"] == "sum"
        assert abs(row["components"]["log_ratio"]) < abs(row["components"]["log_likelihood"])
        assert "normalised" not in row
    # gamma is the run's, 0.9: at 1 the sum would be log pi + V - V(end).
    assert all(abs(row["reward"] - row["components"]["log_likelihood"]) > 5 for row in found)
    capsys.readouterr()
    assert main(["report", str(out), "--output", str(tmp_path / "page.html")]) == 0
    assert "Held-out NLL" in (tmp_path / "page.html").read_text()


def test_resumed_equals_uninterrupted(
    run: tuple[IQCommand, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irlfast.train import IQLearnTrainer

    monkeypatch.setattr(checkpoint, "_sync", lambda path: None)
    command, whole = run
    cut = replace(command, output_dir=tmp_path / "cut")
    right = IQLearnTrainer.step

    def step(self: IQLearnTrainer) -> dict[str, float]:
        if self.step_count == 3:
            raise KeyboardInterrupt
        return right(self)

    with monkeypatch.context() as patch:
        patch.setattr(IQLearnTrainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run_iq(cut)
    assert run_iq(replace(cut, resume=True)) == 0
    assert log_rows(cut.output_dir) == log_rows(whole)
    assert (cut.output_dir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_an_earlier_run_is_not_overwritten(run: tuple[IQCommand, Path], capsys: pytest.CaptureFixture[str]) -> None:
    command, out = run
    source = ["--base-model", command.base_model, "--query-dataset", command.query_dataset]
    assert main(["iq", *source, "--output-dir", str(out)]) == 1
    assert "holds an earlier run" in capsys.readouterr().err


def test_every_parameter_of_the_document_is_shown_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    with pytest.raises(SystemExit) as stopped:
        main(["iq", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for name in PARAMETERS.split():
        assert f"--{name}" in shown, name
    assert "1 / (4 alpha)" in shown


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"track": "wandb"}, ImportError, "track = 'wandb' needs the wandb package"),
        ({"push_to_hub": "a/b"}, ImportError, "push_to_hub = 'a/b' needs the huggingface_hub package"),
    ],
)
def test_what_cannot_be_done_at_the_end_is_said_at_the_start(
    run: tuple[IQCommand, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    command, _ = run
    for package in ("wandb", *(["huggingface_hub"] if "push_to_hub" in change else [])):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(error, match=message):
        run_iq(replace(command, output_dir=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_a_hub_without_a_login_is_said(
    run: tuple[IQCommand, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="push_to_hub = 'a/b' needs a login"):
        run_iq(replace(run[0], output_dir=tmp_path / "out", push_to_hub="a/b"))
    with pytest.raises(ValueError, match="push_to_hub = 'b', expected owner/name"):
        replace(run[0], push_to_hub="b")


def test_gsm8k_becomes_a_file_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    source = tmp_path / "train.jsonl.gz"
    source.write_bytes(gzip.compress(b'{"question": "1+1?", "answer": "<<1+1=2>>2\\n#### 2"}\n'))
    output = tmp_path / "rows.jsonl"
    assert main(["data", "gsm8k", "--source", str(source), "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {"prompt": "Question: 1+1?\nAnswer: ", "response": "2\n#### 2"}
    assert "1 rows are in" in capsys.readouterr().out
    assert main(["data", "gsm8k", "--source", str(tmp_path / "none.jsonl"), "--output", str(output)]) == 1
    assert "none.jsonl" in capsys.readouterr().err
