"""Which server a prompt goes to: the same one for the same beginning, and none much busier than the others.

Rendezvous hashing with bounded loads: each prompt ranks the servers by a hash of its first tokens and each server's
name, and takes the first that has room. When a server goes, only its prompts move.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

# A server takes at most so many times its even share: prompts that all begin alike must still spread.
_LOAD_BOUND = 1.25


def spread(prompts: Sequence[Sequence[int]], servers: Sequence[str], *, prefix_tokens: int) -> list[str]:
    """The server of each prompt.

    Args:
        prompts: token ids.
        servers: their names, at least one.
        prefix_tokens: how many leading tokens decide.
    """
    if not servers:
        raise ValueError("servers is empty: there is none to send prompts to")
    capacity = math.ceil(_LOAD_BOUND * len(prompts) / len(servers))
    load = dict.fromkeys(servers, 0)
    chosen = []
    for prompt in prompts:
        start = " ".join(map(str, prompt[:prefix_tokens]))
        ranked = sorted(servers, key=lambda server: hashlib.sha256(f"{server} {start}".encode()).digest())
        server = next(s for s in ranked if load[s] < capacity)
        load[server] += 1
        chosen.append(server)
    return chosen
