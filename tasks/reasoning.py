"""Takes the reasoning of a model out of its reply, so that a task reads the answer alone."""

import re

_TAGS = r"(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think)"
_OPEN = rf"(?:<\s*{_TAGS}\s*>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>)"
_CLOSE = rf"(?:<\s*/\s*{_TAGS}\s*>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>)"
_BLOCK = re.compile(rf"{_OPEN}(?:(?!{_OPEN}).)*?{_CLOSE}", re.DOTALL | re.IGNORECASE)
_BEFORE = re.compile(rf".*{_CLOSE}", re.DOTALL | re.IGNORECASE)
_AFTER = re.compile(rf"{_OPEN}.*", re.DOTALL | re.IGNORECASE)


def without_reasoning(reply: str) -> str:
    """Return `reply` without its reasoning blocks, nested ones included; a reply without any comes back as it is.

    Many servers put the opening tag into the prompt, so everything before a lone closing tag is reasoning. Where the
    token limit cut a block off, everything from its opening tag on is reasoning, and no answer follows.
    """
    text = reply
    while (shorter := _BLOCK.sub("", text)) != text:
        text = shorter
    text = _AFTER.sub("", _BEFORE.sub("", text))
    return reply if text == reply else text.strip()
