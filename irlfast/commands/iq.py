"""``irlfast iq``: fine-tune a language model by IQ-Learn on a file of demonstrations, and keep its reward."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from irlfast.data import token_pieces
from irlfast.data.gsm8k import exact_match
from irlfast.report import print_comparison, write_json
from irlfast.reporting import write_report
from irlfast.train import IQLearnConfig, IQLearnTrainer
from irlfast.train.iq_evaluation import TaskMetric
from irlfast.train.log import read_log
from irlfast.train.track import Track, Tracker

from .language_model import load_language_model
from .rows import DataConfig, read_rows

_TASKS: dict[str, TaskMetric | None] = {"none": None, "gsm8k": exact_match}


@dataclass(frozen=True, kw_only=True)
class IQCommand:
    """Fine-tune a language model from demonstrations by IQ-Learn; its logits then hold a reward for each token."""

    base_model: str
    """Folder or hub name of a causal language model; what is trained, and what its KL is measured from."""
    query_dataset: str
    """JSON lines (.gz too) with {"prompt", "response"}, {"messages"} or {"text"} rows, or a dataset's hub name."""
    output_dir: Path = Path("runs/iq")
    """Folder for metrics.jsonl, samples.jsonl, summary.json, report.html and checkpoints/."""
    resume: bool = False
    """Go on from the newest checkpoint in `output_dir`."""
    device: str = "auto"
    """Where to run: auto takes an accelerator where there is one."""
    task: Literal["none", "gsm8k"] = "none"
    """Score sampled answers against the demonstration: gsm8k compares the final numbers."""
    track: Track = "none"
    """Send metrics to this tracker too."""
    track_project: str = "irlfast"
    """Name of the project there."""
    push_to_hub: str | None = None
    """Upload the trained model to this repository of the Hugging Face hub (owner/name) when training ends."""
    data: DataConfig = field(default_factory=DataConfig)
    """Reading of the demonstrations."""
    train: Annotated[IQLearnConfig, tyro.conf.arg(name="")] = field(default_factory=IQLearnConfig)
    """Training."""

    def __post_init__(self) -> None:
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise ValueError(f"push_to_hub = {self.push_to_hub!r}, expected owner/name of a repository")


def run_iq(command: IQCommand) -> int:
    """Train, evaluate, and write the results below `command.output_dir`."""
    logging.basicConfig(level=logging.WARNING, format="irlfast: %(message)s")
    out, config = command.output_dir, command.train
    if not command.resume and (out / "metrics.jsonl").exists():
        raise FileExistsError(f"{out} holds an earlier run: choose another --output-dir, or --resume that one")
    if command.push_to_hub is not None:
        _require_hub(command.push_to_hub)
    loaded = load_language_model(command.base_model, device=command.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = read_rows(
        command.query_dataset,
        command.data,
        tokenizer,
        max_response_tokens=config.response_length,
        seed=config.seed,
    )
    settings = json.loads(json.dumps(asdict(command), default=str))
    tracker = Tracker(command.track, project=command.track_project, folder=out, config=settings)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    trainer = IQLearnTrainer(
        policy=model,
        demonstrations=[*rows.training, *rows.validation],
        heldout=rows.heldout,
        config=config,
        pad_token_id=loaded.pad_token_id,
        engine=loaded.engine(),
        reference=copy.deepcopy(model),
        out=out,
        decode=decode,
        pieces=lambda ids: token_pieces(ids, tokenizer),
        task_metric=_TASKS[command.task],
        extra_state=tokenizer.save_pretrained,
        on_row=tracker.write,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", settings)
    if command.resume:
        trainer.resume()
    trainer.train()
    tracker.close()

    evaluations = {row["iteration"]: row for row in read_log(out / "metrics.jsonl", "eval")}
    last = max(evaluations)
    summary = {
        name: {k: v for k, v in evaluations[step].items() if k not in ("kind", "iteration")}
        for name, step in (("start", 0), (f"step {last}", last))
    }
    write_json(out / "summary.json", summary)
    write_report(out, out / "report.html")
    print_comparison(summary)
    if command.push_to_hub is not None:
        model.push_to_hub(command.push_to_hub)
        tokenizer.push_to_hub(command.push_to_hub)
        print(f"The model is at {command.push_to_hub} on the hub")
    print(f"Results are in {out}; the model, and the reward for `irlfast score`, in {out / 'checkpoints'}")
    return 0


def _require_hub(repository: str) -> None:
    """ImportError or ValueError before a run that could not be uploaded when it ends."""
    try:
        from huggingface_hub import get_token
    except ImportError as cause:
        raise ImportError(
            f"push_to_hub = {repository!r} needs the huggingface_hub package: pip install huggingface_hub"
        ) from cause
    if get_token() is None:
        raise ValueError(f"push_to_hub = {repository!r} needs a login: run `hf auth login`, or set HF_TOKEN")
