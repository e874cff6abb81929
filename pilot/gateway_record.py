"""The record of a gateway: every call of every episode, how episodes ended, and the next policy that is trained on it.

`calls.jsonl` has each call with what was drawn; `trajectories.jsonl` has each episode that ended, as a trajectory like
any other. Both are journals keyed by content that a kill leaves whole, so that an episode goes on after a restart. A
policy is named by its stage: "" is the model as [controller] has it, "round-1" the first that was trained on it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from matryoshka.core.config import check_least, diff, load_toml, to_toml
from matryoshka.core.files import Journal, folder_lock, write_json, write_jsonl, write_text
from matryoshka.core.json_input import Fields, read_json
from matryoshka.core.records import (
    EpisodeInfo,
    Messages,
    PairRule,
    Sample,
    Trajectory,
    Turn,
    content_key,
    from_json,
    to_json,
)
from matryoshka.core.training.train import FREE, TrainConfig
from matryoshka.dpo.objectives import Preference
from matryoshka.dpo.pairs import make_pairs
from matryoshka.lora.files import adapter_hash
from matryoshka.lora.linear import LoraConfig
from matryoshka.pilot.collected import MORE, read_rows, single_turns
from matryoshka.pilot.config import ControllerConfig, check_name
from matryoshka.pilot.finetune import DpoCommand, finetune
from matryoshka.pilot.folder import GATEWAY

CALLS, TRAJECTORIES = "calls.jsonl", "trajectories.jsonl"
FREE_TO_CHANGE = (
    *("host:", "port:", "api_key_env:", "allow_anonymous:", "controller.threads:", "controller.max_rows:"),
    *(f"train.{name}:" for name in (*FREE, "attention", "compile_blocks")),
)


@dataclass(frozen=True)
class GatewayConfig:
    """An OpenAI-compatible endpoint in front of a controller, which records episodes for its training."""

    name: str
    """The record's folder under `runs/`."""
    controller: ControllerConfig
    """The white-box model; it is sampled by our own engine, and an adapter of it is trained."""
    model: str = "planner"
    """Name under which callers ask for the model: MODEL:EPISODE, or MODEL with the header X-Episode-Id."""
    temperature: float | None = None
    """Temperature of every draw in place of the callers', so that an agent that decodes greedily explores, too."""
    seed: int = 0
    """Seed of the draws, which depend on the episode's id and the call's number besides."""
    rule: Literal["binary", "ranked"] = "binary"
    """Rule of the pairs: "binary" pairs rewards above and below 0.5, "ranked" any two whose gap exceeds the margin."""
    margin: float = 0.0
    """Smallest gap of rewards, for "ranked"."""
    pairs_per_problem: int = 4
    """Most pairs of one problem."""
    lora: LoraConfig = LoraConfig()
    """The adapter that is trained, where [controller] adapter names none."""
    objective: Preference = Preference()
    """The preference loss."""
    train: TrainConfig = TrainConfig()
    """How a policy is trained."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes any free one. The first line printed is the address."""
    api_key_env: str = ""
    """Environment variable with the key that callers must send; "" asks for none."""
    allow_anonymous: bool = False
    """Let other machines use the gateway without a key, where host is not loopback."""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_least(self, "gateway: ", port=0, pairs_per_problem=1, margin=0, temperature=0)
        if self.temperature is not None and self.temperature > 2:
            raise ValueError(f"gateway: temperature {self.temperature} is above 2, and every call would be refused")
        controller = self.controller
        if controller.engine != "local" or controller.tune != "adapter" or controller.scheme:
            raise ValueError("gateway: it samples with engine 'local', trains an adapter, and has no scheme of its own")
        if not self.model or ":" in self.model:
            raise ValueError(f"gateway: model {self.model!r} must be a name without a colon, which ends it in requests")


@dataclass(frozen=True)
class Call:
    """One call. number: of the episode, from 1. request: key of what was asked, by which a retry is known; once: the
    caller's idempotency key, "" for none.
    """

    episode: str
    number: int
    stage: str
    request: str
    prompt: Messages
    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]
    once: str = ""

    @property
    def key(self) -> str:
        return f"{self.episode}/{self.number}"


@dataclass(frozen=True)
class Ending:
    """The end of an episode. rewards: one, or one for each sample of the last call. problem: episodes of one are
    compared; "" is the first call's prompt. used: number of a call -> the sample that the agent went on with.
    """

    rewards: tuple[float, ...]
    note: str = ""
    problem: str = ""
    used: dict[str, int] | None = None


_KNOWN: dict[str, Any] = {}  # a row of which the key alone is needed


def _silent(call: Call) -> Call:
    """Return the call without what was said."""
    return replace(call, prompt=(), prompt_ids=(), samples=())


class Conflict(ValueError):
    """A request that the episode's state does not allow."""


