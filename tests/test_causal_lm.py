"""causal_lm: the hidden path against the model's own logits, the heads it finds and those it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from irlfast import ops
from irlfast.causal_lm import (
    NoLinearHeadError,
    causal_lm_policy_ref_stats,
    causal_lm_token_stats,
    linear_head,
)
from irlfast.eval import toy

FAMILIES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "phi",
    "cohere",
    "granite",
    "hyperclovax",
    "bloom",
    "opt",
    "mpt",
]
# What stands between the output layer and the logits, stated apart from the code under test: (scale, softcap).
HEADS = {"cohere": (0.25, None), "granite": (0.25, None), "hyperclovax": (0.5, None), "gemma2": (1.0, 3.0)}
MakeLM = Callable[[str], nn.Module]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch(length: int = 9) -> tuple[Tensor, Tensor]:
    """Three rows: padded on the left, on the right, not at all."""
    ids = torch.randint(3, 64, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, length - 4 :] = 0
    return ids * mask, mask


def build(make_lm: MakeLM, family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if family == "hyperclovax" and not hasattr(transformers, "HyperCLOVAXConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no HyperCLOVAX")
    model = make_lm(family).to(dtype)
    if family == "gemma2":
        model.config.final_logit_softcapping = 3.0  # low enough to bend these small logits
    return model


def stated(model: nn.Module, ids: Tensor, mask: Tensor, temperature: float = 1.0) -> ops.TokenStats:
    """What is asked for, from the model's logits in float64, one real token after the other."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    optional = {} if type(model).__name__.startswith(("Bloom", "Mpt")) else {"position_ids": positions}
    logits = model(input_ids=ids, attention_mask=mask, **optional).logits
    rows = logits[:, :-1].double() / temperature
    log_p = rows.log_softmax(-1)
    wanted = (mask[:, 1:] * mask[:, :-1]).bool()
    values = (
        log_p.gather(-1, ids[:, 1:, None]).squeeze(-1),
        -(log_p.exp() * log_p).sum(-1),
        rows.logsumexp(-1),
    )
    return ops.TokenStats(*(nn.functional.pad(torch.where(wanted, v, 0.0), (1, 0)) for v in values))


def objective(stats: ops.TokenStats) -> Tensor:
    return stats.logprob.sum() + 0.3 * stats.entropy.sum() + 0.1 * stats.lse.square().sum()


def gradients(model: nn.Module, stats: ops.TokenStats) -> dict[str, Tensor]:
    model.zero_grad()
    objective(stats).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["hidden", "logits", "auto"])
def test_statistics_and_gradients_are_those_of_the_models_logits(make_lm: MakeLM, family: str, path: str) -> None:
    model = build(make_lm, family)
    ids, mask = batch()
    got = causal_lm_token_stats(model, ids, attention_mask=mask, temperature=0.7, path=path)
    want = stated(model, ids, mask, temperature=0.7)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
        assert (a[:, 0] == 0).all()
    expected = gradients(model, want)
    obtained = gradients(model, got)
    assert obtained.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            obtained[name], expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float64_as_the_models_logits_are(make_lm: MakeLM, family: str) -> None:
    """The truth is the head in float64 on the same bfloat16 hidden states."""
    model = build(make_lm, family, torch.bfloat16)
    ids, mask = batch()
    wanted = (mask[:, 1:] * mask[:, :-1]).bool()
    position_ids = {} if family in ("bloom", "mpt") else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **position_ids)
        head = model.get_output_embeddings()
        bias = None if head.bias is None else head.bias.double()
        scale, softcap = HEADS.get(family, (1.0, None))
        logits = scale * nn.functional.linear(output.hidden_states[-1].double(), head.weight.double(), bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        truth = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)[wanted]
    paths = {path: causal_lm_token_stats(model, ids, attention_mask=mask, path=path) for path in ("hidden", "logits")}
    error = {path: float((stats.logprob[:, 1:][wanted].detach() - truth).abs().max()) for path, stats in paths.items()}
    assert error["hidden"] <= error["logits"] + 1e-2
    flat = {path: torch.cat([g.flatten().float() for g in gradients(model, s).values()]) for path, s in paths.items()}
    assert float((flat["hidden"] - flat["logits"]).norm() / flat["logits"].norm()) < 0.03


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_autocast_applies_the_head_in_its_dtype(make_lm: MakeLM, family: str) -> None:
    model = build(make_lm, family)
    ids, mask = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (causal_lm_token_stats(model, ids, attention_mask=mask, path=p) for p in ("hidden", "logits"))
    plain = causal_lm_token_stats(model, ids, attention_mask=mask, path="logits").logprob
    assert got.logprob.dtype == torch.float32
    assert float((got.logprob - want.logprob).detach().abs().max()) < 0.05
    assert float((want.logprob - plain).detach().abs().max()) > 1e-4  # autocast was on
    a, b = (torch.cat([g.flatten() for g in gradients(model, s).values()]) for s in (got, want))
    assert float((a - b).norm() / b.norm()) < 0.03


