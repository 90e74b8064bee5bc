"""The reward server on loopback, driven by clients in another process: speed, exchange under load, overload, end.

python -m bench.serving --model MODEL --texts FILE
"""

from __future__ import annotations

import gzip
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import _results
from irlfast.data import DataError, Demonstration, tokenize_demonstrations
from irlfast.scorer import RewardScorer

from . import _page
from ._client import Reply
from ._server import Run, Server


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Measure `irlfast serve-reward`."""

    model: Path
    """Folder of the language model."""
    texts: Path
    """Gzipped JSON lines with "text"."""
    json: Path = Path("docs/results/serve_reward.json")
    """Where the figures go."""
    page: Path = Path("docs/serving.md")
    """The page whose figures are renewed."""
    seconds: float = 4.0
    """Length of a stretch; its first quarter warms up and is not counted."""
    rounds: int = 3
    """Stretches of each setting, in turn; figures are their medians."""
    connections: tuple[int, ...] = (1, 8, 32, 64, 128)
    """Clients that each wait for their answer."""
    swaps: int = 8
    """Rewards exchanged under load."""
    overload: float = 2.0
    """Requests offered, as a multiple of what the server answers."""
    threads: int = 1
    """Threads of the server's model; the clients take the other core."""
    prompt_words: int = 12
    """Words of a prompt."""
    response_words: int = 20
    """Words of a response."""


def rows(options: Serving) -> list[Demonstration]:
    """Beginnings of stories, and how they go on."""
    cut, end = options.prompt_words, options.prompt_words + options.response_words
    found = []
    with gzip.open(options.texts, "rt", encoding="utf-8") as lines:
        for line in lines:
            words = json.loads(line)["text"].split(" ")
            found.append(Demonstration(prompt=" ".join(words[:cut]), response=" " + " ".join(words[cut:end])))
    return [row for row in found if row.response.strip()]


