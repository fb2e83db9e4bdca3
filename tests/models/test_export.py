import sys

import pytest
import torch

from fedseg.errors import ModelError
from fedseg.models import build_model
from fedseg.models.export import export_model

SIZE = (5, 12, 7)  # no stride divides it
NETWORKS = {
    "mlru++": {"base_width": 2, "depths": [1, 1], "n_res": 1},
    "unet": {"widths": [4, 6]},
    "dynunet": {"widths": [4, 6, 8]},
    "rwkv-unet": {"depths": [1, 1, 1, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
    "rwkv-unet-3d": {"depths": [1, 1, 1, 2], "widths": [6, 8, 12, 16], "stem_width": 4},
}


def build(name, **options):
    torch.manual_seed(0)
    return build_model(name, in_channels=2, num_labels=3, patch_size=SIZE, **NETWORKS[name], **options)


def logits_of(model, image):
    with torch.no_grad():
        return model.eval()(image)


@pytest.mark.parametrize("name", ["unet", "dynunet", "rwkv-unet-3d"])  # the others: as ONNX
def test_an_exported_program_gives_the_same_logits_for_any_batch(tmp_path, name):
    model = build(name)
    export_model(model, tmp_path / "model.pt2", SIZE, 2)
    program = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 3):
        image = torch.randn(batch, 2, *SIZE)
        torch.testing.assert_close(program(image), logits_of(model, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("rwkv-unet", SIZE, {}),
        (
            "mlru++",
            (3, 8, 6),
            {"norm": "batch", "pos_embed": "learned", "attn_dropout": 0.1},
        ),  # not the positions' grid
    ],
)
def test_an_onnx_file_gives_the_same_logits_and_the_network_stays_as_it_was(tmp_path, name, size, options):
    pytest.importorskip("onnxscript", reason="needs the onnx extra")
    runtime = pytest.importorskip("onnxruntime", reason="needs the onnx extra")
    model = build(name, **options).train()
    next(model.children()).eval()
    before = [module.training for module in model.modules()]
    layout = getattr(model, "memory_format", None)
    export_model(model, tmp_path / "model.onnx", size, 2)
    assert [module.training for module in model.modules()] == before
    assert getattr(model, "memory_format", None) == layout
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for batch in (1, 3):
        image = torch.randn(batch, 2, *size)
        (found,) = session.run(["logits"], {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits_of(model, image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("file_name", ["model.pth", "model"])
def test_an_unknown_suffix_is_refused(tmp_path, file_name):
    with pytest.raises(ModelError, match=r"to \.onnx or \.pt2"):
        export_model(build("unet"), tmp_path / file_name, SIZE, 2)
    assert not list(tmp_path.iterdir())


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModelError, match=r'pip install "fedseg\[onnx\]"'):
        export_model(build("unet"), tmp_path / "model.onnx", SIZE, 2)


def test_decays_that_plain_operations_cannot_hold_are_refused(tmp_path):
    model = build("rwkv-unet")
    with torch.no_grad():
        model.stages[3][1].mix.decay[0] = -61.0
    with pytest.raises(ModelError, match=r"stages\.3\.1\.mix\.decay reaches 61"):
        export_model(model, tmp_path / "model.pt2", SIZE, 2)
    assert not (tmp_path / "model.pt2").exists()
