"""Passes for Olive (olive-ai): the rewrite of a graph, and the whole job.

NblRewrite   ONNX -> ONNX, behind ModelBuilder or MobiusBuilder     `nbl-export rewrite-graph`
Nbl          Hugging Face -> ONNX                                   `nbl-export --model M --output DIR`

`olive run --package-config FILE` reads where the passes are; `package_config()` gives that file's content.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam

from nbl_export.files import move_into_place, refuse_occupied, scratch_in
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.run.pipeline import run_job
from nbl_export.run.progress import Ui
from nbl_export.run.rewrite_given import rewrite_given

__all__ = ["Nbl", "NblRewrite", "package_config"]

_RUN = "nbl-run"  # directory of the whole run, beside the deployable one


def package_config() -> dict[str, Any]:
    """Olive's own table of passes with both passes added: `--package-config` replaces the table."""
    import olive

    path = Path(olive.__file__).parent / "olive_config.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    ours = {name: _entry(name) for name in ("Nbl", "NblRewrite")}
    return {**known, "passes": {**known["passes"], **ours}}


def _entry(name: str) -> dict[str, Any]:
    return {
        "module_path": f"nbl_export.olive.{name}",
        "supported_providers": ["CPUExecutionProvider"],
        "supported_accelerators": ["cpu"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "run_on_target": False,
    }


class NblRewrite(Pass):
    """Replace attention layers of a decoder graph by the linear maps of a finished run (`maps.safetensors`)."""

    @classmethod
    def _default_config(cls, _accelerator_spec: Any) -> dict[str, Any]:
        return {
            "maps": PassConfigParam(type_=str, required=True, description="Path of a run's maps.safetensors."),
            "layers": PassConfigParam(
                type_=str, default_value=None, description="Layers whose maps are used (0,7,24-29); default: all maps."
            ),
            "tap": PassConfigParam(
                type_=str, default_value=None, description="Input of the maps; default: as the maps file records."
            ),
        }

    def _run_for_config(self, model: ONNXModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        source, out = Path(model.model_path), _directory(output_model_path)
        rewrite_given(source.parent, Path(config.maps), config.layers, config.tap, out)
        return _handler(model, out, source.name)


class Nbl(Pass):
    """Calibrate, choose layers, export, rewrite, verify and measure a Hugging Face decoder."""

    @classmethod
    def _default_config(cls, _accelerator_spec: Any) -> dict[str, Any]:
        return {
            "options": PassConfigParam(
                type_=dict, default_value={}, description="Options of nbl-export by their names: layers, precision, ..."
            )
        }

    def _run_for_config(self, model: HfModelHandler, config: Any, output_model_path: str) -> ONNXModelHandler:
        out = _directory(output_model_path)
        refuse_occupied(out)
        run = out.with_name(f"{out.name}-{_RUN}")
        run_job({**config.options, "model": str(model.model_name_or_path)}, run, Ui())
        with scratch_in(run) as scratch:
            move_into_place(Path(shutil.copytree(run / "model", scratch / "model")), out)
        return _handler(model, out, GRAPH_FILE)


def _directory(output: str) -> Path:
    """The directory for an output path of Olive, which may name a file of a graph. It must be new or empty."""
    return Path(output.removesuffix(".onnx"))


def _handler(before: Any, directory: Path, graph: str) -> ONNXModelHandler:
    """The handler of a written directory; all files beside the graph go where the graph goes."""
    beside = [str(f) for f in sorted(directory.iterdir()) if f.name not in (graph, f"{graph}.data")]
    attributes = {**(before.model_attributes or {}), "additional_files": beside}
    return ONNXModelHandler(str(directory), onnx_file_name=graph, model_attributes=attributes)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_config(), indent=1) + "\n")
