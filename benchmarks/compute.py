"""`matryoshka bench compute`: does training compute what it should on this device, before anything is timed?

Each objective takes one optimizer step of the product's own loop on PAL prompts, from an adapter that changes nothing.
Its first loss is then known: ln 2 for DPO, since policy and reference are equal. Under compilation the two passes are
compiled apart, so the difference from the known value is a row of its own. Samples of our sampler are scored again by
the trainer. A four-bit weight is made dense and compared with the specification in plain torch.
"""

import asyncio
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from matryoshka.benchmarks.measure import dtype_of, prepare
from matryoshka.benchmarks.pal_rows import pal_items
from matryoshka.benchmarks.result import BenchResult, Row
from matryoshka.benchmarks.training import Recipe, new_adapter
from matryoshka.core.models.language_model import LanguageModel
from matryoshka.core.models.load import load_model
from matryoshka.core.records import Sample, Sampling
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainContext, train
from matryoshka.dpo.data import completion
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import LOSSES, SFT, Preference
from matryoshka.dpo.parity import difference, trainer_logps
from matryoshka.inference.sampler import Sampler
from matryoshka.lora.linear import LoraConfig, active
from matryoshka.lora.nf4 import dense, dense_twin, quantize


@dataclass(frozen=True)
class Config:
    """First losses of every objective, samples against the trainer, four-bit weights."""

    device: str = "cpu"
    """Where to compute, for example cuda."""
    model: Path = Path("models/smollm2-135m-instruct")
    """A Hugging Face folder."""
    dtype: str = ""
    """The model's dtype; default: bfloat16 on a GPU, float32 on a CPU."""
    compile_blocks: bool = False
    """Compile whole blocks, as `--train.compile-blocks` does."""
    questions: int = 2
    """Prompts in the batch, two pairs each."""
    draws: int = 8
    """Samples that are compared with the trainer."""
    tokens: int = 32
    """Longest sample."""
    seed: int = 0
    """Decides prompts, pairs and draws."""


def run(config: Config) -> BenchResult:
    """Return a row for each comparison; what raises is a row without a value that has the error."""
    prepare(config.device, 0)
    dtype = dtype_of(config.dtype, config.device)
    model, tokenizer = load_model(config.model, dtype, config.device), Tokenizer.load(config.model)
    items = pal_items(tokenizer, config.questions, 2, "compact", None, config.seed)
    rows = [_first_loss(name, model, items, config) for name in ("sft", *LOSSES)]
    rows.append(_samples(model, tokenizer, items, config))
    if importlib.util.find_spec("bitsandbytes") is not None:
        rows.append(_four_bits(dtype, config))
    return BenchResult("compute", rows, None, None, [])


def _first_loss(name: str, model: LanguageModel, items: Sequence[Item], config: Config) -> Row:
    """Return how far the first loss of an objective is from the known one; of SFT, which has none, the loss itself."""
    objective = SFT() if name == "sft" else Preference(loss=name)
    recipe = Recipe(
        preference=name != "sft",
        batch_size=len(items),
        learning_rate=1e-4,
        micro_batch_tokens=8192,
        padded_items=1,
        lora=LoraConfig(rank=8),
        seed=config.seed,
        device=config.device,
        compile_blocks=config.compile_blocks,
    )
    needs_reference = isinstance(objective, Preference) and objective.needs_reference
    try:
        with new_adapter(model, recipe) as parameters, tempfile.TemporaryDirectory() as folder:
            reference = partial(active, model, None) if needs_reference else None
            context = TrainContext(reference)
            steps = train(model, parameters, items, recipe.train, objective, token_logps, Path(folder), context)
            loss = list(steps)[0]["loss"]
    except (RuntimeError, ValueError, FloatingPointError) as err:
        return Row(f"one step of {name}", None, "nats", {"note": f"failed: {str(err)[:300]}"})
    known = objective.first_loss if isinstance(objective, Preference) else None
    if known is None:
        return Row(f"one step of {name}: the loss", loss, "nats", {"finite": math.isfinite(loss)})
    return Row(f"one step of {name}: first loss less the known one", abs(loss - known), "nats", {"known": known})


def _samples(model: LanguageModel, tokenizer: Tokenizer, items: Sequence[Item], config: Config) -> Row:
    """Return how far the sampler's log-probs are from the trainer's: root mean square over all drawn tokens."""
    first = items[0].sequences[0]
    prompt = first.ids[: list(first.mask).index(1)]

    async def drawn() -> list[Sample]:
        with Sampler(model, tokenizer, config.draws, False, torch.get_num_threads()) as sampler:
            sampling = Sampling(temperature=1.0, max_tokens=config.tokens, seed=config.seed)
            each = [replace(sampling, draw=draw) for draw in range(config.draws)]
            return list(await asyncio.gather(*(sampler.generate(prompt, one) for one in each)))

    ours: list[float] = []
    theirs: list[float] = []
    for sample in asyncio.run(drawn()):
        ours += sample.logprobs or ()
        theirs += trainer_logps(model, completion(prompt, sample))
    found = difference(ours, theirs)
    details: dict[str, object] = {"largest": found.largest, "tokens": found.num_tokens}
    return Row("sampler against trainer, root mean square", found.rms, "nats", details)


def _four_bits(dtype: torch.dtype, config: Config) -> Row:
    """Return the largest relative error of a dense NF4 weight against its twin, in units of the dtype's precision."""
    draws = torch.Generator().manual_seed(config.seed)
    packed, scales = quantize((0.02 * torch.randn(301, 130, generator=draws)).to(config.device))
    got, twin = dense(packed, scales, dtype).double(), dense_twin(packed, scales, torch.float64)
    worst = ((got - twin).abs() / twin.abs().clamp_min(1e-12)).max().item()
    return Row("NF4 weight against its twin", worst / torch.finfo(dtype).eps, "eps", {})

