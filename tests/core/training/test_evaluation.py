"""Evaluation between the steps of a training, early stop, and dropout: none of them touches what they should not."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from matryoshka.core.training import train as train_module
from matryoshka.core.training.step import MicroBatch
from matryoshka.core.training.train import Evaluation, Item, TrainConfig, TrainContext, train
from matryoshka.dpo.head import token_logps
from matryoshka.dpo.objectives import SFT, Preference
from matryoshka.lora.linear import active, copy_adapter, layers_with, trainable_parameters
from matryoshka.tests.core.training.test_train import CONFIG, conversations, make_model, metrics, same, values


def pairs(count: int = 10, seed: int = 0) -> list[Item]:
    rows = conversations(count, seed)
    return [Item((a.sequences[0], b.sequences[0]), a.group) for a, b in zip(rows[::2], rows[1::2], strict=True)]


Rows = list[dict[str, float]]


def run(model: Any, folder: Path, evaluation: Evaluation | None, config: TrainConfig = CONFIG) -> Rows:
    """Train on pairs against the untrained adapter and return the rows."""
    context = TrainContext(partial(active, model, "reference"), math.log(2), evaluation=evaluation)
    parameters = trainable_parameters(model, "policy")
    return list(train(model, parameters, pairs(), config, Preference(), token_logps, folder, context))


def prepared(folder: Path) -> Any:
    model = make_model(folder).eval()
    copy_adapter(model, "policy", "reference")
    return model


def test_an_evaluation_is_the_loss_over_all_its_items_and_changes_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the same training without evaluation, bit by bit; log-probs of each pair alone, the equation by hand."""
    held_out = pairs(6, seed=5)
    bare, model = prepared(tiny_dir), prepared(tiny_dir)
    plain, rows = run(bare, tmp_path / "bare", None), run(model, tmp_path / "run", Evaluation(held_out, 2))
    assert same(values(bare), values(model)) and [row["loss"] for row in plain] == [row["loss"] for row in rows]
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4]
    losses, right = [], 0
    for item in held_out:
        sides = {}
        for name in ("policy", "reference"):
            with torch.no_grad(), active(model, name):
                for side, tokens in enumerate(item.sequences):
                    logps = model.logits(model(torch.tensor([tokens.ids]))).log_softmax(-1)[0]
                    scored = [logps[i - 1, id] for i, id in enumerate(tokens.ids) if tokens.mask[i]]
                    sides[name, side] = float(sum(scored))
        margin = 0.1 * (sides["policy", 0] - sides["reference", 0] - sides["policy", 1] + sides["reference", 1])
        losses.append(math.log1p(math.exp(-margin)))
        right += margin > 0
    assert rows[-1]["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert rows[-1]["eval_accuracy"] == right / len(held_out)


WORSE = [Item(item.sequences[::-1], item.group) for item in pairs()]  # with every step of training they get worse
EARLY = replace(CONFIG, epochs=4, save_every=1)


def after_step(folder: Path, tiny_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the parameters after `step` steps of the training without evaluation."""
    model = prepared(tiny_dir)
    context = TrainContext(partial(active, model, "reference"), math.log(2))
    parameters = trainable_parameters(model, "policy")
    steps: Any = train(model, parameters, pairs(), EARLY, Preference(), token_logps, folder, context)
    for _ in range(step):
        next(steps)
    found = values(model)
    steps.close()
    return found


def test_training_ends_when_the_loss_no_longer_falls_and_keeps_the_best(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: by hand: pairs with their sides exchanged get worse with every step, so that the third evaluation ends
    it and step 1 is kept; the parameters are those of one step of the training without evaluation, bit by bit.

    Started again it is at its end. Killed after each step it ends at the same step with the same parameters.
    """
    spent, best = Evaluation(WORSE, 1, patience=2), after_step(tmp_path / "bare", tiny_dir, 1)
    model = prepared(tiny_dir)
    rows = run(model, tmp_path / "run", spent, EARLY)
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[2]["eval_loss"] > rows[0]["eval_loss"]
    assert [(row["best_step"], row["best_eval_loss"]) for row in rows] == [(1, rows[0]["eval_loss"])] * 3
    assert same(values(model), best)
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-1", "step-3"]
    again = prepared(tiny_dir)
    assert run(again, tmp_path / "run", spent, EARLY) == [] and len(metrics(tmp_path / "run")) == 3
    assert same(values(again), best)
    for _ in range(2):
        killed = prepared(tiny_dir)
        context = TrainContext(partial(active, killed, "reference"), math.log(2), evaluation=spent)
        parameters = trainable_parameters(killed, "policy")
        steps: Any = train(
            killed, parameters, pairs(), EARLY, Preference(), token_logps, tmp_path / "killed", context
        )  # fmt: skip
        next(steps)
        steps.close()
    resumed = prepared(tiny_dir)
    assert [row["step"] for row in run(resumed, tmp_path / "killed", spent, EARLY)] == [3]
    assert same(values(resumed), best)


def test_the_best_step_may_lie_in_the_middle(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: losses by hand, 3 2 4 2 5: the first of the lowest is kept, also where training ends by itself and the
    only checkpoints are those that early stop needs. Rows that are gone cannot be compared, and are asked for.
    """
    losses = iter([3.0, 2.0, 4.0, 2.0, 5.0])
    monkeypatch.setattr(train_module, "evaluated", lambda *_: {"eval_loss": next(losses)})
    config, evaluation = replace(EARLY, epochs=4, save_every=0, batch_size=4), Evaluation(WORSE, 1, patience=3)
    model = prepared(tiny_dir)
    rows = run(model, tmp_path / "run", evaluation, config)
    assert [row["best_step"] for row in rows] == [1, 2, 2, 2, 2] and rows[-1]["best_eval_loss"] == 2.0
    assert same(values(model), after_step(tmp_path / "bare", tiny_dir, 2))
    assert sorted(path.name for path in (tmp_path / "run").glob("step-*")) == ["step-2", "step-5"]
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl: has 0 rows, but training goes on after step 5"):
        run(prepared(tiny_dir), tmp_path / "run", evaluation, config)
    monkeypatch.setattr(train_module, "evaluated", lambda *_: {"eval_loss": math.nan})
    with pytest.raises(FloatingPointError, match="the evaluation's loss is nan"):
        run(prepared(tiny_dir), tmp_path / "nan", evaluation, config)


def test_an_evaluation_that_is_not_finite_stops_training(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: the error that names the step; patience would take NaN for the lowest loss, and JSON has no NaN."""
    model, items = prepared(tiny_dir), pairs(6, seed=5)

    class Overflowing(Preference):
        def __call__(self, logps_S: Any, reference_S: Any, tree: Any, totals: Any) -> Any:
            loss, found = super().__call__(logps_S, reference_S, tree, totals)
            return (loss if torch.is_grad_enabled() else loss * math.inf), found

    context = TrainContext(partial(active, model, "reference"), math.log(2), evaluation=Evaluation(items, 2))
    parameters = trainable_parameters(model, "policy")
    with pytest.raises(FloatingPointError, match="step 2: the evaluation's loss is inf"):
        list(train(model, parameters, pairs(), CONFIG, Overflowing(), token_logps, tmp_path, context))
    assert [row["step"] for row in metrics(tmp_path)] == [1]


def test_an_evaluation_of_nothing_is_refused() -> None:
    """Oracle: the message names what came."""
    with pytest.raises(ValueError, match="an evaluation of 0 items every 1 steps with patience 0; expected items"):
        Evaluation([], 1)


def test_dropout_is_the_policy_s_alone_and_only_if_asked_for(tiny_dir: Path) -> None:
    """Oracle: invariants: in training mode the reference's log-probs are those of evaluation mode, the policy's not."""
    model = make_model(tiny_dir, dropout=0.5)
    with torch.no_grad():
        for layer in layers_with(model, "policy"):
            torch.nn.init.normal_(layer.lora_B["policy"], std=0.3, generator=torch.Generator().manual_seed(1))
    copy_adapter(model, "policy", "reference")
    from matryoshka.core.training.memory import plan_memory

    parameters = trainable_parameters(model, "policy")
    memory = plan_memory("none", model, parameters, 100, False, 10**12, "adamw")
    micro = MicroBatch(model, token_logps, pairs()[:2], 1000, torch.device("cpu"), memory)
    reference = micro.reference_logps(partial(active, model, "reference"))
    assert model.training
    policy = micro.logps().detach()
    model.eval()
    assert torch.equal(micro.logps().detach(), reference) and not torch.equal(policy, reference)
    assert Preference().first_loss == math.log(2) and Preference(dropout="policy").first_loss is None
    assert repr(Preference()) == repr(Preference(dropout="policy"))  # the start of a training tells them apart
    with pytest.raises(ValueError, match="dropout 'on' is unknown; choose 'off' or 'policy'"):
        Preference(dropout="on")


def test_sft_is_evaluated_by_tokens(tiny_dir: Path, tmp_path: Path) -> None:
    """Oracle: cross-entropy by hand over all tokens of the held-out rows."""
    model, held_out = make_model(tiny_dir), conversations(4, seed=3)
    context = TrainContext(evaluation=Evaluation(held_out, 100))
    parameters = trainable_parameters(model, "policy")
    *_, last = train(model, parameters, conversations(), CONFIG, SFT(), token_logps, tmp_path, context)
    total, count = 0.0, 0
    model.eval()
    for item in held_out:
        (tokens,) = item.sequences
        with torch.no_grad():
            logps = model.logits(model(torch.tensor([tokens.ids]))).log_softmax(-1)[0]
        for i, id in enumerate(tokens.ids):
            if tokens.mask[i]:
                total, count = total - float(logps[i - 1, id]), count + 1
    assert last["eval_loss"] == pytest.approx(total / count, abs=1e-5)
