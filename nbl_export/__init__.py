"""nbl-export: Neural Block Linearization of decoder LLMs, from checkpoint to a verified engine.

Importing this package loads neither torch nor any engine; `nbl_export.cli` is the command line. The import turns off
telemetry of ONNX Runtime, its GenAI and huggingface_hub in this process, unless the environment says otherwise.
"""

import os

__all__ = ["__version__"]

for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):  # read when the libraries are loaded
    os.environ.setdefault(_switch, "1")

__version__ = "0.1.0"
