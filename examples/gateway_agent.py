"""A small agent that asks a planner through the OpenAI API, and the game that it plays. It imports nothing of ours.

    matryoshka gateway --config FILE                        # prints ADDRESS
    python examples/gateway_agent.py ADDRESS planner 64     # 64 games, whose rewards go to the gateway
    matryoshka train-from runs/NAME                         # the next policy, which the gateway serves from then on

The agent walks through a castle, door by door, as the planner says; it does not know that the gold lies behind the
right ones. To train its planner, the agent itself needs no change: it gets another address and another model's name.
"""

import json
import sys
import urllib.request
from typing import Any

DOORS = 2


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send JSON and return the answer's."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        value: dict[str, Any] = json.load(answer)
        return value


def agent(address: str, model: str, castle: int) -> list[str]:
    """Return the doors that the agent takes: at each it asks the planner, and goes where the reply says first."""
    taken: list[str] = []
    for door in range(1, DOORS + 1):
        question = f"Castle {castle}, door {door}. Left or right?"
        request = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 8}
        reply = post(f"{address}/chat/completions", request)["choices"][0]["message"]["content"].lower()
        places = {word: reply.find(word) for word in ("left", "right") if word in reply}
        taken.append(min(places, key=lambda word: places[word]) if places else "nowhere")
    return taken


def main(address: str, model: str, games: int, first: int = 0) -> float:
    """Play `games` games, tell the gateway how each ended, and return the mean reward."""
    total = 0.0
    for game in range(first, first + games):
        taken = agent(address, f"{model}:game-{game}", castle=game % 4)
        reward = taken.count("right") / DOORS
        post(f"{address}/episodes/game-{game}", {"reward": reward, "note": ", ".join(taken)})
        total += reward
    return total / games


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(int, sys.argv[4:])))
