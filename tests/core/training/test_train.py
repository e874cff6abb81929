"""train.py, checkpoint.py: oracles are the schedule and AdamW by hand, the uninterrupted run, invariants."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka.core.models import varlen
from matryoshka.core.models.layer_attention import LayerAttention
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import Tokens, TokenTree, build_tree, tree_size
from matryoshka.core.records import Message
from matryoshka.core.signals import Interrupted
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.checkpoint import latest_checkpoint
from matryoshka.core.training.packing import batch_at, plan
from matryoshka.core.training.train import Item, Totals, TrainConfig, TrainContext, learning_rate, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import (
    LoraConfig,
    active,
    add_adapter,
    copy_adapter,
    layers_with,
    set_active,
    trainable_parameters,
)

ROOT = Path(__file__).resolve().parents[3]
CONFIG = TrainConfig(learning_rate=1e-2, epochs=2, batch_size=4, micro_batch_tokens=60, seed=7)


def conversations(count: int = 10, seed: int = 0) -> list[Item]:
    """Return SFT items of random ids, two a group with a common prompt of 10, answers of 2 to 8 tokens."""
    draws = random.Random(seed)
    items = []
    for index in range(count):
        if index % 2 == 0:
            prompt = [draws.randrange(256) for _ in range(10)]
        answer = [draws.randrange(256) for _ in range(draws.randint(2, 8))]
        tokens = Tokens((*prompt, *answer), (0,) * len(prompt) + (1,) * len(answer))
        items.append(Item((tokens,), f"group {index // 2}"))
    return items


def make_model(folder: Path, dtype: torch.dtype = torch.float32, dropout: float = 0.0, rank: int = 2) -> Any:
    """Return the tiny model with a fresh adapter "policy", active, in training mode."""
    model: Any = load_model(folder, dtype)
    add_adapter(model, "policy", LoraConfig(rank=rank, dropout=dropout), seed=0)
    set_active(model, "policy")
    return model.train()


def sft(
    model: Any, folder: Path, config: TrainConfig = CONFIG, items: list[Item] | None = None, objective: Any = None
) -> Iterator[dict[str, float]]:
    parameters = trainable_parameters(model, "policy")
    return train(model, parameters, items or conversations(), config, objective or SFT(), token_logps, folder)


def values(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in trainable_parameters(model, "policy").items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_exactly_these_tokens_are_supervised(tiny_dir: Path) -> None:
    """Oracle: by hand. Assistant texts and their <|im_end|>, nothing of the prompt, the template or what follows."""
    tokenizer = Tokenizer.load(tiny_dir)
    chat = (
        Message("system", "Be brief."), Message("user", "Hi?"), Message("assistant", "Yes, hi."),
        Message("user", "<|im_end|> is text here"), Message("assistant", "Bye"),
    )  # fmt: skip
    rendered = tokenizer.render(chat)
    tree = build_tree([Tokens(rendered.ids, rendered.mask)])
    supervised = [tokenizer.decode([id], skip_special=False) for id in tree.target_S.tolist()]
    assert supervised == [*"Yes, hi.", "<|im_end|>", *"Bye", "<|im_end|>"]
    # What predicts the first token of an answer is the last token of the generation prompt.
    prompts = [len(tokenizer.render(chat[:turn], add_generation_prompt=True).ids) for turn in (2, 4)]
    assert tree.source_S[0] == prompts[0] - 1 and tree.source_S[len("Yes, hi.") + 1] == prompts[1] - 1
    assert tokenizer.decode(tree.ids_T[: prompts[1]].tolist(), skip_special=False).endswith("assistant\n")


@pytest.mark.parametrize("objective", [SFT(), Preference(loss="simpo", beta=2.0)], ids=["sft", "simpo"])
def test_micro_batches_give_the_same_gradients(tiny_dir: Path, tmp_path: Path, objective: Any) -> None:
    """Oracle: autograd over the whole batch at once; float64, 1e-12. The division is by the batch's own counts."""
    items = conversations(8)
    if isinstance(objective, Preference):
        items = [Item((a.sequences[0], b.sequences[0]), a.group) for a, b in zip(items[::2], items[1::2], strict=True)]
    model = make_model(tiny_dir, torch.float64)
    with torch.no_grad():
        for layer in layers_with(model, "policy"):
            torch.nn.init.normal_(layer.lora_B["policy"], std=0.1, generator=torch.Generator().manual_seed(1))
    start = values(model)
    found = {}
    one = max(tree_size(item.sequences) for item in items)
    for limit in (one, 40, 10**6):
        for name, weight in trainable_parameters(model, "policy").items():
            weight.data.copy_(start[name])
        calls = 0
        sums: dict[str, Tensor] = {}

        def add(gradient: Tensor, name: str, sums: dict[str, Tensor] = sums) -> None:
            nonlocal calls
            calls += name == next(iter(start))
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient

        handles = [
            weight.register_hook(partial(add, name=name))  # type: ignore[no-untyped-call]
            for name, weight in trainable_parameters(model, "policy").items()
        ]
        config = replace(CONFIG, batch_size=8, micro_batch_tokens=limit)
        row = next(sft(model, tmp_path / str(limit), config, items, objective))
        for handle in handles:
            handle.remove()
        found[limit] = (calls, row["loss"], row["grad_norm"], sums)
    assert found[one][0] > found[40][0] > found[10**6][0] == 1
    for limit in (one, 40):
        assert found[limit][1:3] == pytest.approx(found[10**6][1:3], rel=1e-12)
        for name, expected in found[10**6][3].items():
            torch.testing.assert_close(found[limit][3][name], expected, rtol=0, atol=1e-12, msg=name)
    norm = torch.stack([g.square().sum() for g in found[one][3].values()]).sum().sqrt().item()
    assert norm == pytest.approx(found[one][2], rel=1e-12)


