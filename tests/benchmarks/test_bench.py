"""matryoshka bench: the JSON contract, ratios from stubbed timings, unknown and absent peers, tiny real runs."""

import dataclasses
import importlib
import importlib.util
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from matryoshka.benchmarks import head, load, step
from matryoshka.benchmarks.command import BENCHES, show
from matryoshka.benchmarks.measure import alternate, peak_bytes
from matryoshka.benchmarks.pal_rows import pal_items
from matryoshka.benchmarks.result import BenchResult, Row, speed_up
from matryoshka.benchmarks.shapes import SHAPES, random_model
from matryoshka.benchmarks.step_profile import profile_chart
from matryoshka.benchmarks.training import Block, Recipe
from matryoshka.benchmarks.trl_training import transformers_model
from matryoshka.core.models.load import load_model
from matryoshka.core.models.tree import tree_size
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.lora.linear import LoraConfig
from matryoshka.scripts import cli
from matryoshka.tests.lora.test_nf4 import nf4_bytes
from matryoshka.tests.pilot.conftest import with_context

KEYS = ["bench", "hardware", "versions", "commit", "rows", "ratio", "target", "holds"]


def bench(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run `matryoshka bench ... --json` and return its last line."""
    status = cli.main(["bench", *arguments, "--threads", "1", "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert list(result) == KEYS
    assert all(list(row)[:3] == ["name", "value", "unit"] for row in result["rows"])
    assert result["hardware"]["cores"] >= 1 and result["versions"]["torch"] == torch.__version__
    return result


@pytest.fixture(scope="module")
def model_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama with a context in which a prompt in bytes fits."""
    return str(with_context(tiny_dir, tmp_path_factory.mktemp("bench") / "tiny", 2048))


def small(model_dir: str, *more: str) -> list[str]:
    sizes = "--style compact --questions 2 --pairs 2 --steps 2 --repeats 1 --rank 2 --padded-pairs 2 --trl-pairs 2"
    return ["step", "--model", model_dir, *sizes.split(), *more]


def test_step_counts_pairs_and_its_trainers_agree(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: pairs a second are pairs over the median seconds; two layouts of one computation have one loss."""
    result = bench(capsys, *small(model_dir))
    ours, padded, difference, memory = result["rows"]
    assert (ours["name"], padded["name"]) == ("token tree", "padded")
    for row in (ours, padded):
        assert row["value"] == pytest.approx(2 * 2 / row["seconds_per_step"]) and row["steps"] == 2
    assert result["ratio"] == pytest.approx(ours["value"] / padded["value"])
    assert result["target"] == 4.0 and result["holds"] is (result["ratio"] >= 4.0)
    assert difference["unit"] == "nats" and difference["value"] < 1e-5
    assert ours["tokens_per_step"] < padded["tokens_per_step"]
    assert memory["over_predicted"] == pytest.approx(memory["value"] / memory["predicted_mib"])


def test_qlora_measures_both_bases(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: bytes by hand; sums and the ratio from the rows; both start from the same loss, ln 2."""
    pytest.importorskip("bitsandbytes")
    sizes = "--style compact --questions 1 --pairs 2 --steps 1 --repeats 1 --rank 2".split()
    result = bench(capsys, "qlora", "--model", model_dir, *sizes)
    values = {row["name"]: row["value"] for row in result["rows"]}
    numbers = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    norms = 2 * 2 * 32 * 4
    details = {row["name"]: row for row in result["rows"]}
    plain = 2 * 4 * sum(rows * columns for rows, columns in numbers) + norms
    packed = 2 * sum(nf4_bytes(rows * columns) for rows, columns in numbers) + norms
    assert details["weights, float32"]["blocks_mib"] == round(plain / 2**20, 1)
    assert details["weights, nf4"]["blocks_mib"] == round(packed / 2**20, 1)
    assert values["weights, float32"] - values["weights, nf4"] == pytest.approx((plain - packed) / 2**20)
    for name in ("float32", "nf4"):
        parts = values[f"weights, {name}"] + values[f"peak of a step beyond the weights, {name}"]
        assert values[f"peak of a step with the weights, {name}"] == pytest.approx(parts) and values[name] > 0
    total = "peak of a step with the weights"
    assert result["ratio"] == pytest.approx(values[f"{total}, float32"] / values[f"{total}, nf4"])
    last = details["largest difference of the losses"]
    assert last["last_nf4"] == pytest.approx(math.log(2)) == pytest.approx(last["last_float32"])


@pytest.mark.slow
def test_step_against_trl(model_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: TRL's own losses on the same ids, from the same adapter, over steps that learn; its ratio is the best."""
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    more = ["--against", "trl", "--compare-losses", "4", "--learning-rate", "1e-2"]
    result = bench(capsys, *small(model_dir, *more))
    names = [row["name"] for row in result["rows"]]
    assert names[:2] == ["token tree", "trl, 2 pairs"] and "over 4 steps" in names[-2]
    last = result["rows"][-2]
    assert last["value"] < 1e-4 and last["last_loss"] != pytest.approx(math.log(2), abs=1e-3)
    assert result["versions"]["trl"] and result["versions"]["peft"] and result["versions"]["transformers"]


def test_head_measures_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: fp32 against float64 is right to about 1e-6; the ratio is the worst over the sizes, by hand."""
    sizes = "--tokens 5 12 --hidden 16 --vocabulary 70 --repeats 2 --warmup 1".split()
    result = bench(capsys, "head", *sizes)
    names = ("flash head", "eager", "two vocabulary products")
    assert [row["name"] for row in result["rows"]] == [f"{name}, {n} tokens" for n in (5, 12) for name in names]
    for row in result["rows"]:
        assert row["unit"] == "ms" and row["min_ms"] <= row["value"] <= row["max_ms"]
        if row["implementation"] != "two vocabulary products":
            assert row["gradient_error"] < 1e-5 and row["mean_logp_error"] < 1e-5
    values = {row["name"]: row["value"] for row in result["rows"]}
    ratios = [values[f"eager, {n} tokens"] / values[f"flash head, {n} tokens"] for n in (5, 12)]
    assert result["ratio"] == pytest.approx(min(ratios)) and result["holds"] is None


def test_ratio_of_head_ignores_the_floor_and_what_did_not_run() -> None:
    """Oracle: by hand, 30 / 10 at 8 tokens and 12 / 10 at 16: the worse one counts."""

    def row(name: str, tokens: int, value: float | None) -> Row:
        return Row(name, value, "ms", {"tokens": tokens, "implementation": name})

    at_8 = [row(head.OURS, 8, 10.0), row("eager", 8, 30.0), row("trl", 8, 40.0), row(head.FLOOR, 8, 1.0)]
    at_16 = [row(head.OURS, 16, 10.0), row("eager", 16, None), row("trl", 16, 12.0), row(head.FLOOR, 16, 1.0)]
    assert head.worst_ratio(at_8 + at_16) == pytest.approx(1.2)
    assert head.worst_ratio([row(head.OURS, 8, 10.0), row(head.FLOOR, 8, 1.0)]) is None


def test_speeds_are_medians_over_all_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: stubbed seconds. Medians 2 and 9 s for 4 pairs: 2 and 4/9 pairs a second, ratio 4.5."""
    blocks = {"token tree": iter([[9.0, 1.0], [2.0, 2.0]]), "padded": iter([[8.0, 10.0], [9.0, 9.0]])}

    def stub(name: str) -> Callable[..., Block]:
        return lambda items, recipe: Block(next(blocks[name], [1.0]), [0.5, 0.25], 3 * 2**30, 80)

    recipe = Recipe(True, 4, 1e-4, 8, 1, LoraConfig(), 0, "cpu")
    shared = step.Bench(nn.Module(), {}, [], recipe)  # type: ignore[arg-type]
    monkeypatch.setattr(step, "load_bench", lambda config: shared)
    monkeypatch.setattr(step, "memory_row", lambda *rest: Row("memory", 1.0, "MiB"))
    monkeypatch.setattr(step, "_warm_up", lambda *rest: ["trl, 5 pairs"])
    monkeypatch.setattr(step, "_trainers", lambda *rest: {name: stub(name) for name in (*blocks, "trl, 5 pairs")})
    result = step.run(step.Config(repeats=2, threads=1))
    values = {row.name: row.value for row in result.rows}
    assert values["token tree"] == 2.0 and values["padded"] == pytest.approx(4 / 9)
    assert result.ratio == pytest.approx(4.5) and result.target == 4.0 and result.holds is True
    assert values["trl, 5 pairs"] is None
    assert result.rows[0].details["peak_gib"] == 3.0 and result.rows[0].details["tokens_per_step"] == 40
    assert values["largest difference of the losses, token tree and padded"] == 0.0


def test_load_reports_medians_of_processes(
    monkeypatch: pytest.MonkeyPatch, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: stubbed loads, the first one thrown away; 0.5 s against 1 s is twice as fast."""
    pytest.importorskip("transformers")
    times = {load.OURS: iter([9.0, 0.4, 0.5, 0.9]), "transformers": iter([1.0, 1.0, 7.0])}
    mib = {"resident": 4.0 * 2**20, "anonymous": 2.0**20}
    monkeypatch.setattr(load, "_child", lambda name, config, dtype: {"seconds": next(times[name]), **mib})
    result = bench(capsys, "load", "--model", str(tiny_dir), "--repeats", "3")
    ours, theirs = result["rows"]
    assert (ours["value"], theirs["value"], result["ratio"]) == (0.5, 1.0, 2.0)
    assert (ours["peak_resident_mib"], ours["peak_anonymous_mib"]) == (4.0, 1.0)


@pytest.mark.slow
def test_load_in_real_processes(tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the weights' size, which any load must hold; no peer, so no ratio."""
    result = bench(capsys, "load", "--model", str(tiny_dir), "--repeats", "1", "--against")
    (row,) = result["rows"]
    assert row["value"] > 0 and row["peak_resident_mib"] >= 0.5 * row["stored_mib"]
    assert result["ratio"] is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["stp"], "bench: unknown benchmark 'stp'; did you mean 'step'?"),
        (["load", "--model", "nowhere", "--against"], "nowhere: no safetensors in this folder"),
        (["step", "--style", "ful", "--threads", "1"], "style 'ful' is unknown"),
        (["step", "--device", "cuda"], "torch finds no GPU here"),
        (["head", "--device", "tpu"], "device 'tpu' is not measured here; choose cpu or cuda"),
        (["head", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["head", "--against", "liger"], "liger runs on GPUs only"),
    ],
)
def test_a_users_error_is_one_line(
    arguments: list[str], problem: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: status 2 and the line on stderr."""
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if "liger" in arguments:
        pytest.importorskip("liger_kernel")
    if arguments[0] == "step":
        arguments = [*arguments, "--model", str(tiny_dir)]
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert problem in error and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["head", "--against", "ligr"], "did you mean 'liger'?"),
        (["step", "--against", "padded", "axolotl"], "choose from padded, packed, trl, trl-liger"),
        (["load", "--against", "hf"], "choose from transformers"),
        (["step", "--objective", "sft", "--against", "trl"], "leave trl out"),
        (["step", "--against", "trl", "trl-liger"], "measure trl alone"),
        (["step", "--shape", "llama4"], "choose from ['llama3-8b', 'llama-small'"),
        (["head", "--tokens", "0"], "must be at least 1"),
    ],
)
def test_unknown_peers_and_sizes_are_refused(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the flag parser's status 2, and the message."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *arguments])
    assert exit_.value.code == 2
    assert hint in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["head", "--against", "liger"], "liger-kernel"),
        (["head", "--against", "cce"], "cut-cross-entropy"),
        (["step", "--against", "trl"], "trl"),
        (["load"], "transformers"),
    ],
)
def test_a_peer_that_is_not_installed_is_named(
    arguments: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the package's name and how to get it, before anything is loaded or measured."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", *arguments]) == 2
    assert f"needs the package {package}, which is not installed; pip install {package}" in capsys.readouterr().err


def test_every_bench_has_a_configuration_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the contract of a bench module."""
    assert cli.main(["bench"]) == 0
    listed = capsys.readouterr().out
    for name, text in BENCHES.items():
        module = importlib.import_module(f"matryoshka.benchmarks.{name}")
        assert dataclasses.is_dataclass(module.Config) and callable(module.run)
        assert f"  {name} " in listed and text in listed


def test_tables_name_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: by hand."""
    rows = [Row("ours", 2.0, "x/s", {"n": 3}), Row("theirs", None, "x/s", {"n": 3, "note": "out of memory"})]
    show(BenchResult("step", rows, 1.5, 4.0), Console(width=200))
    out = capsys.readouterr().out
    assert "bench step; in all rows: n 3" in out and "not measured" in out and "note out of memory" in out
    assert "1.50x, target 4: MISSED" in out


def test_the_object_has_what_a_reader_needs() -> None:
    """Oracle: by hand; an infinite value is refused by the row's name."""
    result = BenchResult("x", [Row("a", 1.0, "s", {"n": 2})], 3.0, 2.0, ["torch", "no-such-distribution"])
    found = json.loads(result.to_json())
    assert found["rows"] == [{"name": "a", "value": 1.0, "unit": "s", "n": 2}]
    assert (found["ratio"], found["target"], found["holds"]) == (3.0, 2.0, True)
    assert found["versions"]["no-such-distribution"] is None and found["versions"]["torch"]
    assert [BenchResult("x", [], r, t).holds for r, t in [(1.0, 2.0), (None, 2.0), (1.0, None)]] == [False, None, None]
    with pytest.raises(ValueError, match="row 'a' has the value inf"):
        BenchResult("x", [Row("a", math.inf, "s")], None).to_json()
    with pytest.raises(ValueError, match="'unit' is a field of its own"):
        Row("a", 1.0, "s", {"unit": "ms"})


def test_speed_up_is_against_the_best_other() -> None:
    """Oracle: by hand."""
    assert speed_up(8.0, [2.0, 4.0], higher_is_better=True) == 2.0
    assert speed_up(8.0, [24.0, 16.0], higher_is_better=False) == 2.0
    assert speed_up(8.0, [], higher_is_better=True) is None


def test_candidates_alternate() -> None:
    """Oracle: the order of calls by hand; every second round is reversed."""
    called: list[str] = []

    def call(name: str) -> int:
        called.append(name)
        return len(called)

    taken = alternate({name: partial(call, name) for name in "abc"}, 3)
    assert "".join(called) == "abccbaabc"
    assert taken == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    """Oracle: tensors of 4 kB: two, one freed, then two more: three at once."""

    def work() -> None:
        a = torch.empty(1000)
        b = torch.empty(1000)
        del a
        c, d = torch.empty(1000), torch.empty(1000)
        del b, c, d

    assert peak_bytes(work, "cpu") == pytest.approx(3 * 4000, rel=0.05)


@pytest.mark.parametrize("style", ["full", "compact"])
def test_pal_rows_share_prompts_and_nothing_else(style: str, smollm2: Tokenizer) -> None:
    """Oracle: counts by hand; all 2 x pairs texts of a question differ; the header stands once in the tree."""
    items = pal_items(smollm2, 3, 5, style, None, 0)
    assert len(items) == 15 and len({item.group for item in items}) == 3
    for start in range(0, 15, 5):
        group = items[start : start + 5]
        assert len({item.group for item in group}) == 1
        assert len({sequence.ids for item in group for sequence in item.sequences}) == 10
    sequences = [sequence for item in items for sequence in item.sequences]
    assert tree_size(sequences) < sum(len(s.ids) for s in sequences) / 5
    assert items == pal_items(smollm2, 3, 5, style, None, 0) != pal_items(smollm2, 3, 5, style, None, 1)


def test_pal_rows_from_files(smollm2: Tokenizer, tmp_path: Path) -> None:
    """Oracle: the text that a row must contain, and errors naming file, line or count."""
    asked = [{"question": f"Tom has {i} pens. He buys {i}. How many has he {i}?", "answer": "#### 1"} for i in range(9)]
    chats = [
        {"prompt": [{"role": "user", "content": f"Q{i}"}], "response": [{"role": "assistant", "content": f"A{i}"}]}
        for i in range(9)
    ]
    files: list[tuple[str, list[Any], str]] = [("gsm", asked, "How many has he"), ("chat", chats, "A")]
    for name, rows, text in files:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        item = pal_items(smollm2, 2, 2, "full", path, 0)[0]
        chosen = item.sequences[0]
        assert text in smollm2.decode([id for id, scored in zip(chosen.ids, chosen.mask, strict=True) if scored])
        with pytest.raises(ValueError, match="9 rows; 2 questions with 6 pairs each need more"):
            pal_items(smollm2, 2, 6, "full", path, 0)
    (tmp_path / "bad").write_text('{"prompt": "text", "response": "text"}\n')
    with pytest.raises(ValueError, match="bad:1: prompt and response must be lists"):
        pal_items(smollm2, 1, 1, "full", tmp_path / "bad", 0)


def test_random_models_are_seeded() -> None:
    """Oracle: equal seeds give equal weights, other seeds others; norms are 1."""
    config: dict[str, Any] = {**SHAPES["llama3-8b"], "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 1, "vocab_size": 20, "head_dim": 8}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    one, same, other = (random_model(config, torch.float32, "cpu", seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(one["model.norm.weight"], torch.ones(16))


def test_transformers_model_shares_our_weights(model_dir: str) -> None:
    """Oracle: transformers' logits are ours, and its weights lie in our memory."""
    pytest.importorskip("transformers")
    ours = load_model(Path(model_dir))
    theirs = transformers_model(ours, json.loads((Path(model_dir) / "config.json").read_text()), "cpu").eval()
    (ours_in_memory,) = (w.data_ptr() for name, w in ours.named_parameters() if name == "model.embed_tokens.weight")
    assert theirs.get_input_embeddings().weight.data_ptr() == ours_in_memory
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_profile_is_a_chart_and_its_rows(tmp_path: Path) -> None:
    """Oracle: the PNG signature; shares of what is shown sum to at most 1 and come in order."""
    pytest.importorskip("matplotlib")
    rows = profile_chart(lambda: torch.ones(64, 64) @ torch.ones(64, 64), tmp_path / "charts" / "step.png", "cpu")
    assert (tmp_path / "charts" / "step.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shares: list[float] = [row.details["share"] for row in rows]
    assert 0 < sum(shares) <= 1 + 1e-9 and shares == sorted(shares, reverse=True)
