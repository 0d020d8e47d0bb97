"""Where an answer ends: a model goes on after the function that it was asked for.

Python ends at the first line of other top-level code. Languages with braces end at the brace that closes the
function, found by counting braces outside strings and comments; an answer cut off before it gets it back, since it is
also what generation stops at.
"""

import re
from collections.abc import Sequence
from typing import Literal

Style = Literal["published", "fs-llm"]

PYTHON_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""The published list: Chen et al., arXiv:2107.03374, section 2.3 (and the harness's humaneval task)."""
FS_LLM_STOP = (*PYTHON_STOP, "\nassert")
GO_STOP = ("\n//", "\n/*", "\nfunc main(", "\nfunc Test")
RUST_STOP = ("\nfn main", "\n#[cfg", "\nmod ", "\n//", "\n/*")

_COMMENT = r"//[^\n]*|/\*.*?\*/"
_STRING = r'"(?:\\.|[^"\\])*"'
_CHARACTER = r"'(?:\\[^\n]{1,8}?|[^'\\\n])'"
_LONG_STRING = r"'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`"
_TOKENS = {
    "js": re.compile(f"{_COMMENT}|{_STRING}|{_LONG_STRING}|[{{}}]", re.DOTALL),
    "go": re.compile(f"{_COMMENT}|{_STRING}|{_CHARACTER}|`[^`]*`|[{{}}]", re.DOTALL),
    # 'a is a lifetime in Rust, so a quote there opens nothing unless one character later it closes.
    "": re.compile(f"{_COMMENT}|{_STRING}|{_CHARACTER}|[{{}}]", re.DOTALL),
}


def cut_python(completion: str, style: Style = "published") -> str:
    """Return the answer up to other top-level code; as FS-LLM does: one more stop word, first line indented by four."""
    completion = _before(completion, FS_LLM_STOP if style == "fs-llm" else PYTHON_STOP)
    if style == "fs-llm" and completion.strip():
        completion = " " * 4 + completion.replace("\u00a0", "").lstrip(" ")
    return completion


def cut_braces(completion: str, language: str, closing: str) -> str:
    """Return the answer up to the brace that closes its function, then `closing` (what encloses the function).

    Differs from CodeGeeX, which keeps everything up to the last brace of the answer: further functions that a model
    goes on to write, such as a second `main`, would then fail an answer that was right. Rust and Go keep whole
    functions up to the next stop word: some of their reference solutions have the function asked for second.
    """
    several = {"rust": RUST_STOP, "go": GO_STOP}.get(language)
    completion = _before(completion, several or ())
    depth, end = 1, 0
    for token in _TOKENS.get(language, _TOKENS[""]).finditer(completion):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0 and token[0] == "}":
            end = token.end()
            if not several:
                break
    return (completion[:end] if end else completion.rstrip() + "\n}" * depth) + closing


def _before(text: str, words: Sequence[str]) -> str:
    for word in words:
        text = text.split(word, 1)[0]
    return text
