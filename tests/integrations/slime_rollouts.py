"""slime's own rollout code, sampling, scoring and buffering, around a reward that learns; a line of JSON on what came.

    python tests/integrations/slime_rollouts.py CHECKOUT MODEL TEXTS FOLDER [--server URL] [--group-rm]

Without a server of SGLang's, one that samples by transformers answers in its place. Ray and SGLang's router, which
these parts of slime import and do not call, are stood in for. slime's other imports (httpx, pylatexenc, sympy, tqdm,
...) are needed.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import sys
import threading
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import transformers
from aiohttp import ClientSession, web

from irlfast.rollout import SamplingParams, TransformersEngine

ROLLOUTS, PROMPTS, SAMPLES, LONGEST = 3, 8, 4, 40


class Sampler:
    """What slime asks of SGLang and its router: of a server's, or sampled here."""

    def __init__(self, model: str, server: str | None) -> None:
        self.server = server
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        policy = transformers.AutoModelForCausalLM.from_pretrained(model)
        self.engine = TransformersEngine(policy, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=0)
        self.count = self.since_abort = 0
        self.aborted = asyncio.Event()

    async def generate(self, request: web.Request) -> web.Response:
        if self.server is not None:
            data, headers = await request.read(), {"Content-Type": "application/json"}
            async with ClientSession(headers=headers) as session:
                answer = await session.post(self.server + "/generate", data=data)
                return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")
        body = await request.json()
        wanted = body["sampling_params"]
        self.count += 1
        self.since_abort += 1
        # slime has enough by then: these are slow, and it aborts them. Their groups have finished samples too.
        if self.since_abort > SAMPLES * PROMPTS + 4 and self.count % 2:
            await self.aborted.wait()
            return web.json_response({"text": "", "meta_info": {"finish_reason": {"type": "abort"}}})
        params = SamplingParams(
            max_new_tokens=wanted["max_new_tokens"], temperature=wanted["temperature"], seed=self.count
        )
        found = self.engine.generate([body["input_ids"]], params)
        said = found.input_ids[found.response_mask].tolist()
        logprobs = found.sampler_logprobs[found.response_mask].tolist()
        meta = {
            "finish_reason": {"type": found.finish_reasons[0]},
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, said, strict=True)],
        }
        return web.json_response({"text": self.tokenizer.decode(said), "meta_info": meta})

    async def workers(self, request: web.Request) -> web.Response:
        return web.json_response({"workers": [{"url": self.server or f"http://{request.host}"}]})

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.set()
        self.aborted, self.since_abort = asyncio.Event(), 0
        return web.json_response({})

    async def loads(self, request: web.Request) -> web.Response:
        return web.json_response({"loads": [{"num_reqs": 0}]})

    def start(self) -> int:
        """Listen on a thread of its own; the port."""
        loop, ready = asyncio.new_event_loop(), threading.Event()
        ports: list[int] = []

        async def listen() -> None:
            app = web.Application()
            app.router.add_post("/generate", self.generate)
            app.router.add_get("/workers", self.workers)
            app.router.add_post("/abort_request", self.abort)
            app.router.add_get("/v1/loads", self.loads)
            runner = web.AppRunner(app)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            ports.append(runner.addresses[0][1])
            ready.set()

        def run() -> None:
            asyncio.set_event_loop(loop)
            loop.run_until_complete(listen())
            loop.run_forever()

        threading.Thread(target=run, daemon=True).start()
        ready.wait()
        return ports[0]


