"""README and docs: snippets run or parse, links lead somewhere, generated parts are up to date (90 s)."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_eagle3.cli import parser
from vllm_eagle3.config import options_table
from vllm_eagle3.evaluation.demo_models import default_pair

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
NAMES = ("meta-llama/Llama-3.1-8B-Instruct", "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MOST_WORDS = 700


def blocks() -> Iterator[tuple[str, str, str]]:
    """(page, language, text) of every fenced block."""
    for page in PAGES:
        for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            yield page.name, language, text


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every command of the bash blocks; `\\` at the end of a line continues it."""
    for page, language, text in blocks():
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.lstrip().startswith("#"):
                    yield page, line.strip()


def check_serve(words: list[str]) -> None:
    """`vllm serve`: its JSON options are JSON, and the speculative config names a method and a draft."""
    options = dict(zip(words, words[1:], strict=False))
    for name in ("--speculative-config", "--additional-config"):
        if name in options:
            found = json.loads(options[name])
            if name == "--speculative-config":
                assert {"method", "model"} <= set(found)


def check_python(words: list[str]) -> None:
    """`python FILE` and `python -m MODULE`: what they run exists."""
    assert find_spec(words[1]) if words[0] == "-m" else (ROOT / words[0]).is_file(), words


def check(command: str) -> None:
    """Parse a command; an unknown option, file, module or target fails."""
    words = shlex.split(command.partition(" #")[0].partition(" | ")[0].removesuffix("&"))
    while re.match(r"[A-Z_0-9]+=", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "vllm-eagle3":
        parser().parse_args(rest)
    elif program == "vllm" and rest[0] == "serve":
        check_serve(rest)
    elif program == "make":
        assert all(re.search(rf"^{word}:", MAKEFILE, re.MULTILINE) for word in rest if "=" not in word)
    elif program in ("python", "torchrun"):
        check_python(rest if program == "python" else rest[rest.index("-m") :])
    elif "/" in program:
        assert (ROOT / program).is_file()
    else:
        assert program in ("pip", "vllm", "curl", "pre-commit", "export", "docker", "git"), command


MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "command"), [*commands()], ids=lambda text: text[:60])
def test_commands_parse(page: str, command: str) -> None:
    check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "vllm-eagle3 sweep --modes chain --batches 3",
        "python benchmarks/none.py",
        "python -m vllm_eagle3.none",
        "make nothing",
        """vllm serve T --speculative-config '{"method": "eagle3"}'""",
        "unknown-program",
    ],
)
def test_wrong_commands_fail(wrong: str) -> None:
    with pytest.raises((SystemExit, AssertionError)):
        check(wrong)


def test_other_blocks_parse() -> None:
    readers = {
        "json": json.loads,
        "toml": tomllib.loads,
        "python": lambda text: compile(text, "docs", "exec"),
    }
    for page, language, text in blocks():
        assert language in {"bash", "text", "yaml", *readers}, (page, text)
        if language in readers:
            readers[language](text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {link}"


def test_architecture_names_files_that_exist() -> None:
    text = FENCE.sub("", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    names = re.findall(r"`([\w.*/]+)`", text)
    paths = {name for name in names if "/" in name or name.endswith((".py", ".cpp"))}
    assert len(paths) > 60
    absent = [name for name in paths if not any(any(top.glob(name)) for top in (ROOT, ROOT / "vllm_eagle3"))]
    assert not absent, f"docs/architecture.md names files that do not exist: {sorted(absent)}"


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_readme_or_architecture_links_every_page(page: Path) -> None:
    assert f"{page.relative_to(ROOT)}" in README


def test_every_results_file_has_its_section() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "benchmarks" / "results").iterdir()):
        assert f"results/{path.name}" in text, f"{path.name}: docs/benchmarks.md does not name it"


def test_every_section_of_measurements_has_its_file_and_its_command() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    heads = [section.split("\n", 1) for section in text.split("\n## ")[1:]]
    assert len(heads) > 10
    for head, section in heads:
        if head != "The paper":
            named = re.findall(r"results/([\w.]+)", section)
            assert any((ROOT / "benchmarks" / "results" / name).is_file() for name in named), head
            assert "```bash" in section, head


def test_readme_is_short() -> None:
    written = README
    for made in ("options", "demo"):
        before, rest = written.split(f"<!-- {made} -->")
        written = before + rest.split(f"<!-- /{made} -->")[1]
    words = len(written.split())
    assert words <= MOST_WORDS, f"{words} words outside the generated table and the captured demo"


def test_options_table() -> None:
    table = README.split("<!-- options -->\n")[1].split("<!-- /options -->")[0]
    assert table == options_table()


def snippet(name: str) -> str:
    found = re.search(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"README.md has no snippet {name!r}"
    return found[1]


@pytest.fixture(scope="module")
def local():
    """Puts the embedded pair in place of the README's models."""
    pair = default_pair()

    def put(text: str) -> str:
        for name, path in zip(NAMES, pair, strict=True):
            assert name in text
            text = text.replace(name, str(path))
        return text

    return put


def test_llm_snippet(local):
    code = "if __name__ == '__main__':\n" + re.sub("^", "    ", local(snippet("llm")), flags=re.MULTILINE)
    small = "enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28"
    code = code.replace("speculative_config=", f"{small}, speculative_config=")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert "Paris" in done.stdout, done.stderr[-3000:]


def test_offline_example_runs():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "offline_batch.py"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ,
        check=False,
    )
    assert done.stdout.count("->") == 3 and "Paris" in done.stdout, done.stderr[-3000:]


def test_serve_snippet_is_what_the_server_test_starts(local):
    """Parses as a command line; `e2e/test_serve.py` starts a server with the same arguments."""
    words = shlex.split(local(snippet("serve")))
    config = json.loads(words[words.index("--speculative-config") + 1])
    assert words[:2] == ["vllm", "serve"] and config["method"] == "eagle3"
    assert set(config) == {"method", "model", "num_speculative_tokens"}
