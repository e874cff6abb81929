"""matryoshka gateway: calls become episodes, episodes become trajectories, and these the next policy.

Clients are the openai package and raw HTTP; the server runs in a thread of its own.
"""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from matryoshka.core.config import to_toml
from matryoshka.core.files import read_jsonl, write_jsonl
from matryoshka.core.models.load import load_model
from matryoshka.core.records import Message, PairRule, Sample, Sampling, from_json
from matryoshka.core.text.tokenizer import Tokenizer
from matryoshka.core.training.train import TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.dpo.parity import check_policy
from matryoshka.inference import server
from matryoshka.lora.files import adapter_hash, load_adapter
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.collected import read_episodes, read_rows
from matryoshka.pilot.config import ControllerConfig
from matryoshka.pilot.gateway import PolicyEngine, open_gateway
from matryoshka.pilot.gateway_record import (
    Call,
    Conflict,
    Ending,
    GatewayConfig,
    Record,
    claim,
    newest_stage,
    train_from,
    trajectories_of,
)
from matryoshka.scripts import cli
from matryoshka.tests.pilot.conftest import ROOT, command, environment

TRAIN = TrainConfig(learning_rate=5e-3, epochs=1, batch_size=4)


def config(controller: Path, **changes: Any) -> GatewayConfig:
    found = GatewayConfig(
        name="planner",
        controller=ControllerConfig(str(controller), threads=1, deterministic=True),
        lora=LoraConfig(rank=4, targets=("q_proj", "v_proj", "down_proj")),
        train=TRAIN,
        port=0,
    )
    return replace(found, **changes)


@contextmanager
def serving(settings: GatewayConfig, folder: Path) -> Iterator[str]:
    """Serve in a thread and yield the address."""
    ready, ports, loops = threading.Event(), list[int](), list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]]()

    async def serve() -> None:
        def told(port: int) -> None:
            ports.append(port)
            ready.set()

        task = asyncio.current_task()
        assert task is not None
        loops.append((asyncio.get_running_loop(), task))
        with open_gateway(settings, folder) as (engine, make):
            await server.serve(engine, "127.0.0.1", 0, None, told, False, make)

    def run() -> None:
        try:
            asyncio.run(serve())
        except asyncio.CancelledError:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(60)
    try:
        yield f"http://127.0.0.1:{ports[0]}/v1"
    finally:
        loop, task = loops[0]
        loop.call_soon_threadsafe(task.cancel)
        thread.join(60)
        assert not thread.is_alive()


def ask(url: str, body: dict[str, Any] | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Return status and JSON of a GET, or of a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **sent})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as err:
        return err.code, json.load(err)