def slimes_arguments(options: Namespace, port: int, demonstrations: Path, prompts: Path) -> Namespace:
    off = (
        "dump_details", "multimodal_keys", "label_key", "tool_key", "apply_chat_template_kwargs", "buffer_filter_path",
        "rollout_stop", "rollout_stop_token_ids", "sglang_dp_size", "custom_generate_function_path", "reward_key",
        "dynamic_sampling_filter_path", "rollout_sample_filter_path", "rollout_all_samples_process_path", "load",
        "rm_type", "router_policy",
    )  # fmt: skip
    no = ("apply_chat_template", "rollout_skip_special_tokens", "ci_test", "use_rollout_routing_replay")
    return Namespace(
        **dict.fromkeys(off),
        **dict.fromkeys((*no, "mask_offpolicy_in_partial_rollout", "use_distributed_post"), False),
        **dict.fromkeys(("rollout_global_dataset", "rollout_shuffle", "partial_rollout"), True),
        **dict.fromkeys(("rollout_num_engines", "rollout_num_gpus", "rollout_num_gpus_per_engine"), 1),
        hf_checkpoint=options.model,
        prompt_data=str(prompts),
        input_key="prompt",
        metadata_key="metadata",
        rollout_seed=1,
        rollout_max_prompt_len=64,
        rollout_max_response_len=LONGEST,
        rollout_temperature=2.5,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        n_samples_per_prompt=SAMPLES,
        rollout_batch_size=PROMPTS,
        over_sampling_batch_size=2 * PROMPTS,
        sglang_server_concurrency=16,
        sglang_router_ip="127.0.0.1",
        sglang_router_port=port,
        group_rm=options.group_rm,
        custom_rm_path="irlfast.integrations.slime." + ("group_reward" if options.group_rm else "reward"),
        advantage_estimator="grpo",
        save=str(options.folder / "save"),
        save_interval=2,
        num_rollout=ROLLOUTS,
        irl_demonstrations=str(demonstrations),
        irl_num_epochs=8,
        reward_model_hidden_size=32,
        reward_model_num_layers=1,
        reward_model_dropout=0.0,
        reward_model_lr=3e-3,
        pooling="mean",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("checkout", "model", "texts"):
        parser.add_argument(name)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server")
    parser.add_argument("--group-rm", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, options.checkout)
    sys.modules |= {name: types.ModuleType(name) for name in ("ray", "sglang_router")}
    from slime.rollout.base_types import call_rollout_fn
    from slime.rollout.data_source import RolloutDataSourceWithBuffer
    from slime.utils.http_utils import init_http_client
    from slime.utils.misc import load_function
    from slime.utils.types import Sample

    with gzip.open(options.texts, "rt", encoding="utf-8") as file:
        words = [json.loads(line)["text"].split(" ") for line, _ in zip(file, range(48), strict=False)]
    rows = [{"prompt": " ".join(w[:5]), "response": " " + " ".join(w[5:25])} for w in words]
    demonstrations = options.folder / "demonstrations.jsonl"
    demonstrations.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    args = slimes_arguments(options, Sampler(options.model, options.server).start(), demonstrations, demonstrations)
    init_http_client(args)
    source = RolloutDataSourceWithBuffer(args)
    generate_rollout = load_function("irlfast.integrations.slime.generate_rollout")
    post = load_function("irlfast.integrations.slime.post")
    told: dict[str, Any] = {"rollouts": []}
    samples: list[Any] = []
    for rollout_id in range(ROLLOUTS):
        output = call_rollout_fn(generate_rollout, args, rollout_id, source, evaluation=False)
        samples = [sample for group in output.samples for sample in group]
        raw, advantages = post(args, samples)
        told["rollouts"].append(
            {
                "samples": len(samples),
                "rewarded": sum(isinstance(value, float) for value in raw),
                "largest_sum_of_advantages": max(
                    abs(sum(advantages[i : i + SAMPLES])) for i in range(0, len(samples), SAMPLES)
                ),
                "waiting": len(source.buffer),
                **{name: value for name, value in output.metrics.items() if name.startswith("irl/")},
            }
        )
    judge = load_function(args.custom_rm_path)
    known = [Sample(prompt=r["prompt"], response=r["response"], status=Sample.Status.COMPLETED) for r in rows]
    judged = torch.tensor(asyncio.run(judge(args, known)))
    served = torch.tensor([sample.reward for sample in samples])
    told["auc"] = float((judged[:, None] > served).float().mean())
    told["saved"] = sorted(path.name for path in (options.folder / "save" / "irlfast_reward").glob("step-*"))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