class Record:
    """The journals of a gateway's folder. One process writes them; reading needs no lock.

    What was said is in memory for open episodes alone, so that a gateway may run for as long as its disk has room.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._calls, self._ended = Journal(folder / CALLS), Journal(folder / TRAJECTORIES)
        self._endings = {episode: from_json(Ending, row["ending"]) for episode, row in self._ended.rows.items()}
        self.calls: dict[str, list[Call]] = {}
        for row in self._calls.rows.values():
            call = from_json(Call, row["call"])
            self.calls.setdefault(call.episode, []).append(_silent(call) if call.episode in self._endings else call)
        for journal in (self._calls, self._ended):
            journal.rows.update(dict.fromkeys(journal.rows, _KNOWN))

    def close(self) -> None:
        self._calls.close()
        self._ended.close()

    def sync(self) -> None:
        """Return when the disk holds all that was added; it may run in another thread."""
        self._calls.sync()
        self._ended.sync()

    def add(self, call: Call) -> None:
        """Record a call. It is safe from a kill now, and from a power cut after `sync`."""
        self._calls.append(call.key, {"call": to_json(call)}, sync=False)
        self._calls.rows[call.key] = _KNOWN
        self.calls.setdefault(call.episode, []).append(call)

    def ending(self, episode: str) -> Ending | None:
        """Return how the episode ended, None if it is open or unknown."""
        return self._endings.get(episode)

    def open_episodes(self) -> list[str]:
        """Return the episodes that have not ended, in the order of their first calls."""
        return [episode for episode in self.calls if episode not in self._endings]

    def end(self, episode: str, ending: Ending, name: str) -> int:
        """Record the end of an episode, in one row with a trajectory for each reward, and return their number.

        name: the policy's. Raises Conflict where the sample that the agent used is not known.
        """
        first, *more = [to_json(found) for found in trajectories_of(self.calls[episode], ending, name)]
        row = {"trajectory": first, **({MORE: more} if more else {}), "ending": to_json(ending)}
        self._ended.append(episode, row, sync=False)
        self._ended.rows[episode] = _KNOWN
        self._endings[episode] = ending
        self.calls[episode] = [_silent(call) for call in self.calls[episode]]
        return 1 + len(more)


def trajectories_of(calls: Sequence[Call], ending: Ending, name: str) -> list[Trajectory]:
    """Return the trajectories of an episode that ended: one for each reward.

    Of a call with several samples the turn has the one that the agent used: the one that the ending names, or else the
    one that the next call's prompt has as the assistant's message, or the only one whose text is anywhere in what that
    prompt has gained. Raises Conflict where none of these says it.
    """
    calls = sorted(calls, key=lambda call: call.number)
    last, used = calls[-1], dict(ending.used or {})
    if unknown := sorted(used.keys() - {str(call.number) for call in calls}):
        raise Conflict(f"used: the episode has no call {unknown[0]!r}; it has {len(calls)}")
    turns = []
    for call, after in zip(calls, [*calls[1:], None], strict=True):
        if call is last and len(ending.rewards) > 1:
            break
        turns.append(_turn(call, _used(call, after, used)))
    if len(ending.rewards) > 1:
        if len(ending.rewards) != len(last.samples):
            what = f"{len(ending.rewards)} rewards for the last call, which has {len(last.samples)} samples"
            raise Conflict(f"rewards: {what}; give one reward, or one for each sample of it")
        ways = [(*turns, _turn(last, index)) for index in range(len(last.samples))]
    else:
        ways = [tuple(turns)]
    problem = ending.problem or content_key(calls[0].prompt)
    found = []
    for reward, way in zip(ending.rewards, ways, strict=True):
        usage = [turn.action.finish_reason == "length" for turn in way]
        verdict: Literal["right", "wrong"] = "right" if reward > 0.5 else "wrong"
        info = EpisodeInfo(verdict, "label_free", name, "agent", attempts=1, calls=len(way), cut=sum(usage))
        found.append(Trajectory("gateway", problem, way, reward, info))
    return found


def _used(call: Call, after: Call | None, used: Mapping[str, int]) -> int:
    if (index := used.get(str(call.number))) is not None:
        if not 0 <= index < len(call.samples):
            raise Conflict(f"used: call {call.number} has {len(call.samples)} samples, no sample {index}")
        return index
    if len(call.samples) == 1:
        return 0
    said = [message for message in after.prompt if message not in call.prompt] if after is not None else []
    texts = [sample.text.strip() for sample in call.samples]
    answers = [message.content.strip() for message in said if message.role == "assistant"]
    found = [i for i, text in enumerate(texts) if text in answers]
    found = found or [i for i, text in enumerate(texts) if text and any(text in message.content for message in said)]
    if len({texts[index] for index in found}) != 1:
        what = f"call {call.number} has {len(call.samples)} samples, and it is not known which one the agent used"
        raise Conflict(f'{what}; say it: "used": {{"{call.number}": INDEX}}')
    return found[0]


def _turn(call: Call, index: int) -> Turn:
    return Turn(call.prompt, call.prompt_ids, call.samples[index])


# Training.


def stage_folder(folder: Path, config: GatewayConfig, stage: str) -> Path | None:
    """Return the adapter folder of a stage, None for the base model."""
    if stage:
        return folder / stage / "adapter"
    return Path(config.controller.adapter) if config.controller.adapter else None


def policy_name(folder: Path, config: GatewayConfig, stage: str) -> str:
    """Return the name of a stage's policy, which changes with its weights."""
    base, adapter = Path(config.controller.path).name, stage_folder(folder, config, stage)
    return base if adapter is None else f"{base}+{adapter_hash(adapter)}"


