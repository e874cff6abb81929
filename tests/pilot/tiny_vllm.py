"""vLLM's protocol over our own sampler: a server whose log-probs are the model's, for pilots whose ranks share one.

    python tiny_vllm.py --model DIR --served-model-name NAME --port PORT [--quantization nf4] ...

prints its port. One request at a time, each a pure function of what it says, so that whoever asks the same gets the
same. It answers as vLLM does to an adapter that is loaded or unloaded twice.
"""

import argparse
import asyncio
import json
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from matryoshka.core.models.load import load_model
from matryoshka.core.records import Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.files import load_adapter
from matryoshka.lora.linear import active, remove_adapter
from matryoshka.pilot.training import QUANTIZATIONS
from matryoshka.tests.inference import fake_vllm
from matryoshka.tests.inference.fake_vllm import ADAPTERS, LOCK


class Handler(fake_vllm.Handler):
    sampler: Sampler
    loop: asyncio.AbstractEventLoop

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body.get("lora_name", "")
        with LOCK:  # the model is the sampler's alone while it draws
            if self.path == "/v1/load_lora_adapter" and name in ADAPTERS:
                self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
            elif self.path == "/v1/load_lora_adapter":
                load_adapter(self.sampler.model, name, Path(body["lora_path"]))
                ADAPTERS[name] = body["lora_path"]
                self.send({})
            elif self.path == "/v1/unload_lora_adapter" and name not in ADAPTERS:
                self.refuse(404, f"The lora adapter '{name}' cannot be found.")
            elif self.path == "/v1/unload_lora_adapter":
                remove_adapter(self.sampler.model, name)
                del ADAPTERS[name]
                self.send({})
            elif body["model"] != self.base and body["model"] not in ADAPTERS:
                self.refuse(404, f"The model `{body['model']}` does not exist.")
            else:
                self.send(self.answer(body))

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        adapter = None if body["model"] == self.base else body["model"]
        stop, top_p = tuple(body.get("stop", ())), body.get("top_p", 1.0)
        sampling = Sampling(body["temperature"], top_p, body["max_tokens"], stop, body.get("seed", 0))
        drawing = self.sampler.generate(body["prompt"], sampling, adapter)
        sample = asyncio.run_coroutine_threadsafe(drawing, self.loop).result()
        assert sample.token_ids is not None and sample.logprobs is not None
        choice = {
            "index": 0, "text": sample.text, "finish_reason": sample.finish_reason,
            "token_ids": list(sample.token_ids), "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": list(sample.logprobs)},
        }  # fmt: skip
        if "prompt_logprobs" in body:
            ids_T = torch.tensor(body["prompt"])
            with torch.no_grad(), active(self.sampler.model, adapter):
                hidden_TD = self.sampler.model(ids_T[None])[0]
                logps_TV = self.sampler.model.logits(hidden_TD).log_softmax(-1)
            scores = logps_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1).tolist()
            rows = [{str(id): {"logprob": score}} for id, score in zip(body["prompt"][1:], scores, strict=True)]
            choice["prompt_logprobs"] = [None, *rows]
        return {"model": body["model"], "choices": [choice]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--served-model-name")
    parser.add_argument("--port", type=int)
    parser.add_argument("--quantization", default="none")
    arguments, _ = parser.parse_known_args()
    torch.set_num_threads(1)
    model = load_model(arguments.model, convert=QUANTIZATIONS[arguments.quantization])
    fake_vllm.CONTEXT = model.config.max_position_embeddings
    Handler.base, Handler.loop = arguments.served_model_name, asyncio.new_event_loop()
    threading.Thread(target=Handler.loop.run_forever, daemon=True).start()
    Handler.sampler = Sampler(model, Tokenizer.load(arguments.model), deterministic=True, num_threads=1)
    server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
