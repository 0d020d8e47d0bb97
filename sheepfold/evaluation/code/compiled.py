"""C++, Java and Rust programs: the answer, its tests, what repeats the token after them, and how they are built."""

import functools
import re
import subprocess
from dataclasses import replace
from pathlib import Path

from sheepfold.evaluation.code.limits import Limits, Step
from sheepfold.evaluation.code.tools import Fields, before_last_braces, build_limits, tool

CPP_HEADERS = ("stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string", "climits", "cstring", "iostream")
CPP_DONE = """\
#include <unistd.h>
extern "C" void sheepfold_done() {
    char token[64];
    ssize_t size = read(0, token, sizeof token);
    _exit(size > 0 && write(1, token, size) == size ? 0 : 1);
}
"""


def cpp_files(problem: Fields, answer: str) -> dict[str, str]:
    # CPP/23 asks for a strlen of its own; next to C's, its tests would call that one and any answer would pass.
    hidden = "cstring" if re.search(r"\bstrlen\(string", problem["prompt"]) else ""
    headers = "".join(f"#include<{name}>\n" for name in CPP_HEADERS if name != hidden)
    test = before_last_braces(problem["test"], 1, "sheepfold_done();")
    declared = 'extern "C" void sheepfold_done();\n'
    return {"done.cpp": CPP_DONE, "program.cpp": f"{headers}{problem['prompt']}{answer}\n{declared}{test}\n"}


def cpp_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    crypto = ("-lcrypto",) if _has_header("openssl/md5.h") else ()
    build = (tool("g++"), "-std=c++11", "-w", "program.cpp", "done.cpp", "-o", "program", "-Wl,--as-needed", *crypto)
    return Step(build, build_limits(limits)), Step(("./program",), limits, token)


def cpp_missing(problem: Fields) -> str | None:
    headers = re.findall(r"#include\s*<((?:boost|openssl)/[^>]+)>", problem["prompt"])
    missing = [name for name in headers if not _has_header(name)]
    return f"g++ finds no {' or '.join(missing)}" if missing else None


@functools.cache
def _has_header(name: str) -> bool:
    command = [tool("g++"), "-E", "-x", "c++", "-"]
    return subprocess.run(command, input=f"#include <{name}>", capture_output=True, text=True).returncode == 0


JAVA_DONE = """\
public class Done {
    public static void main(String[] words) throws Exception {
        Main.main(words);
        System.out.write(System.in.readAllBytes());
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }
}
"""


def java_files(problem: Fields, answer: str) -> dict[str, str]:
    return {"Done.java": JAVA_DONE, "Main.java": f"{problem['prompt']}{answer}\n{problem['test']}\n"}


def java_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    heap, virtual = f"-Xmx{limits.memory_mib // 2}m", ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    compiler = ["-J-Xmx512m", *(f"-J{flag}" for flag in virtual)]
    build = (tool("javac"), *compiler, "-nowarn", "Main.java", "Done.java")
    # The virtual machine starts slowly and is not what is being judged.
    room = replace(limits, reserves_memory=True, cpu_s=limits.cpu_s + 3)
    building = replace(build_limits(limits), reserves_memory=True)
    return Step(build, building), Step((tool("java"), heap, *virtual, "-cp", ".", "Done"), room, token)


RUST_CRATES = re.compile(r"^use (rand|regex|md5)\b[^;]*;\n?", re.MULTILINE)
"""What every declaration imports from outside the standard library, and hardly any uses. No hub is asked for them."""
RUST_DONE = """
        use std::io::{Read, Write};
        let mut token = String::new();
        std::io::stdin().read_to_string(&mut token).unwrap();
        std::io::stdout().write_all(token.as_bytes()).unwrap();
        std::io::stdout().flush().unwrap();
        std::process::exit(0);
"""


def rust_files(problem: Fields, answer: str) -> dict[str, str]:
    declaration = RUST_CRATES.sub("", problem["declaration"])
    test = before_last_braces(problem["test"], 2, RUST_DONE)
    return {"program.rs": f"fn main() {{}}\n{problem['prompt']}{declaration}{answer}\n{test}\n"}


def rust_missing(problem: Fields) -> str | None:
    if problem["test"].strip().startswith("/*"):
        return "its tests are commented out"
    crates = re.findall(r"\b(rand|md5)::|\b(Regex)::", problem["test"] + problem["canonical_solution"])
    names = sorted({(plain or regex).lower() for plain, regex in crates})
    return f"its reference solution or tests need the crate {' and '.join(names)}" if names else None


def rust_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    build = (_rustc(), "--edition=2021", "--test", "-Awarnings", "-Cdebuginfo=0", "program.rs", "-o", "program")
    room = replace(build_limits(limits), reserves_memory=True)
    return Step(build, room), Step(("./program", "--test-threads=1"), limits, token)


@functools.cache
def _rustc() -> str:
    """Return the compiler itself: what rustup puts on the path is a switch that reads the user's home."""
    place = subprocess.run([tool("rustc"), "--print", "sysroot"], capture_output=True, text=True, check=True)
    return str(Path(place.stdout.strip()) / "bin" / "rustc")
