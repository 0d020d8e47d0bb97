"""Go programs, without fetching anything: the tests' one library is replaced by the two functions that they call."""

import atexit
import functools
import os
import re
import shutil
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

from sheepfold.errors import ConfigError
from sheepfold.evaluation.code.limits import Limits, Step
from sheepfold.evaluation.code.tools import Fields, build_limits, home, tool

GO_MODULE = """\
module program
go 1.18
require github.com/stretchr/testify v1.8.0
replace github.com/stretchr/testify => ./testify
"""
GO_ASSERT = """\
package assert
import ("bytes"; "reflect"; "testing")
type Assertions struct { t *testing.T }
func New(t *testing.T) *Assertions { return &Assertions{t} }
func (a *Assertions) Equal(expected, actual interface{}, words ...interface{}) bool {
    left, bytesLeft := expected.([]byte)
    right, bytesRight := actual.([]byte)
    if bytesLeft && bytesRight && left != nil && right != nil && bytes.Equal(left, right) { return true }
    if reflect.DeepEqual(expected, actual) { return true }
    a.t.Fatalf("assertion failed: %#v is not %#v", actual, expected)
    return false
}
"""
"""The two functions of testify that the tests call; the library itself would have to come from a hub."""
GO_DONE = """
package main
import ("io"; "os"; "testing")
func TestMain(m *testing.M) {
    if m.Run() != 0 { os.Exit(1) }
    token, _ := io.ReadAll(os.Stdin)
    os.Stdout.Write(token)
    os.Exit(0)
}
"""
GO_PACKAGES = ("bytes", "fmt", "math", "math/rand", "regexp", "sort", "strconv", "strings", "time", "unicode")


def go_files(problem: Fields, answer: str) -> dict[str, str]:
    prompt = problem["prompt"].replace(problem["import"], "") if problem["import"] else problem["prompt"]
    words = re.sub(r"//.*", "", prompt + answer + problem["test"])
    # An unused import is an error in Go: what the program uses is imported, whatever the prompt's own import line says.
    used = [name for name in GO_PACKAGES if re.search(rf"\b{name.rpartition('/')[2]}\.", words)]
    imports = "".join(f'import "{name}"\n' for name in used if f'"{name}"' not in problem["test_setup"])
    program = f"{problem['test_setup']}\n{imports}{prompt}{answer}\n{problem['test']}\n"
    # go refuses modules in the root of TMPDIR, so they are in a folder below.
    return {f"src/{name}": text for name, text in {**_module(), "program_test.go": program}.items()}


def _module() -> dict[str, str]:
    return {
        "go.mod": GO_MODULE,
        "testify/go.mod": "module github.com/stretchr/testify\ngo 1.18\n",
        "testify/assert/assert.go": GO_ASSERT,
        "done_test.go": GO_DONE,
    }


GO_BUILD = """\
cp -r "$1" cache && cd src && shift
exec env GOCACHE="$HOME/cache" GOPATH="$HOME/path" GOENV=off "$@" test -c -vet=off -o ../program
"""
GO_SETTINGS = ("CGO_ENABLED=0", "GOPROXY=off", "GOTOOLCHAIN=local", "GOFLAGS=-p=1")


def go_steps(limits: Limits, token: str) -> tuple[Step, ...]:
    cache = go_reads()[-1]
    build = ("/bin/sh", "-c", GO_BUILD, "sh", cache, "env", *GO_SETTINGS, tool("go"))
    room = replace(build_limits(limits), reserves_memory=True, processes=128)
    running = replace(limits, reserves_memory=True)  # its runtime reserves addresses as node's does
    return Step(build, room), Step(("./program",), running, token)


_ONE_BUILDS = threading.Lock()  # programs run from several threads; the cache alone would let each of them build


def go_reads() -> tuple[str, ...]:
    """Return what a build reads besides the system's folders."""
    with _ONE_BUILDS:
        return (*home(tool("go")), _standard_library())


@functools.cache
def _standard_library() -> str:
    """Return a folder with the compiled standard library, made once in a process: it takes a minute, a program seconds.

    Only our own test file is compiled here, no generated code.
    """
    folder = Path(tempfile.mkdtemp(prefix="sheepfold-go-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)  # the program's user copies it
    imports = "".join(f'import _ "{name}"\n' for name in GO_PACKAGES)
    sources = {**_module(), "program_test.go": f"package main\n{imports}"}
    for name, text in sources.items():
        (folder / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "src" / name).write_text(text)
    settings = dict(setting.split("=", 1) for setting in GO_SETTINGS)
    places = {"GOCACHE": str(folder / "cache"), "GOPATH": str(folder / "path"), "GOENV": "off", "HOME": str(folder)}
    command = [tool("go"), "test", "-c", "-vet=off", "-o", "../program"]
    environment = {"PATH": os.defpath, **settings, **places}
    built = subprocess.run(command, cwd=folder / "src", env=environment, capture_output=True, text=True)
    if built.returncode:
        raise ConfigError(f"go cannot build its own standard library here: {built.stderr.strip()[-200:]}")
    return str(folder / "cache")
