"""An exported reward inside TRL's GRPO trainer, which loads it by its folder and judges with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from irlfast.rewards import ReaderConfig, create_reward_model, export_sequence_classifier, reward_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # other people's, of which TRL has several
]


def test_trl_judges_by_the_exported_reward(make_lm: Any, tokenizer: Any, tmp_path: Path) -> None:
    """The mean that TRL logs is the served reward of the texts that it gives its reward models, less the offset."""
    trl = pytest.importorskip("trl", reason="compared where trl is installed")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    model = make_lm("llama")
    model.save_pretrained(tmp_path / "lm")
    torch.manual_seed(0)
    reward = create_reward_model({"hidden_size": 32, "hidden_sizes": (), "pooling": "last"}).eval()
    reward.source = ReaderConfig(token_statistics=False)
    reward.normalizer.update(torch.tensor([-3.0, 5.0, 11.0]))
    offset = export_sequence_classifier(reward, tmp_path / "classifier", tokenizer, model)
    judged: list[float] = []

    def ours(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        for prompt, completion in zip(prompts, completions, strict=True):
            # TRL decodes without special tokens and adds none: no BOS, no EOS.
            ids = torch.tensor([tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]])
            real = torch.ones_like(ids, dtype=torch.bool)
            judged.append(float(reward.serve(*reward_inputs(reward, model, ids, real, real))) - offset)
        return judged[-len(prompts) :]

    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lm"),
        reward_funcs=[str(tmp_path / "classifier"), ours],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=5,
            max_steps=1,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w1 w2 w3 ", "w4 "]}),
        processing_class=tokenizer,
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    (name,) = [key for key in logged if key.startswith("rewards/") and key.endswith("/mean") and "ours" not in key]
    assert len(judged) == 4
    assert logged[name] == pytest.approx(sum(judged) / 4, abs=1e-5)
    assert logged[name] == pytest.approx(logged["rewards/ours/mean"], abs=1e-5)
    assert abs(logged[name]) > 0.01
