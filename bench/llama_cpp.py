"""Speed of llama.cpp on GGUF files of the original and of an NBL model, side by side.

    python bench/llama_cpp.py LLAMA_BENCH Q8_0=ORIGINAL.gguf,NBL.gguf ... > RAW.json

LLAMA_BENCH is llama.cpp's own benchmark program. Both files of a pair come from one float checkpoint, by the same
converter and the same quantiser. A round loads each file anew for each test, the original first in every second round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nbl_export.measure.benchmark import machine

THREADS = 2
ROUNDS = 10
VARIANTS = ("original", "nbl")
TESTS = {
    "prefill 512": ("-p", "512", "-n", "0"),
    "prefill 2048": ("-p", "2048", "-n", "0"),
    "decode 64 behind 512": ("-p", "0", "-n", "64", "-d", "512"),
    "decode 64 behind 2048": ("-p", "0", "-n", "64", "-d", "2048"),
}


def once(program: str, file: str, words: tuple[str, ...]) -> dict[str, Any]:
    """One measured run, after the program's own warm-up."""
    command = [program, "-m", file, "-t", str(THREADS), "-r", "1", "-o", "json", *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program")
    parser.add_argument("pairs", nargs="+", help="TYPE=ORIGINAL.gguf,NBL.gguf")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for pair in options.pairs:
        kind, _, names = pair.partition("=")
        files = dict(zip(VARIANTS, names.split(","), strict=True))
        seconds: dict[str, dict[str, list[float]]] = {test: {name: [] for name in VARIANTS} for test in TESTS}
        for turn in range(options.rounds):
            for test, words in TESTS.items():
                for name in VARIANTS if turn % 2 == 0 else VARIANTS[::-1]:
                    about = once(options.program, files[name], words)
                    seconds[test][name].append(about["samples_ns"][0] / 1e9)
            print(kind, turn, {test: found["nbl"][-1] for test, found in seconds.items()}, file=sys.stderr, flush=True)
        sizes = {name: Path(file).stat().st_size for name, file in files.items()}
        rows[kind] = {"bytes": sizes, "tests": {test: {"seconds": found} for test, found in seconds.items()}}
    build = {"llama.cpp": about["build_commit"]}
    print(json.dumps({"machine": machine(), "versions": build, "asked": {"threads": THREADS}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
