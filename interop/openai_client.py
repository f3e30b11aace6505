"""Asks `peft-cli serve` with OpenAI's own client: models, completions, chats, streams, log-probabilities, errors.

    python interop/openai_client.py target/release/peft-cli

What the server writes is compared with `peft-cli generate`. The base is the quickstart's; its adapter is trained for a few steps.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import typing

import openai
import pydantic

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "examples/quickstart/base"
PROMPT = "Once upon a time there was a brave dog named Rex."


class Story(pydantic.BaseModel):
    mood: typing.Literal["happy", "sad"]
    ages: typing.Annotated[list[typing.Annotated[int, pydantic.Field(ge=0, le=99)]], pydantic.Field(min_length=2, max_length=2)]


checks, failed = 0, []


def check(what, holds, detail=""):
    global checks
    checks += 1
    if not holds:
        failed.append(what)
        print(f"FAILED {what}: {detail}")


def equal(what, got, want):
    check(what, got == want, f"{got!r} is not {want!r}")


def error(what, kind, status, names, ask):
    try:
        got = ask()
    except kind as e:
        text = json.dumps(e.body)
        check(what, e.status_code == status and names in text, f"{e.status_code} {text}")
    else:
        check(what, False, f"no error, but {got}")


def run(program, *args):
    done = subprocess.run([program, *args], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"openai_client: {' '.join(map(str, args))}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    work = tempfile.TemporaryDirectory()
    adapter = pathlib.Path(work.name) / "style"
    run(program, "train", "examples/quickstart/lora.toml", "--output", adapter, "--set", "train.max_steps=8", "--json")
    generate = lambda *more: run(
        program, "generate", "--model", BASE, "--max-new-tokens", "24", "--json", "--prompt", PROMPT, *more
    )["text"]
    want = {"base": generate(), "style": generate("--adapter", adapter)}
    want_chat = generate("--chat", "--adapter", adapter)
    check("the adapter changes something", want["base"] != want["style"], want)

    server = subprocess.Popen(
        [program, "serve", "--model", BASE, "--name", "base", "--adapter", f"style={adapter}", "--port", "0",
         "--api-key", "sk-user", "--admin-key", "sk-admin", "--max-tokens", "256"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "RUST_LOG": "warn"},
    )  # fmt: skip
    for line in server.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            break
    else:
        sys.exit("openai_client: the server did not start")
    client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="sk-user", max_retries=0)

    equal("models", [m.id for m in client.models.list()], ["base", "style"])
    equal("a model", client.models.retrieve("style").id, "style")
    for name, text in want.items():
        ask = dict(model=name, prompt=PROMPT, max_tokens=24, temperature=0)
        answer = client.completions.create(**ask)
        equal(f"completion of {name}", answer.choices[0].text, text)
        check(f"usage of {name}", answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens)
        pieces = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
        equal(f"stream of {name}", "".join(p.choices[0].text for p in pieces if p.choices), text)
        equal(f"usage of the stream of {name}", pieces[-1].usage, answer.usage)

    messages = [{"role": "user", "content": PROMPT}]
    ask = dict(model="style", messages=messages, max_tokens=24, temperature=0)
    answer = client.chat.completions.create(**ask)
    equal("chat", answer.choices[0].message.content, want_chat)
    equal("role", answer.choices[0].message.role, "assistant")
    check("finish_reason", answer.choices[0].finish_reason in ("stop", "length"))
    pieces = list(client.chat.completions.create(stream=True, **ask))
    equal("chat stream", "".join(p.choices[0].delta.content or "" for p in pieces), want_chat)
    equal("end of the chat stream", pieces[-1].choices[0].finish_reason, answer.choices[0].finish_reason)

    several = client.chat.completions.create(
        model="base", messages=messages, n=3, seed=7, temperature=1.0, top_p=0.9, max_tokens=8, logprobs=True, top_logprobs=2
    )
    equal("choices", [c.index for c in several.choices], [0, 1, 2])
    token = several.choices[0].logprobs.content[0]
    check("log-probabilities", token.logprob <= 0 and len(token.top_logprobs) == 2, token)
    again = client.chat.completions.create(model="base", messages=messages, n=3, seed=7, temperature=1.0, top_p=0.9, max_tokens=8)
    equal("a seed", [c.message.content for c in again.choices], [c.message.content for c in several.choices])
    old = client.completions.create(model="base", prompt=["Once", "Twice"], max_tokens=3, logprobs=2)
    equal("prompts", len(old.choices), 2)
    check("old log-probabilities", len(old.choices[1].logprobs.token_logprobs) == old.usage.completion_tokens - len(
        old.choices[0].logprobs.token_logprobs), old)
    stopped = client.completions.create(model="base", prompt=PROMPT, max_tokens=24, temperature=0, stop=want["base"][5:8])
    equal("a stop string", stopped.choices[0].text, want["base"][: want["base"].index(want["base"][5:8])])
    extra = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=8, temperature=1.0, extra_body={"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.1}
    )
    check("further fields", extra.choices[0].text != "", extra)

    # A form as a class, which the client makes a schema of and parses the answer with.
    for name in want:
        parsed = client.chat.completions.parse(
            model=name, messages=messages, response_format=Story, max_tokens=200, temperature=0.0, seed=1
        )
        story = parsed.choices[0].message.parsed
        check(f"a form of {name}", isinstance(story, Story) and story.mood in ("happy", "sad") and len(story.ages) == 2, parsed)
    error("a form that is none", openai.BadRequestError, 400, "response_format", lambda: client.chat.completions.create(
        model="base", messages=messages,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}))

    # A stream that is left in the middle.
    with client.completions.create(model="base", prompt=PROMPT, max_tokens=200, stream=True) as stream:
        next(iter(stream))

    create = client.completions.create
    error("an unknown model", openai.NotFoundError, 404, "did you mean `style`", lambda: create(model="stile", prompt="a"))
    error("a wrong value", openai.BadRequestError, 400, "temperature", lambda: create(model="base", prompt="a", temperature=-1))
    error("a wrong type", openai.BadRequestError, 400, "max_tokens", lambda: create(model="base", prompt="a", max_tokens="many"))
    error("too many tokens", openai.BadRequestError, 400, "max_tokens", lambda: create(model="base", prompt="a", max_tokens=999))
    error("no message", openai.BadRequestError, 400, "messages", lambda: client.chat.completions.create(model="base", messages=[]))
    error("tools", openai.BadRequestError, 400, "tools", lambda: client.chat.completions.create(
        model="base", messages=messages, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]))
    error("a long body", openai.APIStatusError, 413, "body_too_large", lambda: create(model="base", prompt="x" * 3_000_000))
    stranger = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="sk-wrong", max_retries=0)
    error("a wrong key", openai.AuthenticationError, 401, "invalid_api_key", lambda: stranger.models.list())

    admin = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="sk-admin", max_retries=0)
    post = lambda who, body: who.post("/adapters", body=body, cast_to=object)
    error("a user who publishes", openai.AuthenticationError, 401, "admin", lambda: post(client, {"name": "x", "path": str(adapter)}))
    error("an adapter that is none", openai.BadRequestError, 400, "path", lambda: post(admin, {"name": "x", "path": str(BASE)}))
    post(admin, {"name": "second", "path": str(adapter)})
    equal("a published adapter", create(model="second", prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text, want["style"])
    admin.delete("/adapters/second", cast_to=object)
    error("an unloaded adapter", openai.NotFoundError, 404, "model_not_found", lambda: create(model="second", prompt="a"))

    server.send_signal(signal.SIGTERM)
    equal("the end", server.wait(timeout=60), 0)
    print(f"openai {openai.__version__}: {checks - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


main()
