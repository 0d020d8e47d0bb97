"""An answer ends with the function that was asked for, whatever the model went on to write."""

import pytest

from sheepfold.evaluation.code import humaneval
from sheepfold.evaluation.code.cutting import cut_braces, cut_python
from sheepfold.evaluation.code.languages import LANGUAGES

BODY = "    if a:\n        return '#'\n    return a\n"


@pytest.mark.parametrize(
    "more", ["\ndef next(): pass", "\nclass B: pass", "\n# Test", "\nif True: pass", "\nprint(f(1))"]
)
def test_python_ends_at_other_top_level_code(more):
    assert cut_python(BODY + more) == BODY


def test_fs_llm_also_ends_at_assertions_and_indents_the_first_line():
    assert cut_python(BODY + "\nassert f(1)") == BODY + "\nassert f(1)"
    assert cut_python(BODY + "\nassert f(1)", "fs-llm") == BODY
    assert cut_python("return a\n", "fs-llm") == cut_python("      return a\n", "fs-llm") == "    return a\n"
    assert cut_python(" ", "fs-llm") == " "


@pytest.mark.parametrize(
    ("language", "body"),
    [
        ("js", "  return a.map((x) => { return `}${x}`; }) // }\n}"),
        ("cpp", "    if (a == '}') { return \"}\"; } /* } */\n    return b;\n}"),
        ("java", '        return "}" + \'{\' + "\\"}";\n    }'),
        ("rust", "    let b: &'a str = \"}\";\n    if a == '}' { b } else { b }\n}"),
    ],
)
def test_brace_languages_end_at_the_functions_last_brace(language, body):
    assert cut_braces(body, language, "") == body
    assert cut_braces(body + "\n\nint main() { return 0; }\n".replace("int", "fn" if language == "rust" else "int"),
                      language, "") == body  # fmt: skip


@pytest.mark.parametrize("language", ["js", "cpp"])
def test_an_answer_that_stopped_at_its_last_brace_gets_it_back(language):
    assert cut_braces("  while (a) { a--; }\n  return a;", language, "") == "  while (a) { a--; }\n  return a;\n}"


def test_a_java_answer_gets_its_class_closed():
    assert cut_braces("        return a;", "java", "\n}") == "        return a;\n}\n}"


def test_a_rust_answer_keeps_the_function_that_follows_a_helper():
    helper_and_function = "    a\n}\n\nfn asked(b: i32) -> i32 {\n    b\n}"
    assert cut_braces(helper_and_function + "\n#[cfg(test)]\nmod tests {", "rust", "") == helper_and_function


@pytest.mark.lab
@pytest.mark.parametrize("name", sorted(LANGUAGES))
def test_cutting_leaves_every_canonical_solution_whole(name, lab):
    for problem in humaneval.read(lab / "data" / "humaneval_x", name, "humaneval_x"):
        kept = problem.cut(problem.canonical).strip()
        left_out = problem.canonical.strip().removeprefix(kept).strip()
        assert kept
        assert left_out == ("#undef NDEBUG\n#include<assert.h>" if problem.task_id == "CPP/94" else "")