def test_only_what_predicts_a_wanted_token_goes_through_the_head(
    make_lm: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op passes over rows with an ignored label."""
    model = build(make_lm, "llama")
    ids, mask = batch()
    wanted = torch.zeros_like(mask)
    wanted[0, 5] = wanted[2, 1] = wanted[2, 8] = wanted[1, 0] = 1  # the last is no token that anything predicts
    seen = []
    op = ops.linear_token_stats
    monkeypatch.setattr(
        ops, "linear_token_stats", lambda h, w, labels, **k: seen.append(labels) or op(h, w, labels, **k)
    )
    stats = causal_lm_token_stats(model, ids, attention_mask=mask, token_mask=wanted)
    assert (seen[0] != -100).nonzero().tolist() == [[0, 4], [2, 0], [2, 7]]
    whole = causal_lm_token_stats(model, ids, attention_mask=mask)
    wanted[1, 0] = 0
    for part, full in zip(stats, whole, strict=True):
        torch.testing.assert_close(part, full * wanted, rtol=1e-6, atol=1e-6)


def test_the_model_computes_the_logits_of_one_position(make_lm: MakeLM) -> None:
    model = build(make_lm, "llama")
    ids, _ = batch()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    causal_lm_token_stats(model, ids, path="hidden")
    assert shapes == [(3, 1, 64)]


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_temperature_may_be_one_a_token_or_one_a_row(make_lm: MakeLM, path: str) -> None:
    model = build(make_lm, "granite")
    ids, mask = batch()
    per_token = torch.rand(ids.shape) + 0.5
    for temperature in (per_token, per_token[:, :1], per_token[0]):
        got = causal_lm_token_stats(model, ids, attention_mask=mask, temperature=temperature, path=path).logprob
        for row, column in ((0, 5), (1, 2), (2, 8)):
            t = float(temperature.expand(ids.shape)[row, column])
            want = stated(model, ids, mask, temperature=t).logprob[row, column]
            assert float(got[row, column].detach()) == pytest.approx(float(want.detach()), abs=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bloom"])
def test_padding_on_either_side_changes_nothing(make_lm: MakeLM, family: str) -> None:
    """GPT-2 has absolute positions: counted from the row's first column, left padding shifts them."""
    model = build(make_lm, family)
    row = torch.tensor([[5, 9, 11, 7, 2]])
    alone = causal_lm_token_stats(model, row).logprob[0]
    pad, real = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5, dtype=torch.long)
    right = causal_lm_token_stats(model, torch.cat([row, pad], 1), attention_mask=torch.cat([real, pad], 1)).logprob[0]
    left = causal_lm_token_stats(model, torch.cat([pad, row], 1), attention_mask=torch.cat([pad, real], 1)).logprob[0]
    torch.testing.assert_close(right[:5], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left[3:], alone, rtol=1e-5, atol=1e-5)
    assert (right[5:] == 0).all()
    assert (left[:4] == 0).all()


