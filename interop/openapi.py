"""Holds `peft-cli serve` against its own description with schemathesis: random requests, right and wrong ones.

    python interop/openapi.py target/release/peft-cli

Statuses, types and bodies of all answers have to be those of /openapi.json, and no answer a server error; what the description allows
has to be taken, and what it forbids refused. Publishing is left out: it opens files that only a person can name.
"""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "examples/quickstart/base"


def with_what_is_here(api):
    """The description of this very server: its model, and how much it writes at most."""
    here = {"enum": ["base", "nobody"]}
    for request in "CompletionRequest", "ChatRequest":
        fields = api["components"]["schemas"][request]["properties"]
        fields["model"] |= here
        for limit in "max_tokens", "max_completion_tokens":
            fields[limit] |= {"maximum": 16}
        fields["n"] |= {"maximum": 4}
        # What is a schema and what a grammar no description says: a form that cannot be is refused, which is right, too.
        fields["response_format"] = {"enum": [None, {"type": "text"}, {"type": "json_object"}]}
        fields["grammar"] = {"enum": [None]}
    api["components"]["schemas"]["Message"]["properties"]["role"] |= {"enum": ["system", "user", "assistant"]}
    api["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"] |= here
    return api


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    server = subprocess.Popen(
        [program, "serve", "--model", BASE, "--name", "base", "--port", "0", "--max-tokens", "16", "--max-batch", "4",
         "--api-key", "sk-user", "--admin-key", "sk-admin"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "RUST_LOG": "error"},
    )  # fmt: skip
    for line in server.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            break
    else:
        sys.exit("openapi: the server did not start")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,ignored_auth"
    work = tempfile.TemporaryDirectory()
    described = pathlib.Path(work.name) / "openapi.json"
    described.write_text(json.dumps(with_what_is_here(json.load(urllib.request.urlopen(f"{found[1]}/openapi.json")))))
    run = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", described, "--url", found[1], "--checks", checks, "--seed", "1",
         "--max-examples", "60", "--header", "Authorization: Bearer sk-admin", "--exclude-operation-id", "publish",
         "--phases", "coverage,fuzzing", "--no-color"],
        cwd=ROOT / "target",
    )  # fmt: skip
    alive = server.poll() is None
    server.send_signal(signal.SIGTERM)
    if not alive or server.wait(timeout=60) != 0:
        sys.exit("openapi: the server has died")
    sys.exit(run.returncode)


main()
