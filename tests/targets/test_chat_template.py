"""A chat template is a program of a stranger: it renders as in transformers, and takes neither memory nor time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from nbl_export.errors import NblError
from nbl_export.targets import tokenizer as chat_template
from nbl_export.targets.tokenizer import applied, render

pytestmark = pytest.mark.process

TEXT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
TAKES_MEMORY = {
    "repeated": "{% set s = 'a' * 2000000000 %}",
    "doubled": "{% set n = namespace(s='a' * 999) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "formatted": "{{ '%2000000000d' % 1 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "written": "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 9999 }}{% endfor %}{% endfor %}",
}


def resident() -> int:
    """Bytes of this process and its children."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def test_the_values_of_a_template() -> None:
    assert render(TEXT, "größe", {"bos_token": "<s>"}, "m") == "<s>[user] größe>"


@pytest.mark.parametrize("name", TAKES_MEMORY)
def test_a_template_that_takes_memory_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 5.0)
    seen, done, before = [0], threading.Event(), resident()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(resident() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with pytest.raises(NblError, match=r"the chat template of m cannot be applied .*--raw"):
            render(TAKES_MEMORY[name], "x", {}, "m")
    finally:
        done.set()
        watching.join()
    assert max(seen) < 1 << 30


def test_a_narrower_limit_stays() -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (600_000_000,) * 2)\n"
    code += "from nbl_export.targets.tokenizer import render\n"
    code += "assert render('{{ bos }}!', '', {'bos': 'a'}, 'm') == 'a!'"
    # each thread of a library's pool takes address space
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=env)


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(NblError, match="it does not end within 1 s"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "x", {}, "m")
    assert time.monotonic() - start < 30


def test_a_text_is_no_longer_than_any_prompt() -> None:
    with pytest.raises(NblError, match="more than 16 Mi characters"):
        render("{{ 'a' * 20000000 }}", "x", {}, "m")


@pytest.mark.parametrize(
    "template",
    [
        '{% set f="{0.__globals__[os].environ[PATH]}"|attr("format") %}{{ f(lipsum) }}',
        "{{ cycler.__init__.__globals__.os.environ }}",
    ],
)
def test_a_template_does_not_reach_the_environment(template: str) -> None:
    with pytest.raises(NblError, match="cannot be applied"):
        render(template, "x", {}, "m")


def test_the_template_of_a_directory(tmp_path: Path) -> None:
    assert applied(tmp_path, "x") is None
    several = [{"name": "tool", "template": "no"}, {"name": "default", "template": TEXT}]
    for template in (TEXT, several):
        settings = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        assert applied(tmp_path, "x") == "<s>[user] x>"
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    assert applied(tmp_path, "x") == "x!"