@pytest.mark.filterwarnings("ignore")  # peft sets the position_ids aside and says so
@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_virtual_tokens_of_prompt_tuning_are_not_scored(make_lm: MakeLM, path: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    inner = build(make_lm, "llama")
    model = peft.get_peft_model(inner, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids, mask = batch()[0][2:], torch.ones(1, 9, dtype=torch.long)
    got = causal_lm_token_stats(model, ids, attention_mask=mask, path=path).logprob
    virtual = model.get_prompt(batch_size=1)
    embeddings = torch.cat([virtual, inner.get_input_embeddings()(ids)], dim=1)
    want = inner(inputs_embeds=embeddings).logits[:, 4:-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got[:, 1:], want, rtol=1e-5, atol=1e-5)
    (slope,) = torch.autograd.grad(got.sum(), model.prompt_encoder["default"].embedding.weight)
    assert float(slope.abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_lora_adapters_are_applied_and_trained(make_lm: MakeLM) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build(make_lm, "llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    ids, mask = batch()
    got = causal_lm_token_stats(model, ids, attention_mask=mask, path="hidden")
    want = stated(model, ids, mask)
    torch.testing.assert_close(got.logprob.double(), want.logprob, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert float((stated(model, ids, mask).logprob - want.logprob).detach().abs().max()) > 1e-2
    expected, obtained = gradients(model, want), gradients(model, got)
    assert obtained.keys() == expected.keys()
    assert all("lora" in name for name in obtained)
    for name in expected:
        torch.testing.assert_close(obtained[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it
def test_lora_on_the_head_is_refused_with_the_way_out(make_lm: MakeLM) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build(make_lm, "llama"), peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    ids, mask = batch()
    with pytest.raises(
        NoLinearHeadError, match=r"peft\.\S+Linear, not a plain torch\.nn\.Linear: use path='logits', or"
    ):
        causal_lm_token_stats(model, ids, attention_mask=mask, path="hidden")
    got = causal_lm_token_stats(model, ids, attention_mask=mask)
    torch.testing.assert_close(got.logprob.double(), stated(model, ids, mask).logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["hidden", "auto"])
def test_a_head_that_is_more_than_its_configuration_says_is_noticed(make_lm: MakeLM, path: str) -> None:
    """Families use one name for opposite things: Granite divides by logits_scaling, HyperCLOVA X multiplies."""
    model = build(make_lm, "llama")
    model.config.logits_scaling = 4.0  # which Llama does not apply
    ids, mask = batch()
    message = (
        r"LlamaForCausalLM are not softcap\(s \(h W\^T \+ b\)\) with s = 0\.25 and softcap = None: .* path='logits'"
    )
    with pytest.raises(NoLinearHeadError, match=message):
        causal_lm_token_stats(model, ids, attention_mask=mask, path=path)
    causal_lm_token_stats(model, ids, attention_mask=mask, path="logits")


@pytest.mark.parametrize("kind", ["wrapped", "in place", "base in place"])
def test_compiled_models_go_by_their_logits(make_lm: MakeLM, kind: str) -> None:
    """Code compiled before the hook was there does not call it."""
    model = build(make_lm, "llama")
    ids, mask = batch()
    want = causal_lm_token_stats(model, ids, attention_mask=mask).logprob
    if kind == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        (model if kind == "in place" else model.base_model).compile(backend="eager")
    for _ in range(2):
        torch.testing.assert_close(causal_lm_token_stats(compiled, ids, attention_mask=mask).logprob, want)
    with pytest.raises(NoLinearHeadError, match="was compiled as a whole"):
        causal_lm_token_stats(compiled, ids, attention_mask=mask, path="hidden")
    torch.compiler.reset()


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)  # since transformers 5
@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_activation_checkpointing_gives_the_same_gradients(make_lm: MakeLM, path: str) -> None:
    model = build(make_lm, "llama").train()
    ids, mask = batch()
    want = gradients(model, causal_lm_token_stats(model, ids, attention_mask=mask))
    model.gradient_checkpointing_enable()
    got = gradients(model, causal_lm_token_stats(model, ids, attention_mask=mask, path=path))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_even_where_the_model_fails(make_lm: MakeLM) -> None:
    model = build(make_lm, "llama")
    causal_lm_token_stats(model, batch()[0])
    with pytest.raises(IndexError):
        causal_lm_token_stats(model, torch.full((1, 4), 64))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_nothing_asked_for_gives_zeros_and_gradient_zero(make_lm: MakeLM, path: str) -> None:
    model = build(make_lm, "llama")
    ids, _ = batch()
    stats = causal_lm_token_stats(model, ids, token_mask=torch.zeros_like(ids), path=path)
    assert all(x.shape == ids.shape and (x == 0).all() for x in stats)
    assert all((g == 0).all() for g in gradients(model, stats).values())


def test_distributed_data_parallel_is_called_itself(make_lm: MakeLM, tmp_path: Path) -> None:
    """Called past, its reducer would not run and ranks would drift apart."""
    model = build(make_lm, "llama")
    ids, mask = batch()
    want = gradients(model, causal_lm_token_stats(model, ids, attention_mask=mask))
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        calls = []
        parallel.register_forward_pre_hook(lambda module, args: calls.append(1))
        got = gradients(model, causal_lm_token_stats(parallel, ids, attention_mask=mask, path="hidden"))
    finally:
        torch.distributed.destroy_process_group()
    assert calls == [1]
    for name in want:
        torch.testing.assert_close(got[name], want[name])


class Bigrams(nn.Module):
    """No head, no mask, no positions, and a plain tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def test_any_module_with_logits_will_do_on_the_logits_path() -> None:
    torch.manual_seed(0)
    model = Bigrams()
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    stats = causal_lm_token_stats(model, ids, attention_mask=mask)
    log_p = model.table.weight.log_softmax(-1)
    want = torch.stack([log_p[1, 2], log_p[2, 3], log_p[4, 5]])
    torch.testing.assert_close(stats.logprob[[0, 0, 1], [1, 2, 1]], want)
    assert float(stats.logprob[1, 2].detach()) == 0.0
    with pytest.raises(ValueError, match=r"Bigrams takes no attention_mask .*: pad on the right"):
        causal_lm_token_stats(model, ids, attention_mask=mask.flip(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Bigrams(), r"Bigrams has no get_output_embeddings\(\), as transformers models do: use path='logits'"),
        (toy.ToyPolicy(), r"ToyPolicy has no get_output_embeddings"),
    ],
)
def test_models_without_a_head_say_so(model: nn.Module, message: str) -> None:
    with pytest.raises(NoLinearHeadError, match=message):
        causal_lm_token_stats(model, torch.tensor([[4, 1, 3]]), path="hidden")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.set_output_embeddings(nn.Sequential(m.lm_head)),
            "is a torch.nn.modules.container.Sequential, not a",
        ),
        (
            lambda m: setattr(m.lm_head, "forward", m.lm_head.forward),
            "is a torch.nn.modules.linear.Linear, not a plain",
        ),
        (
            lambda m: setattr(m.lm_head.weight, "data", torch.empty(0)),
            r"float32 and shape \(0,\), not a whole",
        ),  # sharded
        (lambda m: setattr(m.config, "is_encoder_decoder", True), "encoder-decoder"),
        (lambda m: setattr(m, "base_model_prefix", ""), "has no base model apart from itself"),
        (lambda m: setattr(m, "forward", lambda input_ids: None), "takes no logits_to_keep"),
    ],
)
def test_heads_it_cannot_represent_are_refused(make_lm: MakeLM, change: Callable[[Any], Any], message: str) -> None:
    model = build(make_lm, "llama")
    change(model)
    with pytest.raises(NoLinearHeadError, match=message):
        linear_head(model)


def test_errors_of_shape_and_choice(make_lm: MakeLM) -> None:
    model = build(make_lm, "llama")
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"path is 'fast'; expected one of \('auto', 'hidden', 'logits'\)"):
        causal_lm_token_stats(model, ids, path="fast")
    with pytest.raises(ValueError, match=r"input_ids has shape \(9,\); expected \[B, T\]"):
        causal_lm_token_stats(model, ids[0])
    with pytest.raises(ValueError, match=r"token_mask has shape \(9,\); expected \(3, 9\) as input_ids"):
        causal_lm_token_stats(model, ids, attention_mask=mask, token_mask=mask[0])


def test_a_real_model_gives_the_same_on_both_paths(shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Once upon a time, there was a little girl named Lily.", "The cat sat."]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    got = causal_lm_token_stats(model, ids, attention_mask=mask, path="hidden")
    want = stated(model, ids, mask)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert -4.0 < float(got.logprob.sum().detach()) / int(mask.sum()) < -0.3  # it has learned to speak
    expected, obtained = gradients(model, want), gradients(model, got)
    for name in expected:
        torch.testing.assert_close(obtained[name], expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "families", [("llama", "qwen3"), ("gemma2", "gemma2"), ("granite", "llama"), ("cohere", "cohere")]
)
def test_policy_and_reference_statistics_are_those_of_their_logits(
    make_lm: Callable[[str], torch.nn.Module], families: tuple[str, str]
) -> None:
    """Two heads alike, capped, scaled differently (which only the logits path can), and scaled alike."""
    model, reference = map(make_lm, families)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.9)
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, 5:] = 0
    wanted = real.bool() & (torch.arange(7) >= 2)
    temperature = 0.7
    got = causal_lm_policy_ref_stats(
        model, reference, ids, attention_mask=real, token_mask=wanted, temperature=temperature
    )
    logits, ref = (m(input_ids=ids, attention_mask=real).logits[:, :-1] / temperature for m in (model, reference))
    log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
    labels = ids[:, 1:, None]
    want = {
        "logprob": log_p.gather(-1, labels)[..., 0],
        "lse": logits.logsumexp(-1),
        "ref_logprob": log_q.gather(-1, labels)[..., 0],
        "reverse_kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "forward_kl": (log_q.exp() * (log_q - log_p)).sum(-1),
    }
    for name, value in want.items():
        expected = torch.where(wanted[:, 1:], value, 0.0)
        torch.testing.assert_close(getattr(got, name)[:, 1:], expected, rtol=2e-4, atol=2e-4)
        assert not getattr(got, name)[:, 0].any()
    parameter = model.get_output_embeddings().weight
    for name in ("logprob", "lse", "reverse_kl"):
        grads = [
            torch.autograd.grad(x.sum(), parameter, retain_graph=True)[0]
            for x in (getattr(got, name), torch.where(wanted[:, 1:], want[name], 0.0))
        ]
        torch.testing.assert_close(*grads, rtol=2e-3, atol=2e-3)
    assert all(p.grad is None for p in reference.parameters())


def test_heads_that_scale_differently_are_refused_on_the_hidden_path(
    make_lm: Callable[[str], torch.nn.Module],
) -> None:
    ids = torch.randint(3, 64, (2, 5))
    with pytest.raises(NoLinearHeadError, match="scale or cap their logits differently"):
        causal_lm_policy_ref_stats(make_lm("granite"), make_lm("llama"), ids, path="hidden")
