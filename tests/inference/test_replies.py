"""How the client reads replies: one table each for replies with status 200, refused prompts and numbers.

Each row has the words of the server that sends it. The oracle of a row is written beside it.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.core.protocols import GeneratorError, RunStopped
from matryoshka.core.records import Message, Sample, Sampling, Usage
from matryoshka.inference.cache import ResponseCache
from matryoshka.inference.chat_api import AttemptError, Billed, most_tokens, parse_answer, refusal, server_seed
from matryoshka.inference.generators import OpenAIGenerator
from matryoshka.inference.http_client import Reply
from matryoshka.inference.spending import Budget
from matryoshka.tests.inference.endpoint import GREEDY, PROMPT, Endpoint, answer, failure, run

MOST = most_tokens(PROMPT, GREEDY)
SENT = ("model", "messages", "temperature", "top_p", "max_tokens", "stop", "seed")


def reply(message: Any = None, finish_reason: Any = "stop", **more: Any) -> dict[str, Any]:
    """Return a reply's JSON; `more` are fields beside the choices."""
    message = {"role": "assistant", "content": "4"} if message is None else message
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish_reason}], "usage": usage, **more}


def content(value: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": value, **more}


FILTERED = {"hate": {"filtered": False}, "error": {"code": "content_filter_error", "message": "down"}}
# Name -> (reply, the answer's text, or the blame of the failure and a part of its reason).
REPLIES: dict[str, tuple[Any, str | tuple[str, str]]] = {
    "a whole answer": (reply(), "4"),
    "an answer cut at max_tokens": (reply(content("4 beca"), "length"), "4 beca"),
    "finish_reason in capitals": (reply(finish_reason="STOP"), "4"),
    "TGI's eos_token": (reply(finish_reason="eos_token"), "4"),
    "a server that sends no finish_reason": ({"choices": [{"message": content("4")}]}, "4"),
    "an empty answer that ended by itself": (reply(content("")), ""),
    "error: null beside a good answer": (reply(error=None), "4"),
    "Azure's filter did not run, the answer is good": (reply(prompt_filter_results=[FILTERED]), "4"),
    "finish_reason error": (reply(content("def solution():\n    ret"), "error"), ("passing", "'error'")),
    "finish_reason null": (reply(finish_reason=None), ("passing", "None")),
    "DeepSeek's insufficient_system_resource": (
        reply(content("4 be"), "insufficient_system_resource"),
        ("passing", "insufficient_system_resource"),
    ),
    "vLLM's abort": (reply(content("4 be"), "abort"), ("passing", "abort")),
    "a finish_reason that is an object": (reply(finish_reason={"a": 1}), ("passing", "reports no whole answer")),
    "a tool call that nobody offered": (
        reply(content(None, tool_calls=[{"id": "x"}]), "tool_calls"),
        ("prompt", "tool"),
    ),
    "OpenRouter's error in a 200": (
        {"error": {"code": 502, "message": "Provider returned error"}},
        ("passing", "Provider"),
    ),
    "an error beside an answer": (reply(error={"message": "overloaded"}), ("passing", "overloaded")),
    "an error as a text": (reply(error="upstream timed out"), ("passing", "upstream")),
    "an error in the choice": (
        {"choices": [{"message": content("4"), "finish_reason": "stop", "error": {"message": "cut"}}]},
        ("passing", "cut"),
    ),
    "an error in the message": (reply(content("4", error={"message": "lost"})), ("passing", "lost")),
    "an error deep in the reply": (reply(meta=[{"steps": [{"error": {"message": "deep"}}]}]), ("passing", "deep")),
    "an error in a 200 about the prompt": (
        {"error": {"message": "This model's maximum context length is 10 tokens", "code": 400}},
        ("prompt", "context length"),
    ),
    "an error in a 200 about money": (
        {"error": {"message": "pay first", "code": "insufficient_quota"}},
        ("endpoint", "pay first"),
    ),
    "empty content cut at max_tokens": (reply(content(""), "length"), ("prompt", "thinking")),
    "white space cut at max_tokens": (reply(content("\n\n "), "length"), ("prompt", "thinking")),
    "no content, cut at max_tokens": (reply(content(None), "length"), ("prompt", "thinking")),
    "empty content, filtered": (reply(content(""), "content_filter"), ("prompt", "filter")),
    "partial content, filtered": (reply(content("First, mix"), "content_filter"), ("prompt", "filter")),
    "Gemini's SAFETY": (reply(content(None), "SAFETY"), ("prompt", "filter")),
    "a refusal": (reply(content(None, refusal="I cannot help.")), ("prompt", "refuses: I cannot help.")),
    "a refusal beside content": (reply(content("", refusal="No.")), ("prompt", "refuses: No.")),
    "content in parts": (reply(content([{"type": "text", "text": "4"}, {"type": "text", "text": "2"}])), "42"),
    "a thought and a text": (
        reply(
            content([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "4"}])
        ),
        "4",
    ),
    "a refusal among the parts": (reply(content([{"type": "refusal", "refusal": "Never."}])), ("prompt", "Never.")),
    "a thought alone": (reply(content([{"type": "thinking", "thinking": "hm"}]), "length"), ("prompt", "thinking")),
    "an image beside a text": (reply(content([{"type": "image_url"}, {"type": "text", "text": "4"}])), "4"),
    "an image alone": (reply(content([{"type": "image_url", "image_url": {}}])), ("prompt", "no text among its parts")),
    "a part that is a text": (reply(content(["4"])), ("passing", "no choice")),
    "content that is a number": (reply(content(4)), ("passing", "no choice")),
    "no content": (reply(content(None)), ("passing", "no content")),
    "no choices": ({"choices": []}, ("passing", "no choice")),
    "choices that are an object": ({"choices": {"0": 1}}, ("passing", "no choice")),
    "a choice without a message": ({"choices": [{"text": "4"}]}, ("passing", "no choice")),
    "a list": ([1, 2], ("passing", "no choice")),
    "a number": (7, ("passing", "no choice")),
    "half a surrogate pair": (reply(content("a\ud83db")), "a\ufffdb"),
    "one-api's empty error beside a good answer": (
        reply(error={"message": "", "type": "", "param": "", "code": None}), "4",
    ),
    "error: false beside a good answer": (reply(error=False), "4"),
    "an error that is a number": (reply(error=1301), ("passing", "reports an error: 1301")),
    "Gemini's BLOCKLIST": (reply(content(None), "BLOCKLIST"), ("prompt", "filter")),
    "Gemini's SPII": (reply(content(None), "SPII"), ("prompt", "filter")),
    "Gemini's filter with its reason": (reply(content(None), "content_filter: RECITATION"), ("prompt", "filter")),
    "Gemini's MALFORMED_FUNCTION_CALL": (reply(content(None), "MALFORMED_FUNCTION_CALL"), ("prompt", "tool")),
    "Anthropic's refusal": (reply(content(None), "refusal"), ("prompt", "filter")),
    "Anthropic's whole context": (reply(content("4 be"), "model_context_window_exceeded"), "4 be"),
    "Bedrock's guardrail": (reply(content("Sorry"), "guardrail_intervened"), ("prompt", "filter")),
    "Cohere's ERROR_TOXIC": (reply(content("4 be"), "ERROR_TOXIC"), ("prompt", "filter")),
    "a tool call that ended with stop": (reply(content(None, tool_calls=[{"id": "x"}])), ("prompt", "tool")),
    "vLLM: a thought that never ended": (reply(content(None, reasoning="So 4.")), ("prompt", "a thought alone")),
    "no parser: a block that was cut": (reply(content("<think>\nSo 4"), "length"), ("prompt", "raise max_tokens")),
    "no parser: a block and no more": (reply(content("<think>4</think>\n")), ("prompt", "a thought alone")),
    "vLLM: the parser took the answer": (reply(content("", reasoning_content="4")), ("prompt", "a thought alone")),
    "a thought beside an answer": (reply(content("4", reasoning_content="2 + 2", reasoning="2 + 2")), "4"),
    "OpenRouter: an encrypted thought alone": (
        reply(content("", reasoning_details=[{"type": "reasoning.encrypted", "data": "x"}])),
        ("prompt", "a thought alone"),
    ),
    "Qianfan's normal": (reply(finish_reason="normal"), "4"),
    "AI21's endoftext": (reply(finish_reason="endoftext"), "4"),
    "Aleph Alpha's maximum_tokens": (reply(content("4 be"), "maximum_tokens"), "4 be"),
    "vLLM's repetition": (reply(content("4 4 4"), "repetition"), "4 4 4"),
    "an empty finish_reason": (reply(finish_reason=""), ("passing", "reports no whole answer")),
    "DashScope's null, as a text": (reply(finish_reason="null"), ("passing", "'null'")),
    "watsonx's time_limit": (reply(content("4 be"), "time_limit"), ("passing", "time_limit")),
    "Z.AI's network_error": (reply(content("4 be"), "network_error"), ("passing", "network_error")),
    "Z.AI's sensitive": (reply(content(""), "sensitive"), ("prompt", "filter")),
    "a part as the Responses API has it": (reply(content([{"type": "output_text", "text": "4"}])), "4"),
    "Bedrock's part without a type": (reply(content([{"reasoningContent": {}}, {"text": "4"}])), "4"),
    "Mistral's references": (reply(content([{"type": "text", "text": "4"}, {"type": "reference", "ids": [1]}])), "4"),
    "MiniMax: a good answer": (reply(base_resp={"status_code": 0, "status_msg": ""}), "4"),
    "MiniMax: the input is sensitive": (
        {"choices": None, "base_resp": {"status_code": 1026, "status_msg": "input new_sensitive"}},
        ("prompt", "new_sensitive"),
    ),
    "MiniMax: the output is sensitive, beside an empty answer": (
        reply(content(""), base_resp={"status_code": 1027, "status_msg": "output new_sensitive"}),
        ("prompt", "new_sensitive"),
    ),
    "MiniMax: no money": (
        {"choices": None, "base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}},
        ("endpoint", "insufficient balance"),
    ),
    "Baidu: too long, with status 200": (
        {"error_code": 336103, "error_msg": "the max length of current question is 2000"}, ("prompt", "2000"),
    ),
    "Baidu: too many requests, with status 200": (
        {"error_code": 18, "error_msg": "Open api qps request limit reached"}, ("passing", "qps"),
    ),
    "Spark: audited, with status 200": ({"code": 10013, "message": "输入内容审核不通过"}, ("prompt", "审核")),
    "FastChat: too long, with status 200": (
        {"object": "error", "message": "This model's maximum context length is 10 tokens", "code": 40303},
        ("prompt", "maximum context"),
    ),
    "Cloudflare: errors beside no result": (
        {"result": None, "success": False, "errors": [{"message": "exceeded this model context window limit (8192)"}]},
        ("prompt", "context window"),
    ),
    "errors beside an answer": (reply(errors=[{"message": "upstream timed out"}]), ("passing", "timed out")),
    "an empty list of errors": (reply(errors=[]), "4"),
    "LM Studio: a wrong path, with status 200": (
        {"error": "Unexpected endpoint or method. (POST /chat/completions)"}, ("passing", "Unexpected endpoint"),
    ),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies(name: str) -> None:
    """Oracle: the text, or whose fault it is and the words of the reason, beside each reply."""
    body, expected = REPLIES[name]
    if isinstance(expected, str):
        found = parse_answer(json.dumps(body).encode())
        assert found.sample.text == expected and found.sample.finish_reason in ("stop", "length")
        return
    with pytest.raises(AttemptError) as caught:
        parse_answer(json.dumps(body).encode())
    blame, words = expected
    assert caught.value.blame == blame and words in caught.value.reason


@pytest.mark.parametrize(
    "name", ["finish_reason error", "an error beside an answer", "an error in the message", "vLLM's abort"]
)
def test_a_200_that_reports_a_failure_is_asked_again_and_never_kept(name: str, tmp_path: Path) -> None:
    """Oracle: the endpoint's count and the cache: two requests, and the one answer that is kept is the second one."""
    endpoint, cache = Endpoint((200, json.dumps(REPLIES[name][0]))), ResponseCache(tmp_path / "c")

    async def scene(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "four"

    run(endpoint, scene, cache)
    assert len(endpoint.seen) == 2 and [sample.text for *_, sample in cache.rows()] == ["four"]


def test_a_reply_in_parts_is_asked_for_once() -> None:
    """Oracle: the endpoint's count: parts are an answer, billed once."""
    endpoint = Endpoint((200, answer([{"type": "text", "text": "4"}])))

    async def scene(generator: OpenAIGenerator) -> None:
        assert await generator.complete(PROMPT, GREEDY) == Sample("4", usage=Usage(7, 2))

    run(endpoint, scene)
    assert len(endpoint.seen) == 1


# Name -> (status, body, blame). The words are those of public bug reports and of the providers' pages.
REFUSALS: dict[str, tuple[int, Any, str]] = {
    "DeepSeek: moderation": (
        400,
        {"error": {"message": "Content Exists Risk", "code": "invalid_request_error"}},
        "prompt",
    ),
    "TGI: too long": (
        422,
        {
            "error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 tokens "
            "and 256 `max_new_tokens`",
            "error_type": "validation",
        },
        "prompt",
    ),  # fmt: skip
    "TGI: inputs alone": (422, {"error": "`inputs` must have less than 4096 tokens. Given: 5000"}, "prompt"),
    "OpenAI: too long": (400, failure("x", "context_length_exceeded"), "prompt"),
    "OpenAI: a string too long": (400, failure("Invalid 'messages[0].content': string too long."), "prompt"),
    "OpenAI: usage policy": (400, failure("Invalid prompt: your prompt was flagged", "invalid_prompt"), "prompt"),
    "OpenAI: param messages": (400, {"error": {"message": "bad value", "param": "messages.[0].content"}}, "prompt"),
    "Azure: filtered": (400, failure("The response was filtered", "content_filter"), "prompt"),
    "vLLM: too long": (
        400,
        {
            "message": "This model's maximum context length is 4096 tokens. However, you requested 5000 (4744 in the "
            "messages, 256 in the completion). Please reduce the length of the messages or completion.",
            "code": 400,
        },
        "prompt",
    ),  # fmt: skip
    "vLLM: too long, names max_tokens": (
        400,
        {
            "error": {
                "message": "'max_tokens' or 'max_completion_tokens' is too large: 256. This model's maximum context "
                "length is 2048 tokens and your request has 1900 input tokens (256 > 2048 - 1900)."
            }
        },
        "prompt",
    ),  # fmt: skip
    "llama.cpp: too long": (
        400,
        {
            "error": {
                "code": 400,
                "message": "the request exceeds the available context size",
                "type": "exceed_context_size_error",
            }
        },
        "prompt",
    ),  # fmt: skip
    "Anthropic: too long": (400, failure("prompt is too long: 210000 tokens > 200000 maximum"), "prompt"),
    "Anthropic: with max_tokens": (
        400,
        failure("input length and `max_tokens` exceed context limit: 9 + 2 > 10"),
        "prompt",
    ),
    "Anthropic: output filtered": (400, failure("Output blocked by content filtering policy"), "prompt"),
    "Anthropic: an empty text": (400, failure("messages: text content blocks must be non-empty"), "prompt"),
    "Gemini: too long": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": "The input token count (40000) exceeds the maximum number of tokens allowed",
                }
            }
        ],
        "prompt",
    ),
    "Qwen: inspection": (
        400,
        failure("Input data may contain inappropriate content.", "data_inspection_failed"),
        "prompt",
    ),
    "Qwen: length": (400, failure("Range of input length should be [1, 30720]", "invalid_parameter_error"), "prompt"),
    "Zhipu: in Chinese": (400, failure("系统检测到输入或生成内容可能包含不安全或敏感内容", "1301"), "prompt"),
    "Moonshot: high risk": (400, failure("The request was rejected because it was considered high risk"), "prompt"),
    "Mistral: too large": (
        400,
        failure("Prompt contains 40000 tokens and 0 draft tokens, too large for model"),
        "prompt",
    ),
    "SGLang: longer": (
        400,
        failure("The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        "prompt",
    ),
    "Cohere: too many": (
        400,
        {"message": "too many tokens: total number of tokens in the prompt cannot exceed 4081"},
        "prompt",
    ),
    "xAI: prompt length": (400, {"error": "This model's maximum prompt length is 131072"}, "prompt"),
    "OpenRouter: moderation with 403": (
        403,
        failure("Your input was flagged by the moderation of the model"),
        "prompt",
    ),
    "OpenRouter: the provider's words": (
        400,
        {
            "error": {
                "message": "Provider returned error",
                "code": 400,
                "metadata": {"raw": '{"error": "maximum context length is 10 tokens"}'},
            }
        },
        "prompt",
    ),  # fmt: skip
    "FastAPI: about a message": (422, {"detail": [{"loc": ["body", "messages", 0], "msg": "Bad message"}]}, "prompt"),
    "a proxy: 413": (413, "<html>413 Request Entity Too Large</html>", "prompt"),
    "OpenAI: unsupported parameter": (
        400,
        failure("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."),
        "request",
    ),
    "OpenAI: unsupported value": (
        400,
        {"error": {"message": "'temperature' does not support 0.7 here.", "param": "temperature"}},
        "request",
    ),
    "OpenAI: max_tokens too large": (
        400,
        failure("max_tokens is too large: 20000. This model supports at most 16384 completion tokens"),
        "request",
    ),
    "a server: seed out of range": (400, failure("seed must be at most 2147483647"), "request"),
    "FastAPI: an extra field, repeating the prompt": (
        422,
        {
            "detail": [
                {
                    "type": "extra_forbidden",
                    "loc": ["body", "seed"],
                    "msg": "Extra inputs are not permitted",
                    "input": "unsafe content, flagged",
                }
            ]
        },
        "request",
    ),  # fmt: skip
    "OpenAI: wrong key": (401, failure("Incorrect API key provided", "invalid_api_key"), "endpoint"),
    "Gemini: wrong key with 400": (400, failure("API key not valid. Please pass a valid API key."), "endpoint"),
    "DeepSeek: no money": (402, failure("Insufficient Balance"), "endpoint"),
    "Anthropic: no money with 400": (400, failure("Your credit balance is too low"), "endpoint"),
    "OpenAI: no such model": (404, failure("The model `x` does not exist", "model_not_found"), "endpoint"),
    "a server: no such model with 400": (400, failure("model 'x' not found"), "endpoint"),
    "Gemini: region": (400, failure("User location is not supported for the API use."), "endpoint"),
    "a wrong path": (405, "Method Not Allowed", "endpoint"),
    "not allowed, and nothing more": (403, failure("You may not use this."), "unclear"),
    "AWS's gateway: forbidden": (403, {"message": "Forbidden"}, "unclear"),
    "OpenAI: the project's models": (
        403, failure("Project `proj_x` does not have access to model `gpt-9`", "model_not_found"), "endpoint",
    ),
    "OpenAI: a country": (
        403, failure("Country, region, or territory not supported", "unsupported_country_region_territory"), "endpoint",
    ),
    "Gemini: the key's service": (
        403,
        [{"error": {"code": 403, "message": "The API has not been used", "status": "PERMISSION_DENIED"}}],
        "endpoint",
    ),
    "Anthropic: permission": (
        403, {"type": "error", "error": {"type": "permission_error", "message": "Not allowed."}}, "endpoint",
    ),
    "Gemini: nothing but its code": (
        400,
        [{"error": {"code": 400, "message": "Request contains an invalid argument.", "status": "INVALID_ARGUMENT"}}],
        "unclear",
    ),
    "Gemini: no content, with the same code": (
        400,
        {
            "error": {
                "code": 400,
                "message": "* GenerateContentRequest.contents: contents is not specified",
                "status": "INVALID_ARGUMENT",
            }
        },
        "prompt",
    ),  # fmt: skip
    "Gemini: an unknown field, with the same code": (
        400,
        {
            "error": {
                "code": 400,
                "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.',
                "status": "INVALID_ARGUMENT",
            }
        },
        "request",
    ),  # fmt: skip
    "DashScope: an empty text": (
        400,
        failure("<400> InternalError.Algo.InvalidParameter: The content field is required", "invalid_parameter_error"),
        "prompt",
    ),
    "DashScope: streams alone": (
        400,
        failure("This model only support stream mode, please enable the stream parameter", "invalid_parameter_error"),
        "request",
    ),
    "MiniMax: invalid params": (400, failure("invalid params, context window exceeds limit (2013)"), "prompt"),
    "Moonshot: exceeded": (400, failure("Invalid request: Your request exceeded model token limit: 8192"), "prompt"),
    "MiMo: in Chinese": (
        400, {"error": {"type": "context_window_exceeded", "code": 400, "message": "请求超出模型上下文限制"}}, "prompt",
    ),
    "Tencent: in Chinese": (400, failure("请求内容触发风控"), "prompt"),
    "Groq: the model called a tool": (
        400, failure("Tool choice is none, but model called a tool", "tool_use_failed"), "prompt",
    ),
    "Groq: its answer cannot be parsed": (
        400,
        failure("Parsing failed. The model generated output that could not be parsed.", "output_parse_failed"),
        "prompt",
    ),
    "Groq: no such model": (400, failure("The model `llama-3.1` has been decommissioned and is no longer supported"),
                            "endpoint"),
    "a model that gave up": (400, failure("The model was unable to finish"), "unclear"),
    "a model with a point in its name": (400, failure("model gpt-3.5-turbo does not exist"), "endpoint"),
    "memory that cannot be allocated": (400, failure("CUDA error: allocation failed"), "unclear"),
    "LiteLLM: ContextWindowExceededError": (
        400, failure("litellm.BadRequestError: ContextWindowExceededError: OpenAIException - 9000 > 8192"), "prompt",
    ),
    "LiteLLM: no such model": (
        400,
        failure("/chat/completions: Invalid model name passed in model=x. Call `/v1/models` to view available models"),
        "endpoint",
    ),
    "LiteLLM: a guardrail": (400, {"error": {"message": {"error": "Violated guardrail policy"}}}, "prompt"),
    "a gateway: blocked": (400, failure("Your request was blocked."), "prompt"),
    "NestJS: the words beside the error": (
        400, {"statusCode": 400, "message": "prompt is too long", "error": "Bad Request"}, "prompt",
    ),
    "NestJS: several messages": (
        400,
        {"statusCode": 400, "message": ["temperature must not be greater than 2"], "error": "Bad Request"},
        "request",
    ),
    "Mistral: FastAPI's rows in the message": (
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "seed"],
                        "msg": "Extra inputs are not permitted",
                        "input": "content that is too long",
                    }
                ]
            },
            "type": "invalid_request_error",
        },
        "request",
    ),  # fmt: skip
    "vLLM: the whole request in the message": (
        400,
        failure(
            "[{'type': 'value_error', 'loc': ('body',), 'msg': 'Value error, top_p must be in (0, 1]', 'input': "
            "{'messages': [{'content': 'a text that is too long and harmful'}]}}]"
        ),
        "request",
    ),
    "Cloudflare Workers AI": (
        400,
        {"success": False, "errors": [{"code": 5021, "message": "exceeded this model context window limit (8192)"}]},
        "prompt",
    ),
    "a firewall with 403": (
        403,
        "<!DOCTYPE html><title>Attention Required! | Cloudflare</title><h1>Sorry, you have been blocked</h1>",
        "unclear",
    ),
    "a firewall with 406": (406, "<html><h1>Not Acceptable!</h1>generated by Mod_Security</html>", "unclear"),
    "a firewall that speaks of permission": (
        403, "<HTML><TITLE>Access Denied</TITLE>You don't have permission to access this server", "unclear",
    ),
    "for legal reasons": (451, failure("Unavailable For Legal Reasons"), "unclear"),
    "a proxy that wants a password": (407, "<html>Proxy Authentication Required</html>", "endpoint"),
    "TGI: a worker failed": (
        424,
        {"error": "Request failed during generation: Server error: CUDA out of memory", "error_type": "generation"},
        "passing",
    ),
    "Groq: no capacity": (498, failure("Flex tier capacity exceeded"), "passing"),
    "Google: cancelled on the way": (499, failure("The operation was cancelled."), "passing"),
    "Baidu: error_msg": (400, {"error_code": 336003, "error_msg": "the max input characters is 4800"}, "prompt"),
    "Azure: the configured limit": (
        400, failure("Input tokens exceed the configured limit of 272000 tokens."), "prompt",
    ),
    "Perplexity: too long": (400, failure("The total length of all messages is too long."), "prompt"),
    "Bedrock: a blank text": (400, {"message": "The text field in the ContentBlock at messages.0 is blank."}, "prompt"),
    "Vertex: an empty text": (
        400, failure("Unable to submit request because it must have a text parameter. Add a text parameter"), "prompt",
    ),
    "Cohere: an empty text": (
        400, {"message": "message must be at least 1 token long or tool results must be specified."}, "prompt",
    ),
    "Mistral: the order of roles": (
        400,
        failure("Expected last role User or Tool for serving but got assistant", "invalid_request_message_order"),
        "prompt",
    ),
    "GigaChat: the order of roles": (422, failure("Invalid params: system message must be the first"), "prompt"),
    "vLLM: what is left of the context": (400, failure("max_tokens must be at least 1, got -186."), "prompt"),
    "vLLM: max_tokens of zero": (400, failure("max_tokens must be at least 1, got 0."), "request"),
    "SiliconFlow: too long": (
        400,
        {"code": 20015, "message": "length of prompt_tokens (33000) must be less than max_seq_len (32768)."},
        "prompt",
    ),
    "Snowflake: too long": (400, {"message": "max tokens of 8192 exceeded"}, "prompt"),
    "Zhipu: too long": (400, failure("Prompt超长", "1261"), "prompt"),
    "Spark: too long": (400, failure("token数量超过上限", "10907"), "prompt"),
    "half a surrogate pair": (400, failure("'utf-8' codec can't encode '\\ud83d': surrogates not allowed"), "prompt"),
    "OpenAI: more than a minute's tokens": (
        429, failure("Request too large for gpt-4o on tokens per min (TPM): Limit 30000, Requested 45000."), "prompt",
    ),
    "OpenAI: too many requests": (
        429, failure("Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000."), "passing",
    ),
    "Gemini: too many requests": (429, failure("You exceeded your current quota, check your plan"), "passing"),
    "Zhipu: too many requests": (429, failure("该模型当前访问量过大，请您稍后再试", "1305"), "passing"),
    "Zhipu: no money": (429, failure("您的账户已欠费，请充值后重试。", "1113"), "endpoint"),
    "Moonshot: no money": (
        429, {"error": {"type": "exceeded_current_quota_error", "message": "Your account is suspended"}}, "endpoint",
    ),
    "xAI: no money": (429, {"code": "exhausted", "error": "Your team has used all available credits"}, "endpoint"),
    "DashScope: the free tier": (403, failure("The free tier of the model has been exhausted."), "endpoint"),
    "Zhipu: no such model": (400, failure("模型不存在，请检查模型代码。", "1211"), "endpoint"),
    "OpenRouter: no such model": (400, failure("gpt-9 is not a valid model ID"), "endpoint"),
    "LM Studio: no model": (400, {"error": "No models loaded. Please load a model in the developer page"}, "endpoint"),
    "Bedrock: not on demand": (
        400, {"message": "Invocation of model ID x with on-demand throughput isn\u2019t supported."}, "endpoint",
    ),
    "Cloudflare's gateway: a guardrail": (
        424, {"success": False, "error": [{"code": 2016, "message": "Prompt blocked due to security"}]}, "prompt",
    ),
    "Portkey: a guardrail": (446, failure("The guardrail checks defined in the config failed."), "prompt"),
    "xAI: safety": (403, {"error": "Content violates usage guidelines. Failed check: SAFETY_CHECK"}, "prompt"),
    "vLLM: no system role": (400, failure("System role not supported"), "request"),
    "nothing at all": (400, "", "unclear"),
    "Bad Request": (400, "Bad Request", "unclear"),
    "a proxy's page": (400, "<html><meta content='text/html'><h1>400</h1>nginx</html>", "unclear"),
    "only a type": (422, {"error": {"message": "", "type": "invalid_request_error"}}, "unclear"),
    "in another language": (400, failure("Solicitud incorrecta"), "unclear"),
    "overloaded": (529, failure("Overloaded"), "passing"),
    "too early": (425, "", "passing"),
    "a 204": (204, "", "passing"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_prompts_refused(name: str) -> None:
    """Oracle: the provider's meaning: the prompt, a parameter, the endpoint, a passing trouble, or nothing clear."""
    status, body, blame = REFUSALS[name]
    text = body if isinstance(body, str) else json.dumps(body)
    assert refusal(Reply(status, {}, text.encode()), SENT).blame == blame


def numbered(number: int) -> tuple[Message, ...]:
    return (Message("user", f"question {number}"),)


@pytest.mark.parametrize("name", [name for name, (*_, blame) in REFUSALS.items() if blame == "prompt"])
def test_a_refusal_of_the_prompt_fails_its_episode_and_never_the_run(name: str) -> None:
    """Oracle: five different prompts in a row meet it, each once and as a GeneratorError; the sixth is answered."""
    status, body, _ = REFUSALS[name]
    endpoint = Endpoint(*[(status, body if isinstance(body, str) else json.dumps(body))] * 5)

    async def scene(generator: OpenAIGenerator) -> None:
        for number in range(5):
            with pytest.raises(GeneratorError, match="the prompt is refused"):
                await generator.complete(numbered(number), GREEDY)
        assert (await generator.complete(numbered(5), GREEDY)).text == "four"

    run(endpoint, scene)
    assert len(endpoint.seen) == 6


def test_an_unclear_refusal_stops_the_run_only_when_several_prompts_meet_it() -> None:
    """Oracle: by hand. One prompt five times, and two prompts with an answer in between, fail their episodes; the third
    different prompt in a row stops the run with an error that says so.
    """
    unclear = (400, "Bad Request")
    endpoint = Endpoint(*[unclear] * 7, (200, answer()), *[unclear] * 3)

    async def scene(generator: OpenAIGenerator) -> None:
        for number in (0, 0, 0, 0, 0, 0, 1):
            with pytest.raises(GeneratorError, match="the prompt is refused: 400 Bad Request"):
                await generator.complete(numbered(number), GREEDY)
        assert (await generator.complete(numbered(2), GREEDY)).text == "four"
        for number in (3, 4):
            with pytest.raises(GeneratorError):
                await generator.complete(numbered(number), GREEDY)
        with pytest.raises(ValueError, match="3 different prompts in a row without a clear reason.*400 Bad Request"):
            await generator.complete(numbered(5), GREEDY)

    run(endpoint, scene)
    assert len(endpoint.seen) == 11


MANY_DIGITS = "9" * 5000
# Name -> (the JSON text of usage, what is counted; whether that is exact or up to the request's bound).
NUMBERS: dict[str, tuple[str, Usage, bool]] = {
    "as OpenAI sends it": ('{"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}', Usage(7, 2), True),
    "thinking billed beside the answer, in the total": (
        '{"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 341}',
        Usage(32, 309),
        True,
    ),
    "thinking in the completion": (
        '{"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}}',
        Usage(3, 9),
        True,
    ),
    "thinking beside the completion, without a total": (
        '{"prompt_tokens": 3, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 300}}',
        Usage(3, 309),
        True,
    ),
    "thinking beside the other counts": (
        '{"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12, "reasoning_tokens": 300}',
        Usage(3, 309),
        True,
    ),
    "SGLang: thinking in the completion": (
        '{"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12, "reasoning_tokens": 5}', Usage(3, 9), True,
    ),
    "cached tokens in the prompt": (
        '{"prompt_tokens": 2006, "completion_tokens": 300, "prompt_tokens_details": {"cached_tokens": 1920}}',
        Usage(2006, 300),
        True,
    ),
    "LiteLLM: cached tokens, said twice, in the prompt": (
        '{"prompt_tokens": 98805, "completion_tokens": 5120, "prompt_tokens_details": {"cached_tokens": 66360, '
        '"cache_creation_tokens": 32435}, "cache_read_input_tokens": 66360, "cache_creation_input_tokens": 32435}',
        Usage(98805, 5120),
        True,
    ),
    "Anthropic: cached tokens beside the prompt": (
        '{"prompt_tokens": 3, "completion_tokens": 9, "total_tokens": 12, "cache_read_input_tokens": 2000, '
        '"cache_creation_input_tokens": 100, "prompt_tokens_details": {"cached_tokens": 2000}}',
        Usage(2103, 9),
        True,
    ),
    "spoken answers in the completion": (
        '{"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"audio_tokens": 5}}',
        Usage(7, 9),
        True,
    ),
    "Anthropic's names": ('{"input_tokens": 7, "output_tokens": 200}', Usage(7, 200), True),
    "Perplexity: pages that it read": (
        '{"prompt_tokens": 33, "completion_tokens": 7163, "total_tokens": 7196, "citation_tokens": 20016, '
        '"reasoning_tokens": 73904}',
        Usage(20049, 81067),
        True,
    ),
    "a total alone": ('{"total_tokens": 9}', Usage(0, 9), True),
    "a total below its parts": ('{"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 1}', Usage(7, 2), True),
    "whole numbers as floats": ('{"prompt_tokens": 7.0, "completion_tokens": 2.0}', Usage(7, 2), True),
    "no usage": ("null", Usage(), False),
    "usage without numbers": ("{}", Usage(), False),
    "no tokens read": ('{"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 2}', Usage(0, 2), False),
    "no tokens written": ('{"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}', Usage(7, 0), False),
    "the prompt and a total": ('{"prompt_tokens": 7, "total_tokens": 9}', Usage(7, 2), True),
    "zeros": ('{"prompt_tokens": 0, "completion_tokens": 0}', Usage(), False),
    "1e999": ('{"prompt_tokens": 1e999, "completion_tokens": 2}', Usage(0, 2), False),
    "-1e999": ('{"prompt_tokens": -1e999, "completion_tokens": 2}', Usage(0, 2), False),
    "10**30": ('{"prompt_tokens": 7, "completion_tokens": 1000000000000000000000000000000}', Usage(7, 0), False),
    "5,000 digits": (f'{{"prompt_tokens": 7, "completion_tokens": {MANY_DIGITS}}}', Usage(7, 0), False),
    "NaN": ('{"prompt_tokens": NaN, "completion_tokens": 2, "total_tokens": 9}', Usage(0, 9), False),
    "negative": ('{"prompt_tokens": -7, "completion_tokens": -2, "total_tokens": -9}', Usage(), False),
    "negative beside a total": (
        '{"prompt_tokens": 9, "completion_tokens": -2, "total_tokens": 400}',
        Usage(9, 391),
        False,
    ),
    "a fraction": ('{"prompt_tokens": 7.5, "completion_tokens": 2}', Usage(0, 2), False),
    "texts": ('{"prompt_tokens": "7", "completion_tokens": "2"}', Usage(), False),
    "true": ('{"prompt_tokens": true, "completion_tokens": 2}', Usage(0, 2), False),
    "a list": ("[7, 2]", Usage(), False),
    "details that are a text": (
        '{"prompt_tokens": 7, "completion_tokens": 2, "completion_tokens_details": "x"}',
        Usage(7, 2),
        True,
    ),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name: str, tmp_path: Path) -> None:
    """Oracle: by hand beside each usage; what is not exact counts as at least the request's bound. The answer is kept,
    with numbers that the file can hold.
    """
    usage, counted, is_exact = NUMBERS[name]
    body = f'{{"choices": [{{"message": {{"content": "4"}}, "finish_reason": "stop"}}], "usage": {usage}}}'
    assert parse_answer(body.encode()).billed == Billed(counted, is_exact)
    cache = ResponseCache(tmp_path / "c")

    async def scene(generator: OpenAIGenerator) -> None:
        assert (await generator.complete(PROMPT, GREEDY)).text == "4"
        spent = generator.account.spending().spent
        least = counted if is_exact else MOST
        assert spent.prompt_tokens >= max(counted.prompt_tokens, least.prompt_tokens)
        assert spent.completion_tokens >= max(counted.completion_tokens, least.completion_tokens)
        assert is_exact is (spent == counted)

    run(Endpoint((200, body)), scene, cache)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
        b'{"choices": ' + b"[" * 5000,
        b"\xff\xfe",
        b"[" + b"1," * 10**6 + b"1]",
    ],
    ids=["100,000 lists deep", "100,000 objects deep", "lists that never end", "not UTF-8", "a million numbers"],
)
def test_json_that_no_reader_can_hold_is_one_clear_error(body: bytes) -> None:
    """Oracle: an AttemptError of one line that says that the reply is no JSON."""
    with pytest.raises(AttemptError, match="^the reply is no JSON: [^\n]+$") as caught:
        parse_answer(body)
    assert len(str(caught.value)) < 500


