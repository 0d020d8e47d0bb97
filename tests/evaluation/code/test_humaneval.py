"""A right answer passes, a wrong one fails for a reason that is named, and no exit code stands in for the tests."""

import gzip
import json
import shutil

import pytest

from sheepfold.errors import ConfigError, DataError
from sheepfold.evaluation.code import harness_tasks, runner
from sheepfold.evaluation.code.humaneval import Problem, check, check_all, read
from sheepfold.evaluation.code.languages import LANGUAGES, missing_toolchain
from sheepfold.evaluation.code.limits import Limits

QUICK = Limits(timeout_s=8, cpu_s=1, memory_mib=256)

DOUBLE = {
    "suite": "humaneval",
    "language": "python",
    "task_id": "Own/0",
    "entry_point": "double",
    "prompt": 'def double(n: int) -> int:\n    """Return twice n."""\n',
    "canonical_solution": "    return n * 2\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0, 'zero'\n",
}
PROBLEM = Problem.of(DOUBLE)
RIGHT = DOUBLE["canonical_solution"]
JAVA_TEST = """
public class Main {
    public static void main(String[] words) {
        if (new Solution().twice(2) != 4) throw new AssertionError();
    }
}
"""
TWICE = {
    "js": ("const twice = (n) => {\n", "  return n * 2;\n}\n", "console.assert(twice(2) === 4)\n"),
    "cpp": (
        "int twice(int n){\n",
        "    return n * 2;\n}\n",
        "#include<assert.h>\nint main(){\n  assert (twice(2)==4);\n}\n",
    ),
    "java": ("class Solution {\n    public int twice(int n) {\n", "        return n * 2;\n    }\n}", JAVA_TEST),
    "go": (
        "// Return twice n\nfunc Twice(n int) int {\n",
        "    return n * 2\n}\n",
        "func TestTwice(t *testing.T) {\n    assert := assert.New(t)\n    assert.Equal(4, Twice(2))\n}\n",
    ),
    "rust": (
        "/* Return twice n */\n",
        "    n * 2\n}\n",
        "#[cfg(test)]\nmod tests {\n  use super::*;\n  #[test]\n  fn t() {\n    assert_eq!(twice(2), 4);\n  }\n}\n",
    ),
}
GO_SETUP = (
    'package main\n\nimport (\n    "testing"\n    "github.com/stretchr/testify/assert"\n    "os"\n)\nvar _ = os.Exit\n'
)
LEAVE_EARLY = {
    "go": "    os.Exit(0)\n    return 0\n}\n",
    "js": "  process.exit(0);\n}\n",
    "cpp": "    exit(0);\n}\n",
    "java": "        System.exit(0);\n        return 0;\n    }\n",
    "rust": "    std::process::exit(0);\n}\n",
}


COMPILED = [pytest.param(name, marks=pytest.mark.slow) for name in ("cpp", "java", "go", "rust")]


def twice(name: str) -> Problem:
    prompt, canonical, test = TWICE[name]
    fields = {"task_id": f"{name}/0", "prompt": prompt, "canonical_solution": canonical, "test": test}
    further = {"declaration": "use md5;\nfn twice(n: i32) -> i32 {\n", "test_setup": GO_SETUP, "import": ""}
    return Problem("humaneval_x", LANGUAGES[name], {**fields, **further})


def test_a_right_answer_passes_whatever_is_written_after_it():
    verdict = check(PROBLEM, RIGHT + "\nprint(double(3))\nraise SystemExit(1)\n", QUICK)
    assert (verdict.passed, verdict.reason) == (True, "passed")
    assert verdict.outcome.isolation.limits == runner.isolation().limits


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("    return n\n", "failed: AssertionError"),
        ("    return n or 1\n", "failed: AssertionError"),
        ("    return n *\n", "failed: SyntaxError: invalid syntax"),
        ("    return unknown_name\n", "failed: NameError: name 'unknown_name' is not defined"),
        ("    return double(n)\n", "failed: RecursionError: maximum recursion depth exceeded"),
        ("    return int(input())\n", "failed: EOFError: EOF when reading a line"),
        ("    return bytearray(1 << 40)\n", "out of memory"),
        ("    import os; os.abort()\n", "failed: signal 6"),
        ("    raise StopIteration\n", "failed: StopIteration"),
        ("    return '\ud800'\n", "failed: UnicodeEncodeError"),
        ("\0", "failed: "),
        ("", "failed: AssertionError"),
    ],
)
def test_an_answer_that_fails_says_why(answer, reason):
    verdict = check(PROBLEM, answer, QUICK)
    assert not verdict.passed
    assert verdict.reason.startswith(reason)
    assert "\n" not in verdict.reason


def test_an_answer_that_waits_is_timed_out():
    assert check(PROBLEM, "    import time; time.sleep(9)\n", Limits(timeout_s=0.5)).reason == "timed out"


@pytest.mark.parametrize(
    "answer",
    [
        "    import sys; sys.exit(0)\n",
        "    import os; os._exit(0)\n",
        "    return n * 2\nimport os; os._exit(0)\n",
        "    raise SystemExit\n",
        "    import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])\n",
        "    import os, sys; os.write(1, sys.stdin.buffer.read()); os._exit(0)\n",  # the token is no longer there
    ],
)
def test_ending_well_before_the_tests_did_is_not_passing(answer):
    verdict = check(PROBLEM, answer, QUICK)
    assert (verdict.passed, verdict.reason) == (False, "failed: it ended before its tests did")


