"""What README.md and docs/recipes.md show works as it stands there."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast import ops
from irlfast.data import load_demonstrations

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


RECIPES = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"the page has no {language} block"
    return found


def run(example: str, names: dict[str, Any], page: str = "README.md") -> None:
    exec(compile(example, page, "exec"), names)


def commands(program: str, text: str = README) -> list[list[str]]:
    """Arguments of each call of a program in the shell blocks."""
    lines = [line for block in blocks("bash", text) for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split(" && ")]
    return [
        words[1:]
        for words in (shlex.split(part, comments=True) for part in parts)
        if words and words[0] in (program, Path(program).name)
    ]


def _shows_commands(path: Path) -> bool:
    found = re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return any(re.search(r"^(\.venv/bin/)?irlfast ", block, flags=re.MULTILINE) for block in found)


PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if _shows_commands(path))


def test_the_training_loop_runs_and_trains() -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    run(blocks("python")[0], names)
    assert names["logprob"].shape == names["entropy"].shape == names["lse"].shape == (8, 32)
    logits = names["model"](names["tokens"][:, :-1])
    after = torch.distributions.Categorical(logits=logits).log_prob(names["tokens"][:, 1:])
    change = (after - names["logprob"]).mean(dim=1).detach()
    assert change[names["advantages"] > 0].mean() > change[names["advantages"] < 0].mean()


def test_the_loss_from_model_and_rewards_is_computed() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    (example,) = blocks("python")[1:]
    names: dict[str, Any] = {}
    run(example, names)
    assert bool(names["loss"].isfinite())
    assert float(names["stats"]["entropy"]) == pytest.approx(math.log(32000), abs=0.1)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in names["policy"].parameters())


def test_the_recipes_for_a_loop_of_ones_own_run_and_train() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    setup, drop_in, hidden, ppo = blocks("python", RECIPES)
    run(setup, names, "recipes.md")
    run(drop_in, names, "recipes.md")
    torch.testing.assert_close(names["after"], names["before"], rtol=1e-5, atol=1e-5)
    want = names["logits"].log_softmax(-1).topk(5).values
    torch.testing.assert_close(names["best"], want, rtol=1e-5, atol=1e-5)
    run(hidden, names, "recipes.md")
    trained = names["response_mask"][:, 1:]
    after = names["model"](input_ids=names["input_ids"], attention_mask=names["attention_mask"]).logits[:, :-1]
    after = after.log_softmax(-1).gather(-1, names["input_ids"][:, 1:, None]).squeeze(-1)
    assert float((after - names["before"])[trained].mean().detach()) > 0.1
    run(ppo, names, "recipes.md")
    assert abs(float(names["stats"]["ratio_mean"]) - 1) > 1e-4  # it has moved from where it sampled


@pytest.mark.filterwarnings("ignore")  # other people's, of which TRL has several
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels_a_row", [(), (1,), (4,)])
def test_token_logprobs_stands_in_for_trls_selective_log_softmax(dtype: torch.dtype, labels_a_row: tuple[int]) -> None:
    theirs = pytest.importorskip("trl.trainer.utils", reason="compared where trl is installed").selective_log_softmax
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 5, 1000)).to(dtype)
    index = torch.randint(1000, (2, 5, *labels_a_row))
    got, want = ops.token_logprobs(logits, index), theirs(logits, index)
    assert got.shape == want.shape == index.shape
    # Theirs comes in bfloat16, with 8 bits.
    rtol = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(got, want.float(), rtol=rtol, atol=1e-5)


@pytest.fixture
def tiny_lm(tmp_path: Path) -> tuple[Any, Any]:
    """A random Llama with 32 words, read from a folder as trainers expect, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))]
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "model")
    return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"), wrapped


