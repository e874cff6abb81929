"""Direct action: the generator thinks, acts and sees what came of it, one command a call (ReAct's scheme).

With a plan in its first message it is a second control scheme beside programs, without one a baseline.
Source: Yao et al., "ReAct: Synergizing Reasoning and Acting in Language Models", 2022 (arXiv 2210.03629).
"""

import re
from collections.abc import Awaitable, Callable

from matryoshka.core.records import Message, Messages
from matryoshka.tasks.alfworld.playthrough import Session
from matryoshka.tasks.episode import Reply

# "Act: look", "> look", "Action 2: look", and the same in bold or in a list.
_ACTION = re.compile(r"^[ \t*_#-]*(?:act(?:ion)?[ \t]*\d*[ \t*_]*:|>)[\s*_>]*(.+)$", re.IGNORECASE | re.MULTILINE)
REMINDER = "End your reply with a line that begins with 'Act: ' and a command."


def action_in(reply: str) -> str:
    """Return the first command of a reply, "" if there is none. Answers that the model imagines are ignored."""
    match = _ACTION.search(reply)
    return match[1].strip(" \t\r`'\"*_.") if match else ""


async def play(prompt: Messages, session: Session, complete: Callable[[Messages, int], Awaitable[Reply]]) -> None:
    """Act in `session` until the task is done or no action is left.

    complete(prompt, n): the n-th reply. A reply without a command spends an action, as thinking does in ReAct.
    """
    number = 0
    while session.steps_left > 0:
        reply = await complete(prompt, number)
        command = action_in(reply.text)
        observation = session.act(command)
        reply.outcome = f"> {command}\n{observation}"
        said = observation if command else f"{observation} {REMINDER}"
        # An empty reply would leave an assistant's turn without words, which some endpoints refuse.
        prompt = (*prompt, Message("assistant", reply.text.strip() or "Act:"), Message("user", said))
        number += 1
