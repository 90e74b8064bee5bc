"""Our functions at slime's plug-in points, beside what slime 0.3.1 calls and expects there.

The facts below are those of THUDM/slime at commit 624b824a898ab0ec1fcb4d373004c7f3852bf515. Given a checkout of slime,
they are compared with its source.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from slime_samples import Sample

from irlfast.integrations import slime


class Point(NamedTuple):
    """Where slime loads a function, what its names of parameters are, and the call in its source."""

    name: str
    parameters: tuple[str, ...]
    awaited: bool
    file: str
    call: str


REDUCED = ("args", "batch", "logits", "sum_of_sample_mean")
TIS = ("args", "pg_loss", "train_log_probs", "rollout_log_probs", "loss_masks", "kwargs")
TIS_CALL = "tis_func(**tis_kwargs)"
ROLLOUT = ("args", "rollout_id", "data_source", "evaluation")
SCORING, ROLLING, LOSSES = (
    "slime/rollout/rm_hub/__init__.py",
    "slime/ray/rollout.py",
    "slime/backends/megatron_utils/loss.py",
)
ROLL = "call_rollout_fn(self.generate_rollout, self.args, rollout_id, self.data_source, evaluation=False)"
POINTS = [
    Point("reward", ("args", "sample", "kwargs"), True, SCORING, "rm_function(args, sample, **kwargs)"),
    Point("group_reward", ("args", "samples", "kwargs"), True, SCORING, "rm_function(args, samples, **kwargs)"),
    Point("post", ("args", "samples"), False, ROLLING, "self.custom_reward_post_process_func(self.args, samples)"),
    Point("loss", REDUCED, False, LOSSES, "func(args, batch, logits, sum_of_sample_mean)"),
    Point("tis", TIS, False, LOSSES, TIS_CALL),
    Point("icepop", TIS, False, LOSSES, TIS_CALL),
    Point("generate_rollout", ROLLOUT, False, ROLLING, ROLL),
]


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_function_takes_what_slime_gives_it(point: Point) -> None:
    function = getattr(importlib.import_module("irlfast.integrations.slime"), point.name)
    parameters = inspect.signature(function).parameters
    assert tuple(parameters) == point.parameters
    assert inspect.iscoroutinefunction(function) == point.awaited
    if point.name in ("tis", "icepop"):
        assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
        assert {parameters[name].kind for name in TIS[1:5]} == {inspect.Parameter.KEYWORD_ONLY}
    if point.name == "generate_rollout":
        assert parameters["evaluation"].default is False


def test_the_names_of_bi_level_irl_come_from_one_module() -> None:
    for name in (
        "generate_rollouts_with_sglang",
        "integrate_with_rollout",
        "setup_bi_level_irl",
        "load_expert_demonstrations",
        "BiLevelOptimizer",
    ):
        assert callable(getattr(slime, name))


@pytest.fixture(scope="module")
def checkout() -> Path:
    if "IRLFAST_SLIME" not in os.environ:
        pytest.skip("set IRLFAST_SLIME to a checkout of slime")
    return Path(os.environ["IRLFAST_SLIME"])


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_slime_calls_it_so(checkout: Path, point: Point) -> None:
    tree = ast.parse((checkout / point.file).read_text(encoding="utf-8"))
    calls = {ast.unparse(node): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert point.call in calls
    awaited = {ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Await)}
    assert (point.call in awaited) == point.awaited


def test_slimes_sample_and_tis_have_these_fields(checkout: Path) -> None:
    tree = ast.parse((checkout / "slime/utils/types.py").read_text(encoding="utf-8"))
    classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    fields = {
        node.target.id: "" if node.value is None else ast.unparse(node.value)
        for node in classes["Sample"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    ours = {field.name: field for field in Sample.__dataclass_fields__.values()}
    assert set(ours) <= set(fields)
    for name in ("tokens", "metadata"):
        assert fields[name].startswith("field(default_factory=")
    for name in ("reward", "loss_mask", "rollout_log_probs", "group_index", "index", "label"):
        assert fields[name] == "None"
        assert ours[name].default is None
    statuses = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value)
        for node in classes["Status"].body
        if isinstance(node, ast.Assign)
    }
    assert statuses == {status.name: status.value for status in Sample.Status}
    losses = ast.parse((checkout / "slime/backends/megatron_utils/loss.py").read_text(encoding="utf-8"))
    functions: dict[str, Any] = {node.name: node for node in ast.walk(losses) if isinstance(node, ast.FunctionDef)}
    assert [a.arg for a in functions["vanilla_tis_function"].args.kwonlyargs] == list(TIS[1:5])
    assert [a.arg for a in functions["policy_loss_function"].args.args] == list(REDUCED)


def test_slime_fails_on_a_finished_sample_without_a_reward(checkout: Path) -> None:
    """Why `rescore` scores finished samples itself, and does not only clear their rewards."""
    source = (checkout / "slime/rollout/sglang_rollout.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    (function,) = [n for n in ast.walk(tree) if isinstance(n, ast.AsyncFunctionDef) and n.name == "generate_and_rm"]
    finished = next(
        node
        for node in ast.walk(function)
        if isinstance(node, ast.If) and "Sample.Status.COMPLETED" in ast.unparse(node.test)
    )
    assert "assert sample.reward is not None" in ast.unparse(finished)
    assert "if sample.reward is None:" in ast.unparse(function)


PAGE = (Path(__file__).parents[2] / "docs" / "slime.md").read_text(encoding="utf-8")


def test_the_paths_and_settings_of_the_page_exist() -> None:
    paths = set(re.findall(r"irlfast\.integrations\.slime\.(\w+)", PAGE))
    assert paths == {point.name for point in POINTS}
    source = "".join(path.read_text(encoding="utf-8") for path in Path(slime.__path__[0]).glob("*.py"))
    settings = set(re.findall(r"`(irl(?:fast)?_\w+|reward_model_\w+)[`:]", PAGE))
    assert len(settings) > 15
    for name in settings:
        assert f'"{name}"' in source, name


# Of Megatron, Ray, git and irlfast itself, which the page also calls.
OTHERS = {
    "slime's Megatron": {
        "optimizer",
        "lr",
        "lr-decay-style",
        "attention-dropout",
        "hidden-dropout",
        "attention-backend",
    },
    "Megatron's parallelism": {"tensor-model-parallel-size", "context-parallel-size"},
    "slime's SGLang": {"sglang-mem-fraction-static"},
    "ray": {"head", "num-gpus", "address", "runtime-env-json"},
    "irlfast": {"reward", "watch", "max-response-tokens", "host"},
    "other tools": {"no-deps", "checkout"},
}


def test_slime_has_the_options_of_the_page(checkout: Path) -> None:
    source = (checkout / "slime/utils/arguments.py").read_text(encoding="utf-8")
    known = set(re.findall(r'"--([a-z][\w-]+)"', source)) | set().union(*OTHERS.values())
    for option in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", PAGE)):
        assert option in known, option
