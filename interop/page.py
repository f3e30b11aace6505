"""Uses the page of `peft-cli serve` as a person would, in a headless Chromium.

    python interop/page.py target/release/peft-cli        # apt-get install chromium chromium-driver

Two models are asked the same; their answers come side by side, and are those of `peft-cli generate`.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

ROOT = pathlib.Path(__file__).resolve().parent.parent
BASE = ROOT / "examples/quickstart/base"
PROMPT = "Once upon a time there was a brave dog named Rex."
# Of each change of an answer, whose it was.
OBSERVE = """
window.seen = [];
new MutationObserver((all) => all.forEach((m) => {
    const article = m.target.parentElement?.closest("article") ?? m.target.closest?.("article");
    if (article && m.target.tagName === "PRE") window.seen.push(article.dataset.model);
})).observe(document.getElementById("answers"), { childList: true, subtree: true });
"""

checks, failed = 0, []


def check(what, holds, detail=""):
    global checks
    checks += 1
    if not holds:
        failed.append(what)
        print(f"FAILED {what}: {detail}")


def run(program, *args):
    done = subprocess.run([program, *args], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"page: {' '.join(map(str, args))}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def browser():
    options = webdriver.ChromeOptions()
    for flag in "--headless=new", "--no-sandbox", "--disable-dev-shm-usage":
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or sys.exit("page: no chromium; apt-get install chromium chromium-driver")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def endless(folder):
    """The quickstart's base, which ends no text by itself: its end token is one that it never writes."""
    shutil.copytree(BASE, folder)
    for name in "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json":
        file = folder / name
        config = json.loads(file.read_text())
        config |= {"eos_token_id": 3} if "eos_token_id" in config else {"eos_token": "<|pad|>"}
        file.write_text(json.dumps(config))
    return folder


class Page:
    def __init__(self, driver):
        self.driver = driver

    def at(self, name):
        return self.driver.find_element(By.ID, name)

    def until(self, what, holds, seconds=20):
        try:
            WebDriverWait(self.driver, seconds, poll_frequency=0.05).until(lambda _: holds())
        except Exception:
            check(what, False, self.driver.find_element(By.TAG_NAME, "body").text)
        else:
            check(what, True)

    def write(self, name, text):
        field = self.at(name)
        field.clear()
        field.send_keys(text)

    def answers(self):
        """{model: (text, what is said about it)}"""
        script = """return Object.fromEntries([...document.querySelectorAll("article")].map((a) =>
            [a.dataset.model, [a.querySelector("pre").textContent, a.querySelector("footer").textContent, a.className]]))"""
        return self.driver.execute_script(script)

    def names(self):
        return [label.text for label in self.driver.find_elements(By.CSS_SELECTOR, "#names label")]


def use(page, address, want):
    driver = page.driver
    driver.get(address)
    page.until("without a key the page says so", lambda: "key" in page.at("more").text)
    page.write("key", "sk-user")
    page.at("prompt").click()
    page.until("with one it lists the models", lambda: page.names() == ["base", "style"])
    page.write("filter", "STY")
    page.until("the filter leaves one", lambda: page.names() == ["style"])
    page.at("names").find_element(By.TAG_NAME, "input").click()
    page.write("filter", " \b")
    page.until("and none is left out again", lambda: len(page.names()) == 2)

    page.write("prompt", PROMPT)
    Select(page.at("kind")).select_by_value("text")
    page.write("tokens", "24")
    driver.execute_script(OBSERVE)
    page.at("send").click()
    page.until("both answers come to an end", lambda: sum("tokens" in a[1] for a in page.answers().values()) == 2)
    got = {name: text for name, (text, _, _) in page.answers().items()}
    check("they are what `generate` writes", got == want, f"{got} is not {want}")
    seen = driver.execute_script("return window.seen")
    check("they came in pieces", min(seen.count(name) for name in want) > 5, seen)
    last = {name: len(seen) - seen[::-1].index(name) for name in want}
    first = {name: seen.index(name) for name in want}
    check("side by side", max(first.values()) < min(last.values()), seen)
    page.until("the load shows the adapter", lambda: "1 of 1 adapters in memory" in page.at("load").text)

    Select(page.at("kind")).select_by_value("chat")
    page.at("send").click()
    page.until("a chat ends, too", lambda: sum("tokens" in a[1] for a in page.answers().values()) == 2)
    page.write("tokens", "100000")
    page.at("send").click()
    page.until("what the server refuses is said", lambda: all("failed" in a[2] and "max_tokens" in a[1] for a in page.answers().values()))
    page.write("tokens", "4000")
    Select(page.at("kind")).select_by_value("text")
    page.at("send").click()
    page.until("a long answer begins", lambda: any(a[0] for a in page.answers().values()))
    page.at("stop").click()
    page.until("and is stopped", lambda: all(a[1] == "stopped" for a in page.answers().values()))
    def idle():
        numbers = urllib.request.urlopen(f"{address}/metrics").read().decode()
        return re.search(r"running_sequences 0$", numbers, re.M) and not re.search(r"cancelled_total 0$", numbers, re.M)

    page.until("which frees its place on the server", idle)
    # The browser logs each refused request by itself.
    complaints = [e for e in driver.get_log("browser") if e["level"] == "SEVERE" and "Failed to load resource" not in e["message"]]
    check("no script failed and no policy was broken", not complaints, complaints)


def main():
    program = pathlib.Path(sys.argv[1]).resolve()
    work = tempfile.TemporaryDirectory()
    adapter = pathlib.Path(work.name) / "style"
    run(program, "train", "examples/quickstart/lora.toml", "--output", adapter, "--set", "train.max_steps=8", "--json")
    base = endless(pathlib.Path(work.name) / "base")
    generate = lambda *more: run(
        program, "generate", "--model", base, "--max-new-tokens", "24", "--json", "--prompt", PROMPT, *more
    )["text"]
    want = {"base": generate(), "style": generate("--adapter", adapter)}
    server = subprocess.Popen(
        [program, "serve", "--model", base, "--name", "base", "--adapter", f"style={adapter}", "--port", "0",
         "--api-key", "sk-user", "--max-tokens", "4000", "--context", "8192"],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "RUST_LOG": "warn"},
    )  # fmt: skip
    for line in server.stderr:
        if found := re.search(r"listening on (http://\S+)", line):
            break
    else:
        sys.exit("page: the server did not start")
    driver = browser()
    try:
        use(Page(driver), found[1], want)
    finally:
        driver.quit()
        server.send_signal(signal.SIGTERM)
    check("the server ends", server.wait(timeout=60) == 0)
    print(f"page: {checks - len(failed)} passed, {len(failed)} failed")
    sys.exit(bool(failed))


main()
