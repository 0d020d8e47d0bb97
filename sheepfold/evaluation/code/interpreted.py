"""Python and JavaScript programs: the answer, its tests, and what repeats the token after them."""

import sys
from dataclasses import replace

from sheepfold.evaluation.code.limits import Limits, Step
from sheepfold.evaluation.code.tools import Fields, tool

PYTHON_DRIVER = """\
import os, sys
def drive(write=os.write, leave=os._exit):
    token = sys.stdin.buffer.read()
    with open("program.py", encoding="utf-8", errors="surrogatepass") as file:
        program = compile(file.read(), "program.py", "exec")
    exec(program, {})
    write(1, token)
    leave(0)
drive()
"""
"""Runs the program as the published scorer does, in an empty namespace: `if __name__ == "__main__"` is not taken."""

PYTHON_IMPORTS = """\
import math, re, sys, copy, datetime, itertools, collections, heapq, statistics, functools, hashlib, string
from typing import *
from collections import *
"""
"""HumanEval-X gives Python programs these (and numpy, which no canonical solution uses) before the prompt."""


def python_files(problem: Fields, answer: str) -> dict[str, str]:
    if "entry_point" in problem:
        program = f"{problem['prompt']}{answer}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    else:
        program = f"{PYTHON_IMPORTS}{problem['prompt']}{answer}\n{problem['test']}\n"
    return {"driver.py": PYTHON_DRIVER, "program.py": program}


def python_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    return (Step((sys.executable, "-I", "-B", "driver.py"), limits, token),)


JS_ASSERT = "console.assert = (ok, ...words) => require('assert').ok(ok, words.join(' ') || 'Assertion failed');\n"
"""Node only prints failed assertions; the published scorer looks for that text, ours has them throw."""
JS_MD5 = "module.exports = (text) => require('crypto').createHash('md5').update(text).digest('hex');\n"
JS_DONE = "\nrequire('fs').writeSync(1, require('fs').readFileSync(0));\nprocess.exit(0);\n"


def js_files(problem: Fields, answer: str) -> dict[str, str]:
    # One prompt imports js-md5, which is not part of node; what it does is.
    return {
        "node_modules/js-md5/index.js": JS_MD5,
        "program.js": f"{problem['prompt']}{answer}\n{JS_ASSERT}{problem['test']}{JS_DONE}",
    }


def js_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    heap = f"--max-old-space-size={limits.memory_mib // 2}"
    return (Step((tool("node"), heap, "program.js"), replace(limits, reserves_memory=True), token),)
