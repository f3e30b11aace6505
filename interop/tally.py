"""What the scripts beside HF PEFT have in common: their options, a line a case, and the count at the end."""
import argparse
import contextlib
import pathlib
import sys
import traceback

import torch
from check import Cli, Short


def options(doc, only=None):
    """The command line of a script: the program as `cli`, `seed`, and with `only` (its help) a list of names. Seeds torch."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    if only:
        parser.add_argument("--only", default="", help=only)
    found = parser.parse_args()
    found.cli = Cli(found.program.resolve())
    found.only = [name for name in getattr(found, "only", "").split(",") if name]
    torch.set_num_threads(1)
    torch.manual_seed(found.seed)
    return found


class Tally:
    """Counts cases; one that breaks does not hide the others."""

    def __init__(self):
        self.passed = self.failed = 0

    @contextlib.contextmanager
    def case(self, label):
        """The body is one case; an error in it is a failure."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            if isinstance(error, Short):
                print(f"FAIL {label}: {error}", flush=True)
            else:
                traceback.print_exc()
                print(f"FAIL {label}: {error!r}", flush=True)
        else:
            self.passed += 1
            print(f"ok   {label}", flush=True)

    def end(self):
        """Prints the count and ends the script."""
        if self.passed + self.failed == 0:
            sys.exit("no cases to check")
        print(f"{self.passed} passed, {self.failed} failed")
        sys.exit(self.failed > 0)
