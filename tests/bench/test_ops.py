"""Every op's benchmark at a tiny size: contenders agree with float64, and bars are about what is measured."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from bench._case import MALLOCS, Case
from bench._harness import Settings, measure_pass
from bench._run import op_modules

CASES = [case for op in op_modules() for case in importlib.import_module(f"bench.{op}").CASES]
SETTINGS = Settings(budget=0.0, skip=("compile", "peer"))


def tiny(case: Case) -> Case:
    return dataclasses.replace(case, shape=tuple(min(n, 24 + 5 * i) for i, n in enumerate(case.shape)))


def test_cases_name_their_module_and_known_settings() -> None:
    for op in op_modules():
        for case in importlib.import_module(f"bench.{op}").CASES:
            assert case.op == op
            assert set(case.mallocs) <= set(MALLOCS)
    assert len(set(CASES)) == len(CASES)


@pytest.mark.parametrize("case", sorted({tiny(case) for case in CASES}, key=str), ids=str)
def test_every_contender_is_right_and_every_bar_judged(case: Case) -> None:
    torch.manual_seed(0)
    subjects = set()
    for work in importlib.import_module(f"bench.{case.op}").passes(case):
        for row in measure_pass(work, "tuned", SETTINGS):
            subjects.add((row["pass"], row["subject"]))
            left_out = [name for name, why in row["skipped"].items() if "on request" not in why]
            assert not set(left_out) & {c.name for c in work.contenders}, row["skipped"]
            for verdict in row["verdicts"]:
                judged = (
                    verdict["kind"] in ("extra_mib", "peak") or verdict["of"] == "compile" or verdict["met"] is not None
                )
                assert judged, verdict
    assert subjects