def test_a_program_may_print_exit_late_and_redefine_what_it_likes():
    for answer in [
        RIGHT.replace("return", "print('x' * 200_000); return"),
        RIGHT + "import atexit, os; atexit.register(lambda: os._exit(3))\n",
        RIGHT + "import sys; sys.stdout.close()\n",
        RIGHT + "exec = open = len = None\n",
        RIGHT + "import threading, time; threading.Thread(target=time.sleep, args=(9,)).start()\n",
    ]:
        assert check(PROBLEM, answer, QUICK).passed, answer


def test_a_main_block_is_not_run_as_in_the_published_scorer():
    assert check(PROBLEM, RIGHT + "while __name__ == '__main__': pass\n", QUICK).passed


def test_a_program_that_searches_its_scorers_frames_can_claim_a_pass():
    # Known and written down (docs/code-evaluation.md): tests share a process with what they test.
    thief = "    import os, sys; os.write(1, sys._getframe(3).f_locals['token']); os._exit(0)\n"
    assert check(PROBLEM, thief, QUICK).passed


def test_a_problems_answers_are_judged_in_their_order():
    answers = [RIGHT, "    return 1\n", RIGHT, "    import os; os._exit(0)\n"]
    assert [verdict.passed for verdict in check_all(PROBLEM, answers, QUICK, workers=2)] == [True, False, True, False]


@pytest.mark.parametrize("name", ["js", *COMPILED])
def test_the_other_languages_judge_in_the_same_way(name):
    if reason := missing_toolchain(name):
        pytest.skip(reason)
    problem = twice(name)
    assert check(problem, problem.canonical).passed
    wrong = check(problem, problem.canonical.replace("n * 2", "n * 3"))
    assert not wrong.passed
    assert wrong.reason.startswith("failed: ")
    assert check(problem, LEAVE_EARLY[name]).reason == "failed: it ended before its tests did"


@pytest.mark.parametrize("name", COMPILED)
def test_an_answer_that_does_not_compile_says_so(name):
    if reason := missing_toolchain(name):
        pytest.skip(reason)
    assert check(twice(name), "  return nothing_of_that_name;\n}\n").reason.startswith("did not compile: ")


def test_what_the_model_is_shown_is_the_published_prompt():
    assert PROBLEM.prompt_text() == DOUBLE["prompt"]
    assert twice("js").prompt_text() == "// language: JavaScript\nconst twice = (n) => {\n"
    assert twice("rust").prompt_text().endswith("fn twice(n: i32) -> i32 {\n")


def test_a_language_without_its_tools_is_named(monkeypatch):
    missing_toolchain.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        assert harness_tasks.skipped("js") == "node not found on this machine"
        assert harness_tasks.skipped("python") is None
        with pytest.raises(ConfigError, match="js/0: node not found on this machine"):
            check(twice("js"), "}")
    finally:
        missing_toolchain.cache_clear()


def test_a_problem_without_its_library_is_named():
    if reason := missing_toolchain("cpp"):
        pytest.skip(reason)
    lacking = twice("cpp").as_dict() | {"prompt": "#include<boost/no-such.hpp>\nint twice(int n){\n"}
    assert harness_tasks.unscorable(lacking) == "g++ finds no boost/no-such.hpp"
    assert harness_tasks.unscorable(DOUBLE) is None
    kept, left_out = harness_tasks.scorable([DOUBLE, lacking])
    assert (kept, left_out) == ([DOUBLE], ["cpp/0 is skipped: g++ finds no boost/no-such.hpp"])


def test_problems_are_read_from_a_file_or_a_folder(tmp_path):
    row = {name: value for name, value in DOUBLE.items() if name not in ("suite", "language")}
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n\n")
    assert [problem.as_dict() for problem in read(tmp_path)] == [DOUBLE]
    assert harness_tasks.documents(tmp_path / "HumanEval.jsonl.gz") == [DOUBLE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "no problems in it"),
        (b"{", "cannot be read as JSON lines"),
        (b"\xff\xfe", "cannot be read as JSON lines"),
        (b"[]\n", "line 1: no text in task_id"),
        (
            b'{"task_id": "a", "prompt": 3, "canonical_solution": "", "test": ""}',
            "line 1: no text in prompt, entry_point",
        ),
    ],
)
def test_files_that_hold_no_problems_are_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "HumanEval.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_unknown_places_languages_and_suites_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither a file nor a folder with HumanEval\.jsonl"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="no language 'pythn'; did you mean 'python'"):
        read(tmp_path, "pythn", "humaneval_x")
    with pytest.raises(ConfigError, match="humaneval is Python"):
        read(tmp_path, "js")


def test_nothing_runs_without_the_users_word():
    harness_tasks.allowed(True)
    with pytest.raises(ConfigError, match="humaneval runs programs that the model wrote: add --allow-code"):
        harness_tasks.allowed(False, "humaneval")


def test_the_harness_gets_plain_numbers():
    answers = [RIGHT, "    return 1\n"]
    assert harness_tasks.score(DOUBLE, answers, limits=QUICK, workers=2) == {"pass@1": 0.5}
    assert harness_tasks.score(DOUBLE, answers, k=[1, 2], limits=QUICK) == {"pass@1": 0.5, "pass@2": 1.0}
    assert harness_tasks.stop(DOUBLE) == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    assert harness_tasks.stop(DOUBLE, "fs-llm")[-1] == "\nassert"
    json.dumps([harness_tasks.isolation(), *harness_tasks.verdicts(DOUBLE, answers, QUICK)])
