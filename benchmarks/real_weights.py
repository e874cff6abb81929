"""Real weights end to end: a converted GGUF file in our trainer and sampler, in transformers and in llama.cpp.

    python -m matryoshka.benchmarks.real_weights FOLDER --gguf FILE.gguf --out result.json

A greedy reply to each of a few chat messages is drawn by our sampler; all others give the log-probs of its tokens: the
trainer, eager transformers over the same folder, llama.cpp over the GGUF file, and `matryoshka serve` over HTTP, asked
the same again. Then an adapter takes one step of SFT on the replies. llama.cpp computes with quantised activations, so
it is expected to be some hundredths of a nat apart; the others differ by rounding alone.
"""

import argparse
import asyncio
import gc
import json
import math
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from matryoshka.benchmarks.measure import DTYPES, peer
from matryoshka.core.files import write_text
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import load_model
from matryoshka.core.records import Message, Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainConfig, train
from matryoshka.dpo.data import completion
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT
from matryoshka.dpo.parity import Difference, difference, trainer_logps
from matryoshka.inference.llama_cpp import LlamaConfig, start_llama
from matryoshka.inference.local_controller import LocalController
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters
from matryoshka.pilot.environment import environment

QUESTIONS = ("What is the capital of France?", "Write a Python function that returns the n-th Fibonacci number.")
Drawn = tuple[tuple[int, ...], Sample]  # ids of the prompt, and the reply


def draw(model: LanguageModel, tokenizer: Tokenizer, max_tokens: int) -> list[Drawn]:
    """Return our sampler's replies, asked one after the other."""
    with Sampler(model, tokenizer, num_threads=torch.get_num_threads()) as sampler:
        controller = LocalController(sampler, None, "model")

        async def ask() -> list[Drawn]:
            prompts = [(Message("user", question),) for question in QUESTIONS]
            greedy = Sampling(temperature=0.0, max_tokens=max_tokens)
            return [(controller.prompt_ids(one), (await controller.propose(one, 1, greedy))[0]) for one in prompts]

        return asyncio.run(ask())


def transformers_logps(folder: Path, dtype: torch.dtype, drawn: Sequence[Drawn]) -> list[float]:
    """Return what eager transformers gives the tokens of the replies."""
    load: Any = peer("transformers").AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=dtype, attn_implementation="eager").eval()
    found: list[float] = []
    for prompt, sample in drawn:
        ids = torch.tensor([[*prompt, *(sample.token_ids or ())]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].float().log_softmax(-1)
        found += logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0].tolist()
    return found


def llama_cpp_logps(gguf: Path, drawn: Sequence[Drawn]) -> list[float]:
    """Return what llama.cpp gives the tokens of the replies, nan where one is not among the 50 likeliest."""
    server = start_llama(gguf, "model", "127.0.0.1", 0, torch.get_num_threads(), None, LlamaConfig(1, 1024, 0))
    found = []
    for prompt, sample in drawn:
        ids = [*prompt, *(sample.token_ids or ())]
        for at in range(len(prompt), len(ids)):
            request = {"prompt": ids[:at], "n_predict": 1, "n_probs": 50, "temperature": 0.0, "cache_prompt": True}
            (first,) = post(f"{server.listening_address}/completion", request)["completion_probabilities"]
            by_id = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
            found.append(by_id.get(ids[at], math.nan))
    return found


def served(folder: Path, max_tokens: int) -> list[dict[str, Any]]:
    """Return the choices that `matryoshka serve` gives over HTTP to the same questions."""
    command = [sys.executable, "-m", "matryoshka.scripts.cli", "serve", "--model", str(folder), "--port", "0"]
    command += ["--threads", str(torch.get_num_threads()), "--name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[-1]
            rest = {"model": "model", "max_tokens": max_tokens, "temperature": 0, "logprobs": True}
            asked = [{**rest, "messages": [{"role": "user", "content": question}]} for question in QUESTIONS]
            return [post(f"{url.removesuffix('/v1')}/v1/chat/completions", one)["choices"][0] for one in asked]
        finally:
            process.terminate()


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def sft_losses(model: LanguageModel, drawn: Sequence[Drawn]) -> list[float]:
    """Return the loss of a new adapter on the replies, twice: before its first step and after it."""
    add_adapter(model, "policy", LoraConfig(rank=8), seed=0)
    set_active(model, "policy")
    items = [Item((completion(prompt, sample),), str(index)) for index, (prompt, sample) in enumerate(drawn)]
    config = TrainConfig(learning_rate=1e-3, epochs=2, batch_size=len(items), warmup_ratio=0.0, min_lr_ratio=1.0)
    with tempfile.TemporaryDirectory() as folder:
        rows = train(model, trainable_parameters(model, "policy"), items, config, SFT(), token_logps, Path(folder))
        return [row["loss"] for row in rows]


def main(folder: Path, gguf: Path, out: Path, dtype: str, max_tokens: int, serve: bool) -> None:
    tokenizer, model = Tokenizer.load(folder), load_model(folder, DTYPES[dtype])
    drawn = draw(model, tokenizer, max_tokens)
    ours = [logp for _, sample in drawn for logp in sample.logprobs or ()]
    trainer = [logp for prompt, sample in drawn for logp in trainer_logps(model, completion(prompt, sample))]
    losses = sft_losses(model, drawn)
    del model
    gc.collect()
    theirs = transformers_logps(folder, DTYPES[dtype], drawn)
    gc.collect()
    llama = llama_cpp_logps(gguf, drawn)
    known = [pair for pair in zip(trainer, llama, strict=True) if not math.isnan(pair[1])]
    found: dict[str, Difference] = {
        "trainer, our sampler": difference(trainer, ours),
        "trainer, transformers": difference(trainer, theirs),
        "trainer, llama.cpp": difference([one for one, _ in known], [two for _, two in known]),
    }
    if serve:
        over_http = [one["logprob"] for choice in served(folder, max_tokens) for one in choice["logprobs"]["content"]]
        found["our sampler, over HTTP"] = difference(ours, over_http)
    result = {
        "model": folder.name, "dtype": dtype, "replies": [sample.text for _, sample in drawn],
        "nats_a_token": {name: asdict(one) for name, one in found.items()},
        "not_among_llama_cpps_50": len(ours) - len(known), "sft_losses": losses, "machine": environment(),
    }  # fmt: skip
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the converted model")
    parser.add_argument("--gguf", type=Path, required=True, help="the file that it was converted from")
    parser.add_argument("--out", type=Path, required=True, help="file for the result")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="data type that is computed in")
    parser.add_argument("--max-tokens", type=int, default=40, help="most tokens of a reply")
    parser.add_argument("--serve", action="store_true", help="also ask matryoshka serve, which computes in float32")
    main(**vars(parser.parse_args()))