def test_the_attention_setting_is_heeded(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: training with "auto", float64; 1e-10, as AdamW divides by the size of the gradient. Calls are counted."""
    called: list[int] = []
    call = varlen.Varlen.__call__

    def counted(self: varlen.Varlen, layer: LayerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        called.append(layer.index)
        return call(self, layer, q, k, v)

    monkeypatch.setattr(varlen.Varlen, "__call__", counted)
    found = []
    for attention in ("auto", "varlen"):
        model = make_model(tiny_dir, torch.float64)
        steps = sft(model, tmp_path / attention, replace(CONFIG, attention=attention))
        found.append(([row["loss"] for row in steps], values(model), len(called)))
    (losses, weights, none), (other_losses, other_weights, some) = found
    assert none == 0 < some and other_losses == pytest.approx(losses, rel=1e-10)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_one_step_by_hand(tiny_dir: Path, tmp_path: Path, max_grad_norm: float) -> None:
    """Oracle: clipping and AdamW's first step written out: w <- w - lr (decay w + g / (|g| + eps)), float64."""
    config = replace(CONFIG, batch_size=10, max_grad_norm=max_grad_norm, weight_decay=0.1, warmup_ratio=0.0)
    model = make_model(tiny_dir, torch.float64)
    before = values(model)
    parameters = trainable_parameters(model, "policy")
    sequences = [item.sequences[0] for item in conversations()]
    logps = [
        model.logits(model(torch.tensor([s.ids])))[0].log_softmax(-1)[at - 1, s.ids[at]]
        for s in sequences for at in range(len(s.ids)) if s.mask[at]
    ]  # fmt: skip
    loss = -torch.stack(logps).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    row = next(sft(model, tmp_path, config))
    assert (row["loss"], row["grad_norm"], row["lr"]) == pytest.approx((loss.item(), norm.item(), 1e-2), rel=1e-9)
    scale = min(1.0, max_grad_norm / (norm.item() + 1e-6))
    for (name, weight), gradient in zip(parameters.items(), gradients, strict=True):
        clipped = gradient * scale
        expected = before[name] - 1e-2 * (0.1 * before[name] + clipped / (clipped.abs() + 1e-8))
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-8, msg=name)
        assert weight.grad is None


