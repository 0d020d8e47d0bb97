"""Over the published problems, every reference answer passes and a broken one fails, but for the data's mistakes."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from sheepfold.evaluation.code.humaneval import Problem, check, read
from sheepfold.evaluation.code.languages import missing_toolchain

BROKEN = {
    "python": '    raise ValueError("broken")\n',
    "js": '  throw new Error("broken");\n}\n',
    "cpp": "    throw 1;\n}\n",
    "java": '        throw new IllegalStateException("broken");\n    }\n',
    "go": '    panic("broken")\n}\n',
    "rust": '    panic!("broken");\n}\n',
}
WRONG_REFERENCES = {"JavaScript/112", "JavaScript/155"}
"""Their published solutions fail their published tests."""
SETS = [("humaneval", "python"), *(("humaneval_x", name) for name in BROKEN)]
each_set = pytest.mark.parametrize(("suite", "name"), SETS, ids=[f"{suite}-{name}" for suite, name in SETS])


def problems(lab, suite: str, name: str) -> list[Problem]:
    if reason := missing_toolchain(name):
        pytest.skip(reason)
    return read(lab / "data" / suite, name, suite)


def failures(chosen: list[Problem], answers: list[str]) -> dict[str, str]:
    """Return why each answer did not pass, without those that did."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(check, chosen, answers))
    return {problem.task_id: v.reason for problem, v in zip(chosen, found, strict=True) if not v.passed}


@pytest.mark.lab
@pytest.mark.parametrize(("suite", "name"), [SETS[0], ("humaneval_x", "cpp")])
def test_reference_answers_pass_and_broken_ones_fail(suite, name, lab):
    chosen = problems(lab, suite, name)[33 : 37 if name in ("python", "js") else 34]  # compilers are slow
    assert failures(chosen, [problem.canonical for problem in chosen]) == {}
    assert len(failures(chosen, [BROKEN[name]] * len(chosen))) == len(chosen)


@pytest.mark.lab
@pytest.mark.slow
@each_set
def test_every_reference_answer_passes_and_every_broken_one_fails(suite, name, lab):
    chosen = problems(lab, suite, name)
    assert len(chosen) == 164
    chosen = [problem for problem in chosen if problem.missing() is None]
    found = failures(chosen, [problem.canonical for problem in chosen])
    assert set(found) == {task for task in WRONG_REFERENCES if name == "js" and task.startswith("JavaScript")}
    assert len(failures(chosen, [BROKEN[name]] * len(chosen))) == len(chosen)