@pytest.mark.filterwarnings("ignore")  # other people's, of which TRL has several
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_recipe_for_trl_trains_as_trl_does(kind: str, tiny_lm: tuple[Any, Any], tmp_path: Path) -> None:
    """Two updates on one batch of samples, ragged prompts, sampler temperature, KL to the start: the same numbers."""
    trl = pytest.importorskip("trl", reason="the recipe for TRL runs where trl is installed")
    datasets = pytest.importorskip("datasets")
    names: dict[str, Any] = {}
    run(*blocks("python trl", RECIPES), names, "recipes.md")
    calls, function = [], names["causal_lm_token_stats"]
    names["causal_lm_token_stats"] = lambda *a, **k: calls.append(1) or function(*a, **k)
    theirs = getattr(trl, f"{kind}Trainer")
    ours = names["FusedGRPOTrainer"] if kind == "GRPO" else type("Fused", (names["FusedLogprobs"], theirs), {})
    model, tokenizer = tiny_lm
    options = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        num_iterations=2,
        max_completion_length=6,
        max_steps=2,
        learning_rate=1e-3,
        temperature=0.8,
        beta=0.05,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        gradient_checkpointing=False,
        seed=1,
    )
    logs = []
    for trainer_class in (theirs, ours):
        trainer = trainer_class(
            model=copy.deepcopy(model),
            reward_funcs=lambda completions, **_: [float(text.count("w1")) for text in completions],
            args=options,
            train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]}),
            processing_class=tokenizer,
        )
        trainer.train()
        logs.append(trainer.state.log_history[:2])
        assert len(calls) == (0 if trainer_class is theirs else 4)  # old and reference log-probs, two updates
    assert logs[0][0]["grad_norm"] > 1
    for want, got in zip(*logs, strict=True):
        for name in {"loss", "entropy", "grad_norm", "reward", "kl"} & want.keys():
            assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name


def test_demonstrations_have_the_forms_it_shows(tmp_path: Path) -> None:
    (example,) = blocks("json")
    file = tmp_path / "demonstrations.jsonl"
    file.write_text(example)
    rows = load_demonstrations(str(file))
    assert len(rows) == len(example.splitlines()) == 3
    assert rows[0].prompt == json.loads(example.splitlines()[0])["prompt"]
    assert rows[1].response == "4"
    assert rows[2].is_text


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}" for name in PAGES)])
def test_the_commands_of_a_page_are_understood_by_the_command_line(page: str) -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    shown = commands(".venv/bin/irlfast", (ROOT / page).read_text(encoding="utf-8"))
    assert shown
    if page == "README.md":
        assert {arguments[0] for arguments in shown} >= {"demo", "bilevel"}
    for arguments in shown:
        with contextlib.redirect_stderr(io.StringIO()) as problem:
            try:
                action = tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=arguments)
            except SystemExit:
                pytest.fail(f"irlfast {shlex.join(arguments)}: {problem.getvalue()}")
        assert callable(action)


def test_the_options_it_names_exist() -> None:
    tyro = pytest.importorskip("tyro")
    from irlfast.commands import SUBCOMMANDS

    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit) as stopped:
        tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=["bilevel", "--help"])
    assert stopped.value.code == 0
    named = re.findall(r"`(--[a-z-]+)`", README)
    assert named
    for option in named:
        assert re.search(rf"{option}\b", help_text.getvalue()), option


def test_each_benchmark_it_names_exists() -> None:
    shown = [arguments[2] for arguments in commands(".venv/bin/python") if arguments[:2] == ["-m", "bench"]]
    assert shown
    for op in shown:
        assert op == "all" or (ROOT / "bench" / f"{op}.py").is_file()


def test_each_install_command_names_extras_that_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    shown = {
        extra for arguments in commands(".venv/bin/pip") for extra in re.findall(r"\.\[(\w+)\]", shlex.join(arguments))
    }
    assert shown == {"train", "dev"}
    assert shown <= set(extras)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/install.md", "docs/recipes.md"])
def test_files_it_links_to_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target
