"""From one trained run: each question that a researcher asks next is one command, and the run's records stay."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from matryoshka.core.files import read_jsonl, write_jsonl
from matryoshka.pilot.config import WarmupConfig
from matryoshka.pilot.context import open_run
from matryoshka.pilot.stages import warm_up
from matryoshka.scripts import cli
from matryoshka.tasks.pal import synthetic_problems as words
from matryoshka.tests.pilot.conftest import Generator
from matryoshka.tests.pilot.test_pilot import Runs, small


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file but the lock and the cache of answers, which evaluations share on purpose."""
    files = [path for path in folder.rglob("*") if path.is_file() and "cache" not in path.name and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_each_question_is_one_command(
    tmp_path: Path, controller_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Oracles: the run's files before and after; the record of each evaluation, which says under which settings it was
    made; the scripted server's list of requests; an adapter that peft itself wrote.
    """
    import peft
    import transformers

    monkeypatch.chdir(tmp_path)
    config = small("one", controller_dir, generator.url("one-run"))
    config = replace(config, warmup=WarmupConfig(train=replace(config.warmup.train, epochs=2)))
    path = str(Runs(tmp_path, generator).write(config))
    with open_run(config, Path("runs")) as run:
        warm_up(run)
    assert cli.main(["evaluate", "--config", path, "--only", "warmup"]) == 0
    before, asked = digests(Path("runs/one")), len(generator.asked("one-run"))
    train, test = (words.load(split, 12, 0) for split in ("train", "test"))
    for name, examples in (("train", train), ("other", test[4:])):
        known = [(example.fields["question"], f"<<1+1=2>> #### {example.fields['answer']:g}") for example in examples]
        write_jsonl(Path(f"{name}.jsonl"), [{"question": question, "answer": answer} for question, answer in known])
    base = transformers.AutoModelForCausalLM.from_pretrained(controller_dir)
    foreign = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, foreign).save_pretrained("foreign")
    files = ["--task.options.train-file", "train.jsonl", "--task.options.test-file", "other.jsonl", "--split", "test"]
    other = ["--generator.base-url", generator.url("another"), "--generator.identity", "another"]
    policy, three = "runs/one:warmup", ("--evaluate.inner-attempts", "3")
    for out, flags, problems, protocol in (
        ("oracle", ["--policy", policy, "--evaluate.protocol", "oracle", *three], 6, "oracle"),
        ("six", ["--policy", policy, "--evaluate.inner-attempts", "6"], 6, "label_free"),
        ("file", ["--policy", policy, *files, "--task.held-out", "0"], 4, "label_free"),
        ("generator", ["--policy", policy, *other], 6, "label_free"),
        ("foreign", ["--policy", "foreign"], 6, "label_free"),
    ):
        assert cli.main(["evaluate", "--config", path, *flags, "--out", f"runs/{out}"]) == 0, capsys.readouterr().err
        infos = [row["trajectory"]["info"] for row in read_jsonl(Path("runs") / out / "trajectories.jsonl")]
        assert len(infos) == problems and {info["protocol"] for info in infos} == {protocol}
        settings = json.loads((Path("runs") / out / "evaluation.json").read_text())["settings"]
        allowed = {"six": 6, "oracle": 3}.get(out)
        assert settings["evaluate"]["inner_attempts"] == allowed
        assert (max(info["attempts"] for info in infos) > 1) == (allowed is not None)
        assert {info["generator"] for info in infos} == {f"scripted@{'another' if out == 'generator' else 'scripted'}"}
    assert len(generator.asked("another")) == 6 and len(generator.asked("one-run")) > asked
    assert digests(Path("runs/one")) == before
    # And the results stand beside one another, problem by problem, protocols apart.
    capsys.readouterr()
    assert cli.main(["compare", "runs/six", "runs/oracle", "runs/generator", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["differences"]
    refused = {row["second"].partition(":")[0]: bool(row["refused"]) for row in found}
    assert refused == {"oracle": True, "generator": False}
    assert found[1]["problems"] == "6 equal ones"
