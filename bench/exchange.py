"""What runs gain for what they lose: one row a run, from the reports of finished runs.

    nbl-export --model MODEL --max-perplexity-increase 10% [--fit independent] [--window-layers auto] --output DIR
    nbl-export bench DIR --prompt-tokens 512,2048
    python bench/exchange.py DIR... > RAW.json

A run's loss is the upper end of its 95% interval on each judging text. Its gains are the ratios of its benchmark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_NAMES = ("fit", "replaced_layers", "num_layers", "precision", "select", "goal", "quality_loss", "ratios",
          "cache_bytes_per_token", "stage_seconds")  # fmt: skip


def row(directory: Path) -> dict[str, Any]:
    """The facts of a finished run that the table reads."""
    report, manifest = (json.loads((directory / f"{n}.json").read_text(encoding="utf-8")) for n in ("report", "nbl"))
    return {
        "title": report["model"]["title"],
        **{name: report[name] for name in _NAMES},
        "training": manifest["fit"],
        "kinds": manifest["kinds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+")
    print(json.dumps({"runs": [row(directory) for directory in parser.parse_args().runs]}, indent=1))


if __name__ == "__main__":
    main()
