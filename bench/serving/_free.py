"""`python -m bench.serving._free`: the server with a reward that costs nothing, so that what is left is the server."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from irlfast.data import DataError, Demonstration, TokenizedDemonstration
from irlfast.scorer import Score, TextScorer
from irlfast.serving import AppOptions, LoadOptions, ServedReward, ServerOptions, serve

_SCORE = Score(reward=0.5, normalised=0.25)


class FreeScorer(TextScorer):
    """Gives every row the same score without a look at it."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(bos_token=None))

    def score(
        self, rows: Sequence[Demonstration], *, tokens: bool = False, empty_responses: bool = False
    ) -> list[Score | DataError]:
        return [_SCORE] * len(rows)

    def score_tokens(self, rows: Sequence[TokenizedDemonstration], *, tokens: bool = False) -> Iterator[Score]:
        return iter([_SCORE] * len(rows))


def main() -> int:
    app = AppOptions(
        token=None, raw=False, batch_size=32, gather=64, batch_wait=0.002, queue_size=1024, max_body=1 << 23
    )
    folder = Path("nowhere")
    options = ServerOptions(host="127.0.0.1", port=0, load=LoadOptions(reward=folder), app=app, watch=None, drain=10.0)
    served = ServedReward(scorer=FreeScorer(), folder=folder, version="free", files=(), loaded=time.time())

    async def life() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

        def started(said: dict[str, Any]) -> None:
            print(json.dumps(said), flush=True)

        await serve(options, served, stop, started)

    asyncio.run(life())
    return 0


if __name__ == "__main__":
    sys.exit(main())