def test_schedule_by_hand() -> None:
    """Oracle: warm-up over ceil(3% of the steps), then half a cosine from the rate to a tenth of it."""
    config = TrainConfig(learning_rate=2.0)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:4] == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert rates[3 + 97 // 2] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi * 48 / 97)))
    assert all(a > b for a, b in zip(rates[3:], rates[4:], strict=False))
    assert 0.2 < rates[-1] < 0.201
    assert learning_rate(0, 10, config) == 2.0  # ceil(0.3) = 1 step of warm-up is at the full rate already
    flat = replace(config, min_lr_ratio=1.0, warmup_ratio=0.0)
    assert {learning_rate(step, 10, flat) for step in range(10)} == {2.0}
    # 0.07 x 100 is 7.000000000000001 in floating point: 7 steps of warm-up, not 8.
    assert learning_rate(6, 100, replace(config, warmup_ratio=0.07)) == 2.0


def test_rows(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: 10 items in batches of 4 are 3 steps an epoch; token counts from the sequences themselves."""
    items = conversations()
    rows = list(sft(make_model(tiny_dir), tmp_path, items=items))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["lr"] for row in rows] == [learning_rate(step, 6, CONFIG) for step in range(6)]
    assert {row["steps"] for row in rows} == {6}
    for step, row in enumerate(rows):
        _, batch = batch_at(items, step, 4, CONFIG.seed)
        packed = plan(batch, CONFIG.micro_batch_tokens)
        micros = [[item.sequences[0] for item in micro] for micro in packed.micro_batches]
        assert row["tokens"] == sum(tree_size(micro) for micro in micros)
        assert row["padded_tokens"] == sum(len(micro) * max(len(s.ids) for s in micro) for micro in micros)
        assert row["padded_tokens"] - row["tokens"] == packed.saved
    assert [{**row, "steps": 6} for row in metrics(tmp_path)] == [
        {name: value for name, value in row.items() if name != "seconds"} for row in rows
    ]


def test_training_learns(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: invariant; two conversations are learnt as far as the frozen head goes, and the base has not moved.

    Hidden states have norm sqrt(32), head rows 0.2 sqrt(32): a logit of 6.4 among 258 others leaves a loss near 0.7.
    """
    model = make_model(tiny_dir, rank=8)
    base = model.model.embed_tokens.weight.detach().clone()
    config = replace(CONFIG, learning_rate=3e-2, epochs=25)
    losses = [row["loss"] for row in sft(model, tmp_path, config, conversations(2))]
    assert losses[0] > 5 and losses[-1] < 1.2
    assert torch.equal(model.model.embed_tokens.weight, base)
    with active(model, None):
        assert torch.equal(model(torch.tensor([[1, 2]])), load_model(tiny_dir)(torch.tensor([[1, 2]])))


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_resume_is_bitwise(tiny_dir: Path, tmp_path: Path, stop_after: int) -> None:
    """Oracle: the uninterrupted run. Parameters, AdamW's moments and the metrics rows are equal to the bit.

    With dropout, so that random numbers count; rows written after the last checkpoint are written again, not twice.
    """
    config = replace(CONFIG, save_every=2)
    whole = make_model(tiny_dir, dropout=0.2)
    list(sft(whole, tmp_path / "whole", config))
    part = make_model(tiny_dir, dropout=0.2)
    rows = sft(part, tmp_path / "part", config)
    for _ in range(stop_after):
        next(rows)
    rows.close()  # type: ignore[attr-defined]
    assert len(metrics(tmp_path / "part")) == stop_after
    torch.manual_seed(12345)
    part = make_model(tiny_dir, dropout=0.2)
    resumed = [row["step"] for row in sft(part, tmp_path / "part", config)]
    assert resumed == list(range(stop_after // 2 * 2 + 1, 7))
    assert same(values(part), values(whole))
    assert metrics(tmp_path / "part") == metrics(tmp_path / "whole")
    states = [load_file(tmp_path / name / "step-6" / "state.safetensors") for name in ("whole", "part")]
    assert len(states[0]) == 4 * len(values(whole)) and same(*states)
    for name in ("whole", "part"):
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == ["metrics.jsonl", "step-6"]


def test_how_the_work_is_cut_up_may_change(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the uninterrupted run within fp32 rounding (1e-4: Adam amplifies at first); a finished run is loaded."""
    whole = make_model(tiny_dir)
    list(sft(whole, tmp_path / "whole"))
    part = make_model(tiny_dir)
    rows = sft(part, tmp_path / "part", replace(CONFIG, save_every=3))
    for _ in range(3):
        next(rows)
    rows.close()  # type: ignore[attr-defined]
    part = make_model(tiny_dir)
    assert len(list(sft(part, tmp_path / "part", replace(CONFIG, micro_batch_tokens=17)))) == 3
    for name, value in values(whole).items():
        torch.testing.assert_close(values(part)[name], value, rtol=0, atol=1e-4, msg=name)
    loaded = make_model(tiny_dir)
    assert list(sft(loaded, tmp_path / "part")) == []
    assert same(values(loaded), values(part))


OTHER = "was written with another training configuration, objective, model or data"


def other_rank(tiny_dir: Path) -> dict[str, Any]:
    return {"model": make_model(tiny_dir, rank=3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {"config": replace(CONFIG, learning_rate=1e-3)}, OTHER),
        (lambda d: {"config": replace(CONFIG, seed=8)}, OTHER),
        (lambda d: {"items": conversations(seed=1)}, OTHER),
        (lambda d: {"items": conversations()[:-1]}, OTHER),
        (lambda d: {"objective": Preference(loss="simpo")}, OTHER),
        (other_rank, r"lora_A.policy' is float32 \[2, 64\] in the checkpoint and float32 \[3, 64\] in the model"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    tiny_dir: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    """Oracle: the message; parameters and folder stay as they are."""
    list(sft(make_model(tiny_dir), tmp_path))
    before = sorted(tmp_path.rglob("*")), metrics(tmp_path)
    arguments = {"model": make_model(tiny_dir), **change(tiny_dir)}
    model = arguments.pop("model")
    start = values(model)
    with pytest.raises(ValueError, match=message):
        next(sft(model, tmp_path, **arguments))
    assert same(values(model), start)
    assert (sorted(tmp_path.rglob("*")), metrics(tmp_path)) == before


def test_torn_checkpoints_are_ignored(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: a kill leaves an unfinished temporary folder, and training starts from the last complete checkpoint."""
    rows = sft(make_model(tiny_dir), tmp_path, replace(CONFIG, save_every=2))
    for _ in range(2):
        next(rows)
    rows.close()  # type: ignore[attr-defined]
    for name in (".step-4.tmp", ".step-6.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-2"
    resumed = list(sft(make_model(tiny_dir), tmp_path, replace(CONFIG, save_every=2)))
    assert [row["step"] for row in resumed] == [3, 4, 5, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-6"]
    assert latest_checkpoint(tmp_path / "nowhere") is None


@dataclass(frozen=True)
class Breaking:
    """An objective that is SFT until the given call, then has a NaN loss, or a loss of 0 with an infinite gradient."""

    calls: list[int]
    at: int
    infinite_gradient: bool

    def __call__(
        self, logps_S: Tensor, reference_S: Tensor | None, tree: TokenTree, totals: Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls[0] += 1
        loss, out = SFT()(logps_S, reference_S, tree, totals)
        if self.calls[0] < self.at:
            return loss, out
        return ((loss - loss.detach()).sqrt() if self.infinite_gradient else loss * math.nan), out


@pytest.mark.parametrize("infinite_gradient", [False, True])
def test_nothing_non_finite_reaches_the_optimizer(tiny_dir: Path, tmp_path: Path, infinite_gradient: bool) -> None:
    """Oracle: parameters as after step 1; no row, no checkpoint of step 2; the same process can go on afterwards."""
    config = replace(CONFIG, micro_batch_tokens=10**6, save_every=1)
    model = make_model(tiny_dir)
    rows = sft(model, tmp_path / "broken", config, objective=Breaking([0], 2, infinite_gradient))
    next(rows)
    after_one = values(model)
    with pytest.raises(FloatingPointError, match="step 2: loss .* nothing was updated"):
        next(rows)
    assert same(values(model), after_one)
    assert len(metrics(tmp_path / "broken")) == 1
    assert latest_checkpoint(tmp_path / "broken") == tmp_path / "broken" / "step-1"
    # Gradients that the failed step left behind must not leak into whatever is trained next.
    next(sft(model, tmp_path / "next", config))
    clean = make_model(tiny_dir)
    for name, weight in trainable_parameters(clean, "policy").items():
        weight.data.copy_(after_one[name])
    next(sft(clean, tmp_path / "clean", config))
    assert same(values(model), values(clean))


@pytest.mark.parametrize("limit", [17, 10**6])
def test_hidden_states_that_are_not_finite_are_named(tiny_dir: Path, tmp_path: Path, limit: int) -> None:
    """Oracle: by hand: one row of the embedding becomes NaN, and one example's second answer token has that id.

    The step is refused, whatever the other micro-batches gave: parameters and metrics as before it.
    """
    items = conversations()
    token = next(id for id in range(256) if all(id not in item.sequences[0].ids for item in items))
    ids = (*items[5].sequences[0].ids[:11], token, 7, 8)
    items[5] = Item((Tokens(ids, (0,) * 10 + (1,) * 4),), "the bad one")
    model = make_model(tiny_dir)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        model.lm_head = torch.nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        model.lm_head.weight.copy_(embedding).requires_grad_(False)
        model.config = replace(model.config, tie_word_embeddings=False)
        embedding[token] = math.nan
    before = values(model)
    config = replace(CONFIG, batch_size=10, micro_batch_tokens=limit)
    message = (
        r"train: step 1: the hidden states of example 'the bad one' \(1 of \d+ in its micro-batch\) are not finite; "
        "nothing was updated"
    )
    with pytest.raises(FloatingPointError, match=message):
        next(sft(model, tmp_path, config, items))
    assert same(values(model), before) and metrics(tmp_path) == [] and latest_checkpoint(tmp_path) is None


def test_an_item_beyond_the_budget_is_refused_before_anything_is_written(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the message, which names the example; no folder."""
    items = conversations()
    size = max(tree_size(item.sequences) for item in items)
    config = replace(CONFIG, micro_batch_tokens=size - 1)
    with pytest.raises(ValueError, match=rf"\(example 'group \d'\): .* take {size} tree tokens, micro_batch_tokens is"):
        next(sft(make_model(tiny_dir), tmp_path / "run", config))
    assert not (tmp_path / "run").exists()


def test_a_wrong_first_loss_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: ln 2 wherever policy and reference are equal; another reference, or dropout, is found out at once."""
    items = [
        Item((a.sequences[0], b.sequences[0]), a.group)
        for a, b in zip(conversations()[::2], conversations()[1::2], strict=True)
    ]
    objective = Preference()

    def start(model: Any, reference: str | None, folder: Path) -> dict[str, float]:
        parameters = trainable_parameters(model, "policy")
        context = partial(active, model, reference)
        checked = TrainContext(context, objective.first_loss)
        return next(train(model, parameters, items, CONFIG, objective, token_logps, folder, checked))

    for dropout, reference in ((0.0, None), (0.5, "reference")):
        model = make_model(tiny_dir, dropout=dropout)
        with torch.no_grad():
            for layer in layers_with(model, "policy"):
                torch.nn.init.normal_(layer.lora_B["policy"], std=0.3, generator=torch.Generator().manual_seed(1))
        copy_adapter(model, "policy", "reference")
        before = values(model)
        with pytest.raises(ValueError, match=r"the first loss is .* so it must be 0\.69314718; .*dropout is on"):
            start(model, reference, tmp_path / f"{dropout}")
        assert same(values(model), before) and metrics(tmp_path / f"{dropout}") == []
        model.eval()
        assert start(model, "reference", tmp_path / f"{dropout} good")["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_a_signal_while_the_caller_holds_a_row(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the state that the message names is on disk. A second signal acts as it would without training."""
    reached: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: reached.append(number))
    interrupt = signal.getsignal(signal.SIGINT)  # ignored where a shell started us in the background
    try:
        rows = sft(make_model(tiny_dir), tmp_path)
        next(rows)
        os.kill(os.getpid(), signal.SIGTERM)
        row = next(rows)
        assert row["step"] == 2 and latest_checkpoint(tmp_path) == tmp_path / "step-2"
        assert reached == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert reached == [signal.SIGTERM]
        with pytest.raises(Interrupted, match="after step 2 of 6; state saved"):
            next(rows)
        # A signal during the last step is not swallowed either: what comes after training must not start.
        rows = sft(make_model(tiny_dir), tmp_path)
        assert [next(rows)["step"] for _ in range(3)] == [3, 4, 5]
        os.kill(os.getpid(), signal.SIGTERM)
        assert next(rows)["step"] == 6
        with pytest.raises(Interrupted, match="after step 6 of 6"):
            next(rows)
        assert signal.getsignal(signal.SIGINT) is interrupt
        assert list(sft(make_model(tiny_dir), tmp_path)) == []
    finally:
        signal.signal(signal.SIGTERM, before)


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from matryoshka.core.models.load import load_model
from matryoshka.core.signals import Interrupted
from matryoshka.core.training.train import Item, TrainConfig, train
from matryoshka.core.models.tree import Tokens
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT
from matryoshka.lora.linear import LoraConfig, add_adapter, set_active, trainable_parameters

model = load_model(Path(sys.argv[1])).train()
add_adapter(model, "policy", LoraConfig(rank=2), seed=0)
set_active(model, "policy")
items = [Item((Tokens(tuple(range(i, i + 9)), (0,) * 4 + (1,) * 5),), str(i)) for i in range(8)]
config = TrainConfig(learning_rate=1e-2, epochs=int(sys.argv[3]), batch_size=4, seed=7)
parameters = trainable_parameters(model, "policy")
try:
    for row in train(model, parameters, items, config, SFT(), token_logps, Path(sys.argv[2])):
        print(row["step"], flush=True)
except Interrupted as err:
    sys.exit(str(err))
"""


def test_sigterm_saves_and_ends(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: a process of its own, terminated in the middle: it says where it stopped, and that state is on disk."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tiny_dir), str(tmp_path / "run"), "100000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            for _ in range(3):
                assert run.stdout.readline().strip().isdigit()
            run.send_signal(signal.SIGTERM)
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    step = int(checkpoint.name.removeprefix("step-"))
    assert run.returncode == 1
    assert f"stopped by signal after step {step} of 200000; state saved" in err
    assert out.split()[-1] == str(step) and len(metrics(tmp_path / "run")) == step >= 3


def test_training_works_outside_of_the_main_thread(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the same parameters; signals can be handled in the main thread only, so there are none here."""
    here, there = make_model(tiny_dir), make_model(tiny_dir)
    list(sft(here, tmp_path / "here"))
    thread = threading.Thread(target=lambda: list(sft(there, tmp_path / "there")))
    thread.start()
    thread.join()
    assert same(values(here), values(there))


@pytest.mark.parametrize("wrong", [259, 10**6, -1, 2**63 - 1], ids=["one beyond", "far beyond", "negative", "64 bits"])
def test_ids_beyond_the_embedding_are_refused_before_training(tiny_dir: Path, tmp_path: Path, wrong: int) -> None:
    """Oracle: the message, which names item, example and id; nothing is written and no weight moves."""
    model = make_model(tiny_dir)
    before = values(model)
    items = [*conversations(2), Item((Tokens((1, wrong, 2), (0, 0, 1)),), "row 3")]
    with pytest.raises(ValueError, match=rf"item 3 \(example 'row 3'\): token id {wrong} is outside .* 259 tokens"):
        next(sft(model, tmp_path / "run", items=items))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(before[name], weight) for name, weight in values(model).items())


def test_errors(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: messages."""
    model = make_model(tiny_dir)
    parameters = trainable_parameters(model, "policy")
    with pytest.raises(ValueError, match="no items to train on"):
        next(train(model, parameters, [], CONFIG, SFT(), token_logps, tmp_path))
    for name in ("epochs", "batch_size", "micro_batch_tokens", "keep_checkpoints"):
        zero: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"{name} 0 must be at least 1"):
            TrainConfig(**zero)
    for name in ("learning_rate", "max_grad_norm"):
        with pytest.raises(ValueError, match=f"{name} 0 must be above 0"):
            TrainConfig(**{name: 0})  # type: ignore[arg-type]
    for name in ("warmup_ratio", "min_lr_ratio", "beta2"):  # 3 for 3% would never reach the learning rate
        with pytest.raises(ValueError, match=f"{name} 3 is a share; it must lie between 0 and 1"):
            TrainConfig(**{name: 3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_every -1 must not be negative"):
        TrainConfig(save_every=-1)
    with pytest.raises(ValueError, match=r"attention 'flash' is unknown; choose from \['auto', 'varlen'\]"):
        TrainConfig(attention="flash")
