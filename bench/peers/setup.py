"""Install peers for run.py, each into an environment of its own. What is complete is left alone.

    python bench/peers/setup.py [torch] [optimum-onnx] [openvino] [llama-cpp] [--cache .peers]

Without names: all of them. The Python peers want 1 to 2 GB of disk each, llama-cpp 0.1 GB and node 20. torch is
installed as pip finds it: for its CPU build, where that is not the default, set pip's extra index first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from environments import CACHE, HERE, PEERS, binary, mark, missing, pins

# node-llama-cpp's packages that carry a CPU binary; its others are for GPUs and large
_BINARIES = {
    ("Linux", "x86_64"): "linux-x64", ("Linux", "aarch64"): "linux-arm64", ("Darwin", "arm64"): "mac-arm64-metal",
    ("Darwin", "x86_64"): "mac-x64", ("Windows", "AMD64"): "win-x64", ("Windows", "ARM64"): "win-arm64",
}  # fmt: skip


def install(cache: Path, peer: str) -> None:
    """Make the environment anew; its mark comes last, so that one that was interrupted is made again.

    Raises:
        subprocess.CalledProcessError: pip or npm failed and said why.
    """
    shutil.rmtree(cache / peer, ignore_errors=True)
    if peer == "llama-cpp":
        _install_node(cache / peer)
    else:
        venv.create(cache / peer, with_pip=True)
        pip = [str(binary(cache, peer, "python")), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(HERE / "requirements" / f"{peer}.txt")], check=True)
    mark(cache, peer).write_text(pins(peer), encoding="utf-8")


def _install_node(directory: Path) -> None:
    npm = shutil.which("npm")
    where = (platform.system(), platform.machine())
    if npm is None or where not in _BINARIES:
        raise SystemExit(f"llama-cpp needs npm and one of {sorted(_BINARIES)}; here: npm {npm}, {where}")
    directory.mkdir(parents=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(HERE / "llama-cpp" / name, directory / name)
    version = json.loads((directory / "package.json").read_text(encoding="utf-8"))["dependencies"]["node-llama-cpp"]
    subprocess.run(
        [npm, "install", "--omit=optional", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund",
         f"@node-llama-cpp/{_BINARIES[where]}@{version}"],
        cwd=directory, env={**os.environ, "NODE_LLAMA_CPP_SKIP_DOWNLOAD": "true"}, check=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="peer", help=", ".join(PEERS))
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory of the environments")
    options = parser.parse_args()
    unknown = set(options.peers) - set(PEERS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; peers are {', '.join(PEERS)}")
    options.cache.mkdir(parents=True, exist_ok=True)
    failed = []
    for peer in options.peers or PEERS:
        if not missing(options.cache, peer):
            print(f"{peer}: complete", file=sys.stderr)
            continue
        print(f"{peer}: installing into {options.cache / peer}", file=sys.stderr)
        try:
            install(options.cache, peer)
        except subprocess.CalledProcessError as error:
            failed.append(peer)
            print(f"{peer}: {error}", file=sys.stderr)
    if failed:
        raise SystemExit(f"not installed: {', '.join(failed)}; run.py will list them as absent")


if __name__ == "__main__":
    main()
