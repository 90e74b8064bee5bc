from collections.abc import Callable

import pytest
import torch

from irlfast.commands.engines import EngineConfig
from irlfast.commands.language_model import LanguageModel
from irlfast.rollout import SGLangError, SGLangOptions, TransformersEngine


@pytest.fixture
def loaded(make_lm: Callable[[str], torch.nn.Module]) -> LanguageModel:
    return LanguageModel(model=make_lm("llama"), tokenizer=None, eos_token_ids=[2], pad_token_id=0)


def test_the_policy_samples_in_this_process_unless_told_otherwise(loaded: LanguageModel) -> None:
    engine = EngineConfig().make(loaded, "unused")
    assert isinstance(engine, TransformersEngine)
    assert engine.model is loaded.model


def test_addresses_without_sglang_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout.urls = \('http://a:1',\) needs rollout.engine sglang, got transf"):
        EngineConfig(urls=("http://a:1",))


def test_a_server_that_cannot_start_is_an_error_in_words(loaded: LanguageModel) -> None:
    config = EngineConfig(engine="sglang", sglang=SGLangOptions(python="/no/such/python"))
    with pytest.raises(SGLangError, match="cannot start /no/such/python"):
        config.make(loaded, "unused")