def newest_stage(folder: Path) -> str:
    """Return the stage of the last policy that is trained, "" for none; adapter folders appear complete."""
    rounds = [path.parent.name for path in folder.glob("round-*/adapter") if path.parent.name[6:].isdigit()]
    return max(rounds, key=lambda name: int(name[6:]), default="")


def claim(config: GatewayConfig, folder: Path) -> None:
    """Write the configuration into the folder, or check that it is the one that is there.

    Raises ValueError naming every difference that may not be.
    """
    path = folder / GATEWAY
    if path.is_file():
        changes = [line for line in diff(load_toml(GatewayConfig, path), config) if not line.startswith(FREE_TO_CHANGE)]
        if changes:
            what = f"was started with another configuration: {'; '.join(changes)}"
            raise ValueError(f"{folder}: {what}. Take the old values to continue, or another name")
    write_text(path, to_toml(config))


def train_from(folder: Path) -> dict[str, Any]:
    """Train the next policy on all episodes that ended, starting from the last one, and return the summary.

    A training that was interrupted goes on with the pairs that it had begun with. Raises FileNotFoundError where no
    gateway has been; ValueError without a new episode or without pairs.
    """
    if not (folder / GATEWAY).is_file():
        raise FileNotFoundError(f"{folder}: no {GATEWAY}; expected the folder of `matryoshka gateway`")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("train-from: start it as one process; torchrun takes its pairs: pairs --in RUN, then dpo")
    config, before = load_toml(GatewayConfig, folder / GATEWAY), newest_stage(folder)
    stage = f"round-{int(before[6:] or 0) + 1}"
    out = folder / stage
    with folder_lock(out):
        if not (out / "pairs.jsonl").is_file():
            episodes = list(read_rows(folder / TRAJECTORIES).values())
            old = read_json(folder / before / "episodes.json", "its counts")["episodes"] if before else 0
            if len(episodes) == old:
                raise ValueError(f"{folder}: no episode has ended since {before} was trained; collect some first")
            rule = PairRule(config.rule, config.pairs_per_problem, config.margin)
            turns = [turn for episode in episodes for turn in single_turns(episode)]
            pairs, counts = make_pairs(turns, rule, config.seed)
            if not pairs:
                raise ValueError(f"{folder}: no pairs of {len(episodes)} episodes: {counts.why_none()}; collect more")
            write_json(out / "episodes.json", {"episodes": len(episodes), **counts.as_dict()})
            write_jsonl(out / "pairs.jsonl", [to_json(pair) for pair in pairs])
    summary = read_json(out / "episodes.json", "the counts of its pairs")
    controller = config.controller
    command = DpoCommand(
        data=out / "pairs.jsonl", model=controller.folder, out=out, adapter=stage_folder(folder, config, before),
        dtype=controller.dtype, quantization=controller.quantization, device=controller.device,
        threads=controller.threads, lora=config.lora, train=config.train, objective=config.objective,
    )  # fmt: skip
    trained = finetune(command) or {}
    return {"stage": stage, "starts_from": before or "untrained", **summary, **trained}


def read_ending(data: Mapping[str, Any]) -> Ending:
    """Return the ending that a request's body describes. Raises ValueError naming the field."""
    known = ("reward", "rewards", "note", "problem", "used")
    if unknown := sorted(set(data) - set(known)):
        raise ValueError(f"unknown field {unknown[0]!r:.80}; known: {', '.join(known)}")
    fields = Fields(data, "the end of an episode")
    if ("reward" in data) == ("rewards" in data):
        raise ValueError("give 'reward', or 'rewards' with one number for each sample of the last call")
    if "reward" in data:
        rewards: list[float] = [fields.number("reward")]
    else:
        listed = data["rewards"]
        if not isinstance(listed, list) or not listed:
            raise fields.error("rewards", "a list of numbers")
        rewards = [Fields({"rewards": item}, "rewards").number("rewards") for item in listed]
    used = data.get("used")
    if used is not None and not (isinstance(used, dict) and all(type(value) is int for value in used.values())):
        raise fields.error("used", "an object: number of a call -> index of the sample")
    return Ending(tuple(rewards), fields.text("note", ""), fields.text("problem", ""), used)
