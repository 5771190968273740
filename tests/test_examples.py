"""The notebook runs from start to end, and shows what it says."""

import base64

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image


def check_stored(notebook) -> None:
    """The notebook is kept with its outputs, for readers on the web: two figures, and no path of the machine."""
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in stored) == 2
    text = "".join(output.get("text", "") for output in stored)
    assert "raw pixels" in text and "/home" not in text and "/tmp" not in text
    assert all("traceback" not in output for output in stored)


@pytest.mark.parametrize("with_weights", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quickstart(tmp_path, monkeypatch, with_weights):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("WEIGHTS", "")
    if with_weights:
        from vision_transformer import build_backbone

        torch.save(build_backbone("vit_nano", 16, img_size=32)[0].state_dict(), tmp_path / "weights.pth")
        monkeypatch.setenv("WEIGHTS", str(tmp_path / "weights.pth"))
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", as_version=4)
    check_stored(notebook)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(o.get("text", "") for o in outputs)
    assert ("54 of 54 tensors matched" if with_weights else "random weights") in text and "raw pixels" in text
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    for i, picture in enumerate(pictures):
        path = tmp_path / f"{i}.png"
        path.write_bytes(base64.b64decode(picture))
        assert np.array(Image.open(path).convert("L")).std() > 10