def chat(text: str = "Go on.", **more: Any) -> dict[str, Any]:
    return {"model": "planner", "messages": [{"role": "user", "content": text}], "max_tokens": 6, **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "planner"


def test_calls_become_episodes_and_episodes_trajectories(controller_dir: Path, folder: Path) -> None:
    """Oracles: the openai client's own answers; the ids and log-probs that the trainer computes for the same tokens."""
    with serving(config(controller_dir), folder) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        assert [model.id for model in client.models.list()] == ["planner"]
        said = []
        for text in ("first", "second"):
            reply = client.chat.completions.create(**chat(text, logprobs=True), extra_headers={"X-Episode-Id": "a"})
            assert reply.choices[0].logprobs is not None and reply.model_extra is not None
            logprobs = [row.logprob for row in reply.choices[0].logprobs.content or []]
            said.append((reply.choices[0].message.content, logprobs))
        assert (reply.id, reply.model_extra["call"], reply.model_extra["policy"]) == ("chatcmpl-a-2", 2, "untrained")
        other = client.chat.completions.create(**{**chat("first", n=3), "model": "planner:b"})
        assert len(other.choices) == 3 and other.model == "planner"
        assert ask(f"{url}/episodes")[1]["data"] == [{"id": "a", "calls": 2}, {"id": "b", "calls": 1}]
        status, state = ask(f"{url}/episodes/a", {"reward": 1, "note": "well done", "problem": "p"})
        assert status == 200 and state["ended"] and state["rewards"] == [1.0]
        assert ask(f"{url}/episodes/b", {"rewards": [0, 1, 0.25], "problem": "p"})[0] == 200
        assert ask(f"{url}/episodes")[1]["data"] == []
    record = Record(folder)  # as a gateway that is started again has it
    assert [len(record.calls[episode]) for episode in "ab"] == [2, 1] and record.open_episodes() == []
    assert record.ending("a") == Ending((1.0,), "well done", "p") and not record.calls["a"][0].samples
    record.close()
    rows = read_rows(folder / "trajectories.jsonl")
    assert list(rows) == ["a", "b", "b#1", "b#2"] and [row.reward for row in rows.values()] == [1, 0, 1, 0.25]
    turns = rows["a"].turns
    assert [(turn.action.text, list(turn.action.logprobs or [])) for turn in turns] == said
    assert turns[0].prompt == (Message("user", "first"),)
    assert turns[0].prompt_ids == Tokenizer.load(controller_dir).render(turns[0].prompt, add_generation_prompt=True).ids
    assert [row.turns[0].action.text for row in list(rows.values())[1:]] == [c.message.content for c in other.choices]
    found = check_policy(load_model(controller_dir), list(rows.values()), "tiny", 1e-3, 0)
    assert found is not None and found.rms < 1e-4
    # `matryoshka pairs` reads the folder too: each call is a turn of its own with its episode's reward.
    assert [row.reward for row in read_episodes(folder).rows.values()] == [1, 1, 0, 1, 0.25]


def test_bad_ids_and_double_rewards_lose_nothing(controller_dir: Path, folder: Path) -> None:
    """Oracle: by hand, the status and the message of each; what is on disk changes with none of them."""
    with serving(config(controller_dir), folder) as url:
        talk = f"{url}/chat/completions"
        for body, headers, said in (
            (chat(), {}, "the call names no episode; send the header X-Episode-Id, or the model as planner:ID"),
            (chat(), {"X_Episode_Id": "../up"}, "episode id '../up': expected 1 to 128 letters"),
            ({**chat(), "model": "planner:"}, {}, "episode id ''"),
            ({**chat(), "model": "planner:a"}, {"X_Episode_Id": "b"}, "give two ids, 'b' and 'a'"),
            ({**chat(), "model": "other:a"}, {"X_Episode_Id": "b"}, "model 'other:a' is not served here"),
            (chat(stream=1), {"X_Episode_Id": "a"}, "stream: expected true or false, got 1"),
            (chat(stream_options={}), {"X_Episode_Id": "a"}, "stream_options: they are for stream = true alone"),
            (
                chat(stream=True, stream_options={"other": 1}), {"X_Episode_Id": "a"},
                'stream_options: expected {"include_usage": true} or false, got {"other": 1}',
            ),
        ):
            status, answer = ask(talk, body, **headers)
            assert status in (400, 404) and said in answer["error"]["message"]
        assert ask(f"{url}/episodes/a", {"reward": 1})[0] == 404 and ask(f"{url}/episodes/a")[0] == 404
        assert not (folder / "calls.jsonl").read_bytes()
        assert ask(talk, chat(n=2), X_Episode_Id="a")[0] == 200
        for end, code, said in (
            ({}, 400, "give 'reward', or 'rewards'"),
            ({"reward": 1, "rewards": [1]}, 400, "give 'reward', or 'rewards'"),
            ({"reward": "1"}, 400, "reward is '1' (str); expected a finite number"),
            ({"reward": 1, "score": 2}, 400, "unknown field 'score'"),
            ({"rewards": [1, None]}, 400, "expected a finite number"),
            ({"reward": 1, "used": {"1": "0"}}, 400, "number of a call -> index of the sample"),
            ({"reward": 1}, 409, "call 1 has 2 samples, and it is not known which one the agent used"),
            ({"rewards": [1, 0, 0]}, 409, "3 rewards for the last call, which has 2 samples"),
            ({"reward": 1, "used": {"2": 0}}, 409, "the episode has no call '2'"),
            ({"reward": 1, "used": {"1": 2}}, 409, "call 1 has 2 samples, no sample 2"),
        ):
            status, answer = ask(f"{url}/episodes/a", end)
            assert (status, said in answer["error"]["message"]) == (code, True), answer
        assert not (folder / "trajectories.jsonl").read_bytes()
        end = {"reward": 1, "used": {"1": 1}}
        first = ask(f"{url}/episodes/a", end)
        assert first[0] == 200 and ask(f"{url}/episodes/a", end) == first  # a repeat is the same end
        status, answer = ask(f"{url}/episodes/a", {"reward": 0, "used": {"1": 1}})
        assert status == 409 and "has ended with rewards [1.0] already" in answer["error"]["message"]
        status, answer = ask(talk, chat(), X_Episode_Id="a")
        assert status == 409 and "episode 'a' has ended" in answer["error"]["message"]
    assert len(read_jsonl(folder / "trajectories.jsonl")) == 1


def test_lost_clients_and_their_retries(
    controller_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the record. A client that leaves before its answer leaves no call; a retry gets what was drawn."""
    generate, ended, begun = PolicyEngine.generate, list[str](), threading.Event()

    async def slow(engine: PolicyEngine, prompt_ids: Sequence[int], sampling: Sampling, model: str) -> Sample:
        if sampling.max_tokens == 900:  # the lost client's
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("lost")
        return await generate(engine, prompt_ids, sampling, model)

    monkeypatch.setattr(PolicyEngine, "generate", slow)
    with serving(config(controller_dir), folder) as url:
        talk = f"{url}/chat/completions"
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        body = json.dumps(chat(max_tokens=900, model="planner:lost")).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head.encode() + body)
            assert begun.wait(60)
        status, first = ask(talk, chat("a"), X_Episode_Id="kept")
        assert status == 200
        retried = ask(talk, chat("a"), X_Episode_Id="kept", X_Stainless_Retry_Count="1")[1]
        assert (retried["id"], retried["choices"]) == (first["id"], first["choices"])
        again = ask(talk, chat("a"), X_Episode_Id="kept")[1]  # no retry: another draw
        assert again["call"] == 2
        changed = ask(talk, chat("b"), X_Episode_Id="kept", X_Stainless_Retry_Count="1")[1]
        assert changed["call"] == 3  # it was lost before it came here
        once = {"X_Episode_Id": "kept", "Idempotency_Key": "k"}
        fourth = ask(talk, chat("c"), **once)[1]
        assert fourth["call"] == 4 and ask(talk, chat("d"), X_Episode_Id="kept")[1]["call"] == 5
        assert ask(talk, chat("c"), **once)[1]["choices"] == fourth["choices"]
        status, answer = ask(talk, chat("e"), **once)
        assert status == 409 and "call 4 of episode 'kept' had the Idempotency-Key 'k'" in answer["error"]["message"]
        assert ended == ["lost"] and ask(f"{url}/episodes/lost")[0] == 404
    calls = [row["key"] for row in read_jsonl(folder / "calls.jsonl")]
    assert [key for key in calls if key.startswith("kept")] == [f"kept/{n}" for n in range(1, 6)]


def test_streamed_answers_are_those_of_whole_ones(controller_dir: Path, folder: Path) -> None:
    """Oracles: the openai package's streaming client and its accumulating helper, against the whole answer to the same
    call, which a retry gets; the record, which has each call once.
    """
    with serving(config(controller_dir), folder) as url:
        client = openai.OpenAI(base_url=url, api_key="none")
        body = chat("a", n=2, temperature=1, logprobs=True)
        headers = {"X-Episode-Id": "s", "Idempotency-Key": "one"}
        usage: Any = {"include_usage": True}
        *chunks, last = client.chat.completions.create(
            **body, stream=True, stream_options=usage, extra_headers=headers
        )  # fmt: skip
        whole = client.chat.completions.create(**body, extra_headers=headers)
        assert last.usage == whole.usage and not last.choices and all(chunk.usage is None for chunk in chunks)
        assert {(chunk.id, chunk.object) for chunk in (*chunks, last)} == {(whole.id, "chat.completion.chunk")}
        for choice in whole.choices:
            parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert "".join(part.delta.content or "" for part in parts) == choice.message.content
            assert [part.delta.role for part in parts] == ["assistant", None, None]
            assert [part.finish_reason for part in parts] == [None, None, choice.finish_reason]
            scores = [row for part in parts if part.logprobs for row in part.logprobs.content or []]
            assert choice.logprobs is not None and scores == choice.logprobs.content
        plain = list(client.chat.completions.create(**chat("b", stream=True), extra_headers={"X-Episode-Id": "s"}))
        assert all("usage" not in chunk.model_fields_set for chunk in plain) and all(c.choices for c in plain)
        with client.chat.completions.stream(**chat("c"), extra_headers={"X-Episode-Id": "s"}) as stream:
            stream.until_done()
            gathered = stream.current_completion_snapshot  # the final one is an error where the length cut it
        retry = {"X-Episode-Id": "s", "X-Stainless-Retry-Count": "1"}
        again = client.chat.completions.create(**chat("c"), extra_headers=retry)
        assert (gathered.id, gathered.choices[0].message.content) == (again.id, again.choices[0].message.content)
        assert gathered.choices[0].finish_reason == again.choices[0].finish_reason

        # A client that leaves in the middle of the events: the call stands, and the client gets it when it asks again.
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        sent = json.dumps(chat("d", stream=True, model="planner:s")).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(sent)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(head.encode() + sent)
            begun = gone.recv(300)
        assert begun.startswith(b"HTTP/1.1 200") and b"text/event-stream" in begun and b"[DONE]" not in begun
        fourth = client.chat.completions.create(**chat("d"), extra_headers=retry)
        assert fourth.model_extra is not None and fourth.model_extra["call"] == 4
        assert ask(f"{url}/episodes/s")[1]["calls"] == 4
    calls = [from_json(Call, row["call"]) for row in read_jsonl(folder / "calls.jsonl")]
    assert [call.key for call in calls] == [f"s/{number}" for number in range(1, 5)]
    assert [sample.text for sample in calls[0].samples] == [choice.message.content for choice in whole.choices]


def test_which_sample_was_used_is_read_from_the_next_prompt() -> None:
    """Oracle: by hand; with no sign of it the end is refused, and rewards of the last call's samples share the rest."""
    def call(number: int, texts: list[str], prompt: str) -> Call:
        samples = tuple(Sample(text, token_ids=(1,), logprobs=(-1.0,)) for text in texts)
        return Call("e", number, "", "", (Message("user", prompt),), (1,), samples)

    calls = [call(1, ["one", "two"], "?"), call(2, ["x", "y"], "You said: two.")]
    (found,) = trajectories_of(calls, Ending((1.0,), used={"2": 0}), "p")
    assert [turn.action.text for turn in found.turns] == ["two", "x"]
    both = trajectories_of(calls, Ending((1.0, 0.0)), "p")
    assert [[turn.action.text for turn in t.turns] for t in both] == [["two", "x"], ["two", "y"]]
    assert len({t.example_id for t in (found, *both)}) == 1
    spoken = replace(calls[1], prompt=(Message("assistant", "one"), Message("user", "Not two.")))
    assert trajectories_of([calls[0], spoken], Ending((1.0, 0.0)), "p")[0].turns[0].action.text == "one"
    with pytest.raises(Conflict, match="call 1 has 2 samples, and it is not known"):
        trajectories_of([calls[0], call(2, ["x"], "one or two")], Ending((1.0,)), "p")


@pytest.mark.slow
def test_a_restart_in_mid_episode_loses_nothing(controller_dir: Path, tmp_path: Path) -> None:
    """Oracle: the same calls without a kill. The command is killed with SIGKILL between two calls of an episode."""
    settings = config(controller_dir)
    (tmp_path / "gateway.toml").write_text(to_toml(settings))

    def start() -> tuple["subprocess.Popen[str]", str]:
        process = subprocess.Popen(
            command("gateway", "--config", "gateway.toml"), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    process, url = start()
    first = ask(f"{url}/chat/completions", chat("a"), X_Episode_Id="e")[1]
    process.kill()
    process.wait(300)
    process, url = start()
    assert ask(f"{url}/episodes/e")[1] == {"id": "e", "calls": 1, "policy": "untrained", "ended": False}
    second = ask(f"{url}/chat/completions", chat("b"), X_Episode_Id="e")[1]
    assert ask(f"{url}/episodes/e", {"reward": 0.5})[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0
    with serving(settings, tmp_path / "undisturbed") as url:
        for text, expected in (("a", first), ("b", second)):
            answer = ask(f"{url}/chat/completions", chat(text), X_Episode_Id="e")[1]
            assert answer["choices"] == expected["choices"] and answer["call"] == expected["call"]
        assert ask(f"{url}/episodes/e", {"reward": 0.5})[0] == 200
    whole, killed = (tmp_path / name / "trajectories.jsonl" for name in ("undisturbed", "runs/planner"))
    assert whole.read_bytes() == killed.read_bytes()


def test_episodes_run_side_by_side_while_a_policy_arrives(
    controller_dir: Path, adapter_dir: Path, folder: Path
) -> None:
    """Oracle: what each client got is what is recorded of its episode, in its order, and under one policy.

    A trained policy appears while draws of the first one run; each episode keeps the policy that it began with.
    """
    settings = replace(config(controller_dir), controller=ControllerConfig(str(controller_dir), threads=1, max_rows=8))
    told: dict[str, list[Any]] = {}

    def play(url: str, episode: str, calls: int = 2) -> None:
        for number in range(1, calls + 1):
            body = chat(f"{episode} {number}", temperature=1, n=2, max_tokens=40)
            answer = ask(f"{url}/chat/completions", body, X_Episode_Id=episode)[1]
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            told.setdefault(episode, []).append((answer["call"], answer["policy"], texts))

    with serving(settings, folder) as url:
        play(url, "first-0", 1)
        threads = [threading.Thread(target=play, args=(url, f"early-{i}")) for i in range(6)]
        for thread in threads:
            thread.start()
        shutil.copytree(adapter_dir, folder / "round-1" / ".tmp")
        (folder / "round-1" / ".tmp").rename(folder / "round-1" / "adapter")
        late = [threading.Thread(target=play, args=(url, f"late-{i}")) for i in range(4)]
        for thread in late:
            thread.start()
        for thread in (*threads, *late):
            thread.join(120)
        play(url, "first-0", 1)
        assert len(ask(f"{url}/episodes")[1]["data"]) == 11
    assert [policy for _, policy, _ in told["first-0"]] == ["untrained", "untrained"]
    assert all({policy for _, policy, _ in told[f"late-{i}"]} == {"round-1"} for i in range(4))
    assert all(len({policy for _, policy, _ in calls}) == 1 for calls in told.values())
    assert all([number for number, _, _ in calls] == [1, 2] for calls in told.values())
    calls = [from_json(Call, row["call"]) for row in read_jsonl(folder / "calls.jsonl")]
    assert {(c.episode, c.number): [s.text for s in c.samples] for c in calls} == {
        (episode, number): texts for episode, rows in told.items() for number, _, texts in rows
    }


def test_a_client_that_leaves_while_a_policy_is_loaded(
    controller_dir: Path, adapter_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the order of events: the loading that the lost client began ends before the next draw begins."""
    events: list[str] = []

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        load_adapter(*arguments)
        events.append("loaded")

    monkeypatch.setattr("matryoshka.pilot.gateway.load_adapter", slowly)
    shutil.copytree(adapter_dir, folder / "round-1" / "adapter")

    async def run() -> None:
        with open_gateway(config(controller_dir), folder) as (engine, _):
            sampling = Sampling(max_tokens=4)
            await engine.generate((1, 2, 3), sampling, "")
            lost = asyncio.create_task(engine.generate((1, 2, 3), sampling, "round-1"))
            await asyncio.sleep(0.1)
            lost.cancel()
            await engine.generate((1, 2, 3), sampling, "")
            events.append("drawn")
            await engine.generate((1, 2, 3), sampling, "round-1")

    asyncio.run(run())
    assert events == ["loaded", "drawn"]


def test_a_training_goes_on_with_its_pairs(
    controller_dir: Path, adapter_dir: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracles: the pairs file of the training that was interrupted, whatever ended since, and a first loss of ln 2,
    which only the right reference gives: the adapter that [controller] names. No new episode is an error.
    """
    settings = config(controller_dir)
    settings = replace(settings, controller=replace(settings.controller, adapter=str(adapter_dir)))
    with serving(settings, folder) as url:
        for episode in range(6):
            ask(f"{url}/chat/completions", chat(temperature=1), X_Episode_Id=f"e{episode}")
            ask(f"{url}/episodes/e{episode}", {"reward": episode % 2})
    with pytest.raises(FileNotFoundError, match="no gateway.toml; expected the folder of `matryoshka gateway`"):
        train_from(folder.parent)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("matryoshka.pilot.gateway_record.finetune", killed)
        train_from(folder)
    pairs = (folder / "round-1" / "pairs.jsonl").read_bytes()
    assert newest_stage(folder) == ""
    with serving(settings, folder) as url:
        ask(f"{url}/chat/completions", chat(temperature=1), X_Episode_Id="late")
        ask(f"{url}/episodes/late", {"reward": 1})
    assert train_from(folder)["starts_from"] == "untrained" and newest_stage(folder) == "round-1"
    assert (folder / "round-1" / "pairs.jsonl").read_bytes() == pairs
    names = {row.info.controller for row in read_rows(folder / "trajectories.jsonl").values()}
    assert names == {f"tiny+{adapter_hash(adapter_dir)}"}
    first, *_ = read_jsonl(folder / "round-1" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert train_from(folder)["starts_from"] == "round-1"  # "late" ended since
    with pytest.raises(ValueError, match="no episode has ended since round-2 was trained"):
        train_from(folder)
    other = open_gateway(replace(settings, seed=1), folder)
    with pytest.raises(ValueError, match="was started with another configuration: seed: 0 -> 1"), other:
        pass


def test_pairs_of_a_gateway_follow_its_own_rule(controller_dir: Path, folder: Path, tmp_path: Path) -> None:
    """Oracle: the pairs that `make_pairs` gives under the gateway's rule: of rewards .1, .3 and .9 with a margin of .5
    two couples have a gap above it, and one of them is kept; "binary" with its cap of four would keep both.
    """
    settings = config(controller_dir, rule="ranked", margin=0.5, pairs_per_problem=1, seed=3)
    claim(settings, folder)
    record = Record(folder)
    for number, reward in enumerate((0.1, 0.3, 0.9)):
        sample = Sample(f"plan {number}", token_ids=(number, 2), logprobs=(-1.0, -1.0))
        record.add(Call(f"e{number}", 1, "", "", (Message("user", "Go on."),), (1, 3), (sample,)))
        record.end(f"e{number}", Ending((reward,)), "tiny")
    record.close()
    read = read_episodes(folder)
    assert (read.rule, read.seed) == (PairRule("ranked", 1, 0.5), 3)
    assert cli.main(["pairs", "--in", str(folder), "--out", str(tmp_path / "pairs.jsonl")]) == 0
    (row,) = read_jsonl(tmp_path / "pairs.jsonl")
    assert row["chosen_reward"] == 0.9 and row["rejected_reward"] < 0.4


def test_a_gateway_may_take_the_remedy_of_an_error(controller_dir: Path, folder: Path) -> None:
    """Oracle: a larger micro_batch_tokens, which the packing of a long episode asks for, is taken; beta is not."""
    settings = config(controller_dir)
    claim(settings, folder)
    larger = replace(settings, train=replace(settings.train, micro_batch_tokens=30000))
    claim(larger, folder)
    with pytest.raises(ValueError, match=r"another configuration: objective\.beta"):
        claim(replace(larger, objective=replace(settings.objective, beta=0.7)), folder)


@pytest.mark.slow
def test_an_unmodified_agent_s_planner_is_trained(
    controller_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the game's own rewards, before and after training, of the agent in examples/, in a process of its own.

    The planner is first taught to say "left" or "right" at all, each as often.
    """
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": [{"role": "user", "content": f"Castle {castle}, door {door}. Left or right?"}], "completion": word}
        for castle in range(4) for door in (1, 2) for word in ("left", "right")
    ]  # fmt: skip
    write_jsonl(tmp_path / "words.jsonl", rows)
    taught = ["--train.learning-rate", "5e-3", "--train.epochs", "40", "--train.batch-size", "4", "--tune", "full"]
    assert cli.main(["sft", "--data", "words.jsonl", "--model", str(controller_dir), "--out", "taught", *taught]) == 0
    # The loss keeps an eye on the better answer's own probability: a model this small soon forgets how to spell it.
    objective = Preference(nll_coefficient=1.0)
    settings = config(tmp_path / "taught" / "model", rule="ranked", objective=objective, train=replace(TRAIN, epochs=4))
    agent = [sys.executable, str(ROOT / "examples" / "gateway_agent.py")]
    played = 0

    def play(url: str, games: int) -> float:
        nonlocal played
        arguments = [*agent, url, "planner", str(games), str(played)]
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        played += games
        return float(done.stdout)

    run = tmp_path / "runs" / "planner"
    with serving(settings, run) as url:
        before = play(url, 48)
        assert 0.3 < before < 0.7
        assert ask(f"{url}/chat/completions", chat(), X_Episode_Id="open")[0] == 200
        capsys.readouterr()
        assert cli.main(["train-from", "runs/planner"]) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert summary["stage"] == "round-1" and summary["pairs"] > 0 and newest_stage(run) == "round-1"
        after = play(url, 48)  # the same server, which goes on with the new policy
        assert after > before + 0.2
        # An episode goes on under the policy that it began with.
        assert ask(f"{url}/chat/completions", chat(), X_Episode_Id="open")[1]["policy"] == "untrained"
        assert cli.main(["train-from", "runs/planner"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["starts_from"] == "round-1"
        assert cli.main(["train-from", "runs/planner"]) == 2
        assert "no episode has ended since round-2 was trained" in capsys.readouterr().err
    names = [row.info.controller for row in read_rows(run / "trajectories.jsonl").values()]
    assert len(set(names)) == 2 and names.count(names[0]) == 48
