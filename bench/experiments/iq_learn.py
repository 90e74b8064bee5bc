"""IQ-Learn against maximum likelihood from the same start: stories, GSM8K, and the demo's arithmetic.

    python -m bench.experiments.iq_learn stories --data ../shared/data
    python -m bench.experiments.iq_learn gsm8k --data ../shared/data
    python -m bench.experiments.iq_learn arithmetic
    python -m bench.experiments.iq_report

Each run is added to docs/results/iq_learn_TASK.jsonl when it is done, so that an experiment which was stopped goes on
where it stopped. iq_report makes the tables and pictures. One core is used.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from irlfast.data import Demonstration, TokenizedDemonstration, load_demonstrations, split, tokenize_demonstrations
from irlfast.data.gsm8k import exact_match, gsm8k_rows
from irlfast.demo import arithmetic
from irlfast.demo.experiment import PRETRAINING, make_engine, make_model
from irlfast.eval.generation import distinct_n, self_bleu
from irlfast.rollout import SamplingParams, TransformersEngine
from irlfast.train import IQLearnConfig, IQLearnTrainer, train_supervised
from irlfast.train.evaluation import response_tokens
from irlfast.train.iq_evaluation import evaluate_samples
from irlfast.train.seeds import derive_seed

RESULTS = Path(__file__).parents[2] / "docs" / "results"
# None is maximum likelihood. lambda = 0 is the same loss: it is run at one seed, to show that it is.
LAMBDAS = (None, 0.01, 0.1, 1.0)
Run = dict[str, Any]


def name_of(lambda_td: float | None) -> str:
    return "MLE" if lambda_td is None else f"IQ {lambda_td:g}"


class Results:
    """The finished runs of one task, in a file of JSON lines."""

    def __init__(self, task: str) -> None:
        self.path = RESULTS / f"iq_learn_{task}.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.runs: list[Run] = [json.loads(line) for line in lines]

    def missing(self, wanted: Sequence[Run]) -> Iterator[Run]:
        done = [{k: run[k] for k in wanted[0]} for run in self.runs]
        return (key for key in wanted if key not in done)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in run.items()}
        print(shown, flush=True)


# Language: stories and GSM8K

LANGUAGE_SEEDS = (0, 1, 2)
TEMPERATURES = (0.6, 1.0)


def language_task(task: str, data: Path, seed: int, tokenizer: Any) -> tuple[Any, list[Any], list[Any], IQLearnConfig]:
    """Training rows, held-out rows, and the configuration they are trained with."""
    config = IQLearnConfig(
        local_micro_batch_size=32,
        gradient_accumulation_steps=1,
        num_train_epochs=3,
        lr=3e-4,
        warm_up_steps=5,
        response_length=64,
        eval_every=10_000,
        eval_num_samples=0,
        seed=seed,
    )
    if task == "stories":
        rows = load_demonstrations(data / "text" / "tinystories_1000.jsonl.gz")
        parts = split(rows, heldout_count=128, seed=seed)
        training, heldout = (
            tokenize_demonstrations(part, tokenizer, max_response_tokens=64, prompt_tokens=32) for part in parts
        )
        return None, training, heldout, config
    config = replace(config, local_micro_batch_size=16, lr=1e-3, num_train_epochs=2, response_length=72)
    fitting = []
    for file, count in (("train", 96), ("test", 32)):
        found = gsm8k_rows(data / "gsm8k" / f"{file}.jsonl.gz")
        rows = [Demonstration(prompt=row["prompt"], response=row["response"]) for row in found]
        random.Random(derive_seed(seed, f"gsm8k {file}", 0)).shuffle(rows)
        # Its vocabulary of 512 spells a word in several tokens: short problems are all that fits its context.
        rows = [row for row in rows if len(row.prompt) < 210 and len(row.response) < 140][: 8 * count]
        tokenized = tokenize_demonstrations(rows, tokenizer, max_response_tokens=72, max_prompt_tokens=112)
        fitting.append([row for row in tokenized if not row.truncated][:count])
        assert len(fitting[-1]) == count, f"{file}: only {len(fitting[-1])} rows fit"
    return exact_match, fitting[0], fitting[1], config


def language(task: str, data: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = data / "models" / "stories260K"
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    start: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    results = Results(task)
    wanted = [{"method": "start", "seed": 0}, {"method": "IQ 0", "seed": 0}]
    wanted[1:1] = [{"method": name_of(value), "seed": seed} for seed in LANGUAGE_SEEDS for value in LAMBDAS]
    for key in results.missing(wanted):
        began = time.process_time()
        metric, training, heldout, config = language_task(task, data, key["seed"], tokenizer)
        if key["method"] == "MLE":
            config = replace(config, use_irl=False)
        elif key["method"] != "start":
            config = replace(config, lambda_td=float(key["method"].removeprefix("IQ ")))
        policy = copy.deepcopy(start)
        trainer = IQLearnTrainer(
            policy=policy,
            demonstrations=training,
            heldout=heldout,
            config=config,
            pad_token_id=0,
            reference=copy.deepcopy(start),
            engine=TransformersEngine(policy, eos_token_id=tokenizer.eos_token_id, pad_token_id=0),
        )
        found = trainer.evaluate() if key["method"] == "start" else trainer.train()
        for temperature in TEMPERATURES:
            sampled = evaluate_samples(
                trainer.engine,  # type: ignore[arg-type]
                trainer.reward(),
                heldout[: 32 if task == "stories" else 12],
                SamplingParams(max_new_tokens=config.response_length, temperature=temperature, n=4, seed=key["seed"]),
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                task_metric=metric,
                batch_size=64,
            )
            found |= {f"{name}@{temperature:g}": value for name, value in sampled.metrics.items()}
        sizes = {"demonstrations": len(training), "heldout": len(heldout), "steps": trainer.step_count}
        results.add({**key, **found, **sizes, "cpu_seconds": round(time.process_time() - began, 1)})


# Arithmetic

ARITHMETIC_SEEDS = (0, 1, 2, 3, 4)
DEMONSTRATIONS = (100, 300, 1000)
TEXT_PROBLEMS, VALIDATION, HELDOUT, TEXT_ROWS = 1000, 80, 400, 40_000
PRETRAINING_STEPS, FINE_TUNING_STEPS, BATCH = 300, 60, 16
# The pretrained logits are high (V of about 14): with lambda = 1 the square is all there is.
ARITHMETIC_LAMBDAS = (None, 0.001, 0.01, 0.1)
Part = tuple[list[arithmetic.Problem], list[TokenizedDemonstration]]


def shuffled_problems() -> list[arithmetic.Problem]:
    """In one order for every seed: the first TEXT_PROBLEMS are those of the training text."""
    problems = arithmetic.all_problems()
    random.Random(derive_seed(0, "iq arithmetic text", 0)).shuffle(problems)
    return problems


def arithmetic_base() -> torch.nn.Module:
    """The start of every run: a model of text by careful and sloppy writers."""
    rng = random.Random(derive_seed(0, "iq arithmetic text", 1))
    text = arithmetic.mixed_text(shuffled_problems()[:TEXT_PROBLEMS], TEXT_ROWS, rng)
    torch.manual_seed(derive_seed(0, "iq arithmetic model", 0))
    base = make_model()
    train_supervised(base, text, replace(PRETRAINING, steps=PRETRAINING_STEPS), pad_token_id=arithmetic.PAD)
    return base


def arithmetic_parts(seed: int) -> tuple[Part, Part, Part]:
    """Demonstrations (the smaller sets are the first of them), validation and held-out problems, none of that text."""
    rest = shuffled_problems()[TEXT_PROBLEMS:]
    random.Random(derive_seed(seed, "iq arithmetic", 0)).shuffle(rest)
    parts = []
    for size in (max(DEMONSTRATIONS), VALIDATION, HELDOUT):
        parts.append((rest[:size], [arithmetic.row(p, p.right_working) for p in rest[:size]]))
        rest = rest[size:]
    return parts[0], parts[1], parts[2]


def answer_metrics(model: torch.nn.Module, part: Part, samples: int, seed: int, temperature: float) -> dict[str, float]:
    """accuracy over all answers, self-BLEU of the answers to one prompt, distinct 2-grams over all."""
    problems, rows = part
    params = SamplingParams(max_new_tokens=arithmetic.MAX_RESPONSE, temperature=temperature, n=samples, seed=seed)
    answers = response_tokens(make_engine(model).generate([list(row.prompt_ids) for row in rows], params))
    asked = [p for p in problems for _ in range(samples)]
    found = {"accuracy": statistics.mean(arithmetic.is_right(p, a) for p, a in zip(asked, answers, strict=True))}
    if samples > 1:
        texts = [" ".join(map(str, a)) for a in answers]
        found["self_bleu"] = self_bleu([texts[i : i + samples] for i in range(0, len(texts), samples)])
        groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
        found["different_answers"] = statistics.mean(len(set(group)) for group in groups)
        found["distinct_2"] = distinct_n(answers, 2)
    return found


def run_arithmetic() -> None:
    results = Results("arithmetic")
    methods = [name_of(value) for value in ARITHMETIC_LAMBDAS]
    wanted = [
        {"method": m, "seed": seed, "demonstrations": n}
        for seed in ARITHMETIC_SEEDS
        for m, n in [("start", 0), *((m, n) for n in DEMONSTRATIONS for m in methods)]
    ]
    missing = list(results.missing(wanted))
    if not missing:
        return
    base = arithmetic_base()
    for key in missing:
        began, seed = time.process_time(), key["seed"]
        (_, right), validation, heldout = arithmetic_parts(seed)
        model, kept = copy.deepcopy(base), {"step": 0}
        if key["method"] != "start":
            model, kept = fine_tune(base, right[: key["demonstrations"]], validation, key)
        run = {**key, **kept}
        for metric, value in answer_metrics(model, heldout, 2, seed, 1.0).items():
            run[f"heldout_{metric}"] = value
        run["heldout_greedy_accuracy"] = answer_metrics(model, heldout, 1, seed, 0.0)["accuracy"]
        results.add({**run, "cpu_seconds": round(time.process_time() - began, 1)})


def fine_tune(
    base: torch.nn.Module, rows: list[TokenizedDemonstration], validation: Part, key: Run
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The weights that answer most validation prompts rightly among those looked at, for MLE and IQ alike."""
    model = copy.deepcopy(base)
    best: dict[str, Any] = {"accuracy": -1.0}

    def look(kind: str, step: int, values: Any) -> None:
        if kind != "eval":
            return
        accuracy = answer_metrics(model, validation, 2, key["seed"], 1.0)["accuracy"]
        if accuracy > best["accuracy"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            best.update(accuracy=accuracy, step=step, weights=weights)
            best.update(nll=values["heldout_nll"], td_error=values["heldout_td_error"])

    config = IQLearnConfig(
        local_micro_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_train_epochs=FINE_TUNING_STEPS * BATCH / len(rows),
        lr=5e-4,
        scheduler="constant",
        warm_up_steps=10,
        response_length=arithmetic.MAX_RESPONSE,
        eval_every=20,
        eval_num_samples=0,
        local_eval_batch_size=VALIDATION,
        seed=key["seed"],
        use_irl=key["method"] != "MLE",
        lambda_td=0.0 if key["method"] == "MLE" else float(key["method"].removeprefix("IQ ")),
    )
    IQLearnTrainer(
        policy=model,
        demonstrations=rows,
        heldout=validation[1],
        config=config,
        pad_token_id=arithmetic.PAD,
        on_row=look,
    ).train()
    model.load_state_dict(best["weights"])
    return model, {
        "step": best["step"],
        "validation_accuracy": best["accuracy"],
        "validation_nll": best["nll"],
        "validation_td_error": best["td_error"],
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.experiments.iq_learn", description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("stories", "gsm8k", "arithmetic"))
    parser.add_argument("--data", type=Path, help="folder with models/, text/ and gsm8k/; for stories and gsm8k")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.task != "arithmetic" and options.data is None:
        parser.error(f"{options.task} needs --data")
    steps: dict[str, Callable[[], None]] = {
        "arithmetic": run_arithmetic,
        "stories": lambda: language("stories", options.data),
        "gsm8k": lambda: language("gsm8k", options.data),
    }
    steps[options.task]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
