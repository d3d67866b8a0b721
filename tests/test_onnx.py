"""Export to ONNX, compared in onnxruntime; and its messages, which need no additional packages."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from chargpt.export import onnx
from chargpt.export.onnx import PACKAGES, export
from chargpt.model import GPT, GPTConfig, UserError
from chargpt.text_generator import TextGenerator, load
from chargpt.vocabulary import Vocabulary

MISSING = [name for name in PACKAGES if find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

CHARACTERS = "\0\n abcdefgh\u0301字😀"
SWITCHES = {  # with the trained run below, every setting in every state
    "learned": dict(ngrams={3: 37}, qkv_bias=True, activation="gelu", norm="plain"),
    "rotary": dict(position="rotary", bias=False, activation="relu2", ngrams={2: 11, 4: 37}),
}


def generator_of(**switches) -> TextGenerator:
    """A network with random weights, large enough that each part matters."""
    gpt = GPT(GPTConfig(block_size=24, n_embd=16, n_head=2, n_layer=1, **switches), len(CHARACTERS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return TextGenerator(gpt, Vocabulary(CHARACTERS)).eval()


@needs_packages
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_logits_are_the_same_at_any_batch_size_and_length(tmp_path, switches):
    from onnxruntime import InferenceSession

    generator = generator_of(**switches)
    path = tmp_path / "model.onnx"
    path.write_text("an old file")
    assert "lengths 1 to 24" in export(generator, {}, path, "float16")
    assert os.listdir(tmp_path) == ["model.onnx"]
    session = InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    for B, T in ((1, 1), (3, 1), (1, 17), (2, 17), (1, 24), (5, 24)):
        ids = torch.randint(len(CHARACTERS), (B, T), generator=torch.Generator().manual_seed(B))
        (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
        with torch.no_grad():
            expected = generator.gpt(ids)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)
    assert onnx.compare(path.read_bytes(), generator.gpt)
    generator.gpt.head.weight.data[0, 0] += 0.01
    assert not onnx.compare(path.read_bytes(), generator.gpt)
    vocabulary = session.get_modelmeta().custom_metadata_map["vocabulary"]
    assert json.loads(vocabulary) == CHARACTERS


@needs_packages
def test_a_checkpoint_is_exported_by_the_command(trained, command, tmp_path):
    from onnxruntime import InferenceSession

    best = trained / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
    output = ["--to=onnx", f"--output={tmp_path / 'model.onnx'}"]
    result = command(trained, "export", *output, f"--ckpt_path={best}")
    assert (result.status, result.out) == (0, ""), result.err
    assert result.err.splitlines()[1:] == [
        f"wrote {tmp_path / 'model.onnx'}: input_ids (batch, length) to logits, for lengths 1 to 8"
    ]
    session = InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = torch.arange(16).view(2, 8)
    (logits,) = session.run(["logits"], {"input_ids": ids.numpy()})
    with torch.no_grad():
        expected = load(best).gpt(ids)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)


def test_missing_packages_are_named_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: name == "onnx" or None)
    with pytest.raises(UserError) as error:
        export(generator_of(), {}, tmp_path / "model.onnx", "float16")
    assert str(error.value) == (
        "export --to onnx needs packages that are not installed: onnxscript, onnxruntime\n"
        "install them: pip install onnxscript onnxruntime"
    )
    assert not os.listdir(tmp_path)


class OfTheLength(nn.Module):
    """Depends on the length in Python, so that the exported graph is right for one length only."""

    def forward(self, x):
        return x / sum(range(x.size(1)))


class OfTheData(nn.Module):
    """Depends on values in Python, which the exporter forbids."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@needs_packages
@pytest.mark.parametrize("module", [OfTheLength(), OfTheData()])
def test_a_network_that_cannot_be_converted_is_refused(tmp_path, module):
    generator = generator_of()
    generator.gpt.norm = module
    with pytest.raises(UserError, match="cannot be exported to ONNX: .*\n.*--to huggingface"):
        export(generator, {}, tmp_path / "model.onnx", "float16")
    assert not os.listdir(tmp_path)


def test_wrong_logits_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: sys)
    monkeypatch.setattr(onnx, "convert", lambda gpt, vocabulary: b"model")
    monkeypatch.setattr(onnx, "compare", lambda model, gpt: False)
    with pytest.raises(UserError, match="different logits"):
        export(generator_of(), {}, tmp_path / "model.onnx", "float16")
    assert not os.listdir(tmp_path)


def test_a_network_that_is_too_large_for_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: sys)
    monkeypatch.setattr(onnx, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="at most 2 GiB"):
        export(generator_of(), {}, tmp_path / "model.onnx", "float16")
