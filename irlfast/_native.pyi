from typing import Any

DTYPES: dict[str, int]

def build_info() -> dict[str, Any]: ...
def advise_huge_pages(data: int, bytes: int) -> None: ...
def first_invalid_label(labels: int, count: int, vocab: int, ignore_index: int) -> int: ...
def token_stats_forward(
    logits: int,
    dtype: int,
    layout: tuple[int, int, int, int],
    vocab: int,
    labels: int,
    labels_per_row: int,
    ignore_index: int,
    temperature: float,
    row_temperature: int,
    softcap: float,
    logprob: int,
    entropy: int,
    lse: int,
    state: int,
    threads: int,
    isa: str,
) -> None: ...
def token_stats_backward(
    logits: int,
    dtype: int,
    layout: tuple[int, int, int, int],
    vocab: int,
    labels: int,
    labels_per_row: int,
    ignore_index: int,
    temperature: float,
    row_temperature: int,
    softcap: float,
    state: int,
    grad_logprob: int,
    grad_entropy: int,
    grad_lse: int,
    gradient: int,
    gradient_layout: tuple[int, int, int, int],
    threads: int,
    isa: str,
) -> None: ...
