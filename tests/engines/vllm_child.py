"""Runs in vLLM's environment: a job as JSON in argv[1]; the answer is the line on stdout that begins with ANSWER.

{"directory": ..., "ids": [[...]], "new_tokens": n, "options": {...}}   -> tokens, blocks, block_size, drafted, accepted
                                                  "apart": true gives one prompt at a time, "times" all of them again
{"serve": [words of vllm serve], "port": n, "chat": text, "ids": [...]} -> what an OpenAI client gets
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of all prompts at once, several times if the job asks for it."""
    from vllm import LLM, SamplingParams

    llm = LLM(job["directory"], **job["options"])
    counted = "speculative_config" in job["options"]
    wanted = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in job["ids"]]
    calls = [[prompt] for prompt in prompts] if job.get("apart") else [prompts]
    found = [
        [list(o.outputs[0].token_ids) for call in calls for o in llm.generate(call, wanted, use_tqdm=False)]
        for _ in range(job.get("times", 1))
    ]
    cache = llm.llm_engine.vllm_config.cache_config
    return {"tokens": found[-1], "same": all(f == found[0] for f in found), "blocks": cache.num_gpu_blocks,
            "block_size": cache.block_size, **(_proposed(llm) if counted else {})}  # fmt: skip


def _proposed(llm: Any) -> dict[str, int]:
    """Tokens that a draft proposed, and those that were accepted."""
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    names = {"drafted": "vllm:spec_decode_num_draft_tokens", "accepted": "vllm:spec_decode_num_accepted_tokens"}
    return {ours: int(values[name]) for ours, name in names.items()}


def serve(job: dict[str, Any]) -> dict[str, Any]:
    """Start a server and ask it as an OpenAI client does."""
    import openai

    server = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *job["serve"]],
                              stdout=sys.stderr, stderr=sys.stderr)  # fmt: skip
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{job['port']}/v1", api_key="none", max_retries=0)
        model = _wait(client, server)
        settings: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 8}
        messages = [{"role": "user", "content": job["chat"]}]
        chat = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **settings)
        streamed = client.chat.completions.create(messages=messages, stream=True, **settings)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        plain = client.completions.create(
            prompt=job["ids"], logprobs=1, extra_body={"return_token_ids": True}, **settings
        )
        return {
            "chat": chat.choices[0].message.content, "pieces": pieces,
            "chat_logprobs": [t.logprob for t in chat.choices[0].logprobs.content],
            "tokens": plain.choices[0].token_ids, "logprobs": plain.choices[0].logprobs.token_logprobs,
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait(60)


def _wait(client: Any, server: Any) -> str:
    for _ in range(240):
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            return str(client.models.list().data[0].id)
        except Exception:
            time.sleep(1)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout.write("\nANSWER " + json.dumps(serve(asked) if "serve" in asked else generate(asked)) + "\n")
