"""One measurement: a process, its wall time, its peak memory, and what it printed."""
import json
import os
import subprocess
import time


class Failed(Exception):
    """A measurement that could not be made, or two that should agree and do not."""


class Refused(Failed):
    """A memory budget that the program says beforehand it cannot keep to."""


def measure(command, log):
    """Run `command`; its last line of stdout is a JSON object or nothing. Adds `began_at`, `wall_seconds`, the
    `cpu_seconds` of all threads, and `peak_bytes`, the largest resident memory that the system saw, loading included: the same
    clocks and the same scale for both sides."""
    command = [str(part) for part in command]
    with open(log, "w", encoding="utf-8") as stderr:
        began_at, started = time.time(), time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        printed = process.stdout.read()
        # subprocess's own wait would throw the usage away.
        _, status, usage = os.wait4(process.pid, 0)
        wall_seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
    if process.returncode != 0:
        with open(log, encoding="utf-8") as stderr:
            said = stderr.read().strip()[-2000:]
        error = said.rpartition("\n")[2].removeprefix("error: ")
        if error.startswith("`train.memory_budget`") and "is too small" in error:
            raise Refused(error.partition(";")[0])
        raise Failed(f"exit {process.returncode}: {' '.join(command)}\n{said}")
    last = printed.strip().rpartition("\n")[2]
    return {
        "began_at": began_at,
        "wall_seconds": wall_seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
        **(json.loads(last) if last.startswith("{") else {}),
    }