def test_thinking_that_is_billed_apart_stays_within_the_budget(tmp_path: Path) -> None:
    """Oracle: the server's own bill. Each answer costs 341 tokens, far above its bound; 40 calls at once with 2,000
    tokens allowed are billed at most that, and what is counted is what was billed.
    """
    usage = {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 341}
    endpoint = Endpoint(*[(200, json.dumps(reply(usage=usage)))] * 99)

    async def scene(generator: OpenAIGenerator) -> None:
        calls = [generator.complete(PROMPT, Sampling(1.0, max_tokens=8, draw=draw)) for draw in range(40)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert any(isinstance(result, RunStopped) for result in results)
        spent = generator.account.spending().spent
        assert spent.prompt_tokens + spent.completion_tokens == 341 * len(endpoint.seen)

    run(endpoint, scene, ResponseCache(tmp_path / "c"), Budget(tokens=2000))
    assert 2 <= len(endpoint.seen) and 341 * len(endpoint.seen) <= 2000


def test_seeds_fit_32_bits_and_no_two_draws_share_one() -> None:
    """Oracle: the bounds of a signed 32-bit integer; 100 seeds of 63 bits and 100 small ones with 50 draws each are
    10,000 seeds; the same on every machine (a value that was computed once).
    """
    seeds = [*range(100), *(2**63 - 1 - 7 * i for i in range(100))]
    sent = {(seed, draw): server_seed(seed, draw) for seed in seeds for draw in range(50)}
    assert all(0 <= value < 2**31 for value in sent.values()) and len(set(sent.values())) == len(sent)
    assert all(sent[seed, draw + 1] != sent[seed + 1, draw] for seed in range(99) for draw in range(49))
    assert server_seed(0, 0) == 1956636586
