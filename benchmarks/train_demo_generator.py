"""Make the embedded generator: a LoRA adapter that teaches SmolLM2-135M-Instruct to write `solution()` from steps.

    python -m matryoshka.benchmarks.train_demo_generator --model models/smollm2-135m-instruct

It is a product of this file, `benchmarks/generator_lessons.py` and a seed; its figures are in
`inference/demo_generator/README.md`.
"""

import argparse
from pathlib import Path

import torch

from matryoshka.benchmarks.generator_lessons import Lesson, lessons
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import Item, TrainConfig, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT
from matryoshka.lora.files import save_adapter
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters
from matryoshka.tasks.pal.task import open_prompts

OUT = Path(__file__).resolve().parent.parent / "inference" / "demo_generator"


def item(tokenizer: Tokenizer, lesson: Lesson) -> Item:
    """Return a training item: the prompt's ids, then program and end of turn, which alone are scored."""
    request = open_prompts("compact").render("code", question=lesson.question, guidance=lesson.steps)
    prompt = tokenizer.render(request, add_generation_prompt=True).ids
    answer = (*tokenizer.encode(lesson.program), tokenizer.eos_id)
    return Item((Tokens((*prompt, *answer), (0,) * len(prompt) + (1,) * len(answer)),), lesson.question)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--work", type=Path, default=Path("runs/demo_generator"), help="state, for resume")
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model), Tokenizer.load(args.model)
    add_adapter(model, "generator", LoraConfig(rank=8, alpha=16.0), seed=args.seed)
    set_active(model, "generator")
    items = [item(tokenizer, lesson) for lesson in lessons(args.questions, args.seed)]
    config = TrainConfig(
        learning_rate=5e-4,
        epochs=args.epochs,
        batch_size=24,
        micro_batch_tokens=1600,
        save_every=20,
        seed=args.seed,
    )
    parameters = trainable_parameters(model, "generator")
    for row in train(model, parameters, items, config, SFT(), token_logps, args.work):
        print(f"{row['step']}/{row['steps']} loss {row['loss']:.4f} {row['seconds']:.1f} s", flush=True)
    save_adapter(model, "generator", args.out, "HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
