"""Takes the reasoning of a model out of its reply, so that a task reads the answer alone."""

import re

_TAGS = r"(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think|longcat_think)"
_OPEN = (
    rf"<\s*{_TAGS}\s*>|\[THINK\]|\u25c1think\u25b7|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel>thought|<unused94>"
    r"|<\|channel\|>(?:analysis|commentary)"
)
_CLOSE = (
    rf"<\s*/\s*{_TAGS}\s*>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>|<unused95>"
)
# The answer begins, whatever was opened before: gpt-oss, Cohere's models and Apriel.
_BEGIN = (
    r"(?:<\|start\|>assistant)?<\|channel\|>final(?:[^<]|<\|constrain\|>)*<\|message\|>|<\|START_RESPONSE\|>"
    r"|\[BEGIN FINAL RESPONSE\]"
)
_MARK = re.compile(f"(?P<open>{_OPEN})|(?P<begin>{_BEGIN})|{_CLOSE}", re.IGNORECASE)
_END = re.compile(r"(?<!\s)\s*(?:\[END FINAL RESPONSE\]\s*(?:<\|end\|>)?|<\|(?:end|return|END_RESPONSE)\|>)$")
# Marks around the answer behind a thought: models trained as R1 was, Hunyuan, ERNIE, Granite, GLM.
_AROUND = re.compile(
    r"^<(?:answer|response|\|begin_of_box\|)>\s*|(?<!\s)\s*<(?:/answer|/response|\|end_of_box\|)>$", re.IGNORECASE
)


def without_reasoning(reply: str) -> str:
    """Return `reply` without its reasoning blocks, nested ones included; a reply without any comes back as it is.

    Many servers put the opening tag into the prompt, so everything before a lone closing tag is reasoning. Where the
    token limit cut a block off, everything from its opening tag on is reasoning, and no answer follows. Behind a block
    the marks around the whole answer, such as <answer> and </answer>, are left out too.
    """
    kept: list[str] = []
    depth = end = 0
    for mark in _MARK.finditer(reply):
        kept += [reply[end : mark.start()]] if depth == 0 else []
        end = mark.end()
        if mark["open"]:
            depth += 1
        elif depth and not mark["begin"]:
            depth -= 1
        else:
            kept, depth = [], 0
    if end == 0:
        return reply
    kept += [reply[end:]] if depth == 0 else []
    return _AROUND.sub("", _END.sub("", "".join(kept).strip()))