class Bench:
    """The measurements, each with a server of its own.

    Args:
        options: what to measure. run: what is served.
    """

    def __init__(self, options: Serving, run: Run) -> None:
        self.options = options
        self.run = run
        self.rows = rows(options)
        run.checkpoint(1)

    @contextmanager
    def server(self, *more: str) -> Iterator[Server]:
        served = ["serve-reward", "--reward", str(self.run.folder), "--threads", str(self.options.threads)]
        with self._running("irlfast.cli", *served, "--port", "0", *more) as server:
            yield server

    @contextmanager
    def _running(self, *command: str) -> Iterator[Server]:
        server = Server(["-m", *command])
        try:
            yield server
        finally:
            server.kill()

    def client(self, server: Server, seconds: float, **plan: Any) -> subprocess.Popen[str]:
        bodies = [{"prompt": row.prompt, "response": row.response, "label": None} for row in self.rows]
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.serving._client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        plan = {"host": "127.0.0.1", "port": server.port, "bodies": bodies, "seconds": seconds, **plan}
        json.dump(plan, process.stdin)
        process.stdin.close()
        return process

    def load(self, server: Server, seconds: float | None = None, **plan: Any) -> dict[str, Any]:
        return outcome(self.client(server, seconds or self.options.seconds, **plan))

    def direct(self) -> dict[str, float]:
        """The scorer alone, 64 rows at a time as the server gathers them, in this process."""
        scorer = RewardScorer.from_pretrained(self.run.folder, batch_size=32)
        scorer.score(self.rows[:64])
        start, cpu, done = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < self.options.seconds:
            scorer.score([self.rows[(done + i) % len(self.rows)] for i in range(64)])
            done += 64
        seconds = time.perf_counter() - start
        return {"rows_per_second": done / seconds, "cpu_ms_per_row": 1000 * (time.process_time() - cpu) / done}

    def speed(self) -> dict[str, Any]:
        """By clients; batches of one beside them; the scorer without a server, and the server without a scorer."""
        measured: dict[tuple[str, int], list[dict[str, Any]]] = {}
        alone = []
        one_by_one = self.server("--batch-size", "1", "--gather", "1")
        with self.server() as batched, one_by_one as single, self._running("bench.serving._free") as free:
            for server in (batched, single, free):
                self.load(server, 1.0, connections=8)
            for _ in range(self.options.rounds):
                alone.append(self.direct())
                for count in self.options.connections:
                    measured.setdefault(("64 at most", count), []).append(self._stretch(batched, count))
                most = max(self.options.connections)
                measured.setdefault(("one by one", most), []).append(self._stretch(single, most))
                measured.setdefault(("64 at most, a reward that costs nothing", most), []).append(
                    self._stretch(free, most)
                )
        table = [
            {"batches": size, "connections": count, **_medians(found)} for (size, count), found in measured.items()
        ]
        return {"scorer_alone": _medians(alone), "by_connections": table}

    def _stretch(self, server: Server, connections: int) -> dict[str, Any]:
        before, cpu = server.get("/info"), server.cpu_seconds()
        found = self.load(server, connections=connections)
        after, cpu = server.get("/info"), server.cpu_seconds() - cpu
        assert found["lost"] == found["unsent"] == 0, found
        batches = after["batches"] - before["batches"]
        warm = self.options.seconds / 4
        kept = [reply for reply in found["replies"] if reply.began >= warm]
        assert {reply.status for reply in kept} == {200}, Counter(reply.status for reply in kept)
        last = max(reply.began + reply.seconds for reply in kept)
        return {
            "requests_per_second": len(kept) / (last - warm),
            **_latency(kept),
            "rows_per_batch": (after["rows"] - before["rows"]) / batches,
            "cpu_ms_per_request": 1000 * cpu / len(found["replies"]),
        }

    def exchange(self) -> dict[str, Any]:
        """Rewards exchanged under load: requests lost, errors, and answers that no version gives."""
        steps, seconds = self.options.swaps, self.options.seconds
        with self.server() as server:
            self.load(server, 1.0, connections=8)
            process = self.client(server, seconds * 2, connections=64)
            time.sleep(seconds / 4)
            took = []
            for step in range(2, steps + 2):
                self.run.checkpoint(step)
                start = time.perf_counter()
                said = server.post("/reload")
                took.append(time.perf_counter() - start)
                assert said["version"].startswith(f"step-{step}-"), said
                time.sleep(seconds / steps)
            found = outcome(process)
        replies = found["replies"]
        wrong = self._wrong([reply for reply in replies if reply.status == 200])
        return {
            "connections": 64,
            "exchanges": steps,
            "seconds_to_exchange": round(statistics.median(took), 4),
            "requests": len(replies) + found["lost"] + found["unsent"],
            "lost": found["lost"] + found["unsent"],
            "other_than_200": sum(reply.status != 200 for reply in replies),
            "versions_seen": len({reply.version for reply in replies}),
            "answers_unlike_their_version": wrong,
            **_latency(replies),
        }

    def _wrong(self, replies: Sequence[Reply]) -> int:
        """Answers that differ from what the reward named in their header gives, computed here."""
        wrong = 0
        for version in sorted({reply.version for reply in replies}):
            step = self.run.folder / "checkpoints" / "-".join(version.split("-")[:2])
            scores = RewardScorer.from_pretrained(step, batch_size=32).score(self.rows)
            for reply in replies:
                if reply.version == version:
                    score = scores[reply.row]
                    assert not isinstance(score, DataError)
                    assert score.normalised is not None
                    wrong += abs(reply.value - score.normalised) > 1e-4
        return wrong

    def overloaded(self, capacity: float) -> dict[str, Any]:
        """More requests than are answered, with room for two batches: who is refused, how long the others wait."""
        rate = self.options.overload * capacity
        with self.server("--queue-size", "64") as server:
            self.load(server, 1.0, connections=8)
            found = self.load(server, self.options.seconds * 2, connections=128, rate=rate)
        replies = found["replies"]
        taken = [reply for reply in replies if reply.status == 200]
        refused = [reply for reply in replies if reply.status == 503]
        return {
            "offered_per_second": round(rate, 1),
            "queue_size": 64,
            "requests": len(replies) + found["lost"] + found["unsent"],
            "lost": found["lost"] + found["unsent"],
            "refused_share": round(len(refused) / len(replies), 4),
            "other_statuses": len(replies) - len(taken) - len(refused),
            "taken_per_second": round(len(taken) / max(reply.began + reply.seconds for reply in taken), 1),
            "taken": _latency(taken),
            "refused": _latency(refused) if refused else None,
        }

    def end(self) -> dict[str, Any]:
        """Told to stop under load: what was taken is answered; what comes later finds nobody."""
        with self.server() as server:
            self.load(server, 1.0, connections=8)
            process = self.client(server, 30.0, connections=64)
            time.sleep(self.options.seconds / 2)
            start = time.perf_counter()
            status = server.terminate()
            seconds = time.perf_counter() - start
            found = outcome(process)
        return {
            "connections": 64,
            "exit_status": status,
            "seconds_to_end": round(seconds, 3),
            "requests": len(found["replies"]) + found["lost"],
            "lost": found["lost"],
            "other_than_200": sum(reply.status != 200 for reply in found["replies"]),
        }


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a client saw."""
    assert process.stdout is not None
    found: dict[str, Any] = json.load(process.stdout)
    if process.wait() != 0:
        raise RuntimeError(f"the load client ended with {process.returncode}")
    return {**found, "replies": [Reply(*reply) for reply in found["replies"]]}


def _latency(replies: Sequence[Reply]) -> dict[str, float]:
    """Milliseconds."""
    times = sorted(reply.seconds for reply in replies)
    return {
        f"p{share}_ms": round(1000 * times[min(len(times) - 1, share * len(times) // 100)], 2) for share in (50, 99)
    }


def _medians(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in found), 2) for name in found[0]}


def main() -> int:
    options = tyro.cli(Serving)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Run(Path(folder) / "run", options.model))
        tokenizer = RewardScorer.from_pretrained(bench.run.folder).tokenizer
        tokenized = tokenize_demonstrations(bench.rows, tokenizer, max_response_tokens=10_000)
        tokens = statistics.fmean(len(row.prompt_ids) + len(row.response_ids) for row in tokenized)
        figures: dict[str, Any] = {"rows": len(bench.rows), "tokens_per_row": round(tokens, 1), **bench.speed()}
        print(json.dumps(figures), file=sys.stderr, flush=True)
        by_clients = [row for row in figures["by_connections"] if row["batches"] == "64 at most"]
        capacity = max(row["requests_per_second"] for row in by_clients)
        for name, measure in (("exchange", bench.exchange), ("overload", lambda: bench.overloaded(capacity))):
            figures[name] = measure()
            print(json.dumps({name: figures[name]}), file=sys.stderr, flush=True)
        figures["end"] = bench.end()
        print(json.dumps({"end": figures["end"]}), file=sys.stderr, flush=True)
    provenance = _results.provenance(shlex.join(["python", "-m", "bench.serving", *sys.argv[1:]]))
    settings = {"seconds": options.seconds, "rounds": options.rounds, "threads": options.threads}
    found = {"provenance": provenance, **settings, **figures}
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    options.page.write_text(_page.renew(options.page.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
